//! Tells a program, in time, when bytes of its own address space change hands.
//!
//! A program that shares memory with something that works on it behind its back (a GPU, an RDMA card, an io_uring) has to know when that
//! memory is unmapped, moved or discarded, by whatever library, *before* the call that does so returns. The kernel's drivers have mmu notifiers
//! for this; in user space one hooked the C library or hoped. Here userfaultfd's events are used, in a mode that costs no page fault and needs
//! no privilege.
//!
//! ```
//! use std::{ptr, sync::{Arc, atomic::{AtomicU32, Ordering}}, time::Duration};
//! use pinfold_invalidate::{Change, HostRange, Shards, Space, Target, page_size};
//!
//! #[derive(Default)]
//! struct Cached { changes: AtomicU32, shards: AtomicU32 }
//! impl Target for Cached {
//!     fn invalidated(&self, _: &Change) { self.changes.fetch_add(1, Ordering::SeqCst); }
//!     fn settled(self: Arc<Self>) {} // the place to free what was cached
//!     fn shards(&self) -> Shards { Shards(self.shards.load(Ordering::SeqCst) as u16) }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let space = Space::get(Duration::from_millis(100))?;
//! let (cached, len) = (Arc::new(Cached::default()), 4 * page_size());
//! # let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
//! let memory = unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
//! let range = HostRange::from_ptr(memory, len)?;
//! space.insert(range, 1, cached.clone());
//! let watched = space.watch(range)?;
//! cached.shards.store(watched.shards.0.into(), Ordering::SeqCst);
//! unsafe { libc::munmap(memory, len) };                     // anybody's, anywhere in the process
//! // The gate is open again once the change has been told: whoever looks through it can't miss it.
//! assert!(space.wait_open(watched.shards, std::time::Instant::now() + Duration::from_secs(1)));
//! # if watched.coverage == pinfold_invalidate::Coverage::Watched {
//! assert_eq!(cached.changes.load(Ordering::SeqCst), 1);
//! # }
//! space.remove(range, 1);
//! # Ok(())
//! # }
//! ```
//!
//! What is where: [`HostRange`] and [`mappings`] name memory; [`Space`] tracks it; [`Gate`] is the protocol between those who use memory and
//! those who watch it; [`Space::mutate`] is for mutations known beforehand; [`on_event_path`] enforces the one rule of handlers.

mod bracket;
mod calm;
mod dirty;
mod dirty_log;
mod event_path;
mod fault;
#[cfg(all(test, not(loom)))]
mod fault_tests;
mod fork;
mod gate;
mod handful;
mod hull;
pub mod index;
mod ledger;
mod maps;
mod monitor;
mod pagemap;
mod proc_file;
mod range;
mod ranges;
mod resync;
mod room;
mod settle;
mod shards;
mod space;
mod span;
pub mod sync;
mod uffd;
mod watch;
mod watchdog;

pub use bracket::{MutateError, in_bracket};
pub use dirty::{DirtyTracker, Taken};
pub use dirty_log::{DirtyCursor, Untracked};
pub use event_path::on_event_path;
pub use gate::{Era, Gate, Visit};
pub use handful::Handful;
pub use index::{Entry, Index};
pub use maps::{Backing, FileId, Mapping, MapsError, Protection, mapped_from, mapping_at, mappings};
pub use pagemap::{Missing, any_present, is_all_there, missing, still_watched};
pub use range::{HostRange, MAX_PAGES, RangeError, USER_SPACE_END, page_size};
pub use shards::{SHARDS, Shards};
pub use space::{Cause, Change, DEFAULT_DEADLINE, MAX_DEADLINE, Space, SpaceError, SpaceStats, Target};
pub use watch::{Coverage, ManualReason, NoHoldReason, WatchError, WatchSpan, Watched};

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("pinfold needs 64-bit Linux");
