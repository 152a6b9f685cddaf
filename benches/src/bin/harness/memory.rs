//! Memory of the harness's own: anonymous mappings that are there, populated, until they are dropped or unmapped on purpose.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};
use pinfold_vulkan::{HostRange, page_size};

/// Readable and writable private memory.
pub(crate) struct Memory {
    start: *mut u8,
    len: usize,
}

impl Memory {
    /// `len` bytes, rounded up to pages; every page is there already, with other bytes than zero in it, as a program's data would be.
    pub(crate) fn populated(len: usize) -> Result<Self> {
        let memory = Self::untouched(len)?;
        memory.fill(0x5a);
        Ok(memory)
    }

    /// `len` bytes, rounded up to pages, of which no page is there yet. Nothing is reserved: what is never touched costs nothing.
    pub(crate) fn untouched(len: usize) -> Result<Self> {
        let len = len.next_multiple_of(page_size());
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: the kernel chooses a free place, so no memory in use is replaced.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error()).with_context(|| format!("no room for {len} bytes"));
        }
        Ok(Self { start: start.cast(), len })
    }

    /// All of a file, shared; what is read of it is in the page cache, and no page is mapped yet.
    pub(crate) fn of_file(file: &File) -> Result<Self> {
        let len = usize::try_from(file.metadata()?.len())?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the kernel chooses a free place, so no memory in use is replaced.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error()).with_context(|| format!("no room for {len} bytes of a file"));
        }
        Ok(Self { start: start.cast(), len })
    }

    pub(crate) fn pointer(&self) -> *mut u8 {
        self.start
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn range(&self) -> HostRange {
        HostRange::from_ptr(self.start, self.len).expect("mmap gives whole pages in user space")
    }

    /// The `index`th part of `len` bytes, a multiple of the page size.
    pub(crate) fn part(&self, index: usize, len: usize) -> HostRange {
        HostRange::new(self.start.addr() + index * len, len).expect("parts are whole pages")
    }

    pub(crate) fn fill(&self, byte: u8) {
        // SAFETY: the mapping is writable and `len` bytes long; there is no reference into it, as nobody makes any.
        unsafe { self.start.write_bytes(byte, self.len) };
    }

    /// Writes one byte of the page.
    pub(crate) fn touch(&self, page: usize) {
        let at = page * page_size();
        assert!(at < self.len, "page {page} lies outside");
        // SAFETY: checked to lie inside.
        let byte = unsafe { self.start.add(at) };
        // SAFETY: writable memory of ours to which there are no references.
        unsafe { byte.write_volatile(byte.addr() as u8 | 1) };
    }

    /// Reads one byte of the page.
    pub(crate) fn look(&self, page: usize) {
        let at = page * page_size();
        assert!(at < self.len, "page {page} lies outside");
        // SAFETY: checked to lie inside.
        let byte = unsafe { self.start.add(at) };
        // SAFETY: readable memory of ours.
        std::hint::black_box(unsafe { byte.read_volatile() });
    }

    /// Unmaps it all now.
    pub(crate) fn unmap(self) {
        drop(self);
    }

    /// Unmaps its first pages, and keeps the others.
    pub(crate) fn without_head(mut self, pages: usize) -> Self {
        let head = pages * page_size();
        assert!(head < self.len, "{pages} pages are all of it");
        // SAFETY: a part of our mapping, which holds nothing that anybody needs; from here on it is not ours.
        let answer = unsafe { libc::munmap(self.start.cast(), head) };
        assert_eq!(answer, 0, "a part of a mapping can be unmapped");
        (self.start, self.len) = (self.start.wrapping_add(head), self.len - head);
        self
    }

    /// Gives its pages back and keeps the mapping.
    pub(crate) fn discard(&self) {
        // SAFETY: the mapping is ours and holds nothing that anybody needs.
        let answer = unsafe { libc::madvise(self.start.cast(), self.len, libc::MADV_DONTNEED) };
        assert_eq!(answer, 0, "anonymous memory can be discarded");
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and no reference into it was ever made.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}
