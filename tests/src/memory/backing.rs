//! The kinds of memory, and how one is made.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use pinfold_invalidate::{HostRange, any_present};

use crate::skip_part;

/// What backs a [`Region`](super::Region), and how it is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Backing {
    /// Private anonymous memory.
    Anonymous,
    /// The same, advised to use huge pages. It begins at a multiple of 2 MiB.
    AnonymousHuge,
    /// Shared anonymous memory.
    AnonymousShared,
    /// A memfd, shared and writable.
    Memfd,
    /// A memfd, mapped privately and writable.
    MemfdPrivate,
    /// A file in `/dev/shm`, shared and writable.
    Shm,
    /// A file on a file system with a disk behind it, shared and writable.
    FileShared,
    /// The same kind of file, mapped privately and writable.
    FilePrivate,
    /// The same kind of file, opened for reading and mapped privately without `PROT_WRITE`: how a loader maps its assets.
    FileReadOnly,
    /// The same, mapped shared. The kernel does not let userfaultfd watch it.
    FileSharedReadOnly,
    /// A memfd sealed against future writes, mapped shared without `PROT_WRITE`. Can't be watched either.
    MemfdSealedReadOnly,
    /// Private anonymous memory from the pool of huge pages, which is empty on most machines: not among [`ALL`](Self::ALL). In whole huge pages
    /// only.
    HugeTlb,
}

impl Backing {
    /// Every kind that each machine has.
    pub const ALL: [Self; 11] = [
        Self::Anonymous,
        Self::AnonymousHuge,
        Self::AnonymousShared,
        Self::Memfd,
        Self::MemfdPrivate,
        Self::Shm,
        Self::FileShared,
        Self::FilePrivate,
        Self::FileReadOnly,
        Self::FileSharedReadOnly,
        Self::MemfdSealedReadOnly,
    ];

    /// Whether the mapping is shared: it survives as another mapping of the same pages.
    #[must_use]
    pub fn shared(self) -> bool {
        use Backing::{AnonymousShared, FileShared, FileSharedReadOnly, Memfd, MemfdSealedReadOnly, Shm};
        matches!(self, AnonymousShared | Memfd | Shm | FileShared | FileSharedReadOnly | MemfdSealedReadOnly)
    }

    /// Whether the program may write.
    #[must_use]
    pub fn writable(self) -> bool {
        !matches!(self, Self::FileReadOnly | Self::FileSharedReadOnly | Self::MemfdSealedReadOnly)
    }

    /// Whether this kernel's userfaultfd can watch it.
    #[must_use]
    pub fn watchable(self) -> bool {
        (self.writable() || !self.shared()) && (!self.on_disk() || files_are_watched())
    }

    /// Whether its pages are those of a file system with a disk behind it.
    #[must_use]
    pub fn on_disk(self) -> bool {
        use Backing::{FilePrivate, FileReadOnly, FileShared, FileSharedReadOnly};
        matches!(self, FilePrivate | FileReadOnly | FileShared | FileSharedReadOnly)
    }

    /// Flags for `mmap`, without those that say where.
    pub(super) fn flags(self) -> i32 {
        let anonymous = matches!(self, Self::Anonymous | Self::AnonymousHuge | Self::AnonymousShared | Self::HugeTlb);
        let huge = if self == Self::HugeTlb { libc::MAP_HUGETLB } else { 0 };
        huge | (if self.shared() { libc::MAP_SHARED } else { libc::MAP_PRIVATE })
            | if anonymous { libc::MAP_ANONYMOUS } else { 0 }
    }

    /// Protection for `mmap`.
    pub(super) fn protection(self) -> i32 {
        libc::PROT_READ | if self.writable() { libc::PROT_WRITE } else { 0 }
    }

    /// The file behind it, `contents` long, or `None` for anonymous memory.
    pub(super) fn file(self, contents: impl FnOnce() -> Vec<u8>) -> io::Result<Option<Source>> {
        let source = match self {
            Self::Anonymous | Self::AnonymousHuge | Self::AnonymousShared | Self::HugeTlb => return Ok(None),
            Self::Memfd | Self::MemfdPrivate | Self::MemfdSealedReadOnly => {
                let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
                Source { file: File::from(memfd_create(c"pinfold-tests", flags)?), path: None }
            }
            Self::Shm => Source::create(&[SHM.into()], false)?,
            _ => Source::create(&disks(), true)?,
        };
        std::io::Write::write_all(&mut &source.file, &contents())?;
        if self == Self::MemfdSealedReadOnly {
            fcntl(&source.file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_FUTURE_WRITE))?;
        }
        if !self.writable() && self.on_disk() {
            return source.reopened_read_only().map(Some);
        }
        Ok(Some(source))
    }
}

/// Where shared memory has names.
const SHM: &str = "/dev/shm";

/// Where there may be a disk.
fn disks() -> Vec<PathBuf> {
    [std::env::temp_dir(), "/var/tmp".into()].into_iter().chain(std::env::current_dir()).collect()
}

fn name_prefix(process: u32) -> String {
    format!("pinfold-tests-{process}-")
}

/// Removes the files behind regions of a process that has ended without dropping them. Returns how many.
pub(crate) fn remove_left_by(process: u32) -> usize {
    let prefix = name_prefix(process);
    let folders = disks().into_iter().chain([SHM.into()]);
    let entries = folders.filter_map(|folder| std::fs::read_dir(folder).ok()).flatten().flatten();
    let left = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
    left.filter(|entry| std::fs::remove_file(entry.path()).is_ok()).count()
}

/// The file behind a region; its name goes when the region goes.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) file: File,
    path: Option<PathBuf>,
}

impl Source {
    /// A new file in the first of the folders that takes one, and has a disk behind it if that is wanted.
    fn create(folders: &[PathBuf], disk: bool) -> io::Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = format!("{}{}", name_prefix(std::process::id()), COUNT.fetch_add(1, Ordering::Relaxed));
        for folder in folders {
            let path = folder.join(&name);
            let Ok(file) = OpenOptions::new().read(true).write(true).create_new(true).open(&path) else { continue };
            let source = Self { file, path: Some(path) };
            if !disk || fstatfs(&source.file)?.filesystem_type() != TMPFS_MAGIC {
                return Ok(source);
            }
        }
        let why = format!("no folder of {folders:?} takes a file{}", if disk { " with a disk behind it" } else { "" });
        Err(io::Error::new(io::ErrorKind::NotFound, why))
    }

    fn reopened_read_only(mut self) -> io::Result<Self> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        self.file = File::open(path)?;
        Ok(self)
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // The test may have removed it itself.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Whether the kernel watches mapped files on disks: since Linux 6.7, with which `PAGEMAP_SCAN` came, too. That one is easily asked for.
fn files_are_watched() -> bool {
    static ANSWER: LazyLock<bool> = LazyLock::new(|| {
        let here = 0_u8;
        let page = HostRange::cover(&raw const here, 1).expect("a page of the stack");
        let answer = !matches!(any_present(page), Ok(None));
        if !answer {
            skip_part!("this kernel watches no mapped files (Linux 6.7)");
        }
        answer
    });
    *ANSWER
}
