//! How a queue is made, what it answers where it can't do what it is asked, and what it counts.
//!
//! Nothing here has a part in a post or a read but the numbers that bound them. Each error knows the errno that Linux's own queue answers in the same case, so that who
//! speaks its protocol can pass it on.

use std::io;

use thiserror::Error;

use super::super::limit::WatchLimit;
use super::super::record::{MAX_RECORD_LEN, Record};

/// The most slots [`WatchQueue::set_size`](super::WatchQueue::set_size) gives, as in the kernel.
pub const MAX_COMPATIBLE_SIZE: usize = 512;
/// The most slots [`WatchConfig::capacity`] gives.
pub const MAX_CAPACITY: usize = 1 << 20;

/// Who may see an event: asked with the object's id and the record, tag filled in, after the filter. Answers whether this queue gets it.
///
/// It runs on the posting thread, which may be the one that a mutator waits for: it must not allocate, free, block, or call into
/// Pinfold, some of whose locks may be held.
pub type Policy = dyn Fn(u64, &Record) -> bool + Send + Sync;

/// When the queue's file descriptor is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Wake {
    /// The descriptor is readable exactly while there is something to read, for any `poll`. Costs two system calls for each time that the queue
    /// goes from empty to non-empty and back; nothing before the descriptor is first asked for.
    #[default]
    Level,
    /// The descriptor becomes readable only after [`WatchQueue::arm`](super::WatchQueue::arm) answered false. No system call while the reader is awake.
    OnDemand,
}

/// How a queue is made.
#[derive(Default)]
#[must_use]
pub struct WatchConfig {
    pub(super) capacity: Option<usize>,
    pub(super) sized_later: bool,
    pub(super) wake: Wake,
    pub(super) strict: bool,
    pub(super) limit: WatchLimit,
    pub(super) policy: Option<Box<Policy>>,
}

impl WatchConfig {
    /// Room for this many records, 1 to [`MAX_CAPACITY`], rounded up to a multiple of 32. Without this call: 512.
    pub fn capacity(mut self, records: usize) -> Self {
        self.capacity = Some(records);
        self
    }

    /// No room yet: [`WatchQueue::set_size`](super::WatchQueue::set_size) gives it. Until then every record is lost.
    pub fn sized_later(mut self) -> Self {
        self.sized_later = true;
        self
    }

    /// When the descriptor is written.
    pub fn wake(mut self, wake: Wake) -> Self {
        self.wake = wake;
        self
    }

    /// Behave as the kernel's queue does where this one is better: see the [module](super::super) for the list.
    pub fn strict(mut self) -> Self {
        self.strict = true;
        self
    }

    /// Whose limit the queue's watches count against. Without this call: the process's, `RLIMIT_NOFILE`.
    pub fn limit(mut self, limit: WatchLimit) -> Self {
        self.limit = limit;
        self
    }

    /// Who may see what.
    pub fn policy(mut self, policy: impl Fn(u64, &Record) -> bool + Send + Sync + 'static) -> Self {
        self.policy = Some(Box::new(policy));
        self
    }
}

/// Why a queue has no such size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SizeError {
    /// Out of bounds. `EINVAL`.
    #[error("a queue has 1 to {max} slots, not {asked}")]
    OutOfBounds {
        /// Slots asked for.
        asked: usize,
        /// The most there can be.
        max: usize,
    },
    /// It has a size already. `EBUSY`.
    #[error("the queue has {0} slots already; the size is set once")]
    AlreadySized(usize),
}

impl SizeError {
    /// The errno that the kernel's ioctl answers in this case.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::OutOfBounds { .. } => libc::EINVAL,
            Self::AlreadySized(_) => libc::EBUSY,
        }
    }
}

/// Why there is no queue.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The capacity asked for is out of bounds.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// The kernel has no eventfd for us.
    #[error("no eventfd for the queue's wake-ups")]
    Signal(#[source] io::Error),
}

impl OpenError {
    /// The errno of this case.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Size(error) => error.errno(),
            Self::Signal(error) => error.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}

/// Why a read gave nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ReadError {
    /// Nothing is there, now or within the time given. `EAGAIN`.
    #[error("no record is waiting")]
    Empty,
    /// The first record is longer than the buffer; it stays. `ENOBUFS`.
    #[error("the next record has {needed} bytes and the buffer {given}; {MAX_RECORD_LEN} are always enough")]
    NoBuffer {
        /// Bytes of the record.
        needed: usize,
        /// Bytes of the buffer.
        given: usize,
    },
}

impl ReadError {
    /// The errno that a read of the kernel's queue answers in this case.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Empty => libc::EAGAIN,
            Self::NoBuffer { .. } => libc::ENOBUFS,
        }
    }
}

/// What a queue has seen so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Counters {
    /// Records that filter and policy let through: stored or lost.
    pub posted: u64,
    /// Records the filter rejected.
    pub filtered: u64,
    /// Records the policy rejected.
    pub denied: u64,
    /// Records that found no room.
    pub lost: u64,
    /// Records waiting now.
    pub pending: u64,
    /// The most records that ever waited, as far as reads and this call have seen it.
    pub high_water: u64,
}
