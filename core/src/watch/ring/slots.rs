//! The slots of a ring, and how a record's bytes get into one and out again.
//!
//! Slots are this process's own, or lie in memory that two processes share. A post or a read asks once which, and works with a [`View`] of them.
//!
//! **Law.** A slot's bytes are written by who has taken its position and not committed it, and read by the reader who has seen the commit: never both. In memory that is this
//! process's alone all keep to that, so bytes are copied plainly there. Another process need not keep to it, so in memory that is shared they are atomics, word by
//! word.

use std::ptr;
#[cfg(not(loom))]
use std::sync::Arc;

use super::super::record::{HEADER_LEN, Record, SLOT_LEN, length_field};
#[cfg(not(loom))]
use super::super::share::SharedRing;
use super::super::sync::atomic::{AtomicU64, Ordering};

const WORDS: usize = SLOT_LEN / 8;
/// Words of a record after its header that share a cache line with it and the commit word.
const FIRST_LINE: usize = 6;

/// Room for one record. The commit word shares the cache line with the first 56 bytes, which is all that most records have.
#[derive(Debug)]
#[repr(C, align(64))]
pub(in super::super) struct Slot {
    pub(super) commit: AtomicU64,
    words: [AtomicU64; WORDS],
}

impl Slot {
    fn new() -> Self {
        Self { commit: AtomicU64::new(0), words: std::array::from_fn(|_| AtomicU64::new(0)) }
    }
}

/// The slots of a ring, a power of two of them, and how many may be in use at once.
#[derive(Debug)]
pub(in super::super) struct Slots {
    pub(super) memory: Memory,
    pub(super) limit: u64,
    /// How many more a removal record may use.
    pub(super) reserve: u64,
}

/// Where slots are: a power of two of them.
#[derive(Debug)]
pub(super) enum Memory {
    Owned(OwnSlots),
    #[cfg(not(loom))]
    Shared(Arc<SharedRing>),
}

impl Memory {
    #[inline]
    pub(super) fn own(&self) -> Option<&OwnSlots> {
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
pub(super) struct OwnSlots(Box<[Slot]>);

impl OwnSlots {
    #[inline]
    pub(super) fn view(&self) -> View<'_> {
        // INVARIANT: a power of two, as here.
        View { slots: &self.0, owned: true }
    }
}

impl Slots {
    pub(in super::super) fn new(limit: usize) -> Self {
        // INVARIANT: a power of two.
        let slots = OwnSlots((0..limit.next_power_of_two()).map(|_| Slot::new()).collect());
        Self { memory: Memory::Owned(slots), limit: limit as u64, reserve: 0 }
    }

    #[inline]
    pub(super) fn view(&self) -> View<'_> {
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
pub(super) struct View<'a> {
    slots: &'a [Slot],
    /// They are this process's alone, and so are the words: both ends keep the laws.
    pub(super) owned: bool,
}

impl<'a> View<'a> {
    #[inline]
    pub(super) fn at(self, position: u64) -> &'a Slot {
        let at = position as usize & (self.slots.len() - 1);
        // SAFETY: by the type's invariant there is one slot at least, and `at` was cut to their number.
        unsafe { self.slots.get_unchecked(at) }
    }

    /// Copies the record of a committed slot to the front of `out`; its length comes back either way. For a [`Reader`](super::Reader).
    #[inline]
    pub(super) fn copy_out(self, slot: &Slot, out: &mut [u8]) -> Result<usize, usize> {
        // Relaxed: the load of `commit` ordered the bytes before it, and the slot isn't written again until `tail` has moved.
        let len = length_field(&slot.words[0].load(Ordering::Relaxed).to_ne_bytes());
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

/// Copies the bytes that count, the tag put in. A known number of words is copied without a branch for each; what is behind a record's end is zero, and
/// nobody reads it.
#[inline]
pub(super) fn fill(slot: &Slot, record: &Record, tag: u8, owned: bool) {
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
