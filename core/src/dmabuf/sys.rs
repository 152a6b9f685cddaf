//! The ioctls of `linux/dma-buf.h`, `linux/udmabuf.h`, `linux/dma-heap.h` and `linux/sync_file.h`, each as one function.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::statfs::FsType;

/// `DMA_BUF_MAGIC` of `linux/magic.h`: the file system of all dma-bufs.
pub(super) const DMA_BUF_MAGIC: FsType = FsType(0x444d_4142);

pub(super) const SYNC_READ: u64 = 1;
pub(super) const SYNC_WRITE: u64 = 2;
const SYNC_END: u64 = 4;

/// `struct dma_buf_sync`.
#[repr(C)]
struct Sync {
    flags: u64,
}

/// `struct dma_buf_export_sync_file` and `struct dma_buf_import_sync_file`.
#[repr(C)]
struct SyncFd {
    flags: u32,
    fd: i32,
}

/// `struct udmabuf_create_item`; the first is also `struct udmabuf_create`, whose second word is flags.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Item {
    pub(super) memory_file: u32,
    pub(super) flags: u32,
    pub(super) offset: u64,
    pub(super) size: u64,
}

/// The head of `struct udmabuf_create_list`.
#[repr(C)]
struct ListHead {
    flags: u32,
    count: u32,
}

/// `UDMABUF_FLAGS_CLOEXEC`.
pub(super) const CLOEXEC: u32 = 1;

/// `struct dma_heap_allocation_data`.
#[repr(C)]
struct Allocation {
    len: u64,
    fd: u32,
    fd_flags: u32,
    heap_flags: u64,
}

/// `struct sync_file_info`.
#[repr(C)]
#[derive(Default)]
struct FileInfo {
    name: [u8; 32],
    status: i32,
    flags: u32,
    num_fences: u32,
    pad: u32,
    sync_fence_info: u64,
}

mod raw {
    use super::{Allocation, FileInfo, Item, ListHead, Sync, SyncFd};

    nix::ioctl_write_ptr!(sync, b'b', 0, Sync);
    nix::ioctl_write_ptr!(set_name, b'b', 1, u64);
    nix::ioctl_readwrite!(export_sync_file, b'b', 2, SyncFd);
    nix::ioctl_write_ptr!(import_sync_file, b'b', 3, SyncFd);
    nix::ioctl_write_ptr!(udmabuf_create, b'u', 0x42, Item);
    nix::ioctl_write_ptr!(udmabuf_create_list, b'u', 0x43, ListHead);
    nix::ioctl_readwrite!(heap_alloc, b'H', 0, Allocation);
    nix::ioctl_readwrite!(file_info, b'>', 4, FileInfo);
}

/// Opens or closes a bracket. The kernel may be interrupted, or ask to be asked again; it means the same call either way.
pub(super) fn sync(fd: BorrowedFd<'_>, access: u64, end: bool) -> Result<(), Errno> {
    let argument = Sync { flags: access | if end { SYNC_END } else { 0 } };
    loop {
        // SAFETY: `argument` is the structure that the call reads.
        match unsafe { raw::sync(fd.as_raw_fd(), &raw const argument) } {
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => std::thread::yield_now(),
            answer => return answer.map(|_| ()),
        }
    }
}

/// `name` ends in a zero byte.
pub(super) fn set_name(fd: BorrowedFd<'_>, name: &[u8; super::NAME_LEN]) -> Result<(), Errno> {
    // SAFETY: the call takes the pointer itself as its argument and reads a string of at most 32 bytes with its zero byte there.
    unsafe { raw::set_name(fd.as_raw_fd(), name.as_ptr().cast()) }.map(|_| ())
}

/// A sync_file of what work of this access would have to wait for.
pub(super) fn export_sync_file(fd: BorrowedFd<'_>, access: u64) -> Result<OwnedFd, Errno> {
    let mut argument = SyncFd { flags: access as u32, fd: -1 };
    // SAFETY: `argument` is the structure that the call reads and writes.
    unsafe { raw::export_sync_file(fd.as_raw_fd(), &raw mut argument) }?;
    // SAFETY: the call has just made this descriptor (close-on-exec) for us.
    Ok(unsafe { OwnedFd::from_raw_fd(argument.fd) })
}

pub(super) fn import_sync_file(fd: BorrowedFd<'_>, file: BorrowedFd<'_>, access: u64) -> Result<(), Errno> {
    let argument = SyncFd { flags: access as u32, fd: file.as_raw_fd() };
    // SAFETY: `argument` is the structure that the call reads.
    unsafe { raw::import_sync_file(fd.as_raw_fd(), &raw const argument) }.map(|_| ())
}

/// A dma-buf of one part of a memory file.
pub(super) fn udmabuf_create(device: BorrowedFd<'_>, item: Item) -> Result<OwnedFd, Errno> {
    let item = Item { flags: CLOEXEC, ..item };
    // SAFETY: `item` is the structure that the call reads.
    let fd = unsafe { raw::udmabuf_create(device.as_raw_fd(), &raw const item) }?;
    // SAFETY: the call has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A dma-buf of several parts, one after the other.
pub(super) fn udmabuf_create_list(device: BorrowedFd<'_>, items: &[Item]) -> Result<OwnedFd, Errno> {
    // Head and items are one piece of memory: the head takes the last 8 bytes of an item that comes first and is otherwise unused.
    const HEAD_AT: usize = size_of::<Item>() - size_of::<ListHead>();
    let count = u32::try_from(items.len()).map_err(|_| Errno::EINVAL)?;
    let head = u64::from_ne_bytes({
        let mut words = [0; 8];
        words[..4].copy_from_slice(&CLOEXEC.to_ne_bytes());
        words[4..].copy_from_slice(&count.to_ne_bytes());
        words
    });
    let mut all = Vec::with_capacity(items.len() + 1);
    all.push(Item { memory_file: 0, flags: 0, offset: 0, size: head });
    all.extend_from_slice(items);
    let start = all.as_ptr().cast::<u8>().wrapping_add(HEAD_AT).cast();
    // SAFETY: the call reads a head at `start`, which is aligned for its words, and the `count` items right behind it, all inside `all`.
    let fd = unsafe { raw::udmabuf_create_list(device.as_raw_fd(), start) }?;
    // SAFETY: the call has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A dma-buf of `len` new bytes, read and write, close-on-exec.
pub(super) fn heap_alloc(heap: BorrowedFd<'_>, len: u64) -> Result<OwnedFd, Errno> {
    let flags = libc::O_RDWR | libc::O_CLOEXEC;
    let mut argument = Allocation { len, fd: 0, fd_flags: flags.cast_unsigned(), heap_flags: 0 };
    // SAFETY: `argument` is the structure that the call reads and writes.
    unsafe { raw::heap_alloc(heap.as_raw_fd(), &raw mut argument) }?;
    // SAFETY: the call has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(argument.fd.cast_signed()) })
}

/// 1: signalled, 0: not yet, negative: an errno.
pub(super) fn sync_file_status(file: BorrowedFd<'_>) -> Result<i32, Errno> {
    let mut info = FileInfo::default();
    // SAFETY: `info` is the structure that the call reads and writes; with no room for fences it fills in the head only.
    unsafe { raw::file_info(file.as_raw_fd(), &raw mut info) }?;
    Ok(info.status)
}
