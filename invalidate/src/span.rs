//! How far a watch reaches: the pages that were asked for, or, as a relief, all of their mapping.
//!
//! **Problem.** Watching part of a mapping splits it. Thirty thousand scattered pages use up the mappings that a process may have, each costs
//! microseconds, and each is one more mapping for the kernel to walk at every `munmap`. Watching all of a mapping costs one call for
//! everybody in it, but makes every mutation of its other pages wait for the monitor.
//!
//! **Law.** A few ranges in a mapping are watched exactly. Where they crowd, or the process has little room left ([`Room`](crate::room::Room)),
//! the mapping is watched as a whole, which takes no further mapping and gives back those that exact watches had split off. A whole mapping is
//! watched until no target is over any of it; what brackets cut out of it comes back with the next watch.
//!
//! **Protocol.** The *run* around a range is what was one mapping before we split it: neighbours that continue each other with the same
//! protection and the same file. It ends at another shard's pages, as one register call names one shard.

use crate::HostRange;
use crate::ledger::{Ledger, Watch};
use crate::maps::{Backing, Mapping, mapping_at};
use crate::page_size;
use crate::space::{Inner, NO_HOLD, SHARD_BLOCK, Space};
use crate::watch::WatchSpan;

/// As many exact pieces within [`SHARD_BLOCK`] of a range are a crowd.
const CROWD: usize = 64;
/// The most neighbours that are looked at on either side: more than a crowd leaves, unless brackets and unmapping leave many.
const RUN: usize = 4096;

impl Inner {
    /// Whether the range should be watched exactly, given that nobody asked otherwise.
    pub(crate) fn is_better_exact(ledger: &mut Ledger, mapping: &Mapping) -> bool {
        let (piece, whole) = (mapping.range, mapping.whole);
        if piece == whole {
            return true; // splits nothing
        }
        // The stack's mapping grows and shrinks by its own rules, and its parts lose its name.
        if mapping.backing == Backing::Stack || first_watch(ledger, piece).is_some_and(|watch| watch.shard == NO_HOLD) {
            return true;
        }
        let beside_whole = || neighbours(ledger, mapping).any(|watch| watch.span == WatchSpan::Mapping);
        !ledger.is_crowded(piece, SHARD_BLOCK, CROWD) && !beside_whole() && ledger.may_split()
    }
}

impl Space {
    /// Takes the target away and ends the watch over pages that no other target covers; of a mapping that is watched as a whole, when no other
    /// target covers any of it.
    pub fn remove(&self, range: HostRange, id: u64) {
        if self.is_forked() {
            return;
        }
        let inner = &*self.inner;
        let mut ledger = inner.ledger();
        // Behind the ledger's lock: of two last targets that go at the same time, the second finds itself alone.
        let removed = inner.index.remove(range, id);
        let mut wholes = Vec::new();
        for (piece, watch) in ledger.pieces_over(range) {
            if watch.span == WatchSpan::Mapping {
                wholes.push(piece);
            }
        }
        wholes.into_iter().for_each(|piece| inner.unwatch_if_nobodys(&mut ledger, piece));
        let mut others = Vec::new();
        inner.index.visit_overlapping(range, |entry| others.extend(entry.range.intersection(range)));
        others.sort_unstable();
        let mut at = range.start();
        let mut alone = Vec::new();
        for other in others {
            if other.start() > at {
                alone.extend(HostRange::new(at, other.start() - at));
            }
            at = at.max(other.end());
        }
        alone.extend(range.starting_at(at));
        for part in alone {
            inner.unwatch(&mut ledger, part, |watch| watch.span == WatchSpan::Exact);
        }
        drop(ledger);
        drop(removed);
        // A reader kept what this change, or one before it, has replaced, and the target with it. There may be no other change that frees it.
        if inner.index.sweep() > 0 {
            inner.owes.settling();
        }
    }
}

impl Inner {
    /// Ends the watch over the range, whoever else covers it.
    pub(crate) fn unregister(&self, range: HostRange) {
        let mut ledger = self.ledger();
        self.unwatch(&mut ledger, range, |_| true);
        ledger.look_beside(range);
    }

    /// Ends the watch over what events have left of whole mappings, where no target is over it any more.
    pub(crate) fn let_go_of_torn(&self) {
        let mut ledger = self.ledger();
        for torn in ledger.take_torn() {
            let piece = ledger.at(torn).filter(|(_, watch)| watch.span == WatchSpan::Mapping);
            if let Some((piece, _)) = piece {
                self.unwatch_if_nobodys(&mut ledger, piece);
            }
        }
    }

