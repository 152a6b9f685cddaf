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
//! process owns: it is read at most once per try, checked against `head`, and never used as an index. The reader's half of this file runs
//! there too, over a mapping of `head` and slots that it can't write. Who is in another process may break the laws, so there a record's bytes are
//! atomics; in a ring of this process's own they are copied plainly.
//!
//! What a post and a read nearly always find is done by [`Ring::push_plainly`] and [`Reader::take`], in as few steps as can be; all cases are in
//! [`Ring::push_or_mark_lost`], and in [`Reader::next`] and what follows it.

use std::ptr;
#[cfg(not(loom))]
use std::sync::Arc;
use std::sync::OnceLock;

use super::record::{HEADER_LEN, Record, SLOT_LEN};
#[cfg(not(loom))]
use super::share::SharedRing;
use super::sync::atomic::{AtomicU64, Ordering};

const WORDS: usize = SLOT_LEN / 8;
/// Words of a record after its header that share a cache line with it and the commit word.
const FIRST_LINE: usize = 6;
const LOST: u64 = 1;
const DEFUNCT: u64 = 2;
const HEAD_SHIFT: u32 = 2;
const REPORTED: u64 = 1;
const LOST_BEFORE: u64 = 1;

/// Keeps what different threads write on different cache lines (two, as processors fetch them in pairs).
#[derive(Debug)]
#[repr(C, align(128))]
pub(super) struct Line<T>(pub(super) T);

/// Room for one record. The commit word shares the cache line with the first 56 bytes, which is all that most records have.
#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct Slot {
    commit: AtomicU64,
    words: [AtomicU64; WORDS],
}

impl Slot {
    fn new() -> Self {
        Self { commit: AtomicU64::new(0), words: std::array::from_fn(|_| AtomicU64::new(0)) }
    }
}

/// The slots of a ring, a power of two of them, and how many may be in use at once.
#[derive(Debug)]
pub(super) struct Slots {
    memory: Memory,
    limit: u64,
    /// How many more a removal record may use.
    reserve: u64,
}

/// Where slots are: a power of two of them.
#[derive(Debug)]
enum Memory {
    Owned(OwnSlots),
    #[cfg(not(loom))]
    Shared(Arc<SharedRing>),
}

impl Memory {
    #[inline]
    fn own(&self) -> Option<&OwnSlots> {
        match self {
            Self::Owned(slots) => Some(slots),
            #[cfg(not(loom))]
            Self::Shared(_) => None,
        }
    }
}

/// Slots that are this process's alone.
///
/// # Invariants
/// A power of two of them.
#[derive(Debug)]
struct OwnSlots(Box<[Slot]>);

impl OwnSlots {
    #[inline]
    fn view(&self) -> View<'_> {
        // INVARIANT: a power of two, as here.
        View { slots: &self.0, owned: true }
    }
}

impl Slots {
    pub(super) fn new(limit: usize) -> Self {
        // INVARIANT: a power of two.
        let slots = OwnSlots((0..limit.next_power_of_two()).map(|_| Slot::new()).collect());
        Self { memory: Memory::Owned(slots), limit: limit as u64, reserve: 0 }
    }

    #[inline]
    fn view(&self) -> View<'_> {
        match &self.memory {
            Memory::Owned(slots) => slots.view(),
            // INVARIANT: of a `SharedRing`'s slots there are a power of two.
            #[cfg(not(loom))]
            Memory::Shared(shared) => View { slots: shared.slots(), owned: false },
        }
    }
}

/// Slots, wherever they are. Found once for all that a post or a read does: the compiler can't know that they stay where they are.
///
/// # Invariants
/// A power of two of them.
#[derive(Debug, Clone, Copy)]
struct View<'a> {
    slots: &'a [Slot],
    /// They are this process's alone, and so are the words: both ends keep the laws.
    owned: bool,
}

