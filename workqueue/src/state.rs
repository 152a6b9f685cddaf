//! What the pool's one lock guards: which work waits where, and the way it takes.
//!
//! ```text
//! submit ─┬─ timer ─┐
//!         └─────────┴─ inactive ── chain ── ready ── running ── released
//!                      max_active   key     worker
//! ```
//!
//! Work skips every stage it has no reason to wait in. A release at the right end admits the next of the same key and
//! the next of the same queue. Nothing in this file allocates, frees, wakes or calls out: what is to be done after the
//! lock is released is collected in [`Effects`].

use std::time::{Duration, Instant};

use crate::{
    Refused,
    crew::Crew,
    effects::Effects,
    job::{Account, Attributes, Hook, Job, Run},
    slab::{Body, NIL, On, Slab},
    sync::Ordering,
    table::Operation,
};

/// How far the pool has got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Open,
    /// The last handle is gone; only work that running work submits is still accepted.
    Closing,
    /// As `Closing`, but what is queued is cancelled, and nothing is accepted.
    Cancelling,
    /// Nothing is left; workers exit.
    Ended,
}

/// A named queue, or (number 0) what the pool itself is as a queue.
#[repr(align(64))]
pub(crate) struct QueueState {
    pub(crate) name: Box<str>,
    pub(crate) max_active: u32,
    /// Work beyond the inactive list that has not been released.
    pub(crate) active: u32,
    pub(crate) inactive: crate::list::List,
    /// Work admitted and not released: what a drain waits for.
    pub(crate) live: u64,
    /// Its work whose timer runs.
    pub(crate) timers: u64,
    /// Drains under way; while there are any, only the queue's own running work may add to it.
    pub(crate) draining: u32,
    /// Destroyed.
    pub(crate) closed: bool,
    /// Somebody can still name it; else, once it is empty, its number is free for another.
    pub(crate) handles: bool,
    pub(crate) concurrent: bool,
    pub(crate) account: Option<Account>,
}

/// The few words that every submission changes come first, next to the lock itself.
#[repr(C)]
pub(crate) struct State {
    /// Work admitted and not released, of all queues.
    pub(crate) live: u64,
    sequence: u64,
    pub(crate) slab: Slab,
    pub(crate) crew: Crew,
    pub(crate) queues: Vec<QueueState>,
    pub(crate) phase: Phase,
    /// The keeper is to return.
    pub(crate) keeper_over: bool,
    /// Threads that wait for a queue or the pool to be empty. While there are none, nobody is told: that is a system
    /// call, and between two jobs in quick succession the pool is empty each time.
    pub(crate) drainers: u32,
    tickets: u64,
}

impl State {
    pub(crate) fn new(crew: Crew, of_the_pool: QueueState) -> Self {
        let queues = vec![of_the_pool];
        Self {
            slab: Slab::new(),
            crew,
            queues,
            phase: Phase::Open,
            keeper_over: false,
            drainers: 0,
            live: 0,
            sequence: 0,
            tickets: 0,
        }
    }

    /// Whether `queue` takes new work. `inside` is the queue whose running work asks, if running work of this pool does.
    /// A pool that ends takes nothing with a delay, or it would have to wait for it.
    pub(crate) fn open(&self, queue: u32, inside: Option<u32>, delayed: bool) -> bool {
        let state = &self.queues[queue as usize];
        match self.phase {
            Phase::Open => inside == Some(queue) || (!state.closed && state.draining == 0),
            Phase::Closing => inside.is_some() && !delayed,
            Phase::Cancelling | Phase::Ended => false,
        }
    }

    /// Whether a job may be taken in; says why not.
    pub(crate) fn accept(
        &self,
        queue: u32,
        attributes: &Attributes,
        node: u32,
        delayed: bool,
        inside: Option<u32>,
    ) -> Result<(), Refused> {
        if !self.open(queue, inside, delayed) {
            return Err(Refused::Draining);
        }
        if attributes.account == Account::MaySleep && !delayed && self.crew.hopeless(node) {
            return Err(Refused::Limit);
        }
        Ok(())
    }

