//! A queue: one reader's ring, with its filter, its policy, its wake-up and its counters.

use std::collections::VecDeque;
use std::io;
use std::num::NonZeroUsize;
#[cfg(not(loom))]
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Weak};
#[cfg(not(loom))]
use std::time::{Duration, Instant};

use thiserror::Error;

use super::bell::Bell;
use super::filter::{Filter, FilterEntry, FilterError};
use super::limit::WatchLimit;
use super::list::{ListInner, Scope};
use super::note::Note;
use super::record::{HEADER_LEN, MAX_RECORD_LEN, Record, TYPE_META};
use super::ring::{Line, Push, Reader, Ring, Slots};
#[cfg(not(loom))]
use super::share::Caller;
use super::signal::Signal;
use super::snapshot::Snapshot;
use super::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use super::sync::{Mutex, lock};
use super::turn::{Taken, Turn};

/// Slots come in groups of this many: a page of 128-byte slots in the kernel, whatever the page size is here.
const SLOT_GROUP: usize = 32;
/// The most slots [`WatchQueue::set_size`] gives, as in the kernel.
pub const MAX_COMPATIBLE_SIZE: usize = 512;
/// The most slots [`WatchConfig::capacity`] gives.
pub const MAX_CAPACITY: usize = 1 << 20;

/// Who may see an event: asked with the object's id and the record, tag filled in, after the filter. Answers whether this queue gets it.
///
/// It runs on the posting thread, which may be the one that a mutator waits for: it must not allocate, free, block, or call into this module.
pub type Policy = dyn Fn(u64, &Record) -> bool + Send + Sync;

/// When the queue's file descriptor is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Wake {
    /// The descriptor is readable exactly while there is something to read, for any `poll`. Costs two system calls for each time that the queue
    /// goes from empty to non-empty and back; nothing before the descriptor is first asked for.
    #[default]
    Level,
    /// The descriptor becomes readable only after [`WatchQueue::arm`] answered false. No system call while the reader is awake.
    OnDemand,
}

/// How a queue is made.
#[derive(Default)]
#[must_use]
pub struct WatchConfig {
    capacity: Option<usize>,
    sized_later: bool,
    wake: Wake,
    strict: bool,
    limit: WatchLimit,
    policy: Option<Box<Policy>>,
}

impl WatchConfig {
    /// Room for this many records, 1 to [`MAX_CAPACITY`], rounded up to a multiple of 32. Without this call: 512.
    pub fn capacity(mut self, records: usize) -> Self {
        self.capacity = Some(records);
        self
    }

    /// No room yet: [`WatchQueue::set_size`] gives it. Until then every record is lost.
    pub fn sized_later(mut self) -> Self {
        self.sized_later = true;
        self
    }

    /// When the descriptor is written.
    pub fn wake(mut self, wake: Wake) -> Self {
        self.wake = wake;
        self
    }

    /// Behave as the kernel's queue does where this one is better: see the [module](super) for the list.
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
        let bell = Bell::new(Signal::new().map_err(OpenError::Signal)?);
        let inner = QueueInner::new(Ring::new(), Wakeup::Bell(bell), config.policy, config.limit);
        let choosy = AtomicBool::new(config.strict || inner.policy.is_some());
        let inner = QueueInner { strict: config.strict, choosy, wake: config.wake, ..inner };
        if !config.sized_later {
            inner.size(config.capacity.unwrap_or(MAX_COMPATIBLE_SIZE), MAX_CAPACITY)?;
        }
        Ok(Self { inner: Arc::new(inner) })
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
        let filter = entries.map(|entries| Filter::new(entries, self.inner.strict)).transpose()?;
        if filter.is_some() {
            // Relaxed: a post that doesn't see it counts as one before this call.
            self.inner.choosy.store(true, Ordering::Relaxed);
        }
        drop(self.inner.filter.replace(filter.map(Box::new)));
        Ok(())
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
        let _turn = self.inner.reading.0.turn.take();
        self.inner.arm()
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
        self.inner.ring.limit().map(|limit| limit as usize)
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
        let inner = &self.inner;
        // Nobody could poll before the first time that somebody asked for the descriptor, so until then it needn't be kept right.
        if inner.wake == Wake::Level && !inner.bell().is_level() {
            let _turn = inner.reading.0.turn.take();
            inner.bell().keep_level();
            // Relaxed: reads look under the same lock.
            inner.beside.fetch_or(REARM, Ordering::Relaxed);
            inner.arm();
        }
        inner.bell().signal().as_fd()
    }
}

