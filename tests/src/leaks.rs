//! What a process holds, as the kernel counts it: descriptors, mappings, pinned memory. For "the same as before" at the end of a test.
//!
//! The counts are of the whole process. A test that compares them runs alone: in a child ([`isolated`](crate::process::isolated)), or as
//! the only test of its program.

use std::fs;

/// A count of what the process holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holdings {
    /// Open descriptors.
    pub descriptors: usize,
    /// Mappings.
    pub mappings: usize,
    /// Bytes of pinned memory (`VmPin`).
    pub pinned: u64,
    /// Threads.
    pub threads: u64,
}

impl Holdings {
    /// Counts now.
    ///
    /// # Panics
    /// If `/proc` is not mounted.
    #[must_use]
    pub fn now() -> Self {
        let maps = fs::read("/proc/self/maps").expect("/proc/self/maps");
        Self {
            // The directory's own descriptor is among its entries.
            descriptors: fs::read_dir("/proc/self/fd").expect("/proc/self/fd").count() - 1,
            mappings: maps.iter().filter(|&&byte| byte == b'\n').count(),
            pinned: pinned(),
            threads: status("Threads:"),
        }
    }
}

/// Bytes of memory that are pinned for devices in this process.
#[must_use]
pub fn pinned() -> u64 {
    status("VmPin:") * 1024
}

fn status(key: &str) -> u64 {
    let text = fs::read_to_string("/proc/self/status").expect("/proc/self/status");
    let line = text.lines().find_map(|line| line.strip_prefix(key)).expect("the kernel reports this count");
    line.split_whitespace().next().and_then(|number| number.parse().ok()).expect("a count is a number")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::isolated;

    #[test]
    fn what_is_opened_is_counted() {
        let ending = isolated(|| {
            let before = Holdings::now();
            let files: Vec<_> = (0..5).map(|_| fs::File::open("/proc/self/status").expect("/proc")).collect();
            assert_eq!(Holdings::now().descriptors, before.descriptors + 5);
            drop(files);
            assert_eq!(Holdings::now().descriptors, before.descriptors);
        });
        ending.expect_return();
    }
}
