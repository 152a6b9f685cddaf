//! A list that was full, remembered by its bounds.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::HostRange;

/// The bounds of what was left to do, where the list of it was full.
pub(crate) struct Hull {
    start: AtomicUsize,
    end: AtomicUsize,
    any: AtomicBool,
}

impl Hull {
    pub(crate) const fn new() -> Self {
        Self { start: AtomicUsize::new(usize::MAX), end: AtomicUsize::new(0), any: AtomicBool::new(false) }
    }

    pub(crate) fn add(&self, range: HostRange) {
        self.start.fetch_min(range.start(), Ordering::Relaxed);
        self.end.fetch_max(range.end(), Ordering::Relaxed);
        // Release: pairs with the Acquire in `take`.
        self.any.store(true, Ordering::Release);
    }

    /// The bounds since the last call. Those of a range that is being added meanwhile are in this answer or in the next, or half in each: then
    /// the next has bounds that fit nothing, which stand for everything.
    pub(crate) fn take(&self) -> Option<HostRange> {
        if !self.any.swap(false, Ordering::Acquire) {
            return None;
        }
        let bounds = (self.start.swap(usize::MAX, Ordering::Relaxed), self.end.swap(0, Ordering::Relaxed));
        Some(if bounds.0 < bounds.1 { HostRange::from_known(bounds.0, bounds.1) } else { HostRange::everything() })
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::page_size;

    #[test]
    fn the_bounds_of_all_that_was_added_are_told_once() {
        let pages = |first: usize, count: usize| HostRange::new(first * page_size(), count * page_size()).unwrap();
        let hull = Hull::new();
        assert_eq!(hull.take(), None);
        hull.add(pages(8, 2));
        hull.add(pages(3, 1));
        assert_eq!((hull.take(), hull.take()), (Some(pages(3, 7)), None));
        // What a taking in the middle of an addition leaves.
        hull.end.store(5 * page_size(), Ordering::Relaxed);
        hull.any.store(true, Ordering::Relaxed);
        assert_eq!(hull.take(), Some(HostRange::everything()));
    }
}
