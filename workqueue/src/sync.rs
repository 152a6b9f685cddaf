//! The one place that chooses between the standard primitives and loom's, so that the models run the real code.
//!
//! Loom has no clock: a timed park is a plain park there, and nothing spins. Everything that depends on time (idle
//! exit, timers, the watchdog) is absent from the models and tested on the real primitives instead.

#[cfg(not(loom))]
pub(crate) use std::{
    sync::{
        Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    thread::{JoinHandle, Thread, current, park, park_timeout},
    thread_local,
};

#[cfg(loom)]
pub(crate) use loom::{
    sync::{
        Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    thread::{JoinHandle, Thread, current, park},
    thread_local,
};

/// Loom's park never times out.
#[cfg(loom)]
pub(crate) fn park_timeout(_limit: std::time::Duration) {
    park();
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
