//! An import that has taken its pages and is kept waiting: the moment in which a mutation must not be lost.

use std::sync::{Condvar, Mutex, MutexGuard};

use crate::PATIENCE;

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum State {
    #[default]
    Open,
    Armed,
    Holding,
}

/// Holds one import, if it is told to.
#[derive(Debug, Default)]
pub(super) struct Hold {
    state: Mutex<State>,
    changed: Condvar,
}

impl Hold {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics under this lock")
    }

    pub(super) fn arm(&self) {
        *self.state() = State::Armed;
    }

    /// Where the import waits.
    pub(super) fn pass(&self) {
        let mut state = self.state();
        if *state != State::Armed {
            return;
        }
        *state = State::Holding;
        self.changed.notify_all();
        drop(self.changed.wait_while(state, |state| *state == State::Holding).expect("nothing panics under this lock"));
    }

    pub(super) fn wait_held(&self) {
        let waited = self.changed.wait_timeout_while(self.state(), PATIENCE, |state| *state != State::Holding);
        let (state, _) = waited.expect("nothing panics under this lock");
        let held = *state == State::Holding;
        drop(state);
        assert!(held, "no import is held");
    }

    pub(super) fn let_go(&self) {
        *self.state() = State::Open;
        self.changed.notify_all();
    }
}