impl<'a> View<'a> {
    #[inline]
    fn at(self, position: u64) -> &'a Slot {
        let at = position as usize & (self.slots.len() - 1);
        // SAFETY: by the type's invariant there is one slot at least, and `at` was cut to their number.
        unsafe { self.slots.get_unchecked(at) }
    }

    /// Copies the record of a committed slot to the front of `out`; its length comes back either way. For a [`Reader`].
    #[inline]
    fn copy_out(self, slot: &Slot, out: &mut [u8]) -> Result<usize, usize> {
        // Relaxed: the load of `commit` ordered the bytes before it, and the slot isn't written again until `tail` has moved.
        let len = super::record::length_field(&slot.words[0].load(Ordering::Relaxed).to_ne_bytes());
        let Some(out) = out.get_mut(..len) else { return Err(len) };
        if self.owned && !cfg!(loom) {
            // SAFETY: the words are as many bytes, each of them initialized. No post writes the slot now: its last one is over, as its `commit` was seen, and the next one needs a `tail` that
            // only a `Reader` moves, in this thread, after this; in memory that is this process's alone, nobody else can. The models have loom check just that.
            let bytes = unsafe { &*slot.words.as_ptr().cast::<[u8; SLOT_LEN]>() };
            copy_bytes_out(&bytes[..len], out);
            return Ok(len);
        }
        copy_words_out(slot, out);
        Ok(len)
    }
}

/// Copies a record's bytes as two pieces that overlap, of lengths that the compiler knows: a call of `memcpy`, with all that must be kept over it, costs more.
#[inline]
fn copy_bytes_out(record: &[u8], out: &mut [u8]) {
    #[inline]
    fn ends<const N: usize>(record: &[u8], out: &mut [u8]) {
        if let (Some(from), Some(to)) = (record.first_chunk::<N>(), out.first_chunk_mut()) {
            *to = *from;
        }
        if let (Some(from), Some(to)) = (record.last_chunk::<N>(), out.last_chunk_mut()) {
            *to = *from;
        }
    }
    match record.len() {
        64.. => ends::<64>(record, out),
        32.. => ends::<32>(record, out),
        16.. => ends::<16>(record, out),
        // No record is shorter than its header.
        _ => ends::<HEADER_LEN>(record, out),
    }
}

/// Copies from a slot of another process, or in a model. Apart, to leave a read of our own in registers.
#[inline(never)]
fn copy_words_out(slot: &Slot, out: &mut [u8]) {
    #[cfg(not(loom))]
    let word = |index: usize| slot.words[index].load(Ordering::Relaxed).to_ne_bytes();
    #[cfg(loom)]
    // SAFETY: loom reports a store that isn't ordered before or after this.
    let word = |index: usize| unsafe { slot.words[index].unsync_load() }.to_ne_bytes();
    let (whole, rest) = out.as_chunks_mut::<8>();
    for (index, bytes) in whole.iter_mut().enumerate() {
        *bytes = word(index);
    }
    if !rest.is_empty() {
        rest.copy_from_slice(&word(whole.len())[..rest.len()]);
    }
}

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

/// What stands at the reader's position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Next {
    /// The reader's position.
    pub(super) position: u64,
    /// Records are missing before this position, and the reader hasn't been told.
    pub(super) lost: bool,
    /// The record of this position can be taken.
    pub(super) record: bool,
    /// Nothing is stored and nothing ever will be.
    pub(super) end: bool,
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
                    // Relaxed: the reader takes nothing from it. If `head` has moved meanwhile, there may be room again.
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

/// The reader's half of a ring.
///
/// # Invariants
/// One thread at a time has any, but for those that only look ([`usage`](Self::usage) and [`next`](Self::next)).
#[derive(Debug)]
pub(super) struct Reader<'a> {
    head: &'a AtomicU64,
    tail: &'a AtomicU64,
    slots: Option<View<'a>>,
}

