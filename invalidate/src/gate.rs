//! The gate of one shard: it decides, between the threads that use memory and the one that watches it change hands, who goes first.
//!
//! **Problem.** A submitter looks at an object, finds it valid and hands its memory to a device. Meanwhile the program unmaps that memory,
//! and somebody has to hold the `munmap` until the device is done. Neither side may take a lock: the submitter would hold it across a driver
//! call, and the watcher runs while a mutator is asleep in the kernel with who knows which locks.
//!
//! **Law.** A closer that has seen `users == 0` and then `inflight == 0` while the gate is closed knows that no work uses the shard's memory
//! and that none can begin before it opens the gate again.
//!
//! **Protocol.** It is the store-buffering pattern twice over, so each side puts a `SeqCst` fence between its store and its load:
//!
//! | submitter | closer |
//! | --- | --- |
//! | `users + 1` | `closed + 1` |
//! | *fence* | *fence* |
//! | `closed` is 0? and the object's word is unchanged? | `users` is 0? then `inflight` is 0? |
//! | yes: `inflight + 1` and `users - 1`, no: `users - 1` | yes: events may be read, words changed |
//! | *fence*, closed? → wake the closer | `closed - 1`, `epoch + 1`, wake everybody |
//!
//! Either the submitter sees the gate closed and goes away, or the closer sees the user, waits for it to leave, and then sees its `inflight`. Both
//! counts are in one word, so that a use begins with the same locked instruction that ends its visit.
//! The third fence, before the decision to wake, is the same pattern once more: *decrement, then look at `closed`* against *close, then look at
//! the count*. Without it both sides can miss each other and the closer sleeps for ever.
//!
//! **Waiting.** Openers go *closed − 1, epoch + 1, wake*; waiters read *epoch, closed, and only then any word*, and sleep on the epoch they
//! read. In any other order a waiter can sleep on an epoch that has already passed. The models in `pinfold-core`'s `tests/loom.rs` check each
//! of these sentences and, by a list of mutations, that they would notice if one were broken.
//!
//! **Untold.** One `munmap` may be over a hundred thousand targets, and who has nothing to do with it shall not wait until all are told. So a
//! closer may open with some of the bytes left *untold*, and clear them when all over them is told. Whoever looks at a target through the open
//! gate asks for the target's own bytes first; untold ones are as good as a closed gate. Who doesn't name bytes finds the gate closed.
//! The bounds only grow, by closers with nobody inside, until they are cleared as one: so whoever has seen the gate open sees bounds that hold all
//! that was untold then, or, by the Acquire of what cleared them, the words of all that was.
//!
//! **LATE.** Work that outlives its deadline is moved from `inflight` to `late`: no hold-off waits for it any more, destruction still does.
//! Each use remembers the *era* it began in, and a give-up begins a new era, so that its end is taken from the right count.

use std::time::Instant;

use crate::HostRange;
use crate::sync::{AtomicU32, AtomicU64, Futex, Ordering, fence, fence_after_rmw};

/// Gate, users, uses and epoch of one shard. See the module's head for the protocol.
#[derive(Debug, Default)]
pub struct Gate {
    /// How many closers hold the gate closed. Written by closers only, by read-modify-write.
    closed: AtomicU32,
    /// From above: the [era](ERA), the [users](USER), which are the threads between [`try_enter`](Self::try_enter) and leaving, and the uses under
    /// way. Written by visitors, by retirement, and by [`give_up`](Self::give_up).
    flight: AtomicU64,
    /// Uses given up on. Written by `give_up` and by retirement.
    late: AtomicU32,
    /// The bounds of what changed hands and isn't told yet; none if the end is 0. Written by one thread: the monitor's.
    untold_start: AtomicU64,
    untold_end: AtomicU64,
    /// Changes after each opening; those who met a closed gate sleep on it.
    epoch: Futex,
    /// Changes when a count fell while the gate was closed; closers sleep on it.
    fell: Futex,
}

// Of `flight`. Four million uses under way and 65,536 threads inside one shard, each for some dozen instructions, are more than there can be. An era
// comes back after 67 million give-ups, each of which has waited for a deadline: 18 hours of them at a millisecond each, with one use late all the time.
const USE: u64 = 1;
const USER: u64 = 1 << 22;
const ERA: u64 = 1 << 38;

/// The era a use began in; needed to end it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Era(u32);

/// A visit of the gate: while it lasts, no closer goes past `users == 0`. Must be short: no driver call, no lock, no allocation.
#[derive(Debug)]
pub struct Visit<'a> {
    gate: &'a Gate,
}

impl Gate {
    /// An open gate that nobody uses.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    // ---- users ----------------------------------------------------------------------------------------------------------------------

