//! How a pool ends.
//!
//! Law: nobody waits for itself, nothing is dropped unheard, and when the last handle has been dropped no thread is
//! left, except, if one of the pool's own workers dropped it, that worker, on its way out.

use std::{process, sync::Arc};

use crate::{
    blocking::blocking,
    effects::Effects,
    entry::Doing,
    pool::until_settled,
    shared::{Shared, call_cancelled},
    state::Phase,
    sync, worker,
};

/// The last handle has been dropped on the calling thread.
pub(crate) fn last_handle_gone(shared: &Arc<Shared>) {
    if shared.config.process != process::id() {
        // A forked child: the lock may be held by a thread that doesn't exist here, and the join handles name nobody.
        std::mem::forget(Arc::clone(shared));
        return;
    }
    if let Some((number, ..)) = worker::current_in(shared) {
        let mut state = shared.lock();
        state.phase = if shared.config.cancel_at_end { Phase::Cancelling } else { Phase::Closing };
        state.crew.workers[number as usize].must_end = true;
        return;
    }
    finish(shared, None);
}

/// Ends the pool. `me` is the worker that does it, whose own work is done; else it is a thread from outside.
pub(crate) fn finish(shared: &Arc<Shared>, me: Option<u32>) {
    shared.lock().phase = if shared.config.cancel_at_end { Phase::Cancelling } else { Phase::Closing };
    cancel_pending(shared, |state, slot| state.slab[slot].timer != crate::slab::NIL);
    if shared.config.cancel_at_end {
        cancel_pending(shared, |_, _| true);
    }
    // A worker that waits here keeps nobody else from a processor.
    blocking(|| shared.wait_until_drained(shared.lock(), |state| state.live > 0).phase = Phase::Ended);
    until_settled(shared, |fx| shared.lock().crew.wake_idle(fx));
    join_workers(shared, me);
    shared.lock().keeper_over = true;
    shared.keeper.wake();
    let keeper = sync::lock(&shared.keeper_join).take();
    let _ = keeper.map(sync::JoinHandle::join);
    // The keeper may have started one more before it saw the end.
    join_workers(shared, me);
}

/// Calls as cancelled all pending jobs that `which` picks, and drops pending items.
pub(crate) fn cancel_pending(shared: &Arc<Shared>, mut which: impl FnMut(&crate::state::State, u32) -> bool) {
    let mut from = 0;
    let mut found = false;
    loop {
        let mut fx = Effects::default();
        let mut state = shared.lock();
        let end = state.slab.capacity();
        let next = (from..end).find(|&slot| state.slab[slot].is_pending() && which(&state, slot));
        let Some(slot) = next else {
            if !std::mem::take(&mut found) {
                return;
            }
            // What ran meanwhile may have queued more, in slots that were passed already.
            from = 0;
            continue;
        };
        (from, found) = (slot + 1, true);
        let job = state.withdraw(slot, &mut fx);
        drop(state);
        shared.apply(fx);
        job.into_iter().for_each(|job| call_cancelled(shared, job));
    }
}

fn join_workers(shared: &Arc<Shared>, me: Option<u32>) {
    loop {
        let mut state = shared.wait_until_drained(shared.lock(), |state| state.crew.spawning > 0);
        let mut others = (0..).zip(&mut state.crew.workers);
        let Some(join) = others.find_map(|(number, worker)| worker.join.take_if(|_| Some(number) != me)) else {
            debug_assert!((0..).zip(&state.crew.workers).all(|(n, w)| Some(n) == me || w.doing == Doing::Gone));
            return;
        };
        drop(state);
        let _ = join.join();
    }
}
