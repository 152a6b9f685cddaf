//! Named queues: a limit of their own, an order, flags, and an end that does not end the pool.

use std::{fmt, ops::BitOr, process, sync::Arc};

use crate::{
    Error, Refused,
    end::cancel_pending,
    item::Work,
    job::{Account, Context, Job, JobHandle},
    list::List,
    pool::Pool,
    shared::Shared,
    state::QueueState,
    sys::Priority,
    worker,
};

/// The number of the queue that the pool itself is.
pub(crate) const OF_THE_POOL: u32 = 0;
/// Work going at a time where 0 is asked.
const DEFAULT_ACTIVE: u32 = 512;

/// How a queue treats its work.
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Flags(u32);

impl Flags {
    /// Nothing special.
    pub const NONE: Self = Self(0);
    /// Workers of their own, with the best priority the process may get.
    pub const HIGHPRI: Self = Self(1);
    /// No concurrency control: work starts as soon as a worker can be had.
    pub const UNBOUND: Self = Self(2);
    /// One at a time, strictly in the order queued.
    pub const ORDERED: Self = Self(4);
    /// All of its work counts against the may-sleep limit.
    pub const MAY_SLEEP: Self = Self(8);

    /// Whether all of `other` is in this.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for Flags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Debug for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (Self::HIGHPRI, "HIGHPRI"),
            (Self::UNBOUND, "UNBOUND"),
            (Self::ORDERED, "ORDERED"),
            (Self::MAY_SLEEP, "MAY_SLEEP"),
        ];
        f.debug_set().entries(names.iter().filter(|(flag, _)| self.contains(*flag)).map(|(_, name)| name)).finish()
    }
}

/// A named queue. Cloning gives another handle; the queue lives until the last one is dropped.
#[derive(Clone)]
pub struct Queue {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) number: u32,
    flags: Flags,
    pub(crate) pool: Pool,
}

impl Queue {
    /// A queue with workers of its own, which show its name (15 bytes of it). `max_active` is how much of its work may
    /// be going at a time; 0 stands for 512.
    ///
    /// # Errors
    /// Those of [`PoolBuilder::build`](crate::PoolBuilder::build).
    pub fn new(name: &str, flags: Flags, max_active: u32) -> Result<Self, Error> {
        let priority = if flags.contains(Flags::HIGHPRI) { Priority::High } else { Priority::Normal };
        Self::on(Pool::builder(name).priority(priority).build()?, name, flags, max_active)
    }

    pub(crate) fn on(pool: Pool, name: &str, flags: Flags, max_active: u32) -> Result<Self, Error> {
        if flags.contains(Flags::HIGHPRI) && pool.shared().config.priority == Priority::Normal {
            return Err(Error::Invalid("a HIGHPRI queue needs a pool of high priority"));
        }
        let max_active = match max_active {
            _ if flags.contains(Flags::ORDERED) => 1,
            0 => DEFAULT_ACTIVE,
            max => max,
        };
        let number = pool.shared().add_queue(QueueState {
            name: name.into(),
            max_active,
            active: 0,
            inactive: List::default(),
            live: 0,
            timers: 0,
            draining: 0,
            closed: false,
            handles: true,
            concurrent: flags.contains(Flags::UNBOUND),
            account: flags.contains(Flags::MAY_SLEEP).then_some(Account::MaySleep),
        });
        Ok(Self { inner: Arc::new(Inner { number, flags, pool }) })
    }

    /// Queues `job`, or starts its timer.
    ///
    /// # Errors
    /// [`Refused`], after the job has been called as cancelled on this thread.
    pub fn submit(&self, job: Job) -> Result<JobHandle, Refused> {
        self.shared().submit(self.inner.number, job)
    }

    /// An item of this queue that calls `function` each time it is run.
    pub fn work(&self, function: impl FnMut(&Context<'_>) + Send + 'static) -> Work {
        Work::new(self.shared(), self.inner.number, Box::new(function))
    }

    /// Waits until the queue is empty, taking only what its own running work adds. Timers are not waited for, nor is a job that another thread has
    /// just cancelled and is about to call.
    ///
    /// # Errors
    /// [`Error::Deadlock`] from inside the queue's own work.
    pub fn drain(&self) -> Result<(), Error> {
        self.shared().drain(self.inner.number)
    }

    /// Takes no more work, calls delayed work as cancelled, and waits until the queue is empty. Other handles stay
    /// valid and are refused.
    ///
    /// # Errors
    /// [`Error::Deadlock`] from inside the queue's own work.
    pub fn destroy(&self) -> Result<(), Error> {
        let number = self.inner.number;
        if worker::current_in(self.shared()).is_some_and(|(_, queue, _)| queue == number) {
            return Err(Error::Deadlock);
        }
        self.shared().lock().queues[number as usize].closed = true;
        cancel_pending(self.shared(), |state, slot| {
            state.slab[slot].queue == number && state.slab[slot].timer != crate::slab::NIL
        });
        self.shared().drain(number)
    }

    /// The flags it was made with.
    #[must_use]
    pub fn flags(&self) -> Flags {
        self.inner.flags
    }

    /// The pool whose workers serve it.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        &self.inner.pool
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        self.inner.pool.shared()
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.shared().lock();
        let queue = &state.queues[self.inner.number as usize];
        f.debug_struct("Queue")
            .field("name", &queue.name)
            .field("flags", &self.inner.flags)
            .field("max_active", &queue.max_active)
            .field("active", &queue.active)
            .field("waiting", &queue.inactive.len())
            .finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // What is queued still runs; the number is free for another queue when nothing is left.
        if self.pool.shared().config.process == process::id() {
            self.pool.shared().lock().queues[self.number as usize].handles = false;
        }
    }
}
