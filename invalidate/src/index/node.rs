//! One block of the index: up to [`WIDTH`] items in the order of their keys, as four parallel arrays.
//!
//! Leaves and inner nodes are the same. An item of a leaf is an entry: its range, its id, a link to its value. An item of
//! an inner node is a child: from the first key in it to the highest end in it, a link to the node. So one search and one
//! way of copying serve every level, and a maximum end at every level comes by itself.

use std::ops::Range;
use std::ptr;
use std::sync::atomic::AtomicPtr;

/// Items per node. A change copies one node per level; 32 measured best of 16, 32, 48 and 64 when reads and writes are
/// weighed alike.
pub(super) const WIDTH: usize = 32;

/// The most levels a tree can have: nodes stay a quarter full on average, and 8 to the 16th is more than all addresses.
pub(super) const MAX_HEIGHT: usize = 16;

/// In a leaf the value's `Arc::into_raw`, above it the child's `Node`.
pub(super) type Link = *const ();

/// What orders items: the first address, then the id.
pub(super) type Key = (usize, u64);

/// One item of a node, out of its arrays.
#[derive(Debug, Clone, Copy)]
pub(super) struct Item {
    pub(super) low: usize,
    /// One past the last address: of the entry, or the highest of all entries below.
    pub(super) high: usize,
    pub(super) id: u64,
    pub(super) link: Link,
}

/// # Invariants
/// The first `len` items are sorted by key, and their bounds are `high <= self.high` and `high - low <= self.longest`.
/// Whoever can reach a node from a published tree only reads it, `next` excepted.
#[repr(align(64))]
pub(super) struct Node {
    len: usize,
    /// The longest `high - low`: what begins earlier than this below an address doesn't reach it. One giant item makes
    /// this useless in the nodes above itself and nowhere else.
    longest: usize,
    high: usize,
    /// The list this node is in once it is replaced. Only writers use it, under their lock.
    pub(super) next: AtomicPtr<Node>,
    lows: [usize; WIDTH],
    highs: [usize; WIDTH],
    ids: [u64; WIDTH],
    links: [Link; WIDTH],
}

impl Node {
    pub(super) fn new() -> Self {
        Self {
            len: 0,
            longest: 0,
            high: 0,
            next: AtomicPtr::new(ptr::null_mut()),
            lows: [0; WIDTH],
            highs: [0; WIDTH],
            ids: [0; WIDTH],
            links: [ptr::null(); WIDTH],
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn item(&self, at: usize) -> Item {
        Item { low: self.lows[at], high: self.highs[at], id: self.ids[at], link: self.links[at] }
    }

    pub(super) fn links(&self) -> &[Link] {
        &self.links[..self.len]
    }

    fn key(&self, at: usize) -> Key {
        (self.lows[at], self.ids[at])
    }

    /// The items whose key is less than `key`.
    pub(super) fn count_below(&self, key: Key) -> usize {
        // Few keys have their address in common, so the dense array of addresses decides nearly always.
        let mut at = self.lows[..self.len].partition_point(|&low| low < key.0);
        while at < self.len && self.key(at) < key {
            at += 1;
        }
        at
    }

    /// The item that `key` is in or would go into, in a node that isn't empty: the last that doesn't begin after it.
    pub(super) fn child_for(&self, key: Key) -> usize {
        let at = self.count_below(key);
        let found = at < self.len && self.key(at) == key;
        if found { at } else { at.saturating_sub(1) }
    }

    /// The place of the entry with this key.
    pub(super) fn find(&self, key: Key) -> Result<usize, usize> {
        let at = self.count_below(key);
        if at < self.len && self.key(at) == key { Ok(at) } else { Err(at) }
    }

    /// The places that may overlap `low..high`, and of these those that do, in order.
    pub(super) fn overlapping(&self, low: usize, high: usize) -> impl Iterator<Item = usize> {
        let (lows, highs) = (&self.lows[..self.len], &self.highs[..self.len]);
        let first = lows.partition_point(|&start| start + self.longest <= low);
        (first..lows.len()).take_while(move |&at| lows[at] < high).filter(move |&at| highs[at] > low)
    }

    pub(super) fn clear(&mut self) {
        (self.len, self.longest, self.high) = (0, 0, 0);
    }

    pub(super) fn push(&mut self, item: Item) {
        let at = self.len;
        (self.lows[at], self.highs[at], self.ids[at], self.links[at]) = (item.low, item.high, item.id, item.link);
        self.len += 1;
        self.high = self.high.max(item.high);
        self.longest = self.longest.max(item.high - item.low);
    }

    pub(super) fn extend(&mut self, from: &Self, part: Range<usize>) {
        let to = self.len..self.len + part.len();
        self.lows[to.clone()].copy_from_slice(&from.lows[part.clone()]);
        self.highs[to.clone()].copy_from_slice(&from.highs[part.clone()]);
        self.ids[to.clone()].copy_from_slice(&from.ids[part.clone()]);
        self.links[to.clone()].copy_from_slice(&from.links[part]);
        self.len = to.end;
        for (&low, &high) in self.lows[to.clone()].iter().zip(&self.highs[to]) {
            self.high = self.high.max(high);
            self.longest = self.longest.max(high - low);
        }
    }

    /// The item that stands for this node, which isn't empty, in the level above.
    pub(super) fn summary(&self, link: Link) -> Item {
        Item { low: self.lows[0], high: self.high, id: self.ids[0], link }
    }
}