#[cfg(not(loom))]
impl AsRawFd for WatchQueue {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

/// A list that names the queue: where [`WatchQueue::clear`] has to go.
pub(super) struct Attachment {
    pub(super) list: Weak<ListInner>,
    pub(super) scope: Scope,
}

/// How a post wakes the reader.
pub(super) enum Wakeup {
    /// The reader is in this process.
    Bell(Bell),
    /// The reader is in another process.
    #[cfg(not(loom))]
    Caller(Caller),
}

/// In `beside`: a bell to be armed after each read. Set under the reader's lock, for good.
#[cfg(not(loom))]
const REARM: usize = 1;
/// In `beside`: a removal record.
const REMOVAL: usize = 2;

/// How far [`QueueInner::offer_plainly`] came.
pub(super) enum Offered {
    /// To the end.
    Whole,
    /// The record is stored, but the reader to be [called](QueueInner::call).
    Uncalled,
    /// Nowhere: the record is to be [stored](QueueInner::store).
    Not,
}

/// The queue itself, which watch lists hold too.
pub(super) struct QueueInner {
    ring: Ring,
    wakeup: Wakeup,
    filter: Snapshot<Filter>,
    policy: Option<Box<Policy>>,
    strict: bool,
    /// Whether a post has to ask for more than room: there is a policy, there ever was a filter, or the queue is strict. One word for all that most queues
    /// don't have. Only ever set.
    choosy: AtomicBool,
    #[cfg_attr(loom, expect(dead_code, reason = "the model's signal is no descriptor to ask for"))]
    wake: Wake,
    pub(super) limit: WatchLimit,
    reading: Line<Reading>,
    /// Removal records that found the ring full, each with the position before which it belongs. Room for one per watch is made when the watch
    /// is. Taken by removals and readers, never by a post.
    removals: Mutex<VecDeque<(u64, Record)>>,
    /// What a read has to see to beside the ring: [`REMOVAL`] for each of `removals`, written under their lock, and [`REARM`].
    beside: AtomicUsize,
    /// How many ever went into `removals`.
    removals_total: AtomicU64,
    /// The lists that name this queue; `None` once it is cleared. Taken inside a list's lock, never the other way round.
    pub(super) watches: Mutex<Option<Vec<Attachment>>>,
    filtered: AtomicU64,
    denied: AtomicU64,
}

/// What a read gave: how many bytes, or how many the next record has, if it doesn't fit, or nothing. In two registers, where a [`ReadError`] needs memory.
type Read = Result<usize, Option<NonZeroUsize>>;

/// What every read writes. On a line of its own: the other fields here are what every post looks at.
struct Reading {
    /// The reader's lock. Never taken by a post.
    turn: Turn,
    /// The most records that a reader has seen waiting. Written under the reader's lock.
    high_water: AtomicU64,
}

impl QueueInner {
    pub(super) fn new(ring: Ring, wakeup: Wakeup, policy: Option<Box<Policy>>, limit: WatchLimit) -> Self {
        Self {
            ring,
            wakeup,
            filter: Snapshot::empty(),
            choosy: AtomicBool::new(policy.is_some()),
            policy,
            strict: false,
            wake: Wake::Level,
            limit,
            reading: Line(Reading { turn: Turn::new(), high_water: AtomicU64::new(0) }),
            removals: Mutex::new(VecDeque::new()),
            beside: AtomicUsize::new(0),
            removals_total: AtomicU64::new(0),
            watches: Mutex::new(Some(Vec::new())),
            filtered: AtomicU64::new(0),
            denied: AtomicU64::new(0),
        }
    }

