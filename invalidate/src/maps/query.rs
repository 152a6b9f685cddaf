//! The `PROCMAP_QUERY` ioctl of `/proc/<pid>/maps` (`linux/fs.h`, Linux 6.11).

use std::ffi::OsStr;
use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;

use super::{FileId, MAPS, Protection, Raw, backing};
use crate::fault::{self, Call};

/// `struct procmap_query`.
#[repr(C)]
#[derive(Default)]
struct ProcmapQuery {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

const _: () = assert!(size_of::<ProcmapQuery>() == 104 && offset_of!(ProcmapQuery, build_id_addr) == 96);

// `PROCMAP_QUERY_*` of `linux/fs.h`.
const VMA_READABLE: u64 = 0x01;
const VMA_WRITABLE: u64 = 0x02;
const VMA_EXECUTABLE: u64 = 0x04;
const VMA_SHARED: u64 = 0x08;
const COVERING_OR_NEXT_VMA: u64 = 0x10;

nix::ioctl_readwrite!(procmap_query, b'f', 17, ProcmapQuery);

/// The first mapping that ends above `at`.
pub(super) fn covering_or_next(at: usize) -> io::Result<Option<Raw>> {
    let is_too_long = |answer: &io::Result<_>| {
        answer.as_ref().is_err_and(|err: &io::Error| err.raw_os_error() == Some(libc::ENAMETOOLONG))
    };
    // Few names are longer than this, and room has to be cleared.
    let mut answer = named::<128>(at);
    if is_too_long(&answer) {
        answer = named::<{ libc::PATH_MAX as usize }>(at);
    }
    if is_too_long(&answer) {
        // A path longer than any path may be: known to be a file, and told without its name.
        answer = named::<0>(at);
    }
    answer
}

/// As [`covering_or_next`], with room for a name of so many bytes; 0: without the name.
fn named<const ROOM: usize>(at: usize) -> io::Result<Option<Raw>> {
    let mut name = [0_u8; ROOM];
    let mut query = ProcmapQuery {
        size: size_of::<ProcmapQuery>() as u64,
        query_flags: COVERING_OR_NEXT_VMA,
        query_addr: at as u64,
        vma_name_size: ROOM as u32,
        vma_name_addr: if ROOM == 0 { 0 } else { name.as_mut_ptr().expose_provenance() as u64 },
        ..Default::default()
    };
    match MAPS.ask(|maps| ask(maps, &mut query)) {
        Err(err) if err.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
        answer => answer?,
    }
    // The size that comes back counts the terminating zero.
    let name = &name[..(query.vma_name_size as usize).saturating_sub(1).min(ROOM)];
    Ok(Some(raw(&query, OsStr::from_bytes(name))))
}

fn ask(maps: BorrowedFd<'_>, query: &mut ProcmapQuery) -> io::Result<()> {
    fault::at(Call::Query)?;
    // SAFETY: `query` is the structure that PROCMAP_QUERY reads and writes, with its true size in `size`; `vma_name_addr`
    // is null or points at the caller's buffer of `vma_name_size` bytes, which outlives the call.
    unsafe { procmap_query(maps.as_raw_fd(), query) }?;
    Ok(())
}

fn raw(query: &ProcmapQuery, name: &OsStr) -> Raw {
    let has = |flag| query.vma_flags & flag != 0;
    let file = FileId { major: query.dev_major, minor: query.dev_minor, inode: query.inode };
    let file = (file != FileId { major: 0, minor: 0, inode: 0 }).then_some(file);
    Raw {
        start: query.vma_start as usize,
        end: query.vma_end as usize,
        protection: Protection { read: has(VMA_READABLE), write: has(VMA_WRITABLE), exec: has(VMA_EXECUTABLE) },
        shared: has(VMA_SHARED),
        offset: query.vma_offset,
        file,
        backing: backing::classify(name, file),
    }
}
