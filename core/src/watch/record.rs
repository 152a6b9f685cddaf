//! A record: the bytes of one notification, laid out as `linux/watch_queue.h` lays them out.
//!
//! Whoever holds a [`Record`] holds a sound one: its length field is between 8 and 127 and says how many of its bytes count. So
//! posting has nothing left to check, and a reader can always step over a record it doesn't know.

use std::fmt;

use thiserror::Error;

/// Length of the smallest record: its header.
pub const HEADER_LEN: usize = 8;
/// Length of the longest record, as much as the 7-bit length field can say.
pub const MAX_RECORD_LEN: usize = 127;
/// Bytes a slot of the ring offers a record.
pub(super) const SLOT_LEN: usize = 128;

/// Record type of the queue's own records: a watch was removed, records were lost.
pub const TYPE_META: u32 = 0;
/// Record type of the kernel's key and keyring notifications. Decoded, never posted.
pub const TYPE_KEY_NOTIFY: u32 = 1;
/// Record type of events of userptr objects.
pub const TYPE_USERPTR: u32 = 64;
/// Record type of events of the worker pool.
pub const TYPE_WORK: u32 = 65;
/// Record type of events of dma-bufs.
pub const TYPE_DMABUF: u32 = 66;

/// Subtype of [`TYPE_META`]: the watch is gone.
pub const META_REMOVAL: u8 = 0;
/// Subtype of [`TYPE_META`]: at this place records are missing.
pub const META_LOSS: u8 = 1;

/// `info`: the record's length in bytes, header included.
pub const INFO_LENGTH: u32 = 0x0000_007f;
/// `info`: the tag of the watch the record came through.
pub const INFO_ID: u32 = 0x0000_ff00;
/// How far [`INFO_ID`] is shifted.
pub const INFO_ID_SHIFT: u32 = 8;
/// How far [`INFO_ID`] is shifted in a header taken as one word.
const TAG_SHIFT: u32 = INFO_ID_SHIFT + if cfg!(target_endian = "little") { 32 } else { 0 };
/// `info`: bits whose meaning depends on the type; the flags are its low 8.
pub const INFO_TYPE_INFO: u32 = 0xffff_0000;
/// How far [`INFO_TYPE_INFO`] is shifted.
pub const INFO_TYPE_INFO_SHIFT: u32 = 16;

/// Why some bytes are no record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RecordError {
    /// The length field is below 8, or names another length than there is. `EINVAL`.
    #[error("the record's length field says {said} and there are {given} bytes; it must be 8 to 127 and match")]
    Length {
        /// What the length field says (or would have to say).
        said: usize,
        /// Bytes given.
        given: usize,
    },
    /// The type has more than 24 bits. `EINVAL`.
    #[error("record type {0:#x} has more than 24 bits")]
    Type(u32),
}

impl RecordError {
    /// The errno of this case.
    #[must_use]
    pub fn errno(&self) -> i32 {
        libc::EINVAL
    }
}

/// One record, ready to be posted or just read.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub struct Record {
    /// # Invariants
    /// The length field is in 8..=127; the bytes after that length are zero.
    bytes: [u8; SLOT_LEN],
}

impl Record {
    /// A record of this type with this payload after its header.
    ///
    /// # Errors
    /// [`RecordError::Length`] if the payload has more than 119 bytes, [`RecordError::Type`] if the type has more than 24 bits.
    pub fn new(kind: u32, subtype: u8, type_info: u16, payload: &[u8]) -> Result<Self, RecordError> {
        if kind >> 24 != 0 {
            return Err(RecordError::Type(kind));
        }
        let len = HEADER_LEN + payload.len();
        if len > MAX_RECORD_LEN {
            return Err(RecordError::Length { said: len, given: len });
        }
        let mut record = Self::headed(kind, subtype, type_info, len as u8);
        record.bytes[HEADER_LEN..len].copy_from_slice(payload);
        Ok(record)
    }

    /// A record from its bytes in memory order.
    ///
    /// # Errors
    /// [`RecordError::Length`] if the length field isn't the number of bytes given, or is below 8.
    pub fn from_bytes(given: &[u8]) -> Result<Self, RecordError> {
        let said = given.first_chunk().map_or(0, length_field);
        if said < HEADER_LEN || said != given.len() {
            return Err(RecordError::Length { said, given: given.len() });
        }
        // INVARIANT: the length field is the slice's length, at least 8, and 7 bits wide.
        let mut bytes = [0; SLOT_LEN];
        bytes[..said].copy_from_slice(given);
        Ok(Self { bytes })
    }

    /// A record of `len` bytes, zero after its header.
    pub(super) fn headed(kind: u32, subtype: u8, type_info: u16, len: u8) -> Self {
        debug_assert!(kind >> 24 == 0 && (HEADER_LEN..=MAX_RECORD_LEN).contains(&usize::from(len)));
        // INVARIANT: every caller passes a length in 8..=127.
        let mut bytes = [0; SLOT_LEN];
        bytes[..4].copy_from_slice(&(kind | u32::from(subtype) << 24).to_ne_bytes());
        bytes[4..8].copy_from_slice(&(u32::from(len) | u32::from(type_info) << INFO_TYPE_INFO_SHIFT).to_ne_bytes());
        Self { bytes }
    }

