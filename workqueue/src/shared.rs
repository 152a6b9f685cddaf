//! What a pool's handles, workers and keeper share, and the operations that go through its lock.

use std::{
    io,
    sync::{Arc, OnceLock},
    time::Duration,
};

use crate::{
    Error, Refused,
    crew::Crew,
    effects::{Effects, SETTLED},
    entry::{Doing, Entry, Worker},
    job::{Account, Cancelled, Context, Job, JobHandle},
    keeper,
    list::List,
    state::{QueueState, State},
    sync::{self, Apart, AtomicBool, AtomicU32, AtomicU64, Condvar, JoinHandle, Mutex, MutexGuard, Ordering, Parker},
    sys::{self, Obtained, Priority},
    topology::Topology,
    worker,
};

/// What does not change while the pool lives.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub(crate) name: Box<str>,
    pub(crate) idle: Duration,
    pub(crate) spin: Duration,
    pub(crate) priority: Priority,
    pub(crate) submitters_start: bool,
    pub(crate) cancel_at_end: bool,
    pub(crate) pin: bool,
    /// The process that made the pool: in a forked child its threads don't exist.
    pub(crate) process: u32,
}

pub(crate) struct Shared {
    pub(crate) state: Apart<Mutex<State>>,
    /// Notified when a queue or the pool became empty, and when a thread's start came back.
    pub(crate) drained: Condvar,
    /// Notified when an item that somebody waits for has got further; shared out by slot.
    settled: [Condvar; SETTLED as usize],
    /// Counts work that became ready. Written outside the lock, a hint for spinning workers.
    pub(crate) arrivals: Apart<AtomicU64>,
    /// Set once by `cancel_all`, seen by every run from then on.
    pub(crate) cancel_all: AtomicBool,
    /// Where the keeper sleeps.
    pub(crate) keeper: Parker,
    pub(crate) keeper_join: Mutex<Option<JoinHandle<()>>>,
    /// Workers that the keeper is to start, for pools whose submitters never do: one count per node and account.
    pub(crate) wanted: Box<[[AtomicU32; 2]]>,
    pub(crate) topology: Topology,
    pub(crate) config: Config,
    /// The priority that the first worker obtained; None if it can't be read.
    pub(crate) obtained: OnceLock<Option<Obtained>>,
    /// Threads the system is to refuse, for tests of what happens then.
    pub(crate) refuse: AtomicU32,
}

impl Shared {
    pub(crate) fn new(config: Config, topology: Topology, crew: Crew) -> Arc<Self> {
        let rules = QueueState {
            name: config.name.clone(),
            max_active: u32::MAX,
            active: 0,
            inactive: List::default(),
            live: 0,
            timers: 0,
            draining: 0,
            closed: false,
            handles: true,
            concurrent: false,
            account: None,
        };
        Arc::new(Self {
            state: Apart(Mutex::new(State::new(crew, rules))),
            drained: Condvar::new(),
            settled: std::array::from_fn(|_| Condvar::new()),
            arrivals: Apart(AtomicU64::new(0)),
            cancel_all: AtomicBool::new(false),
            keeper: Parker::default(),
            keeper_join: Mutex::new(None),
            wanted: (0..topology.len()).map(|_| [AtomicU32::new(0), AtomicU32::new(0)]).collect(),
            topology,
            config,
            obtained: OnceLock::new(),
            refuse: AtomicU32::new(0),
        })
    }

    /// Starts each node's first worker, and the keeper.
    pub(crate) fn open_for_business(self: &Arc<Self>) -> Result<(), Error> {
        let no_thread = |source| Error::NoThread { name: self.config.name.clone(), source };
        for node in 0..self.topology.len() as u32 {
            self.lock().crew.enlist(node, Account::Bounded);
            self.try_start_worker(node, Account::Bounded).map_err(no_thread)?;
        }
        let shared = Arc::clone(self);
        let keeper = self.start_thread(move || keeper::run(&shared)).map_err(no_thread)?;
        *sync::lock(&self.keeper_join) = Some(keeper);
        Ok(())
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        sync::lock(&self.state)
    }

