//! Memory made to be handed to devices: a file without a name, mapped once, that nobody can shrink.
//!
//! **Problem.** Memory a program already has can be truncated, punched full of holes, or mapped writable by whoever holds its descriptor, and the
//! kernel reports none of that. A program that makes its memory itself needn't live with it.
//!
//! **Law.** Every byte of the mapping can be touched at any time, by anybody, without a fault: the file never shrinks below the mapping. What
//! others write meanwhile (devices, other processes, other threads) is seen as some mixture of old and new words, and is never undefined behaviour.
//!
//! **Protocol.** *memfd → size → map → seal.* The seals come last, because `F_SEAL_FUTURE_WRITE` refuses every later writable mapping, ours as
//! well; `F_SEAL_SEAL` closes the list, because a receiver of the descriptor could otherwise add a seal that stops a later export. All safe
//! access is by relaxed atomic words of 8 bytes, all of one size, so no reference to the bytes ever exists. The mapping is owned: it goes with
//! the last clone, through the bracket, so that objects which are still registered over it are told, and work that uses it is waited for.

use std::fmt;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};
use nix::sys::stat::fstat;
use nix::unistd::ftruncate;
use pinfold_invalidate::{HostRange, Space, page_size};
use thiserror::Error;

use crate::words::Words;

/// What others may do with a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HostBufferKind {
    /// It can become a dma-buf. Whoever is given the descriptor may write to it and punch holes (which then read as zeros).
    ///
    /// Sealed with `F_SEAL_SHRINK | F_SEAL_GROW`: `/dev/udmabuf` wants the first, and refuses the seals of [`Sealed`](Self::Sealed).
    Exportable,
    /// Nobody but this process can write to it, nobody can punch holes, and it can't become a dma-buf.
    ///
    /// Sealed with `F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE`: whoever is given the descriptor can only map it read-only.
    Sealed,
}

/// Which pages a buffer is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum HugePages {
    /// Ordinary ones, unless the system's setting (`/sys/kernel/mm/transparent_hugepage/shmem_enabled`) gives larger ones to everybody.
    #[default]
    No,
    /// Larger ones where the kernel has them at hand (`MADV_HUGEPAGE`), else ordinary ones.
    Try,
    /// Of the system's default huge page size, out of the pool that `vm.nr_hugepages` sets. No alias can be made of them.
    Require,
}

/// Why there is no buffer, or no access to it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HostBufferError {
    /// No bytes, or more than a range can have. `EINVAL`, `E2BIG`.
    #[error("a buffer of {size} bytes can't be made; it has at least 1 byte and at most i32::MAX pages")]
    Size {
        /// Bytes asked for.
        size: usize,
    },
    /// Memory, address space or a descriptor can't be had.
    #[error("can't {step} a buffer of {size} bytes ({pages:?} huge pages): {source}{}", hint(*pages))]
    System {
        /// What was being done.
        step: &'static str,
        /// Bytes asked for.
        size: usize,
        /// The pages asked for.
        pages: HugePages,
        /// What the system said.
        source: io::Error,
    },
    /// The kernel doesn't know one of the seals.
    #[error(
        "the kernel refused the seals {seals} of a {kind:?} buffer: {source}; F_SEAL_FUTURE_WRITE came with Linux 5.1"
    )]
    Seal {
        /// The kind of buffer.
        kind: HostBufferKind,
        /// The seals.
        seals: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Access beyond the end. `EFAULT`.
    #[error("bytes {offset}..{offset}+{len} aren't in a buffer of {size} bytes")]
    Outside {
        /// First byte asked for.
        offset: usize,
        /// Bytes asked for.
        len: usize,
        /// The size of the buffer.
        size: usize,
    },
}

fn hint(pages: HugePages) -> &'static str {
    match pages {
        HugePages::Require => "; raise vm.nr_hugepages, or use HugePages::Try",
        HugePages::No | HugePages::Try => "",
    }
}

impl HostBufferError {
    /// The errno that says the same.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Size { size: 0 } => libc::EINVAL,
            Self::Size { .. } => libc::E2BIG,
            Self::System { source, .. } | Self::Seal { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
            Self::Outside { .. } => libc::EFAULT,
        }
    }
}

/// Memory of this process that devices and other processes can be given. Cheap to clone; the last clone to go unmaps it.
///
/// An object that is registered over its [`range`](Self::range) without holding a clone is told when it goes (the unmapping is a bracket,
/// which waits for work under way, at most for the deadline). Better: let the objects go first.
#[derive(Clone)]
pub struct HostBuffer {
    memory: Arc<Memory>,
}

/// # Invariants
/// `range` is a shared mapping of the whole of `file`, made by us and unmapped by drop only; `file` can't shrink.
struct Memory {
    file: OwnedFd,
    range: HostRange,
    start: NonNull<u8>,
    kind: HostBufferKind,
    pages: HugePages,
}