    /// The record that says that a watch is gone; the object's id is left out where it is 0.
    pub(super) fn removal(object: u64) -> Self {
        let len = if object == 0 { 8 } else { 16 };
        let mut record = Self::headed(TYPE_META, META_REMOVAL, 0, len);
        record.put(8, &object.to_ne_bytes());
        record
    }

    /// The record that says that records are missing.
    pub(super) fn loss() -> Self {
        Self::headed(TYPE_META, META_LOSS, 0, 8)
    }

    /// Overwrites payload bytes. `at` and the bytes must lie within the slot and behind the header.
    pub(super) fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// The same record as the watch with this tag sees it.
    #[must_use]
    pub fn with_tag(mut self, tag: u8) -> Self {
        let header = self.tagged_header(tag).to_ne_bytes();
        self.bytes[..HEADER_LEN].copy_from_slice(&header);
        self
    }

    /// The header, as one word, as the watch with this tag sees it.
    #[inline]
    pub(super) fn tagged_header(&self, tag: u8) -> u64 {
        let header = u64::from_ne_bytes(*self.bytes.first_chunk().expect("a slot is longer than a header"));
        header & !(0xff << TAG_SHIFT) | u64::from(tag) << TAG_SHIFT
    }

    /// The second header word as the watch with this tag sees it.
    #[inline]
    pub(super) fn tagged_info(&self, tag: u8) -> u32 {
        let [.., a, b, c, d] = self.tagged_header(tag).to_ne_bytes();
        u32::from_ne_bytes([a, b, c, d])
    }

    /// All bytes, eight at a time.
    #[inline]
    pub(super) fn words(&self) -> &[[u8; 8]; SLOT_LEN / 8] {
        self.bytes.as_chunks().0.try_into().expect("a slot is whole words")
    }

    /// The type: what kind of thing the record is about.
    #[inline]
    #[must_use]
    pub fn kind(&self) -> u32 {
        self.u32_at(0) & 0x00ff_ffff
    }

    /// The subtype: what happened.
    #[must_use]
    pub fn subtype(&self) -> u8 {
        (self.u32_at(0) >> 24) as u8
    }

    /// The second header word: length, tag and type-specific bits.
    #[inline]
    #[must_use]
    pub fn info(&self) -> u32 {
        self.u32_at(4)
    }

    /// The tag of the watch the record came through; 0 before it was posted.
    #[must_use]
    pub fn tag(&self) -> u8 {
        (self.info() >> INFO_ID_SHIFT) as u8
    }

    /// The type-specific bits, the flags lowest.
    #[must_use]
    pub fn type_info(&self) -> u16 {
        (self.info() >> INFO_TYPE_INFO_SHIFT) as u16
    }

    /// The bytes that count, header included.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length()]
    }

    /// The bytes after the header.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.bytes[HEADER_LEN..self.length()]
    }

    /// Bytes of the record, 8 to 127.
    #[inline]
    pub(super) fn length(&self) -> usize {
        (self.info() & INFO_LENGTH) as usize
    }

    /// The native-endian word at this byte; 0 behind the record's end.
    #[inline]
    pub(super) fn u32_at(&self, at: usize) -> u32 {
        u32::from_ne_bytes(*self.bytes[at..].first_chunk().expect("a field ends within the slot"))
    }

    /// The native-endian double word at this byte; 0 behind the record's end.
    pub(super) fn u64_at(&self, at: usize) -> u64 {
        u64::from_ne_bytes(*self.bytes[at..].first_chunk().expect("a field ends within the slot"))
    }

    /// The byte at this place; 0 behind the record's end.
    pub(super) fn u8_at(&self, at: usize) -> u8 {
        self.bytes[at]
    }
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Record")
            .field("kind", &self.kind())
            .field("subtype", &self.subtype())
            .field("tag", &self.tag())
            .field("type_info", &self.type_info())
            .field("payload", &self.payload())
            .finish()
    }
}

impl PartialEq for Record {
    fn eq(&self, other: &Self) -> bool {
        self.bytes() == other.bytes()
    }
}

impl Eq for Record {}

/// The length field of a header.
#[inline]
pub(super) fn length_field(header: &[u8; HEADER_LEN]) -> usize {
    let [.., a, b, c, d] = *header;
    (u32::from_ne_bytes([a, b, c, d]) & INFO_LENGTH) as usize
}

/// Splits what a read returned (this queue's, or that of a kernel's notification pipe) into its records.
///
/// Ends after the last record, or with one [`RecordError`] where the bytes stop being records: nothing behind that place can be trusted.
pub fn records(bytes: &[u8]) -> impl Iterator<Item = Result<Record, RecordError>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let said = rest.first_chunk().map_or(rest.len(), length_field);
        let (first, after) = rest.split_at(said.min(rest.len()));
        let record = Record::from_bytes(first);
        rest = if record.is_ok() { after } else { &[] };
        Some(record)
    })
}