    fn unwatch_if_nobodys(&self, ledger: &mut Ledger, piece: HostRange) {
        if !self.index.any_overlapping(piece, |_| true) {
            self.unwatch(ledger, piece, |_| true);
        }
    }

    fn unwatch(&self, ledger: &mut Ledger, range: HostRange, which: impl Fn(Watch) -> bool) {
        let pieces: Vec<_> = ledger.watched(range).filter(|&(_, watch)| which(watch)).collect();
        for (piece, Watch { shard, .. }) in pieces {
            // `EINVAL`: nothing is mapped there any more. Any other refusal leaves it watched, above all that of the split it may need.
            let refused = |uffd: &crate::uffd::Uffd| {
                uffd.unregister(piece).is_err_and(|error| error.raw_os_error() != Some(libc::EINVAL))
            };
            if !self.shards[shard].uffd.as_ref().is_some_and(refused) {
                ledger.cut(piece);
            }
        }
    }

    /// Ends every watch, for the end of the space. Mappings are let go of as wholes, which needs no split and takes along what has grown beyond
    /// its piece (`mremap` in place tells nobody).
    pub(crate) fn unwatch_all(&self) {
        if self.ledger().unsure {
            self.resync();
        }
        let pieces: Vec<_> = self.ledger().all().collect();
        for (piece, Watch { shard, .. }) in pieces {
            let Some(uffd) = &self.shards[shard].uffd else { continue };
            let mapping =
                |at: usize| mapping_at(at).ok().flatten().filter(|_| uffd.watches(at)).map(|found| found.whole);
            let start = mapping(piece.start()).map_or(piece.start(), HostRange::start);
            let end = mapping(piece.end() - page_size()).map_or(piece.end(), HostRange::end);
            if uffd.unregister(HostRange::from_known(start.min(piece.start()), end.max(piece.end()))).is_err() {
                let _ = uffd.unregister(piece); // nothing mapped there any more: nothing to end
            }
        }
    }
}

/// What was one mapping with this one before it was split, as far as one shard can watch it, and that shard (`first`, unless a neighbour has one).
pub(crate) fn run_around(ledger: &Ledger, mapping: &Mapping, first: usize) -> (HostRange, usize) {
    let shard = neighbours(ledger, mapping).next().map_or(first, |watch| watch.shard);
    let ours = |at: usize| ledger.at(at).is_none_or(|(_, watch)| watch.shard == shard);
    let (mut start, mut end) = (mapping.whole.start(), mapping.whole.end());
    for _ in 0..RUN {
        let Some(before) = before(mapping, start).filter(|_| ours(start - page_size())) else { break };
        start = before.whole.start();
    }
    for _ in 0..RUN {
        let Some(after) = after(mapping, end).filter(|_| ours(end)) else { break };
        end = after.whole.end();
    }
    (HostRange::new(start, end - start).unwrap_or(mapping.whole), shard)
}

/// How what was one mapping with this one is watched, on either side of it.
fn neighbours<'a>(ledger: &'a Ledger, mapping: &'a Mapping) -> impl Iterator<Item = Watch> + 'a {
    let (start, end) = (mapping.whole.start(), mapping.whole.end());
    let left = ledger.at(start.wrapping_sub(1)).filter(move |_| before(mapping, start).is_some());
    let right = move || ledger.at(end).filter(move |_| after(mapping, end).is_some());
    left.into_iter().chain(std::iter::once_with(right).flatten()).map(|(_, watch)| watch)
}

/// The mapping that ends at `at`, if it and `mapping` are parts of one.
fn before(mapping: &Mapping, at: usize) -> Option<Mapping> {
    let found = mapping_at(at.checked_sub(page_size())?).ok()??;
    is_one(mapping, &found).then_some(found)
}

/// The mapping that begins at `at`, if it and `mapping` are parts of one.
fn after(mapping: &Mapping, at: usize) -> Option<Mapping> {
    let found = mapping_at(at).ok()??;
    is_one(mapping, &found).then_some(found)
}

/// Whether the kernel would make one mapping of both if they were watched alike and what lies between them, too.
fn is_one(a: &Mapping, b: &Mapping) -> bool {
    let place = |mapping: &Mapping| (mapping.offset as usize).wrapping_sub(mapping.range.start());
    (a.protection, a.shared, a.backing, a.file) == (b.protection, b.shared, b.backing, b.file)
        && (a.file.is_none() || place(a) == place(b))
}

fn first_watch(ledger: &Ledger, piece: HostRange) -> Option<Watch> {
    ledger.watched(piece).next().map(|(_, watch)| watch)
}
