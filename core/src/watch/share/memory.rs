//! The two memory files of a shared ring, and their mappings.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::stat::fstat;
use nix::unistd::ftruncate;

use super::super::ring::{ReaderWords, Slot, WriterWords};

/// Where the slots begin in the records' file.
const SLOTS_AT: usize = size_of::<WriterWords>();

/// Both files of a ring, mapped: read and write in the program; in the reader, the records read-only.
///
/// # Invariants
/// `slots` is a power of two, and `records` is [`records_len`] of them long.
#[derive(Debug)]
pub(in super::super) struct SharedRing {
    records: Mapping,
    position: Mapping,
    slots: usize,
}

/// The descriptors that a reader gets.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) records: OwnedFd,
    pub(super) position: OwnedFd,
}

impl SharedRing {
    /// Makes and seals the files of a ring with this many slots, a power of two.
    pub(super) fn create(slots: usize) -> io::Result<(Self, Files)> {
        assert!(slots.is_power_of_two(), "a ring of {slots} slots");
        let records = memory_file(records_len(slots))?;
        // Mapped before the seal: a later writable mapping is refused to everybody.
        let mapped = Mapping::new(&records, records_len(slots), ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)?;
        seal(&records, SealFlag::F_SEAL_FUTURE_WRITE)?;
        let position = memory_file(size_of::<ReaderWords>())?;
        seal(&position, SealFlag::empty())?;
        let words = Mapping::new(&position, size_of::<ReaderWords>(), ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)?;
        Ok((Self { records: mapped, position: words, slots }, Files { records, position }))
    }

    /// Maps what a program sent, with this many slots, a power of two. The sizes and seals are checked, so that no access can fault.
    pub(super) fn open(files: &Files, slots: usize) -> io::Result<Self> {
        assert!(slots.is_power_of_two(), "a ring of {slots} slots");
        let solid = |file: &OwnedFd, len: usize| -> io::Result<bool> {
            let seals = SealFlag::from_bits_retain(fcntl(file, FcntlArg::F_GET_SEALS)?);
            Ok(seals.contains(SealFlag::F_SEAL_SHRINK)
                && usize::try_from(fstat(file)?.st_size).is_ok_and(|size| size >= len))
        };
        if !solid(&files.records, records_len(slots))? || !solid(&files.position, size_of::<ReaderWords>())? {
            return Err(io::Error::from(io::ErrorKind::InvalidData));
        }
        let records = Mapping::new(&files.records, records_len(slots), ProtFlags::PROT_READ)?;
        let both = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let position = Mapping::new(&files.position, size_of::<ReaderWords>(), both)?;
        Ok(Self { records, position, slots })
    }

    #[inline]
    pub(in super::super) fn writer(&self) -> &WriterWords {
        // SAFETY: the mapping is page-aligned, at least `records_len` long and lives as long as `self`; `WriterWords` is made of atomics, for which every
        // bit pattern is valid and which others may write. In a reader the mapping is read-only, and only loads of 8 bytes are done.
        unsafe { self.records.start.cast().as_ref() }
    }

    #[inline]
    pub(in super::super) fn reader(&self) -> &ReaderWords {
        // SAFETY: the mapping is page-aligned, as long as a `ReaderWords` and lives as long as `self`; `ReaderWords` is made of atomics, for which
        // every bit pattern is valid and which others may write.
        unsafe { self.position.start.cast().as_ref() }
    }

    #[inline]
    pub(in super::super) fn slots(&self) -> &[Slot] {
        // SAFETY: `SLOTS_AT` is within the mapping.
        let first = unsafe { self.records.start.add(SLOTS_AT) };
        let slots = NonNull::slice_from_raw_parts(first.cast(), self.slots);
        // SAFETY: the mapping reaches from `first`, which is aligned for a slot as `SLOTS_AT` and pages are, over `slots` slots, and lives as long as
        // `self`; a slot is made of atomics, for which every bit pattern is valid and which others may write. In a reader only loads of 8 bytes are done.
        unsafe { slots.as_ref() }
    }
}

fn records_len(slots: usize) -> usize {
    SLOTS_AT + slots * size_of::<Slot>()
}

fn memory_file(len: usize) -> io::Result<OwnedFd> {
    let file = memfd_create(c"pinfold-watch", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    ftruncate(&file, i64::try_from(len).map_err(io::Error::other)?)?;
    Ok(file)
}

fn seal(file: &OwnedFd, more: SealFlag) -> io::Result<()> {
    let seals = more | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(())
}

/// A shared mapping of the beginning of a file.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread; all access goes through atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(file: impl AsFd, len: usize, protection: ProtFlags) -> io::Result<Self> {
        let size = NonZeroUsize::new(len).expect("a shared file is never empty");
        // SAFETY: without MAP_FIXED the kernel chooses a free place, so no memory in use is touched.
        let start = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, file, 0) }?;
        Ok(Self { start: start.cast(), len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `new` made this mapping with this length, and every reference into it borrowed from `self`.
        let unmapped = unsafe { munmap(self.start.cast(), self.len) };
        debug_assert!(unmapped.is_ok());
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use nix::errno::Errno;
    use pinfold_invalidate::page_size;

    use super::*;

    const SLOTS: usize = 1024;

    fn open_descriptors() -> usize {
        std::fs::read_dir("/proc/self/fd").unwrap().count()
    }

    /// Pages of address space in use, asked without taking any.
    fn pages() -> usize {
        let mut text = [0; 128];
        let file = std::fs::File::open("/proc/self/statm").unwrap();
        let len = nix::unistd::read(&file, &mut text).unwrap();
        str::from_utf8(&text[..len]).unwrap().split(' ').next().unwrap().parse().unwrap()
    }

    fn limit(rlim_cur: u64) {
        let limit = libc::rlimit { rlim_cur, rlim_max: libc::RLIM_INFINITY };
        // SAFETY: the call reads `limit`.
        unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) };
    }

    /// In a process of its own, which the limits are for: with no room for a mapping, with room for one, with room for both.
    #[test]
    fn a_ring_whose_files_can_not_be_mapped_says_so_and_leaves_nothing() {
        // SAFETY: the child only makes calls that allocate at worst, which the C library makes legal after a fork, and leaves by _exit.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let records = records_len(SLOTS).div_ceil(page_size());
            let rounds = [(0, true), (records, true), (records + 1, false)].into_iter().zip(1..);
            let wrong = rounds.filter(|&((room, is_refused), _)| {
                let (descriptors, before) = (open_descriptors(), pages());
                limit(((before + room) * page_size()) as u64);
                let made = SharedRing::create(SLOTS).map(drop);
                limit(libc::RLIM_INFINITY);
                let said = made.as_ref().err().and_then(io::Error::raw_os_error);
                said != is_refused.then_some(Errno::ENOMEM as i32)
                    || (open_descriptors(), pages()) != (descriptors, before)
            });
            let code = wrong.fold(0, |code, (_, round)| code | 1 << round);
            // SAFETY: ends the child without running anything of the parent's.
            unsafe { libc::_exit(code) };
        }
        let mut status = 0;
        // SAFETY: `status` is a live integer that the call writes.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0, "each bit of the exit code is a round that went wrong, the second that of no room");
    }
}