    /// A number that no queueing of an item had before.
    pub(crate) fn ticket(&mut self) -> u64 {
        self.tickets += 1;
        self.tickets
    }

    /// Takes a slot for a job; there is room.
    pub(crate) fn new_job(
        &mut self,
        queue: u32,
        node: u32,
        attributes: Attributes,
        run: Run,
        hook: Option<Hook>,
    ) -> u32 {
        let slot = self.new_slot(queue, node, attributes);
        self.slab[slot].body = Body::Once(run);
        self.slab[slot].set_hook(hook);
        slot
    }

    /// Takes a slot and writes down how its queue wants it treated.
    pub(crate) fn new_slot(&mut self, queue: u32, node: u32, mut attributes: Attributes) -> u32 {
        let rules = &self.queues[queue as usize];
        attributes.concurrent |= rules.concurrent;
        attributes.account = rules.account.unwrap_or(attributes.account);
        let slot = self.slab.take();
        let entry = &mut self.slab[slot];
        entry.attributes = attributes;
        entry.queue = queue;
        entry.node = node;
        slot
    }

    /// Starts the timer of `slot` and sees to it that the keeper knows.
    pub(crate) fn delay(&mut self, slot: u32, due: Instant, fx: &mut Effects) {
        self.slab.start_timer(slot, due);
        self.queues[self.slab[slot].queue as usize].timers += 1;
        if self.slab.next_timer().is_some_and(|(_, first)| first == slot) {
            fx.keeper = true;
        }
    }

    /// Stops the timer of `slot`; false if it was not running.
    pub(crate) fn stop_timer(&mut self, slot: u32) -> bool {
        let stopped = self.slab.stop_timer(slot);
        self.queues[self.slab[slot].queue as usize].timers -= u64::from(stopped);
        stopped
    }

    /// Lets `slot` into its queue.
    pub(crate) fn admit(&mut self, slot: u32, fx: &mut Effects) {
        let Self { slab, queues, .. } = self;
        let queue = &mut queues[slab[slot].queue as usize];
        queue.live += 1;
        self.live += 1;
        let (node, account) = (slab[slot].node, slab[slot].attributes.account);
        self.crew.account_mut(node, account).counters.queued += 1;
        if queue.active >= queue.max_active {
            queue.inactive.push(slab, slot, On::Inactive);
        } else {
            queue.active += 1;
            self.activate(slot, fx);
        }
    }

    /// Its queue lets `slot` go on: to the chain of its key if that is busy, else to be ready.
    fn activate(&mut self, slot: u32, fx: &mut Effects) {
        if let Some(key) = self.slab[slot].attributes.key {
            if let Some(record) = self.slab.keys.find(key) {
                self.slab[slot].key = record;
                let mut waiting = self.slab.keys[record].waiting;
                waiting.push(&mut self.slab, slot, On::Chain);
                self.slab.keys[record].waiting = waiting;
                return;
            }
            let record = self.slab.keys.insert(key);
            self.slab[slot].key = record;
        }
        self.ready(slot, fx);
    }

    /// `slot` waits for nothing but a worker.
    pub(crate) fn ready(&mut self, slot: u32, fx: &mut Effects) {
        self.sequence += 1;
        let entry = &mut self.slab[slot];
        entry.sequence = self.sequence;
        entry.ready_since = fx.now();
        let (node, account, express) = (entry.node, entry.attributes.account, entry.attributes.concurrent);
        let account_state = self.crew.account_mut(node, account);
        if express {
            account_state.express.push(&mut self.slab, slot, On::Express);
        } else {
            account_state.ready.push(&mut self.slab, slot, On::Ready);
        }
        // Whoever spins, or is about to, is counted as searching since its last look under the lock.
        fx.arrived |= self.crew.account(node, account).searching > 0;
        self.crew.summon(node, account, fx);
    }

