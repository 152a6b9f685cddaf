//! What is mapped where: the kernel's own list of mappings, asked for one range at a time.

use thiserror::Error;

use crate::HostRange;

/// One mapping of this process (a VMA), or the part of it inside the range that was asked about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// The part inside the range that was asked about.
    pub range: HostRange,
    /// The whole mapping.
    pub whole: HostRange,
    /// What the program may do there.
    pub protection: Protection,
    /// `MAP_SHARED`: writes reach every other mapping of the same pages.
    pub shared: bool,
    /// What backs it.
    pub backing: Backing,
    /// The file it maps, where there is one: also for a memfd, for System V and for anonymous shared memory.
    pub file: Option<FileId>,
    /// Offset in the file of the first byte of `range`, in bytes; 0 without a file.
    pub offset: u64,
}

/// What the program may do with a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Protection {
    /// `PROT_READ`.
    pub read: bool,
    /// `PROT_WRITE`.
    pub write: bool,
    /// `PROT_EXEC`.
    pub exec: bool,
}

/// Identity of a mapped file: equal while either mapping is alive means "the same file".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId {
    /// Major number of the device.
    pub major: u32,
    /// Minor number of the device.
    pub minor: u32,
    /// Inode on that device.
    pub inode: u64,
}

/// What backs a mapping, as far as the kernel's list tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Backing {
    /// Private anonymous memory that is neither `[heap]` nor the main stack.
    Anonymous,
    /// `[heap]`: the C library's main arena, which it trims while it holds its lock.
    Heap,
    /// `[stack]`: the main thread's.
    Stack,
    /// Pages of the kernel's shared-memory file system: memfd, `/dev/shm`, System V, anonymous shared memory.
    SharedMemory,
    /// Any other file.
    File,
    /// `[vvar]`, `[vdso]` and the like, and device mappings (`VM_PFNMAP`, `VM_IO`): no pages a device could be given.
    Special,
}

/// Why the mappings of a range can't be told.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MapsError {
    /// Nothing is mapped at `at`, which lies inside the range.
    #[error("nothing is mapped at {at:#x}, inside range {range}; map the whole range before it is acquired")]
    Hole {
        /// The range that was asked about.
        range: HostRange,
        /// First address without a mapping.
        at: usize,
    },
    /// `/proc/self/maps` can't be opened, read or understood.
    #[error("can't read the list of mappings (/proc/self/maps): {0}; is /proc mounted?")]
    Unreadable(#[source] std::io::Error),
}
