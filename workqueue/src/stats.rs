//! What can be read about a pool while it works.

use std::time::Duration;

/// What one account has done since the pool was made. All nodes are added up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
// What every piece of work touches comes first, on the line of the account that it touches anyway.
#[repr(C)]
#[non_exhaustive]
pub struct Counters {
    /// Work accepted, timers not counted before they fire.
    pub queued: u64,
    /// Functions called by workers.
    pub started: u64,
    /// Functions that returned to their worker, or panicked.
    pub finished: u64,
    /// The longest that ready work has waited for a worker.
    pub longest_wait: Duration,
    /// Pending work called as cancelled.
    pub cancelled: u64,
    /// Functions that panicked.
    pub panicked: u64,
    /// Workers found asleep in undeclared blocking while work waited.
    pub stalls: u64,
    /// Threads started.
    pub workers_made: u64,
    /// Threads that ended.
    pub workers_gone: u64,
    /// Threads that the system refused to start.
    pub workers_refused: u64,
    /// Times an idle worker was woken.
    pub wake_ups: u64,
}

impl Counters {
    pub(crate) fn add(&mut self, other: &Self) {
        self.queued += other.queued;
        self.started += other.started;
        self.finished += other.finished;
        self.cancelled += other.cancelled;
        self.panicked += other.panicked;
        self.stalls += other.stalls;
        self.workers_made += other.workers_made;
        self.workers_gone += other.workers_gone;
        self.workers_refused += other.workers_refused;
        self.wake_ups += other.wake_ups;
        self.longest_wait = self.longest_wait.max(other.longest_wait);
    }
}