    /// Takes `slot` off whatever list it waits on. It is still admitted.
    pub(crate) fn unlink(&mut self, slot: u32) {
        let Self { slab, crew, queues, .. } = self;
        let entry = &slab[slot];
        let (node, account, queue, key) = (entry.node, entry.attributes.account, entry.queue as usize, entry.key);
        match entry.on {
            On::Nothing => {}
            On::Inactive => {
                queues[queue].inactive.remove(slab, slot);
                // It was never active: releasing it must not make room that isn't there.
                queues[queue].active += 1;
            }
            On::Chain => {
                let mut waiting = slab.keys[key].waiting;
                waiting.remove(slab, slot);
                slab.keys[key].waiting = waiting;
                // It never owned the key.
                slab[slot].key = NIL;
            }
            On::Ready => crew.account_mut(node, account).ready.remove(slab, slot),
            On::Express => crew.account_mut(node, account).express.remove(slab, slot),
        }
    }

    /// As [`admit`](Self::admit) for work that a worker takes at once; false if its queue has none to spare.
    pub(crate) fn admit_running(&mut self, slot: u32) -> bool {
        let Self { slab, queues, .. } = self;
        let queue = &mut queues[slab[slot].queue as usize];
        if queue.active >= queue.max_active {
            return false;
        }
        queue.active += 1;
        queue.live += 1;
        self.live += 1;
        let (node, account) = (slab[slot].node, slab[slot].attributes.account);
        self.crew.account_mut(node, account).counters.queued += 1;
        true
    }

    /// `slot`, on no list, has run or will not: lets on what waited for it. The slot itself stays in use.
    ///
    /// With `keep`, the next of the same key is not made ready but returned to the worker that asks.
    pub(crate) fn release(&mut self, slot: u32, keep: bool, fx: &mut Effects) -> Option<u32> {
        let mut kept = None;
        let record = std::mem::replace(&mut self.slab[slot].key, NIL);
        if record != NIL {
            let mut waiting = self.slab.keys[record].waiting;
            match waiting.pop(&mut self.slab) {
                Some(next) => {
                    self.slab.keys[record].waiting = waiting;
                    if keep {
                        kept = Some(next);
                    } else {
                        self.ready(next, fx);
                    }
                }
                None => self.slab.keys.remove(record),
            }
        }
        let number = self.slab[slot].queue;
        let queue = &mut self.queues[number as usize];
        queue.live -= 1;
        queue.active -= 1;
        self.live -= 1;
        if self.drainers > 0 && (queue.live == 0 || self.live == 0) {
            fx.drained = true;
        }
        if queue.active < queue.max_active
            && let Some(next) = queue.inactive.pop(&mut self.slab)
        {
            queue.active += 1;
            self.activate(next, fx);
        }
        kept
    }

    /// The timer of `slot` has run out and is stopped.
    pub(crate) fn fired(&mut self, slot: u32, fx: &mut Effects) {
        if self.slab[slot].is_item {
            self.transit(slot, Operation::TimerFires, None, fx);
        } else {
            self.admit(slot, fx);
        }
    }

    /// Takes what is pending in `slot` out of everything. A job gives up its slot and is handed back to be called as
    /// cancelled; an item is only cancelled.
    pub(crate) fn withdraw(&mut self, slot: u32, fx: &mut Effects) -> Option<Job> {
        if self.slab[slot].is_item {
            self.transit(slot, Operation::Cancel, None, fx);
            return None;
        }
        if !self.stop_timer(slot) {
            self.unlink(slot);
            self.release(slot, false, fx);
        }
        let entry = &mut self.slab[slot];
        let (node, attributes, hook) = (entry.node, entry.attributes, entry.take_hook());
        let Body::Once(run) = std::mem::replace(&mut entry.body, Body::Empty) else {
            unreachable!("a pending job has a function");
        };
        self.crew.account_mut(node, attributes.account).counters.cancelled += 1;
        self.slab.free(slot);
        Some(Job { run, hook, attributes, delay: Duration::ZERO })
    }

    /// Tells the run of `slot` to stop, unless it is not to be disturbed; gives the hook to call after the lock.
    pub(crate) fn tell(&mut self, slot: u32) -> Option<Hook> {
        let entry = &self.slab[slot];
        if entry.attributes.no_cancel {
            return None;
        }
        // Release: pairs with the Acquire in `Context::cancelled`.
        self.crew.workers[entry.worker as usize].worker.told.store(true, Ordering::Release);
        entry.hook()
    }
}
