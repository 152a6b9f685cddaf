//! Makes pages present before they are watched and taken, without touching them.

use std::ptr;

use nix::errno::Errno;
use pinfold_invalidate::{Backing, HostRange, Mapping, Missing, is_all_there, missing};

use crate::{Access, Error};

// linux/mman.h, since Linux 5.14; not in the libc crate for every target.
const MADV_POPULATE_READ: i32 = 22;
const MADV_POPULATE_WRITE: i32 = 23;

/// Ranges of fewer pages are populated without a look at what is there: the look costs about as much as two pages do.
const WORTH_A_LOOK: usize = 8;

/// Faults every page in, as the device will need it: for writing where the device writes, or where a page that is only read now would be
/// replaced by the program's first write (private anonymous memory); for reading elsewhere, so that no file page is copied.
///
/// The kernel takes some 350 ns for a page that is there already and 6 ns to tell that it is, so it is asked first (since Linux 6.7). That leaves
/// alone what a forked process has, too, which the program's next write replaces. Whoever pins such a page for longer is given one of the mapping's own
/// (since Linux 5.19), and whoever follows the page tables is told.
///
/// Kernels before 5.14 don't know how; there the driver's own page faults do it, and cost more.
///
/// `known` is what was seen of the pages a moment ago; they may be gone again, as they may be after this.
pub(crate) fn populate(range: HostRange, access: Access, mappings: &[Mapping], known: Presence) -> Result<(), Error> {
    for mapping in mappings {
        let private = !mapping.shared && mapping.backing != Backing::File;
        let write = mapping.protection.write && (private || access == Access::ReadWrite);
        let advice = if write { MADV_POPULATE_WRITE } else { MADV_POPULATE_READ };
        let fault_in = |piece: HostRange| fault_in(piece, advice).map_err(|errno| fault(range, piece, errno));
        let what = match mapping.backing {
            _ if !write => Some(Missing::Absent),
            Backing::Anonymous | Backing::Heap | Backing::Stack if private => Some(Missing::Zero),
            // Whether a page may be written, or is the mapping's own, takes more to tell.
            _ => None,
        };
        match what.filter(|_| known == Presence::There || mapping.range.pages() >= WORTH_A_LOOK) {
            Some(_) if known == Presence::There => {}
            Some(what) => missing(mapping.range, what, fault_in)?,
            None => fault_in(mapping.range)?,
        }
    }
    Ok(())
}

fn fault_in(piece: HostRange, advice: i32) -> Result<(), Errno> {
    let start = ptr::with_exposed_provenance_mut(piece.start());
    loop {
        match advise(start, piece.len(), advice) {
            None | Some(Errno::EINVAL) => return Ok(()), // done, or an old kernel; device mappings were refused before
            Some(Errno::EINTR | Errno::EAGAIN) => {}
            Some(errno) => return Err(errno),
        }
    }
}

fn fault(range: HostRange, piece: HostRange, errno: Errno) -> Error {
    let why = match errno {
        Errno::EFAULT => "its pages can't be read: the file has been truncated, or reading it fails",
        Errno::ENOMEM => "it was unmapped meanwhile, or there is no memory left for it",
        Errno::EHWPOISON => "it contains a broken page of memory",
        _ => "its pages can't be made present",
    };
    Error::Fault { range: piece.intersection(range).unwrap_or(piece), why, errno: errno as i32 }
}

/// `None`: done.
fn advise(start: *mut libc::c_void, len: usize, advice: i32) -> Option<Errno> {
    #[cfg(test)]
    if let Some(refused) = tests::next_refusal() {
        return Some(refused);
    }
    // SAFETY: populating changes no contents and unmaps nothing; a range that has vanished meanwhile is refused.
    let answer = unsafe { libc::madvise(start, len, advice) };
    if answer == 0 { None } else { Some(Errno::last()) }
}

/// What is known of a range's pages before they are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Presence {
    /// What is mapped is there, and nothing of it is left to be populated where the device reads, or the memory is private.
    There,
    /// They are in memory, so populating them does not wait for a disk.
    Resident,
    Unknown,
}

impl Presence {
    /// Asks the kernel, once if the pages are there. Allocates nothing.
    pub(crate) fn of(range: HostRange) -> Self {
        if is_all_there(range) {
            Self::There
        } else if is_resident(range) {
            Self::Resident
        } else {
            Self::Unknown
        }
    }
}