    /// Lets go of the lock until `busy` is false. What it looks at changes under the lock and with a note on `drained`.
    pub(crate) fn wait_until_drained<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        busy: impl Fn(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        state.drainers += 1;
        while busy(&state) {
            state = self.drained.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        state.drainers -= 1;
        state
    }

    /// Takes the lock with at least one slot free. All allocation happens here, without the lock.
    pub(crate) fn with_room(&self) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        while let Some(shortage) = state.slab.shortage() {
            drop(state);
            let room = shortage.allocate();
            state = self.lock();
            let rest = state.slab.extend(room);
            drop(state);
            drop(rest);
            state = self.lock();
        }
        state
    }

    /// Does what a change under the lock called for.
    pub(crate) fn apply(self: &Arc<Self>, mut fx: Effects) {
        self.carry_out(&mut fx);
    }

    /// As [`apply`](Self::apply), and leaves `fx` empty: it is larger than a worker that goes from job to job should
    /// move about.
    pub(crate) fn carry_out(self: &Arc<Self>, fx: &mut Effects) {
        if fx.arrived {
            // Relaxed: a hint; whoever acts on it takes the lock.
            self.arrivals.fetch_add(1, Ordering::Relaxed);
        }
        for worker in fx.wake.iter_mut().map_while(Option::take) {
            worker.parker.wake();
        }
        if fx.drained {
            self.drained.notify_all();
        }
        for (node, account) in fx.spawn.iter_mut().map_while(Option::take) {
            if self.config.submitters_start {
                self.start_worker(node, account);
            } else {
                // Release: pairs with the keeper's Acquire swap.
                self.wanted[node as usize][account as usize].fetch_add(1, Ordering::Release);
                self.keeper.wake();
            }
        }
        while fx.settled != 0 {
            self.settled[fx.settled.trailing_zeros() as usize].notify_all();
            fx.settled &= fx.settled - 1;
        }
        if fx.keeper {
            self.keeper.wake();
        }
        fx.forget();
    }

    /// What is notified when the item in `slot` has got further.
    pub(crate) fn settled(&self, slot: u32) -> &Condvar {
        &self.settled[(slot % SETTLED) as usize]
    }

    /// Starts a worker that `summon` has already counted. If the system refuses, the count is taken back and the
    /// keeper tries again later.
    pub(crate) fn start_worker(self: &Arc<Self>, node: u32, account: Account) {
        if let Err(_refused) = self.try_start_worker(node, account) {
            let mut fx = Effects::default();
            let mut state = self.lock();
            state.crew.account_mut(node, account).refused();
            // Somebody of the other account may be free to help out.
            state.crew.summon(node, account, &mut fx);
            drop(state);
            fx.keeper = true;
            self.apply(fx);
        }
    }

    pub(crate) fn try_start_worker(self: &Arc<Self>, node: u32, account: Account) -> io::Result<()> {
        let worker = Worker::new();
        let (number, old) = self.enlist(Entry::new(Arc::clone(&worker), node, account));
        if let Some(old) = old {
            // It has left its entry and is about to return; nothing it still does waits for anybody.
            let _ = old.join.map(JoinHandle::join);
        }
        let shared = Arc::clone(self);
        let started = self.start_thread(move || worker::run(&shared, number, &worker));
        let mut state = self.lock();
        state.crew.workers[number as usize].starting = false;
        let result = match started {
            Ok(join) => {
                state.crew.workers[number as usize].join = Some(join);
                state.crew.account_mut(node, account).started();
                Ok(())
            }
            Err(error) => {
                state.crew.stop_searching(number);
                state.crew.change(number, |me| me.doing = Doing::Gone);
                state.crew.account_mut(node, account).workers -= 1;
                Err(error)
            }
        };
        state.crew.spawning -= 1;
        drop(state);
        self.drained.notify_all();
        result
    }

