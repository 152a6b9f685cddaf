//! The reader's turn: a lock that takes one atomic step to get and none to give back.
//!
//! There is nearly always one reader, and what a lock costs then is most of what a read costs. Giving back is a plain store, and then a look whether
//! somebody waits; whoever wants to wait says so, passes the barrier for both, and looks at the lock again. So either it finds the lock free, or
//! the holder finds it waiting.

use std::mem::ManuallyDrop;

use pinfold_invalidate::sync::Futex;

use super::barrier;
use super::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};

#[derive(Debug)]
pub(super) struct Turn {
    taken: AtomicBool,
    /// Threads that sleep, or are about to.
    waiting: AtomicU32,
    /// Changes when the lock is given back while somebody waits.
    freed: Futex,
}

/// It is this thread's turn, until this is dropped.
#[must_use]
pub(super) struct Taken<'a>(&'a Turn);

impl Turn {
    pub(super) fn new() -> Self {
        barrier::prepare();
        Self { taken: AtomicBool::new(false), waiting: AtomicU32::new(0), freed: Futex::new() }
    }

    /// Waits for its turn.
    #[inline]
    pub(super) fn take(&self) -> Taken<'_> {
        self.try_take().unwrap_or_else(|| self.wait())
    }

    /// Takes the turn if it is nobody's.
    #[inline]
    pub(super) fn try_take(&self) -> Option<Taken<'_>> {
        // Acquire: pairs with the Release of `end`.
        let taken = self.taken.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok();
        taken.then(|| Taken(self))
    }

    /// Ends a turn. Answers whether that was all: otherwise somebody may wait for the next one, and is to be [woken](Self::wake).
    #[inline]
    fn end(&self) -> bool {
        // Release: the next one sees what was done.
        self.taken.store(false, Ordering::Release);
        barrier::passed_free() && self.waiting.load(Ordering::Relaxed) == 0
    }

    /// Wakes who waits, if somebody does.
    #[cold]
    pub(super) fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.waiting.load(Ordering::Relaxed) > 0 {
            self.freed.bump();
        }
    }

    #[cold]
    fn wait(&self) -> Taken<'_> {
        // Relaxed: the barrier orders it before the look.
        self.waiting.fetch_add(1, Ordering::Relaxed);
        barrier::heavy();
        let taken = loop {
            let seen = self.freed.value();
            if let Some(taken) = self.try_take() {
                break taken;
            }
            self.freed.wait(seen, None);
        };
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        taken
    }
}

impl Taken<'_> {
    /// Ends the turn. If the answer is false, the caller [wakes](Turn::wake) who waits for the next one.
    #[inline]
    pub(super) fn give_back(self) -> bool {
        ManuallyDrop::new(self).0.end()
    }
}

impl Drop for Taken<'_> {
    #[inline]
    fn drop(&mut self) {
        if !self.0.end() {
            self.0.wake();
        }
    }
}
