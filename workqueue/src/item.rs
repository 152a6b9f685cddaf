//! Work items: functions that are queued again and again, with Linux's rules for what that means while they run.
//!
//! Problem: "queue it", "queue it later", "take it back" and "wait until it is done" may all come at once, and from the
//! function itself.
//!
//! Law: one run per accepted queueing, never two at a time; after a cancel that waits has returned, the function does
//! not run until somebody queues it again.
//!
//! Protocol: an item has one slot for life, so queueing allocates nothing. Its state moves by the
//! [`table`](crate::table). While a
//! waiting cancel is under way, counted in `cancelling`, nothing is accepted, so that an item that queues itself can be
//! stopped. A queueing is known by a ticket, the slot has one for what is pending and one for what runs, and flush
//! waits until neither is the one it saw: the run may be done or cancelled, later ones don't matter.

use std::{
    fmt, process,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    Error,
    blocking::blocking,
    effects::Effects,
    job::Context,
    shared::Shared,
    slab::NIL,
    state::{Phase, State},
    sync::{self, Mutex},
    table::{Operation, Word},
    worker,
};

/// The part of an item's state that its slot holds, guarded by the pool's lock.
#[derive(Debug, Default)]
pub(crate) struct ItemState {
    pub(crate) word: Word,
    /// Waiting cancels under way.
    pub(crate) cancelling: u32,
    /// The queueing that is pending, 0 if none.
    pub(crate) pending: u64,
    /// The queueing whose run goes on, 0 if none.
    pub(crate) running: u64,
    /// Threads that wait for one of these to change.
    pub(crate) waiters: u32,
}

