//! The watch queue: a bounded ring of small records that says what happened to which object.
//!
//! Whoever wants to know what becomes of objects opens a [`WatchQueue`], puts watches for it on a [`WatchList`], and reads [`Record`]s, in any
//! poll loop. Whoever makes things happen posts to the list. The behaviour, and every byte, is that of Linux's own watch queue
//! (`linux/watch_queue.h`), so one decoder reads both.
//!
//! **Law.** A post never waits, allocates, frees, or makes a system call that could block; a slow reader costs itself records, which it is told of at the place
//! where they are missing, and costs nobody else anything.
//!
//! ```
//! use pinfold_core::watch::{Note, Scope, UserptrEvent, UserptrNote, WatchConfig, WatchList, WatchQueue};
//!
//! let list = WatchList::new();
//! let queue = WatchQueue::new(WatchConfig::default())?;
//! list.add_watch(&queue, Scope::All, 7)?;
//!
//! list.post(42, &UserptrNote { event: UserptrEvent::Closed, object: 42, ..Default::default() }.record());
//!
//! let record = queue.records().next().expect("just posted");
//! assert_eq!(record.tag(), 7);
//! assert!(matches!(record.note(), Note::Userptr(note) if note.object == 42));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Waiting
//!
//! [`WatchQueue::read_timeout`] sleeps. Any event loop can sleep instead: the queue is one descriptor, readable while there is something to read. With
//! tokio, for example:
//!
//! ```
//! use pinfold_core::watch::{ReadError, Record, WatchQueue, records};
//! use tokio::io::unix::AsyncFd;
//!
//! async fn next(queue: &AsyncFd<WatchQueue>) -> std::io::Result<Vec<Record>> {
//!     loop {
//!         let mut ready = queue.readable().await?;
//!         let mut bytes = [0; 4096];
//!         match queue.get_ref().read(&mut bytes) {
//!             Err(ReadError::Empty) => ready.clear_ready(),
//!             Err(error) => return Err(std::io::Error::from_raw_os_error(error.errno())),
//!             Ok(len) => return Ok(records(&bytes[..len]).flatten().collect()), // none: the queue was cleared
//!         }
//!     }
//! }
//! # use pinfold_core::watch::{Scope, UserptrNote, WatchConfig, WatchList};
//! # let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
//! # runtime.block_on(async {
//! #     let (list, queue) = (WatchList::new(), WatchQueue::new(WatchConfig::default())?);
//! #     list.add_watch(&queue, Scope::All, 0)?;
//! #     let queue = AsyncFd::new(queue)?;
//! #     let poster = std::thread::spawn(move || {
//! #         for object in 0..100 { list.post(object, &UserptrNote { object, ..Default::default() }.record()); }
//! #         list
//! #     });
//! #     let mut got = 0;
//! #     while got < 100 { got += next(&queue).await?.len(); }
//! #     poster.join().expect("the posting thread");
//! #     queue.get_ref().clear();
//! #     while !next(&queue).await?.is_empty() {}
//! #     Ok::<(), Box<dyn std::error::Error>>(())
//! # })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Bytes of a record
//!
//! All fields are native-endian. A reader steps over types, and over trailing bytes, that it doesn't know.
//!
//! | record | bytes | field |
//! | --- | --- | --- |
//! | every | 0..4 | type (low 24 bits), subtype (high 8 bits): what happened |
//! | | 4..8 | info: length of the record (bits 0..7), tag of the watch (8..16), flags of the type (16..24), 0 (24..32) |
//! | META, type 0 | | 0 removed, 1 lost |
//! | – removed | 8..16 | object id; left out (length 8) if it is 0 |
//! | KEY_NOTIFY, type 1 | 8..12, 12..16 | key, other word; the kernel's |
//! | USERPTR, type 64 | | 0 registered, 1 queued, 2 acquired, 3 invalidated, 4 faulted, 5 submitted, 6 retired, 7 late, 8 closed, 9 present, 10 forked, 11 all present |
//! | | flags | bit 16 LATE, bit 17 NOHOLD, bit 18 the device writes it |
//! | | 8..16 | object id |
//! | | 16..24 | generation |
//! | | 24..32, 32..40 | range: first address, one past the last |
//! | | 40..48 | hold-off in nanoseconds |
//! | | 48 | cause: 0 none, 1 unmap, 2 remap, 3 remove, 4 bracket, 5 manual, 6 injected, 7 fork, 8 evicted |
//! | | 49 | state: 0 new, 1 queued, 2 acquiring, 3 valid, 4 invalid, 5 faulted, 6 closed, 7 dead after fork |
//! | | 50 | path: 0 none (or not told: acquisitions tell it), 1 import, 2 alias import, 3 dma-buf, 4 mirror |
//! | | 51 | 0 |
//! | | 52..56 | errno (signed), 0 if none |
//! | | 56.. | label, UTF-8, 0 to 64 bytes |
//! | WORK, type 65 | | 0 queued, 1 started, 2 finished, 3 cancelled, 4 worker started, 5 worker stopped, 6 present |
//! | | 8..16, 16..24 | work id, object id |
//! | | 24..32, 32..40 | waited, ran, in nanoseconds |
//! | | 40..44, 44..48, 48..52 | workers, workers running, work pending |
//! | | 52..56 | errno (signed), 0 if none |
//! | DMABUF, type 66 | | 0 exported, 1 imported, 2 sync start, 3 sync end, 4 closed, 5 present, 6 sync waited |
//! | | flags | bit 18 writes, bit 19 reads |
//! | | 8..16, 16..24 | object id, generation |
//! | | 24..32 | inode of the dma-buf |
//! | | 32..40, 40..48 | size, offset in the object, in bytes |
//! | | 48..52 | 0 |
//! | | 52..56 | errno (signed), 0 if none |
//!
//! # Where it differs from the kernel's
//!
//! [`WatchConfig::strict`] gives the kernel's behaviour in the left column.
//!
//! | kernel | here |
//! | --- | --- |
//! | a loss after the last record is hidden from `poll` and from the read that takes that record | it is readable, and comes with that read if it fits |
//! | a removal record posted to a full queue is lost | it has a place of its own |
//! | records posted before the size is set vanish | they leave a loss mark |
//! | filters keep subtypes 0 to 31 and types 0 and 1 | all 256 subtypes, types 0 to 127 |

