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

use ash::vk;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use pinfold_core::{Access, Request};
use pinfold_invalidate::{HostRange, mappings, page_size};

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
}

/// The answers of one device so far.
#[derive(Default)]
pub(crate) struct Trials([OnceLock<TrialResult>; MappingKind::ALL.len()]);

impl Trials {
    /// The answer for `kind`, from the device if it isn't known yet.
    pub(crate) fn of(&self, gpu: &Arc<Gpu>, kind: MappingKind) -> TrialResult {
        if gpu.host_memory.is_none() {
            return TrialResult::Refused(vk::Result::ERROR_EXTENSION_NOT_PRESENT);
        }
        if let Some(&known) = self.0[kind.index()].get() {
            return known;
        }
        match attempt(gpu, kind) {
            Ok(answer) => *self.0[kind.index()].get_or_init(|| answer),
            // Not an answer about this kind of memory, so it isn't kept.
            Err(passing) => passing,
        }
    }
}

/// One trial. `Err` is an answer that may be another one next time.
fn attempt(gpu: &Arc<Gpu>, kind: MappingKind) -> Result<TrialResult, TrialResult> {
    let alignment = usize::try_from(gpu.caps.import_alignment).expect("alignments are at most 64 KiB");
    let len = page_size().max(alignment);
    let sample = Sample::new(kind, len).map_err(TrialResult::NotTried)?;
    let Ok(there) = mappings(sample.tried) else {
        return Err(TrialResult::NotTried("the list of mappings can't be read"));
    };
    if there.iter().any(|mapping| MappingKind::of(mapping) != kind) {
        return Ok(TrialResult::NotTried("the system has no such memory to try with"));
    }
    let access = if kind.writable { Access::ReadWrite } else { Access::Read };
    let request = Request { range: sample.tried, access, mappings: &there, watched: false, label: "trial import" };
    match import(gpu, &request, request.range, usage(gpu, there.iter().map(|mapping| mapping.protection))) {
        Ok(_) => Ok(TrialResult::Imported),
        Err(NotImported::Refused { code, .. }) => Ok(TrialResult::Refused(code)),
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