    /// Enters if the gate is open. What the visitor reads afterwards (the words of objects) is not older than the last opening.
    pub fn try_enter(&self) -> Option<Visit<'_>> {
        self.try_enter_beside().filter(|_| !self.has_untold())
    }

    /// As [`try_enter`](Self::try_enter), also while something is untold: the visitor must ask [`is_untold`](Self::is_untold) of the bytes
    /// whose words it reads, before it reads them.
    #[inline]
    pub fn try_enter_beside(&self) -> Option<Visit<'_>> {
        self.flight.fetch_add(USER, Ordering::Relaxed);
        let visit = Visit { gate: self }; // leaves on every path
        fence_after_rmw(); // between our store to the users and our load of `closed`; partner: `close`
        self.is_unheld().then_some(visit)
    }

    /// Whether nobody holds the gate closed, and everything is told.
    pub fn is_open(&self) -> bool {
        self.is_unheld() && !self.has_untold()
    }

    /// Whether nobody holds the gate closed, and these bytes are told.
    #[inline]
    pub fn is_open_for(&self, range: HostRange) -> bool {
        self.is_unheld() && !self.is_untold(range)
    }

    /// Acquire: pairs with the Release in [`open`](Self::open); who sees the gate open sees what its closers did to the words, and left untold.
    #[inline]
    fn is_unheld(&self) -> bool {
        self.closed.load(Ordering::Acquire) == 0
    }

    /// Whether something is untold. To be asked with the gate seen open.
    #[inline]
    pub fn has_untold(&self) -> bool {
        // Acquire: pairs with the Release in `told`; who sees nothing untold sees what became of the words.
        self.untold_end.load(Ordering::Acquire) != 0
    }

    /// Whether some of these bytes may be untold. To be asked with the gate seen open.
    #[inline]
    pub fn is_untold(&self, range: HostRange) -> bool {
        // Acquire: pairs with the fence in `close`; who sees a bound that was left after it sees what was told before.
        let start = self.untold_start.load(Ordering::Acquire);
        let end = self.untold_end.load(Ordering::Acquire); // pairs with the Release in `told`
        start < range.end() as u64 && (range.start() as u64) < end
    }

    /// The epoch to sleep on. Read it *before* asking [`is_open`](Self::is_open).
    #[inline]
    pub fn epoch(&self) -> u32 {
        self.epoch.value()
    }

    /// Sleeps until the gate has been opened once more since `epoch` was read, or the deadline. Returns false when the deadline has passed.
    pub fn wait_epoch(&self, epoch: u32, deadline: Option<Instant>) -> bool {
        self.epoch.wait(epoch, deadline)
    }

    /// Waits until the gate is seen open, and everything told. Returns false when the deadline has passed first; the gate must then not be
    /// looked through.
    pub fn wait_open(&self, deadline: Option<Instant>) -> bool {
        self.wait_until(deadline, || self.is_open())
    }

    /// Waits until the gate is seen open, and these bytes told. Returns false when the deadline has passed first; nothing over them must then be
    /// looked at.
    pub fn wait_open_for(&self, range: HostRange, deadline: Option<Instant>) -> bool {
        self.wait_until(deadline, || self.is_open_for(range))
    }

    fn wait_until(&self, deadline: Option<Instant>, is_open: impl Fn() -> bool) -> bool {
        loop {
            let epoch = self.epoch();
            if is_open() {
                return true;
            }
            if !self.wait_epoch(epoch, deadline) {
                return false;
            }
        }
    }

    // ---- uses -----------------------------------------------------------------------------------------------------------------------

    /// Ends a use begun by [`Visit::begin`]. Allocates nothing, takes no lock: fit for a completion thread while a mutator waits.
    /// Returns whether it had been given up on.
    #[allow(clippy::must_use_candidate)]
    #[inline]
    pub fn end(&self, era: Era) -> bool {
        let mut now = self.flight.load(Ordering::Relaxed);
        let falls = loop {
            if era_of(now) != era {
                break &self.late;
            }
            // Release: pairs with the Acquire in `is_quiet`; who sees the count fall sees that the use is over.
            match self.flight.compare_exchange_weak(now, now - USE, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => {
                    self.wake_closers();
                    return false;
                }
                Err(seen) => now = seen,
            }
        };
        falls.fetch_sub(1, Ordering::Release); // as above, for `is_drained`
        self.fell.bump();
        true
    }

    /// Uses under way that hold-offs wait for.
    pub fn inflight(&self) -> u32 {
        uses_of(self.flight.load(Ordering::Relaxed))
    }

    /// Uses that outlived a deadline and have not ended yet.
    pub fn late(&self) -> u32 {
        self.late.load(Ordering::Relaxed)
    }

    // ---- closers --------------------------------------------------------------------------------------------------------------------

    /// Closes the gate for whoever has not entered yet. Every `close` needs one [`open`](Self::open).
    pub fn close(&self) {
        self.closed.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst); // between our store to `closed` and our loads of the counts; partners: `try_enter`, `wake_closers`
    }

    /// Takes back one [`close`](Self::close) and wakes those who wait for the gate, in this order.
    pub fn open(&self) {
        // Release: pairs with the Acquire in `is_open`.
        let before = self.closed.fetch_sub(1, Ordering::Release);
        debug_assert!(before > 0, "a gate is opened by whoever closed it");
        self.epoch.bump();
    }

    /// Leaves bytes untold when the gate opens. Called with the gate closed and nobody inside, by the one thread that tells.
    pub fn leave_untold(&self, range: HostRange) {
        let (mut start, mut end) = (range.start() as u64, range.end() as u64);
        let seen = self.untold_end.load(Ordering::Relaxed);
        if seen != 0 {
            start = start.min(self.untold_start.load(Ordering::Relaxed));
            end = end.max(seen);
        }
        // Relaxed: the fence of this round's `close` stands between what was told before and these; it pairs with the Acquire in `is_untold`.
        self.untold_start.store(start, Ordering::Relaxed);
        self.untold_end.store(end, Ordering::Relaxed);
    }

    /// Everything is told: nothing is untold any more. Wakes those who wait for it.
    pub fn told(&self) {
        // Release: pairs with the Acquire in `is_untold` and `has_untold`.
        self.untold_end.store(0, Ordering::Release);
        self.epoch.bump();
    }

    /// Waits, with the gate closed, until nobody is inside. Returns false when the deadline has passed first.
    pub fn wait_users(&self, deadline: Option<Instant>) -> bool {
        // Acquire: pairs with the Release in `Visit::leave`; who sees the visitor gone sees what it did.
        self.wait_fallen(deadline, || users_of(self.flight.load(Ordering::Acquire)) == 0)
    }

    /// Waits, with the gate closed and nobody inside, until no use is under way. Returns false when the deadline has passed first.
    pub fn wait_quiet(&self, deadline: Option<Instant>) -> bool {
        self.wait_fallen(deadline, || self.is_quiet())
    }

    /// Moves what is still under way to `late` and returns how much that was. Called with the gate closed, when the deadline has passed.
    pub fn give_up(&self) -> u32 {
        let mut now = self.flight.load(Ordering::Relaxed);
        loop {
            let count = uses_of(now);
            if count == 0 {
                return 0;
            }
            // First counted as late, then taken out: `is_drained` may count a use twice for a moment, but never not at all.
            self.late.fetch_add(count, Ordering::Relaxed);
            let next = now.wrapping_add(ERA) - u64::from(count); // the era is uppermost, and wraps
            match self.flight.compare_exchange(now, next, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return count,
                Err(seen) => {
                    self.late.fetch_sub(count, Ordering::Relaxed);
                    self.fell.bump(); // `wait_drained` may have counted twice and gone to sleep on it
                    now = seen;
                }
            }
        }
    }

    /// Waits until neither uses nor late uses are left. Needs no closed gate; for teardown. Returns false when the deadline has passed first.
    pub fn wait_drained(&self, deadline: Option<Instant>) -> bool {
        self.close(); // so that falling counts wake us
        let drained = self.wait_fallen(deadline, || self.is_drained());
        self.open();
        drained
    }

    fn is_quiet(&self) -> bool {
        uses_of(self.flight.load(Ordering::Acquire)) == 0
    }

    fn is_drained(&self) -> bool {
        self.is_quiet() && self.late.load(Ordering::Acquire) == 0
    }

    fn wait_fallen(&self, deadline: Option<Instant>, done: impl Fn() -> bool) -> bool {
        loop {
            let seen = self.fell.value();
            if done() {
                return true;
            }
            if !self.fell.wait(seen, deadline) {
                return done();
            }
        }
    }

    /// To be called right after the decrement.
    #[inline]
    fn wake_closers(&self) {
        fence_after_rmw(); // between our decrement and our load of `closed`; partner: `close`
        if self.closed.load(Ordering::Relaxed) != 0 {
            self.fell.bump();
        }
    }
}

