//! The queue that watch lists and its reader share.
//!
//! A post comes to it from a list's snapshot, on any thread, and may wait for nobody; a read comes from the one who holds the reader's turn. Between the two stand the
//! ring, which only has room or has none, and what the queue wants besides: a filter, a policy, whom to wake.
//!
//! **Law.** A post touches nothing that needs a lock, and a read needs none but the turn, unless a removal record waits. What most queues don't have, and what most
//! posts and reads don't meet, is told by one word each (`choosy`, `beside`), and seen to in functions of their own: so a post and a read of a record
//! keep nothing over a call.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::Weak;
use std::sync::atomic::AtomicU64;

use super::super::bell::Bell;
use super::super::filter::{Filter, FilterEntry, FilterError};
use super::super::limit::WatchLimit;
use super::super::list::{ListInner, Scope};
use super::super::record::{HEADER_LEN, Record, TYPE_META};
use super::super::ring::{Line, Push, Reader, Ring, Slots};
#[cfg(not(loom))]
use super::super::share::Caller;
use super::super::signal::Signal;
use super::super::snapshot::Snapshot;
use super::super::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use super::super::sync::{Mutex, lock};
use super::super::turn::{Taken, Turn};
use super::config::{Counters, MAX_CAPACITY, MAX_COMPATIBLE_SIZE, OpenError, Policy, SizeError, Wake, WatchConfig};

/// Slots come in groups of this many: a page of 128-byte slots in the kernel, whatever the page size is here.
const SLOT_GROUP: usize = 32;
/// A list that names the queue: where [`QueueInner::clear`] has to go.
pub(in super::super) struct Attachment {
    pub(in super::super) list: Weak<ListInner>,
    pub(in super::super) scope: Scope,
}

