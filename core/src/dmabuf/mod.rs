//! Memory as a descriptor that every driver and every process understands.
//!
//! **Problem.** A frame in shared memory is copied by each process and each driver it passes. The kernel has a currency for that, the dma-buf;
//! but its makers are optional, its descriptors come from strangers, and its contents may only be touched inside brackets.
//!
//! **Law.** Whatever arrives is judged before it is used: that it is a dma-buf at all, how large it is, what its sender claims. Whatever is opened
//! (a bracket, a mapping, a descriptor) is closed by a drop. Nothing waits without a limit for somebody else's fence.
//!
//! **Protocol.** Out: [`HostBuffer::export_dmabuf`](crate::HostBuffer::export_dmabuf) and [`Udmabuf`] make one of pages that exist, a
//! [`Heap`] makes one of new pages. Over: [`send`] and [`receive`]. In: [`DmaBuf::from_fd`], then
//! [`Manager::register_dmabuf`](crate::Manager::register_dmabuf) for the device and [`DmaBuf::map`] for the processor.
//!
//! # What belongs to whom
//!
//! The pages of an exported buffer belong to the memory file *and* to the dma-buf: it holds its own reference to each page that was in the file at
//! the time of the export. Unmapping the program's memory, or its exit, takes nothing from the dma-buf. Punching a hole into the file, though
//! (`MADV_REMOVE`, `fallocate`), leaves the dma-buf with the old pages while the file gets new ones: from then on they show different bytes.
//! So for an object that reaches its device by a dma-buf an event means: *take the pages again*, by a new export; an unmapping is as
//! harmless as one of an [alias](crate::Path::AliasImport), and a hole is held off and invalidates like everywhere else.

mod error;
mod export;
mod hand_over;
mod heap;
mod map;
mod object;
mod sync;
mod sys;

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::stat::fstat;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use nix::unistd::{Whence, lseek};

pub use error::DmaBufError;
pub use export::{MemoryPart, Udmabuf, memory_file_of};
pub use hand_over::{HandOverError, Layout, MESSAGE_LEN, Offered, receive, send};
pub use heap::{Heap, HeapBudget};
pub use map::{CpuAccess, CpuGuard, DmaBufMap};
pub use object::DmaBufPart;
pub(crate) use object::Reserved;
#[cfg(not(loom))]
pub(crate) use object::export;
pub use sync::SyncFile;

/// The kernel refuses names of this length or longer (`DMA_BUF_NAME_LEN`, with the zero byte).
const NAME_LEN: usize = 32;

/// What is behind the descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BufferSort {
    /// A dma-buf.
    DmaBuf,
    /// A memory file that can't shrink. Some drivers import it as if it were a dma-buf.
    MemoryFile,
}

/// A dma-buf (or what stands in for one), with the size and identity that the kernel tells of it. Cheap to clone.
#[derive(Clone)]
pub struct DmaBuf {
    shared: Arc<Shared>,
}

struct Shared {
    fd: OwnedFd,
    size: u64,
    inode: u64,
    sort: BufferSort,
}

impl DmaBuf {
    /// Takes a descriptor that came from anywhere. Its size is asked from the kernel, whatever its sender says.
    ///
    /// # Errors
    /// [`DmaBufError::NotADmaBuf`] with the descriptor closed; [`DmaBufError::System`].
    pub fn from_fd(fd: OwnedFd) -> Result<Self, DmaBufError> {
        let magic = fstatfs(&fd).map_err(DmaBufError::system("fstatfs", "the descriptor"))?.filesystem_type();
        if magic != sys::DMA_BUF_MAGIC {
            return Err(DmaBufError::NotADmaBuf { what: "it belongs to another file system" });
        }
        Self::measured(fd, BufferSort::DmaBuf)
    }

    /// Takes a memory file in place of a dma-buf, for drivers that import one (lavapipe does) and for machines whose kernel makes no dma-bufs.
    ///
    /// # Errors
    /// [`DmaBufError::NotADmaBuf`] if it is something else, or huge pages (which can be missing when they are touched); [`DmaBufError::Seal`]
    /// without `F_SEAL_SHRINK`, as its owner could pull it from under a mapping.
    pub fn from_memory_file(fd: OwnedFd) -> Result<Self, DmaBufError> {
        let magic = fstatfs(&fd).map_err(DmaBufError::system("fstatfs", "the descriptor"))?.filesystem_type();
        if magic != TMPFS_MAGIC {
            return Err(DmaBufError::NotADmaBuf { what: "it is no memory file of ordinary pages" });
        }
        check_seals(fd.as_fd(), SealFlag::empty())?;
        Self::measured(fd, BufferSort::MemoryFile)
    }

