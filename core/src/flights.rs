//! Submits under way, and the end of the manager, which waits for them.
//!
//! **Problem.** A manager may be dropped on one thread while another submits. What is submitted uses pages and a device that the drop gives back.
//!
//! **Law.** Once the end has found no submit under way, none calls the device any more.
//!
//! **Protocol.** A submit counts itself, then looks whether the manager is closing. The end says that it is, then looks at the count. Each has a fence
//! between the two, so one of them sees the other: the submit is refused, or it is waited for.

use std::time::Instant;

use pinfold_invalidate::sync::{AtomicBool, AtomicU64, Event, Ordering, fence, fence_after_rmw};

/// Two counts that only grow, the second of them the word that is slept on: so the end of a submit is one locked instruction, also of the last.
#[derive(Debug, Default)]
pub(crate) struct Flights {
    begun: AtomicU64,
    over: Event,
    /// How many of those that are over the device was never given.
    refused: AtomicU64,
    /// Set once, by the end.
    closing: AtomicBool,
}

impl Flights {
    /// Counts a submit. To be followed by a look at [`is_closing`](Self::is_closing), and in any case by an [`end`](Self::end).
    pub(crate) fn begin(&self) {
        self.begun.fetch_add(1, Ordering::Relaxed);
        fence_after_rmw(); // between our count and our look at `closing`; partner: `close`
    }

    pub(crate) fn end(&self) {
        // Its Release pairs with the Acquire in `count` and `wait_none`: who sees nothing left sees what the last one did.
        self.over.bump();
    }

    /// In place of [`end`](Self::end) of a submit that the device was not given.
    pub(crate) fn refuse(&self) {
        self.refused.fetch_add(1, Ordering::Release); // pairs with the Acquire in `launched`
        self.end();
    }

    pub(crate) fn count(&self) -> u32 {
        let over = self.over.value(); // first: what is over had begun
        self.begun().wrapping_sub(over)
    }

    /// How many the device has been given since the manager was made; one that is being checked counts as well, until it is refused.
    pub(crate) fn launched(&self) -> u64 {
        let refused = self.refused.load(Ordering::Acquire); // first: what was refused had begun
        self.begun.load(Ordering::Relaxed).saturating_sub(refused)
    }

    /// As `over` counts.
    fn begun(&self) -> u32 {
        self.begun.load(Ordering::Relaxed) as u32
    }

    /// No submit that begins now gets through. Those that have begun may.
    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::Release);
        fence(Ordering::SeqCst); // between our store to `closing` and our look at the count; partner: `begin`
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// False if something is left at the deadline.
    pub(crate) fn wait_none(&self, deadline: Instant) -> bool {
        loop {
            let over = self.over.value();
            if self.begun() == over {
                return true;
            }
            if !self.over.wait(over, Some(deadline)) {
                return self.count() == 0;
            }
        }
    }
}

/// `RUSTFLAGS="--cfg loom" cargo test -p pinfold-core --lib --release flights::models`
#[cfg(all(test, loom))]
mod models {
    use std::sync::Arc;

    use loom::cell::UnsafeCell;
    use loom::thread;

    use super::*;

    /// What submits use and the end gives back.
    #[derive(Default)]
    struct World {
        flights: Flights,
        device: UnsafeCell<()>,
    }

    // SAFETY: the cell is the only part that isn't `Sync`, and loom fails the model if a use and the end are not ordered.
    unsafe impl Sync for World {}
    // SAFETY: nothing in it belongs to a thread.
    unsafe impl Send for World {}

    #[test]
    fn the_end_waits_for_a_submit_or_is_seen_by_it() {
        let mut bounded = loom::model::Builder::new();
        bounded.preemption_bound = bounded.preemption_bound.or(Some(3));
        bounded.check(|| {
            let world = Arc::new(World::default());
            let submits = [(); 2].map(|()| {
                let world = Arc::clone(&world);
                thread::spawn(move || {
                    world.flights.begin();
                    if !world.flights.is_closing() {
                        world.device.with(|_| ());
                    }
                    world.flights.end();
                })
            });
            world.flights.close();
            assert!(world.flights.wait_none(Instant::now()), "loom knows no deadline");
            world.device.with_mut(|_| ());
            for submit in submits {
                submit.join().unwrap();
            }
        });
    }
}
