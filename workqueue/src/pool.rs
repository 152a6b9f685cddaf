//! Making a pool, and the handle that owns it.

use std::{fmt, sync::Arc, time::Duration};

use crate::{
    Error, Refused,
    crew::{AccountState, Crew, Node},
    effects::Effects,
    end,
    item::Work,
    job::{Account, Cancelled, Context, Job, JobHandle},
    queue::{self, Flags, Queue},
    shared::{Config, Shared},
    stats::Counters,
    sync::Ordering,
    sys::{self, Obtained, Priority},
    topology::Topology,
};

/// The most may-sleep workers there are without being asked for more.
const MOST_SLEEPERS: u32 = 4096;

/// Settings of a pool; [`Pool::builder`] gives the defaults.
#[derive(Debug, Clone)]
#[must_use]
pub struct PoolBuilder {
    pub(crate) config: Config,
    bounded: Option<u32>,
    may_sleep: Option<u32>,
    topology: Option<Topology>,
    refused: u32,
}

impl PoolBuilder {
    pub(crate) fn new(name: &str) -> Self {
        let config = Config {
            name: name.into(),
            idle: Duration::from_secs(5),
            spin: Duration::from_micros(20),
            priority: Priority::Normal,
            submitters_start: true,
            cancel_at_end: false,
            pin: false,
            process: std::process::id(),
        };
        Self { config, bounded: None, may_sleep: None, topology: None, refused: 0 }
    }

    /// The most workers, per node, for work that finishes by itself. Without it: processors + 1, at least 4.
    pub fn bounded(mut self, max: u32) -> Self {
        self.bounded = Some(max);
        self
    }

    /// The most workers, per node, for work that may sleep for long. Without it: as many as the user may have
    /// processes, at most 4096. With 0 such work is refused, unless the process may ignore limits.
    pub fn may_sleep(mut self, max: u32) -> Self {
        self.may_sleep = Some(max);
        self
    }

    /// A worker without work exits after this time; one per node stays. Without it: 5 s.
    pub fn idle_exit(mut self, after: Duration) -> Self {
        self.config.idle = after;
        self
    }

    /// A worker without work looks out for some for this long before it sleeps. Without it: 20 µs. It takes the wake-up,
    /// which is most of the way from submission to start, off work that comes in quick succession.
    pub fn spin(mut self, time: Duration) -> Self {
        self.config.spin = time;
        self
    }

    /// How urgent the workers are. What they got can be read by [`Pool::obtained`]; no privilege is no error.
    pub fn priority(mut self, priority: Priority) -> Self {
        self.config.priority = priority;
        self
    }

    /// The nodes to have workers on, instead of those of this machine.
    pub fn topology(mut self, topology: Topology) -> Self {
        self.topology = Some(topology);
        self
    }

    /// Keeps workers on the processors of the topology also if it has only one node.
    pub fn pin(mut self) -> Self {
        self.config.pin = true;
        self
    }

    /// Never starts a thread from a submitting thread, but leaves that to the pool's own: for submitters that may not
    /// allocate. The first work for a new worker then starts some ten microseconds later.
    pub fn submitters_never_start_threads(mut self) -> Self {
        self.config.submitters_start = false;
        self
    }

    /// When the last handle is dropped, what is queued is called as cancelled. Without this it is run.
    /// Delayed work whose time has not come is called as cancelled either way.
    pub fn cancel_at_end(mut self) -> Self {
        self.config.cancel_at_end = true;
        self
    }

    /// Makes the system refuse the first `threads`, for tests of what happens then.
    #[doc(hidden)]
    pub fn refuse_threads(mut self, threads: u32) -> Self {
        self.refused = threads;
        self
    }

    /// Starts the pool: its keeper and one worker per node.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bounded maximum of 0 or a zero byte in the name, [`Error::NoThread`] if the system gives no thread for these.
    pub fn build(self) -> Result<Pool, Error> {
        if self.bounded == Some(0) {
            return Err(Error::Invalid("a pool needs at least one bounded worker"));
        }
        if self.config.name.contains('\0') {
            return Err(Error::Invalid("a thread's name cannot contain a zero byte"));
        }
        let topology = self.topology.unwrap_or_else(Topology::of_this_machine);
        let sleepers = || sys::thread_limit().map_or(MOST_SLEEPERS, |n| n.min(MOST_SLEEPERS.into()) as u32);
        let nodes = (0..topology.len() as u32).map(|node| {
            let processors = topology.parallel(node);
            let bounded = self.bounded.unwrap_or((processors + 1).max(4));
            let may_sleep = self.may_sleep.unwrap_or_else(sleepers);
            Node { accounts: [bounded, may_sleep].map(AccountState::with_max), processors }
        });
        let crew = Crew::new(nodes.collect(), sys::privileged());
        let shared = Shared::new(self.config, topology, crew);
        // Relaxed: nobody else knows the pool yet.
        shared.refuse.store(self.refused, Ordering::Relaxed);
        let pool = Pool { owner: Arc::new(Owner { shared }) };
        pool.owner.shared.open_for_business()?;
        Ok(pool)
    }
}

