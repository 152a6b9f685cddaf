//! What a device holds for work that is under way.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::Outcome;

/// Work that ends when its last signal has come.
pub(crate) trait Retire: Send + Sync {
    /// One signal has come; true if it was the last. Lets mutators go, and neither allocates nor frees.
    fn signal_one(&self, outcome: Outcome) -> bool;
    /// All the rest, after the last signal.
    fn finish(&self);
}

/// One signal of one submit: whoever holds it owes the submit a word. Dropping it says that the work was lost.
pub struct Ticket {
    work: Arc<dyn Retire>,
    /// Written by the first `signal`.
    state: AtomicU8,
}

const OPEN: u8 = 0;
const SIGNALLED: u8 = 1;
const LAST: u8 = 2;

impl Ticket {
    pub(crate) fn new(work: Arc<dyn Retire>) -> Self {
        Self { work, state: AtomicU8::new(OPEN) }
    }

    /// The work is over: lets a waiting mutator go, and neither allocates nor frees. [`retire`](Self::retire) does the rest.
    ///
    /// A thread that finds several tickets over signals all of them before it retires the first: retiring frees, freeing may wait for the
    /// allocator's lock, and the mutator that has it may be waiting for one of the others. Only the first call counts.
    pub fn signal(&self, outcome: Outcome) {
        if self.state.compare_exchange(OPEN, SIGNALLED, Ordering::Relaxed, Ordering::Relaxed).is_ok()
            && self.work.signal_one(outcome)
        {
            self.state.store(LAST, Ordering::Relaxed); // read by drop, which has the ticket alone
        }
    }

    /// The work is over. Lets a waiting mutator go before it does anything that could allocate or free.
    pub fn retire(self, outcome: Outcome) {
        self.signal(outcome);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.signal(Outcome::Lost);
        if *self.state.get_mut() == LAST {
            self.work.finish();
        }
    }
}

impl std::fmt::Debug for Ticket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ticket")
    }
}
