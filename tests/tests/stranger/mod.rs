//! A userfaultfd that is none of ours, as a program's other libraries have them.
#![allow(dead_code, reason = "each test program uses its own part of this")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use pinfold_invalidate::HostRange;

/// `_IOWR(0xaa, 0x3f, struct uffdio_api)`, `_IOWR(0xaa, 0x00, struct uffdio_register)` and `_IOWR(0xaa, 0x03, struct uffdio_copy)`.
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00;
const UFFDIO_COPY: libc::Ioctl = 0xc028_aa03;
const USER_MODE_ONLY: libc::c_int = 1;
const MODE_MISSING: u64 = 1;

/// Watches for missing pages, and asks for no events. Ends its watch when dropped.
pub(crate) struct Stranger(OwnedFd);

impl Stranger {
    pub(crate) fn new() -> io::Result<Self> {
        Self::with(USER_MODE_ONLY)
    }

    /// One that also answers for pages that the kernel needs, in a system call. Refused to ordinary users.
    pub(crate) fn of_kernel_faults() -> io::Result<Self> {
        Self::with(0)
    }

    fn with(flags: libc::c_int) -> io::Result<Self> {
        // SAFETY: userfaultfd takes flags only.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK | flags) };
        let fd = i32::try_from(fd).expect("a descriptor is an int");
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call above made this descriptor, and nobody else owns it.
        let stranger = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        let mut api = [0xaa_u64, 0, 0];
        // SAFETY: the array is laid out as `struct uffdio_api`, three words, and lives through the call.
        check(unsafe { libc::ioctl(stranger.0.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) })?;
        Ok(stranger)
    }

    /// `EBUSY` if somebody else watches a page of the range.
    pub(crate) fn register(&self, range: HostRange) -> io::Result<()> {
        let mut register = [range.start() as u64, range.len() as u64, MODE_MISSING, 0];
        // SAFETY: the array is laid out as `struct uffdio_register`, four words, and lives through the call.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_REGISTER, register.as_mut_ptr()) })
    }

    /// Whether somebody waits for a page. Each wait is told once.
    pub(crate) fn is_asked(&self) -> bool {
        let mut message = [0_u64; 4];
        // SAFETY: the array is as long as `struct uffd_msg`, writable, and lives through the call.
        unsafe { libc::read(self.0.as_raw_fd(), message.as_mut_ptr().cast(), size_of_val(&message)) > 0 }
    }

    /// Brings a page, filled with one byte.
    pub(crate) fn bring(&self, page: HostRange, byte: u8) -> io::Result<()> {
        let contents = vec![byte; page.len()];
        let mut copy = [page.start() as u64, contents.as_ptr().expose_provenance() as u64, page.len() as u64, 0, 0];
        // SAFETY: the array is laid out as `struct uffdio_copy`, five words; it and the contents live through the call.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_COPY, copy.as_mut_ptr()) })
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
