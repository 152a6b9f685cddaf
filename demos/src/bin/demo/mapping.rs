//! Mappings of the model, which the program makes and unmaps itself, as any program does.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use nix::sys::sendfile::sendfile64;

/// A mapping of a file from its beginning, which nothing in this program reads.
pub(crate) struct Mapping {
    start: NonNull<nix::libc::c_void>,
    len: usize,
}

impl Mapping {
    /// Maps `len` bytes read-only: privately, as a program that only reads maps a file, or shared. At `at` if it is given, which must be free.
    pub(crate) fn new(file: impl AsFd, len: u64, flags: MapFlags, at: Option<usize>) -> Result<Self> {
        let len = usize::try_from(len)?;
        let size = NonZeroUsize::new(len).context("an empty file can't be mapped")?;
        let (at, flags) = match at.and_then(NonZeroUsize::new) {
            Some(at) => (Some(at), flags | MapFlags::MAP_FIXED_NOREPLACE),
            None => (None, flags),
        };
        // SAFETY: the kernel chooses a free place, or MAP_FIXED_NOREPLACE refuses one that isn't free, so no memory in use is replaced.
        let start = unsafe { mmap(at, size, ProtFlags::PROT_READ, flags, file, 0) };
        Ok(Self { start: start.context("the file can't be mapped")?, len })
    }

    /// A free address far below where the kernel puts other mappings of this process, if there is one: what is unmapped there stays free
    /// until it is mapped again, whatever the driver's threads map meanwhile.
    pub(crate) fn quiet_place(len: u64) -> Option<usize> {
        let size = NonZeroUsize::new(usize::try_from(len).ok()?)?;
        // SAFETY: the kernel chooses a free place, so no memory in use is replaced.
        let found = unsafe { mmap_anonymous(None, size, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE) }.ok()?;
        // SAFETY: the mapping made above, which nobody knows of.
        unsafe { munmap(found, size.get()) }.ok()?;
        found.addr().get().checked_sub(1 << 40)
    }

    /// Its first address.
    pub(crate) fn address(&self) -> usize {
        self.start.addr().get()
    }

    /// The pointer and the length that were mapped.
    pub(crate) fn bytes(&self) -> (*const u8, usize) {
        (self.start.as_ptr().cast_const().cast(), self.len)
    }

    /// Unmaps it and returns how long the call took.
    pub(crate) fn unmap(self) -> Result<Duration> {
        let this = std::mem::ManuallyDrop::new(self);
        let begin = Instant::now();
        // SAFETY: the mapping is this value's, which is gone with this, and no reference into it was ever made.
        unsafe { munmap(this.start, this.len) }?;
        Ok(begin.elapsed())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: as in `unmap`, which doesn't come here.
        let _ = unsafe { munmap(self.start, self.len) };
    }
}

/// The kernel's account of one mapping, in KiB.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Residence {
    /// Pages of the mapping that this process's page tables have.
    pub(crate) resident: u64,
    /// Those of them that are copies of its own, not the file's pages.
    pub(crate) private: u64,
}

impl Residence {
    /// Of the mapping at `address`, or `None` where `/proc` doesn't say.
    pub(crate) fn of(address: usize) -> Option<Self> {
        let text = std::fs::read_to_string("/proc/self/smaps").ok()?;
        let head = format!("{address:08x}-");
        let mut lines = text.lines().skip_while(|line| !line.starts_with(&head)).skip(1);
        let mut found = Self::default();
        // The entry ends where the next one's range begins, whose first word has no colon at its end.
        for line in lines.by_ref() {
            let mut words = line.split_whitespace();
            let key = words.next()?;
            let number = || line.split_whitespace().nth(1)?.parse::<u64>().ok();
            match key {
                "Rss:" => found.resident = number()?,
                "Anonymous:" => found.private = number()?,
                _ if !key.ends_with(':') => break,
                _ => {}
            }
        }
        Some(found)
    }
}

/// A file whose shared mapping can be watched: one that is open for writing.
pub(crate) struct Shareable {
    /// The file, or a copy of it.
    pub(crate) file: OwnedFd,
    /// Why it is a copy, if it is one.
    pub(crate) copied_because: Option<io::Error>,
}

impl Shareable {
    /// The model itself if it may be opened for writing (nothing is ever written), else a copy of `len` bytes in memory, sealed so that it
    /// can't shrink under the GPU.
    pub(crate) fn open(path: &Path, file: &File, len: u64) -> Result<Self> {
        match File::options().read(true).write(true).open(path) {
            Ok(file) => Ok(Self { file: file.into(), copied_because: None }),
            Err(error) => Ok(Self { file: copy(file, len)?, copied_because: Some(error) }),
        }
    }
}

/// A sealed copy of a file in memory.
fn copy(file: &File, len: u64) -> Result<OwnedFd> {
    let copy = memfd_create(c"model", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let mut done = 0;
    while u64::try_from(done)? < len {
        let left = usize::try_from(len)? - usize::try_from(done)?;
        // The descriptor's own position isn't used: sendfile reads at `done` and moves it.
        if sendfile64(&copy, file, Some(&mut done), left)? == 0 {
            anyhow::bail!("the file was truncated while it was copied");
        }
    }
    fcntl(&copy, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW))?;
    Ok(copy)
}