impl Reader<'_> {
    /// How many records are stored from this position on, which is the reader's, in a ring whose both ends keep the laws.
    #[inline]
    pub(super) fn waiting(&self, position: u64) -> u64 {
        // Relaxed: whoever has moved the tail here has seen `head` as far.
        (self.head.load(Ordering::Relaxed) >> HEAD_SHIFT).wrapping_sub(position)
    }

    /// Records stored so far, and records that are stored now.
    #[inline]
    pub(super) fn usage(&self) -> (u64, u64) {
        // The tail first: it only grows, so the difference is never negative. Acquire keeps the two loads in this order.
        let tail = self.tail.load(Ordering::Acquire) >> 1;
        let head = self.head.load(Ordering::Relaxed) >> HEAD_SHIFT;
        (head, head.saturating_sub(tail))
    }

    /// Looks at the reader's position.
    #[inline]
    pub(super) fn next(&self) -> Next {
        // Acquire: a caller without the lock must not see a slot older than the position.
        let tail = self.tail.load(Ordering::Acquire);
        let (position, reported) = (tail >> 1, tail & REPORTED != 0);
        let Some(slots) = self.slots else {
            // Nothing can be read before there are slots, not even the mark of what was lost so far: more may be lost at this very position.
            let end = self.head.load(Ordering::Relaxed) & DEFUNCT != 0;
            return Next { position, lost: false, record: false, end };
        };
        // Acquire: the record's bytes.
        let commit = slots.at(position).commit.load(Ordering::Acquire);
        if commit >> 1 == position + 1 {
            return Next { position, lost: commit & LOST_BEFORE != 0 && !reported, record: true, end: false };
        }
        let head = self.head.load(Ordering::Acquire);
        let last = head >> HEAD_SHIFT == position;
        Next { position, lost: last && head & LOST != 0 && !reported, record: false, end: last && head & DEFUNCT != 0 }
    }

    /// Takes the record at the reader's position to the front of `out`, if it is there and nothing is lost before it: what a read nearly always finds, in as few
    /// steps as can be. Otherwise `None`, and [`next`](Self::next) says what there is; also if `before`, asked once the record was seen, says that something
    /// goes before it. Answers the record's length, or nothing taken if `out` is too short.
    #[inline]
    pub(super) fn take(&self, out: &mut [u8], before: impl FnOnce(u64) -> bool) -> Option<Result<usize, usize>> {
        // Relaxed: nobody else writes it.
        let tail = self.tail.load(Ordering::Relaxed);
        let slots = self.slots?;
        let slot = slots.at(tail >> 1);
        let after = (tail | REPORTED) + 1;
        // Acquire: the record's bytes. Equal to the next position's `tail`, so committed and without `LOST_BEFORE`.
        if slot.commit.load(Ordering::Acquire) != after || before(tail >> 1) {
            return None;
        }
        let copied = slots.copy_out(slot, out);
        if copied.is_ok() {
            // Release: as in `advance`.
            self.tail.store(after, Ordering::Release);
        }
        Some(copied)
    }

    /// Copies the record at the reader's position to the front of `out`. Answers its length, or nothing copied if `out` is too short.
    ///
    /// [`next`](Self::next) has said that there is a record.
    pub(super) fn copy(&self, position: u64, out: &mut [u8]) -> Result<usize, usize> {
        let slots = self.slots.expect("a ring that holds a record has slots");
        slots.copy_out(slots.at(position), out)
    }

    /// Frees the slot of this position, which is the reader's.
    #[inline]
    pub(super) fn advance(&self, position: u64) {
        // Release: pairs with the Acquire in `room`; the bytes were copied out before the slot may be filled again.
        self.tail.store((position + 1) << 1, Ordering::Release);
    }

    /// Remembers that the loss before this position, which is the reader's, is reported.
    pub(super) fn report_loss(&self, position: u64) {
        self.tail.store(position << 1 | REPORTED, Ordering::Release);
    }
}

/// Copies the bytes that count, the tag put in. A known number of words is copied without a branch for each; what is behind a record's end is zero, and
/// nobody reads it.
#[inline]
fn fill(slot: &Slot, record: &Record, tag: u8, owned: bool) {
    let ([header, to @ ..], [_, from @ ..]) = (&slot.words, record.words());
    // Relaxed: the write of `commit` publishes them.
    header.store(record.tagged_header(tag), Ordering::Relaxed);
    let ((first, second), (from_first, from_second)) = (to.split_at(FIRST_LINE), from.split_at(FIRST_LINE));
    copy_in(first, from_first, owned);
    if record.length() > HEADER_LEN + 8 * FIRST_LINE {
        copy_in(second, from_second, owned);
    }
}

/// Copies words into a slot whose position the caller has taken and not committed.
///
/// In a ring that another process reads they stay atomics: that process may move `tail` against all rules, and then a second post writes the same slot.
#[inline]
fn copy_in(to: &[AtomicU64], from: &[[u8; 8]], owned: bool) {
    assert_eq!(to.len(), from.len());
    if owned && !cfg!(loom) {
        // SAFETY: both are as long, a record isn't in a ring, and `to` is made of atomics, which may be written through a shared reference. Nobody else reads or
        // writes the slot between the taking of its position and the commit: that is the law of the ring, and in memory that is this process's alone
        // nobody breaks it.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr().cast_mut().cast(), to.len()) };
        return;
    }
    for (to, from) in to.iter().zip(from) {
        to.store(u64::from_ne_bytes(*from), Ordering::Relaxed);
    }
}
