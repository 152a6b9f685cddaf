//! What is mapped where: the kernel's own list of mappings, asked for one range at a time.
//!
//! Registering a range with userfaultfd succeeds over a hole, so whoever watches memory must ask separately what is there.
//! Two sources give the same answer: the `PROCMAP_QUERY` ioctl (Linux 6.11), which costs about a microsecond per mapping
//! however many there are, and the text of `/proc/self/maps`, which is read from its beginning. The first is tried first.
//!
//! Neither is a snapshot: mappings that other threads change during the walk show before or after the change. Whoever
//! acts on the answer must have another way to learn of a change, such as a generation.

mod backing;
mod file;
mod query;
mod text;

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use thiserror::Error;

pub(crate) use backing::page_size_of;
pub use file::mapped_from;

use crate::fault::{self, Call};
use crate::proc_file::ProcFile;
use crate::{Handful, HostRange, MAX_PAGES, USER_SPACE_END, page_size};

/// One mapping of this process (a VMA), or the part of it inside the range that was asked about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// The part inside the range that was asked about.
    pub range: HostRange,
    /// The whole mapping. Of one that is larger than a range can be, a part that contains `range`.
    pub whole: HostRange,
    /// What the program may do there.
    pub protection: Protection,
    /// `MAP_SHARED`: writes reach every other mapping of the same pages.
    pub shared: bool,
    /// What backs it.
    pub backing: Backing,
    /// The file it maps, where there is one: also for a memfd, for System V and for anonymous shared memory.
    pub file: Option<FileId>,
    /// Offset in the file of the first byte of `range`, in bytes; 0 without a file.
    pub offset: u64,
}

/// What the program may do with a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Protection {
    /// `PROT_READ`.
    pub read: bool,
    /// `PROT_WRITE`.
    pub write: bool,
    /// `PROT_EXEC`.
    pub exec: bool,
}

/// Identity of a mapped file: equal while either mapping is alive means "the same file".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId {
    /// Major number of the device.
    pub major: u32,
    /// Minor number of the device.
    pub minor: u32,
    /// Inode on that device.
    pub inode: u64,
}

/// What backs a mapping, as far as the kernel's list tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Backing {
    /// Private anonymous memory that is neither `[heap]` nor the main stack; named `[anon:…]` or not, `/dev/zero` included.
    Anonymous,
    /// `[heap]`: the C library's main arena, which it trims while it holds its lock.
    Heap,
    /// `[stack]`: the main thread's.
    Stack,
    /// Pages of the kernel's shared-memory file system: memfd, `/dev/shm`, System V, anonymous shared memory; also when
    /// they are mapped privately.
    SharedMemory,
    /// Any other file, also one of a tmpfs that isn't `/dev/shm`.
    File,
    /// `[vvar]`, `[vdso]` and the like, and mappings of devices, DMA buffers, rings: no pages a device could be given.
    Special,
}

/// Why the mappings of a range can't be told.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MapsError {
    /// Nothing is mapped at `at`, which lies inside the range.
    #[error("nothing is mapped at {at:#x}, inside range {range}; map the whole range before it is acquired")]
    Hole {
        /// The range that was asked about.
        range: HostRange,
        /// First address without a mapping.
        at: usize,
    },
    /// `/proc/self/maps` can't be opened, read or understood.
    #[error("can't read the list of mappings (/proc/self/maps): {0}; it needs /proc and a free descriptor (ulimit -n)")]
    Unreadable(#[source] std::io::Error),
}

/// The mappings that cover `range`, in address order, each cut to `range`. May allocate.
///
/// # Errors
/// [`MapsError::Hole`] with the first address where nothing is mapped, [`MapsError::Unreadable`].
pub fn mappings(range: HostRange) -> Result<Handful<Mapping>, MapsError> {
    mappings_from(Source::preferred()?, range)
}

/// The mapping that contains `addr`, if there is one; its `range` is its `whole`. Allocates.
///
/// # Errors
/// [`MapsError::Unreadable`].
pub fn mapping_at(addr: usize) -> Result<Option<Mapping>, MapsError> {
    mapping_from(Source::preferred()?, addr)
}

/// Shows every mapping of the process, in address order.
pub(crate) fn each_mapping(mut show: impl FnMut(Mapping)) -> Result<(), MapsError> {
    let (mut source, mut at) = (Source::preferred()?, 0);
    while let Some(raw) = source.next(at).map_err(MapsError::Unreadable)? {
        let start = raw.start.max(at);
        let Some(whole) = raw.whole(start) else { break };
        show(raw.mapping(whole, whole));
        at = whole.end();
    }
    Ok(())
}

