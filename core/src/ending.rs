//! How work has ended, once it has, and who waits for it.
//!
//! **Problem.** Nearly nobody waits for most work, so its end shall cost next to nothing; and whoever waits, on a thread or as a future, must hear of it.
//!
//! **Law.** Who asks after the end is told how it was. Who has been told to wait is woken.
//!
//! **Protocol.** The end writes down how it was, passes its fence, and looks whether anybody waits. Who is about to wait says so, passes his own, and
//! looks at what is written once more. One of the two sees the other. Sleeping threads have an [`Event`]; futures leave a waker, and then a flag.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use pinfold_invalidate::sync::{AtomicBool, AtomicU32, Event, Ordering, fence_after_rmw};

use crate::Outcome;

#[derive(Debug, Default)]
pub(crate) struct Ending {
    /// [`RUNNING`], then an outcome. Written once.
    outcome: AtomicU32,
    over: Event,
    /// Somebody has left a waker. Never cleared.
    polled: AtomicBool,
    wakers: Mutex<Vec<Waker>>,
}

const RUNNING: u32 = 0;
const DONE: u32 = 1;
const LOST: u32 = 2;

impl Ending {
    /// The work is over. Called once.
    pub(crate) fn end(&self, outcome: Outcome) {
        let outcome = match outcome {
            Outcome::Done => DONE,
            Outcome::Lost => LOST,
        };
        self.outcome.store(outcome, Ordering::Release); // pairs with the Acquire in `get`
        self.over.bump(); // and so a fence, between what is written and our look at `polled`; partner: `poll`
        if self.polled.load(Ordering::Relaxed) {
            let wakers = std::mem::take(&mut *self.wakers());
            wakers.into_iter().for_each(Waker::wake);
        }
    }

    /// How it was; `None` before the end. Who sees it sees all that the work did.
    pub(crate) fn get(&self) -> Option<Outcome> {
        match self.outcome.load(Ordering::Acquire) {
            RUNNING => None,
            DONE => Some(Outcome::Done),
            _ => Some(Outcome::Lost),
        }
    }

    /// Waits for the end; `None` if it has not come at the deadline.
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> Option<Outcome> {
        loop {
            let seen = self.over.value();
            if let Some(outcome) = self.get() {
                return Some(outcome);
            }
            if !self.over.wait(seen, deadline) {
                return self.get();
            }
        }
    }

    /// As [`Future::poll`](std::future::Future::poll).
    pub(crate) fn poll(&self, context: &Context<'_>) -> Poll<Outcome> {
        if let Some(outcome) = self.get() {
            return Poll::Ready(outcome);
        }
        self.leave(context.waker());
        self.polled.swap(true, Ordering::Relaxed);
        fence_after_rmw(); // between what we say and our second look; partner: `end`
        self.get().map_or(Poll::Pending, Poll::Ready)
    }

    fn leave(&self, waker: &Waker) {
        let mut wakers = self.wakers();
        if !wakers.iter().any(|left| left.will_wake(waker)) {
            wakers.push(waker.clone());
        }
    }

    fn wakers(&self) -> MutexGuard<'_, Vec<Waker>> {
        self.wakers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `RUSTFLAGS="--cfg loom" cargo test -p pinfold-core --lib --release ending::models`
#[cfg(all(test, loom))]
mod models {
    use std::sync::Arc;
    use std::task::Wake;

    use loom::cell::UnsafeCell;
    use loom::thread;

    use super::*;

    /// An ending, what the work did before it, and what a waker wakes. All made before the threads are: loom doesn't see that the wakers have a lock.
    #[derive(Default)]
    struct Work {
        ending: Ending,
        result: UnsafeCell<u32>,
        woken: Event,
    }

    // SAFETY: the cell is the only part that isn't `Sync`, and loom fails the model if its accesses are not ordered.
    unsafe impl Sync for Work {}
    // SAFETY: nothing in it belongs to a thread.
    unsafe impl Send for Work {}

    impl Work {
        fn spawn() -> (Arc<Self>, thread::JoinHandle<()>) {
            let work = Arc::new(Self::default());
            let device = Arc::clone(&work);
            let run = move || {
                device.result.with_mut(|result| {
                    // SAFETY: loom has checked that nobody else is here.
                    unsafe { *result = 1 };
                });
                device.ending.end(Outcome::Done);
            };
            (work, thread::spawn(run))
        }

        fn is_there(&self) -> bool {
            self.result.with(|result| {
                // SAFETY: loom has checked that nobody writes.
                unsafe { *result == 1 }
            })
        }
    }

    impl Wake for Work {
        fn wake(self: Arc<Self>) {
            self.woken.bump();
        }
    }

    #[test]
    fn a_future_is_woken_or_told() {
        loom::model(|| {
            let (work, device) = Work::spawn();
            let waker = Waker::from(Arc::clone(&work));
            let seen = work.woken.value();
            if work.ending.poll(&Context::from_waker(&waker)).is_pending() {
                work.woken.wait(seen, None); // for ever, if nobody wakes it
                assert_eq!(work.ending.poll(&Context::from_waker(&waker)), Poll::Ready(Outcome::Done));
            }
            assert!(work.is_there());
            device.join().unwrap();
        });
    }

    #[test]
    fn a_thread_is_woken_and_sees_what_the_work_did() {
        loom::model(|| {
            let (work, device) = Work::spawn();
            assert_eq!(work.ending.wait(None), Some(Outcome::Done));
            assert!(work.is_there());
            device.join().unwrap();
        });
    }
}