fn is_resident(range: HostRange) -> bool {
    let mut pages = [0_u8; 512];
    let step = pages.len() * pinfold_invalidate::page_size();
    (range.start()..range.end()).step_by(step).all(|at| {
        let len = step.min(range.end() - at);
        let count = len / pinfold_invalidate::page_size();
        // SAFETY: mincore writes a byte for each page of `len`, which are `count <= pages.len()`; an unmapped address is refused.
        let answer = unsafe { libc::mincore(ptr::with_exposed_provenance_mut(at), len, pages.as_mut_ptr()) };
        answer == 0 && pages[..count].iter().all(|page| page & 1 != 0)
    })
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use pinfold_invalidate::{any_present, mappings, page_size};

    use super::*;

    thread_local! {
        /// What the next calls of this thread are refused with, last first.
        static REFUSALS: RefCell<Vec<Errno>> = const { RefCell::new(Vec::new()) };
    }

    pub(super) fn next_refusal() -> Option<Errno> {
        REFUSALS.with_borrow_mut(Vec::pop)
    }

    /// Populates four fresh pages, the first calls refused with these, and tells what came of it and whether any page is there.
    fn populating(refusals: &[Errno]) -> (HostRange, Result<(), Error>, Option<bool>) {
        let (len, protection) = (4 * page_size(), libc::PROT_READ | libc::PROT_WRITE);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping anywhere; nothing is replaced.
        let at = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        let range = HostRange::from_ptr(at, len).unwrap();
        REFUSALS.set(refusals.iter().rev().copied().collect());
        let result = populate(range, Access::Read, &mappings(range).unwrap(), Presence::Unknown);
        assert!(next_refusal().is_none(), "each was met");
        let present = any_present(range).unwrap();
        // SAFETY: the mapping just made, which no reference points into.
        unsafe { libc::munmap(at, len) };
        (range, result, present)
    }

    #[test]
    fn what_interrupts_populating_is_outlasted() {
        let (_, result, present) = populating(&[Errno::EINTR, Errno::EAGAIN, Errno::EINTR]);
        assert!(result.is_ok() && present != Some(false), "{result:?} {present:?}");
    }

    #[test]
    fn pages_that_are_there_are_not_asked_for_and_those_that_are_not_still_are() {
        let len = 4 * WORTH_A_LOOK * page_size();
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping anywhere; nothing is replaced.
        let at = unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        let range = HostRange::from_ptr(at, len).unwrap();
        let populate = || populate(range, Access::Read, &mappings(range).unwrap(), Presence::Unknown);
        populate().unwrap();
        if any_present(range).unwrap().is_none() {
            return println!("SKIP {}: no PAGEMAP_SCAN here", std::thread::current().name().unwrap_or("?"));
        }
        REFUSALS.set(vec![Errno::EHWPOISON]);
        populate().unwrap();
        assert_eq!(next_refusal(), Some(Errno::EHWPOISON), "nothing was asked for");
        // SAFETY: a page of the mapping, on which nothing relies.
        assert_eq!(unsafe { libc::madvise(at, page_size(), libc::MADV_DONTNEED) }, 0);
        REFUSALS.set(vec![Errno::EHWPOISON]);
        assert!(populate().is_err());
        // SAFETY: as above; the page is there again, and is the page of zeros.
        assert_eq!(unsafe { at.cast::<u8>().read_volatile() }, 0);
        REFUSALS.set(vec![Errno::EHWPOISON]);
        assert!(populate().is_err(), "the first write would replace it");
        // SAFETY: the mapping just made, which no reference points into.
        unsafe { libc::munmap(at, len) };
    }

    #[test]
    fn a_kernel_that_can_not_populate_leaves_it_to_page_faults() {
        let (_, result, present) = populating(&[Errno::EINVAL]);
        assert!(result.is_ok() && present != Some(true), "{result:?} {present:?}");
    }

    #[test]
    fn what_can_not_be_populated_is_a_fault_with_the_kernels_errno() {
        for errno in [Errno::ENOMEM, Errno::EFAULT, Errno::EHWPOISON, Errno::EPERM] {
            let (range, result, _) = populating(&[Errno::EINTR, errno]);
            let Err(Error::Fault { range: told, errno: number, .. }) = result else { panic!("{errno}: {result:?}") };
            assert_eq!((told, number), (range, errno as i32));
        }
    }
}
