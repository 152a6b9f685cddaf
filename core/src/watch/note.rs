//! Records as plain data: built by whoever posts, decoded by whoever reads.
//!
//! Building is a handful of stores into an array on the stack: it doesn't allocate, so a note can be built where it is posted. Decoding trusts nothing: a record
//! that is too short for its type, or has a code nobody has given a meaning, is [`Note::Unknown`]. The table of all bytes is in the
//! [module above](super).

mod codes;

use std::fmt;

use super::record::{
    HEADER_LEN, META_LOSS, META_REMOVAL, Record, TYPE_DMABUF, TYPE_KEY_NOTIFY, TYPE_META, TYPE_USERPTR, TYPE_WORK,
};

use codes::Code;
pub use codes::{DmaBufEvent, KeyEvent, NoteCause, NotePath, NoteState, UserptrEvent, WorkEvent};

/// Payloads of our own types end here; a label may follow.
const FIXED_LEN: usize = 56;
/// The most bytes of a [`Label`].
pub const MAX_LABEL_LEN: usize = 64;

const FLAG_LATE: u16 = 1 << 0;
const FLAG_NO_HOLD: u16 = 1 << 1;
const FLAG_WRITES: u16 = 1 << 2;
const FLAG_READS: u16 = 1 << 3;

/// What a record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Note {
    /// A watch is gone. The object's id, if it has one that isn't 0.
    Removed(Option<u64>),
    /// At this place records are missing.
    Lost,
    /// A key or keyring changed; only the kernel posts these.
    Key(KeyNote),
    /// A userptr object.
    Userptr(UserptrNote),
    /// Work of the pool.
    Work(WorkNote),
    /// A dma-buf.
    DmaBuf(DmaBufNote),
    /// A record of a type, subtype, size or code that this decoder doesn't know.
    Unknown {
        /// Its type.
        kind: u32,
        /// Its subtype.
        subtype: u8,
    },
}

/// A record of type [`TYPE_KEY_NOTIFY`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyNote {
    /// What happened.
    pub event: KeyEvent,
    /// Serial of the key or keyring.
    pub key: u32,
    /// The other word.
    pub aux: u32,
}

/// A record of type [`TYPE_USERPTR`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct UserptrNote {
    /// What happened.
    pub event: UserptrEvent,
    /// The object's id.
    pub object: u64,
    /// Its generation after the event.
    pub generation: u64,
    /// First address of the object's range; for an invalidation, of the part that was touched.
    pub start: u64,
    /// One past the last address of it.
    pub end: u64,
    /// How long the mutator was held off, in nanoseconds.
    pub hold_off_ns: u64,
    /// Why the generation moved on.
    pub cause: NoteCause,
    /// The state after the event.
    pub state: NoteState,
    /// How the bytes reach the device.
    pub path: NotePath,
    /// The errno of a fault, or 0.
    pub errno: i32,
    /// The mutator went on before the work was over.
    pub late: bool,
    /// Mutators of this object are not held off.
    pub no_hold: bool,
    /// The device writes the object too.
    pub writes: bool,
    /// The object's name, cut to what a record holds.
    pub label: Label,
}

impl UserptrNote {
    /// The record that says this.
    #[must_use]
    pub fn record(&self) -> Record {
        let flags = flag(self.late, FLAG_LATE) | flag(self.no_hold, FLAG_NO_HOLD) | flag(self.writes, FLAG_WRITES);
        let label = self.label.as_bytes();
        let len = (FIXED_LEN + label.len()) as u8;
        let mut record = Record::headed(TYPE_USERPTR, self.event.code(), flags, len);
        for (at, value) in
            [self.object, self.generation, self.start, self.end, self.hold_off_ns].into_iter().enumerate()
        {
            record.put(HEADER_LEN + 8 * at, &value.to_ne_bytes());
        }
        record.put(48, &[self.cause.code(), self.state.code(), self.path.code()]);
        record.put(52, &self.errno.to_ne_bytes());
        record.put(FIXED_LEN, label);
        record
    }

    fn decode(record: &Record) -> Option<Self> {
        let flags = record.type_info();
        Some(Self {
            event: UserptrEvent::from_code(record.subtype())?,
            object: record.u64_at(8),
            generation: record.u64_at(16),
            start: record.u64_at(24),
            end: record.u64_at(32),
            hold_off_ns: record.u64_at(40),
            cause: NoteCause::from_code(record.u8_at(48))?,
            state: NoteState::from_code(record.u8_at(49))?,
            path: NotePath::from_code(record.u8_at(50))?,
            errno: record.u32_at(52).cast_signed(),
            late: flags & FLAG_LATE != 0,
            no_hold: flags & FLAG_NO_HOLD != 0,
            writes: flags & FLAG_WRITES != 0,
            label: Label::from_bytes(&record.bytes()[FIXED_LEN..]),
        })
    }
}

/// A record of type [`TYPE_WORK`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WorkNote {
    /// What happened.
    pub event: WorkEvent,
    /// The work's id, or 0.
    pub work: u64,
    /// The object it is done for, or 0.
    pub object: u64,
    /// How long it waited to be started, in nanoseconds.
    pub waited_ns: u64,
    /// How long it ran, in nanoseconds.
    pub ran_ns: u64,
    /// Workers of the pool.
    pub workers: u32,
    /// Workers that run something.
    pub running: u32,
    /// Work that waits for a worker.
    pub pending: u32,
    /// The errno it ended with, or 0.
    pub errno: i32,
}

