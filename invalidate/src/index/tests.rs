//! The index against a plain list, against another crate's interval tree, and against its own laws.

use std::collections::BTreeMap;

use proptest::prelude::*;
use rust_lapper::{Interval, Lapper};

use super::*;
use crate::page_size;

type Told = (usize, usize, u64, u32);

/// What the index does, done by looking at everything.
#[derive(Default)]
struct Oracle(BTreeMap<(usize, u64), (HostRange, u32)>);

impl Oracle {
    fn insert(&mut self, range: HostRange, id: u64, value: u32) -> Option<u32> {
        self.0.insert((range.start(), id), (range, value)).map(|old| old.1)
    }

    fn remove(&mut self, range: HostRange, id: u64) -> Option<u32> {
        let key = (range.start(), id);
        (self.0.get(&key)?.0 == range).then(|| self.0.remove(&key).map(|old| old.1)).flatten()
    }

    fn overlapping(&self, low: usize, high: usize) -> Vec<Told> {
        let all = self.0.iter().map(|(key, (range, value))| (range.start(), range.end(), key.1, *value));
        all.filter(|told| told.0 < high && told.1 > low).collect()
    }
}

fn pages(start: usize, len: usize) -> HostRange {
    HostRange::new(start * page_size(), len * page_size()).unwrap()
}

fn told(index: &Index<u32>, low: usize, high: usize) -> (Vec<Told>, usize) {
    let (mut all, mut seen) = (Vec::new(), 0);
    index.visit(low, high, &mut || seen += 1, |entry| {
        all.push((entry.range.start(), entry.range.end(), entry.id, **entry.value));
    });
    (all, seen)
}

fn overlapping(index: &Index<u32>, range: HostRange) -> Vec<Told> {
    told(index, range.start(), range.end()).0
}

/// Checks the tree's own laws and returns its height.
fn check<T>(index: &Index<T>) -> usize {
    let held = holds::hold(&index.current);
    // SAFETY: the root is held, and with it its nodes.
    let (height, len) = unsafe { Tree::unpack(held.root).check() };
    assert_eq!(len, index.len());
    height
}

/// Numbers that look random and are the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }
}

