//! What tests of a whole process need: a process of their own, memory, a target that counts, and a stranger's userfaultfd.

#![allow(dead_code, unreachable_pub)] // each test program uses its part

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::Command;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pinfold_invalidate::{Change, HostRange, Shards, Space, Target, Watched, page_size};

/// Longer than anything a test waits for.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The exit code of a process that came to its end.
pub const DONE: i32 = 42;

/// Runs `body` in a process of its own (the same test program, told to run the test `name` alone) and returns what that wrote.
///
/// # Panics
/// If the child ends otherwise than by the end of `body`; the message holds what it wrote.
pub fn isolated(name: &str, body: impl FnOnce()) -> String {
    const CASE: &str = "PINFOLD_ISOLATED";
    if std::env::var_os(CASE).is_some_and(|mine| mine == *name) {
        body();
        std::process::exit(DONE);
    }
    let mut child = Command::new(std::env::current_exe().expect("a test program knows its own path"));
    child.args([name, "--exact", "--nocapture", "--quiet", "--test-threads=1"]).env(CASE, name);
    let ending = child.output().expect("the test program starts once more");
    let wrote = String::from_utf8_lossy(&ending.stdout) + String::from_utf8_lossy(&ending.stderr);
    wrote.lines().filter(|line| line.starts_with("SKIP")).for_each(|line| println!("{line}"));
    assert_eq!(ending.status.code(), Some(DONE), "{}; it wrote:\n{wrote}", ending.status);
    wrote.into_owned()
}

/// Says that a test does not run, in the form that `scripts/test` counts.
pub fn skip(test: &str, why: impl std::fmt::Display) {
    println!("SKIP {test}: {why}");
}

/// A mapping of the test's own; what is left of it is unmapped at the end.
pub struct Memory(pub HostRange);

impl Memory {
    /// Anonymous, private, reserving nothing.
    pub fn new(pages: usize) -> Self {
        Self::with(pages, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE)
    }

