//! Whether anything has stirred in any shard since somebody last looked at them all.
//!
//! **Problem.** The pages of a range that is watched for the first time may have been any shard's, so whoever takes them has to find every gate open,
//! everything told, and every probe clear. That is thirty cache lines for sixteen shards in which nothing has happened for seconds.
//!
//! **Law.** Who is told that all is calm might as well have looked at each shard: what he doesn't know of will be told to him.
//!
//! **Protocol.** It is store buffering once more, with the set of targets on one side:
//!
//! | who asks | closer |
//! | --- | --- |
//! | is among the targets | gates closed, `stirs + 1` |
//! | *fence* (the index's, behind each change) | *fence* (the index's, before each visit) |
//! | `stirs` as it was at the last look? | targets told, gates opened |
//!
//! Either he sees that something stirred and looks at each shard, or the closer finds and tells him; then his word moves, and his acquisition is
//! over. The look that is remembered read `stirs` first: whatever it knew of had closed its gates by then, and was found over. Remembered is only
//! a look that found nothing untold for anybody.

use crate::HostRange;
use crate::space::{Inner, Shards, Space};
use crate::sync::{AtomicU64, Ordering};

#[derive(Debug, Default)]
pub(crate) struct Calm {
    /// How often gates have been closed. Written by closers.
    stirs: AtomicU64,
    /// How often that had been before the last look that found every shard at rest. Written by who looked.
    seen: AtomicU64,
}

/// How often gates had been closed before a look at every shard began.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stirs(u64);

impl Calm {
    /// Says that gates have been closed. To be called with them closed, before anything is read or told.
    pub(crate) fn stir(&self) {
        // Release: pairs with the Acquire in `look`; who sees it sees the gates closed, or what became of them.
        self.stirs.fetch_add(1, Ordering::Release);
    }

    /// Nothing has stirred since the last look; or the number for [`remember`](Self::remember), to be had before the next.
    ///
    /// To be called behind the insertion into the index, and behind the noting of the word: by whom a closer has told something, that closer is seen.
    pub(crate) fn look(&self) -> Result<(), Stirs> {
        // Acquire: pairs with the Release in `remember`; who relies on a look sees what that saw.
        let seen = self.seen.load(Ordering::Acquire);
        let stirs = self.stirs.load(Ordering::Acquire);
        if seen == stirs { Ok(()) } else { Err(Stirs(stirs)) }
    }

    /// Every shard was found at rest, and nothing untold, by a look that began behind this number.
    pub(crate) fn remember(&self, before: Stirs) {
        self.seen.store(before.0, Ordering::Release);
    }
}

impl Space {
    /// Whether whoever takes pages of the range, which may be any of these shards', has nothing to wait for: neither
    /// [`wait_open_for`](Self::wait_open_for) nor [`wait_settled`](Self::wait_settled) would. Of [all shards](Shards::ALL) that is mostly known
    /// from the last time. To be asked by a target of the range.
    #[must_use]
    pub fn is_clear(&self, range: HostRange, shards: Shards) -> bool {
        let before = match self.inner.calm.look() {
            Ok(()) if shards == Shards::ALL => return true,
            Ok(()) => None,
            Err(before) => Some(before),
        };
        let is_clear = shards.iter().all(|shard| self.gate(shard).is_open_for(range))
            && shards.iter().all(|shard| self.inner.shards[shard].is_settled());
        if let Some(before) = before.filter(|_| is_clear && shards == Shards::ALL)
            && !shards.iter().any(|shard| self.gate(shard).has_untold())
        {
            self.inner.calm.remember(before);
        }
        is_clear
    }
}

impl Inner {
    /// Closes the gates of these shards.
    pub(crate) fn close(&self, shards: Shards) {
        shards.iter().for_each(|shard| self.shards[shard].gate.close());
        self.calm.stir();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use crate::{HostRange, Shards, Space, page_size};

    #[test]
    fn a_look_is_remembered_until_a_gate_is_closed_and_only_if_nothing_is_untold() {
        let space = Space::start(1_000_000_000).unwrap();
        let pages = |first: usize, count: usize| HostRange::new(first * page_size(), count * page_size()).unwrap();
        let is_clear = |range| space.is_clear(range, Shards::ALL);
        assert!(is_clear(pages(1, 1)));
        space.inner.close(Shards::one(2));
        assert!(!is_clear(pages(1, 1)));
        space.gate(2).leave_untold(pages(4, 2));
        space.gate(2).open();
        assert!(is_clear(pages(1, 1)));
        assert!(!is_clear(pages(5, 1)), "what was clear for others is not for these");
        space.gate(2).told();
        assert!(is_clear(pages(5, 1)) && space.inner.calm.look().is_ok());
        space.inner.close(Shards::one(7));
        assert!(space.is_clear(pages(1, 1), Shards::one(2)) && space.inner.calm.look().is_err(), "one is not all");
        assert!(!is_clear(pages(1, 1)));
        space.gate(7).open();
        assert!(is_clear(pages(1, 1)));
    }
}

#[cfg(all(test, loom))]
mod models {
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::thread;

    use super::*;
    use crate::Gate;
    use crate::sync::{AtomicU32, fence};

    /// A gate, who is there to be told, and pages that a mutation changes.
    #[derive(Default)]
    struct World {
        calm: Calm,
        gate: Gate,
        targets: AtomicU32,
        pages: UnsafeCell<u32>,
    }

    // SAFETY: the pages are the only part that isn't `Sync`, and loom checks that their accesses are ordered.
    unsafe impl Sync for World {}
    // SAFETY: nothing in it belongs to a thread.
    unsafe impl Send for World {}

    impl World {
        /// A mutation, whose end nobody hears of that is not a target when it is told. Who is takes no pages before he has found out more.
        fn mutate(&self) {
            self.gate.close();
            self.calm.stir();
            fence(Ordering::SeqCst); // as in the index's `hold`
            if self.targets.load(Ordering::Relaxed) == 0 {
                // SAFETY: loom checks that nobody reads them now.
                self.pages.with_mut(|pages| unsafe { *pages += 1 });
            }
            self.gate.open();
        }

        /// As [`Space::is_clear`](crate::Space::is_clear).
        fn is_clear(&self) -> bool {
            let Err(before) = self.calm.look() else { return true };
            let clear = self.gate.is_open();
            if clear {
                self.calm.remember(before);
            }
            clear
        }

        /// What a target does that has just come.
        fn take(&self) {
            self.targets.store(1, Ordering::Relaxed);
            fence(Ordering::SeqCst); // as in the index's `bury`
            if self.is_clear() {
                // SAFETY: loom checks that nobody writes them now.
                self.pages.with(|pages| unsafe { *pages });
            }
        }
    }

    #[test]
    fn who_finds_all_calm_is_told_of_what_comes_and_what_came_is_over() {
        loom::model(|| {
            let world = Arc::new(World::default());
            world.calm.stir(); // something has been over since the last look, so each of the two may be the first to look again
            let closer = thread::spawn({
                let world = Arc::clone(&world);
                move || world.mutate()
            });
            let looker = thread::spawn({
                let world = Arc::clone(&world);
                move || world.is_clear()
            });
            world.take();
            closer.join().unwrap();
            looker.join().unwrap();
        });
    }
}
