//! What a device holds for work that is under way.

use std::sync::Arc;

use crate::Outcome;

/// Work that ends when its last signal has come.
pub(crate) trait Retire: Send + Sync {
    fn retire_one(&self, outcome: Outcome);
}

/// One signal of one submit: whoever holds it owes the submit a word. Dropping it says that the work was lost.
pub struct Ticket {
    work: Option<Arc<dyn Retire>>,
}

impl Ticket {
    pub(crate) fn new(work: Arc<dyn Retire>) -> Self {
        Self { work: Some(work) }
    }

    /// The work is over. Lets a waiting mutator go before it does anything that could allocate or free.
    pub fn retire(mut self, outcome: Outcome) {
        if let Some(work) = self.work.take() {
            work.retire_one(outcome);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(work) = self.work.take() {
            work.retire_one(Outcome::Lost);
        }
    }
}

impl std::fmt::Debug for Ticket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ticket")
    }
}