    fn measured(fd: OwnedFd, sort: BufferSort) -> Result<Self, DmaBufError> {
        let inode = fstat(&fd).map_err(DmaBufError::system("fstat", "the descriptor"))?.st_ino;
        // The position is the open file's, which the sender shares: nobody may rely on it, and nothing here does.
        let end =
            lseek(fd.as_fd(), 0, Whence::SeekEnd).map_err(DmaBufError::system("lseek", "the end of the buffer"))?;
        let size = u64::try_from(end).unwrap_or(0);
        if size == 0 {
            return Err(DmaBufError::NotADmaBuf { what: "it is empty" });
        }
        Ok(Self { shared: Arc::new(Shared { fd, size, inode, sort }) })
    }

    /// Its size in bytes, as the kernel tells it.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.shared.size
    }

    /// Its inode, the same in every process that has it.
    #[must_use]
    pub fn inode(&self) -> u64 {
        self.shared.inode
    }

    /// What it is.
    #[must_use]
    pub fn sort(&self) -> BufferSort {
        self.shared.sort
    }

    /// A descriptor of its own for somebody who will close it, as a Vulkan import does.
    ///
    /// # Errors
    /// [`DmaBufError::System`] if the process has no room for it.
    pub fn duplicate(&self) -> Result<OwnedFd, DmaBufError> {
        self.shared.fd.try_clone().map_err(|source| DmaBufError::System {
            call: "dup",
            what: "the buffer's descriptor (ulimit -n)",
            source,
        })
    }

    /// Names it, for `/proc/*/fdinfo` and `/sys/kernel/debug/dma_buf`.
    ///
    /// # Errors
    /// [`DmaBufError::Name`] for 32 bytes or more, or with a zero byte; [`DmaBufError::System`].
    pub fn set_name(&self, name: &str) -> Result<(), DmaBufError> {
        let mut bytes = [0; NAME_LEN];
        if name.len() >= NAME_LEN || name.contains('\0') {
            return Err(DmaBufError::Name { len: name.len() });
        }
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        if self.sort() == BufferSort::MemoryFile {
            return Ok(()); // it was named when it was made
        }
        sys::set_name(self.as_fd(), &bytes).map_err(DmaBufError::system("DMA_BUF_SET_NAME", "the buffer"))
    }

    /// Waits until the work that drivers know of is over: all of it before a write, what writes before a read. Returns false when `limit` has
    /// passed first.
    ///
    /// # Errors
    /// [`DmaBufError::System`].
    pub fn wait(&self, access: CpuAccess, limit: Duration) -> Result<bool, DmaBufError> {
        sync::wait_for(self.as_fd(), access.poll_flags(), limit)
    }
}

/// The descriptor. Whoever gets a copy may map it and keep it.
impl AsFd for DmaBuf {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.fd.as_fd()
    }
}

impl fmt::Debug for DmaBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shared { fd, size, inode, sort } = &*self.shared;
        let mut debug = f.debug_struct("DmaBuf");
        debug.field("fd", &fd.as_raw_fd()).field("size", size).field("inode", inode).field("sort", sort).finish()
    }
}

/// Checks that a memory file can't shrink, and has none of the seals in `denied`.
fn check_seals(fd: BorrowedFd<'_>, denied: SealFlag) -> Result<(), DmaBufError> {
    let seals = match fcntl(fd, FcntlArg::F_GET_SEALS) {
        Ok(seals) => SealFlag::from_bits_retain(seals),
        Err(Errno::EINVAL) => return Err(DmaBufError::NotADmaBuf { what: "it is no memory file" }),
        Err(errno) => return Err(DmaBufError::system("F_GET_SEALS", "the memory file")(errno)),
    };
    if !seals.contains(SealFlag::F_SEAL_SHRINK) {
        return Err(DmaBufError::Seal { seal: "F_SEAL_SHRINK", present: false });
    }
    for (seal, name) in
        [(SealFlag::F_SEAL_WRITE, "F_SEAL_WRITE"), (SealFlag::F_SEAL_FUTURE_WRITE, "F_SEAL_FUTURE_WRITE")]
    {
        if seals.intersection(denied).contains(seal) {
            return Err(DmaBufError::Seal { seal: name, present: true });
        }
    }
    Ok(())
}
