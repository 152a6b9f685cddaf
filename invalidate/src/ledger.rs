//! Which pages are watched, by which shard, and how far the watch reaches: the record that watching again, unwatching and teardown go by.
//!
//! The kernel knows too, but it has no way to ask, and unregistering pages that belong to somebody else's userfaultfd would end *their* watch
//! on older kernels. So the ledger follows what happens to watched memory (moves take the watch along, unmapping ends it).
//!
//! It is also why watching an object in memory that is watched already takes one question to the kernel and no change: every event that could
//! have ended that watch is in the ledger before any target is told of it, and who is told begins anew.
//!
//! A piece takes 32 bytes in the map, about 50 with the map's own share; a mapping that is watched as a whole is one piece, however many
//! objects lie in it.

use std::collections::BTreeMap;

use crate::HostRange;
use crate::room::Room;
use crate::space::{SHARDS, Shards};
use crate::watch::WatchSpan;

/// How a piece is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Watch {
    pub(crate) shard: usize,
    /// What the piece is: pages that were asked for, or all of a mapping. The latter is given up only as a whole, when no target is left over it.
    pub(crate) span: WatchSpan,
}

#[derive(Debug, Clone, Copy)]
struct Piece {
    end: usize,
    watch: Watch,
}

/// Disjoint ranges with the shard that watches them; neighbours that are watched alike are one entry.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// By start.
    pieces: BTreeMap<usize, Piece>,
    /// How many of them are exact. Each may cost the process two mappings.
    exact: usize,
    room: Room,
    /// An address of each part that was left of a whole mapping: watched still, perhaps for nobody. For the settle thread.
    torn: Vec<usize>,
    /// By shard: as many discards as had been told before the address space's lock was last taken with none in flight. See [`Self::covered`].
    pub(crate) fenced: [u64; SHARDS],
    /// Events were lost, so that what it says may be over. Until it has been compared with the kernel's list, nothing is believed to be watched.
    pub(crate) unsure: bool,
}

impl Ledger {
    /// Records how the range is watched, however it was before.
    pub(crate) fn watch(&mut self, range: HostRange, watch: Watch) {
        self.cut(range);
        self.join(range, watch);
    }

    /// Records how a range is watched that was not.
    fn join(&mut self, range: HostRange, watch: Watch) {
        let (mut start, mut end) = (range.start(), range.end());
        if let Some((&left, piece)) = self.pieces.range(..start).next_back()
            && piece.end == start
            && piece.watch == watch
        {
            self.take(left);
            start = left;
        }
        if let Some(&right) = self.pieces.get(&end)
            && right.watch == watch
        {
            self.take(end);
            end = right.end;
        }
        self.put(start, Piece { end, watch });
    }

    /// As [`watch`](Self::watch), but for a range that is watched already, which stays as it is.
    pub(crate) fn watch_more(&mut self, range: HostRange, watch: Watch) {
        if self.is_free(range) {
            self.join(range, watch);
        } else if self.pieces_over(range).all(|(piece, old)| old.shard != watch.shard || !piece.covers(range)) {
            self.watch(range, watch);
        }
    }

    /// Records that nobody watches the range any more.
    pub(crate) fn cut(&mut self, range: HostRange) {
        let (start, end) = (range.start(), range.end());
        // Whoever begins before `start` and reaches into it is shortened, and keeps what lies behind `end`.
        if let Some((_, piece)) = self.pieces.range_mut(..start).next_back()
            && piece.end > start
        {
            let old = *piece;
            piece.end = start;
            if old.end > end {
                self.put(end, old);
            }
        }
        while let Some((&first, &piece)) = self.pieces.range(start..end).next() {
            self.take(first);
            if piece.end > end {
                self.put(end, piece);
            }
        }
    }

    /// Records that the mapping is gone.
    pub(crate) fn unmapped(&mut self, range: HostRange) {
        self.cut(range);
        self.look_beside(range);
    }