type Function = Box<dyn FnMut(&Context<'_>) + Send>;

pub(crate) struct Item {
    shared: Arc<Shared>,
    slot: u32,
    queue: u32,
    /// Held by the worker that runs it. Never contended, as an item never runs twice at a time.
    function: Mutex<Function>,
}

impl Item {
    pub(crate) fn call(&self, context: &Context<'_>) {
        let mut function = sync::lock(&self.function);
        function(context);
    }

    #[cfg(test)]
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    #[cfg(test)]
    pub(crate) fn slot(&self) -> u32 {
        self.slot
    }
}

impl Drop for Item {
    fn drop(&mut self) {
        // What is pending or running holds the item, so its slot is at rest. In a forked child the lock may be held by
        // nobody.
        if self.shared.config.process == process::id() {
            self.shared.lock().slab.free(self.slot);
        }
    }
}

/// A function that can be queued again and again. Cloning gives another handle to the same item.
///
/// One item never runs on two workers at once, and queued again while running means exactly one more run, however often
/// it was asked for. The function may queue its own item, drop the last outside handle to it, and ask for itself by
/// [`Work::current`].
#[derive(Clone)]
pub struct Work {
    item: Arc<Item>,
}

impl Work {
    pub(crate) fn new(shared: &Arc<Shared>, queue: u32, function: Function) -> Self {
        let mut state = shared.with_room();
        let slot = state.new_item(queue);
        drop(state);
        let item = Item { shared: Arc::clone(shared), slot, queue, function: Mutex::new(function) };
        Self { item: Arc::new(item) }
    }

    #[cfg(test)]
    pub(crate) fn item(&self) -> &Item {
        &self.item
    }

    /// The item whose function the calling thread is in.
    #[doc(alias = "current_work")]
    #[must_use]
    pub fn current() -> Option<Self> {
        worker::current().and_then(|current| current.item).map(|item| Self { item })
    }

    /// Queues the item; false if it was pending already, or a cancel that waits is under way. Allocates nothing, and
    /// starts no thread on a pool whose submitters never do.
    ///
    /// # Errors
    /// [`Error::Draining`] or [`Error::Ended`] when its queue takes no more.
    pub fn queue(&self) -> Result<bool, Error> {
        self.start(Operation::Queue, Duration::ZERO)
    }

    /// Queues the item after `delay`; false if it was pending already, or a cancel that waits is under way.
    ///
    /// # Errors
    /// As [`queue`](Self::queue).
    pub fn queue_delayed(&self, delay: Duration) -> Result<bool, Error> {
        let operation = if delay.is_zero() { Operation::Queue } else { Operation::QueueDelayed };
        self.start(operation, delay)
    }

    /// Makes the item run `delay` from now, whether it is pending or not; true if it was.
    ///
    /// # Errors
    /// As [`queue`](Self::queue).
    pub fn modify_delayed(&self, delay: Duration) -> Result<bool, Error> {
        let operation = if delay.is_zero() { Operation::ModifyNow } else { Operation::ModifyDelayed };
        self.start(operation, delay)
    }

    fn start(&self, operation: Operation, delay: Duration) -> Result<bool, Error> {
        let Item { shared, slot, queue, .. } = &*self.item;
        let due = (!delay.is_zero()).then(|| sync::now() + delay);
        let node = shared.topology.here();
        let inside = worker::current_in(shared).map(|(_, queue, _)| queue);
        let mut fx = Effects::default();
        fx.item = Some(Arc::clone(&self.item));
        fx.now();
        let mut state = shared.lock();
        let item = &state.slab[*slot].item;
        if item.cancelling > 0 {
            return Ok(false);
        }
        let pending = matches!(item.word, Word::Timer | Word::Task);
        if !pending && !state.open(*queue, inside, due.is_some()) {
            return Err(if state.phase == Phase::Open { Error::Draining } else { Error::Ended });
        }
        if state.slab[*slot].worker == NIL && !pending {
            state.slab[*slot].node = node;
        }
        let answer = state.transit(*slot, operation, due, &mut fx);
        drop(state);
        shared.apply(fx);
        Ok(answer)
    }

    /// Takes the item back and waits until its function does not run; true if it was pending. A function that runs is
    /// told to stop. Meanwhile nobody can queue it; afterwards it runs only if queued again.
    ///
    /// # Errors
    /// [`Error::Deadlock`] from inside its own function.
    pub fn cancel_sync(&self) -> Result<bool, Error> {
        self.refuse_to_wait_for_myself()?;
        let Item { shared, slot, .. } = &*self.item;
        let mut fx = Effects::default();
        let mut state = shared.lock();
        state.slab[*slot].item.cancelling += 1;
        let answer = state.transit(*slot, Operation::CancelSync, None, &mut fx);
        let runs = state.slab[*slot].worker != NIL;
        if runs {
            state.tell(*slot);
        }
        drop(state);
        shared.apply(fx);
        if runs {
            self.wait(None, |state, slot| state.slab[slot].worker != NIL);
        }
        shared.lock().slab[*slot].item.cancelling -= 1;
        Ok(answer)
    }

    /// As [`cancel_sync`](Self::cancel_sync): timers and lists are the same to an item.
    ///
    /// # Errors
    /// [`Error::Deadlock`] from inside its own function.
    pub fn cancel_delayed_sync(&self) -> Result<bool, Error> {
        self.cancel_sync()
    }

    /// Takes back what is pending and never waits; true if something was. A run that goes on is not disturbed.
    #[must_use = "false means that it was not pending, and may be running"]
    pub fn cancel_delayed(&self) -> bool {
        let Item { shared, slot, .. } = &*self.item;
        let mut fx = Effects::default();
        let answer = shared.lock().transit(*slot, Operation::Cancel, None, &mut fx);
        shared.apply(fx);
        answer
    }

    /// Waits until the run that is pending or going on at the call is done or cancelled; false if there is none.
    ///
    /// # Errors
    /// [`Error::Deadlock`] from inside its own function.
    pub fn flush(&self) -> Result<bool, Error> {
        self.flush_as(Operation::Flush, None)
    }

    /// As [`flush`](Self::flush), but cuts a running timer short.
    ///
    /// # Errors
    /// [`Error::Deadlock`] from inside its own function.
    pub fn flush_delayed(&self) -> Result<bool, Error> {
        self.flush_as(Operation::FlushDelayed, None)
    }

    /// As [`flush`](Self::flush), but no longer than `limit`.
    ///
    /// # Errors
    /// [`Error::TimedOut`] when the time is up, [`Error::Deadlock`] from inside its own function.
    pub fn flush_timeout(&self, limit: Duration) -> Result<bool, Error> {
        self.flush_as(Operation::Flush, Some(limit))
    }

    fn flush_as(&self, operation: Operation, limit: Option<Duration>) -> Result<bool, Error> {
        self.refuse_to_wait_for_myself()?;
        let Item { shared, slot, .. } = &*self.item;
        let mut fx = Effects::default();
        let mut state = shared.lock();
        let answer = state.transit(*slot, operation, None, &mut fx);
        let ItemState { pending, running, .. } = state.slab[*slot].item;
        drop(state);
        shared.apply(fx);
        let seen = if pending != 0 { pending } else { running };
        if seen == 0 {
            return Ok(answer);
        }
        let deadline = limit.map(|limit| sync::now() + limit);
        let in_time = self.wait(deadline, |state, slot| {
            let item = &state.slab[slot].item;
            item.pending == seen || item.running == seen
        });
        if in_time { Ok(answer) } else { Err(Error::TimedOut) }
    }

    /// Whether it is queued or its timer runs.
    #[must_use]
    pub fn pending(&self) -> bool {
        let state = self.item.shared.lock();
        matches!(state.slab[self.item.slot].item.word, Word::Timer | Word::Task)
    }

    /// Whether it is pending or running.
    #[must_use]
    pub fn busy(&self) -> bool {
        let state = self.item.shared.lock();
        let entry = &state.slab[self.item.slot];
        entry.worker != NIL || matches!(entry.item.word, Word::Timer | Word::Task)
    }

    fn refuse_to_wait_for_myself(&self) -> Result<(), Error> {
        match worker::current_in(&self.item.shared) {
            Some((_, _, slot)) if slot == self.item.slot => Err(Error::Deadlock),
            _ => Ok(()),
        }
    }

    /// Waits while `unsettled`; says whether that ended in time. On a worker it counts as blocking.
    fn wait(&self, deadline: Option<Instant>, unsettled: impl Fn(&State, u32) -> bool) -> bool {
        let Item { shared, slot, .. } = &*self.item;
        let settled = shared.settled(*slot);
        blocking(|| {
            let mut state = shared.lock();
            let mut in_time = true;
            state.slab[*slot].item.waiters += 1;
            while in_time && unsettled(&state, *slot) {
                state = match deadline.map(|deadline| deadline.saturating_duration_since(sync::now())) {
                    None => settled.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner),
                    Some(Duration::ZERO) => {
                        in_time = false;
                        state
                    }
                    Some(left) => {
                        settled.wait_timeout(state, left).unwrap_or_else(std::sync::PoisonError::into_inner).0
                    }
                };
            }
            state.slab[*slot].item.waiters -= 1;
            in_time
        })
    }
}

impl fmt::Debug for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.item.shared.lock();
        let entry = &state.slab[self.item.slot];
        let running = entry.worker != NIL;
        f.debug_struct("Work").field("state", &entry.item.word).field("running", &running).finish_non_exhaustive()
    }
}