impl WorkNote {
    /// The record that says this.
    #[must_use]
    pub fn record(&self) -> Record {
        let mut record = Record::headed(TYPE_WORK, self.event.code(), 0, FIXED_LEN as u8);
        for (at, value) in [self.work, self.object, self.waited_ns, self.ran_ns].into_iter().enumerate() {
            record.put(HEADER_LEN + 8 * at, &value.to_ne_bytes());
        }
        let words = [self.workers, self.running, self.pending, self.errno.cast_unsigned()];
        for (at, value) in words.into_iter().enumerate() {
            record.put(40 + 4 * at, &value.to_ne_bytes());
        }
        record
    }

    fn decode(record: &Record) -> Option<Self> {
        Some(Self {
            event: WorkEvent::from_code(record.subtype())?,
            work: record.u64_at(8),
            object: record.u64_at(16),
            waited_ns: record.u64_at(24),
            ran_ns: record.u64_at(32),
            workers: record.u32_at(40),
            running: record.u32_at(44),
            pending: record.u32_at(48),
            errno: record.u32_at(52).cast_signed(),
        })
    }
}

/// A record of type [`TYPE_DMABUF`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DmaBufNote {
    /// What happened.
    pub event: DmaBufEvent,
    /// The object its memory belongs to, or 0.
    pub object: u64,
    /// The object's generation.
    pub generation: u64,
    /// The dma-buf's inode, the same in every process that has it.
    pub inode: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Where in the object it begins, in bytes.
    pub offset: u64,
    /// The errno of a failure, or 0.
    pub errno: i32,
    /// The access reads.
    pub reads: bool,
    /// The access writes.
    pub writes: bool,
}

impl DmaBufNote {
    /// The record that says this.
    #[must_use]
    pub fn record(&self) -> Record {
        let flags = flag(self.reads, FLAG_READS) | flag(self.writes, FLAG_WRITES);
        let mut record = Record::headed(TYPE_DMABUF, self.event.code(), flags, FIXED_LEN as u8);
        for (at, value) in [self.object, self.generation, self.inode, self.size, self.offset].into_iter().enumerate() {
            record.put(HEADER_LEN + 8 * at, &value.to_ne_bytes());
        }
        record.put(52, &self.errno.to_ne_bytes());
        record
    }

    fn decode(record: &Record) -> Option<Self> {
        let flags = record.type_info();
        Some(Self {
            event: DmaBufEvent::from_code(record.subtype())?,
            object: record.u64_at(8),
            generation: record.u64_at(16),
            inode: record.u64_at(24),
            size: record.u64_at(32),
            offset: record.u64_at(40),
            errno: record.u32_at(52).cast_signed(),
            reads: flags & FLAG_READS != 0,
            writes: flags & FLAG_WRITES != 0,
        })
    }
}

fn flag(set: bool, bit: u16) -> u16 {
    if set { bit } else { 0 }
}

/// A short name that needs no allocation.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Label {
    /// # Invariants
    /// The first `len` bytes are UTF-8; the rest are 0.
    bytes: [u8; MAX_LABEL_LEN],
    len: u8,
}

impl Label {
    /// The name, cut after a whole character to [`MAX_LABEL_LEN`] bytes.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let len = name.floor_char_boundary_at(MAX_LABEL_LEN);
        // INVARIANT: `len` is a character boundary of a string, and at most MAX_LABEL_LEN.
        let mut bytes = [0; MAX_LABEL_LEN];
        bytes[..len].copy_from_slice(&name.as_bytes()[..len]);
        Self { bytes, len: len as u8 }
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(self.as_bytes()).expect("a label is UTF-8")
    }

    fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// As much of the bytes as is UTF-8.
    fn from_bytes(bytes: &[u8]) -> Self {
        let sound = bytes.utf8_chunks().next().map_or("", |chunk| chunk.valid());
        Self::new(sound)
    }
}

/// `str::floor_char_boundary`, which is younger than the oldest compiler we build with.
trait FloorCharBoundary {
    fn floor_char_boundary_at(&self, at: usize) -> usize;
}

impl FloorCharBoundary for str {
    fn floor_char_boundary_at(&self, at: usize) -> usize {
        (0..=at.min(self.len())).rev().find(|&at| self.is_char_boundary(at)).unwrap_or(0)
    }
}

impl Default for Label {
    fn default() -> Self {
        Self { bytes: [0; MAX_LABEL_LEN], len: 0 }
    }
}

impl fmt::Debug for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_str().fmt(f)
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_str().fmt(f)
    }
}

impl Record {
    /// What the record says.
    #[must_use]
    pub fn note(&self) -> Note {
        let len = self.bytes().len();
        let long_enough = |least: usize| (len >= least).then_some(self);
        let known = match (self.kind(), self.subtype()) {
            (TYPE_META, META_REMOVAL) => Some(Note::Removed(long_enough(16).map(|record| record.u64_at(8)))),
            (TYPE_META, META_LOSS) => Some(Note::Lost),
            (TYPE_KEY_NOTIFY, subtype) => long_enough(16).and_then(|record| {
                let event = KeyEvent::from_code(subtype)?;
                Some(Note::Key(KeyNote { event, key: record.u32_at(8), aux: record.u32_at(12) }))
            }),
            (TYPE_USERPTR, _) => long_enough(FIXED_LEN).and_then(UserptrNote::decode).map(Note::Userptr),
            (TYPE_WORK, _) => long_enough(FIXED_LEN).and_then(WorkNote::decode).map(Note::Work),
            (TYPE_DMABUF, _) => long_enough(FIXED_LEN).and_then(DmaBufNote::decode).map(Note::DmaBuf),
            _ => None,
        };
        known.unwrap_or(Note::Unknown { kind: self.kind(), subtype: self.subtype() })
    }
}
