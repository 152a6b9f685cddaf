//! Which pages of a range were written since one last asked: what a mirror needs to copy only what changed.
//!
//! The pages are write-protected in a way that the kernel resolves by itself at the first write (userfaultfd's `WP_ASYNC`),
//! and a scan of the page tables tells the unprotected ones and protects them again, in one step. Nobody waits for anyone,
//! no signal is sent, no privilege is needed. A scan costs a hundredth of a copy, the first write to a page a fault of about
//! a microsecond.
//!
//! Laws:
//! - **Never less than what was written.** Whatever stands in the way (an old kernel, a mapping that can't be protected or
//!   that was replaced, a forked child) is answered with "everything".
//! - **Protect, then copy.** [`DirtyTracker::take`] protects before it returns, so a write during the copy that follows is
//!   told the next time.
//! - **A page has one tracker.** Taking consumes; two trackers of one page would each miss what the other took. Several who want to know ask
//!   through [`DirtyCursor`](crate::DirtyCursor)s, which share what they are told.
//!
//! Where the kernel can't tell, "everything" is what a reader then copies. To find out by ourselves what has changed would save nothing: comparing
//! 128 MiB with the copy, page by page, takes 0.9 times as long as copying it all, and a hash of each page would break the first law once in a while. Resolving each
//! fault in user space instead, as kernels before `WP_ASYNC` want it, makes every first write wait for a thread of ours.
//!
//! What changes bytes without a write through this mapping isn't told: a device that writes to pages it has pinned; another
//! mapping of the same memory or file, in this process or in another; `write` to the file. Nor is a discard, except of
//! anonymous memory: the kernel keeps the protection of file and shared memory when `madvise` or a punched hole takes the
//! pages. Those who watch the range hear of that (as of a removal) and count it themselves.

use std::io;

use crate::HostRange;
use crate::pagemap::{CHECK_WPASYNC, PRESENT, PageRegion, SWAPPED, WP_MATCHING, WRITTEN, Wanted, is_quick_right, scan};
use crate::uffd::{Uffd, feature};

/// Tells which pages of one range were written.
#[derive(Debug)]
pub struct DirtyTracker {
    range: HostRange,
    /// The process that the protection belongs to.
    process: u32,
    /// What registered the mappings, if nothing else had. Closing it ends that, and touches no other registration, which
    /// older kernels' `UFFDIO_UNREGISTER` does. It asks for no events, so nobody ever waits for it.
    uffd: Option<Uffd>,
    /// Somebody else has registered the mappings, and hears of discards.
    watched: bool,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Pages are protected.
    Armed,
    /// They can't be: everything counts as written.
    Everything(io::Error),
}

/// What [`DirtyTracker::take`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// Exactly the pages that were written since the last time, and those of anonymous memory that were discarded.
    Exact,
    /// The whole range, as it can't be told or could not until now.
    Everything,
}

/// Regions told by one scan; more are told by the next.
const REGIONS: usize = 128;

impl DirtyTracker {
    /// Starts tracking: from here on, no page counts as written that isn't.
    ///
    /// The mappings in the range are registered with a userfaultfd of the tracker's own, unless they are with others that
    /// have `WP_ASYNC`, as those are that watch for changes: watch first, then track. A mapping that the range covers in
    /// part is split by that.
    #[must_use]
    pub fn new(range: HostRange) -> Self {
        Self::start(range, false)
    }

    /// As [`new`](Self::new) for mappings that a [`Space`](crate::Space) watches. Where nobody does, everything counts as written; a registration
    /// of the tracker's own would stand in the way of one who watches them later.
    ///
    /// A discarded huge page, or a whole page table of discarded pages, may go untold: the one who watches is told of it. (Of what nobody is told, as
    /// of a huge page that the kernel takes some time after `MADV_FREE` or that `UFFDIO_MOVE` takes, that depends on the kernel.) Not to ask for what
    /// is absent takes 0.6 to 0.7 of the time.
    #[must_use]
    pub fn of_watched(range: HostRange) -> Self {
        Self::start(range, true)
    }

    fn start(range: HostRange, watched: bool) -> Self {
        let mut tracker = Self { range, process: std::process::id(), uffd: None, watched, state: State::Armed };
        tracker.arm();
        tracker
    }

    /// The range that is tracked.
    #[must_use]
    pub fn range(&self) -> HostRange {
        self.range
    }

    /// Why everything counts as written, if it does.
    #[must_use]
    pub fn refused(&self) -> Option<&io::Error> {
        match &self.state {
            State::Armed => None,
            State::Everything(err) => Some(err),
        }
    }

