//! What the bell rings: an eventfd, or loom's stand-in for one.

#[cfg(not(loom))]
pub(super) use eventfd::Signal;
#[cfg(loom)]
pub(super) use model::Signal;

#[cfg(not(loom))]
mod eventfd {
    use std::io;
    use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

    /// A non-blocking eventfd. It never leaves this process, so nobody can fill it or make it block.
    #[derive(Debug)]
    pub(in super::super) struct Signal(OwnedFd);

    impl Signal {
        pub(in super::super) fn new() -> io::Result<Self> {
            // SAFETY: eventfd takes two integers and touches no memory.
            let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: the kernel has just made this descriptor and nobody else knows it.
            Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
        }

        /// Makes the descriptor readable. A full counter (EAGAIN) is readable too.
        pub(in super::super) fn raise(&self) {
            let one = 1_u64;
            // SAFETY: `one` is 8 readable bytes for the length of the call, as an eventfd wants.
            unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), size_of::<u64>()) };
        }

        /// Makes the descriptor unreadable.
        pub(in super::super) fn drain(&self) {
            let mut count = 0_u64;
            // SAFETY: `count` is 8 writable bytes for the length of the call, as an eventfd wants.
            unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), size_of::<u64>()) };
        }
    }

    impl AsFd for Signal {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.0.as_fd()
        }
    }
}

#[cfg(loom)]
mod model {
    use loom::sync::atomic::{AtomicU64, Ordering};

    /// The counter of an eventfd. Its order is the kernel's: every call sees all calls before it.
    #[derive(Debug)]
    pub(in super::super) struct Signal(AtomicU64);

    impl Signal {
        pub(in super::super) fn new() -> std::io::Result<Self> {
            Ok(Self(AtomicU64::new(0)))
        }

        pub(in super::super) fn raise(&self) {
            self.0.fetch_add(1, Ordering::AcqRel);
        }

        pub(in super::super) fn drain(&self) {
            self.0.swap(0, Ordering::AcqRel);
        }

        pub(in super::super) fn is_raised(&self) -> bool {
            self.0.load(Ordering::Acquire) != 0
        }
    }
}