    pub fn with(pages: usize, protection: i32, kind: i32) -> Self {
        let flags = kind | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping anywhere; nothing is replaced.
        let at = unsafe { libc::mmap(ptr::null_mut(), pages * page_size(), protection, flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED, "{pages} pages: {}", io::Error::last_os_error());
        Self(HostRange::from_ptr(at, pages * page_size()).expect("a mapping is a range"))
    }

    pub fn part(&self, first: usize, pages: usize) -> HostRange {
        let part = HostRange::new(self.0.start() + first * page_size(), pages * page_size()).expect("pages");
        assert!(self.0.covers(part));
        part
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        unmap(self.0);
    }
}

pub fn pointer(range: HostRange) -> *mut libc::c_void {
    ptr::with_exposed_provenance_mut(range.start())
}

pub fn unmap(range: HostRange) {
    // SAFETY: memory of a test, which no reference points into.
    assert_eq!(unsafe { libc::munmap(pointer(range), range.len()) }, 0, "{}", io::Error::last_os_error());
}

pub fn advise(range: HostRange, advice: i32) {
    // SAFETY: as in `unmap`.
    assert_eq!(unsafe { libc::madvise(pointer(range), range.len(), advice) }, 0, "{}", io::Error::last_os_error());
}

pub fn map_over(range: HostRange) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: replaces memory of a test, which no reference points into.
    let at = unsafe { libc::mmap(pointer(range), range.len(), libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED, "{}", io::Error::last_os_error());
}

pub fn protect(range: HostRange, protection: i32) -> io::Result<()> {
    // SAFETY: as in `unmap`.
    if unsafe { libc::mprotect(pointer(range), range.len(), protection) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// How many mappings the process has.
pub fn mapping_count() -> usize {
    let maps = std::fs::read("/proc/self/maps").expect("/proc");
    maps.iter().filter(|&&byte| byte == b'\n').count()
}

/// The system's limit on them.
pub fn mapping_limit() -> usize {
    std::fs::read_to_string("/proc/sys/vm/max_map_count").expect("/proc").trim().parse().expect("a number")
}

/// A target that counts.
#[derive(Debug, Default)]
pub struct Told {
    pub times: AtomicU64,
    pub settled: AtomicU64,
    pub shards: AtomicU16,
}

impl Target for Told {
    fn invalidated(&self, _: &Change) {
        self.times.fetch_add(1, Ordering::SeqCst);
    }

    fn settled(self: Arc<Self>) {
        self.settled.fetch_add(1, Ordering::SeqCst);
    }

    fn shards(&self) -> Shards {
        Shards(self.shards.load(Ordering::SeqCst))
    }
}

impl Told {
    pub fn times(&self) -> u64 {
        self.times.load(Ordering::SeqCst)
    }

    /// Puts a new one over the range and watches it.
    pub fn over(space: &Space, range: HostRange, id: u64) -> (Arc<Self>, Watched) {
        let told = Arc::new(Self::default());
        space.insert(range, id, Arc::<Self>::clone(&told));
        let watched = told.watch(space, range);
        (told, watched)
    }

    /// As [`over`](Self::over), while others mutate memory of the same shard.
    pub fn over_patiently(space: &Space, range: HostRange, id: u64) -> Arc<Self> {
        let told = Arc::new(Self::default());
        space.insert(range, id, Arc::<Self>::clone(&told));
        told.watch_patiently(space, range);
        told
    }

    pub fn watch_patiently(&self, space: &Space, range: HostRange) {
        wait_until("a watch", || match space.watch(range) {
            Ok(watched) => {
                self.shards.store(watched.shards.0, Ordering::SeqCst);
                watched.coverage == pinfold_invalidate::Coverage::Watched
            }
            Err(pinfold_invalidate::WatchError::Moving { .. }) => false,
            Err(error) => panic!("{range}: {error}"),
        });
    }

    pub fn watch(&self, space: &Space, range: HostRange) -> Watched {
        let watched = space.watch(range).unwrap_or_else(|error| panic!("{range}: {error}"));
        self.shards.store(watched.shards.0, Ordering::SeqCst);
        watched
    }
}

/// Waits until every gate is open, so that all that has happened has been told.
pub fn all_told(space: &Space) {
    assert!(space.wait_open(Shards::ALL, Instant::now() + PATIENCE), "a gate stays closed");
}

pub fn wait_until(what: &str, mut come: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !come() {
        assert!(Instant::now() < end, "{what} doesn't come about");
        std::thread::yield_now();
    }
}

/// A userfaultfd of somebody else's.
pub struct Stranger(OwnedFd);

impl Stranger {
    pub fn new() -> io::Result<Self> {
        // SAFETY: flags only: user-mode faults, closed on exec.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK | 1) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, and nobody else's.
        let this = Self(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).expect("a descriptor is an int")) });
        // UFFDIO_API with WP_ASYNC and what write-protection of files needs; a kernel without these (before Linux 6.7) watches no
        // files, and says of other memory what is asked here without them.
        if let Err(error) = this.ask(0xc018_aa3f, &mut [0xaa_u64, 1 << 15 | 1 << 12, 0]) {
            if error.raw_os_error() != Some(libc::EINVAL) {
                return Err(error);
            }
            this.ask(0xc018_aa3f, &mut [0xaa_u64, 0, 0])?;
        }
        Ok(this)
    }

    /// Registers and unregisters: an error of `EBUSY` says that the range is watched by another.
    pub fn touch(&self, range: HostRange) -> io::Result<()> {
        let (start, len) = (range.start() as u64, range.len() as u64);
        self.ask(0xc020_aa00, &mut [start, len, 1 << 1, 0])?;
        self.ask(0x8010_aa01, &mut [start, len])
    }

    /// Registers.
    pub fn take(&self, range: HostRange) -> io::Result<()> {
        self.ask(0xc020_aa00, &mut [range.start() as u64, range.len() as u64, 1 << 1, 0])
    }

    fn ask(&self, request: u64, argument: &mut [u64]) -> io::Result<()> {
        // SAFETY: the argument is as long as the request's structure, and lives through the call; no memory of the test changes.
        let answer = unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&self.0), request, argument.as_mut_ptr()) };
        if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// Whether somebody watches all of the range, page by page where `false` must mean none of it.
pub fn is_watched(range: HostRange) -> bool {
    match Stranger::new().expect("asked before").touch(range) {
        Ok(()) => false,
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => true,
        Err(error) => panic!("{range}: {error}"),
    }
}