#[derive(Debug, Clone, Copy)]
enum Op {
    Insert(usize, usize, u64, u32),
    Remove(usize, usize, u64),
    RemoveAny(usize),
    Visit(usize, usize),
    Find(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let (at, len, id) = (0_usize..160, 1_usize..9, 0_u64..4);
    prop_oneof![
        6 => (at.clone(), len.clone(), id.clone(), any::<u32>()).prop_map(|(a, l, i, v)| Op::Insert(a, l, i, v)),
        1 => (at.clone(), len.clone(), id).prop_map(|(a, l, i)| Op::Remove(a, l, i)),
        3 => any::<usize>().prop_map(Op::RemoveAny),
        1 => (at.clone(), len).prop_map(|(a, l)| Op::Visit(a, l)),
        1 => at.prop_map(Op::Find),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Near each other, far apart, and so far that one node reaches over terabytes.
    #[test]
    fn any_changes_and_questions_agree_with_a_plain_list(
        ops in proptest::collection::vec(op(), 0..1200),
        // Half as long, so that neighbours touch; or rounded up or down, so that they overlap by one page or leave one between them.
        (apart, half) in prop_oneof![
            Just((1, 1)),
            Just((3 << 20, 3 << 19)),
            Just(((1 << 27) + 5, (1 << 26) + 3)),
            Just(((1 << 27) + 5, (1 << 26) + 2)),
        ],
    ) {
        let (index, mut oracle) = (Index::new(), Oracle::default());
        let pages = |at: usize, len: usize| pages(at * apart, len * half);
        for (round, op) in ops.into_iter().enumerate() {
            match op {
                Op::Insert(at, len, id, value) => {
                    let old = index.insert(pages(at, len), id, Arc::new(value));
                    prop_assert_eq!(old.map(|old| *old), oracle.insert(pages(at, len), id, value));
                }
                Op::Remove(at, len, id) => {
                    let old = index.remove(pages(at, len), id);
                    prop_assert_eq!(old.map(|old| *old), oracle.remove(pages(at, len), id));
                }
                Op::RemoveAny(nth) => {
                    let Some((key, (range, _))) = oracle.0.iter().nth(nth % oracle.0.len().max(1)) else { continue };
                    let (range, id) = (*range, key.1);
                    let old = index.remove(range, id);
                    prop_assert_eq!(old.map(|old| *old), oracle.remove(range, id));
                }
                Op::Visit(at, len) => {
                    let range = pages(at, len);
                    prop_assert_eq!(overlapping(&index, range), oracle.overlapping(range.start(), range.end()));
                }
                Op::Find(at) => {
                    for addr in [at * apart * page_size() + at, (at + 1) * apart * page_size() - 1] {
                        prop_assert_eq!(told(&index, addr, addr + 1).0, oracle.overlapping(addr, addr + 1));
                    }
                }
            }
            if round.is_multiple_of(16) {
                check(&index);
            }
            prop_assert_eq!(index.len(), oracle.0.len());
        }
        prop_assert_eq!(told(&index, 0, usize::MAX).0, oracle.overlapping(0, usize::MAX));
        prop_assert_eq!(index.sweep(), 0);
    }
}

/// Fills with `order`, empties in `back`, looking now and then.
fn fill_and_empty(order: &[usize], back: &[usize]) {
    let (index, mut oracle) = (Index::new(), Oracle::default());
    let range = |n: usize| pages(3 * n, 1 + n % 7);
    for (round, &n) in order.iter().enumerate() {
        index.insert(range(n), 7, Arc::new(n as u32));
        oracle.insert(range(n), 7, n as u32);
        if round.is_multiple_of(97) {
            check(&index);
            assert_eq!(
                overlapping(&index, pages(3 * n, 40)),
                oracle.overlapping(range(n).start(), range(n).start() + 40 * page_size())
            );
        }
    }
    let height = check(&index);
    assert!(height >= 3, "{} entries in {height} levels", index.len());
    for (round, &n) in back.iter().enumerate() {
        assert_eq!(index.remove(range(n), 7).map(|value| *value), oracle.remove(range(n), 7));
        if round.is_multiple_of(97) {
            check(&index);
            assert_eq!(told(&index, 0, usize::MAX).0, oracle.overlapping(0, usize::MAX));
        }
    }
    assert!(index.is_empty());
    assert_eq!(check(&index), 0, "nothing is left of the tree");
}

#[test]
fn trees_grow_and_shrink_in_any_order() {
    let up: Vec<_> = (0..5000).collect();
    let down: Vec<_> = up.iter().rev().copied().collect();
    let mut mixed = up.clone();
    let mut random = Random(1);
    for at in (1..mixed.len()).rev() {
        mixed.swap(at, random.below(at + 1));
    }
    let orders = [&up, &down, &mixed];
    for order in orders {
        for back in orders {
            fill_and_empty(order, back);
        }
    }
}

#[test]
fn nodes_stay_half_full_and_trees_low() {
    let index = Index::new();
    let mut random = Random(2);
    for n in 0..20_000_u32 {
        index.insert(pages(random.below(1 << 30), 1), u64::from(n), Arc::new(n));
    }
    let mut nodes = 0;
    index.visit(0, usize::MAX, &mut || nodes += 1, |_| {});
    assert!(nodes * node::WIDTH < 2 * index.len(), "{nodes} nodes for {} entries", index.len());
    // Thin it out to a tenth: the nodes must follow.
    for (start, end, id, _) in told(&index, 0, usize::MAX).0 {
        if id % 10 != 0 {
            index.remove(HostRange::from_known(start, end), id);
        }
    }
    check(&index);
    let mut left = 0;
    index.visit(0, usize::MAX, &mut || left += 1, |_| {});
    assert!(left * node::WIDTH < 5 * index.len(), "{left} nodes for {} entries", index.len());
}

#[test]
fn one_giant_range_at_most_doubles_the_nodes_that_a_question_looks_into() {
    let index = Index::new();
    for n in 0..20_000 {
        index.insert(pages(16 * n + 1, 1 + n % 12), 1, Arc::new(0));
    }
    let cost = |index: &Index<u32>| {
        let mut random = Random(3);
        (0..2000).map(|_| nodes_at(index, random.below(320_000) * page_size())).sum::<usize>()
    };
    let without = cost(&index);
    index.insert(pages(0, 320_001), 1, Arc::new(1));
    let with = cost(&index);
    assert!(with <= 2 * without, "{with} nodes instead of {without}");
    assert!(with > without, "the giant is looked at");
}

fn nodes_at(index: &Index<u32>, addr: usize) -> usize {
    told(index, addr, addr + 1).1
}

#[test]
fn thousands_of_equal_ranges_are_told_apart_by_their_ids() {
    let (index, range) = (Index::new(), pages(5, 3));
    for id in 0..5000_u32 {
        assert!(index.insert(range, u64::from(id), Arc::new(id)).is_none());
    }
    check(&index);
    assert_eq!(overlapping(&index, pages(7, 1)).len(), 5000);
    assert!(overlapping(&index, pages(8, 1)).is_empty());
    for id in (0..5000).rev() {
        assert!(index.remove(pages(5, 2), id).is_none(), "another range");
        assert_eq!(index.remove(range, id).map(|value| u64::from(*value)), Some(id));
    }
    assert!(index.is_empty());
}

#[test]
fn an_interval_tree_of_another_crate_gives_the_same_answers() {
    let (index, mut random) = (Index::new(), Random(4));
    let mut intervals = Vec::new();
    for n in 0..3000_u32 {
        let range = pages(random.below(20_000), 1 + if n % 10 == 0 { random.below(500) } else { random.below(16) });
        index.insert(range, u64::from(n), Arc::new(n));
        intervals.push(Interval { start: range.start(), stop: range.end(), val: n });
    }
    let lapper = Lapper::new(intervals);
    for _ in 0..2000 {
        let asked = pages(random.below(20_000), 1 + random.below(64));
        let mut theirs: Vec<_> = lapper.find(asked.start(), asked.end()).map(|found| found.val).collect();
        let mut ours: Vec<_> = overlapping(&index, asked).iter().map(|told| told.3).collect();
        theirs.sort_unstable();
        ours.sort_unstable();
        assert_eq!(ours, theirs);
    }
}

#[test]
fn a_removed_value_lives_while_a_visit_can_see_it_and_dies_once() {
    let (index, range) = (Index::new(), pages(1, 1));
    let value = Arc::new(());
    let alive = Arc::downgrade(&value);
    index.insert(range, 1, value);
    index.visit_overlapping(range, |entry| {
        drop(index.remove(range, 1).expect("it is there"));
        assert_eq!(index.len(), 0);
        for n in 0..100 {
            index.insert(pages(10 + n, 1), 1, Arc::new(()));
        }
        assert_eq!(index.sweep(), 101, "this visit holds the oldest root");
        assert_eq!(Arc::strong_count(entry.value), 1, "only the index holds it");
        assert!(alive.upgrade().is_some());
    });
    assert_eq!(index.sweep(), 0);
    assert!(alive.upgrade().is_none());
}

#[test]
fn dropping_the_index_drops_every_value_once() {
    let value = Arc::new(());
    let index = Index::new();
    for n in 0..2000 {
        index.insert(pages(n, 2), 1, value.clone());
    }
    for n in 0..500 {
        index.remove(pages(4 * n, 2), 1);
    }
    assert_eq!(index.insert(pages(1, 2), 1, value.clone()).map(|_| ()), Some(()), "one is replaced");
    assert_eq!(index.sweep(), 0);
    assert_eq!(Arc::strong_count(&value), 1 + 1500);
    // One root is left unswept.
    index.visit_overlapping(pages(1, 1), |_| drop(index.remove(pages(1, 2), 1)));
    drop(index);
    assert_eq!(Arc::strong_count(&value), 1);
}

#[test]
fn removing_what_is_not_there_changes_nothing() {
    let index = Index::new();
    assert!(index.remove(pages(1, 1), 1).is_none());
    index.insert(pages(1, 1), 1, Arc::new(5));
    assert!(index.remove(pages(1, 1), 2).is_none());
    assert!(index.remove(pages(1, 2), 1).is_none());
    assert!(index.remove(pages(0, 1), 1).is_none());
    assert_eq!(told(&index, 0, usize::MAX).0, [(page_size(), 2 * page_size(), 1, 5)]);
    let shared = |_: &(dyn Send + Sync)| {};
    shared(&index);
}