impl<'a> Visit<'a> {
    /// Ends the visit and begins a use, in one step, so that no closer can miss it.
    #[inline]
    pub fn begin(self) -> Era {
        std::mem::ManuallyDrop::new(self).leave(USER - USE)
    }

    /// Goes on until it is [resumed](Self::resume).
    #[doc(hidden)]
    #[inline]
    pub fn pause(self) {
        std::mem::forget(self);
    }

    /// A visit of this gate that was [paused](Self::pause), once for each pause: who resumes what isn't paused takes somebody else off the count.
    #[doc(hidden)]
    #[inline]
    pub fn resume(gate: &'a Gate) -> Self {
        Self { gate }
    }

    #[inline]
    fn leave(&self, less: u64) -> Era {
        // Release: pairs with the Acquire in `wait_users`.
        let before = self.gate.flight.fetch_sub(less, Ordering::Release);
        self.gate.wake_closers();
        era_of(before)
    }
}

impl Drop for Visit<'_> {
    #[inline]
    fn drop(&mut self) {
        self.leave(USER);
    }
}

#[inline]
fn era_of(flight: u64) -> Era {
    Era((flight / ERA) as u32)
}

#[inline]
fn users_of(flight: u64) -> u32 {
    (flight % ERA / USER) as u32
}

