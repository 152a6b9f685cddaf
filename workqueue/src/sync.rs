//! The one place that chooses between the standard primitives and loom's, so that the models run the real code.
//!
//! Loom has no clock: nobody wakes by himself there, and nothing spins. Everything that depends on time (idle
//! exit, timers, the watchdog) is absent from the models and tested on the real primitives instead.

#[cfg(not(loom))]
pub(crate) use std::{
    sync::{
        Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    thread_local,
};

#[cfg(loom)]
pub(crate) use loom::{
    sync::{
        Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    thread_local,
};

/// Keeps what many processors write off the cache lines of what they only read, and off the pair that is fetched with
/// it.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct Apart<T>(pub(crate) T);

impl<T> std::ops::Deref for Apart<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// Where one thread sleeps until another wakes it. A wake that comes before the sleep is not lost, and several are one.
#[cfg(not(loom))]
#[derive(Default)]
pub(crate) struct Parker {
    woken: AtomicBool,
    /// Written once, by the thread that sleeps here.
    thread: std::sync::OnceLock<std::thread::Thread>,
}

#[cfg(not(loom))]
impl Parker {
    /// The calling thread is the one that will sleep here. Before this a wake is remembered all the same.
    pub(crate) fn settle(&self) {
        let _ = self.thread.set(std::thread::current());
    }

    pub(crate) fn wake(&self) {
        // Release: pairs with the Acquire in `sleep`. A sleeper that has tested the flag before this store and parks
        // after it finds the token of `unpark`, which is sent after the store.
        self.woken.store(true, Ordering::Release);
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// Sleeps until woken, or until `end`.
    pub(crate) fn sleep(&self, end: Option<std::time::Instant>) {
        // Acquire: pairs with the Release in `wake`.
        while !self.woken.swap(false, Ordering::Acquire) {
            match end.map(|end| end.saturating_duration_since(now())) {
                Some(std::time::Duration::ZERO) => return,
                Some(left) => std::thread::park_timeout(left),
                None => std::thread::park(),
            }
        }
    }
}

/// Loom's own park forgets its token when the thread takes a mutex in between, so the models sleep on a condition
/// variable, which keeps the same promise.
#[cfg(loom)]
#[derive(Default)]
pub(crate) struct Parker {
    woken: Mutex<bool>,
    changed: Condvar,
}

#[cfg(loom)]
impl Parker {
    pub(crate) fn settle(&self) {}

    pub(crate) fn wake(&self) {
        *lock(&self.woken) = true;
        self.changed.notify_one();
    }

    pub(crate) fn sleep(&self, _end: Option<std::time::Instant>) {
        let mut woken = lock(&self.woken);
        while !std::mem::take(&mut *woken) {
            woken = self.changed.wait(woken).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }
}

/// The time. In a model it stands still, so that no decision depends on how fast the model is run.
pub(crate) fn now() -> std::time::Instant {
    #[cfg(loom)]
    {
        static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
        *START.get_or_init(std::time::Instant::now)
    }
    #[cfg(not(loom))]
    std::time::Instant::now()
}

/// Starts a named thread; the name is what `ps` and `/proc` show.
#[cfg(not(loom))]
pub(crate) fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(run)
}

#[cfg(loom)]
pub(crate) fn spawn(_name: &str, run: impl FnOnce() + Send + 'static) -> std::io::Result<JoinHandle<()>> {
    Ok(loom::thread::spawn(run))
}

/// A panic inside a work function is contained before it reaches a lock, and what the lock guards is whole at every
/// point where a caller's predicate may panic: so poison says nothing here.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