fn mappings_from(mut source: Source, range: HostRange) -> Result<Handful<Mapping>, MapsError> {
    let mut next = |part: HostRange| {
        let at = part.start();
        let hole = || MapsError::Hole { range, at };
        let raw = source.next(at).map_err(MapsError::Unreadable)?.ok_or_else(hole)?;
        let whole = raw.whole(at).ok_or_else(hole)?;
        let cut = whole.intersection(part).expect("both contain `at`");
        Ok((raw.mapping(whole, cut), range.starting_at(cut.end())))
    };
    let (first, mut rest) = next(range)?;
    let mut found = Handful::one(first);
    while let Some(part) = rest {
        let (mapping, left) = next(part)?;
        found.push(mapping);
        rest = left;
    }
    Ok(found)
}

fn mapping_from(mut source: Source, addr: usize) -> Result<Option<Mapping>, MapsError> {
    let at = addr & !(page_size() - 1);
    let Some(raw) = source.next(at).map_err(MapsError::Unreadable)? else { return Ok(None) };
    Ok(raw.whole(at).map(|whole| raw.mapping(whole, whole)))
}

/// A mapping as either source tells it, before it is cut to anything. `start < end`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Raw {
    start: usize,
    end: usize,
    protection: Protection,
    shared: bool,
    offset: u64,
    file: Option<FileId>,
    backing: Backing,
}

impl Raw {
    /// The mapping as a range, which contains the page at `at`; `None` if the mapping doesn't.
    fn whole(&self, at: usize) -> Option<HostRange> {
        let end = self.end.min(USER_SPACE_END); // `[vsyscall]` lies above
        if at < self.start || at >= end {
            return None;
        }
        let whole = HostRange::new(self.start, end - self.start);
        // A sanitizer's shadow memory has more pages than a range may have.
        whole.or_else(|_| HostRange::new(at, (end - at).min(MAX_PAGES * page_size()))).ok()
    }

    /// `part` of this mapping, which lies inside `whole`.
    fn mapping(&self, whole: HostRange, part: HostRange) -> Mapping {
        let offset = self.offset.wrapping_add((part.start() - self.start) as u64);
        Mapping {
            range: part,
            whole,
            protection: self.protection,
            shared: self.shared,
            backing: self.backing,
            file: self.file,
            offset: if self.file.is_some() { offset } else { 0 },
        }
    }
}

/// Where mappings are read from; asked with rising addresses.
enum Source {
    Query,
    Text(text::Lines<BufReader<Text>>),
}

/// Set when the kernel has answered that it doesn't know the ioctl: it won't learn it.
static NO_QUERY: AtomicBool = AtomicBool::new(false);

impl Source {
    fn preferred() -> Result<Self, MapsError> {
        if NO_QUERY.load(Ordering::Relaxed) { Self::text().map_err(MapsError::Unreadable) } else { Ok(Self::Query) }
    }

    /// The text from its beginning.
    fn text() -> io::Result<Self> {
        fault::at(Call::Text)?;
        let text = match (TURN.try_lock(), MAPS.kept()) {
            (Ok(turn), Some(file)) => Text::Kept { file, place: 0, _turn: turn },
            _ => Text::Own(File::open(PATH)?),
        };
        Ok(Self::Text(text::Lines::new(BufReader::new(text))))
    }

    /// The first mapping that ends above `at`.
    fn next(&mut self, at: usize) -> io::Result<Option<Raw>> {
        match self {
            Self::Text(lines) => lines.next(at),
            Self::Query => match query::covering_or_next(at) {
                Err(err) => {
                    // A kernel without the ioctl says ENOTTY; a sandbox may say anything. The text is always there.
                    if err.raw_os_error() == Some(libc::ENOTTY) {
                        NO_QUERY.store(true, Ordering::Relaxed);
                    }
                    *self = Self::text()?;
                    self.next(at)
                }
                found => found,
            },
        }
    }
}

const PATH: &str = "/proc/self/maps";

static MAPS: ProcFile = ProcFile::new(PATH);

/// Held by who reads the text from [`MAPS`].
static TURN: Mutex<()> = Mutex::new(());

/// The text of the list. The kernel goes on from the mapping it told last, but only where a read goes on from the last one: for any
/// other it counts bytes from the beginning, of a text that may have changed since. So one at a time reads from the file that is
/// kept, and whoever comes meanwhile, also from inside of such a walk or in a forked child, opens one for himself.
enum Text {
    Kept { file: &'static File, place: u64, _turn: MutexGuard<'static, ()> },
    Own(File),
}

impl Read for Text {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Own(file) => file.read(into),
            Self::Kept { file, place, .. } => {
                let read = file.read_at(into, *place)?;
                *place += read as u64;
                Ok(read)
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
