//! Addresses and ranges of this process, as types: page-aligned, half-open, never empty, never wrapping.
//!
//! Every other module relies on these four properties and checks none of them again.

use std::fmt;
use std::sync::OnceLock;

use thiserror::Error;

/// The page size of this system in bytes, asked from the kernel once.
#[must_use]
pub fn page_size() -> usize {
    static SIZE: OnceLock<usize> = OnceLock::new();
    *SIZE.get_or_init(|| {
        // SAFETY: sysconf reads a constant of the system and has no preconditions.
        let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        usize::try_from(size).expect("the kernel has a positive page size")
    })
}

/// One past the highest address a user mapping can have on this architecture, with 4-level page tables.
///
/// Mappings above it exist only where a program asks for them by a hint address (x86-64 LA57, arm64 LVA); userfaultfd
/// and the import paths have not been tried there, so such ranges are refused.
#[cfg(target_arch = "x86_64")]
pub const USER_SPACE_END: usize = 0x7fff_ffff_f000;
/// One past the highest address a user mapping can have on this architecture, with 48-bit addresses.
#[cfg(not(target_arch = "x86_64"))]
pub const USER_SPACE_END: usize = 0x1_0000_0000_0000;

/// The most pages one range may have, as the kernel's userptr objects count them in an `int`.
pub const MAX_PAGES: usize = i32::MAX as usize;

/// Why a pointer and a length are no [`HostRange`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RangeError {
    /// More than [`MAX_PAGES`] pages. `E2BIG`.
    #[error("range {start:#x}+{len:#x} has more than {MAX_PAGES} pages; split it")]
    TooBig {
        /// First byte asked for.
        start: usize,
        /// Bytes asked for.
        len: usize,
    },
    /// No bytes. `EINVAL`.
    #[error("range {start:#x}+0 is empty; a range has at least one page")]
    Empty {
        /// First byte asked for.
        start: usize,
    },
    /// Pointer or length is no multiple of the page size. `EINVAL`.
    #[error("range {start:#x}+{len:#x} is not aligned to {page:#x}; HostRange::cover rounds it out")]
    Unaligned {
        /// First byte asked for.
        start: usize,
        /// Bytes asked for.
        len: usize,
        /// The page size of this system.
        page: usize,
    },
    /// The end wraps around or lies above [`USER_SPACE_END`]. `EFAULT`.
    #[error("range {start:#x}+{len:#x} ends above {USER_SPACE_END:#x}, the end of user address space")]
    NotUserSpace {
        /// First byte asked for.
        start: usize,
        /// Bytes asked for.
        len: usize,
    },
}

impl RangeError {
    /// The errno the kernel's userptr ioctl answers in this case.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::TooBig { .. } => libc::E2BIG,
            Self::Empty { .. } | Self::Unaligned { .. } => libc::EINVAL,
            Self::NotUserSpace { .. } => libc::EFAULT,
        }
    }
}

/// A page-aligned, half-open, non-empty range of this process's addresses.
///
/// # Invariants
/// `start` and `end` are multiples of [`page_size`], `start < end <= USER_SPACE_END`, and there are at most [`MAX_PAGES`] pages.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostRange {
    start: usize,
    end: usize,
}

impl HostRange {
    /// The range of `len` bytes at `ptr`. Touches no memory; nothing needs to be mapped there, and null is a legal start.
    ///
    /// # Errors
    /// In the order in which the kernel checks: [`RangeError::TooBig`], [`RangeError::Empty`], [`RangeError::Unaligned`], [`RangeError::NotUserSpace`].
    pub fn from_ptr<T: ?Sized>(ptr: *const T, len: usize) -> Result<Self, RangeError> {
        Self::new(ptr.cast::<u8>().addr(), len)
    }

    /// As [`from_ptr`](Self::from_ptr), from an address.
    ///
    /// # Errors
    /// As [`from_ptr`](Self::from_ptr).
    pub fn new(start: usize, len: usize) -> Result<Self, RangeError> {
        let page = page_size(); // a power of two, so that nothing needs to be divided
        if len >= (MAX_PAGES + 1) * page {
            return Err(RangeError::TooBig { start, len });
        }
        if len == 0 {
            return Err(RangeError::Empty { start });
        }
        if (start | len) & (page - 1) != 0 {
            return Err(RangeError::Unaligned { start, len, page });
        }
        match start.checked_add(len) {
            // INVARIANT: aligned, non-empty and bounded by the three checks above.
            Some(end) if end <= USER_SPACE_END => Ok(Self { start, end }),
            _ => Err(RangeError::NotUserSpace { start, len }),
        }
    }

    /// The smallest range that contains the `len` bytes at `ptr`: rounded out to whole pages.
    ///
    /// # Errors
    /// [`RangeError::Empty`], [`RangeError::TooBig`] and [`RangeError::NotUserSpace`], as [`from_ptr`](Self::from_ptr).
    pub fn cover<T: ?Sized>(ptr: *const T, len: usize) -> Result<Self, RangeError> {
        let (start, page) = (ptr.cast::<u8>().addr(), page_size());
        if len == 0 {
            return Err(RangeError::Empty { start });
        }
        let first = start & !(page - 1);
        let end = start.checked_add(len).and_then(|end| end.checked_next_multiple_of(page));
        let end = end.ok_or(RangeError::NotUserSpace { start, len })?;
        Self::new(first, end - first)
    }

