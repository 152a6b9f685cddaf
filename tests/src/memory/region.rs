//! A piece of mapped memory, and the system calls that change it.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::without_provenance_mut;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use pinfold_invalidate::{HostRange, page_size};

use super::backing::Source;
use super::{Backing, pages};

/// Mapped pages of one kind. Operations name pages by number, and may be called by several threads at once, as a program's would be.
#[derive(Debug)]
pub struct Region {
    range: HostRange,
    backing: Backing,
    source: Option<Source>,
    /// Which pages are this region's. Written before the system call that gives one up, and after the one that takes one; never held
    /// across either, as these calls may be held off for long.
    held: Mutex<Vec<bool>>,
}

/// How [`Region::relocate`] moves pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Move {
    /// The old place is unmapped.
    Away,
    /// The old place stays mapped, without its pages (`MREMAP_DONTUNMAP`).
    DontUnmap,
}

impl Region {
    /// Maps `pages` pages, each filled with its own number plus one (modulo 251), so that no page looks like fresh memory.
    /// Anonymous pages are touched thereby; those of a mapped file are only in the page cache.
    ///
    /// # Errors
    /// Those of the system calls; `NotFound` if there is no suitable place for a file.
    pub fn new(backing: Backing, pages: usize) -> io::Result<Self> {
        let region = Self::untouched(backing, pages)?;
        if region.source.is_none() {
            region.write(0, &pattern(0..pages))?;
        }
        Ok(region)
    }

