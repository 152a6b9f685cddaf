//! The keys that are busy, each with the work that waits for it.
//!
//! A key is busy from the moment work with it becomes ready until that work has finished and none waits. The work that
//! made it busy, or was promoted since, is on a ready list or running; everything else with that key is on the chain
//! of its record, in the order it was queued. So nobody ever scans past work that may not run yet.

use crate::{list::List, slab::NIL};

#[derive(Debug, Clone, Copy)]
pub(crate) struct KeyRecord {
    key: u64,
    pub(crate) waiting: List,
    /// On the free list, and in no bucket.
    free: bool,
    /// Next record of the same bucket, or of the free list.
    next: u32,
}

/// A chained hash table over records that are never more than the slots are; see `slab` for how it grows.
#[derive(Debug, Default)]
pub(crate) struct Keys {
    records: Vec<KeyRecord>,
    /// Always a power of two, except that it is empty before the first growth.
    buckets: Vec<u32>,
    free: Option<u32>,
}

impl Keys {
    fn bucket(&self, key: u64) -> usize {
        // Fibonacci hashing: keys are often addresses or counters, and the multiplication spreads both.
        let shift = 64 - self.buckets.len().trailing_zeros();
        (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> shift.min(63)) as usize & (self.buckets.len() - 1)
    }

    pub(crate) fn find(&self, key: u64) -> Option<u32> {
        let mut at = self.buckets[self.bucket(key)];
        while at != NIL {
            let record = &self.records[at as usize];
            if record.key == key {
                return Some(at);
            }
            at = record.next;
        }
        None
    }

    /// Makes `key`, which is not busy, busy.
    pub(crate) fn insert(&mut self, key: u64) -> u32 {
        let bucket = self.bucket(key);
        let record = KeyRecord { key, waiting: List::default(), free: false, next: self.buckets[bucket] };
        let at = if let Some(at) = self.free {
            let next = self.records[at as usize].next;
            self.free = (next != NIL).then_some(next);
            self.records[at as usize] = record;
            at
        } else {
            debug_assert!(self.records.len() < self.records.capacity());
            self.records.push(record);
            self.records.len() as u32 - 1
        };
        self.buckets[bucket] = at;
        at
    }

    /// The key of record `at` is no longer busy.
    pub(crate) fn remove(&mut self, at: u32) {
        let KeyRecord { key, next, .. } = self.records[at as usize];
        let bucket = self.bucket(key);
        if self.buckets[bucket] == at {
            self.buckets[bucket] = next;
        } else {
            let mut before = self.buckets[bucket];
            while self.records[before as usize].next != at {
                before = self.records[before as usize].next;
            }
            self.records[before as usize].next = next;
        }
        self.records[at as usize].next = self.free.unwrap_or(NIL);
        self.records[at as usize].free = true;
        self.free = Some(at);
    }

    /// Moves everything to larger tables; what remains in the arguments is for the caller to drop.
    pub(crate) fn grow(&mut self, records: &mut Vec<KeyRecord>, buckets: &mut Vec<u32>) {
        records.append(&mut self.records);
        std::mem::swap(&mut self.records, records);
        std::mem::swap(&mut self.buckets, buckets);
        for at in 0..self.records.len() {
            if !self.records[at].free {
                let bucket = self.bucket(self.records[at].key);
                self.records[at].next = self.buckets[bucket];
                self.buckets[bucket] = at as u32;
            }
        }
    }
}

impl std::ops::Index<u32> for Keys {
    type Output = KeyRecord;

    fn index(&self, at: u32) -> &KeyRecord {
        &self.records[at as usize]
    }
}

impl std::ops::IndexMut<u32> for Keys {
    fn index_mut(&mut self, at: u32) -> &mut KeyRecord {
        &mut self.records[at as usize]
    }
}