// SAFETY: a mapping belongs to the process, not to a thread; all access goes through atomics.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl HostBuffer {
    /// A buffer of at least `size` bytes, rounded up to whole pages, that reads as zeros. Memory is taken when it is first touched
    /// (with [`HugePages::Require`], it is set aside now).
    ///
    /// # Errors
    /// [`HostBufferError`].
    pub fn new(size: usize, kind: HostBufferKind, pages: HugePages) -> Result<Self, HostBufferError> {
        let failed = |step| move |source: io::Error| HostBufferError::System { step, size, pages, source };
        let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        flags.set(MFdFlags::MFD_HUGETLB, pages == HugePages::Require);
        let file = memfd_create(c"pinfold-buffer", flags).map_err(io::Error::from).map_err(failed("create"))?;
        let page = page_size_of(&file, pages).map_err(failed("create"))?;
        let len = size.checked_next_multiple_of(page).and_then(|len| Some((len, i64::try_from(len).ok()?)));
        let (len, file_len) = len.filter(|_| size > 0).ok_or(HostBufferError::Size { size })?;
        if len / page_size() > pinfold_invalidate::MAX_PAGES {
            return Err(HostBufferError::Size { size });
        }
        ftruncate(&file, file_len).map_err(io::Error::from).map_err(failed("size"))?;
        let start = map(&file, len).map_err(failed("map"))?;
        let range = HostRange::from_ptr(start.as_ptr(), len).expect("the kernel maps whole pages of user space");
        // INVARIANT: the file is mapped as a whole. The seal below is what keeps it from shrinking; nobody else has the descriptor before.
        let memory = Memory { file, range, start, kind, pages };
        if pages == HugePages::Try {
            // SAFETY: the mapping is ours, and the advice changes nothing about what it shows.
            let advised = unsafe { madvise(start.cast(), len, MmapAdvise::MADV_HUGEPAGE) };
            // A kernel without transparent huge pages answers EINVAL: then there are none.
            let _ = advised;
        }
        let (seals, names) = kind.seals();
        fcntl(&memory.file, FcntlArg::F_ADD_SEALS(seals | SealFlag::F_SEAL_SEAL))
            .map_err(|errno| HostBufferError::Seal { kind, seals: names, source: errno.into() })?;
        Ok(Self { memory: Arc::new(memory) })
    }

    /// Where it is mapped: the range to register.
    #[must_use]
    pub fn range(&self) -> HostRange {
        self.memory.range
    }

    /// Its size in bytes, a multiple of the size of its pages.
    #[must_use]
    pub fn size(&self) -> usize {
        self.memory.range.len()
    }

    /// What others may do with it.
    #[must_use]
    pub fn kind(&self) -> HostBufferKind {
        self.memory.kind
    }

    /// Which pages were asked for.
    #[must_use]
    pub fn huge_pages(&self) -> HugePages {
        self.memory.pages
    }

    /// Its first byte. Valid as long as a clone lives; devices, other processes and other threads may write behind it, so make no reference to it.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.memory.start.as_ptr()
    }

    /// Copies the bytes from `offset` on into `into`. Each aligned word of 8 bytes is whole; which of several writes it shows is not promised.
    ///
    /// # Errors
    /// [`HostBufferError::Outside`]; nothing has been copied then.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), HostBufferError> {
        self.check(offset, into.len())?;
        self.words().read(offset, into);
        Ok(())
    }

    /// Copies `from` to `offset`. Bytes beside it that somebody else writes meanwhile stay as that one wrote them.
    ///
    /// # Errors
    /// [`HostBufferError::Outside`]; nothing has been copied then.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), HostBufferError> {
        self.check(offset, from.len())?;
        self.words().write(offset, from);
        Ok(())
    }

    fn check(&self, offset: usize, len: usize) -> Result<(), HostBufferError> {
        let size = self.size();
        if self.words().holds(offset, len) { Ok(()) } else { Err(HostBufferError::Outside { offset, len, size }) }
    }

    fn words(&self) -> Words<'_> {
        // SAFETY: the mapping is page-aligned, writable and alive as long as `self` is; no reference into it exists, and others are told to make none.
        unsafe { Words::new(self.memory.start, self.size()) }
    }
}

impl HostBufferKind {
    fn seals(self) -> (SealFlag, &'static str) {
        let solid = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
        match self {
            Self::Exportable => (solid, "F_SEAL_SHRINK|F_SEAL_GROW"),
            Self::Sealed => (solid | SealFlag::F_SEAL_FUTURE_WRITE, "F_SEAL_SHRINK|F_SEAL_GROW|F_SEAL_FUTURE_WRITE"),
        }
    }
}

/// The memory file. Whoever is given a copy of it can do what the [kind](HostBufferKind) says.
impl AsFd for HostBuffer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.file.as_fd()
    }
}

impl fmt::Debug for HostBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Memory { range, kind, pages, .. } = &*self.memory;
        f.debug_struct("HostBuffer").field("range", range).field("kind", kind).field("huge_pages", pages).finish()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: this made the mapping with this length; nobody has a reference into it, and devices that use it have been waited for or given up on.
        let unmap = || unsafe { munmap(self.start.cast(), self.range.len()) };
        // Nobody tracks this process's memory, it is a forked child's copy, or this is inside a bracket: unmapped as anybody unmaps.
        let bracketed = Space::current().and_then(|space| space.mutate(&[self.range], unmap).ok());
        let unmapped = bracketed.unwrap_or_else(unmap);
        debug_assert!(unmapped.is_ok(), "a whole mapping of ours can be unmapped");
    }
}

/// The size of the file's pages. Of a file of ordinary pages the kernel tells its block size by what it would like to have.
fn page_size_of(file: &OwnedFd, pages: HugePages) -> io::Result<usize> {
    match pages {
        HugePages::No | HugePages::Try => Ok(page_size()),
        HugePages::Require => usize::try_from(fstat(file)?.st_blksize).map_err(io::Error::other),
    }
}

fn map(file: &OwnedFd, len: usize) -> io::Result<NonNull<u8>> {
    let size = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
    let both = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: without MAP_FIXED the kernel chooses a free place, so no memory in use is touched.
    Ok(unsafe { mmap(None, size, both, MapFlags::MAP_SHARED, file, 0) }?.cast())
}