#[inline]
fn uses_of(flight: u64) -> u32 {
    (flight % USER) as u32
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::page_size;
    use std::time::Duration;

    fn passed() -> Option<Instant> {
        Some(Instant::now())
    }

    #[test]
    fn a_closed_gate_lets_nobody_in_and_counts_its_closers() {
        let gate = Gate::new();
        gate.close();
        gate.close();
        gate.open();
        assert!(gate.try_enter().is_none());
        gate.open();
        assert!(gate.try_enter().is_some());
        assert!(gate.wait_users(passed()));
    }

    #[test]
    fn a_closer_waits_for_users_and_uses() {
        let gate = Gate::new();
        let visit = gate.try_enter().unwrap();
        gate.close();
        assert!(!gate.wait_users(passed()));
        let era = visit.begin();
        assert!(gate.wait_users(passed()));
        assert!(!gate.wait_quiet(passed()));
        std::thread::scope(|s| {
            s.spawn(|| gate.end(era));
            assert!(gate.wait_quiet(None));
        });
    }

    #[test]
    fn what_is_untold_is_closed_and_what_lies_beside_is_open() {
        let pages = |first: usize, count: usize| HostRange::new(first * page_size(), count * page_size()).unwrap();
        let gate = Gate::new();
        gate.close();
        gate.leave_untold(pages(4, 2));
        gate.open();
        assert!(gate.try_enter().is_none() && !gate.wait_open(passed()), "who names nothing waits for everything");
        assert!(gate.try_enter_beside().is_some());
        let untold = |gate: &Gate| [3, 4, 5, 6, 9].map(|page| !gate.wait_open_for(pages(page, 1), passed()));
        assert_eq!(untold(&gate), [false, true, true, false, false]);
        gate.close();
        gate.leave_untold(pages(8, 2));
        gate.open();
        assert_eq!(untold(&gate), [false, true, true, true, true], "one pair of bounds for all");
        gate.told();
        assert_eq!(untold(&gate), [false; 5]);
        assert!(gate.try_enter().is_some() && gate.is_open());
    }

    #[test]
    fn late_uses_end_in_the_count_they_were_moved_to() {
        let gate = Gate::new();
        let old = gate.try_enter().unwrap().begin();
        assert_eq!(gate.give_up(), 1);
        let new = gate.try_enter().unwrap().begin();
        assert_eq!((gate.inflight(), gate.late()), (1, 1));
        gate.end(old);
        assert_eq!((gate.inflight(), gate.late()), (1, 0));
        assert!(!gate.wait_drained(passed()));
        gate.end(new);
        assert_eq!((gate.inflight(), gate.late()), (0, 0));
        assert!(gate.wait_drained(passed()));
        assert_eq!(gate.give_up(), 0);
    }

    #[test]
    fn the_counts_in_one_word_leave_each_other_alone() {
        let gate = Gate { flight: AtomicU64::new(u64::MAX - ERA + 1), ..Gate::new() }; // the last era
        let inside = gate.try_enter().unwrap();
        let old = gate.try_enter().unwrap().begin();
        assert_eq!(gate.give_up(), 1);
        assert!(!gate.wait_users(passed()) && gate.wait_quiet(passed()), "given up on uses, not on who is inside");
        let new = inside.begin();
        assert!(gate.wait_users(passed()) && old != new);
        assert_eq!((gate.end(old), gate.end(new)), (true, false));
        assert_eq!((gate.inflight(), gate.late()), (0, 0));
    }

    #[test]
    fn waiting_for_an_opening_ends_at_the_deadline_or_with_the_opening() {
        let gate = Gate::new();
        gate.close();
        assert!(!gate.wait_open(Some(Instant::now() + Duration::from_millis(5))));
        std::thread::scope(|s| {
            s.spawn(|| gate.open());
            assert!(gate.wait_open(None));
        });
    }
}
