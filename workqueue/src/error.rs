use std::io;

/// Why a pool or queue could not be made, or an operation on a work item was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting that cannot work, like a maximum of no workers at all.
    #[error("{0}")]
    Invalid(&'static str),
    /// Not even the first worker could be started.
    #[error("the system starts no thread for `{name}`; raise RLIMIT_NPROC or the cgroup's pids.max")]
    NoThread {
        /// The pool's name.
        name: Box<str>,
        /// What the system answered, usually EAGAIN.
        source: io::Error,
    },
    /// The queue is being drained or destroyed and takes work only from its own running items.
    #[error("the queue drains or is destroyed and takes work only from its own running items")]
    Draining,
    /// The pool has ended.
    #[error("the pool has ended")]
    Ended,
    /// The call would wait for the very item that makes it.
    #[error("a work function cannot wait for itself")]
    Deadlock,
    /// The deadline passed first.
    #[error("the deadline passed first")]
    TimedOut,
}

impl Error {
    /// The `errno` a system call would give for this.
    #[must_use]
    pub fn errno(&self) -> i32 {
        use rustix::io::Errno;
        match self {
            Self::Invalid(_) => Errno::INVAL.raw_os_error(),
            Self::NoThread { source, .. } => source.raw_os_error().unwrap_or(Errno::AGAIN.raw_os_error()),
            Self::Draining => Errno::BUSY.raw_os_error(),
            Self::Ended => Errno::SHUTDOWN.raw_os_error(),
            Self::Deadlock => Errno::DEADLK.raw_os_error(),
            Self::TimedOut => Errno::TIMEDOUT.raw_os_error(),
        }
    }
}

/// Why a job was not accepted. It has been called as cancelled by the time the caller sees this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// The queue is being drained or destroyed, or the pool has ended.
    #[error("the queue drains, is destroyed or its pool has ended; the job was called as cancelled")]
    Draining,
    /// May-sleep work when nobody of that account runs, no worker is free and no more may be started.
    #[error("no may-sleep worker is running, free or allowed; raise the limit. The job was called as cancelled")]
    Limit,
}
