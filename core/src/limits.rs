//! The limits of the process that count when a device locks memory.

use std::sync::OnceLock;

use nix::sys::resource::{Resource, getrlimit};

/// Bytes this process may lock now; no limit for whoever may lock as much as he wants (`CAP_IPC_LOCK`). `man 2 getrlimit`.
pub(crate) fn lockable() -> u64 {
    if is_exempt() {
        return u64::MAX;
    }
    getrlimit(Resource::RLIMIT_MEMLOCK).map_or(u64::MAX, |(soft, _)| soft)
}

/// Asked once: a process that gives a capability up later is told so by the kernel instead of by us.
fn is_exempt() -> bool {
    const CAP_IPC_LOCK: u32 = 14; // linux/capability.h
    static EXEMPT: OnceLock<bool> = OnceLock::new();
    *EXEMPT.get_or_init(|| {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
        effective.is_some_and(|effective| effective & 1 << CAP_IPC_LOCK != 0)
    })
}
