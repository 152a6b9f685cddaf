//! What is known of one worker: the part that its thread and others touch at any time, and the part under the lock.

use std::{sync::Arc, time::Instant};

use crate::{
    job::Account,
    slab::NIL,
    sync::{AtomicBool, JoinHandle, Parker},
};

/// The part of a worker that others touch without the lock.
pub(crate) struct Worker {
    /// Written under the lock by who cancels the current run, cleared under it when the next starts; read by the
    /// function.
    pub(crate) told: AtomicBool,
    /// Where it sleeps. Woken by who takes it off the idle list.
    pub(crate) parker: Parker,
}

impl Worker {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { told: AtomicBool::new(false), parker: Parker::default() })
    }
}

/// What a worker is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Doing {
    /// Between two pieces of work, starting, or spinning.
    Looking,
    Running(u32),
    Idle,
    /// The thread is about to end or has; the entry may be used again.
    Gone,
}

/// Guarded by the pool's lock. Aligned so that two workers don't write to the same cache lines.
#[repr(align(128))]
pub(crate) struct Entry {
    pub(crate) worker: Arc<Worker>,
    pub(crate) join: Option<JoinHandle<()>>,
    pub(crate) doing: Doing,
    pub(crate) node: u32,
    pub(crate) account: Account,
    /// Counted in `searching` of its account.
    pub(crate) searching: bool,
    /// Has spun since it last found something.
    pub(crate) spun: bool,
    /// Depth of `blocking`.
    pub(crate) blocked: u32,
    /// Found asleep by the watchdog during this run.
    pub(crate) stalled: bool,
    /// Does express work.
    pub(crate) express: bool,
    /// Follow-ups run without a pause.
    pub(crate) streak: u8,
    /// Its thread's start has not come back to who started it.
    pub(crate) starting: bool,
    /// Ends the pool when its present work is done.
    pub(crate) must_end: bool,
    /// Counts runs, so that the watchdog can tell one from the next.
    pub(crate) runs: u64,
    pub(crate) since: Option<Instant>,
    /// The kernel's thread id, once started.
    pub(crate) tid: Option<i32>,
    /// Neighbours on the idle list of its account.
    pub(crate) idle_prev: u32,
    pub(crate) idle_next: u32,
}

impl Entry {
    pub(crate) fn new(worker: Arc<Worker>, node: u32, account: Account) -> Self {
        Self {
            worker,
            join: None,
            doing: Doing::Looking,
            node,
            account,
            searching: true,
            spun: true,
            blocked: 0,
            stalled: false,
            express: false,
            streak: 0,
            starting: true,
            must_end: false,
            runs: 0,
            since: None,
            tid: None,
            idle_prev: NIL,
            idle_next: NIL,
        }
    }

    /// Whether the place in the table may be used again.
    pub(crate) fn is_over(&self) -> bool {
        self.doing == Doing::Gone && !self.starting
    }

    /// Whether it is in `running` of its account.
    pub(crate) fn counts(&self) -> bool {
        let active = matches!(self.doing, Doing::Looking | Doing::Running(_));
        active && !self.express && self.blocked == 0 && !self.stalled
    }
}