    fn size(&self, records: usize, max: usize) -> Result<(), SizeError> {
        if let Some(limit) = self.ring.limit() {
            return Err(SizeError::AlreadySized(limit as usize));
        }
        if !(1..=max).contains(&records) {
            return Err(SizeError::OutOfBounds { asked: records, max });
        }
        let slots = Slots::new(records.next_multiple_of(SLOT_GROUP));
        self.ring.set_slots(slots).map_err(|_| SizeError::AlreadySized(self.capacity_now()))?;
        // Records lost so far have become readable as a loss.
        if !self.strict {
            self.call();
        }
        Ok(())
    }

    /// The bell of a queue that is read in this process, as every [`WatchQueue`] is.
    #[inline]
    fn bell(&self) -> &Bell {
        match &self.wakeup {
            Wakeup::Bell(bell) => bell,
            #[cfg(not(loom))]
            Wakeup::Caller(_) => unreachable!("a queue that another process reads has no reader here"),
        }
    }

    /// Whether the descriptor is readable.
    #[cfg(all(test, loom))]
    pub(super) fn signal_is_raised(&self) -> bool {
        self.bell().signal().is_raised()
    }

    /// Whether every read arms the bell.
    #[inline]
    fn bell_is_level(&self) -> bool {
        matches!(&self.wakeup, Wakeup::Bell(bell) if bell.is_level())
    }

    /// Arms the bell; see [`Bell::arm`]. The caller holds the reader's lock. Not inlined: most queues' descriptors are polled by nobody.
    #[inline(never)]
    fn arm(&self) -> bool {
        self.bell().arm(|| self.readable())
    }

    /// Whether the reader may want to be [woken](Self::call). The caller has just published something.
    #[inline]
    fn may_call(&self) -> bool {
        match &self.wakeup {
            Wakeup::Bell(bell) => bell.may_be_armed(),
            #[cfg(not(loom))]
            Wakeup::Caller(_) => true,
        }
    }

    /// Wakes the reader if it wants to be woken. The caller has just published something.
    #[inline]
    pub(super) fn call(&self) {
        match &self.wakeup {
            Wakeup::Bell(bell) => bell.ring_if_armed(),
            #[cfg(not(loom))]
            Wakeup::Caller(caller) => caller.call_if_armed(),
        }
    }

    /// How many more records fit now, if nobody else posts.
    #[cfg(not(loom))]
    pub(super) fn room(&self) -> u64 {
        self.ring.limit().unwrap_or(0).saturating_sub(self.ring.usage().1)
    }

    pub(super) fn capacity_now(&self) -> usize {
        self.ring.limit().map_or(0, |limit| limit as usize)
    }

    /// Whether a post has to ask filter and policy. Most queues let everything in.
    #[inline]
    pub(super) fn is_choosy(&self) -> bool {
        // Relaxed: a filter set concurrently counts as set after this call.
        self.choosy.load(Ordering::Relaxed)
    }

    /// The first steps of an [`offer`](Self::offer) to a queue that isn't choosy: nearly always all of them.
    #[inline(always)]
    pub(super) fn offer_plainly(&self, record: &Record, tag: u8) -> Offered {
        match self.ring.push_plainly(record, tag) {
            Some(Push::Stored) if self.may_call() => Offered::Uncalled,
            Some(_) => Offered::Whole,
            None => Offered::Not,
        }
    }

    /// Puts a record in, with this tag, if filter and policy let it. Never waits, allocates or frees.
    pub(super) fn offer(&self, object: u64, record: &Record, tag: u8) {
        if !self.is_choosy() || self.wants(object, record, tag) {
            self.store(record, tag);
        }
    }