mod barrier;
mod bell;
mod filter;
mod limit;
mod list;
#[cfg(all(test, loom))]
mod models;
mod note;
mod queue;
mod record;
mod ring;
mod seat;
#[cfg(not(loom))]
pub mod share;
mod signal;
mod snapshot;
mod sync;
mod turn;

pub use filter::{FilterEntry, FilterError, MAX_FILTER_ENTRIES, parse_filter};
pub use limit::WatchLimit;
pub use list::{Released, Scope, WatchError, WatchList};
pub use note::{
    DmaBufEvent, DmaBufNote, KeyEvent, KeyNote, Label, MAX_LABEL_LEN, Note, NoteCause, NotePath, NoteState,
    UserptrEvent, UserptrNote, WorkEvent, WorkNote,
};
pub use queue::{
    Counters, MAX_CAPACITY, MAX_COMPATIBLE_SIZE, OpenError, Policy, ReadError, SizeError, Wake, WatchConfig, WatchQueue,
};
pub use record::{
    HEADER_LEN, INFO_ID, INFO_ID_SHIFT, INFO_LENGTH, INFO_TYPE_INFO, INFO_TYPE_INFO_SHIFT, MAX_RECORD_LEN, META_LOSS,
    META_REMOVAL, Record, RecordError, TYPE_DMABUF, TYPE_KEY_NOTIFY, TYPE_META, TYPE_USERPTR, TYPE_WORK, records,
};
