//! Where a file is mapped: for operations on files, which reach every mapping and which the kernel reports to none.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;

use super::{FileId, MapsError, Raw, Source, mapping_at};
use crate::{HostRange, USER_SPACE_END, page_size};

impl FileId {
    /// The identity that mappings of this file show.
    ///
    /// Asked of the kernel by mapping a page of it for a moment: on stacked file systems (overlayfs, btrfs), `fstat` tells another device.
    ///
    /// # Errors
    /// Those of `fstat`.
    pub fn of(file: BorrowedFd<'_>) -> io::Result<Self> {
        let shown = shown(file).or_else(|| {
            // Open for writing only: mapping takes a descriptor that may read.
            let again = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
            shown(std::os::fd::AsFd::as_fd(&again))
        });
        shown.map_or_else(|| by_stat(file), Ok)
    }
}

fn shown(file: BorrowedFd<'_>) -> Option<FileId> {
    let (len, fd) = (page_size(), file.as_raw_fd());
    // SAFETY: without an address nothing is replaced, and without permission the page can't be touched.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, libc::MAP_PRIVATE, fd, 0) };
    if at == libc::MAP_FAILED {
        return None;
    }
    let mapping = mapping_at(at.expose_provenance());
    // SAFETY: the page was mapped above, nobody else knows it, and nobody watches it.
    unsafe { libc::munmap(at, len) };
    mapping.ok()??.file
}

fn by_stat(file: BorrowedFd<'_>) -> io::Result<FileId> {
    let stat = File::from(file.try_clone_to_owned()?).metadata()?;
    Ok(FileId { major: libc::major(stat.dev()), minor: libc::minor(stat.dev()), inode: stat.ino() })
}

/// The ranges of this process that show bytes `offsets` of the file, rounded out to whole pages, in address order. Walks over every mapping.
///
/// # Errors
/// [`MapsError::Unreadable`].
pub fn mapped_from(file: FileId, offsets: &Range<u64>) -> Result<Vec<HostRange>, MapsError> {
    let (mut source, mut at, mut found) = (Source::preferred()?, 0, Vec::new());
    while let Some(raw) = source.next(at).map_err(MapsError::Unreadable)? {
        if raw.start >= USER_SPACE_END {
            break;
        }
        if raw.file == Some(file) {
            found.extend(part(&raw, offsets));
        }
        at = raw.end;
    }
    Ok(found)
}

/// The pages of a mapping that show any of the bytes.
fn part(raw: &Raw, offsets: &Range<u64>) -> Option<HostRange> {
    if offsets.is_empty() {
        return None; // rounded out, no bytes would be a page
    }
    let page = page_size() as u64;
    let len = (raw.end - raw.start) as u64;
    let first = offsets.start.saturating_sub(raw.offset).min(len) / page * page;
    let last = offsets.end.saturating_sub(raw.offset).min(len).next_multiple_of(page);
    HostRange::from_bounds(raw.start as u64 + first, raw.start as u64 + last)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::maps::{Backing, Protection};

    #[test]
    fn a_part_is_what_shows_any_of_the_bytes_in_whole_pages() {
        let page = page_size();
        let protection = Protection { read: true, write: false, exec: false };
        let raw = Raw {
            start: 100 * page,
            end: 110 * page,
            protection,
            shared: true,
            offset: 5 * page as u64,
            file: None,
            backing: Backing::File,
        };
        for start in 0..20 * 4 {
            for end in start..20 * 4 + 1 {
                // In quarters of pages; page by page is the oracle.
                let offsets = (start * page / 4) as u64..(end * page / 4) as u64;
                let shows = |of: &usize| {
                    let first = ((of + 5) * page) as u64;
                    offsets.start < first + page as u64 && offsets.end > first && !offsets.is_empty()
                };
                let pages: Vec<_> = (0..10).filter(shows).collect();
                let expected =
                    pages.first().map(|first| HostRange::new((100 + first) * page, pages.len() * page).expect("pages"));
                assert_eq!(part(&raw, &offsets), expected, "{offsets:?}");
            }
        }
    }
}
