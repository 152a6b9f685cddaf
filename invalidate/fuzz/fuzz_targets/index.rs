//! Any changes and questions, in any order, against a sorted map that is looked at whole: `scripts/fuzz 60 index`.
//!
//! Each change is six bytes: what, where, how long, which id. Ranges crowd into four times 4,096 pages and 16 ids, so that they overlap, repeat and meet again.

#![no_main]

use std::collections::BTreeMap;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use pinfold_invalidate::{HostRange, Index, page_size};

type Key = (usize, u64);

/// What the index holds, and what it must answer.
#[derive(Default)]
struct Oracle(BTreeMap<Key, (HostRange, u32)>);

impl Oracle {
    fn overlapping(&self, low: usize, high: usize) -> Vec<(HostRange, u64, u32)> {
        let all = self.0.iter().map(|(&(_, id), &(range, value))| (range, id, value));
        all.filter(|(range, ..)| range.start() < high && range.end() > low).collect()
    }
}

fuzz_target!(|data: &[u8]| {
    let (index, mut oracle) = (Index::new(), Oracle::default());
    for (value, step) in (0..).zip(data.chunks_exact(6)) {
        // In one of four places, terabytes apart.
        let at = (usize::from(step[0] >> 6) << 33) + usize::from(u16::from_le_bytes([step[1], step[2]])) % 4096;
        // Short ones mostly; now and then one over nearly everything.
        let pages = if step[3] == 255 { 4096 } else { 1 + usize::from(step[3]) % 32 };
        let (id, part) = (u64::from(step[4] % 16), usize::from(step[5]));
        let range = HostRange::new(at * page_size(), pages * page_size()).expect("pages of user space");
        match step[0] % 8 {
            0..=2 => {
                let old = index.insert(range, id, Arc::new(value)).map(|old| *old);
                assert_eq!(old, oracle.0.insert((range.start(), id), (range, value)).map(|old| old.1));
            }
            3 => {
                let there = oracle.0.get(&(range.start(), id)).is_some_and(|held| held.0 == range);
                let expected = if there { oracle.0.remove(&(range.start(), id)).map(|old| old.1) } else { None };
                assert_eq!(index.remove(range, id).map(|old| *old), expected);
            }
            // One that is there.
            4 | 5 => {
                let key = oracle.0.range((range.start(), 0)..).next().map(|(&key, &(range, _))| (key, range));
                if let Some((key, range)) = key {
                    assert_eq!(index.remove(range, key.1).map(|old| *old), oracle.0.remove(&key).map(|old| old.1));
                }
            }
            6 => {
                let (mut told, expected) = (Vec::new(), oracle.overlapping(range.start(), range.end()));
                index.visit_overlapping(range, |entry| told.push((entry.range, entry.id, **entry.value)));
                assert_eq!(told, expected);
                let wanted = expected.get(part).map(|found| found.1);
                let mut asked = 0;
                let any = index.any_overlapping(range, |entry| {
                    asked += 1;
                    Some(entry.id) == wanted
                });
                assert_eq!(any, wanted.is_some());
                assert!(asked <= expected.len());
            }
            _ => {
                let (mut told, addr) = (Vec::new(), range.start() + part);
                index.find(addr, |entry| told.push((entry.range, entry.id, **entry.value)));
                assert_eq!(told, oracle.overlapping(addr, addr + 1));
            }
        }
        assert_eq!(index.len(), oracle.0.len());
    }
    assert_eq!(index.sweep(), 0);
});
