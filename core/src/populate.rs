//! Makes pages present before they are watched and taken, without touching them.

use std::ptr;

use nix::errno::Errno;
use pinfold_invalidate::{Backing, HostRange, Mapping};

use crate::{Access, Error};

// linux/mman.h, since Linux 5.14; not in the libc crate for every target.
const MADV_POPULATE_READ: i32 = 22;
const MADV_POPULATE_WRITE: i32 = 23;

/// Faults every page in, as the device will need it: for writing where the device writes, or where a page that is only read now would be
/// replaced by the program's first write (private anonymous memory); for reading elsewhere, so that no file page is copied.
///
/// Kernels before 5.14 don't know how; there the driver's own page faults do it, and cost more.
pub(crate) fn populate(range: HostRange, access: Access, mappings: &[Mapping]) -> Result<(), Error> {
    for mapping in mappings {
        let private = !mapping.shared && mapping.backing != Backing::File;
        let write = mapping.protection.write && (private || access == Access::ReadWrite);
        let advice = if write { MADV_POPULATE_WRITE } else { MADV_POPULATE_READ };
        let piece = mapping.range;
        let start = ptr::with_exposed_provenance_mut(piece.start());
        loop {
            // SAFETY: populating changes no contents and unmaps nothing; a range that has vanished meanwhile is refused.
            let answer = unsafe { libc::madvise(start, piece.len(), advice) };
            match if answer == 0 { None } else { Some(Errno::last()) } {
                None | Some(Errno::EINVAL) => break, // done, or an old kernel; device mappings were refused before
                Some(Errno::EINTR | Errno::EAGAIN) => {}
                Some(errno) => {
                    let why = match errno {
                        Errno::EFAULT => "its pages can't be read: the file has been truncated, or reading it fails",
                        Errno::ENOMEM => "it was unmapped meanwhile, or there is no memory left for it",
                        Errno::EHWPOISON => "it contains a broken page of memory",
                        _ => "its pages can't be made present",
                    };
                    return Err(Error::Fault {
                        range: piece.intersection(range).unwrap_or(piece),
                        why,
                        errno: errno as i32,
                    });
                }
            }
        }
    }
    Ok(())
}

/// Whether all pages are in memory, so that taking them does not block. Allocates nothing.
pub(crate) fn resident(range: HostRange) -> bool {
    let mut pages = [0_u8; 64];
    let step = pages.len() * pinfold_invalidate::page_size();
    (range.start()..range.end()).step_by(step).all(|at| {
        let len = step.min(range.end() - at);
        let count = len / pinfold_invalidate::page_size();
        // SAFETY: mincore writes a byte for each page of `len`, which are `count <= pages.len()`; an unmapped address is refused.
        let answer = unsafe { libc::mincore(ptr::with_exposed_provenance_mut(at), len, pages.as_mut_ptr()) };
        answer == 0 && pages[..count].iter().all(|page| page & 1 != 0)
    })
}
