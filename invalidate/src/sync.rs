//! The one place that chooses between the real atomics and loom's, so that the protocol is model-checked as it is compiled.
//!
//! `RUSTFLAGS="--cfg loom"` swaps them. A [`Futex`] under loom is a lock and a condition variable: it orders slightly more than the
//! kernel's futex does, so every ordering the protocol needs is written out as a fence and none is taken from the futex.

use std::time::Instant;

#[cfg(loom)]
pub use loom::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
#[cfg(not(loom))]
pub use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};

/// The `SeqCst` fence of a thread that has just changed an atomic by a read-modify-write, and looks at another one next.
///
/// On x86 such an instruction is locked, which no load passes: there only the compiler is to be held back (the kernel has `smp_mb__after_atomic` for
/// this). A fence, which is one for every store, costs several times what the locked instruction does.
#[inline]
pub fn fence_after_rmw() {
    #[cfg(all(target_arch = "x86_64", not(loom), not(miri)))]
    std::sync::atomic::compiler_fence(Ordering::SeqCst);
    #[cfg(not(all(target_arch = "x86_64", not(loom), not(miri))))]
    fence(Ordering::SeqCst);
}

/// A word that threads can sleep on until it changes.
#[derive(Debug, Default)]
pub struct Futex {
    word: AtomicU32,
    #[cfg(loom)]
    lock: loom::sync::Mutex<()>,
    #[cfg(loom)]
    changed: loom::sync::Condvar,
}

impl Futex {
    /// A word that is 0.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The value, for [`wait`](Self::wait). Acquire: pairs with the Release in [`bump`](Self::bump).
    #[must_use]
    #[inline]
    pub fn value(&self) -> u32 {
        self.word.load(Ordering::Acquire)
    }

    /// Changes the value and wakes everybody who sleeps on it.
    pub fn bump(&self) {
        // Release: who sees the new value sees what was done before it changed.
        self.word.fetch_add(1, Ordering::Release);
        self.wake();
    }

    /// Sleeps while the value is `seen`, at most until `deadline`. Returns false if the deadline has passed. May return early.
    #[cfg(not(loom))]
    pub fn wait(&self, seen: u32, deadline: Option<Instant>) -> bool {
        let timeout = match deadline.map(|at| at.checked_duration_since(Instant::now())) {
            Some(None) => return false,
            Some(Some(left)) => Some(libc::timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            }),
            None => None,
        };
        let timeout = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: the word lives as long as `self`; `timeout` is null or points to a timespec of this frame. The kernel reads both, writes neither.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.word.as_ptr(),
                libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                seen,
                timeout,
            );
        }
        // Woken, changed already (EAGAIN), a signal (EINTR) and a time-out are all told apart by the caller's own look.
        true
    }

    /// Loom knows no time: the deadline never passes.
    #[cfg(loom)]
    pub fn wait(&self, seen: u32, _deadline: Option<Instant>) -> bool {
        let guard = self.lock.lock().expect("loom mutexes are not poisoned");
        if self.word.load(Ordering::Relaxed) == seen {
            drop(self.changed.wait(guard).expect("loom mutexes are not poisoned"));
        }
        true
    }

    #[cfg(not(loom))]
    #[cold]
    fn wake(&self) {
        // SAFETY: FUTEX_WAKE only uses the address as a key; it lives as long as `self`.
        unsafe {
            libc::syscall(libc::SYS_futex, self.word.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, i32::MAX);
        }
    }

    #[cfg(loom)]
    fn wake(&self) {
        drop(self.lock.lock().expect("loom mutexes are not poisoned"));
        self.changed.notify_all();
    }
}

/// A [`Futex`] that knows how many sleep on it: a change that nobody sleeps for costs no system call.
///
/// Who is about to sleep counts itself, passes its fence and looks at the value; who changes the value passes its own and looks at the count. One
/// of the two sees the other.
#[derive(Debug, Default)]
pub struct Event {
    futex: Futex,
    /// Threads that sleep, or are about to. Written by them.
    sleepers: AtomicU32,
}

impl Event {
    /// A word that is 0.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// As [`Futex::value`].
    #[must_use]
    #[inline]
    pub fn value(&self) -> u32 {
        self.futex.value()
    }

    /// As [`Futex::bump`]. A fence for the caller, too: between what he has written before and what he looks at next.
    #[inline]
    pub fn bump(&self) {
        self.futex.word.fetch_add(1, Ordering::Release); // as there
        fence_after_rmw(); // between our change of the value and our look at the count; partner: `wait`
        if self.sleepers.load(Ordering::Relaxed) != 0 {
            self.futex.wake();
        }
    }

    /// As [`Futex::wait`].
    pub fn wait(&self, seen: u32, deadline: Option<Instant>) -> bool {
        self.sleepers.fetch_add(1, Ordering::Relaxed);
        fence_after_rmw(); // between our count and the look at the value before sleeping; partner: `bump`
        let before_deadline = self.futex.wait(seen, deadline);
        self.sleepers.fetch_sub(1, Ordering::Relaxed);
        before_deadline
    }
}
