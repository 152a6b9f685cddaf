//! The ring: many threads put records in, one takes them out, and a record that doesn't fit leaves a mark where it is missing.
//!
//! Posting must be right on a thread that may not wait for anyone, so there is no lock: a post *reserves* the next position by moving `head`,
//! copies its bytes into that position's slot, and *commits* by writing the position into the slot. The reader consumes a position once it is
//! committed and then moves `tail`, which frees the slot. A writer that sleeps between the two steps delays readers, never writers: once
//! the ring has come round to its slot it counts as full.
//!
//! **Laws.** Positions only grow. A slot is written only for positions in `tail .. tail + limit`, and read only in `tail .. head`, so never both.
//! A loss at position `p` belongs *before* record `p`: it is a bit beside `head` while `p` is the next position, and moves into slot `p` with the
//! record that is stored there. As `head` is one word, a post can't be lost after record `p` and be reported before it. The reader remembers in a bit
//! beside `tail` that it has reported the loss before that position. No loss can happen there any more: a loss needs a full ring, and
//! whoever reports the loss before the next position has emptied it.
//!
//! ```text
//! head: position << 2 | DEFUNCT | LOST     tail: position << 1 | REPORTED     slot: (position + 1) << 1 | LOST_BEFORE
//! ```
//!
//! `head`, the slots and `LOST` are written by posts only, `tail` by the reader only. That is why `tail` may lie in memory that another
//! process owns: it is read at most once per try, checked against `head`, and never used as an index. The reader's half runs
//! there too, over a mapping of `head` and slots that it can't write. Who is in another process may break the laws, so there a record's bytes are
//! atomics; in a ring of this process's own they are copied plainly.
//!
//! What a post and a read nearly always find is done by [`Ring::push_plainly`] and [`Reader::take`], in as few steps as can be; all cases are in
//! [`Ring::push_or_mark_lost`], and in [`Reader::next`] and what follows it.

mod reader;
mod slots;

#[cfg(not(loom))]
use std::sync::Arc;
use std::sync::OnceLock;

use super::record::Record;
#[cfg(not(loom))]
use super::share::SharedRing;
use super::sync::atomic::{AtomicU64, Ordering};
pub(super) use reader::{Next, Reader};
#[cfg(not(loom))]
use slots::Memory;
#[cfg(not(loom))]
pub(super) use slots::Slot;
pub(super) use slots::Slots;
use slots::{OwnSlots, fill};

const LOST: u64 = 1;
const DEFUNCT: u64 = 2;
const HEAD_SHIFT: u32 = 2;
const REPORTED: u64 = 1;
const LOST_BEFORE: u64 = 1;

/// Keeps what different threads write on different cache lines (two, as processors fetch them in pairs).
#[derive(Debug)]
#[repr(C, align(128))]
pub(super) struct Line<T>(pub(super) T);

/// How a post ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Push {
    /// The record is in the ring.
    Stored,
    /// The ring was full, or had no slots yet. The next free position is this.
    Full(u64),
    /// The ring was full, and a mark that is there covers the record: whoever set it tells the reader.
    Covered,
    /// The ring takes no more records.
    Defunct,
}

/// What a post finds at the position it wants to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Room {
    /// The slot is free.
    Free,
    /// The slot is in use.
    Full,
    /// The reader is past this position, so `head` has moved since it was read.
    Stale,
}

/// What posts write beside the slots.
#[derive(Debug)]
#[repr(C)]
pub(super) struct WriterWords {
    /// Position of the next record and the two flags. Moved by posts with compare-exchange, so that all three change together.
    pub(super) head: Line<AtomicU64>,
    /// How many records found no room.
    pub(super) lost: Line<AtomicU64>,
}

/// What the reader writes.
#[derive(Debug)]
#[repr(C)]
pub(super) struct ReaderWords {
    /// Position of the next record to take. Written under the reader's lock.
    pub(super) tail: Line<AtomicU64>,
    /// How often the reader has armed its bell. Used only between processes.
    pub(super) armed: Line<AtomicU64>,
}

#[derive(Debug)]
pub(super) struct Ring {
    /// The words of a ring that is this process's alone.
    own: (WriterWords, ReaderWords),
    /// Where the words of any other ring are.
    #[cfg(not(loom))]
    shared: Option<Arc<SharedRing>>,
    /// A position that `tail` has reached. Saves posts from touching the reader's cache line while there is room by this measure.
    seen: Line<AtomicU64>,
    slots: OnceLock<Slots>,
}

