//! Which records a queue wants.
//!
//! A filter is checked once, when it is set, and brought into the form that posting reads: entries of known types only, in a fixed array. One
//! constant bounds the types, one the entries, and counting and filling are one pass, so no two checks can disagree.

use thiserror::Error;

use super::record::{INFO_LENGTH, Record, TYPE_META};

/// The most entries a filter may have.
pub const MAX_FILTER_ENTRIES: usize = 16;
/// Types at or above this are unknown to the filter: their entries are dropped.
const KNOWN_TYPES: u32 = 128;
/// The same limit in the kernel, which knows META and KEY_NOTIFY.
const KNOWN_TYPES_STRICT: u32 = 2;
/// Bytes of an entry in `struct watch_notification_filter`.
const RAW_ENTRY_LEN: usize = 44;

/// One entry of a filter, as `struct watch_notification_type_filter`: a record passes if its type is this one, its subtype has a bit here, and its
/// info masked is what is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FilterEntry {
    /// The record type.
    pub kind: u32,
    /// What `info & info_mask` must be.
    pub info_filter: u32,
    /// Which bits of `info` matter. Not those of the length.
    pub info_mask: u32,
    /// A bit for each wanted subtype; bit `s % 32` of word `s / 32`.
    pub subtypes: [u32; 8],
}

impl FilterEntry {
    /// Every record of this type.
    #[must_use]
    pub fn all_of(kind: u32) -> Self {
        Self { kind, info_filter: 0, info_mask: 0, subtypes: [u32::MAX; 8] }
    }

    /// The records of this type with one of these subtypes.
    #[must_use]
    pub fn some_of(kind: u32, subtypes: &[u8]) -> Self {
        let mut bits = [0; 8];
        for &subtype in subtypes {
            bits[usize::from(subtype) / 32] |= 1 << (subtype % 32);
        }
        Self { kind, info_filter: 0, info_mask: 0, subtypes: bits }
    }

    /// The same, and `info & mask` must be `value`.
    #[must_use]
    pub fn with_info(self, mask: u32, value: u32) -> Self {
        Self { info_mask: mask, info_filter: value, ..self }
    }

    fn passes(&self, record: &Record, tag: u8) -> bool {
        let subtype = record.subtype();
        record.kind() == self.kind
            && self.subtypes[usize::from(subtype) / 32] >> (subtype % 32) & 1 == 1
            && record.tagged_info(tag) & self.info_mask == self.info_filter
    }
}

/// Why a filter was refused. The old one stays in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FilterError {
    /// No entry, or too many. `EINVAL`.
    #[error("a filter has 1 to {MAX_FILTER_ENTRIES} entries, not {0}; no filter at all is `None`")]
    Count(usize),
    /// The reserved word is not zero. `EINVAL`.
    #[error("the filter's reserved word is {0:#x}; it must be 0")]
    Reserved(u32),
    /// `info_filter` asks for a bit that `info_mask` masks out: nothing could ever pass. `EINVAL`.
    #[error("entry {entry}: info_filter {filter:#x} has bits outside info_mask {mask:#x}; nothing would pass")]
    OutsideMask {
        /// Which entry.
        entry: usize,
        /// Its `info_filter`.
        filter: u32,
        /// Its `info_mask`.
        mask: u32,
    },
    /// `info_mask` covers bits of the length. `EINVAL`.
    #[error("entry {entry}: info_mask {mask:#x} covers the length bits {INFO_LENGTH:#x}")]
    LengthBits {
        /// Which entry.
        entry: usize,
        /// Its `info_mask`.
        mask: u32,
    },
    /// The bytes end before the entries that the header announces. `EFAULT`.
    #[error("the filter's {given} bytes end before its {announced} announced entries")]
    Truncated {
        /// Bytes given.
        given: usize,
        /// Entries announced.
        announced: usize,
    },
}

impl FilterError {
    /// The errno that the kernel's ioctl answers in this case.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Truncated { .. } => libc::EFAULT,
            _ => libc::EINVAL,
        }
    }
}

/// Reads the entries of a `struct watch_notification_filter` (native-endian, as the kernel's ioctl takes it).
///
/// # Errors
/// [`FilterError::Count`], [`FilterError::Reserved`], [`FilterError::Truncated`]. The entries themselves are checked where they are set.
pub fn parse_filter(bytes: &[u8]) -> Result<Vec<FilterEntry>, FilterError> {
    let word = |at: usize| bytes.get(at..)?.first_chunk().map(|word| u32::from_ne_bytes(*word));
    let truncated = |announced: usize| FilterError::Truncated { given: bytes.len(), announced };
    let (count, reserved) = word(0).zip(word(4)).ok_or(truncated(0))?;
    let count = count as usize;
    if !(1..=MAX_FILTER_ENTRIES).contains(&count) {
        return Err(FilterError::Count(count));
    }
    if reserved != 0 {
        return Err(FilterError::Reserved(reserved));
    }
    let entry = |at: usize| {
        let mut subtypes = [0; 8];
        for (index, bits) in subtypes.iter_mut().enumerate() {
            *bits = word(at + 12 + 4 * index)?;
        }
        Some(FilterEntry { kind: word(at)?, info_filter: word(at + 4)?, info_mask: word(at + 8)?, subtypes })
    };
    (0..count).map(|index| entry(8 + index * RAW_ENTRY_LEN)).collect::<Option<Vec<_>>>().ok_or(truncated(count))
}

/// A filter in the form that posting reads.
#[derive(Debug)]
pub(super) struct Filter {
    entries: Box<[FilterEntry]>,
}

impl Filter {
    /// Checks the entries and keeps those of known types. If none is left the filter lets nothing through.
    pub(super) fn new(given: &[FilterEntry], strict: bool) -> Result<Self, FilterError> {
        if !(1..=MAX_FILTER_ENTRIES).contains(&given.len()) {
            return Err(FilterError::Count(given.len()));
        }
        let known = if strict { KNOWN_TYPES_STRICT } else { KNOWN_TYPES };
        let mut entries = Vec::with_capacity(given.len());
        for (entry, &asked) in given.iter().enumerate() {
            let (filter, mask) = (asked.info_filter, asked.info_mask);
            if filter & !mask != 0 {
                return Err(FilterError::OutsideMask { entry, filter, mask });
            }
            if mask & INFO_LENGTH != 0 {
                return Err(FilterError::LengthBits { entry, mask });
            }
            if asked.kind >= known {
                continue;
            }
            let mut kept = asked;
            if strict {
                // The kernel keeps the first 32 subtypes and forgets the rest.
                kept.subtypes[1..].fill(0);
            }
            entries.push(kept);
        }
        Ok(Self { entries: entries.into() })
    }

    /// Whether the queue wants this record, coming with this tag.
    pub(super) fn passes(&self, record: &Record, tag: u8) -> bool {
        record.kind() == TYPE_META || self.entries.iter().any(|entry| entry.passes(record, tag))
    }
}
