//! One-shot work: what it does, how it is to be run, and the handle that can take it back.

use std::{fmt, sync::Arc, time::Duration};

use crate::{
    shared::Shared,
    sync::{AtomicBool, Ordering},
};

pub(crate) type Run = Box<dyn FnOnce(&Context<'_>) -> Option<Job> + Send>;
pub(crate) type Hook = Arc<dyn Fn() + Send + Sync>;

/// Which limit a piece of work counts against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Account {
    /// Finishes by itself: computation, short system calls.
    #[default]
    Bounded,
    /// May sleep for long: reads from pipes, waits for people or networks.
    MaySleep,
}

impl Account {
    /// Both accounts.
    pub const BOTH: [Self; 2] = [Self::Bounded, Self::MaySleep];

    pub(crate) fn other(self) -> Self {
        match self {
            Self::Bounded => Self::MaySleep,
            Self::MaySleep => Self::Bounded,
        }
    }
}

/// How a piece of work is to be run. Copied into the slot it waits in.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Attributes {
    pub(crate) key: Option<u64>,
    pub(crate) tag: u64,
    pub(crate) account: Account,
    pub(crate) concurrent: bool,
    pub(crate) no_cancel: bool,
}

/// A function that is called exactly once: by a worker, or *as cancelled* by whoever cancelled or refused it.
///
/// As cancelled means that [`Context::cancelled`] is true from the start. The call then comes on the thread that
/// cancels, submits or ends the pool, never under a lock of this crate, so a function must not need a lock that such a
/// thread holds. What the function captured is dropped when it returns.
#[must_use = "a job does nothing until it is submitted"]
pub struct Job {
    pub(crate) run: Run,
    pub(crate) attributes: Attributes,
    pub(crate) delay: Duration,
    pub(crate) hook: Option<Hook>,
}

impl Job {
    /// A job that calls `run`.
    pub fn new(run: impl FnOnce(&Context<'_>) + Send + 'static) -> Self {
        Self::linked(move |context| {
            run(context);
            None
        })
    }

    /// A job whose function may name the job that follows it.
    ///
    /// The follow-up runs at once on the same worker if it has no key and nothing waits for the key of its
    /// predecessor; otherwise it is queued like any other. The follow-up of a cancelled job is called as cancelled.
    pub fn linked(run: impl FnOnce(&Context<'_>) -> Option<Job> + Send + 'static) -> Self {
        Self { run: Box::new(run), attributes: Attributes::default(), delay: Duration::ZERO, hook: None }
    }

    /// Jobs with the same key never run at the same time, and run in the order they were queued, on whatever node.
    pub fn key(mut self, key: u64) -> Self {
        self.attributes.key = Some(key);
        self
    }

    /// A number of the caller's own, for predicates.
    pub fn tag(mut self, tag: u64) -> Self {
        self.attributes.tag = tag;
        self
    }

    /// Counts against the may-sleep limit instead of the bounded one.
    pub fn may_sleep(mut self) -> Self {
        self.attributes.account = Account::MaySleep;
        self
    }

    /// Starts as soon as a worker can be had, however many are running.
    pub fn concurrent(mut self) -> Self {
        self.attributes.concurrent = true;
        self
    }

    /// Once running, is not told of a cancel.
    pub fn no_cancel(mut self) -> Self {
        self.attributes.no_cancel = true;
        self
    }

    /// Is queued only after `delay`.
    pub fn after(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }

    /// `wake` is called when the job is cancelled while it runs: it may write an eventfd that the function polls.
    /// No signal is sent, so without it a function that sleeps in a system call finishes in its own time.
    pub fn on_cancel(mut self, wake: impl Fn() + Send + Sync + 'static) -> Self {
        self.hook = Some(Arc::new(wake));
        self
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job").field("attributes", &self.attributes).field("delay", &self.delay).finish_non_exhaustive()
    }
}

/// What a running function can ask about its own run.
#[derive(Debug)]
pub struct Context<'a> {
    /// Written under the pool's lock by whoever cancels this run; read here without it.
    pub(crate) told: &'a AtomicBool,
    /// The pool's sticky flag, written by `cancel_all`.
    pub(crate) all: &'a AtomicBool,
    pub(crate) no_cancel: bool,
}

impl Context<'_> {
    /// Whether this run has been asked to stop, or is itself only the notice that the work was cancelled.
    #[must_use]
    pub fn cancelled(&self) -> bool {
        // Acquire: pairs with the Release of whoever cancels, so that what it wrote before is seen.
        !self.no_cancel && (self.told.load(Ordering::Acquire) || self.all.load(Ordering::Acquire))
    }

    /// [`cancelled`](Self::cancelled) for use with `?`.
    ///
    /// # Errors
    /// [`Interrupted`] when the run has been asked to stop.
    pub fn check(&self) -> Result<(), Interrupted> {
        if self.cancelled() { Err(Interrupted) } else { Ok(()) }
    }
}

/// The function stopped because it was told to (`EINTR`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("stopped because it was cancelled")]
pub struct Interrupted;

/// What a cancel found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cancelled {
    /// Nothing: never queued here, or finished.
    NotFound,
    /// Pending work: it has been called as cancelled and will not run.
    Ok,
    /// Running work: it has been told and completes by itself.
    Running,
}

/// Names one submitted job. Dropping it does nothing to the job.
#[derive(Clone)]
pub struct JobHandle {
    pub(crate) shared: Arc<Shared>,
    pub(crate) slot: u32,
    pub(crate) generation: u64,
}

impl JobHandle {
    /// Takes the job back if it is still pending, else tells it to stop if it runs. Takes the same time however much
    /// is queued.
    ///
    /// A pending job is called as cancelled on this thread before this returns.
    pub fn cancel(&self) -> Cancelled {
        self.shared.cancel_job(self.slot, self.generation)
    }

    /// Whether the job has neither finished nor been cancelled yet.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.shared.lock().slab.current(self.slot, self.generation)
    }
}

impl fmt::Debug for JobHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JobHandle").field("slot", &self.slot).field("generation", &self.generation).finish()
    }
}
