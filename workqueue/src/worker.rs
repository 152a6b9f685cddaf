//! A worker's life: look, run, look again; spin a little, sleep, and after a while go.

use std::{
    any::Any,
    cell::RefCell,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use crate::{
    effects::Effects,
    end,
    entry::{Doing, Worker},
    item::Item,
    job::{Account, Context, Job},
    shared::{Shared, call_cancelled},
    slab::{Body, NIL},
    state::{Phase, State},
    sync::{self, MutexGuard, Ordering},
    table::Operation,
};

/// Work of one key, or one line of follow-ups, that a worker runs before it looks at what else waits.
const STREAK: u8 = 16;

/// Which worker the current thread is.
#[derive(Clone)]
pub(crate) struct Current {
    pub(crate) shared: Arc<Shared>,
    pub(crate) number: u32,
    /// The queue whose work it runs.
    pub(crate) queue: u32,
    pub(crate) slot: u32,
    pub(crate) item: Option<Arc<Item>>,
}

sync::thread_local! {
    // Loom's macro knows no `const` blocks.
    #[allow(clippy::missing_const_for_thread_local)]
    static CURRENT: RefCell<Option<Current>> = RefCell::new(None);
}

/// The worker that the calling thread is, if it is one.
pub(crate) fn current() -> Option<Current> {
    CURRENT.with(|current| current.borrow().clone())
}

/// The calling worker's number and what it runs, if it belongs to `shared`.
pub(crate) fn current_in(shared: &Arc<Shared>) -> Option<(u32, u32, u32)> {
    CURRENT.with(|current| {
        let current = current.borrow();
        let current = current.as_ref().filter(|current| Arc::ptr_eq(&current.shared, shared))?;
        Some((current.number, current.queue, current.slot))
    })
}

/// What a worker does after it has let go of the lock.
enum Next {
    Run(Taken),
    /// Until there are more arrivals than this.
    Spin(u64),
    Sleep(Option<Duration>),
    Exit,
    EndPool,
}

/// Work that has been taken off every list and marked as running.
struct Taken {
    slot: u32,
    queue: u32,
    body: Body,
    no_cancel: bool,
}

/// The body of every worker thread.
pub(crate) fn run(shared: &Arc<Shared>, number: u32, worker: &Arc<Worker>) {
    worker.parker.settle();
    let mut state = shared.lock();
    let node = {
        let me = &mut state.crew.workers[number as usize];
        me.tid = crate::sys::thread_id();
        me.node
    };
    drop(state);
    shared.settle_in(node);
    enter(Some(Current { shared: Arc::clone(shared), number, queue: 0, slot: NIL, item: None }));
    let mut fx = Effects::default();
    state = shared.lock();
    let mut next = choose(&mut state, shared, number, &mut fx);
    loop {
        drop(state);
        shared.carry_out(&mut fx);
        (state, next) = match next {
            Next::Run(taken) => perform(shared, number, worker, taken, &mut fx),
            Next::Spin(before) => {
                spin(shared, before);
                look(shared, number, &mut fx)
            }
            Next::Sleep(limit) => {
                worker.parker.sleep(limit.map(|limit| sync::now() + limit));
                wake_up(shared, number, &mut fx)
            }
            Next::Exit => break,
            Next::EndPool => {
                end::finish(shared, Some(number));
                break;
            }
        };
    }
    enter(None);
}

/// Changes which worker this thread is; what it was is dropped outside the cell.
fn enter(current: Option<Current>) {
    drop(CURRENT.with(|cell| cell.replace(current)));
}

/// Writes down what this worker runs. Nothing is dropped while the cell is borrowed.
fn mark(queue: u32, slot: u32, item: Option<Arc<Item>>) {
    let before = CURRENT.with(|current| {
        let mut current = current.borrow_mut();
        let current = current.as_mut().expect("a worker thread knows who it is");
        (current.queue, current.slot) = (queue, slot);
        std::mem::replace(&mut current.item, item)
    });
    drop(before);
}

fn look<'a>(shared: &'a Shared, number: u32, fx: &mut Effects) -> (MutexGuard<'a, State>, Next) {
    fx.now();
    let mut state = shared.lock();
    let next = choose(&mut state, shared, number, fx);
    (state, next)
}

