//! Which pages were discarded since they were last taken, and whether they are gone by now.
//!
//! **Problem.** `madvise` tells before it discards, and nobody tells when it has. Whoever takes the pages in between keeps those that go.
//!
//! **Law.** Discarded pages count as gone when they have been seen absent; until then, what is taken of them is taken a second time.
//!
//! **Protocol.** The monitor notes range and generation. The builder compares that generation with the one it published last, instead of taking a
//! flag: so an overtaken builder can't take the note away from the one that overtook it. A note that comes while the range is being reset leaves
//! bounds that fit nothing, which stand for the whole object.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use pinfold_invalidate::{HostRange, any_present};

use crate::Generation;

#[derive(Debug)]
pub(crate) struct Discarded {
    /// The generation that the last discard began. Written by the monitor.
    at: AtomicU64,
    /// The generation that was published last. Written by builders.
    taken: AtomicU64,
    /// Bounds of all that was discarded since. Widened by the monitor, reset by builders.
    from: AtomicUsize,
    to: AtomicUsize,
}

impl Discarded {
    pub(crate) fn new() -> Self {
        Self {
            at: AtomicU64::new(0),
            taken: AtomicU64::new(0),
            from: AtomicUsize::new(usize::MAX),
            to: AtomicUsize::new(0),
        }
    }

    /// Pages of `range` are being discarded, which begins this generation. For the monitor.
    pub(crate) fn note(&self, range: HostRange, generation: Generation) {
        self.from.fetch_min(range.start(), Ordering::Relaxed);
        self.to.fetch_max(range.end(), Ordering::Relaxed);
        // Release: pairs with the Acquire in `since`; who sees the generation sees the bounds, or those of a reset.
        self.at.fetch_max(generation.0, Ordering::Release);
    }

    /// What was discarded of `whole` since it was last taken.
    pub(crate) fn since_taken(&self, whole: HostRange) -> Option<HostRange> {
        if self.at.load(Ordering::Acquire) <= self.taken.load(Ordering::Relaxed) {
            return None;
        }
        let bounds = (self.from.load(Ordering::Relaxed) as u64, self.to.load(Ordering::Relaxed) as u64);
        let part = HostRange::from_bounds(bounds.0, bounds.1).and_then(|part| part.intersection(whole));
        Some(part.unwrap_or(whole))
    }

    /// The pages have been taken, and published with this generation.
    pub(crate) fn take(&self, generation: Generation) {
        self.taken.fetch_max(generation.0, Ordering::Relaxed);
        self.from.store(usize::MAX, Ordering::Relaxed);
        self.to.store(0, Ordering::Relaxed);
    }
}

/// Whether every page of the range is seen absent. Asked before anything makes them present again.
///
/// Asked once: waiting for it starves an object whose pages the program discards and touches all the time.
pub(crate) fn are_gone(range: HostRange) -> bool {
    matches!(any_present(range), Ok(Some(false))) // else: present still, or this kernel can't tell
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use pinfold_invalidate::page_size;

    #[test]
    fn a_discard_counts_until_a_later_generation_is_published() {
        let pages = |first: usize, count: usize| HostRange::new(first * page_size(), count * page_size()).unwrap();
        let (discarded, whole) = (Discarded::new(), pages(10, 10));
        assert_eq!(discarded.since_taken(whole), None);
        discarded.note(pages(8, 4), Generation(1));
        assert_eq!(discarded.since_taken(whole), Some(pages(10, 2)));
        discarded.note(pages(14, 1), Generation(2));
        assert_eq!(discarded.since_taken(whole), Some(pages(10, 5)));
        discarded.take(Generation(1)); // overtaken: what it published is over
        assert_eq!(discarded.since_taken(whole), Some(whole));
        discarded.take(Generation(2));
        assert_eq!(discarded.since_taken(whole), None);
        discarded.note(pages(11, 1), Generation(5));
        assert_eq!(discarded.since_taken(whole), Some(pages(11, 1)));
    }
}