    /// Like [`cover`](Self::cover) for bounds that the kernel reported, which are page-aligned and in user space by nature.
    /// `None` if they are not.
    #[must_use]
    pub fn from_bounds(start: u64, end: u64) -> Option<Self> {
        let (start, end) = (usize::try_from(start).ok()?, usize::try_from(end).ok()?);
        Self::new(start, end.checked_sub(start)?).ok()
    }

    /// A range whose bounds were taken from one, so that nothing needs to be checked.
    #[must_use]
    pub(crate) const fn from_known(start: usize, end: usize) -> Self {
        debug_assert!(start < end && end <= USER_SPACE_END, "the bounds of a range");
        Self { start, end }
    }

    /// All of user space, which has more pages than a range may be made with: for questions, not for the kernel.
    #[must_use]
    pub(crate) const fn everything() -> Self {
        Self::from_known(0, USER_SPACE_END)
    }

    /// The first address.
    #[must_use]
    pub const fn start(self) -> usize {
        self.start
    }

    /// One past the last address.
    #[must_use]
    pub const fn end(self) -> usize {
        self.end
    }

    /// The length in bytes; never 0.
    #[allow(clippy::len_without_is_empty)] // a range is never empty
    #[must_use]
    pub const fn len(self) -> usize {
        self.end - self.start
    }

    /// The number of pages; never 0.
    #[must_use]
    pub fn pages(self) -> usize {
        self.len() / page_size()
    }

    /// Whether `addr` lies inside.
    #[must_use]
    pub const fn contains(self, addr: usize) -> bool {
        self.start <= addr && addr < self.end
    }

    /// Whether all of `other` lies inside.
    #[must_use]
    pub const fn covers(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// Whether the two have a byte in common.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// The bytes the two have in common.
    #[must_use]
    pub fn intersection(self, other: Self) -> Option<Self> {
        // INVARIANT: bounds are taken from two valid ranges, and the comparison rejects an empty one.
        let (start, end) = (self.start.max(other.start), self.end.min(other.end));
        (start < end).then_some(Self { start, end })
    }

    /// Each page by itself.
    pub(crate) fn pages_of(self) -> impl Iterator<Item = Self> {
        // INVARIANT: whole pages between two valid bounds.
        (self.start..self.end).step_by(page_size()).map(|start| Self { start, end: start + page_size() })
    }

    /// The part from `addr` on; `None` if nothing is left.
    #[must_use]
    pub(crate) fn starting_at(self, addr: usize) -> Option<Self> {
        debug_assert!(addr.is_multiple_of(page_size()), "a range starts at a page");
        (addr < self.end).then_some(Self { start: self.start.max(addr), end: self.end })
    }
}

impl fmt::Display for HostRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.start, self.len())
    }
}

impl fmt::Debug for HostRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostRange({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_come_in_the_kernels_order() {
        let page = page_size();
        let err = |start, len| HostRange::new(start, len).unwrap_err().errno();
        assert_eq!(err(1, usize::MAX), libc::E2BIG); // also unaligned and wrapping
        assert_eq!(err(1, 0), libc::EINVAL);
        assert_eq!(err(page + 1, page), libc::EINVAL);
        assert_eq!(err(page, page - 1), libc::EINVAL);
        assert_eq!(err(USER_SPACE_END, page), libc::EFAULT);
        assert_eq!(err(0xffff_ffff_ffff_0000, 0x8000_0000), libc::EFAULT); // the wrap of amdgpu's fuzz test
        assert!(HostRange::new(0, page).is_ok());
    }

    #[test]
    fn cover_rounds_out_and_nothing_more() {
        let page = page_size();
        let at = |start: usize, len| HostRange::cover(std::ptr::without_provenance::<u8>(start), len).unwrap();
        assert_eq!(at(page, page), HostRange::new(page, page).unwrap());
        assert_eq!(at(page + 1, 1), HostRange::new(page, page).unwrap());
        assert_eq!(at(2 * page - 1, 2), HostRange::new(page, 2 * page).unwrap());
        assert!(HostRange::cover(std::ptr::without_provenance::<u8>(usize::MAX), 2).is_err());
    }

    #[test]
    fn set_operations_agree_with_a_byte_by_byte_oracle() {
        let page = page_size();
        let ranges: Vec<_> =
            (0..6).flat_map(|s| (1..6).map(move |n| HostRange::new(s * page, n * page).unwrap())).collect();
        for (&a, &b) in ranges.iter().flat_map(|a| ranges.iter().map(move |b| (a, b))) {
            let common: Vec<_> = (0..12).filter(|p| a.contains(p * page) && b.contains(p * page)).collect();
            assert_eq!(a.overlaps(b), !common.is_empty());
            assert_eq!(a.intersection(b).map_or(0, HostRange::pages), common.len());
            assert_eq!(a.covers(b), common.len() == b.pages());
        }
    }
}
