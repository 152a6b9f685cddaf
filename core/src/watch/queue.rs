//! A queue, as who reads it holds it: one reader's ring, with its filter, its policy, its wake-up and its counters.

mod config;
mod inner;

#[cfg(not(loom))]
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
#[cfg(not(loom))]
use std::time::{Duration, Instant};

use super::filter::{FilterEntry, FilterError};
use super::note::Note;
use super::record::{MAX_RECORD_LEN, Record};

pub use config::{
    Counters, MAX_CAPACITY, MAX_COMPATIBLE_SIZE, OpenError, Policy, ReadError, SizeError, Wake, WatchConfig,
};
#[cfg(not(loom))]
pub(super) use inner::Wakeup;
pub(super) use inner::{Attachment, Offered, QueueInner};

/// The reading end of a queue. Dropping it is [`clear`](Self::clear).
pub struct WatchQueue {
    pub(super) inner: Arc<QueueInner>,
}

impl WatchQueue {
    /// A queue of its own, watching nothing yet.
    ///
    /// # Errors
    /// [`OpenError::Size`] if the capacity is out of bounds, [`OpenError::Signal`] if there are no file descriptors left.
    pub fn new(config: WatchConfig) -> Result<Self, OpenError> {
        Ok(Self { inner: Arc::new(QueueInner::open(config)?) })
    }

    /// Gives the queue its slots: `records` rounded up to a multiple of 32. All memory is taken here, posting takes none.
    ///
    /// # Errors
    /// [`SizeError::OutOfBounds`] outside 1..=512, [`SizeError::AlreadySized`] the second time.
    pub fn set_size(&self, records: usize) -> Result<(), SizeError> {
        self.inner.size(records, MAX_COMPATIBLE_SIZE)
    }

    /// Sets what the queue wants, or with `None` that it wants everything. A post sees the old filter or the new one.
    ///
    /// With a filter set, a record passes if an entry has its type, its subtype's bit, and its masked info. Entries of types that the queue doesn't
    /// know (128 and up) are checked and dropped; a filter without entries left rejects everything. Removal and loss records always pass.
    ///
    /// # Errors
    /// [`FilterError`]; the old filter stays.
    pub fn set_filter(&self, entries: Option<&[FilterEntry]>) -> Result<(), FilterError> {
        self.inner.set_filter(entries)
    }

    /// Copies as many whole records to `out` as fit, oldest first, without waiting. Answers how many bytes they have; 0 if nothing will ever
    /// come again (or if `out` is empty). [`records`](super::records) takes the bytes apart.
    ///
    /// # Errors
    /// [`ReadError::Empty`] if there is nothing, [`ReadError::NoBuffer`] if the first record doesn't fit.
    #[inline]
    pub fn read(&self, out: &mut [u8]) -> Result<usize, ReadError> {
        if out.is_empty() {
            return Ok(0);
        }
        self.inner.read::<false>(out).map_err(|needed| match needed {
            Some(needed) => ReadError::NoBuffer { needed: needed.get(), given: out.len() },
            None => ReadError::Empty,
        })
    }

    /// The same, but waits for a record: at most `limit`, or for good.
    ///
    /// # Errors
    /// [`ReadError::Empty`] if the time is over, [`ReadError::NoBuffer`] if the first record doesn't fit.
    #[cfg(not(loom))]
    pub fn read_timeout(&self, out: &mut [u8], limit: Option<Duration>) -> Result<usize, ReadError> {
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        loop {
            match self.read(out) {
                Err(ReadError::Empty) => {}
                done => return done,
            }
            if !self.arm() && !self.wait(deadline) {
                return self.read(out);
            }
        }
    }

    /// Sleeps until the descriptor is readable. Answers false if the deadline is over.
    #[cfg(not(loom))]
    fn wait(&self, deadline: Option<Instant>) -> bool {
        let timeout = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
            Some(Duration::ZERO) => return false,
            // Rounded up, so that it isn't asked again and again within the last millisecond.
            Some(left) => i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX),
            None => -1,
        };
        let mut fd =
            libc::pollfd { fd: self.inner.bell().signal().as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: `fd` is one writable pollfd for the length of the call, and its descriptor lives as long as `self`.
        unsafe { libc::poll(&raw mut fd, 1, timeout) };
        // Readable, timed out, or interrupted: the caller's loop finds out by looking.
        true
    }

    /// Takes record after record, without waiting, until there is none. While a thread is in the middle of posting one, those behind it aren't there
    /// either.
    pub fn records(&self) -> impl Iterator<Item = Record> {
        let mut buffer = [0; MAX_RECORD_LEN + 1];
        std::iter::from_fn(move || {
            let len = self.inner.read::<true>(&mut buffer).ok()?;
            Record::from_bytes(&buffer[..len]).ok()
        })
    }

    /// The same, decoded.
    pub fn notes(&self) -> impl Iterator<Item = Note> {
        self.records().map(|record| record.note())
    }

    /// Makes the next post write the descriptor. Answers true if there is something to read already (then there is no need to wait).
    ///
    /// For [`Wake::OnDemand`]: read until [`ReadError::Empty`], arm, and wait only if this answers false.
    pub fn arm(&self) -> bool {
        self.inner.arm_in_turn()
    }

    /// The queue goes away: no post reaches it any more, and it watches nothing any more. What it holds can still be read; then a read answers 0.
    pub fn clear(&self) {
        self.inner.clear();
    }

    /// What the queue has seen so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.inner.counters()
    }

    /// How many records fit; `None` before [`set_size`](Self::set_size).
    #[must_use]
    pub fn capacity(&self) -> Option<usize> {
        self.inner.capacity()
    }
}

impl Drop for WatchQueue {
    fn drop(&mut self) {
        self.inner.clear();
    }
}

impl std::fmt::Debug for WatchQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WatchQueue").field("capacity", &self.capacity()).field("counters", &self.counters()).finish()
    }
}

#[cfg(not(loom))]
impl AsFd for WatchQueue {
    /// The descriptor to poll for reading. Don't read it; [`WatchQueue::read`] does all that is needed.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.keep_level();
        self.inner.bell().signal().as_fd()
    }
}

#[cfg(not(loom))]
impl AsRawFd for WatchQueue {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}
