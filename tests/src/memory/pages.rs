//! Looking at memory without touching it, and touching it without a reference.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt;

use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;
use pinfold_invalidate::{HostRange, page_size};

/// Reads `len` bytes at an address of this process.
///
/// # Errors
/// `EFAULT` if not all of them can be read.
pub fn peek(address: usize, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let from = [RemoteIoVec { base: address, len }];
    let done = process_vm_readv(Pid::this(), &mut [IoSliceMut::new(&mut bytes)], &from)?;
    if done == len { Ok(bytes) } else { Err(io::Error::from_raw_os_error(libc::EFAULT)) }
}

/// Writes bytes at an address of this process.
///
/// # Errors
/// `EFAULT` if not all of it can be written.
pub fn poke(address: usize, bytes: &[u8]) -> io::Result<()> {
    let to = [RemoteIoVec { base: address, len: bytes.len() }];
    let done = process_vm_writev(Pid::this(), &[IoSlice::new(bytes)], &to)?;
    if done == bytes.len() { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EFAULT)) }
}

/// How many pages of the range this process has in its page table (or in swap). Touches none; holes count as absent.
///
/// # Panics
/// If the kernel has no `/proc/self/pagemap`.
#[must_use]
pub fn present_pages(range: HostRange) -> usize {
    const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
    let pagemap = File::open("/proc/self/pagemap").expect("/proc/self/pagemap");
    let mut entries = vec![0; range.pages() * 8];
    let offset = (range.start() / page_size() * 8) as u64;
    pagemap.read_exact_at(&mut entries, offset).expect("pagemap covers all of user space");
    entries
        .chunks_exact(8)
        .filter(|entry| {
            u64::from_ne_bytes((*entry).try_into().expect("an entry has 8 bytes")) & PRESENT_OR_SWAPPED != 0
        })
        .count()
}

/// How many pages of a mapped range are in memory at all: for a file mapping, in the page cache, whether this process has used them or not.
///
/// # Errors
/// `ENOMEM` if the range has a hole.
pub fn cached_pages(range: HostRange) -> io::Result<usize> {
    let mut states = vec![0_u8; range.pages()];
    let start = std::ptr::without_provenance_mut(range.start());
    // SAFETY: mincore only looks at the range, and writes one byte per page into `states`, which has that many.
    if unsafe { libc::mincore(start, range.len(), states.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(states.iter().filter(|&&state| state & 1 != 0).count())
}

/// The first mapping in `/proc/self/maps` whose line ends in `name`, such as `[heap]` or `[vvar]`.
///
/// Memory found this way belongs to the C library or the kernel: tests register it and let devices read it, and do nothing else to it.
#[must_use]
pub fn find_mapping(name: &str) -> Option<HostRange> {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("/proc/self/maps");
    let line = maps.lines().find(|line| line.ends_with(name))?;
    let (start, end) = line.split_once(' ')?.0.split_once('-')?;
    HostRange::from_bounds(u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?)
}
