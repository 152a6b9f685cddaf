//! The one place where the watch queue chooses between std's primitives and loom's model of them.

#[cfg(loom)]
pub(super) use loom::sync::{Mutex, MutexGuard, atomic};
#[cfg(not(loom))]
pub(super) use std::sync::{Mutex, MutexGuard, atomic};

use std::sync::PoisonError;

/// Locks, also after a panic of another holder: every critical section of this module leaves its data whole at each step.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets whoever is in the middle of a short step finish it.
pub(super) fn pause(round: u32) {
    #[cfg(loom)]
    {
        let _ = round;
        loom::thread::yield_now();
    }
    #[cfg(not(loom))]
    if round < 64 {
        std::thread::yield_now();
    } else {
        // A yield never lets a thread of lower real-time priority run; a sleep does.
        std::thread::sleep(std::time::Duration::from_micros(50));
    }
}
