//! Out: pages of memory files become dma-bufs, through `/dev/udmabuf`.
//!
//! The kernel answers `EINVAL` to everything that is wrong. So everything is looked at before, in the kernel's order, and told by name; the errno
//! is the same.

use std::fs::{self, File, OpenOptions};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::SealFlag;
use nix::sys::stat::fstat;
use pinfold_invalidate::{FileId, Mapping, page_size};

use super::{DmaBuf, DmaBufError, check_seals, sys};
use crate::HostBuffer;

const NODE: &str = "/dev/udmabuf";
/// What the kernel's module has unless configured (`drivers/dma-buf/udmabuf.c`): the most parts in a list, and the most MiB in a buffer.
const LIST_LIMIT: u64 = 1024;
const SIZE_LIMIT_MIB: u64 = 64;

/// A part of a memory file: whole pages.
#[derive(Debug, Clone)]
pub struct MemoryPart<'a> {
    /// The file: a memfd with `F_SEAL_SHRINK`, without `F_SEAL_WRITE` and `F_SEAL_FUTURE_WRITE`.
    pub file: BorrowedFd<'a>,
    /// The bytes of it.
    pub bytes: Range<u64>,
}

/// The maker of dma-bufs out of memory files. Opening it costs a system call: keep it if you export often.
#[derive(Debug)]
pub struct Udmabuf {
    device: File,
}

impl Udmabuf {
    /// Opens `/dev/udmabuf`.
    ///
    /// # Errors
    /// [`DmaBufError::NoDevice`], [`DmaBufError::Denied`].
    pub fn open() -> Result<Self, DmaBufError> {
        let opened = OpenOptions::new().read(true).write(true).open(NODE);
        let failed = |source| DmaBufError::open(NODE.into(), "CONFIG_UDMABUF (Linux 4.20)", "udmabuf", source);
        Ok(Self { device: opened.map_err(failed)? })
    }

    /// A dma-buf of these parts, one after the other. It holds the pages that are in the files now, for as long as it exists.
    ///
    /// # Errors
    /// [`DmaBufError::Part`], [`DmaBufError::Seal`], [`DmaBufError::UdmabufLimit`], [`DmaBufError::System`].
    pub fn export(&self, parts: &[MemoryPart<'_>]) -> Result<DmaBuf, DmaBufError> {
        let items = parts.iter().map(check).collect::<Result<Vec<_>, _>>()?;
        let made = match items[..] {
            [] => return Err(DmaBufError::Part { offset: 0, len: 0, size: 0, step: page_size() as u64 }),
            [one] => sys::udmabuf_create(self.device.as_fd(), one),
            _ => sys::udmabuf_create_list(self.device.as_fd(), &items),
        };
        match made {
            Ok(fd) => DmaBuf::from_fd(fd),
            Err(Errno::EINVAL) => Err(limit_of(&items)),
            Err(errno) => Err(DmaBufError::system("UDMABUF_CREATE", "the memory file")(errno)),
        }
    }
}

fn check(part: &MemoryPart<'_>) -> Result<sys::Item, DmaBufError> {
    let page = page_size() as u64;
    let size = u64::try_from(fstat(part.file).map_err(DmaBufError::system("fstat", "the memory file"))?.st_size);
    let size = size.unwrap_or(0);
    let Range { start: offset, end } = part.bytes;
    let len = end.saturating_sub(offset);
    if len == 0 || end > size || !offset.is_multiple_of(page) || !len.is_multiple_of(page) {
        return Err(DmaBufError::Part { offset, len, size, step: page });
    }
    check_seals(part.file, SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_FUTURE_WRITE)?;
    Ok(sys::Item { memory_file: part.file.as_raw_fd().cast_unsigned(), flags: 0, offset, size: len })
}

/// Which limit it must have been, as nothing else was wrong.
fn limit_of(items: &[sys::Item]) -> DmaBufError {
    let parameter = |name, otherwise| {
        let text = fs::read_to_string(Path::new("/sys/module/udmabuf/parameters").join(name)).unwrap_or_default();
        text.trim().parse().unwrap_or(otherwise)
    };
    let (count, bytes) = (items.len() as u64, items.iter().map(|item| item.size).sum::<u64>());
    let most = parameter("list_limit", LIST_LIMIT);
    if count > most {
        return DmaBufError::UdmabufLimit { asked: count, what: "parts", most, parameter: "udmabuf.list_limit" };
    }
    let most = parameter("size_limit_mb", SIZE_LIMIT_MIB) << 20;
    if bytes > most {
        return DmaBufError::UdmabufLimit { asked: bytes, what: "bytes", most, parameter: "udmabuf.size_limit_mb" };
    }
    DmaBufError::system("UDMABUF_CREATE", "the memory file")(Errno::EINVAL)
}

impl HostBuffer {
    /// A dma-buf of these bytes of the buffer: whole pages, offsets from its start. It stays when the buffer goes.
    ///
    /// # Errors
    /// [`DmaBufError::Seal`] for a [`Sealed`](crate::HostBufferKind::Sealed) buffer, else as [`Udmabuf::open`] and [`Udmabuf::export`].
    pub fn export_dmabuf(&self, bytes: Range<usize>) -> Result<DmaBuf, DmaBufError> {
        let part = MemoryPart { file: self.as_fd(), bytes: bytes.start as u64..bytes.end as u64 };
        check(&part)?; // what is wrong with the buffer is told before what is wrong with the machine
        Udmabuf::open()?.export(&[part])
    }
}

/// The memory file behind a shared mapping, and where in it the mapping starts: through the mapping's own entry in `/proc` where this process
/// may use it, else through a descriptor that the program has open. `None` if it has none.
#[must_use]
pub fn memory_file_of(mapping: &Mapping) -> Option<OwnedFd> {
    let wanted = mapping.file.filter(|_| mapping.shared)?;
    let whole = mapping.whole;
    let entry = format!("/proc/self/map_files/{:x}-{:x}", whole.start(), whole.end());
    if let Some(file) = reopen(Path::new(&entry), wanted) {
        return Some(file);
    }
    let open = fs::read_dir("/proc/self/fd").ok()?;
    open.filter_map(Result::ok).find_map(|entry| reopen(&entry.path(), wanted))
}

/// Opens what `path` leads to, if it is the wanted file. Whoever closes the original meanwhile changes nothing about the copy.
fn reopen(path: &Path, wanted: FileId) -> Option<OwnedFd> {
    let is_wanted = |of: &fs::Metadata| {
        let device = of.dev();
        (libc::major(device), libc::minor(device), of.ino()) == (wanted.major, wanted.minor, wanted.inode)
    };
    // Looked at before it is opened: opening a stranger's pipe or device could do anything.
    fs::metadata(path).ok().filter(is_wanted)?;
    let file = OpenOptions::new().read(true).write(true).open(path).ok()?;
    file.metadata().ok().filter(is_wanted)?;
    Some(file.into())
}
