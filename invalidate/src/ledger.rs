//! Which pages are watched, and by which shard: the record that unwatching and teardown go by.
//!
//! The kernel knows too, but it has no way to ask, and unregistering pages that belong to somebody else's userfaultfd would end *their* watch
//! on older kernels. So the ledger follows what happens to watched memory (moves take the watch along, unmapping ends it).

use std::collections::BTreeMap;

use crate::HostRange;

/// Disjoint ranges with the shard that watches them; neighbours of one shard are one entry.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// Start → (end, shard).
    pieces: BTreeMap<usize, (usize, usize)>,
}

impl Ledger {
    /// Records that `shard` watches the range, whoever did before.
    pub(crate) fn watch(&mut self, range: HostRange, shard: usize) {
        self.cut(range);
        let (mut start, mut end) = (range.start(), range.end());
        if let Some((&left, &(left_end, left_shard))) = self.pieces.range(..start).next_back()
            && left_end == start
            && left_shard == shard
        {
            self.pieces.remove(&left);
            start = left;
        }
        if let Some(&(right_end, right_shard)) = self.pieces.get(&end)
            && right_shard == shard
        {
            self.pieces.remove(&end);
            end = right_end;
        }
        self.pieces.insert(start, (end, shard));
    }

    /// Records that nobody watches the range any more.
    pub(crate) fn cut(&mut self, range: HostRange) {
        let (start, end) = (range.start(), range.end());
        // Whoever begins before `start` and reaches into it is shortened, and keeps what lies behind `end`.
        if let Some((_, piece)) = self.pieces.range_mut(..start).next_back()
            && piece.0 > start
        {
            let (old_end, shard) = *piece;
            piece.0 = start;
            if old_end > end {
                self.pieces.insert(end, (old_end, shard));
            }
        }
        while let Some((&first, &(old_end, shard))) = self.pieces.range(start..end).next() {
            self.pieces.remove(&first);
            if old_end > end {
                self.pieces.insert(end, (old_end, shard));
            }
        }
    }

    /// Records that the mapping moved and took its watch along; with `stays`, the old place remains watched too.
    pub(crate) fn moved(&mut self, from: HostRange, to: HostRange) {
        let pieces: Vec<_> = self.watched(from).collect();
        self.cut(to);
        for (piece, shard) in pieces {
            let start = to.start() + (piece.start() - from.start());
            if let Ok(piece) = HostRange::new(start, piece.len()) {
                self.watch(piece, shard);
            }
        }
    }

    /// The watched parts of the range with their shards, in address order.
    pub(crate) fn watched(&self, range: HostRange) -> impl Iterator<Item = (HostRange, usize)> + '_ {
        let first = self.pieces.range(..range.start()).next_back();
        first.into_iter().chain(self.pieces.range(range.start()..range.end())).filter_map(
            move |(&start, &(end, shard))| {
                let piece = HostRange::new(start, end - start).expect("a ledger's piece is part of a range");
                Some((piece.intersection(range)?, shard))
            },
        )
    }

    /// Everything, for teardown.
    pub(crate) fn all(&self) -> impl Iterator<Item = (HostRange, usize)> + '_ {
        self.pieces.iter().map(|(&start, &(end, shard))| {
            (HostRange::new(start, end - start).expect("a ledger's piece is part of a range"), shard)
        })
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::page_size;

    /// A page-by-page array does the same thing, slowly.
    #[test]
    fn agrees_with_a_page_by_page_oracle() {
        const PAGES: usize = 24;
        let page = page_size();
        let range = |a: usize, n: usize| HostRange::new((a + 1) * page, n * page).unwrap();
        let (mut ledger, mut oracle) = (Ledger::default(), [None; PAGES]);
        let mut seed = 7_usize;
        let mut random = |below: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        for _ in 0..20_000 {
            let start = random(PAGES);
            let len = 1 + random(PAGES - start);
            match random(4) {
                0 => {
                    ledger.cut(range(start, len));
                    oracle[start..start + len].fill(None);
                }
                1 => {
                    let to = random(PAGES - len + 1);
                    ledger.moved(range(start, len), range(to, len));
                    let old = oracle;
                    oracle[to..to + len].copy_from_slice(&old[start..start + len]);
                }
                shard => {
                    ledger.watch(range(start, len), shard);
                    oracle[start..start + len].fill(Some(shard));
                }
            }
            let mut seen = [None; PAGES];
            for (piece, shard) in ledger.watched(range(0, PAGES)) {
                let at = piece.start() / page - 1;
                seen[at..at + piece.pages()].fill(Some(shard));
            }
            assert_eq!(seen, oracle);
            assert!(ledger.all().map(|(piece, _)| piece.pages()).sum::<usize>() == oracle.iter().flatten().count());
        }
    }
}