    /// As [`new`](Self::new), but anonymous memory is left as the kernel gives it: not one page is present.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn untouched(backing: Backing, pages: usize) -> io::Result<Self> {
        let source = backing.file(|| pattern(0..pages))?;
        let range = reserve(pages * page_size(), align_of(backing))?;
        let region = Self { range, backing, source, held: Mutex::new(vec![true; pages]) };
        region.map(region.range, 0, libc::MAP_FIXED)?;
        if backing == Backing::AnonymousHuge {
            region.advise(0..pages, libc::MADV_HUGEPAGE)?;
        }
        Ok(region)
    }

    /// Private anonymous memory that is mapped already and nobody uses: a part of the stack or of the heap. It becomes the region's, with its
    /// contents, and is unmapped with it.
    ///
    /// # Safety
    /// The pages are the caller's to give, and no reference points into them.
    #[must_use]
    pub unsafe fn adopt(range: HostRange) -> Self {
        Self { range, backing: Backing::Anonymous, source: None, held: Mutex::new(vec![true; range.pages()]) }
    }

    /// All of it.
    #[must_use]
    pub fn range(&self) -> HostRange {
        self.range
    }

    /// Some of its pages.
    ///
    /// # Panics
    /// If there are no such pages.
    #[must_use]
    pub fn part(&self, pages: Range<usize>) -> HostRange {
        let part = HostRange::new(self.range.start() + pages.start * page_size(), pages.len() * page_size());
        let part = part.expect("pages of a region are a range");
        assert!(self.range.covers(part), "pages {pages:?} of a region of {}", self.range.pages());
        part
    }

    /// The kind of memory.
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// The file behind it.
    ///
    /// # Panics
    /// If it is anonymous.
    #[must_use]
    pub fn file(&self) -> BorrowedFd<'_> {
        self.source.as_ref().expect("this kind of memory has a file").file.as_fd()
    }

    /// Reads through the program's mapping.
    ///
    /// # Errors
    /// `EFAULT` where nothing readable is mapped.
    pub fn read(&self, offset: usize, len: usize) -> io::Result<Vec<u8>> {
        pages::peek(self.range.start() + offset, len)
    }

    /// Writes through the program's mapping.
    ///
    /// # Errors
    /// `EFAULT` where nothing writable is mapped.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> io::Result<()> {
        pages::poke(self.range.start() + offset, bytes)
    }

    /// Fills whole pages with one byte.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn fill(&self, pages: Range<usize>, byte: u8) -> io::Result<()> {
        self.write(pages.start * page_size(), &vec![byte; pages.len() * page_size()])
    }

    /// What [`new`](Self::new) put into these pages.
    #[must_use]
    pub fn original(&self, pages: Range<usize>) -> Vec<u8> {
        pattern(pages)
    }

    /// How many of its pages this process has in its page table.
    #[must_use]
    pub fn present(&self) -> usize {
        pages::present_pages(self.range)
    }

    /// `munmap`.
    ///
    /// # Errors
    /// Those of `munmap`.
    pub fn unmap(&self, pages: Range<usize>) -> io::Result<()> {
        let part = self.part(pages.clone());
        self.mark(pages, false);
        // SAFETY: no reference points into a region, and the pages were its own.
        check(unsafe { libc::munmap(without_provenance_mut(part.start()), part.len()) })
    }

    /// `munmap` of all of it.
    ///
    /// # Errors
    /// Those of `munmap`.
    pub fn unmap_all(&self) -> io::Result<()> {
        self.unmap(0..self.range.pages())
    }

    /// Maps the same kind of memory over the pages by `MAP_FIXED`: fresh zeros, or the same file again.
    ///
    /// # Errors
    /// `EEXIST` if they had been unmapped and somebody else got the address; those of `mmap`.
    pub fn map_over(&self, pages: Range<usize>) -> io::Result<()> {
        let part = self.part(pages.clone());
        let all_held = self.held.lock().expect("no panic under this lock")[pages.clone()].iter().all(|&held| held);
        self.map(part, pages.start, if all_held { libc::MAP_FIXED } else { libc::MAP_FIXED_NOREPLACE })?;
        self.mark(pages, true);
        Ok(())
    }

    /// `madvise`.
    ///
    /// # Errors
    /// Those of `madvise`.
    pub fn advise(&self, pages: Range<usize>, advice: i32) -> io::Result<()> {
        let part = self.part(pages);
        // SAFETY: no reference points into a region, so none can see its contents change.
        check(unsafe { libc::madvise(without_provenance_mut(part.start()), part.len(), advice) })
    }

    /// `mprotect`.
    ///
    /// # Errors
    /// Those of `mprotect`.
    pub fn protect(&self, pages: Range<usize>, protection: i32) -> io::Result<()> {
        let part = self.part(pages);
        // SAFETY: no reference points into a region; system calls that meet the pages answer EFAULT.
        check(unsafe { libc::mprotect(without_provenance_mut(part.start()), part.len(), protection) })
    }

    /// `mremap` of the pages to a place of its own, which becomes a region of its own.
    ///
    /// # Errors
    /// Those of `mremap`; `EINVAL` for `DontUnmap` of what the kernel can't do it for.
    pub fn relocate(&self, pages: Range<usize>, how: Move) -> io::Result<Self> {
        let part = self.part(pages.clone());
        let to = reserve(part.len(), align_of(self.backing))?;
        // If the call fails, this unmaps the reservation again.
        let moved = Self { range: to, backing: self.backing, source: None, held: Mutex::new(vec![true; pages.len()]) };
        let mut flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        match how {
            Move::Away => self.mark(pages.clone(), false),
            Move::DontUnmap => flags |= libc::MREMAP_DONTUNMAP,
        }
        let (from, to) = (without_provenance_mut(part.start()), without_provenance_mut::<u8>(to.start()));
        // SAFETY: both ranges belong to regions, into which no reference points.
        let at = unsafe { libc::mremap(from, part.len(), part.len(), flags, to) };
        if at == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            self.mark(pages, true);
            return Err(error);
        }
        Ok(moved)
    }

    /// `mremap` to fewer pages, in place.
    ///
    /// # Errors
    /// Those of `mremap`.
    pub fn shrink(&self, pages: usize) -> io::Result<()> {
        self.mark(pages..self.range.pages(), false);
        let start = without_provenance_mut(self.range.start());
        // SAFETY: the range is this region's, into which no reference points; shrinking never moves.
        let at = unsafe { libc::mremap(start, self.range.len(), pages * page_size(), 0) };
        if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// `mremap` to more pages, in place. What is new belongs to nobody until [`ungrow`](Self::ungrow).
    ///
    /// # Errors
    /// Those of `mremap`: `ENOMEM` if something is in the way.
    pub fn grow(&self, pages: usize) -> io::Result<()> {
        let start = without_provenance_mut::<libc::c_void>(self.range.start());
        // SAFETY: the range is this region's, into which no reference points; without MREMAP_MAYMOVE it stays where it is.
        let at = unsafe { libc::mremap(start, self.range.len(), pages * page_size(), 0) };
        if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Unmaps what [`grow`](Self::grow) to so many pages has added.
    ///
    /// # Errors
    /// Those of `munmap`.
    pub fn ungrow(&self, pages: usize) -> io::Result<()> {
        let len = pages * page_size() - self.range.len();
        // SAFETY: the pages that `grow` has mapped, which nobody knows.
        check(unsafe { libc::munmap(without_provenance_mut(self.range.end()), len) })
    }

    /// `ftruncate` of the file to so many pages.
    ///
    /// # Errors
    /// Those of `ftruncate`; `EPERM` if it is sealed, `EINVAL` if it is open for reading only.
    pub fn truncate(&self, pages: usize) -> io::Result<()> {
        let len = i64::try_from(pages * page_size()).expect("a file's length is a positive i64");
        Ok(nix::unistd::ftruncate(self.file(), len)?)
    }

    /// `fallocate` that punches a hole into the file.
    ///
    /// # Errors
    /// Those of `fallocate`.
    pub fn punch_hole(&self, pages: Range<usize>) -> io::Result<()> {
        let offset = |page: usize| i64::try_from(page * page_size()).expect("a file's length is a positive i64");
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: fallocate takes numbers only, and no reference points into the mapping whose contents change.
        check(unsafe { libc::fallocate(self.file().as_raw_fd(), mode, offset(pages.start), offset(pages.len())) })
    }

    fn map(&self, part: HostRange, first_page: usize, how: i32) -> io::Result<()> {
        let fd = self.source.as_ref().map_or(-1, |source| source.file.as_raw_fd());
        let offset =
            if fd < 0 { 0 } else { i64::try_from(first_page * page_size()).expect("an offset is a positive i64") };
        let (protection, flags) = (self.backing.protection(), self.backing.flags() | how);
        // SAFETY: with MAP_FIXED the range is this region's own, into which no reference points; with MAP_FIXED_NOREPLACE nothing is replaced.
        let at = unsafe { libc::mmap(without_provenance_mut(part.start()), part.len(), protection, flags, fd, offset) };
        if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn mark(&self, pages: Range<usize>, held: bool) {
        self.held.lock().expect("no panic under this lock")[pages].fill(held);
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let held = std::mem::take(self.held.get_mut().expect("no panic under this lock"));
        let mut first = 0;
        // One call per run of pages, so that a region that is still whole goes in one piece, as a program's would.
        for run in held.chunk_by(|a, b| a == b) {
            let start = without_provenance_mut(self.range.start() + first * page_size());
            if run[0] {
                // SAFETY: the pages are this region's, into which no reference points.
                unsafe { libc::munmap(start, run.len() * page_size()) };
            }
            first += run.len();
        }
    }
}

/// A multiple of what such a mapping begins at.
fn align_of(backing: Backing) -> usize {
    if matches!(backing, Backing::AnonymousHuge | Backing::HugeTlb) { 2 << 20 } else { page_size() }
}

/// Address space that nobody else is given: mapped without any permission.
///
/// Far below where the kernel puts mappings by itself, from the top down. So a hole that a test makes stays a hole: no thread's stack fills it.
fn reserve(len: usize, align: usize) -> io::Result<HostRange> {
    static NEXT: AtomicUsize = AtomicUsize::new(0x2000_0000_0000);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let spare = align - page_size();
    let wished = NEXT.fetch_add((len + spare).next_multiple_of(1 << 20) + (1 << 20), Ordering::Relaxed);
    // SAFETY: without MAP_FIXED the address is a wish, and nothing is replaced.
    let at = unsafe { libc::mmap(without_provenance_mut(wished), len + spare, libc::PROT_NONE, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let start = at.addr().next_multiple_of(align);
    let (before, after) = (start - at.addr(), spare - (start - at.addr()));
    for (from, len) in [(at.addr(), before), (start + len, after)] {
        if len > 0 {
            // SAFETY: a part of the reservation above, which nobody has seen yet.
            check(unsafe { libc::munmap(without_provenance_mut(from), len) })?;
        }
    }
    Ok(HostRange::new(start, len).expect("mmap gives aligned user memory"))
}

fn pattern(pages: Range<usize>) -> Vec<u8> {
    let mut bytes = vec![0; pages.len() * page_size()];
    for (page, contents) in pages.zip(bytes.chunks_exact_mut(page_size())) {
        contents.fill(u8::try_from(page % 251 + 1).expect("at most 251"));
    }
    bytes
}

fn check(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::skip_part;

    #[test]
    fn every_kind_holds_its_pattern_and_can_be_written_where_it_says_so() {
        for backing in Backing::ALL {
            let region = match Region::new(backing, 4) {
                Ok(region) => region,
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    skip_part!("{backing:?}: {e}");
                    continue;
                }
                Err(e) => panic!("{backing:?}: {e}"),
            };
            assert_eq!(region.read(0, 4 * page_size()).expect("readable"), region.original(0..4), "{backing:?}");
            // process_vm_writev goes by the mapping's permissions, so it is an oracle for them.
            assert_eq!(region.fill(1..2, 0xaa).is_ok(), backing.writable(), "{backing:?}");
        }
    }

    #[test]
    fn untouched_memory_has_no_page_and_a_read_brings_one() {
        for backing in [Backing::Anonymous, Backing::Memfd, Backing::AnonymousShared] {
            let region = Region::untouched(backing, 4).expect("mapped");
            assert_eq!(region.present(), 0, "{backing:?}");
            region.fill(2..3, 1).expect("writable");
            assert_eq!(region.present(), 1, "{backing:?}");
        }
    }

    #[test]
    fn what_is_unmapped_can_be_mapped_again_at_the_same_place() {
        let region = Region::new(Backing::Memfd, 4).expect("mapped");
        region.unmap(1..3).expect("unmapped");
        assert_eq!(region.read(page_size(), 1).expect_err("a hole").raw_os_error(), Some(libc::EFAULT));
        region.map_over(1..3).expect("mapped again");
        assert_eq!(region.read(0, 4 * page_size()).expect("readable"), region.original(0..4));
    }

    #[test]
    fn a_region_never_unmaps_what_it_has_given_up() {
        let region = Region::new(Backing::Anonymous, 1).expect("mapped");
        region.unmap_all().expect("unmapped");
        let at = without_provenance_mut(region.range().start());
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: MAP_FIXED_NOREPLACE replaces nothing.
        let other = unsafe { libc::mmap(at, page_size(), libc::PROT_READ, flags, -1, 0) };
        if other == libc::MAP_FAILED {
            // Another test's thread was faster, which makes the same point.
            assert_eq!(region.map_over(0..1).expect_err("taken").raw_os_error(), Some(libc::EEXIST));
            return;
        }
        assert_eq!(region.map_over(0..1).expect_err("taken").raw_os_error(), Some(libc::EEXIST));
        drop(region);
        assert!(pages::peek(other.addr(), 1).is_ok(), "somebody else's page was unmapped");
        // SAFETY: this test mapped it, and nothing points into it.
        check(unsafe { libc::munmap(other, page_size()) }).expect("unmapped");
    }

    #[test]
    fn moving_takes_the_contents_along() {
        let region = Region::new(Backing::Anonymous, 4).expect("mapped");
        let moved = region.relocate(0..2, Move::Away).expect("moved");
        assert_eq!(moved.read(0, 2 * page_size()).expect("readable"), region.original(0..2));
        assert!(region.read(0, 1).is_err());
        let kept = region.relocate(2..4, Move::DontUnmap).expect("moved");
        assert_eq!(kept.read(0, 2 * page_size()).expect("readable"), region.original(2..4));
        assert_eq!(region.read(2 * page_size(), 1).expect("still mapped"), [0]);
    }
}