/// How a post wakes the reader.
pub(in super::super) enum Wakeup {
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
pub(in super::super) enum Offered {
    /// To the end.
    Whole,
    /// The record is stored, but the reader to be [called](QueueInner::call).
    Uncalled,
    /// Nowhere: the record is to be [stored](QueueInner::store).
    Not,
}

/// The queue itself, which watch lists hold too.
pub(in super::super) struct QueueInner {
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
    pub(in super::super) limit: WatchLimit,
    reading: Line<Reading>,
    /// Removal records that found the ring full, each with the position before which it belongs. Room for one per watch is made when the watch
    /// is. Taken by removals and readers, never by a post.
    removals: Mutex<VecDeque<(u64, Record)>>,
    /// What a read has to see to beside the ring: [`REMOVAL`] for each of `removals`, written under their lock, and [`REARM`].
    beside: AtomicUsize,
    /// How many ever went into `removals`.
    removals_total: AtomicU64,
    /// The lists that name this queue; `None` once it is cleared. Taken inside a list's lock, never the other way round.
    pub(in super::super) watches: Mutex<Option<Vec<Attachment>>>,
    filtered: AtomicU64,
    denied: AtomicU64,
}

/// What a read gave: how many bytes, or how many the next record has, if it doesn't fit, or nothing. In two registers, where a [`ReadError`](super::ReadError) needs memory.
pub(super) type Read = Result<usize, Option<NonZeroUsize>>;

/// What every read writes. On a line of its own: the other fields here are what every post looks at.
struct Reading {
    /// The reader's lock. Never taken by a post.
    turn: Turn,
    /// The most records that a reader has seen waiting. Written under the reader's lock.
    high_water: AtomicU64,
}

impl QueueInner {
    pub(in super::super) fn new(ring: Ring, wakeup: Wakeup, policy: Option<Box<Policy>>, limit: WatchLimit) -> Self {
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

    /// A queue that is read in this process.
    pub(super) fn open(config: WatchConfig) -> Result<Self, OpenError> {
        let bell = Bell::new(Signal::new().map_err(OpenError::Signal)?);
        let inner = Self::new(Ring::new(), Wakeup::Bell(bell), config.policy, config.limit);
        let choosy = AtomicBool::new(config.strict || inner.policy.is_some());
        let inner = Self { strict: config.strict, choosy, wake: config.wake, ..inner };
        if !config.sized_later {
            inner.size(config.capacity.unwrap_or(MAX_COMPATIBLE_SIZE), MAX_CAPACITY)?;
        }
        Ok(inner)
    }

    pub(super) fn size(&self, records: usize, max: usize) -> Result<(), SizeError> {
        if let Some(slots) = self.capacity() {
            return Err(SizeError::AlreadySized(slots));
        }
        if !(1..=max).contains(&records) {
            return Err(SizeError::OutOfBounds { asked: records, max });
        }
        let slots = Slots::new(records.next_multiple_of(SLOT_GROUP));
        self.ring.set_slots(slots).map_err(|_| SizeError::AlreadySized(self.capacity().unwrap_or(0)))?;
        // Records lost so far have become readable as a loss.
        if !self.strict {
            self.call();
        }
        Ok(())
    }

    pub(super) fn set_filter(&self, entries: Option<&[FilterEntry]>) -> Result<(), FilterError> {
        let filter = entries.map(|entries| Filter::new(entries, self.strict)).transpose()?;
        if filter.is_some() {
            // Relaxed: a post that doesn't see it counts as one before this call.
            self.choosy.store(true, Ordering::Relaxed);
        }
        drop(self.filter.replace(filter.map(Box::new)));
        Ok(())
    }

    /// The bell of a queue that is read in this process, as every [`WatchQueue`](super::WatchQueue) is.
    #[inline]
    pub(super) fn bell(&self) -> &Bell {
        match &self.wakeup {
            Wakeup::Bell(bell) => bell,
            #[cfg(not(loom))]
            Wakeup::Caller(_) => unreachable!("a queue that another process reads has no reader here"),
        }
    }

    /// Whether the descriptor is readable.
    #[cfg(all(test, loom))]
    pub(in super::super) fn signal_is_raised(&self) -> bool {
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

    /// The same for who isn't reading.
    pub(super) fn arm_in_turn(&self) -> bool {
        let _turn = self.reading.0.turn.take();
        self.arm()
    }

    /// From now on the descriptor is kept right, if that is how the queue wakes: nobody could poll it before it was first asked for.
    #[cfg(not(loom))]
    pub(super) fn keep_level(&self) {
        if self.wake == Wake::Level && !self.bell().is_level() {
            let _turn = self.reading.0.turn.take();
            self.bell().keep_level();
            // Relaxed: reads look under the same lock.
            self.beside.fetch_or(REARM, Ordering::Relaxed);
            self.arm();
        }
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
    pub(in super::super) fn call(&self) {
        match &self.wakeup {
            Wakeup::Bell(bell) => bell.ring_if_armed(),
            #[cfg(not(loom))]
            Wakeup::Caller(caller) => caller.call_if_armed(),
        }
    }

    /// How many more records fit now, if nobody else posts.
    #[cfg(not(loom))]
    pub(in super::super) fn room(&self) -> u64 {
        self.ring.limit().unwrap_or(0).saturating_sub(self.ring.usage().1)
    }

    pub(in super::super) fn capacity(&self) -> Option<usize> {
        self.ring.limit().map(|limit| limit as usize)
    }

    /// Whether a post has to ask filter and policy. Most queues let everything in.
    #[inline]
    pub(in super::super) fn is_choosy(&self) -> bool {
        // Relaxed: a filter set concurrently counts as set after this call.
        self.choosy.load(Ordering::Relaxed)
    }

    /// The first steps of an [`offer`](Self::offer) to a queue that isn't choosy: nearly always all of them.
    #[inline(always)]
    pub(in super::super) fn offer_plainly(&self, record: &Record, tag: u8) -> Offered {
        match self.ring.push_plainly(record, tag) {
            Some(Push::Stored) if self.may_call() => Offered::Uncalled,
            Some(_) => Offered::Whole,
            None => Offered::Not,
        }
    }

    /// Puts a record in, with this tag, if filter and policy let it. Never waits, allocates or frees.
    pub(in super::super) fn offer(&self, object: u64, record: &Record, tag: u8) {
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
    pub(in super::super) fn store(&self, record: &Record, tag: u8) {
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
    pub(in super::super) fn announce_removal(&self, record: &Record, tag: u8) {
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
    pub(in super::super) fn reserve_removal(&self, watches: usize) {
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

    /// The same, if the ring is this process's alone and has slots: that of every [`WatchQueue`](super::WatchQueue), once it has a size.
    #[inline]
    fn own_reader<'a>(&'a self, _: &'a Taken<'_>) -> Option<Reader<'a>> {
        // SAFETY: as in `reader`.
        unsafe { self.ring.own_reader() }
    }

    /// See [`WatchQueue::read`](super::WatchQueue::read); of one record only, or of as many as fit.
    ///
    /// What a read of one record finds is done here, and all else goes on in functions of its own, so that nothing need be kept for them.
    pub(super) fn read<const ONE: bool>(&self, out: &mut [u8]) -> Read {
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

    pub(in super::super) fn clear(&self) {
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
    pub(in super::super) fn is_defunct(&self) -> bool {
        self.ring.is_defunct()
    }

    pub(super) fn counters(&self) -> Counters {
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