    /// Whether filter and policy let the record in. If not, it is counted.
    fn wants(&self, object: u64, record: &Record, tag: u8) -> bool {
        if record.kind() != TYPE_META && self.filter.read(|filter| filter.passes(record, tag)) == Some(false) {
            self.filtered.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        if self.policy.as_ref().is_some_and(|policy| !policy(object, &record.with_tag(tag))) {
            self.denied.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        if self.strict && self.ring.limit().is_none() {
            // The kernel forgets these without a mark.
            self.ring.count_lost();
            return false;
        }
        true
    }

    #[inline]
    pub(super) fn store(&self, record: &Record, tag: u8) {
        let tell = match self.ring.push_or_mark_lost(record, tag) {
            Push::Stored => true,
            // The kernel doesn't wake for a loss.
            Push::Full(_) => !self.strict,
            Push::Covered | Push::Defunct => false,
        };
        if tell {
            self.call();
        }
    }

    /// Tells the reader that a watch is gone, also if the ring is full. Not for the monitor: it takes a lock.
    pub(super) fn announce_removal(&self, record: &Record, tag: u8) {
        if self.strict {
            if self.ring.limit().is_some() {
                self.store(record, tag);
            }
            return;
        }
        let position = match self.ring.push_removal(record, tag) {
            Push::Full(position) => position,
            Push::Stored => return self.call(),
            Push::Covered | Push::Defunct => return,
        };
        let mut removals = lock(&self.removals);
        removals.push_back((position, record.with_tag(tag)));
        self.removals_total.fetch_add(1, Ordering::Relaxed);
        // Release: pairs with the Acquire of the reads.
        self.beside.fetch_add(REMOVAL, Ordering::Release);
        drop(removals);
        self.call();
    }

    /// Makes room for the removal record of one more watch, there being `watches` already.
    pub(super) fn reserve_removal(&self, watches: usize) {
        lock(&self.removals).reserve(watches + 1);
    }

    /// Whether a removal record belongs before this position.
    fn removal_before(&self, position: u64) -> bool {
        self.removals_wait() && lock(&self.removals).front().is_some_and(|&(before, _)| before <= position)
    }

    /// Whether there is any removal record.
    #[inline]
    fn removals_wait(&self) -> bool {
        // Acquire: pairs with the Release in `announce_removal`.
        self.beside.load(Ordering::Acquire) >= REMOVAL
    }

    /// Whether a read would find something. In strict mode a loss after the last record doesn't count, as in the kernel.
    fn readable(&self) -> bool {
        let next = self.ring.next();
        next.record || next.end || (next.lost && !self.strict) || self.removal_before(next.position)
    }

    /// The ring's reading half, for as long as it is the caller's turn: this queue's.
    #[inline]
    fn reader<'a>(&'a self, _: &'a Taken<'_>) -> Reader<'a> {
        // SAFETY: whoever holds the turn reads, and nobody else can take it meanwhile.
        unsafe { self.ring.reader() }
    }