/// Ends the pool when the last handle is gone.
pub(crate) struct Owner {
    pub(crate) shared: Arc<Shared>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        end::last_handle_gone(&self.shared);
    }
}

/// Workers, and the work they do. Cloning gives another handle to the same pool.
///
/// Dropping the last handle (queues hold one each) ends the pool: no new work is taken, what is queued is run or called
/// as cancelled, running work finishes, and every thread is joined. If that happens inside a function that one of the
/// pool's own workers runs, the drop returns at once and that worker does the rest when its function has returned.
///
/// In a forked child the threads don't exist: handles may be dropped there, which does nothing, and must not be used
/// otherwise.
#[derive(Clone)]
pub struct Pool {
    pub(crate) owner: Arc<Owner>,
}

impl Pool {
    /// Starts from the defaults. The threads show `name`, of which the kernel keeps 15 bytes.
    pub fn builder(name: &str) -> PoolBuilder {
        PoolBuilder::new(name)
    }

    /// Queues `job`, or starts its timer.
    ///
    /// # Errors
    /// [`Refused`], after the job has been called as cancelled on this thread.
    pub fn submit(&self, job: Job) -> Result<JobHandle, Refused> {
        self.shared().submit(queue::OF_THE_POOL, job)
    }

    /// An item that calls `function` each time it is run by this pool.
    pub fn work(&self, function: impl FnMut(&Context<'_>) + Send + 'static) -> Work {
        Work::new(self.shared(), queue::OF_THE_POOL, Box::new(function))
    }

    /// A named queue served by this pool's workers. `max_active` is how much of its work may be going at a time;
    /// 0 stands for 512.
    ///
    /// # Errors
    /// [`Error::Invalid`] for [`Flags::HIGHPRI`] on a pool that was made with [`Priority::Normal`].
    pub fn queue(&self, name: &str, flags: Flags, max_active: u32) -> Result<Queue, Error> {
        Queue::on(self.clone(), name, flags, max_active)
    }

    /// Cancels what `predicate` picks: pending work first, which is called as cancelled on this thread, then running
    /// work, which is told. Without `all` it stops after the first.
    ///
    /// The predicate is called under the pool's lock and must not use the pool.
    pub fn cancel(&self, predicate: impl FnMut(&JobInfo) -> bool, all: bool) -> Cancelled {
        self.shared().cancel_matching(predicate, all)
    }

    /// Tells everything that runs now or is started later to stop. It can't be taken back.
    pub fn cancel_all(&self) {
        self.shared().cancel_everything();
    }

    /// Changes the most workers per node of one account. A lower limit takes effect as workers finish what they do.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bounded maximum of 0.
    pub fn set_max_workers(&self, account: Account, max: u32) -> Result<(), Error> {
        if account == Account::Bounded && max == 0 {
            return Err(Error::Invalid("a pool needs at least one bounded worker"));
        }
        self.shared().set_max(account, max);
        Ok(())
    }

    /// The most workers per node of one account.
    #[must_use]
    pub fn max_workers(&self, account: Account) -> u32 {
        self.shared().lock().crew.account(0, account).max
    }

    /// How many workers count against `account` at this moment, on all nodes.
    #[must_use]
    pub fn workers(&self, account: Account) -> u32 {
        let state = self.shared().lock();
        state.crew.nodes.iter().map(|node| node.accounts[account as usize].workers).sum()
    }

    /// What `account` has done so far.
    #[must_use]
    pub fn counters(&self, account: Account) -> Counters {
        let state = self.shared().lock();
        let mut sum = Counters::default();
        state.crew.nodes.iter().for_each(|node| sum.add(&node.accounts[account as usize].counters));
        sum
    }

    /// The priority that the workers obtained, once the first runs. None for pools that asked for nothing special.
    #[must_use]
    pub fn obtained(&self) -> Option<Obtained> {
        self.shared().obtained.get().copied().flatten()
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.owner.shared
    }

    /// Makes the system refuse the next `threads`, for tests of what happens then.
    #[doc(hidden)]
    pub fn refuse_threads(&self, threads: u32) {
        // Relaxed: the submission that it is to affect comes later on the same thread.
        self.shared().refuse.store(threads, Ordering::Relaxed);
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.shared().dump(f)
    }
}

/// What a predicate sees of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct JobInfo {
    /// As given to [`Job::key`].
    pub key: Option<u64>,
    /// As given to [`Job::tag`].
    pub tag: u64,
    /// The account it counts against.
    pub account: Account,
    /// Whether it runs already.
    pub running: bool,
}

/// Applies effects until a change has no more of them, for changes that may wake many.
pub(crate) fn until_settled(shared: &Arc<Shared>, mut change: impl FnMut(&mut Effects) -> bool) {
    loop {
        let mut fx = Effects::default();
        let more = change(&mut fx);
        shared.apply(fx);
        if !more {
            return;
        }
    }
}
