//! What the figures were taken on, as the system tells it.

use std::fs;

use pinfold_invalidate::page_size;
use serde::{Deserialize, Serialize};

use crate::placement;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) processors: usize,
    pub(crate) model: String,
    pub(crate) memory_bytes: u64,
    pub(crate) kernel: String,
    pub(crate) page_size: usize,
    pub(crate) load_at_start: f64,
    pub(crate) load_at_end: f64,
    pub(crate) clock: String,
}

impl Machine {
    pub(crate) fn read() -> Self {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = text("/proc/cpuinfo");
        let model =
            cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|pair| pair.1);
        let load = load();
        Self {
            processors: placement::allowed().len(),
            model: model.unwrap_or(std::env::consts::ARCH).trim().to_owned(),
            memory_bytes: meminfo("MemTotal"),
            kernel: text("/proc/sys/kernel/osrelease").trim().to_owned(),
            page_size: page_size(),
            load_at_start: load,
            load_at_end: load,
            clock: text("/sys/devices/system/clocksource/clocksource0/current_clocksource").trim().to_owned(),
        }
    }
}

/// Processes that ran or waited for a processor, averaged over a minute.
pub(crate) fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or_default()
}

/// A line of `/proc/meminfo`, in bytes; 0 if it isn't there.
fn meminfo(key: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or_default() * 1024
}

/// How much memory a program can take without pushing others out, in bytes: what the system has, and what its control group lets it.
pub(crate) fn memory_available() -> u64 {
    let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let group = number("/sys/fs/cgroup/memory.max").zip(number("/sys/fs/cgroup/memory.current"));
    let left = group.map_or(u64::MAX, |(most, now)| most.saturating_sub(now));
    meminfo("MemAvailable").min(left)
}

/// A limit of the kernel's that is a number in `/proc/sys`.
pub(crate) fn sysctl(name: &str) -> Option<u64> {
    fs::read_to_string(format!("/proc/sys/{name}")).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_says_what_it_is() {
        let machine = Machine::read();
        assert!(machine.processors > 0 && machine.memory_bytes > 0 && !machine.kernel.is_empty(), "{machine:?}");
        assert!(memory_available() > 0 && memory_available() <= machine.memory_bytes);
        assert!(sysctl("vm/max_map_count").is_some_and(|count| count > 0));
    }
}
