//! The reader's half of a ring: what stands at its position, and taking it.
//!
//! It runs in the process that posts, or in another one over memory that this one maps and can't write but for the reader's own words. A read asks for the plain
//! record first ([`Reader::take`]), and for all that there may be only where that isn't what it finds ([`Reader::next`]).

use super::super::sync::atomic::{AtomicU64, Ordering};
use super::slots::View;
use super::{DEFUNCT, HEAD_SHIFT, LOST, LOST_BEFORE, REPORTED};

/// What stands at the reader's position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct Next {
    /// The reader's position.
    pub(in super::super) position: u64,
    /// Records are missing before this position, and the reader hasn't been told.
    pub(in super::super) lost: bool,
    /// The record of this position can be taken.
    pub(in super::super) record: bool,
    /// Nothing is stored and nothing ever will be.
    pub(in super::super) end: bool,
}

/// The reader's half of a ring.
///
/// # Invariants
/// One thread at a time has any, but for those that only look ([`usage`](Self::usage) and [`next`](Self::next)).
#[derive(Debug)]
pub(in super::super) struct Reader<'a> {
    pub(super) head: &'a AtomicU64,
    pub(super) tail: &'a AtomicU64,
    pub(super) slots: Option<View<'a>>,
}

impl Reader<'_> {
    /// How many records are stored from this position on, which is the reader's, in a ring whose both ends keep the laws.
    #[inline]
    pub(in super::super) fn waiting(&self, position: u64) -> u64 {
        // Relaxed: whoever has moved the tail here has seen `head` as far.
        (self.head.load(Ordering::Relaxed) >> HEAD_SHIFT).wrapping_sub(position)
    }

    /// Records stored so far, and records that are stored now.
    #[inline]
    pub(in super::super) fn usage(&self) -> (u64, u64) {
        // The tail first: it only grows, so the difference is never negative. Acquire keeps the two loads in this order.
        let tail = self.tail.load(Ordering::Acquire) >> 1;
        let head = self.head.load(Ordering::Relaxed) >> HEAD_SHIFT;
        (head, head.saturating_sub(tail))
    }

    /// Looks at the reader's position.
    #[inline]
    pub(in super::super) fn next(&self) -> Next {
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
    pub(in super::super) fn take(
        &self,
        out: &mut [u8],
        before: impl FnOnce(u64) -> bool,
    ) -> Option<Result<usize, usize>> {
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
    pub(in super::super) fn copy(&self, position: u64, out: &mut [u8]) -> Result<usize, usize> {
        let slots = self.slots.expect("a ring that holds a record has slots");
        slots.copy_out(slots.at(position), out)
    }

    /// Frees the slot of this position, which is the reader's.
    #[inline]
    pub(in super::super) fn advance(&self, position: u64) {
        // Release: pairs with the Acquire in `room`; the bytes were copied out before the slot may be filled again.
        self.tail.store((position + 1) << 1, Ordering::Release);
    }

    /// Remembers that the loss before this position, which is the reader's, is reported.
    pub(in super::super) fn report_loss(&self, position: u64) {
        self.tail.store(position << 1 | REPORTED, Ordering::Release);
    }
}
