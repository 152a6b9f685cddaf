//! Saying that a function is about to sleep.

use crate::{effects::Effects, worker};

/// Runs `f`, which may sleep, and lets another worker take over what is queued meanwhile.
///
/// It may be nested, and anywhere but on a worker it only calls `f`. Work that sleeps without it is found by the
/// watchdog, later and only while something waits.
pub fn blocking<R>(f: impl FnOnce() -> R) -> R {
    let _guard = Guard::enter();
    f()
}

/// Counts the worker as not running for as long as it lives, also through a panic.
struct Guard(Option<worker::Current>);

impl Guard {
    fn enter() -> Self {
        let guard = Self(worker::current());
        guard.shift(true);
        guard
    }

    fn shift(&self, deeper: bool) {
        let Some(worker::Current { shared, number, .. }) = &self.0 else { return };
        let mut fx = Effects::default();
        let mut state = shared.lock();
        state.crew.change(*number, |me| me.blocked = if deeper { me.blocked + 1 } else { me.blocked - 1 });
        if deeper {
            let (node, account) =
                (state.crew.workers[*number as usize].node, state.crew.workers[*number as usize].account);
            state.crew.summon(node, account, &mut fx);
        }
        drop(state);
        shared.apply(fx);
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.shift(false);
    }
}