/// Chooses what `number` does next. It is counted as running, and holds the lock from its look to its sleep.
fn choose(state: &mut State, shared: &Shared, number: u32, fx: &mut Effects) -> Next {
    let searched = state.crew.stop_searching(number);
    let node = state.crew.workers[number as usize].node;
    let must_end = state.crew.workers[number as usize].must_end;
    // Who is to end the pool runs what is left first: it may be the only worker that there can be.
    if !(must_end && state.phase == Phase::Cancelling)
        && let Some(slot) = state.crew.pick(number, searched, &mut state.slab, fx)
    {
        return Next::Run(start(state, number, slot, fx));
    }
    if must_end {
        return Next::EndPool;
    }
    let crew = &mut state.crew;
    let me = &crew.workers[number as usize];
    let account = crew.account(node, me.account);
    let last = crew.is_last(number);
    if state.phase == Phase::Ended || (account.workers > account.max && !last) {
        crew.leave(number);
        return Next::Exit;
    }
    if !me.spun && !shared.config.spin.is_zero() && account.searching == 0 && account.running <= crew.processors(node) {
        crew.start_searching(number);
        // Relaxed: under the lock, so that whoever finds this worker searching counts its arrival after this.
        return Next::Spin(shared.arrivals.load(Ordering::Relaxed));
    }
    crew.enter_idle(number);
    for account in Account::BOTH {
        crew.summon(node, account, fx);
    }
    Next::Sleep((!last).then_some(shared.config.idle))
}

/// Marks `slot`, which is on no list, as run by `number`.
fn start(state: &mut State, number: u32, slot: u32, fx: &mut Effects) -> Taken {
    let node = state.crew.workers[number as usize].node;
    if state.slab[slot].is_item {
        state.transit(slot, Operation::Taken, None, fx);
    }
    let entry = &mut state.slab[slot];
    let attributes = entry.attributes;
    let waited = entry.ready_since.take();
    entry.worker = number;
    entry.node = node;
    let body = std::mem::replace(&mut entry.body, Body::Empty);
    let taken = Taken { slot, queue: entry.queue, body, no_cancel: attributes.no_cancel };
    let now = fx.now();
    state.crew.change(number, |me| {
        me.doing = Doing::Running(slot);
        me.spun = false;
        me.express = attributes.concurrent;
        me.runs += 1;
        me.since = now;
        // Relaxed: the lock orders it against whoever cancels this run, and only this thread reads it without.
        me.worker.told.store(false, Ordering::Relaxed);
    });
    let account = state.crew.account_mut(node, attributes.account);
    account.express_running += u32::from(attributes.concurrent);
    account.counters.started += 1;
    if let (Some(since), Some(now)) = (waited, now) {
        account.counters.longest_wait = account.counters.longest_wait.max(now.saturating_duration_since(since));
    }
    state.crew.summon(node, attributes.account, fx);
    taken
}

/// Calls the function, contains its panic, takes the lock again and says that it has returned.
fn perform<'a>(
    shared: &'a Arc<Shared>,
    number: u32,
    worker: &Arc<Worker>,
    taken: Taken,
    fx: &mut Effects,
) -> (MutexGuard<'a, State>, Next) {
    let Taken { slot, queue, body, no_cancel } = taken;
    let item = if let Body::Item(item) = &body { Some(Arc::clone(item)) } else { None };
    mark(queue, slot, item.clone());
    let context = Context { told: &worker.told, all: &shared.cancel_all, no_cancel };
    let outcome = call(body, &context);
    let panicked = outcome.is_none();
    let mut follow = outcome.flatten();
    if follow.is_some() && context.cancelled() {
        follow.take().into_iter().for_each(|job| call_cancelled(shared, job));
    }
    mark(queue, NIL, None);
    // The item is let go of after the lock: the last reference frees its slot.
    fx.last = item;
    fx.now();
    let mut state = shared.lock();
    let (again, refused) = returned(&mut state, number, slot, panicked, follow, fx);
    if let Some(job) = refused {
        drop(state);
        shared.carry_out(fx);
        call_cancelled(shared, job);
        state = shared.lock();
    }
    let next = match again {
        Some(slot) => Next::Run(start(&mut state, number, slot, fx)),
        None => choose(&mut state, shared, number, fx),
    };
    (state, next)
}