impl Ring {
    pub(super) fn new() -> Self {
        let zero = || Line(AtomicU64::new(0));
        let own = (WriterWords { head: zero(), lost: zero() }, ReaderWords { tail: zero(), armed: zero() });
        Self {
            own,
            #[cfg(not(loom))]
            shared: None,
            seen: zero(),
            slots: OnceLock::new(),
        }
    }

    /// A ring over memory that two processes share: in the one that posts, or in the one that reads.
    #[cfg(not(loom))]
    pub(super) fn shared(shared: Arc<SharedRing>, limit: u64, reserve: u64) -> Self {
        let slots = Slots { memory: Memory::Shared(Arc::clone(&shared)), limit, reserve };
        Self { shared: Some(shared), slots: OnceLock::from(slots), ..Self::new() }
    }

    /// Where the words are. Asked once for all that a post or a read does, as the compiler can't know that the answer stays the same.
    #[inline]
    fn words(&self) -> (&WriterWords, &ReaderWords) {
        #[cfg(not(loom))]
        if let Some(shared) = &self.shared {
            return (shared.writer(), shared.reader());
        }
        (&self.own.0, &self.own.1)
    }

    /// The slots of a ring that is this process's alone, once it has some, and how many may be in use.
    #[inline]
    fn own_slots(&self) -> Option<(&OwnSlots, &u64)> {
        let slots = self.slots.get()?;
        Some((slots.memory.own()?, &slots.limit))
    }

