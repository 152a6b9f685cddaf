//! What comes after an event: the waiting for its end, and the thread that tells targets so.
//!
//! **Problem.** The read frees the mutator, which only then takes the address space's lock and zaps. Nothing tells when it is done. Whoever
//! takes the pages in between keeps pages that are no longer the program's, and nothing will ever say so.
//!
//! **Law.** Pages are taken only when every earlier event of their shards is over.
//!
//! **Protocol.** Three checks, each closing a part: *the probe* (some mutator has not left its wait), *registration* (takes the address space's
//! lock for writing, so a zap that had it is over), and for discarded pages *absence* (the zap has been there). A mutator that is preempted
//! between its wait and the lock passes the first two; that is why discarded pages that are seen present are taken a second time later.
//!
//! The first probe of an acquisition is for messages that were read before its object was there to be told. A shard of which none has been read since
//! its probe was last clear needs none, so that an object which could be in any shard doesn't ask the kernel sixteen times.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::time::{Duration, Instant};

use crate::space::{Inner, Shards, Space};
use crate::sync::Futex;
use crate::uffd::Uffd;

impl Space {
    /// Waits until every mutation of memory in these shards that targets have been told of is over. Returns false when the deadline has passed first.
    /// Called with the gates seen open. One that has not been told yet will be, so who asks is a target of what it asks for.
    ///
    /// The probe clears after the shard's gate has opened, and nobody is told when: so it is asked again after 50 µs, doubling to 3.2 ms.
    #[must_use]
    pub fn wait_settled(&self, shards: Shards, deadline: Instant) -> bool {
        let mut pause = Duration::from_micros(50);
        while !shards.iter().all(|shard| self.inner.shards[shard].is_settled()) {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_micros(3200));
        }
        true
    }

    /// Whether some mutation of memory in these shards is in flight: begun, and its mutator still waiting for us. Costs 0.3 µs a shard.
    #[must_use]
    pub fn is_busy(&self, shards: Shards) -> bool {
        shards.iter().any(|shard| self.inner.shards[shard].uffd.as_ref().is_some_and(Uffd::is_busy))
    }
}

/// What the settle thread is waiting for.
///
/// Waking a thread costs the one who does it more than all else in a monitor's round, and where both share the mutator's processor, the mutator
/// too. Mutations come in bursts: so the thread, once woken, looks again each millisecond by itself, and is woken only from a longer sleep.
#[derive(Debug)]
pub(crate) struct Owed {
    /// There is something to settle. Raised by whoever has told of a change.
    any: AtomicBool,
    /// The thread sleeps until it is woken. Written by it.
    asleep: AtomicBool,
    turn: Futex,
}

impl Owed {
    pub(crate) fn new() -> Self {
        Self { any: AtomicBool::new(false), asleep: AtomicBool::new(false), turn: Futex::new() }
    }

    /// Says that there is something to settle. Neither allocates nor blocks.
    pub(crate) fn settling(&self) {
        // Release: pairs with the Acquire in `run`; who sees it sees what was put into the queues.
        self.any.store(true, Ordering::Release);
        fence(Ordering::SeqCst); // between our store to `any` and our load of `asleep`; partner: `sleep`
        if self.asleep.load(Ordering::Relaxed) {
            self.wake();
        }
    }

    /// Ends the thread's sleep in any case.
    pub(crate) fn wake(&self) {
        self.turn.bump();
    }

    fn sleep(&self, turn: u32) {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst); // between our store to `asleep` and our load of `any`; partner: `settling`
        if !self.any.load(Ordering::Relaxed) {
            self.turn.wait(turn, None);
        }
        self.asleep.store(false, Ordering::Relaxed);
    }
}

/// How long the thread goes on looking by itself.
const LINGER: Duration = Duration::from_millis(1);

pub(crate) fn run(inner: &Arc<Inner>) {
    loop {
        let turn = inner.owes.turn.value();
        if inner.stop.load(Ordering::SeqCst) {
            return;
        }
        if !inner.owes.any.swap(false, Ordering::Acquire) {
            inner.owes.sleep(turn);
            continue;
        }
        while let Some(target) = inner.settling.pop() {
            target.settled();
        }
        if let Some(hull) = inner.unsettled.take() {
            let mut all = Vec::new();
            inner.index.visit_overlapping(hull, |entry| all.push(Arc::<dyn crate::Target>::clone(entry.value)));
            all.into_iter().for_each(|target| target.settled());
        }
        inner.let_go_of_torn(); // also takes the events in, so that their queue stays short
        if inner.forgotten.load(Ordering::Relaxed) {
            inner.resync();
            if inner.forgotten.load(Ordering::Relaxed) {
                inner.owes.any.store(true, Ordering::Relaxed); // too much came in between: once more
            }
        }
        if inner.index.sweep() > 0 {
            inner.owes.any.store(true, Ordering::Relaxed); // somebody reads it still
        }
        inner.owes.turn.wait(turn, Some(Instant::now() + LINGER));
    }
}