    /// Puts what is left beside the range of a mapping that was watched as a whole on the list of what is [`torn`](Self::take_torn).
    pub(crate) fn look_beside(&mut self, range: HostRange) {
        for beside in [range.start().wrapping_sub(1), range.end()] {
            if self.at(beside).is_some_and(|(_, watch)| watch.span == WatchSpan::Mapping) {
                self.torn.push(beside);
            }
        }
    }

    /// Records that the mapping moved and took its watch along; the old place remains watched too, unless it is unmapped.
    ///
    /// Only watched memory tells that it moves, and it goes on before that is written down. Who has ended the watch of the old place meanwhile has taken
    /// it out of here, and not ended that of the new one: then only the kernel knows.
    pub(crate) fn moved(&mut self, from: HostRange, to: HostRange) {
        let pieces: Vec<_> = self.watched(from).collect();
        self.unsure |= pieces.iter().map(|(piece, _)| piece.len()).sum::<usize>() < from.len();
        self.cut(to);
        for (piece, watch) in pieces {
            let start = to.start() + (piece.start() - from.start());
            if let Ok(piece) = HostRange::new(start, piece.len()) {
                self.watch(piece, watch);
                if watch.span == WatchSpan::Mapping {
                    self.torn.push(start);
                }
            }
        }
    }

    /// Whether nobody watches any of the range.
    pub(crate) fn is_free(&self, range: HostRange) -> bool {
        let last = self.pieces.range(..range.end()).next_back();
        last.is_none_or(|(_, piece)| piece.end <= range.start())
    }

    /// The watched parts of the range, in address order.
    pub(crate) fn watched(&self, range: HostRange) -> impl Iterator<Item = (HostRange, Watch)> + '_ {
        self.pieces_over(range).filter_map(move |(piece, watch)| Some((piece.intersection(range)?, watch)))
    }

    /// As [`watched`](Self::watched), each with all of its bytes.
    pub(crate) fn pieces_over(&self, range: HostRange) -> impl Iterator<Item = (HostRange, Watch)> + '_ {
        let first = self.pieces.range(..range.start()).next_back().filter(move |(_, piece)| piece.end > range.start());
        first.into_iter().chain(self.pieces.range(range.start()..range.end())).map(whole)
    }

    /// The piece that contains the address.
    pub(crate) fn at(&self, addr: usize) -> Option<(HostRange, Watch)> {
        self.pieces.range(..=addr).next_back().map(whole).filter(|(piece, _)| piece.contains(addr))
    }

    /// The shards that watch the range, if they watch all of it.
    pub(crate) fn covered(&self, range: HostRange) -> Option<Shards> {
        if self.unsure {
            return None;
        }
        // Nearly always it is one piece or none.
        let (piece, watch) = self.at(range.start())?;
        if piece.covers(range) {
            return Some(Shards::one(watch.shard));
        }
        let (mut at, mut shards) = (range.start(), Shards::NONE);
        for (piece, watch) in self.pieces_over(range) {
            if piece.start() > at {
                return None;
            }
            (at, shards) = (piece.end(), shards.union(Shards::one(watch.shard)));
        }
        (at >= range.end()).then_some(shards)
    }

    /// Whether at least `many` exact pieces lie within `reach` bytes of the range.
    pub(crate) fn is_crowded(&self, range: HostRange, reach: usize, many: usize) -> bool {
        let near = range.start().saturating_sub(reach)..range.end().saturating_add(reach);
        self.pieces.range(near).filter(|(_, piece)| piece.watch.span == WatchSpan::Exact).take(many).count() == many
    }

    /// Takes the room of one more exact piece, if there is.
    pub(crate) fn may_split(&mut self) -> bool {
        self.room.take(self.exact)
    }

    /// What was torn since the last call.
    pub(crate) fn take_torn(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.torn)
    }

    /// Everything.
    pub(crate) fn all(&self) -> impl Iterator<Item = (HostRange, Watch)> + '_ {
        self.pieces.iter().map(whole)
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.pieces.clear();
        self.exact = 0;
    }

    fn put(&mut self, start: usize, piece: Piece) {
        self.exact += usize::from(piece.watch.span == WatchSpan::Exact);
        self.pieces.insert(start, piece);
    }

    fn take(&mut self, start: usize) {
        let piece = self.pieces.remove(&start).expect("the piece was just seen");
        self.exact -= usize::from(piece.watch.span == WatchSpan::Exact);
    }
}

