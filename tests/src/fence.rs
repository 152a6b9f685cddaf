//! The completion handle of the devices of this crate: made before the work, signalled once, seen by whoever waits.

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use pinfold_core::{Outcome, Ticket};

/// Says when a piece of work is over. Clones are the same fence.
#[derive(Debug, Clone, Default)]
pub struct Fence(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    state: Mutex<State>,
    over: Condvar,
}

#[derive(Debug, Default)]
struct State {
    outcome: Option<Outcome>,
    tickets: Vec<Ticket>,
}

impl Fence {
    /// A fence whose work is not over.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The work is over: wakes who waits and retires the tickets. Only the first call counts. Allocates nothing before the last retire.
    pub fn signal(&self, outcome: Outcome) {
        let mut state = self.0.state.lock().expect("a fence's holder doesn't panic");
        if state.outcome.is_some() {
            return;
        }
        state.outcome = Some(outcome);
        let tickets = std::mem::take(&mut state.tickets);
        drop(state);
        self.0.over.notify_all();
        for ticket in tickets {
            ticket.retire(outcome);
        }
    }

    /// Retires the ticket when the work is over; at once if it is.
    pub fn attach(&self, ticket: Ticket) {
        let mut state = self.0.state.lock().expect("a fence's holder doesn't panic");
        let Some(outcome) = state.outcome else {
            state.tickets.push(ticket);
            return;
        };
        drop(state);
        ticket.retire(outcome);
    }

    /// How the work ended, if it has.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        self.0.state.lock().expect("a fence's holder doesn't panic").outcome
    }

    /// Waits for the end of the work; `None` if `limit` passes first.
    #[must_use]
    pub fn wait(&self, limit: Duration) -> Option<Outcome> {
        let state = self.0.state.lock().expect("a fence's holder doesn't panic");
        let (state, _) = self
            .0
            .over
            .wait_timeout_while(state, limit, |state| state.outcome.is_none())
            .expect("a fence's holder doesn't panic");
        state.outcome
    }
}

/// The fences a device was told to follow, so that it can give up on those whose work will never come.
#[derive(Debug, Default)]
pub(crate) struct Followed(Mutex<Vec<Fence>>);

impl Followed {
    /// Retires the ticket when the fence is signalled.
    pub(crate) fn follow(&self, fence: Fence, ticket: Ticket) {
        fence.attach(ticket);
        let mut fences = self.0.lock().expect("nothing panics under this lock");
        fences.retain(|fence| fence.outcome().is_none());
        fences.push(fence);
    }

    /// Signals every fence that has not been. To be called when no work runs any more.
    pub(crate) fn give_up(&self) {
        let fences = std::mem::take(&mut *self.0.lock().expect("nothing panics under this lock"));
        fences.iter().for_each(|fence| fence.signal(Outcome::Lost));
    }
}
