//! Waiting for one job's result: blocked with a time limit, as a future, or through a descriptor in a poll loop.

use std::{
    any::Any,
    fmt,
    future::Future,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Poll, Waker},
    time::Duration,
};

use rustix::event::{EventfdFlags, eventfd};

use crate::{
    blocking::blocking,
    job::{Context, Interrupted, Job},
    sync::{self, Condvar, Mutex},
};

/// Why a tracked job has no result.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Ended {
    /// It was cancelled or refused before it ran (`ECANCELED`).
    #[error("cancelled before it ran")]
    Cancelled,
    /// It ran, and stopped because it was told to (`EINTR`).
    #[error("stopped because it was cancelled while it ran")]
    Interrupted,
    /// It panicked, with this payload.
    #[error("the job panicked")]
    Panicked(Box<dyn Any + Send>),
}

impl Ended {
    /// The `errno` a system call would give for this; a panic has none.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        use rustix::io::Errno;
        match self {
            Self::Cancelled => Some(Errno::CANCELED.raw_os_error()),
            Self::Interrupted => Some(Errno::INTR.raw_os_error()),
            Self::Panicked(_) => None,
        }
    }
}

impl fmt::Debug for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cancelled => "Cancelled",
            Self::Interrupted => "Interrupted",
            Self::Panicked(_) => "Panicked",
        })
    }
}

struct Slot<T> {
    state: Mutex<Progress<T>>,
    arrived: Condvar,
    /// Made when first asked for; written once, when the result arrives.
    descriptor: OnceLock<OwnedFd>,
}

/// How far the job has got, guarded by its slot's lock.
enum Progress<T> {
    Waiting(Option<Waker>),
    Done(Result<T, Ended>),
    Taken,
}

impl<T> Slot<T> {
    fn complete(&self, result: Result<T, Ended>) {
        let before = std::mem::replace(&mut *sync::lock(&self.state), Progress::Done(result));
        self.arrived.notify_all();
        if let Some(descriptor) = self.descriptor.get() {
            let _ = rustix::io::write(descriptor, &1_u64.to_ne_bytes());
        }
        if let Progress::Waiting(Some(waker)) = before {
            waker.wake();
        }
    }
}

/// Gives the result when the job has ended, whichever way; dropped without one, it says that the job was cancelled.
struct Reporter<T>(Option<Arc<Slot<T>>>);

impl<T> Reporter<T> {
    fn report(mut self, result: Result<T, Ended>) {
        if let Some(slot) = self.0.take() {
            slot.complete(result);
        }
    }
}

impl<T> Drop for Reporter<T> {
    fn drop(&mut self) {
        if let Some(slot) = self.0.take() {
            slot.complete(Err(Ended::Cancelled));
        }
    }
}

/// The result of a tracked job, to be waited for in any of three ways. Taken once.
///
/// It arrives before the worker has written down that the job is over: [`JobHandle::is_live`](crate::JobHandle::is_live) and the counters may lag.
#[must_use = "the result is lost if nobody asks for it"]
pub struct Completion<T> {
    slot: Arc<Slot<T>>,
}

impl Job {
    /// A job whose result can be waited for.
    ///
    /// The function stops early by returning the [`Interrupted`] of [`Context::check`]. A panic becomes
    /// [`Ended::Panicked`].
    ///
    /// ```
    /// use pinfold_workqueue::{Job, Pool};
    ///
    /// let pool = Pool::builder("sums").build()?;
    /// let (job, sum) = Job::tracked(|context| {
    ///     let mut sum = 0_u64;
    ///     for n in 0..1000 {
    ///         context.check()?;
    ///         sum += n;
    ///     }
    ///     Ok(sum)
    /// });
    /// pool.submit(job)?;
    /// assert_eq!(sum.wait()?, 499_500);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn tracked<T: Send + 'static>(
        run: impl FnOnce(&Context<'_>) -> Result<T, Interrupted> + Send + 'static,
    ) -> (Self, Completion<T>) {
        let state = Mutex::new(Progress::Waiting(None));
        let slot = Arc::new(Slot { state, arrived: Condvar::new(), descriptor: OnceLock::new() });
        let reporter = Reporter(Some(Arc::clone(&slot)));
        let job = Self::new(move |context| {
            let cancelled = context.cancelled();
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(context)));
            reporter.report(match outcome {
                Ok(_) if cancelled => Err(Ended::Cancelled),
                Ok(result) => result.map_err(|Interrupted| Ended::Interrupted),
                Err(payload) => Err(Ended::Panicked(payload)),
            });
        });
        (job, Completion { slot })
    }
}

impl<T> Completion<T> {
    /// Waits for the result. On a worker it counts as [`blocking`](crate::blocking()).
    ///
    /// # Errors
    /// [`Ended`] says why there is none.
    pub fn wait(self) -> Result<T, Ended> {
        blocking(|| {
            let mut state = sync::lock(&self.slot.state);
            while matches!(*state, Progress::Waiting(_)) {
                state = self.slot.arrived.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
            }
            take(&mut state).expect("it has arrived and is taken once")
        })
    }

    /// Waits for the result no longer than `limit`; None when the time is up, and when it was taken before.
    pub fn wait_timeout(&mut self, limit: Duration) -> Option<Result<T, Ended>> {
        let deadline = sync::now() + limit;
        blocking(|| {
            let mut state = sync::lock(&self.slot.state);
            while matches!(*state, Progress::Waiting(_)) {
                let left = deadline.saturating_duration_since(sync::now());
                if left.is_zero() {
                    return None;
                }
                let waited = self.slot.arrived.wait_timeout(state, left);
                state = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
            }
            take(&mut state)
        })
    }

    /// The result if it has arrived and was not taken yet.
    pub fn try_take(&mut self) -> Option<Result<T, Ended>> {
        take(&mut sync::lock(&self.slot.state))
    }

    /// An eventfd that becomes readable when the result arrives, and stays so.
    ///
    /// # Errors
    /// What the system says when it gives no descriptor.
    pub fn eventfd(&self) -> io::Result<BorrowedFd<'_>> {
        let state = sync::lock(&self.slot.state);
        if self.slot.descriptor.get().is_none() {
            let already = u32::from(!matches!(*state, Progress::Waiting(_)));
            let descriptor = eventfd(already, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
            let _ = self.slot.descriptor.set(descriptor);
        }
        drop(state);
        Ok(self.slot.descriptor.get().expect("made above").as_fd())
    }
}

/// The result, if it is there; its place says that it was taken.
fn take<T>(state: &mut Progress<T>) -> Option<Result<T, Ended>> {
    match std::mem::replace(state, Progress::Taken) {
        Progress::Done(result) => Some(result),
        other => {
            *state = other;
            None
        }
    }
}

impl<T> Future for Completion<T> {
    type Output = Result<T, Ended>;

    fn poll(self: Pin<&mut Self>, context: &mut std::task::Context<'_>) -> Poll<Self::Output> {
        let mut state = sync::lock(&self.slot.state);
        if let Some(result) = take(&mut state) {
            return Poll::Ready(result);
        }
        let waker = context.waker().clone();
        let before = std::mem::replace(&mut *state, Progress::Waiting(Some(waker)));
        drop(state);
        drop(before);
        Poll::Pending
    }
}

impl<T> fmt::Debug for Completion<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Completion").finish_non_exhaustive()
    }
}