/// Runs one body; None if it panicked. All that it captured is gone when this returns.
fn call(body: Body, context: &Context<'_>) -> Option<Option<Job>> {
    let outcome = catch_unwind(AssertUnwindSafe(|| match body {
        Body::Once(run) => run(context),
        Body::Item(item) => {
            item.call(context);
            None
        }
        Body::Empty => unreachable!("work that was picked has a body"),
    }));
    outcome.map_err(discard).ok()
}

/// Drops what a panic carried, which may panic in turn.
pub(crate) fn discard(payload: Box<dyn Any + Send>) {
    if let Err(second) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
        std::mem::forget(second);
    }
}

/// The function in `slot` has returned. Says which slot this worker is to run without looking any further, and gives
/// back a follow-up that may not be queued.
fn returned(
    state: &mut State,
    number: u32,
    slot: u32,
    panicked: bool,
    follow: Option<Job>,
    fx: &mut Effects,
) -> (Option<u32>, Option<Job>) {
    let entry = &mut state.slab[slot];
    let (attributes, node, queue, is_item) = (entry.attributes, entry.node, entry.queue, entry.is_item);
    fx.hook = entry.take_hook();
    state.crew.change(number, |me| {
        me.doing = Doing::Looking;
        me.express = false;
        me.stalled = false;
    });
    let account = state.crew.account_mut(node, attributes.account);
    account.express_running -= u32::from(attributes.concurrent);
    account.counters.finished += 1;
    account.counters.panicked += u64::from(panicked);

    if is_item {
        return (state.item_returned(slot, fx).then_some(slot), None);
    }
    state.slab[slot].worker = NIL;
    // The next of the same key goes on here, unless this worker has done so for long and others wait.
    let crew = &state.crew;
    let me = &crew.workers[number as usize];
    let may_go_on = !me.must_end && (me.streak < STREAK || crew.nothing_ready(node));
    let next = state.release(slot, may_go_on, fx);
    state.slab.free(slot);
    let mut again = None;
    if let Some(next) = next {
        if state.crew.moves_to(number, state.slab[next].attributes.account, fx) {
            again = Some(next);
        } else {
            state.ready(next, fx);
        }
    }
    let mut refused = None;
    if let Some(job) = follow {
        let inside = Some(queue);
        let delayed = !job.delay.is_zero();
        if state.accept(queue, &job.attributes, node, delayed, inside).is_err() {
            refused = Some(job);
        } else {
            let slot = state.new_job(queue, node, job.attributes, job.run, job.hook);
            let attributes = state.slab[slot].attributes;
            if delayed {
                state.delay(slot, sync::now() + job.delay, fx);
            } else if may_go_on
                && again.is_none()
                && attributes.key.is_none()
                && state.crew.moves_to(number, attributes.account, fx)
                && state.admit_running(slot)
            {
                again = Some(slot);
            } else {
                state.admit(slot, fx);
            }
        }
    }
    let streak = &mut state.crew.workers[number as usize].streak;
    *streak = if again.is_some() { streak.saturating_add(1) } else { 0 };
    (again, refused)
}

/// Watches for work without the lock for a short while. Only a hint: the look that follows is under the lock.
///
/// After the first moments it gives way between looks: the thread that is about to submit may want this processor.
fn spin(shared: &Shared, before: u64) {
    let end = sync::now() + shared.config.spin;
    let mut first = true;
    loop {
        for _ in 0..64 {
            std::hint::spin_loop();
            // Relaxed: the lock, taken next, orders everything.
            if shared.arrivals.load(Ordering::Relaxed) != before {
                return;
            }
        }
        if !std::mem::take(&mut first) {
            std::thread::yield_now();
        }
        if sync::now() >= end {
            return;
        }
    }
}

/// After a sleep: works if somebody took it off the idle list, else goes, unless it is the last.
fn wake_up<'a>(shared: &'a Shared, number: u32, fx: &mut Effects) -> (MutexGuard<'a, State>, Next) {
    fx.now();
    let mut state = shared.lock();
    let crew = &mut state.crew;
    if crew.workers[number as usize].doing != Doing::Idle {
        let next = choose(&mut state, shared, number, fx);
        return (state, next);
    }
    if crew.is_last(number) {
        // The others have gone since it fell asleep: from now on it is the one that stays.
        return (state, Next::Sleep(None));
    }
    crew.leave_idle(number);
    crew.leave(number);
    (state, Next::Exit)
}
