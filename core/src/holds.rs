//! What keeps an object open, and whether work that a hold-off gave up on was its own.
//!
//! **Problem.** The last handle closes an object, whoever drops it. And after a deadline the monitor says of which objects there was work left: it
//! asks when it tells of the change, and by then that work may have ended.
//!
//! **Law.** Exactly one sees itself be the last. Work that had been given up on is found, as under way or as ended late, by who asks afterwards.
//!
//! **Protocol.** Handles and submits are counted in one word, as one of each goes when a submit is over. Work that ends late writes that down before it
//! lets go; who asks looks at the count first, then at what is written.

use pinfold_invalidate::sync::{AtomicU64, Ordering};

use crate::state::Generation;

/// A handle in the count, and a submit: no submit is without a handle.
const HANDLE: u64 = 1;
const SUBMIT: u64 = 1 << 32;

#[derive(Debug, Default)]
pub(crate) struct Holds {
    /// Handles (the engine's, those of leases, and those of work under way), and in the upper half the submits under way. These are for reports
    /// only, as the protocol counts by shard.
    count: AtomicU64,
    /// One more than the newest generation of which work ended late.
    ended_late: AtomicU64,
}

/// One handle's part of the count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hold {
    Handle,
    /// A handle of work under way.
    Submit,
}

impl Hold {
    fn counts(self) -> u64 {
        match self {
            Self::Handle => HANDLE,
            Self::Submit => HANDLE + SUBMIT,
        }
    }
}

/// What is left when a hold is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Left {
    /// Neither handles nor work: this was the last one.
    pub(crate) nothing: bool,
    /// It was the last submit.
    pub(crate) retired: bool,
}

impl Holds {
    /// The first handle, of an object that nobody else knows yet.
    pub(crate) fn open(&self) {
        self.count.store(HANDLE, Ordering::Relaxed);
    }

    /// One more handle, made of another one.
    pub(crate) fn add(&self) {
        self.count.fetch_add(HANDLE, Ordering::Relaxed); // as in `Arc`
    }

    /// One more handle, made of none. False if the last is gone.
    pub(crate) fn try_add(&self) -> bool {
        let more = |count: u64| (count > 0).then_some(count + HANDLE);
        self.count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    /// A handle becomes one of work.
    pub(crate) fn begin_submit(&self) {
        self.count.fetch_add(SUBMIT, Ordering::Relaxed);
    }

    /// Takes [`begin_submit`](Self::begin_submit) back.
    pub(crate) fn refuse_submit(&self) {
        self.count.fetch_sub(SUBMIT, Ordering::Relaxed); // work that never began has left nothing to see
    }

    /// Work with the pages of this generation, which a hold-off has given up on, is over, and is about to be let go of.
    pub(crate) fn end_late(&self, generation: Generation) {
        self.ended_late.fetch_max(generation.0 + 1, Ordering::Relaxed);
    }

    pub(crate) fn let_go(&self, hold: Hold) -> Left {
        // AcqRel: the last one sees what the others did. The Release also pairs with the Acquire in `submits`.
        let left = self.count.fetch_sub(hold.counts(), Ordering::AcqRel) - hold.counts();
        Left { nothing: left == 0, retired: hold == Hold::Submit && left < SUBMIT }
    }

    /// Submits under way. Acquire: pairs with the Release with which one ends; who finds none sees what it left.
    pub(crate) fn submits(&self) -> u32 {
        (self.count.load(Ordering::Acquire) / SUBMIT) as u32
    }

    /// Whether work with the pages of this generation was under way when a hold-off gave up. For who knows that one has.
    pub(crate) fn was_late(&self, generation: Generation) -> bool {
        self.submits() > 0 || self.ended_late.load(Ordering::Relaxed) == generation.0 + 1
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn older_work_that_ends_later_hides_no_newer_one() {
        let holds = Holds::default();
        holds.open();
        for _ in 0..2 {
            holds.add();
            holds.begin_submit();
        }
        for generation in [Generation(5), Generation(3)] {
            holds.end_late(generation);
            holds.let_go(Hold::Submit);
        }
        assert!(holds.was_late(Generation(5)));
        assert!(!holds.was_late(Generation(6)), "nobody has given up on work with these pages");
    }
}

/// `RUSTFLAGS="--cfg loom" cargo test -p pinfold-core --lib --release holds::models`
#[cfg(all(test, loom))]
mod models {
    use std::sync::Arc;

    use loom::cell::UnsafeCell;
    use loom::thread;

    use super::*;

    #[test]
    fn work_that_was_given_up_on_is_found_when_it_ends_meanwhile() {
        loom::model(|| {
            let holds = Arc::new(Holds::default());
            holds.open();
            holds.add();
            holds.begin_submit();
            let work = {
                let holds = Arc::clone(&holds);
                thread::spawn(move || {
                    holds.end_late(Generation(1));
                    holds.let_go(Hold::Submit)
                })
            };
            assert!(holds.was_late(Generation(1)), "lost between the count and what is written");
            assert_eq!(work.join().unwrap(), Left { nothing: false, retired: true });
            assert_eq!(holds.let_go(Hold::Handle), Left { nothing: true, retired: false });
        });
    }

    #[test]
    fn exactly_one_is_the_last_and_sees_what_the_others_did() {
        /// What the holders of handles write, and the last one takes down.
        struct World(Holds, [UnsafeCell<()>; 2]);
        // SAFETY: the cells are the only part that isn't `Sync`, and loom fails the model if their accesses are not ordered.
        unsafe impl Sync for World {}
        // SAFETY: nothing in it belongs to a thread.
        unsafe impl Send for World {}

        fn drop_one(world: &World, mine: usize) -> bool {
            world.1[mine].with_mut(|_| ());
            let last = world.0.let_go(Hold::Handle).nothing;
            if last {
                world.1.iter().for_each(|cell| cell.with_mut(|_| ()));
            }
            last
        }
        loom::model(|| {
            let world = Arc::new(World(Holds::default(), Default::default()));
            world.0.open();
            world.0.add();
            let other = {
                let world = Arc::clone(&world);
                thread::spawn(move || drop_one(&world, 1))
            };
            let mine = drop_one(&world, 0);
            assert!(mine ^ other.join().unwrap());
            assert!(!world.0.try_add(), "opened again");
        });
    }
}
