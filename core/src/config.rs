//! What can be set.

use std::path::PathBuf;
use std::time::Duration;

use pinfold_invalidate::DEFAULT_DEADLINE;

/// What can be set when a manager is made.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Config {
    /// How long a mutator of memory in use is kept waiting before it is let go and the work is reported LATE. Default 100 ms, at most 10 s; the
    /// longest of all managers of the process counts.
    pub deadline: Duration,
    /// Most bytes the device may have at a time. Default: no limit of ours.
    pub budget: u64,
    /// Ranges up to this many bytes whose pages are resident are taken on the thread that calls `acquire`, and up to 64 times as many on one that
    /// would wait for nothing else in `acquire_timeout`. Default 256 KiB; 0: never.
    pub inline_limit: usize,
    /// A socket at which other processes of the same user may watch what happens. Default: what `PINFOLD_WATCH` says (a path, or `1` for
    /// `pinfold-<pid>.sock` in the run-time folder), and none without it. Further managers that come to the same path take `<path>.2` and so on.
    pub watch_socket: Option<PathBuf>,
    /// Before every so manieth submit, one of its objects is invalidated, so that what an engine does with a stale lease is tried out. 0: never,
    /// which is the default unless `PINFOLD_INJECT_INVALIDATE` says otherwise. [`Manager::inject_invalidate`](crate::Manager::inject_invalidate)
    /// changes it.
    pub inject_invalidate: u32,
    /// How long dropping the manager waits for work that is under way before it asks the device. Default 5 s.
    pub close_limit: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            deadline: DEFAULT_DEADLINE,
            budget: u64::MAX,
            inline_limit: 256 << 10,
            watch_socket: None,
            inject_invalidate: std::env::var("PINFOLD_INJECT_INVALIDATE")
                .ok()
                .and_then(|n| n.parse().ok())
                .unwrap_or(0),
            close_limit: Duration::from_secs(5),
        }
    }
}
