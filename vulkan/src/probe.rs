//! Trial imports: the only source that tells the truth about what a driver imports.
//!
//! Some drivers import anonymous memory only, one says it can't import at all and does, and what a driver answers to the same kind of
//! memory doesn't change while it runs. So each kind of mapping is tried once per device, on a small mapping of our own, at the first
//! range of that kind; the answer is kept, and shown in reports.

use std::env;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use ash::vk;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use pinfold_core::{Access, Request};
use pinfold_invalidate::{HostRange, mappings, page_size};

use crate::copy;
use crate::gpu::Gpu;
use crate::import::{NotImported, import, usage};
use crate::path::{MappingKind, Source};

/// What a device answered to a trial import.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrialResult {
    /// It took the memory.
    Imported,
    /// It refused, with this code. Ranges of this kind are mirrored.
    Refused(vk::Result),
    /// There was no memory of this kind to try with, for this reason. Ranges of this kind are tried one by one.
    NotTried(&'static str),
}

impl TrialResult {
    pub(crate) fn refusal(self) -> Option<vk::Result> {
        match self {
            Self::Refused(code) => Some(code),
            Self::Imported | Self::NotTried(_) => None,
        }
    }
}

impl fmt::Display for TrialResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Imported => f.write_str("imported"),
            Self::Refused(code) => write!(f, "refused with {code:?}"),
            Self::NotTried(why) => write!(f, "not tried: {why}"),
        }
    }
}

/// One line of the trial table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trial {
    /// The kind of mapping that was tried.
    pub kind: MappingKind,
    /// What the device answered.
    pub result: TrialResult,
    /// How long it took to import a page (or [`import_alignment`](crate::Capabilities::import_alignment) bytes, if that is more), the best of
    /// three; `None` if it wasn't imported.
    pub import: Option<Duration>,
}

/// What it costs to import memory into a device, and to copy it instead: measured once, with private anonymous memory, the best of three.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Costs {
    /// One import of a page or of [`import_alignment`](crate::Capabilities::import_alignment) bytes, with its buffer.
    pub small_import: Duration,
    /// One import of [`Costs::LARGE`] bytes.
    pub large_import: Duration,
    /// A copy of [`Costs::LARGE`] bytes, as mirrors are filled.
    pub large_copy: Duration,
}

impl Costs {
    /// The size that import and copy are compared at: 4 MiB.
    pub const LARGE: usize = 4 << 20;

    /// What importing `bytes` takes, in nanoseconds: a fixed part, and one that grows with the size.
    #[must_use]
    pub fn import_ns(&self, bytes: u64) -> u64 {
        let growth = scale(self.large_import.saturating_sub(self.small_import), bytes);
        growth.saturating_add(u64::try_from(self.small_import.as_nanos()).unwrap_or(u64::MAX))
    }

    /// What a mirror of `bytes` takes instead, in nanoseconds: a buffer and memory, as an import does, and the copy.
    #[must_use]
    pub fn copy_ns(&self, bytes: u64) -> u64 {
        let fixed = u64::try_from(self.small_import.as_nanos()).unwrap_or(u64::MAX);
        scale(self.large_copy, bytes).saturating_add(fixed)
    }
}

/// What `bytes` take if [`Costs::LARGE`] take `large`.
fn scale(large: Duration, bytes: u64) -> u64 {
    let ns = large.as_nanos() * u128::from(bytes) / Costs::LARGE as u128;
    u64::try_from(ns).unwrap_or(u64::MAX)
}

/// The answers of one device so far.
#[derive(Default)]
pub(crate) struct Trials {
    kinds: [OnceLock<Trial>; MappingKind::ALL.len()],
    costs: OnceLock<Costs>,
}

impl Trials {
    /// The answer for `kind`, from the device if it isn't known yet.
    pub(crate) fn of(&self, gpu: &Arc<Gpu>, kind: MappingKind) -> Trial {
        if gpu.host_memory.is_none() {
            let result = TrialResult::Refused(vk::Result::ERROR_EXTENSION_NOT_PRESENT);
            return Trial { kind, result, import: None };
        }
        if let Some(&known) = self.kinds[kind.index()].get() {
            return known;
        }
        match attempt(gpu, kind) {
            Ok(answer) => *self.kinds[kind.index()].get_or_init(|| answer),
            // Not an answer about this kind of memory, so it isn't kept.
            Err(passing) => Trial { kind, result: passing, import: None },
        }
    }

    /// What importing and copying cost; measured now if they haven't been. `None` if this device can't import.
    pub(crate) fn costs(&self, gpu: &Arc<Gpu>) -> Option<Costs> {
        match self.costs.get() {
            Some(&known) => Some(known),
            None => measure(gpu).map(|costs| *self.costs.get_or_init(|| costs)),
        }
    }
}

/// Imports and copies a sample, so that the two can be compared.
fn measure(gpu: &Arc<Gpu>) -> Option<Costs> {
    let kind = MappingKind { source: Source::Anonymous, writable: true };
    let len = usize::try_from(gpu.caps.chunk_size).map_or(Costs::LARGE, |chunk| chunk.min(Costs::LARGE));
    let (sample, copy) = (Sample::new(kind, Costs::LARGE).ok()?, Sample::new(kind, Costs::LARGE).ok()?);
    let small = page_size().max(usize::try_from(gpu.caps.import_alignment).ok()?);
    let timed = |len| {
        let range = HostRange::new(sample.tried.start(), len).ok()?;
        let there = mappings(range).ok()?;
        let usage = usage(gpu, there.iter().map(|mapping| mapping.protection));
        best_of_three(|| import(gpu, None, &Request::new(range, Access::ReadWrite, &there), None, usage).ok().map(drop))
    };
    let large_copy = best_of_three(|| {
        let to = NonNull::new(std::ptr::with_exposed_provenance_mut(copy.tried.start()))?;
        // SAFETY: both samples are mapped, have that size, and nobody else knows them.
        unsafe { copy::read(to, sample.tried.start(), Costs::LARGE) }.ok()
    })?;
    let large_import = timed(len)?.mul_f64(Costs::LARGE as f64 / len as f64);
    Some(Costs { small_import: timed(small)?, large_import, large_copy })
}

