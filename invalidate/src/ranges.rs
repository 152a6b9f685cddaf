//! A map from ranges, which may overlap, that is asked which of them touch others; for use under a lock.
//!
//! Ranges are kept by the power of two below their length, so that those that touch a given one lie between two keys of each such class: a long
//! range among many short ones doesn't make every question look at all of them.

use std::collections::BTreeMap;

use crate::HostRange;

pub(crate) struct Ranges<T> {
    /// By class, first address and id.
    map: BTreeMap<(u32, usize, u64), (HostRange, T)>,
    /// One bit for each class that has had a range.
    classes: u64,
}

fn class(range: HostRange) -> u32 {
    range.len().ilog2()
}

impl<T> Ranges<T> {
    pub(crate) const fn new() -> Self {
        Self { map: BTreeMap::new(), classes: 0 }
    }

    /// Adds a range under an id that no other of it has.
    pub(crate) fn insert(&mut self, range: HostRange, id: u64, value: T) {
        self.classes |= 1 << class(range);
        self.map.insert((class(range), range.start(), id), (range, value));
    }

    pub(crate) fn remove(&mut self, range: HostRange, id: u64) -> Option<T> {
        self.map.remove(&(class(range), range.start(), id)).map(|(_, value)| value)
    }

    pub(crate) fn any_overlapping(&self, range: HostRange) -> bool {
        let keys = spans(self.classes, range);
        keys.into_iter().any(|(from, to)| self.map.range(from..to).any(|(_, (other, _))| other.overlaps(range)))
    }

    pub(crate) fn each_overlapping(&mut self, range: HostRange, mut visit: impl FnMut(HostRange, &mut T)) {
        for (from, to) in spans(self.classes, range) {
            for (other, value) in self.map.range_mut(from..to).map(|(_, entry)| (entry.0, &mut entry.1)) {
                if other.overlaps(range) {
                    visit(other, value);
                }
            }
        }
    }
}

type Key = (u32, usize, u64);

/// The keys, from and to, between which ranges that touch this one lie.
fn spans(classes: u64, range: HostRange) -> impl Iterator<Item = (Key, Key)> {
    let mut left = classes;
    let each = std::iter::from_fn(move || {
        let class = (left != 0).then(|| left.trailing_zeros())?;
        left &= left - 1;
        Some(class)
    });
    each.map(move |class| {
        let longest = usize::MAX >> (u64::BITS - 1 - class); // 2^(class + 1) - 1
        ((class, range.start().saturating_sub(longest), 0), (class, range.end(), 0))
    })
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::page_size;

    #[test]
    fn what_touches_a_range_is_what_a_look_at_all_of_them_finds() {
        let mut seed = 17_u64;
        let mut below = |end: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as usize % end
        };
        let (mut ranges, mut all) = (Ranges::new(), Vec::new());
        for id in 0..4000 {
            let longest = [1, 2, 9, 300][below(4)];
            let range = HostRange::new((1 + below(600)) * page_size(), (1 + below(longest)) * page_size()).unwrap();
            match below(5) {
                0 if !all.is_empty() => {
                    let (range, id) = all.swap_remove(below(all.len()));
                    assert_eq!(ranges.remove(range, id), Some(id));
                    assert_eq!(ranges.remove(range, id), None);
                }
                1 | 2 => {
                    ranges.insert(range, id, id);
                    all.push((range, id));
                }
                _ => {
                    let (mut found, mut expected) = (Vec::new(), Vec::new());
                    ranges.each_overlapping(range, |other, &mut id| found.push((other, id)));
                    expected.extend(all.iter().filter(|(other, _)| other.overlaps(range)));
                    found.sort_unstable();
                    expected.sort_unstable();
                    assert_eq!(found, expected);
                    assert_eq!(ranges.any_overlapping(range), !expected.is_empty());
                }
            }
        }
    }
}
