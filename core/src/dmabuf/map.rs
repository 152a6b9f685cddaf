//! The processor's access: a mapping, and brackets around every use of it.
//!
//! A device that isn't coherent with the processor's caches has to be told before and after each access. A bracket that is opened and never
//! closed leaves caches dirty under the device's feet, so the guard closes it, also on a panic.

use std::fmt;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use pinfold_invalidate::{HostRange, page_size};

use super::{BufferSort, DmaBuf, DmaBufError, sys};
use crate::words::Words;

/// What the processor does in a bracket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CpuAccess {
    /// It reads.
    Read,
    /// It writes, and may read.
    Write,
}

impl CpuAccess {
    pub(super) fn flags(self) -> u64 {
        match self {
            Self::Read => sys::SYNC_READ,
            Self::Write => sys::SYNC_READ | sys::SYNC_WRITE,
        }
    }

    /// What `poll` says when nobody is in the way: readable when all writers are done, writable when everybody is.
    pub(super) fn poll_flags(self) -> PollFlags {
        match self {
            Self::Read => PollFlags::POLLIN,
            Self::Write => PollFlags::POLLOUT,
        }
    }
}

/// A mapping of a whole dma-buf. Nothing can be read or written through it but inside a [bracket](Self::begin).
pub struct DmaBufMap {
    buffer: DmaBuf,
    /// # Invariants
    /// A shared mapping of the buffer's whole pages, with the protection that `access` needs, made by us, unmapped by drop only.
    range: HostRange,
    start: NonNull<u8>,
    access: CpuAccess,
}

// SAFETY: a mapping belongs to the process, not to a thread; all access goes through atomics.
unsafe impl Send for DmaBufMap {}
// SAFETY: as above.
unsafe impl Sync for DmaBufMap {}

impl DmaBuf {
    /// Maps it for the processor. What doesn't fill a page at its end is left out.
    ///
    /// # Errors
    /// [`DmaBufError::System`]: not every exporter lets its buffers be mapped; [`DmaBufError::Part`] if there is no whole page.
    pub fn map(&self, access: CpuAccess) -> Result<DmaBufMap, DmaBufError> {
        let (page, size) = (page_size() as u64, self.size());
        let none = || DmaBufError::Part { offset: 0, len: size, size, step: page };
        let len = usize::try_from(size / page * page).ok().and_then(NonZeroUsize::new).ok_or_else(none)?;
        let protection = match access {
            CpuAccess::Read => ProtFlags::PROT_READ,
            CpuAccess::Write => ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
        };
        // SAFETY: without MAP_FIXED the kernel chooses a free place, so no memory in use is touched.
        let start = unsafe { mmap(None, len, protection, MapFlags::MAP_SHARED, self.as_fd(), 0) };
        let start = start.map_err(DmaBufError::system("mmap", "the buffer"))?.cast();
        let range = HostRange::from_ptr(start.as_ptr(), len.get()).expect("the kernel maps whole pages of user space");
        // INVARIANT: just mapped, whole.
        Ok(DmaBufMap { buffer: self.clone(), range, start, access })
    }
}

impl DmaBufMap {
    /// How many bytes are mapped.
    #[must_use]
    pub fn size(&self) -> usize {
        self.range.len()
    }

    /// Opens a bracket, when those who use the buffer have finished (for a read: those who write it).
    ///
    /// # Errors
    /// [`DmaBufError::Busy`] if they haven't within `limit`; [`DmaBufError::System`] with `EACCES` for a write to what is mapped to be read.
    /// Somebody who starts work between that wait and the bracket is waited for without a limit, by the kernel.
    pub fn begin(&self, access: CpuAccess, limit: Duration) -> Result<CpuGuard<'_>, DmaBufError> {
        if access == CpuAccess::Write && self.access == CpuAccess::Read {
            return Err(DmaBufError::system("DMA_BUF_IOCTL_SYNC", "a mapping to read from")(nix::errno::Errno::EACCES));
        }
        let began = Instant::now();
        if self.buffer.sort() == BufferSort::DmaBuf {
            if !self.buffer.wait(access, limit)? {
                return Err(DmaBufError::Busy(limit));
            }
            let failed = DmaBufError::system("DMA_BUF_IOCTL_SYNC", "the beginning of a bracket");
            sys::sync(self.buffer.as_fd(), access.flags(), false).map_err(failed)?;
        }
        Ok(CpuGuard { map: self, access, waited: began.elapsed() })
    }
}

impl fmt::Debug for DmaBufMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaBufMap").field("buffer", &self.buffer).field("range", &self.range).finish()
    }
}

impl Drop for DmaBufMap {
    fn drop(&mut self) {
        // SAFETY: `map` made this mapping with this length, and every guard borrowed from `self`.
        let unmapped = unsafe { munmap(self.start.cast(), self.range.len()) };
        debug_assert!(unmapped.is_ok(), "a whole mapping of ours can be unmapped");
    }
}

/// An open bracket; dropping it closes it.
#[derive(Debug)]
pub struct CpuGuard<'a> {
    map: &'a DmaBufMap,
    access: CpuAccess,
    waited: Duration,
}

impl CpuGuard<'_> {
    /// How long opening it took.
    #[must_use]
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// Copies the bytes from `offset` on into `into`.
    ///
    /// # Errors
    /// [`DmaBufError::Part`] beyond the end; nothing has been copied then.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), DmaBufError> {
        let words = self.words(offset, into.len())?;
        words.read(offset, into);
        Ok(())
    }

    /// Copies `from` to `offset`.
    ///
    /// # Errors
    /// [`DmaBufError::Part`] beyond the end; [`DmaBufError::System`] with `EACCES` in a bracket for reading.
    pub fn write(&mut self, offset: usize, from: &[u8]) -> Result<(), DmaBufError> {
        if self.access == CpuAccess::Read {
            return Err(DmaBufError::system("write", "a bracket for reading")(nix::errno::Errno::EACCES));
        }
        self.words(offset, from.len())?.write(offset, from);
        Ok(())
    }

    /// The first byte, for as long as the bracket is open. Others may write behind it: make no reference to it.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.map.start.as_ptr()
    }

    fn words(&self, offset: usize, len: usize) -> Result<Words<'_>, DmaBufError> {
        // SAFETY: the mapping is page-aligned and alive as long as `self.map`; no reference into it exists. A bracket for writing is only
        // opened over a writable mapping, and without one nothing is written.
        let words = unsafe { Words::new(self.map.start, self.map.size()) };
        let outside =
            || DmaBufError::Part { offset: offset as u64, len: len as u64, size: words.len() as u64, step: 1 };
        words.holds(offset, len).then_some(words).ok_or_else(outside)
    }
}

impl Drop for CpuGuard<'_> {
    fn drop(&mut self) {
        if self.map.buffer.sort() == BufferSort::DmaBuf {
            // What can be wrong here was wrong at the beginning, too.
            let closed = sys::sync(self.map.buffer.as_fd(), self.access.flags(), true);
            debug_assert_eq!(closed, Ok(()), "closing a bracket");
        }
    }
}