fn best_of_three(mut work: impl FnMut() -> Option<()>) -> Option<Duration> {
    (0..3).try_fold(Duration::MAX, |best, _| {
        let begun = Instant::now();
        work()?;
        Some(best.min(begun.elapsed()))
    })
}

/// One trial. `Err` is an answer that may be another one next time.
fn attempt(gpu: &Arc<Gpu>, kind: MappingKind) -> Result<Trial, TrialResult> {
    let alignment = usize::try_from(gpu.caps.import_alignment).expect("alignments are at most 64 KiB");
    let len = page_size().max(alignment);
    let sample = Sample::new(kind, len).map_err(TrialResult::NotTried)?;
    let Ok(there) = mappings(sample.tried) else {
        return Err(TrialResult::NotTried("the list of mappings can't be read"));
    };
    if there.iter().any(|mapping| MappingKind::of(mapping) != kind) {
        let result = TrialResult::NotTried("the system has no such memory to try with");
        return Ok(Trial { kind, result, import: None });
    }
    let access = if kind.writable { Access::ReadWrite } else { Access::Read };
    let request = Request { label: "trial import", ..Request::new(sample.tried, access, &there) };
    let attempt = || import(gpu, None, &request, None, usage(gpu, there.iter().map(|mapping| mapping.protection)));
    match attempt() {
        Ok(_) => {
            let import = best_of_three(|| attempt().ok().map(drop));
            Ok(Trial { kind, result: TrialResult::Imported, import })
        }
        Err(NotImported::Refused { code, .. }) => Ok(Trial { kind, result: TrialResult::Refused(code), import: None }),
        Err(NotImported::Stop(_)) => Err(TrialResult::NotTried("the budget is used up, or the device is lost")),
    }
}

/// A small mapping of a wanted kind.
struct Sample {
    /// The part to try: aligned for imports.
    tried: HostRange,
    at: NonNull<libc::c_void>,
    len: usize,
}

impl Sample {
    /// A mapping with `len` aligned bytes; `len` is a power of two and at least a page.
    fn new(kind: MappingKind, len: usize) -> Result<Self, &'static str> {
        let room = 2 * len;
        let size = room.try_into().expect("a size is never 0");
        let protection =
            if kind.writable { ProtFlags::PROT_READ | ProtFlags::PROT_WRITE } else { ProtFlags::PROT_READ };
        let map = |fd: BorrowedFd<'_>, sharing| {
            // SAFETY: a new mapping at an address that the kernel chooses.
            unsafe { mmap(None, size, protection, sharing | MapFlags::MAP_POPULATE, fd, 0) }
        };
        let at = match kind.source {
            Source::Anonymous => {
                // SAFETY: a new mapping at an address that the kernel chooses.
                unsafe { mmap_anonymous(None, size, protection, MapFlags::MAP_PRIVATE | MapFlags::MAP_POPULATE) }
            }
            Source::PrivateMemfd => map(memfd(room)?.as_fd(), MapFlags::MAP_PRIVATE),
            Source::SharedMemfd => map(memfd(room)?.as_fd(), MapFlags::MAP_SHARED),
            Source::PrivateFile => map(program()?.as_fd(), MapFlags::MAP_PRIVATE),
            Source::SharedFile => map(scratch_file(room)?.as_fd(), MapFlags::MAP_SHARED),
        };
        let at = at.map_err(|_| "the memory can't be mapped")?;
        let start = at.addr().get().next_multiple_of(len);
        let tried = HostRange::new(start, len).expect("whole pages inside a mapping");
        Ok(Self { tried, at, len: room })
    }
}

impl Drop for Sample {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, unmapped once, and every import of it is gone.
        let unmapped = unsafe { munmap(self.at, self.len) };
        debug_assert_eq!(unmapped, Ok(()), "unmapping a sample");
    }
}

fn memfd(len: usize) -> Result<File, &'static str> {
    let fd = memfd_create(c"pinfold-trial", MFdFlags::MFD_CLOEXEC).map_err(|_| "no memfd can be made")?;
    sized(File::from(fd), len)
}

/// The program's own file: a file on a disk that is always there. It is never written.
fn program() -> Result<File, &'static str> {
    File::open("/proc/self/exe").map_err(|_| "the program's own file can't be opened")
}

/// A nameless file on a real file system.
fn scratch_file(len: usize) -> Result<File, &'static str> {
    let nameless = |folder: PathBuf| -> io::Result<File> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(folder)?;
        if fstatfs(&file)?.filesystem_type() == TMPFS_MAGIC {
            return Err(io::ErrorKind::Unsupported.into()); // shared memory, which is another kind
        }
        Ok(file)
    };
    let folders = [env::temp_dir(), PathBuf::from("/var/tmp"), PathBuf::from(".")];
    let file = folders.into_iter().find_map(|folder| nameless(folder).ok());
    sized(file.ok_or("no temporary file can be made on a disk")?, len)
}

fn sized(file: File, len: usize) -> Result<File, &'static str> {
    file.set_len(len as u64).map_err(|_| "a file for the trial can't be given its size")?;
    Ok(file)
}
