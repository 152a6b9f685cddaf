//! How many watches one owner may have.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A count of watches with an upper bound, shared by the queues that count against it. The default is the process's own, bounded by the soft limit of
/// `RLIMIT_NOFILE` at the time of each new watch, as the kernel bounds a user's.
#[derive(Debug, Clone, Default)]
pub struct WatchLimit(Option<Arc<Bounded>>);

#[derive(Debug)]
struct Bounded {
    max: usize,
    watches: AtomicUsize,
}

/// Watches of all queues without a limit of their own.
static PROCESS: AtomicUsize = AtomicUsize::new(0);

impl WatchLimit {
    /// A limit of its own.
    #[must_use]
    pub fn new(max: usize) -> Self {
        Self(Some(Arc::new(Bounded { max, watches: AtomicUsize::new(0) })))
    }

    /// The most watches there may be now.
    pub(super) fn max(&self) -> usize {
        self.0.as_ref().map_or_else(open_files_limit, |own| own.max)
    }

    /// Counts one more watch, if there may be one.
    pub(super) fn charge(&self) -> bool {
        let max = self.max();
        // Relaxed: a count and nothing else.
        self.count().fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| (now < max).then_some(now + 1)).is_ok()
    }

    /// Counts one watch less.
    pub(super) fn uncharge(&self) {
        self.count().fetch_sub(1, Ordering::Relaxed);
    }

    fn count(&self) -> &AtomicUsize {
        self.0.as_ref().map_or(&PROCESS, |own| &own.watches)
    }
}

fn open_files_limit() -> usize {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a writable rlimit for the length of the call.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    limit.rlim_cur as usize
}
