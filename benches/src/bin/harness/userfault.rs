//! Userfaultfd with nothing around it: the least that anybody pays who wants to be told, and so the floor that ours is held against.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, ensure};
use pinfold_vulkan::HostRange;

use crate::placement;

// linux/userfaultfd.h
const API: u64 = 0xaa;
const USER_MODE_ONLY: i32 = 1;
const IOCTL_API: u64 = 0xc018_aa3f;
const IOCTL_REGISTER: u64 = 0xc020_aa00;
const MODE_WP: u64 = 1 << 1;
const EVENT_REMAP: u64 = 1 << 2;
const EVENT_REMOVE: u64 = 1 << 3;
const EVENT_UNMAP: u64 = 1 << 6;
const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const WP_UNPOPULATED: u64 = 1 << 13;
const WP_ASYNC: u64 = 1 << 15;
/// Bytes of a message.
const MESSAGE: usize = 32;
/// The reader's name.
const THREAD: &str = "bare-uffd";

#[repr(C)]
#[derive(Default)]
struct ApiArgument {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct RegisterArgument {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// One userfaultfd, and a thread that reads its messages and does nothing with them.
pub(crate) struct Bare {
    fd: Arc<OwnedFd>,
    stop: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
}

impl Bare {
    /// With the same mode and the same events as ours asks for.
    pub(crate) fn new() -> Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
        // SAFETY: the system call takes flags and touches no memory.
        let raw = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        ensure!(raw >= 0, "no userfaultfd: {}", io::Error::last_os_error());
        // SAFETY: the kernel has just made this descriptor and nobody else knows it.
        let fd = Arc::new(unsafe { OwnedFd::from_raw_fd(i32::try_from(raw)?) });
        let events = EVENT_REMAP | EVENT_REMOVE | EVENT_UNMAP;
        let features = events | WP_ASYNC | WP_HUGETLBFS_SHMEM | WP_UNPOPULATED;
        let mut argument = ApiArgument { api: API, features, ioctls: 0 };
        // SAFETY: the argument is the structure that this request reads and writes, and is alive.
        let answer = unsafe { libc::ioctl(fd.as_raw_fd(), IOCTL_API, &raw mut argument) };
        ensure!(answer == 0, "the kernel's userfaultfd lacks a feature: {}", io::Error::last_os_error());
        let stop = Arc::new(AtomicBool::new(false));
        let (its_fd, its_stop) = (Arc::clone(&fd), Arc::clone(&stop));
        let reader = std::thread::Builder::new().name(THREAD.into()).spawn(move || read_all(&its_fd, &its_stop))?;
        Ok(Self { fd, stop, reader: Some(reader) })
    }

    pub(crate) fn watch(&self, range: HostRange) -> Result<()> {
        let (start, len) = (range.start() as u64, range.len() as u64);
        let mut argument = RegisterArgument { start, len, mode: MODE_WP, ioctls: 0 };
        // SAFETY: the argument is the structure that this request reads and writes, and is alive.
        let answer = unsafe { libc::ioctl(self.fd.as_raw_fd(), IOCTL_REGISTER, &raw mut argument) };
        ensure!(answer == 0, "userfaultfd can't watch {range}: {}", io::Error::last_os_error());
        Ok(())
    }

    /// Keeps the reader on the processor `at` places behind the first.
    pub(crate) fn place(&self, at: usize) -> Result<()> {
        let thread = placement::thread_named(THREAD).context("the reader has started")?;
        placement::pin(thread, &placement::allowed()[at..=at])?;
        Ok(())
    }
}

fn read_all(fd: &OwnedFd, stop: &AtomicBool) {
    let mut messages = [0_u8; 16 * MESSAGE];
    while !stop.load(Ordering::Relaxed) {
        let mut one = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: `one` is a live pollfd. The limit is for `stop`.
        unsafe { libc::poll(&raw mut one, 1, 50) };
        // SAFETY: the buffer is writable for its length; the descriptor doesn't block.
        unsafe { libc::read(fd.as_raw_fd(), messages.as_mut_ptr().cast(), messages.len()) };
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}