fn whole((&start, piece): (&usize, &Piece)) -> (HostRange, Watch) {
    (HostRange::from_known(start, piece.end), piece.watch)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::page_size;

    const PAGES: usize = 24;

    fn range(first: usize, pages: usize) -> HostRange {
        HostRange::new((first + 1) * page_size(), pages * page_size()).unwrap()
    }

    /// A page-by-page array does the same thing, slowly.
    #[test]
    fn agrees_with_a_page_by_page_oracle() {
        let (mut ledger, mut oracle) = (Ledger::default(), [None; PAGES]);
        let mut seed = 7_usize;
        let mut random = |below: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        for _ in 0..20_000 {
            let start = random(PAGES);
            let len = 1 + random(PAGES - start);
            match random(5) {
                0 => {
                    ledger.unmapped(range(start, len));
                    oracle[start..start + len].fill(None);
                }
                1 => {
                    let to = random(PAGES - len + 1);
                    ledger.moved(range(start, len), range(to, len));
                    let old = oracle;
                    oracle[to..to + len].copy_from_slice(&old[start..start + len]);
                    let known = old[start..start + len].iter().all(Option::is_some);
                    assert_eq!(std::mem::take(&mut ledger.unsure), !known, "only watched memory tells that it moves");
                }
                kind => {
                    let span = if kind == 4 { WatchSpan::Mapping } else { WatchSpan::Exact };
                    let watch = Watch { shard: random(2), span };
                    ledger.watch(range(start, len), watch);
                    oracle[start..start + len].fill(Some(watch));
                }
            }
            let mut seen = [None; PAGES];
            for (piece, watch) in ledger.watched(range(0, PAGES)) {
                let at = piece.start() / page_size() - 1;
                seen[at..at + piece.pages()].fill(Some(watch));
            }
            assert_eq!(seen, oracle);
            let all: Vec<_> = ledger.all().collect();
            assert_eq!(all.iter().map(|(piece, _)| piece.pages()).sum::<usize>(), oracle.iter().flatten().count());
            assert_eq!(ledger.exact, all.iter().filter(|(_, watch)| watch.span == WatchSpan::Exact).count());
            let first = random(PAGES);
            let asked = first..first + 1 + random(PAGES - first);
            assert_eq!(ledger.is_free(range(first, asked.len())), oracle[asked.clone()].iter().all(Option::is_none));
            let covered = oracle[asked.clone()]
                .iter()
                .try_fold(Shards::NONE, |shards, page| page.map(|watch| shards.union(Shards::one(watch.shard))));
            assert_eq!(ledger.covered(range(first, asked.len())), covered);
            assert_eq!(ledger.at(range(first, 1).start()).map(|(_, watch)| watch), oracle[first]);
        }
    }

    #[test]
    fn what_is_left_of_a_whole_mapping_is_remembered_and_what_is_left_of_exact_pages_is_not() {
        let mut ledger = Ledger::default();
        ledger.watch(range(0, 10), Watch { shard: 0, span: WatchSpan::Mapping });
        ledger.watch(range(12, 5), Watch { shard: 0, span: WatchSpan::Exact });
        ledger.unmapped(range(4, 2));
        ledger.unmapped(range(14, 1));
        assert_eq!(ledger.take_torn(), [range(4, 1).start() - 1, range(6, 1).start()]);
        ledger.moved(range(0, 4), range(20, 4));
        assert_eq!((ledger.take_torn(), ledger.take_torn()), (vec![range(20, 4).start()], vec![]));
    }
}
