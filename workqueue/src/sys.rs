//! What the kernel is asked and told about threads. Every refusal is an answer here, never an error.

use std::fs;

use rustix::{
    process::{Resource, getpriority_process, getrlimit, setpriority_process},
    thread::{CpuSet, gettid, sched_setaffinity},
};
use thread_priority::{
    RealtimeThreadSchedulePolicy::RoundRobin, ThreadPriority, ThreadSchedulePolicy::Realtime,
    set_thread_priority_and_policy, thread_native_id,
};

/// How urgent a pool's workers are to the scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Priority {
    /// As the thread that made them.
    #[default]
    Normal,
    /// The best nice value that the process may get.
    High,
    /// Real time where it is permitted (`SCHED_RR` at its lowest priority, above every thread that is not real-time:
    /// CAP_SYS_NICE or RLIMIT_RTPRIO), else as [`High`](Self::High). Threads that such work starts inherit it.
    RealTime,
}

/// The priority that workers have got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Obtained {
    /// This nice value, from -20, the most urgent, to 19.
    Nice(i32),
    /// `SCHED_RR`.
    RoundRobin,
}

/// The kernel's number of the calling thread.
pub(crate) fn thread_id() -> Option<i32> {
    Some(gettid().as_raw_nonzero().get())
}

/// Asks for the best that `wanted` stands for, and says what the calling thread has then; None if it can't be read.
pub(crate) fn raise_priority(wanted: Priority) -> Option<Obtained> {
    if wanted == Priority::RealTime
        && set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, Realtime(RoundRobin)).is_ok()
    {
        return Some(Obtained::RoundRobin);
    }
    let me = Some(gettid());
    for nice in -20..0 {
        if setpriority_process(me, nice).is_ok() {
            break;
        }
    }
    getpriority_process(me).ok().map(Obtained::Nice)
}

/// Keeps the calling thread on `processors`; false if the system has none of them.
pub(crate) fn stay_on(processors: &[usize]) -> bool {
    let mut set = CpuSet::new();
    for &processor in processors.iter().filter(|&&processor| processor < CpuSet::MAX_CPU) {
        set.set(processor);
    }
    set.count() > 0 && sched_setaffinity(None, &set).is_ok()
}

/// How many processes and threads the user may have; None without limit.
pub(crate) fn thread_limit() -> Option<u64> {
    getrlimit(Resource::Nproc).current
}

/// Whether the process may go beyond that limit (CAP_SYS_RESOURCE or CAP_SYS_ADMIN).
pub(crate) fn privileged() -> bool {
    const SYS_ADMIN: u64 = 1 << 21;
    const SYS_RESOURCE: u64 = 1 << 24;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & (SYS_ADMIN | SYS_RESOURCE) != 0)
}

/// Whether thread `tid` of this process sleeps in the kernel. A thread that cannot be asked counts as asleep: the
/// caller asks only about threads that have shown no progress.
pub(crate) fn sleeps(tid: i32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/self/task/{tid}/stat")) else { return true };
    // The state follows the name, which is in parentheses and may contain any character.
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    !matches!(state, Some('R'))
}