    /// The same, if the ring is this process's alone and has slots: that of every [`WatchQueue`], once it has a size.
    #[inline]
    fn own_reader<'a>(&'a self, _: &'a Taken<'_>) -> Option<Reader<'a>> {
        // SAFETY: as in `reader`.
        unsafe { self.ring.own_reader() }
    }

    /// See [`WatchQueue::read`]; of one record only, or of as many as fit.
    ///
    /// What a read of one record finds is done here, and all else goes on in functions of its own, so that nothing need be kept for them.
    fn read<const ONE: bool>(&self, out: &mut [u8]) -> Read {
        let Some(turn) = self.reading.0.turn.try_take() else { return self.read_later::<ONE>(out) };
        let Some(ring) = self.own_reader(&turn) else { return self.read_on::<ONE>(turn, out, 0) };
        let before = |position| {
            self.see_waiting(ring.waiting(position));
            self.beside.load(Ordering::Acquire) > 0
        };
        // What doesn't fit stays, and is found again.
        let Some(Ok(len)) = ring.take(out, before) else { return self.read_on::<ONE>(turn, out, 0) };
        // No record is shorter than its header: don't look for one that can't fit.
        if !ONE && out.len() - len >= HEADER_LEN {
            return self.read_on::<ONE>(turn, out, len);
        }
        if turn.give_back() { Ok(len) } else { self.wake_next(len) }
    }

    /// The end of a read that somebody may wait for.
    #[cold]
    fn wake_next(&self, len: usize) -> Read {
        self.reading.0.turn.wake();
        Ok(len)
    }

    /// [`read`](Self::read) for who has to wait for its turn.
    #[cold]
    fn read_later<const ONE: bool>(&self, out: &mut [u8]) -> Read {
        self.read_on::<ONE>(self.reading.0.turn.take(), out, 0)
    }

    /// Remembers how many records wait, if there were never more.
    #[inline]
    fn see_waiting(&self, waiting: u64) {
        let high_water = &self.reading.0.high_water;
        // Relaxed: a count that only the lock's holder writes.
        if waiting > high_water.load(Ordering::Relaxed) {
            high_water.store(waiting, Ordering::Relaxed);
        }
    }

    /// Goes on with a read that has `total` bytes, and ends its turn.
    #[inline(never)]
    fn read_on<const ONE: bool>(&self, turn: Taken<'_>, out: &mut [u8], total: usize) -> Read {
        let ring = self.reader(&turn);
        self.see_waiting(ring.usage().1);
        let read = self.read_more::<ONE>(&ring, out, total);
        if self.bell_is_level() {
            self.arm();
        }
        read
    }

    #[inline]
    fn read_more<const ONE: bool>(&self, ring: &Reader<'_>, out: &mut [u8], mut total: usize) -> Read {
        loop {
            let left = &mut out[total..];
            let copied = match ring.take(left, |_| self.removals_wait()) {
                Some(copied) => copied,
                None => match self.take_other(ring, left, total) {
                    Ok(copied) => copied,
                    Err(end) if total > 0 || end => return Ok(total),
                    Err(_) => return Err(None),
                },
            };
            match copied {
                Ok(len) => total += len,
                Err(_) if total > 0 => return Ok(total),
                Err(needed) => return Err(NonZeroUsize::new(needed)),
            }
            if ONE || out.len() - total < HEADER_LEN {
                return Ok(total);
            }
        }
    }

    /// A step of a read that finds anything but just a record. If there is nothing, the error says whether nothing will ever come.
    #[cold]
    fn take_other(&self, ring: &Reader<'_>, out: &mut [u8], total: usize) -> Result<Result<usize, usize>, bool> {
        let next = ring.next();
        // The kernel keeps a loss after the last record for a read that finds nothing before it.
        if next.lost && (next.record || !self.strict || total == 0) {
            Ok(copy(&Record::loss(), out).inspect(|_| ring.report_loss(next.position)))
        } else if self.removal_before(next.position) {
            Ok(self.copy_removal(out))
        } else if next.record {
            Ok(ring.copy(next.position, out).inspect(|_| ring.advance(next.position)))
        } else {
            Err(next.end)
        }
    }

    /// Takes the first removal record. Only a reader takes any, so there is one still.
    fn copy_removal(&self, out: &mut [u8]) -> Result<usize, usize> {
        let mut removals = lock(&self.removals);
        let (_, record) = removals.front().expect("only a reader takes removal records out");
        let len = copy(record, out)?;
        removals.pop_front();
        // Relaxed: only a reader has to know, and this is one.
        self.beside.fetch_sub(REMOVAL, Ordering::Relaxed);
        Ok(len)
    }

    pub(super) fn clear(&self) {
        self.ring.close();
        self.call();
        // Taken out before the lists are visited: a list's lock comes before this one.
        let attachments = lock(&self.watches).take();
        for Attachment { list, scope } in attachments.into_iter().flatten() {
            if let Some(list) = list.upgrade() {
                list.detach(self, scope);
            }
        }
    }

    /// Whether the queue refuses watches.
    pub(super) fn is_defunct(&self) -> bool {
        self.ring.is_defunct()
    }

    fn counters(&self) -> Counters {
        let (stored, pending) = self.ring.usage();
        let waiting = (self.beside.load(Ordering::Relaxed) / REMOVAL) as u64;
        let lost = self.ring.lost();
        let high_water = self.reading.0.high_water.load(Ordering::Relaxed).max(pending);
        Counters {
            posted: stored + self.removals_total.load(Ordering::Relaxed) + lost,
            filtered: self.filtered.load(Ordering::Relaxed),
            denied: self.denied.load(Ordering::Relaxed),
            lost,
            pending: pending + waiting,
            high_water,
        }
    }
}

/// Copies a record to the front of `out`; its length comes back either way.
fn copy(record: &Record, out: &mut [u8]) -> Result<usize, usize> {
    let bytes = record.bytes();
    out.get_mut(..bytes.len()).ok_or(bytes.len())?.copy_from_slice(bytes);
    Ok(bytes.len())
}
