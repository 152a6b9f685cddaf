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

/// Stands between a `SeqCst` write and the `SeqCst` load that must not be ordered before it.
///
/// In the language's memory model, and in the code that compilers emit, the two `SeqCst` accesses are ordered already, and the fence (13 ns) is
/// not needed. Loom models a `SeqCst` access as an acquire or release one, so there it needs the fence to see the same order.
#[inline(always)]
pub(super) fn store_load_barrier() {
    #[cfg(loom)]
    atomic::fence(atomic::Ordering::SeqCst);
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