    /// The reader's half of the ring, found once for all steps of a read.
    ///
    /// # Safety
    /// No other thread has one as long as this one is used: the caller holds the reader's lock.
    #[inline]
    pub(super) unsafe fn reader(&self) -> Reader<'_> {
        self.look()
    }

    /// The same, if the ring is this process's alone and has slots: a [`take`](Reader::take) is left without the other case.
    ///
    /// # Safety
    /// As for [`reader`](Self::reader).
    #[inline]
    pub(super) unsafe fn own_reader(&self) -> Option<Reader<'_>> {
        let (slots, _) = self.own_slots()?;
        Some(Reader { head: &self.own.0.head.0, tail: &self.own.1.tail.0, slots: Some(slots.view()) })
    }

    #[inline]
    fn look(&self) -> Reader<'_> {
        let (writer, reader) = self.words();
        Reader { head: &writer.head.0, tail: &reader.tail.0, slots: self.slots.get().map(Slots::view) }
    }

    /// Counts a record that is lost without a mark.
    pub(super) fn count_lost(&self) {
        self.words().0.lost.0.fetch_add(1, Ordering::Relaxed);
    }

    /// How many records found no room.
    pub(super) fn lost(&self) -> u64 {
        self.words().0.lost.0.load(Ordering::Relaxed)
    }

    /// Gives the ring its slots, once; gives them back if it has some.
    pub(super) fn set_slots(&self, slots: Slots) -> Result<(), Slots> {
        self.slots.set(slots)
    }

    pub(super) fn limit(&self) -> Option<u64> {
        self.slots.get().map(|slots| slots.limit)
    }

    /// Stores a removal record, for which the reserve is kept. If even that is full, nothing is stored and nothing marked.
    pub(super) fn push_removal(&self, record: &Record, tag: u8) -> Push {
        self.push_or(record, tag, false)
    }

    /// What [`push_or_mark_lost`](Self::push_or_mark_lost) nearly always comes to, in as few steps as can be: in a ring that is this process's alone, a record with
    /// nothing lost before it is stored where there is room by `seen`, and one that comes to a ring as full as the record before found it is covered. In
    /// all other cases, and if somebody posts at the same moment, nothing is done, and the answer is `None`.
    #[inline(always)]
    pub(super) fn push_plainly(&self, record: &Record, tag: u8) -> Option<Push> {
        let (slots, limit) = self.own_slots()?;
        let (WriterWords { head: at_head, lost }, ReaderWords { tail, .. }) = &self.own;
        // The orders are those of `push_or`, and for the same reasons.
        let head = at_head.0.load(Ordering::Acquire);
        let (position, flags) = (head >> HEAD_SHIFT, head & (LOST | DEFUNCT));
        if flags != 0 {
            let waiting = position.checked_sub(tail.0.load(Ordering::Acquire) >> 1);
            return (flags == LOST && waiting.is_some_and(|waiting| waiting >= *limit)).then(|| {
                lost.0.fetch_add(1, Ordering::Relaxed);
                Push::Covered
            });
        }
        if position.wrapping_sub(self.seen.0.load(Ordering::Acquire)) >= *limit {
            return None;
        }
        let next = head + (1 << HEAD_SHIFT);
        at_head.0.compare_exchange_weak(head, next, Ordering::AcqRel, Ordering::Relaxed).ok()?;
        let slot = slots.view().at(position);
        fill(slot, record, tag, true);
        slot.commit.store((position + 1) << 1, Ordering::Release);
        Some(Push::Stored)
    }

    /// Stores a record with this tag, or marks its loss and counts it.
    #[inline]
    pub(super) fn push_or_mark_lost(&self, record: &Record, tag: u8) -> Push {
        self.push_or(record, tag, true)
    }

    // Always: both callers know `mark`, and a good part of this is for one of them.
    #[inline(always)]
    fn push_or(&self, record: &Record, tag: u8, mark: bool) -> Push {
        let (writer, reader) = self.words();
        let (at_head, tail) = (&writer.head.0, &reader.tail.0);
        // Acquire: what the threads did that moved `head` here, to set a flag or to take the position before ours.
        let mut head = at_head.load(Ordering::Acquire);
        loop {
            if head & DEFUNCT != 0 {
                return Push::Defunct;
            }
            let position = head >> HEAD_SHIFT;
            let slots = self.slots.get();
            let room = slots.map_or(Room::Full, |slots| {
                self.room(position, slots.limit + if mark { 0 } else { slots.reserve }, tail)
            });
            if room == Room::Stale {
                let now = at_head.load(Ordering::Acquire);
                if now != head {
                    head = now;
                    continue;
                }
                // Only a reader that lies about its position is ahead of all posts. Its ring counts as full.
            }
            let Some(slots) = slots.filter(|_| room == Room::Free) else {
                if !mark {
                    return Push::Full(position);
                }
                let push = if head & LOST != 0 {
                    // The ring was full after `head` was read, so the mark wasn't reported before that.
                    Push::Covered
                } else {
                    // Relaxed: the reader takes nothing from it. If `head` has moved meanwhile, there may be room again, or the end.
                    match at_head.compare_exchange_weak(head, head | LOST, Ordering::Relaxed, Ordering::Acquire) {
                        Ok(_) => Push::Full(position),
                        Err(now) => {
                            head = now;
                            continue;
                        }
                    }
                };
                writer.lost.0.fetch_add(1, Ordering::Relaxed);
                return push;
            };
            let next = (position + 1) << HEAD_SHIFT;
            // AcqRel: chains the posts, so that whoever takes position p has seen all that was before p.
            match at_head.compare_exchange_weak(head, next, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    let slots = slots.view();
                    let slot = slots.at(position);
                    fill(slot, record, tag, slots.owned);
                    let commit = (position + 1) << 1 | if head & LOST != 0 { LOST_BEFORE } else { 0 };
                    // Release: the reader that sees the position sees the bytes.
                    slot.commit.store(commit, Ordering::Release);
                    return Push::Stored;
                }
                Err(now) => head = now,
            }
        }
    }

    /// Whether `position` lies within `limit` of the reader's position.
    #[inline]
    fn room(&self, position: u64, limit: u64, tail: &AtomicU64) -> Room {
        // Acquire: whoever stored `seen` had seen the reader leave the slot. A position behind it wraps to a huge difference.
        if position.wrapping_sub(self.seen.0.load(Ordering::Acquire)) < limit {
            return Room::Free;
        }
        // Acquire: the reader has left the slots before its position.
        let tail = tail.load(Ordering::Acquire) >> 1;
        if tail > position {
            return Room::Stale;
        }
        if position - tail >= limit {
            return Room::Full;
        }
        self.seen.0.store(tail, Ordering::Release);
        Room::Free
    }

    /// Refuses every post from now on.
    pub(super) fn close(&self) {
        // Release: who sees the end sees what was before it.
        self.words().0.head.0.fetch_or(DEFUNCT, Ordering::Release);
    }

    pub(super) fn is_defunct(&self) -> bool {
        // Relaxed: an early answer; a post decides by its own compare-exchange.
        self.words().0.head.0.load(Ordering::Relaxed) & DEFUNCT != 0
    }

    /// See [`Reader::usage`].
    pub(super) fn usage(&self) -> (u64, u64) {
        self.look().usage()
    }

    /// See [`Reader::next`].
    pub(super) fn next(&self) -> Next {
        self.look().next()
    }
}
