//! A full barrier in two halves, for two threads of which each writes one word and then reads the other's: one of them must see the other.
//!
//! Both need a barrier between write and read, and that is what a post would cost most. The kernel can make every running thread of the process pass
//! one (`membarrier(2)`): then the side that passes seldom pays for both ([`heavy`]: a system call), and the side that passes often ([`light`]) only
//! keeps the compiler from reordering. A thread that isn't running has passed a barrier when it was switched out.
//!
//! **Law.** `light` is free only once the process is registered for the command, which [`prepare`] does before anything is shared. Where the kernel
//! refuses (before 4.14, or a seccomp profile), both halves are fences.

#[cfg(not(loom))]
pub(super) use kernel::{heavy, light, passed_free, prepare};
#[cfg(loom)]
pub(super) use model::{heavy, light, passed_free, prepare};

#[cfg(not(loom))]
mod kernel {
    use std::sync::atomic::{AtomicU8, Ordering, compiler_fence, fence};
    use std::time::Duration;

    // Of linux/membarrier.h.
    const PRIVATE_EXPEDITED: libc::c_int = 1 << 3;
    const REGISTER_PRIVATE_EXPEDITED: libc::c_int = 1 << 4;

    const UNKNOWN: u8 = 0;
    const FENCES: u8 = 1;
    const EXPEDITED: u8 = 2;

    /// Relaxed throughout: a thread that doesn't know of the registration yet pays for a fence, and is right.
    static MODE: AtomicU8 = AtomicU8::new(UNKNOWN);

    /// Registers the process, once. Whoever will pass either half calls this first.
    pub(in super::super) fn prepare() {
        if MODE.load(Ordering::Relaxed) == UNKNOWN {
            let registered = membarrier(REGISTER_PRIVATE_EXPEDITED);
            MODE.store(if registered { EXPEDITED } else { FENCES }, Ordering::Relaxed);
        }
    }

    /// The half for those who pass often.
    #[inline]
    pub(in super::super) fn light() {
        if !passed_free() {
            fence(Ordering::SeqCst);
        }
    }

    /// Passes the light half if that costs nothing. Otherwise answers false, and the caller goes where there is room for a [`fence`].
    #[inline]
    pub(in super::super) fn passed_free() -> bool {
        compiler_fence(Ordering::SeqCst);
        let free = MODE.load(Ordering::Relaxed) == EXPEDITED;
        compiler_fence(Ordering::SeqCst);
        free
    }

    /// The half for those who pass seldom. A system call, or a fence.
    pub(in super::super) fn heavy() {
        fence(Ordering::SeqCst);
        if MODE.load(Ordering::Relaxed) == EXPEDITED && !membarrier(PRIVATE_EXPEDITED) {
            // A seccomp profile that came after the registration. From now on the others fence; what one of them has written since it last read
            // the mode is still on its way, for as long as a processor keeps a write to itself: far below a microsecond.
            MODE.store(FENCES, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(1));
        }
        fence(Ordering::SeqCst);
    }

    fn membarrier(command: libc::c_int) -> bool {
        // SAFETY: membarrier takes three integers and touches no memory of ours.
        unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
    }
}

/// Loom has fences only, so both halves are.
#[cfg(loom)]
mod model {
    use loom::sync::atomic::{Ordering, fence};

    pub(in super::super) fn prepare() {}

    pub(in super::super) fn light() {
        fence(Ordering::SeqCst);
    }

    pub(in super::super) fn passed_free() -> bool {
        fence(Ordering::SeqCst);
        true
    }

    pub(in super::super) fn heavy() {
        fence(Ordering::SeqCst);
    }
}
