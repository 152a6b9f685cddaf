//! Readers and writers at once: what stays is always seen, once and in order; what comes and goes is whole when it is seen.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use pinfold_invalidate::index::Index;
use pinfold_invalidate::{HostRange, page_size};

/// A value that knows where it belongs, and that it is alive.
struct Value {
    id: u64,
    start: usize,
    alive: AtomicBool,
    deaths: Arc<AtomicUsize>,
}

impl Drop for Value {
    fn drop(&mut self) {
        assert!(self.alive.swap(false, Ordering::Relaxed), "a value dies once");
        self.deaths.fetch_add(1, Ordering::Relaxed);
    }
}

fn range(n: usize) -> HostRange {
    let len = if n.is_multiple_of(31) { 200 } else { 1 + n % 5 };
    HostRange::new(2 * n * page_size(), len * page_size()).unwrap()
}

struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }
}

/// Lowers a count when its thread ends, by an assertion too, so that nobody waits for it.
struct Leave<'a>(&'a AtomicUsize);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

const ENTRIES: usize = 4000;
const STAYS: u64 = 0;

#[test]
fn readers_see_all_that_stays_and_nothing_that_is_freed() {
    let (index, births, deaths) = (&Index::new(), &AtomicUsize::new(0), &Arc::new(AtomicUsize::new(0)));
    let make = |n: usize, id| {
        births.fetch_add(1, Ordering::Relaxed);
        Arc::new(Value { id, start: range(n).start(), alive: AtomicBool::new(true), deaths: deaths.clone() })
    };
    for n in (0..ENTRIES).step_by(4) {
        index.insert(range(n), STAYS, make(n, STAYS));
    }
    let (reading, sum) = (&AtomicUsize::new(2), &AtomicUsize::new(0));
    thread::scope(|scope| {
        for writer in 1..=2_u64 {
            scope.spawn(move || {
                let (mut random, mut mine) = (Random(writer), BTreeMap::new());
                while reading.load(Ordering::Relaxed) > 0 {
                    let n = random.below(ENTRIES);
                    if mine.remove(&n).is_some() {
                        let value = index.remove(range(n), writer).expect("this writer's entry");
                        assert!(value.alive.load(Ordering::Relaxed));
                    } else {
                        assert!(index.insert(range(n), writer, make(n, writer)).is_none());
                        mine.insert(n, ());
                    }
                }
                sum.fetch_add(mine.len(), Ordering::Relaxed);
            });
        }
        for reader in 0..2_u64 {
            scope.spawn(move || {
                let _reading = Leave(reading);
                let mut random = Random(100 + reader);
                for _ in 0..4000 {
                    let first = random.below(ENTRIES);
                    let asked = HostRange::new(2 * first * page_size(), 120 * page_size()).unwrap();
                    let (mut stays, mut last) = (Vec::new(), (0, 0));
                    index.visit_overlapping(asked, |entry| {
                        assert!(entry.value.alive.load(Ordering::Relaxed), "what is shown is alive");
                        assert_eq!((entry.value.id, entry.value.start), (entry.id, entry.range.start()));
                        assert!(entry.range.overlaps(asked));
                        assert!(last < (entry.range.start(), entry.id + 1), "entries come in order, each once");
                        last = (entry.range.start(), entry.id + 1);
                        stays.extend((entry.id == STAYS).then_some(entry.range));
                    });
                    let all = (0..ENTRIES).step_by(4).map(range);
                    assert_eq!(stays, all.filter(|range| range.overlaps(asked)).collect::<Vec<_>>());
                }
            });
        }
    });
    assert_eq!(index.len(), ENTRIES / 4 + sum.load(Ordering::Relaxed));
    assert_eq!(index.sweep(), 0);
    assert_eq!(births.load(Ordering::Relaxed) - deaths.load(Ordering::Relaxed), index.len(), "the others are dead");
}

/// A value whose death asks the index and changes it, as freeing an object may do.
struct Nosy {
    index: Arc<Index<Nosy>>,
    told: Arc<Mutex<usize>>,
}

impl Drop for Nosy {
    fn drop(&mut self) {
        let range = HostRange::new(page_size(), page_size()).unwrap();
        *self.told.lock().unwrap() += 1;
        self.index.visit_overlapping(range, |_| {});
        assert!(self.index.remove(range, 99).is_none());
        self.index.sweep();
    }
}

#[test]
fn a_value_may_use_the_index_when_it_dies() {
    let (index, told) = (Arc::new(Index::new()), Arc::new(Mutex::new(0)));
    for n in 0..200 {
        index.insert(range(n), 0, Arc::new(Nosy { index: index.clone(), told: told.clone() }));
    }
    for n in 0..200 {
        drop(index.remove(range(n), 0));
    }
    index.sweep();
    assert_eq!(*told.lock().unwrap(), 200);
    assert_eq!(Arc::strong_count(&index), 1);
}