    /// A thread with the pool's name, unless a test has the system refuse it.
    fn start_thread(&self, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
        // Relaxed: tests set it before what is to fail.
        let refused = self.refuse.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        if refused.is_ok() {
            return Err(rustix::io::Errno::AGAIN.into());
        }
        sync::spawn(&self.config.name, run)
    }

    /// Puts a worker into the table, which grows outside the lock; gives back what was in its place.
    fn enlist(&self, entry: Entry) -> (u32, Option<Entry>) {
        let mut entry = Some(entry);
        let mut larger = Vec::new();
        loop {
            let mut state = self.lock();
            let workers = &mut state.crew.workers;
            if let Some(number) = workers.iter().position(Entry::is_over) {
                let old = std::mem::replace(&mut workers[number], entry.take().expect("enlisted once"));
                drop(state);
                drop(larger);
                return (number as u32, Some(old));
            }
            if workers.len() < workers.capacity() {
                workers.push(entry.take().expect("enlisted once"));
                let number = workers.len() as u32 - 1;
                return (number, None);
            }
            if larger.capacity() > workers.len() {
                larger.append(workers);
                std::mem::swap(workers, &mut larger);
                drop(state);
                drop(std::mem::take(&mut larger));
            } else {
                let wanted = 2 * workers.len() + 4;
                drop(state);
                larger = Vec::with_capacity(wanted);
            }
        }
    }

    /// A worker thread's first act: where it runs and how urgently.
    pub(crate) fn settle_in(&self, node: u32) {
        if self.config.pin || self.topology.len() > 1 {
            sys::stay_on(self.topology.processors(node));
        }
        if self.config.priority != Priority::Normal {
            let _ = self.obtained.set(sys::raise_priority(self.config.priority));
        }
    }

    pub(crate) fn submit(self: &Arc<Self>, queue: u32, job: Job) -> Result<JobHandle, Refused> {
        let node = self.topology.here();
        let delayed = !job.delay.is_zero();
        let mut fx = Effects::default();
        let inside = worker::current_in(self).map(|(_, queue, _)| queue);
        fx.now();
        let mut state = self.with_room();
        if let Err(refused) = state.accept(queue, &job.attributes, node, delayed, inside) {
            drop(state);
            call_cancelled(self, job);
            return Err(refused);
        }
        let slot = state.new_job(queue, node, job.attributes, job.run, job.hook);
        let generation = state.slab[slot].generation;
        if delayed {
            state.delay(slot, sync::now() + job.delay, &mut fx);
        } else {
            state.admit(slot, &mut fx);
        }
        drop(state);
        self.apply(fx);
        Ok(JobHandle { shared: Arc::clone(self), slot, generation })
    }

    pub(crate) fn cancel_job(self: &Arc<Self>, slot: u32, generation: u64) -> Cancelled {
        let mut fx = Effects::default();
        let mut state = self.lock();
        if !state.slab.current(slot, generation) {
            return Cancelled::NotFound;
        }
        if state.slab[slot].is_pending() {
            let job = state.withdraw(slot, &mut fx);
            drop(state);
            self.apply(fx);
            job.into_iter().for_each(|job| call_cancelled(self, job));
            return Cancelled::Ok;
        }
        let hook = state.tell(slot);
        drop(state);
        if let Some(hook) = hook {
            hook();
        }
        Cancelled::Running
    }
}

/// Calls a job that will not run, and all that would have followed it, with the cancel flag set.
pub(crate) fn call_cancelled(shared: &Shared, job: Job) {
    let told = AtomicBool::new(true);
    let context = Context { told: &told, all: &shared.cancel_all, no_cancel: false };
    let mut next = Some(job);
    while let Some(Job { run, hook, .. }) = next {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let follow = run(&context);
            drop(hook);
            follow
        }));
        next = outcome.unwrap_or_else(|payload| {
            worker::discard(payload);
            None
        });
    }
}
