//! What is done to a pool from outside besides submitting: cancelling by predicate, limits, queues, drains, the dump.

use std::{fmt, sync::Arc};

use crate::{
    Error, JobInfo,
    blocking::blocking,
    effects::Effects,
    entry::Doing,
    job::{Account, Cancelled},
    pool::until_settled,
    shared::{Shared, call_cancelled},
    state::{QueueState, State},
    sync::Ordering,
    worker,
};

fn info(state: &State, slot: u32, running: bool) -> JobInfo {
    let attributes = &state.slab[slot].attributes;
    JobInfo { key: attributes.key, tag: attributes.tag, account: attributes.account, running }
}

impl Shared {
    pub(crate) fn cancel_matching(
        self: &Arc<Self>,
        mut predicate: impl FnMut(&JobInfo) -> bool,
        all: bool,
    ) -> Cancelled {
        let mut result = Cancelled::NotFound;
        let mut from = 0;
        loop {
            let mut fx = Effects::default();
            let mut state = self.lock();
            let end = state.slab.capacity();
            let found =
                (from..end).find(|&slot| state.slab[slot].is_pending_job() && predicate(&info(&state, slot, false)));
            let Some(slot) = found else { break };
            from = slot + 1;
            let job = state.withdraw(slot, &mut fx);
            drop(state);
            self.apply(fx);
            job.into_iter().for_each(|job| call_cancelled(self, job));
            result = Cancelled::Ok;
            if !all {
                return result;
            }
        }
        for number in 0.. {
            let mut state = self.lock();
            let Some(worker) = state.crew.workers.get(number) else { break };
            let Doing::Running(slot) = worker.doing else { continue };
            if !state.slab[slot].is_running_job() || !predicate(&info(&state, slot, true)) {
                continue;
            }
            let hook = state.tell(slot);
            drop(state);
            if let Some(hook) = hook {
                hook();
            }
            result = Cancelled::Running;
            if !all {
                break;
            }
        }
        result
    }

    pub(crate) fn cancel_everything(self: &Arc<Self>) {
        // Release: pairs with the Acquire in `Context::cancelled`. Runs that start later see it because they start
        // under the lock that is taken below.
        self.cancel_all.store(true, Ordering::Release);
        for number in 0.. {
            let mut state = self.lock();
            let Some(worker) = state.crew.workers.get(number) else { break };
            let Doing::Running(slot) = worker.doing else { continue };
            let hook = state.tell(slot);
            drop(state);
            if let Some(hook) = hook {
                hook();
            }
        }
    }

    pub(crate) fn set_max(self: &Arc<Self>, account: Account, max: u32) {
        until_settled(self, |fx| {
            let mut state = self.lock();
            for node in 0..state.crew.nodes.len() as u32 {
                state.crew.account_mut(node, account).max = max;
                state.crew.summon(node, account, fx);
            }
            fx.any()
        });
    }

    /// Gives a queue a number. The table grows under the lock, but only here, where no work is moved.
    pub(crate) fn add_queue(&self, queue: QueueState) -> u32 {
        let mut larger: Vec<QueueState> = Vec::new();
        loop {
            let mut state = self.lock();
            let free = state.queues.iter().position(|queue| !queue.handles && queue.live == 0 && queue.timers == 0);
            if let Some(number) = free {
                let old = std::mem::replace(&mut state.queues[number], queue);
                drop(state);
                drop(old);
                return number as u32;
            }
            if state.queues.len() < state.queues.capacity() {
                state.queues.push(queue);
                return state.queues.len() as u32 - 1;
            }
            if larger.capacity() > state.queues.len() {
                larger.append(&mut state.queues);
                std::mem::swap(&mut state.queues, &mut larger);
                drop(state);
                larger = Vec::new();
            } else {
                let wanted = 2 * state.queues.len() + 4;
                drop(state);
                larger = Vec::with_capacity(wanted);
            }
        }
    }

    pub(crate) fn drain(self: &Arc<Self>, number: u32) -> Result<(), Error> {
        if worker::current_in(self).is_some_and(|(_, queue, _)| queue == number) {
            return Err(Error::Deadlock);
        }
        blocking(|| {
            let mut state = self.lock();
            state.queues[number as usize].draining += 1;
            state = self.wait_until_drained(state, |state| state.queues[number as usize].live > 0);
            state.queues[number as usize].draining -= 1;
        });
        Ok(())
    }

    /// What every worker does, and what waits.
    pub(crate) fn dump(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        let mut pool = f.debug_struct("Pool");
        pool.field("name", &self.config.name).field("phase", &state.phase).field("live", &state.live);
        for (number, node) in state.crew.nodes.iter().enumerate() {
            for account in Account::BOTH {
                let entry = &node.accounts[account as usize];
                let text = format_args!(
                    "{} of {} workers, {} running, {} searching, {} waiting; {:?}",
                    entry.workers,
                    entry.max,
                    entry.running + entry.express_running,
                    entry.searching,
                    entry.waiting(),
                    entry.counters
                );
                pool.field(&format!("node {number} {account:?}"), &text);
            }
        }
        for (number, worker) in state.crew.workers.iter().enumerate() {
            let name = format!("worker {number}");
            let tid = worker.tid.unwrap_or(0);
            match worker.doing {
                Doing::Running(slot) => {
                    let attributes = &state.slab[slot].attributes;
                    let queue = &state.queues[state.slab[slot].queue as usize].name;
                    let since = worker.since.map(|since| since.elapsed());
                    let how = if worker.blocked > 0 || worker.stalled { "blocked" } else { "running" };
                    pool.field(
                        &name,
                        &format_args!("tid {tid} {how} {queue} {attributes:?} for {:?}", since.unwrap_or_default()),
                    );
                }
                Doing::Gone => {}
                doing => {
                    pool.field(&name, &format_args!("tid {tid} {doing:?}"));
                }
            }
        }
        pool.finish()
    }
}
