//! What the kernel lets an ordinary program watch, and how much of it.

use std::fs;
use std::os::fd::{FromRawFd, OwnedFd};

use nix::libc;
use nix::sys::resource::{Resource, getrlimit};
use pinfold_core::dmabuf::Heap;
use pinfold_core::{HostBuffer, HostBufferKind, HugePages};
use serde::Serialize;

#[derive(Serialize)]
pub(crate) struct Kernel {
    pub(crate) release: String,
    pub(crate) machine: String,
    pub(crate) page_size: usize,
    pub(crate) uid: u32,
    /// How a userfaultfd is had, or why not.
    pub(crate) userfaultfd: Userfaultfd,
    pub(crate) mappings: u64,
    pub(crate) max_map_count: Option<u64>,
    /// Bytes; `None` is unlimited.
    pub(crate) memlock: Option<u64>,
    /// `None` is unlimited.
    pub(crate) descriptors: Option<u64>,
    pub(crate) memory_total: Option<u64>,
    pub(crate) memory_available: Option<u64>,
    pub(crate) udmabuf: Udmabuf,
    pub(crate) dma_heaps: Vec<String>,
}

#[derive(Serialize, Default)]
pub(crate) struct Userfaultfd {
    /// The system call works, for user-mode faults; it needs no privilege.
    pub(crate) usable: bool,
    pub(crate) error: Option<String>,
    /// `munmap`, `mremap` and `madvise` are told.
    pub(crate) events: bool,
    /// memfd, `/dev/shm`, System V and hugetlbfs can be watched.
    pub(crate) shared_memory: bool,
    /// Mapped files can be watched, and written pages be found without a fault.
    pub(crate) files: bool,
    /// The same, as the bits of `UFFDIO_API`.
    pub(crate) features: u64,
}

/// Whether memory can be exported as a dma-buf, found out by doing it.
#[derive(Serialize)]
pub(crate) struct Udmabuf {
    pub(crate) usable: bool,
    pub(crate) error: Option<String>,
}

impl Kernel {
    pub(crate) fn ask() -> Self {
        let name = nix::sys::utsname::uname().ok();
        let text = |part: Option<&std::ffi::OsStr>| part.map_or("?".into(), |part| part.to_string_lossy().into_owned());
        let limit = |resource| {
            let (soft, _) = getrlimit(resource).ok()?;
            (soft != libc::RLIM_INFINITY).then_some(soft)
        };
        Self {
            release: text(name.as_ref().map(|name| name.release())),
            machine: text(name.as_ref().map(|name| name.machine())),
            page_size: pinfold_vulkan::page_size(),
            uid: nix::unistd::geteuid().as_raw(),
            userfaultfd: Userfaultfd::ask(),
            mappings: fs::read_to_string("/proc/self/maps").map_or(0, |maps| maps.lines().count() as u64),
            max_map_count: number("/proc/sys/vm/max_map_count"),
            memlock: limit(Resource::RLIMIT_MEMLOCK),
            descriptors: limit(Resource::RLIMIT_NOFILE),
            memory_total: field("/proc/meminfo", "MemTotal:").map(|kib| kib * 1024),
            memory_available: field("/proc/meminfo", "MemAvailable:").map(|kib| kib * 1024),
            udmabuf: Udmabuf::ask(),
            dma_heaps: Heap::names(),
        }
    }
}

impl Udmabuf {
    fn ask() -> Self {
        let sample = HostBuffer::new(1, HostBufferKind::Exportable, HugePages::No).map_err(|error| error.to_string());
        let exported = sample.and_then(|it| it.export_dmabuf(0..it.size()).map_err(|error| error.to_string()));
        Self { usable: exported.is_ok(), error: exported.err() }
    }
}

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

impl Userfaultfd {
    fn ask() -> Self {
        const USER_MODE_ONLY: i32 = 1;
        // SAFETY: userfaultfd takes flags only.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY) };
        let Ok(fd) = i32::try_from(fd).and_then(u32::try_from) else {
            return Self { error: Some(std::io::Error::last_os_error().to_string()), ..Self::default() };
        };
        // SAFETY: the descriptor is new and nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd.cast_signed()) };
        let mut api = Api { api: 0xaa, features: 0, ioctls: 0 };
        // SAFETY: UFFDIO_API reads and writes one such structure.
        let answer = unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&fd), 0xc018_aa3f, &raw mut api) };
        if answer < 0 {
            return Self { error: Some(std::io::Error::last_os_error().to_string()), ..Self::default() };
        }
        let has = |bits: u64| api.features & bits == bits;
        Self {
            usable: true,
            error: None,
            events: has(1 << 2 | 1 << 3 | 1 << 6),
            shared_memory: has(1 << 12),
            files: has(1 << 15),
            features: api.features,
        }
    }
}

/// The number that a file holds.
fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The number behind a word at the beginning of a line.
pub(crate) fn field(path: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}
