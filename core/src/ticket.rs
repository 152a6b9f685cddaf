//! The stub that a device holds for work that is under way.
use crate::Outcome;

/// One signal of one submit: whoever holds it owes the submit a word.
#[derive(Debug)]
pub struct Ticket(());

impl Ticket {
    /// The work is over.
    pub fn retire(self, outcome: Outcome) {
        let _ = outcome;
    }
}