    /// Adds to `out`, in address order, the parts of the range that were written since the last call, or since
    /// [`new`](Self::new); discarded anonymous memory counts as written (but see [`of_watched`](Self::of_watched)). From here on
    /// these count as not written.
    ///
    /// If a mapping of the range was replaced, the whole range is told and tracked anew. What isn't mapped isn't told.
    pub fn take(&mut self, out: &mut Vec<HostRange>) -> Taken {
        let had = out.len();
        if self.refused().is_none() && self.process == std::process::id() {
            match self.scan(out) {
                Ok(()) => return Taken::Exact,
                Err(err) => self.state = State::Everything(err),
            }
        }
        if self.process == std::process::id() {
            self.arm();
        }
        out.truncate(had);
        out.push(self.range);
        Taken::Everything
    }

    /// Protects every page, registering the mappings first if need be.
    fn arm(&mut self) {
        let all = || protect(self.range.start() as u64, self.range.end() as u64);
        let armed = all().or_else(|refused| {
            if self.watched {
                return Err(refused);
            }
            let uffd = self.uffd.take().map_or_else(open, Ok)?;
            uffd.register(self.range)?;
            self.uffd = Some(uffd);
            all()
        });
        self.state = armed.map_or_else(State::Everything, |()| State::Armed);
    }

    fn scan(&self, out: &mut Vec<HostRange>) -> io::Result<()> {
        let flags = WP_MATCHING | CHECK_WPASYNC;
        if self.watched && is_quick_right() {
            // A single page that was discarded is told. A huge page or a whole page table that was isn't, see below, and is the watch's to tell.
            return collect(self.range, Wanted { flags, all: WRITTEN, ..Wanted::default() }, |_| Ok(true), out);
        }
        // A protected page that was never touched has a marker in the page table. Where there is not even that, a huge page
        // or a whole page table was discarded, which kernels before 2026 don't tell as written. To ask for what is absent in
        // the same walk costs half as much as a second one, and tells protected pages that are swapped out, too.
        // Where the walk tells a page as absent only, it may have left it unprotected.
        let want = Wanted { flags, inverted: PRESENT, any: WRITTEN | PRESENT, told: SWAPPED, ..Wanted::default() };
        let is_told = |region: &PageRegion| {
            let is_absent = region.categories & (PRESENT | SWAPPED) == 0;
            if is_absent && region.categories & WRITTEN == 0 {
                protect(region.start, region.end)?;
            }
            Ok(is_absent || region.categories & WRITTEN != 0)
        };
        let had = out.len();
        collect(self.range, want, is_told, out)?;
        merge(out, had);
        Ok(())
    }
}

/// A userfaultfd that protects without asking.
fn open() -> io::Result<Uffd> {
    let needed = feature::WP_ASYNC | feature::WP_UNPOPULATED | feature::WP_HUGETLBFS_SHMEM;
    let (uffd, got) = Uffd::open(needed)?;
    if got == needed { Ok(uffd) } else { Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)) }
}

/// Protects every page from `start` to `end`, also those that aren't there.
fn protect(start: u64, end: u64) -> io::Result<()> {
    let want = Wanted { flags: WP_MATCHING | CHECK_WPASYNC, ..Wanted::default() };
    scan(start, end, want, &mut []).map(drop)
}

/// Adds to `out`, in address order, the parts of the range that are protected or absent.
pub(crate) fn protected(range: HostRange, out: &mut Vec<HostRange>) -> io::Result<()> {
    collect(range, Wanted { inverted: WRITTEN, all: WRITTEN, ..Wanted::default() }, |_| Ok(true), out)
}

fn collect(
    range: HostRange,
    want: Wanted,
    is_told: impl Fn(&PageRegion) -> io::Result<bool>,
    out: &mut Vec<HostRange>,
) -> io::Result<()> {
    let (mut at, end) = (range.start() as u64, range.end() as u64);
    let mut regions = [PageRegion::default(); REGIONS];
    while at < end {
        let (found, stopped) = scan(at, end, want, &mut regions)?;
        for region in &regions[..found] {
            if is_told(region)? {
                out.extend(HostRange::from_bounds(region.start, region.end));
            }
        }
        if stopped <= at {
            return Err(io::ErrorKind::InvalidData.into()); // a walk that stands still would never end
        }
        at = stopped;
    }
    Ok(())
}

/// Sorts the ranges from `first` on and joins those that touch.
pub(crate) fn merge(out: &mut Vec<HostRange>, first: usize) {
    out[first..].sort_unstable();
    let mut kept = first;
    for at in first..out.len() {
        let range = out[at];
        match kept.checked_sub(1).filter(|&last| last >= first && out[last].end() >= range.start()) {
            Some(last) => out[last] = HostRange::from_known(out[last].start(), out[last].end().max(range.end())),
            None => {
                out[kept] = range;
                kept += 1;
            }
        }
    }
    out.truncate(kept);
}
