//! One block of the index: up to [`WIDTH`] items in the order of their keys, as four parallel arrays.
//!
//! Leaves and inner nodes are the same. An item of a leaf is an entry: its range, its id, a link to its value. An item of
//! an inner node is a child: from the first key in it to the highest end in it, a link to the node. So one search and one
//! way of copying serve every level, and a maximum end at every level comes by itself.

use std::ptr;
use std::sync::atomic::AtomicPtr;

/// Items per node. Of 16, 32, 64, 96 and 128, this is the fastest to ask and to change, with 1,000 entries and with 100,000.
pub(super) const WIDTH: usize = 64;

/// The most levels a tree can have: nodes stay a quarter full on average, and 8 to the 16th is more than all addresses.
pub(super) const MAX_HEIGHT: usize = 16;

/// Addresses per cache line.
const LINE: usize = 8;

/// The first address at places without an item: above any other.
const FREE: usize = usize::MAX;

/// In a leaf the value's `Arc::into_raw`, above it the child's `Node`.
pub(super) type Link = *const ();

/// What orders items: the first address, then the id.
pub(crate) type Key = (usize, u64);

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
/// The `lows` after them are [`FREE`]. Whoever can reach a node from a published tree only reads it, `next` excepted.
#[repr(C, align(64))]
pub(super) struct Node {
    lows: [usize; WIDTH],
    highs: [usize; WIDTH],
    links: [Link; WIDTH],
    ids: [u64; WIDTH],
    /// The longest `high - low`: what begins earlier than this below an address doesn't reach it. One giant item makes
    /// this useless in the nodes above itself and nowhere else.
    longest: usize,
    high: usize,
    len: usize,
    /// The list this node is in once it is replaced. Only writers use it, under their lock.
    pub(super) next: AtomicPtr<Node>,
}

impl Node {
    pub(super) fn new() -> Self {
        Self {
            lows: [FREE; WIDTH],
            highs: [0; WIDTH],
            links: [ptr::null(); WIDTH],
            ids: [0; WIDTH],
            longest: 0,
            high: 0,
            len: 0,
            next: AtomicPtr::new(ptr::null_mut()),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    #[inline]
    pub(super) fn item(&self, at: usize) -> Item {
        Item { low: self.lows[at], high: self.highs[at], id: self.ids[at], link: self.links[at] }
    }

    #[inline]
    pub(super) fn link(&self, at: usize) -> Link {
        self.links[at]
    }

    pub(super) fn links(&self) -> &[Link] {
        &self.links[..self.len]
    }

    fn key(&self, at: usize) -> Key {
        (self.lows[at], self.ids[at])
    }

    /// The place of the entry with this key, or the place where it would go.
    pub(super) fn find(&self, key: Key) -> Result<usize, usize> {
        // Few keys have their address in common, so the addresses decide nearly always.
        let mut at = self.count(|low| low < key.0);
        while at < self.len && self.key(at) < key {
            at += 1;
        }
        if at < self.len && self.key(at) == key { Ok(at) } else { Err(at) }
    }

    /// The child that `key` is in or would go into: the last that doesn't begin after it, or the first.
    pub(super) fn child_for(&self, key: Key) -> usize {
        self.find(key).unwrap_or_else(|above| above.saturating_sub(1))
    }

    /// The places of the items that overlap `low..high`, in order.
    #[inline]
    pub(super) fn overlapping(&self, low: usize, high: usize) -> impl Iterator<Item = usize> {
        // What begins at `low - longest` or earlier doesn't reach `low`. What is free begins at the end of everything.
        let first = low.checked_sub(self.longest).map_or(0, |reached| self.count(|start| start <= reached));
        (first..WIDTH).take_while(move |&at| self.lows[at] < high).filter(move |&at| self.highs[at] > low)
    }

    /// How many of the `lows` satisfy `below`, which holds for all up to one of them and for none after it.
    ///
    /// The last address of each cache line is compared first, all at once: in a node that isn't in the cache, a binary
    /// search would wait for one line after the other.
    #[inline]
    fn count(&self, below: impl Fn(usize) -> bool) -> usize {
        let holds = |at: usize| usize::from(below(self.lows[at]));
        let mut at = LINE * (1..WIDTH / LINE).map(|line| holds(LINE * line - 1)).sum::<usize>();
        at += 4 * holds(at + 3);
        at += 2 * holds(at + 1);
        at += holds(at);
        at + holds(at)
    }

    pub(super) fn clear(&mut self) {
        self.lows = [FREE; WIDTH];
        (self.len, self.longest, self.high) = (0, 0, 0);
    }

    pub(super) fn push(&mut self, item: Item) {
        self.put(self.len, item);
        self.bound(item.low, item.high);
        self.len += 1;
    }

    /// Becomes `from` with `new` in the place of `gone` items at `at`. There is room for it.
    pub(super) fn become_spliced(&mut self, from: &Self, at: usize, gone: usize, new: &[Item]) {
        // Copied whole, as arrays of known size are copied faster than their parts.
        (self.lows, self.highs, self.links, self.ids) = (from.lows, from.highs, from.links, from.ids);
        self.len = from.len - gone + new.len();
        if gone != new.len() {
            let (tail, to) = (at + gone..from.len, at + new.len());
            self.lows.copy_within(tail.clone(), to);
            self.highs.copy_within(tail.clone(), to);
            self.links.copy_within(tail.clone(), to);
            self.ids.copy_within(tail, to);
            self.lows[self.len..].fill(FREE);
        }
        for (at, &item) in (at..).zip(new) {
            self.put(at, item);
        }
        // The bounds only grow, unless an item that reached one is gone.
        let reached = |at: usize| from.highs[at] == from.high || from.highs[at] - from.lows[at] == from.longest;
        if (at..at + gone).any(reached) {
            (self.high, self.longest) = (0, 0);
            (0..self.len).for_each(|at| self.bound(self.lows[at], self.highs[at]));
        } else {
            (self.high, self.longest) = (from.high, from.longest);
            new.iter().for_each(|item| self.bound(item.low, item.high));
        }
    }

    fn put(&mut self, at: usize, item: Item) {
        (self.lows[at], self.highs[at], self.ids[at], self.links[at]) = (item.low, item.high, item.id, item.link);
    }

    fn bound(&mut self, low: usize, high: usize) {
        self.high = self.high.max(high);
        self.longest = self.longest.max(high - low);
    }

    /// The item that stands for this node, which isn't empty, in the level above.
    pub(super) fn summary(&self, link: Link) -> Item {
        Item { low: self.lows[0], high: self.high, id: self.ids[0], link }
    }
}
