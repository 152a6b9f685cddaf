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

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::space::{Inner, Shards, Space};

impl Space {
    /// Waits until no mutation of memory in these shards is in flight. Returns false when the deadline has passed first.
    ///
    /// The probe clears after the shard's gate has opened, and nobody is told when: so it is asked again after 50 µs, doubling to 3.2 ms.
    #[must_use]
    pub fn wait_settled(&self, shards: Shards, deadline: Instant) -> bool {
        let mut pause = Duration::from_micros(50);
        while self.is_busy(shards) {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_micros(3200));
        }
        true
    }
}

pub(crate) fn run(inner: &Arc<Inner>) {
    loop {
        let turn = inner.settle_turn.value();
        if inner.stop.load(Ordering::SeqCst) {
            return;
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
        }
        inner.index.sweep();
        inner.settle_turn.wait(turn, None);
    }
}
