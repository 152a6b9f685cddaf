//! Which pages were written, told to everyone who wants to know.
//!
//! **Problem.** To ask the kernel which pages were written is to make it forget (see `dirty.rs`). Mirrors overlap, and several devices mirror the
//! same bytes; each wants to know what was written since *it* asked last. And what a device has imported must not be write-protected at all: a
//! device that goes through the page tables may find its pages protected, and be lost.
//!
//! **Law.** Every cursor is told of every write since its last question, whoever asked the kernel meanwhile. No page under an [`Untracked`] is
//! write-protected by us.
//!
//! **Protocol.** One log for the process, behind one lock. Who asks, asks the kernel for its own range, and what the answer says of other cursors'
//! ranges is kept for them, before the lock is let go. Making a range untracked takes protection back under the same lock; cursors over it then
//! answer "everything", until the last such range is gone. A cursor that goes takes protection back too, so that no page is protected for nobody:
//! the others find those pages written, which is more than was and never less.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::dirty::merge;
use crate::ranges::Ranges;
use crate::{DirtyTracker, HostRange, Space, Taken};

/// Tells its owner which pages of a range were written since it was last asked.
pub struct DirtyCursor {
    id: u64,
    range: HostRange,
    space: Arc<Space>,
}

/// Keeps the pages of a range free of write protection while it lives.
pub struct Untracked {
    id: u64,
    range: HostRange,
}

struct Log {
    cursors: Ranges<Cursor>,
    untracked: Ranges<()>,
    /// Pages have been protected since the process began. Moving a mapping takes its protection along, to where no cursor is.
    ever: bool,
}

struct Cursor {
    /// `None` before the first question, and after it lay over an untracked range.
    tracker: Option<DirtyTracker>,
    /// What others were told by the kernel of this range.
    kept: Vec<HostRange>,
}

/// Taken for a question, which is one system call for each few hundred regions, and never by the monitor.
static LOG: Mutex<Log> = Mutex::new(Log { cursors: Ranges::new(), untracked: Ranges::new(), ever: false });
static NEXT: AtomicU64 = AtomicU64::new(0);

/// More pieces than this are joined, so that one who never asks costs no memory.
const KEPT: usize = 4096;

fn log() -> MutexGuard<'static, Log> {
    // A panic under the lock can only be a failed allocation; what it leaves behind tells too much at worst, as ranges are added before
    // anything is taken away.
    LOG.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DirtyCursor {
    /// A cursor over a range whose mappings [`Space::watch`] watches; the first [`take`](Self::take) tells everything.
    ///
    /// Nothing is registered for it: over mappings that nobody watches, every answer is everything.
    #[must_use]
    pub fn new(space: &Arc<Space>, range: HostRange) -> Self {
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        log().cursors.insert(range, id, Cursor { tracker: None, kept: Vec::new() });
        Self { id, range, space: Arc::clone(space) }
    }

    /// The range.
    #[must_use]
    pub fn range(&self) -> HostRange {
        self.range
    }

    /// Adds to `out`, in address order, the parts of the range that were written since the last call. From here on these count as not written
    /// for this cursor, and a write that comes while they are copied is told the next time. Of discards, see [`DirtyTracker::of_watched`].
    pub fn take(&mut self, out: &mut Vec<HostRange>) -> Taken {
        let had = out.len();
        let mut log = log();
        let blocked = log.untracked.any_overlapping(self.range);
        let mut cursor = log.cursors.remove(self.range, self.id).expect("a cursor is in the log until it is dropped");
        let taken = if blocked {
            cursor.tracker = None;
            Taken::Everything
        } else {
            log.ever = true;
            match &mut cursor.tracker {
                Some(tracker) => tracker.take(out),
                none => {
                    *none = Some(DirtyTracker::of_watched(self.range)); // protects, and so takes from the others
                    Taken::Everything
                }
            }
        };
        match taken {
            Taken::Everything => {
                out.truncate(had);
                out.push(self.range);
                if !blocked {
                    log.keep(&[self.range]);
                }
            }
            Taken::Exact => {
                log.keep(&out[had..]);
                out.append(&mut cursor.kept);
                merge(out, had);
            }
        }
        cursor.kept.clear();
        log.cursors.insert(self.range, self.id, cursor);
        taken
    }
}

impl Log {
    /// Keeps what was told to one cursor for the others. The one that asked is not in the log at the moment.
    fn keep(&mut self, told: &[HostRange]) {
        for part in told {
            self.cursors.each_overlapping(*part, |range, cursor| {
                cursor.kept.extend(part.intersection(range));
                if cursor.kept.len() > KEPT {
                    merge(&mut cursor.kept, 0);
                }
                if cursor.kept.len() > KEPT {
                    cursor.kept.clear();
                    cursor.kept.push(range);
                }
            });
        }
    }
}

impl Drop for DirtyCursor {
    fn drop(&mut self) {
        if self.space.is_forked() {
            return; // the log is the parent's
        }
        let mut log = log();
        let cursor = log.cursors.remove(self.range, self.id);
        if cursor.is_some_and(|cursor| cursor.tracker.is_some()) {
            // What can't be unprotected now is, by whoever makes it untracked.
            let _ = self.space.unprotect(self.range);
        }
    }
}

impl Untracked {
    /// Takes back every write protection in the range, and lets none come. For memory that a device is about to import.
    ///
    /// # Errors
    /// `EAGAIN` if memory of the process changes hands all the time, so that the kernel doesn't let us; what [`mappings`](crate::mappings) fails with.
    pub fn new(space: &Arc<Space>, range: HostRange) -> io::Result<Self> {
        let mut log = log();
        if log.ever {
            space.unprotect(range)?;
        }
        log.cursors.each_overlapping(range, |_, cursor| cursor.tracker = None);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        log.untracked.insert(range, id, ());
        Ok(Self { id, range })
    }

    /// The range.
    #[must_use]
    pub fn range(&self) -> HostRange {
        self.range
    }
}

impl Drop for Untracked {
    fn drop(&mut self) {
        log().untracked.remove(self.range, self.id);
    }
}

impl std::fmt::Debug for DirtyCursor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("DirtyCursor").field(&self.range).finish()
    }
}

impl std::fmt::Debug for Untracked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Untracked").field(&self.range).finish()
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
