//! The pool's one thread of its own: it fires timers, notices workers that block without saying so, and asks again for
//! threads that the system refused.
//!
//! It sleeps until the next of these is due. The watchdog costs nothing while no work waits: a submitter that finds
//! every running worker busy starts it, and it stops when nothing waits any more. It suspects something only if work
//! waited and not one function returned for [`TICK`]. Then it asks the kernel which of the running workers sleep, takes
//! those out of the count, and [`summon`](crate::crew::Crew::summon) finds or makes a worker for what waits. A worker
//! that computes for long is never mistaken for one that sleeps. If the new worker blocks as well, the next look comes
//! after twice the time: work that all blocks grows the pool by ever slower steps.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    effects::Effects,
    entry::Doing,
    job::Account,
    shared::Shared,
    state::State,
    sync::{self, Ordering},
    sys::{self, Priority},
};

/// How long nothing may finish while work waits.
const TICK: Duration = Duration::from_micros(200);
/// The longest that the steps of growth become.
const SLOWEST: Duration = Duration::from_millis(50);
/// Workers asked about in one look.
const LOOK: usize = 32;

/// What the watchdog remembers from one look to the next. Only the keeper has it.
struct Watch {
    /// Functions that had returned at the last look.
    finished: u64,
    next: Option<Instant>,
    pause: Duration,
}

/// The body of the keeper thread.
pub(crate) fn run(shared: &Arc<Shared>) {
    shared.keeper.settle();
    if shared.config.priority != Priority::Normal {
        // Its timers are as urgent as what they start.
        let _ = sys::raise_priority(shared.config.priority);
    }
    let mut watch = Watch { finished: 0, next: None, pause: TICK };
    loop {
        for (node, accounts) in (0..).zip(&shared.wanted) {
            for account in Account::BOTH {
                // Acquire: pairs with the Release of who asks for a worker.
                for _ in 0..accounts[account as usize].swap(0, Ordering::Acquire) {
                    shared.start_worker(node, account);
                }
            }
        }
        let mut fx = Effects::default();
        let mut state = shared.lock();
        if state.keeper_over {
            return;
        }
        let now = sync::now();
        fire(&mut state, now, &mut fx);
        let looked = watch.look(&mut state, now);
        let retry = summon_all(&mut state, now, &mut fx);
        let timer = state.slab.next_timer().map(|(due, _)| due);
        drop(state);
        let more = fx.is_full() || fx.keeper;
        fx.keeper = false;
        apply(shared, fx);
        if let Some(suspects) = looked {
            watch.act(shared, &suspects);
        }
        let until = [timer, retry, watch.next].into_iter().flatten().min();
        if !more {
            shared.keeper.sleep(until);
        }
    }
}

/// As `Shared::apply`, but it is the keeper that starts what is to be started.
fn apply(shared: &Arc<Shared>, mut fx: Effects) {
    let spawn = std::mem::take(&mut fx.spawn);
    shared.apply(fx);
    for (node, account) in spawn.into_iter().flatten() {
        shared.start_worker(node, account);
    }
}

/// Queues what is due, as much as the effects have room for.
fn fire(state: &mut State, now: Instant, fx: &mut Effects) {
    while let Some((due, slot)) = state.slab.next_timer() {
        if due > now {
            return;
        }
        if fx.is_full() {
            fx.keeper = true;
            return;
        }
        state.stop_timer(slot);
        state.fired(slot, fx);
    }
}

/// Summons for every account, and says when to come back for a thread that was refused.
fn summon_all(state: &mut State, now: Instant, fx: &mut Effects) -> Option<Instant> {
    let mut next: Option<Instant> = None;
    for node in 0..state.crew.nodes.len() as u32 {
        for account in Account::BOTH {
            let entry = state.crew.account_mut(node, account);
            entry.retry = entry.retry.filter(|&retry| retry > now);
            if let Some(retry) = entry.retry.filter(|_| entry.waiting() > 0) {
                next = Some(next.map_or(retry, |next| next.min(retry)));
            }
            state.crew.summon(node, account, fx);
        }
    }
    next
}

/// Running workers that may be asleep: number, run and thread.
type Suspects = [Option<(u32, u64, i32)>; LOOK];

impl Watch {
    /// Decides when to look next, and whom to ask the kernel about.
    fn look(&mut self, state: &mut State, now: Instant) -> Option<Suspects> {
        let accounts = || state.crew.nodes.iter().flat_map(|node| &node.accounts);
        if !state.crew.watching {
            return None;
        }
        if accounts().all(|account| account.waiting() == 0) {
            state.crew.watching = false;
            self.next = None;
            return None;
        }
        let finished = accounts().map(|account| account.counters.finished).sum();
        match self.next {
            Some(next) if next > now => return None,
            Some(_) if finished == self.finished => {}
            _ => {
                self.finished = finished;
                self.pause = TICK;
                self.next = Some(now + TICK);
                return None;
            }
        }
        let mut suspects = [None; LOOK];
        let running = (0..).zip(&state.crew.workers).filter_map(|(number, worker)| {
            let asked = matches!(worker.doing, Doing::Running(_)) && worker.counts();
            asked.then_some((number, worker.runs, worker.tid?))
        });
        for (place, suspect) in suspects.iter_mut().zip(running) {
            *place = Some(suspect);
        }
        self.next = Some(now + self.pause);
        Some(suspects)
    }

    /// Takes the sleepers among `suspects` out of the count.
    fn act(&mut self, shared: &Arc<Shared>, suspects: &Suspects) {
        let mut found = false;
        for &(number, run, tid) in suspects.iter().flatten() {
            if !sys::sleeps(tid) {
                continue;
            }
            let mut fx = Effects::default();
            let mut state = shared.lock();
            let worker = &state.crew.workers[number as usize];
            if worker.runs == run && matches!(worker.doing, Doing::Running(_)) && worker.counts() {
                found = true;
                let (node, account) = (worker.node, worker.account);
                state.crew.change(number, |worker| worker.stalled = true);
                state.crew.account_mut(node, account).counters.stalls += 1;
                state.crew.summon(node, account, &mut fx);
            }
            drop(state);
            apply(shared, fx);
        }
        if found {
            self.pause = (self.pause * 2).min(SLOWEST);
            self.next = Some(sync::now() + self.pause);
        }
    }
}
