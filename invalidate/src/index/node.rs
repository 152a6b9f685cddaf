//! One block of the index: up to [`WIDTH`] items in the order of their keys, as parallel arrays.
//!
//! Leaves and inner nodes are the same. An item of a leaf is an entry: its range, its id, a link to its value. An item of
//! an inner node is a child: from the first key in it to the highest end in it, a link to the node. So one search and one
//! way of copying serve every level, and a maximum end at every level comes by itself.
//!
//! A question costs the cache lines that it touches and the steps that wait for each other. So nodes count in pages from a
//! base of their own, in 31 bits, of which a line has 16 and a vector register four: that reaches 4 TiB at least. A node
//! whose items lie farther apart, as few do, counts in units of 256 pages, starts rounded down and ends rounded up; what
//! that cuts off stands in an array of its own, and is asked last.

use std::sync::atomic::AtomicPtr;

/// Items per node, as many as a mask has bits.
pub(super) const WIDTH: usize = 64;

/// The most levels a tree can have: nodes stay a quarter full on average, and 8 to the 16th is more than all addresses.
pub(super) const MAX_HEIGHT: usize = 16;

/// The address bits within a page of the smallest size there is, in which the index counts.
const PAGE_BITS: u32 = 12;

/// Items before the end of a question that are looked at in any case. Their ends lie in one or two cache lines.
const NEAR: usize = 16;

/// Ends per cache line.
const LINE: usize = 16;

/// The start at places without an item: after any other.
const FREE: i32 = i32::MAX;

/// In a leaf the value's `Arc::into_raw`, above it the child's `Node`.
pub(super) type Link = *const ();

/// What orders items: the first page, then the id.
pub(super) type PageKey = (usize, u64);

/// One item of a node, out of its arrays. In pages.
#[derive(Debug, Clone, Copy)]
pub(super) struct Item {
    pub(super) low: usize,
    /// One past the last page: of the entry, or the highest of all entries below.
    pub(super) high: usize,
    pub(super) id: u64,
    pub(super) link: Link,
}

/// The pages that `low..high` touches, which are addresses.
#[inline]
pub(super) fn pages(low: usize, high: usize) -> (usize, usize) {
    (low >> PAGE_BITS, high.div_ceil(1 << PAGE_BITS))
}

/// The addresses of a page number.
#[inline]
pub(super) fn address(page: usize) -> usize {
    page << PAGE_BITS
}

/// How a node writes page numbers down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Scale {
    base: usize,
    /// The bits that are cut off: none or 8.
    bits: u32,
}

impl Scale {
    /// One that reaches from `low` to `high`. Neighbours share their base, so that it seldom changes.
    fn of(low: usize, high: usize) -> Self {
        let base = low & !(FREE as usize >> 1);
        if high - base < FREE as usize { Self { base, bits: 0 } } else { Self { base: 0, bits: u8::BITS } }
    }

    /// Pages below the base are 0, and those too far away are [`FREE`].
    #[inline]
    fn down(self, page: usize) -> i32 {
        match i32::try_from(page.wrapping_sub(self.base)) {
            Ok(delta) if self.bits == 0 => delta,
            _ => self.down_far(page),
        }
    }

    /// As [`down`](Self::down), and rounded up.
    #[inline]
    fn up(self, page: usize) -> i32 {
        match i32::try_from(page.wrapping_sub(self.base)) {
            Ok(delta) if self.bits == 0 => delta,
            _ => self.up_far(page),
        }
    }

    #[cold]
    fn down_far(self, page: usize) -> i32 {
        i32::try_from(page.saturating_sub(self.base) >> self.bits).unwrap_or(FREE)
    }

    #[cold]
    fn up_far(self, page: usize) -> i32 {
        i32::try_from(page.saturating_sub(self.base).div_ceil(1 << self.bits)).unwrap_or(FREE)
    }

    #[inline]
    fn page(self, scaled: i32) -> usize {
        self.base + ((scaled.cast_unsigned() as usize) << self.bits)
    }
}

/// Has the line come while something else is done.
#[inline]
fn prefetch<T>(line: &T) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch changes nothing, and every x86-64 processor has it.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(line).cast()) };
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = line;
}

/// Which of these are greater than `least`, as bits.
#[inline]
fn above(these: &[i32; NEAR], least: i32) -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has SSE2.
    return u64::from(unsafe { above_sse2(these, least) });
    #[cfg(not(target_arch = "x86_64"))]
    (0..NEAR).map(|at| u64::from(these[at] > least) << at).sum()
}

/// What the compiler doesn't find by itself: the 16 answers packed to bytes, and one bit taken from each.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse2")]
#[inline]
fn above_sse2(these: &[i32; NEAR], least: i32) -> u32 {
    use std::arch::x86_64::*;
    let least = _mm_set1_epi32(least);
    let (fours, _) = these.as_chunks::<4>();
    let four = |at: usize| {
        // SAFETY: as many bytes are there, and they need not be aligned. Put together of single numbers, they are often loaded as such.
        let four = unsafe { _mm_loadu_si128(fours[at].as_ptr().cast()) };
        _mm_cmpgt_epi32(four, least)
    };
    let halves = (_mm_packs_epi32(four(0), four(1)), _mm_packs_epi32(four(2), four(3)));
    _mm_movemask_epi8(_mm_packs_epi16(halves.0, halves.1)).cast_unsigned()
}

/// # Invariants
/// The first `len` items are sorted by key, the scale reaches all of them, and their bounds are `high <= self.high` and
/// `end - start <= self.longest`. The `starts` after them are [`FREE`]. Whoever can reach a node from a published tree only
/// reads it, `next` excepted.
#[repr(C, align(2048))] // so that none lies in two pages
pub(super) struct Node {
    scale: Scale,
    /// The longest `end - start`: what begins earlier than this below a page doesn't reach it. One giant item makes this
    /// useless in the nodes above itself and nowhere else.
    longest: i32,
    len: u32,
    high: usize,
    /// The list this node is in once it is replaced. Only writers use it, under their lock.
    pub(super) next: AtomicPtr<Node>,
    starts: Aligned<[i32; WIDTH]>,
    ends: [i32; WIDTH],
    what: [(u64, Link); WIDTH],
    /// How far `start` is below its page, and `end` above.
    cut: [[u8; 2]; WIDTH],
}

/// To whole cache lines.
#[repr(align(64))]
struct Aligned<T>(T);

impl Node {
    pub(super) fn len(&self) -> usize {
        self.len as usize
    }

    #[inline]
    pub(super) fn item(&self, at: usize) -> Item {
        let (id, link) = self.what[at];
        Item { low: self.low(at), high: self.high(at), id, link }
    }

    #[inline]
    fn low(&self, at: usize) -> usize {
        self.scale.page(self.starts.0[at]) + usize::from(self.cut(at)[0])
    }

    #[inline]
    fn high(&self, at: usize) -> usize {
        self.scale.page(self.ends[at]) - usize::from(self.cut(at)[1])
    }

    /// Looks only where something can be.
    #[inline]
    fn cut(&self, at: usize) -> [u8; 2] {
        if self.scale.bits == 0 { [0; 2] } else { self.cut[at] }
    }

    #[inline]
    pub(super) fn link(&self, at: usize) -> Link {
        self.what[at].1
    }

    /// Has the value of the entry come while others are looked at.
    #[inline]
    pub(super) fn prefetch_value(&self, at: usize) {
        // SAFETY: of a byte of a live value, and only for the address.
        prefetch(unsafe { &*self.link(at).cast::<u8>() });
    }

    pub(super) fn items(&self) -> impl Iterator<Item = Item> + Clone {
        (0..self.len()).map(|at| self.item(at))
    }

    fn key(&self, at: usize) -> PageKey {
        (self.low(at), self.what[at].0)
    }

    /// The place of the entry with this key, or the place where it would go.
    pub(super) fn find(&self, key: PageKey) -> Result<usize, usize> {
        // Few keys have their start in common, so the starts decide nearly always.
        let mut at = self.before(self.scale.down(key.0));
        while at < self.len() && self.key(at) < key {
            at += 1;
        }
        if at < self.len() && self.key(at) == key { Ok(at) } else { Err(at) }
    }

    /// The child that `key` is in or would go into: the last that doesn't begin after it, or the first.
    pub(super) fn child_for(&self, key: PageKey) -> usize {
        self.find(key).unwrap_or_else(|above| above.saturating_sub(1))
    }

    /// How many items start before `end`. All are compared, at once: faster than a search, whose steps wait for each other, and
    /// in a node that isn't in the cache for one line after the other.
    #[inline]
    fn before(&self, end: i32) -> usize {
        let (parts, _) = self.starts.0.as_chunks();
        let not_before = (0..WIDTH / NEAR).map(|part| above(&parts[part], end - 1) << (NEAR * part)).sum::<u64>();
        not_before.trailing_zeros() as usize
    }

    /// The places of the items that overlap the pages `low..high`, in order.
    #[inline]
    pub(super) fn overlapping(&self, low: usize, high: usize) -> Places {
        let (first, end) = (self.scale.down(low), self.scale.up(high));
        // Which of these lines matters is known when the starts have come. Then it is there too, or on its way.
        (0..WIDTH).step_by(LINE).for_each(|at| prefetch(&self.ends[at]));
        let before = self.before(end).min(WIDTH);
        prefetch(&self.what[before.saturating_sub(1)]);
        let near = before.saturating_sub(NEAR);
        // What starts at `first - longest` or earlier doesn't reach beyond `first`. Whether there is any such item can't be guessed, so that is asked last.
        let is_far = self.starts.0[near.saturating_sub(1)] > first - self.longest;
        let mut bits = match is_far && near > 0 {
            true => self.all_reaching(first),
            false => self.reaching(near, first) << near,
        };
        bits &= u64::MAX.checked_shr((WIDTH - before) as u32).unwrap_or(0);
        if self.scale.bits != 0 {
            bits = self.exactly(bits, low, high);
        }
        Places { bits, before }
    }

    /// Which of [`NEAR`] items end after `first`, as bits.
    #[inline]
    fn reaching(&self, from: usize, first: i32) -> u64 {
        above(self.ends[from..].first_chunk().expect("as many as are near are there"), first)
    }

    #[cold]
    fn all_reaching(&self, first: i32) -> u64 {
        (0..WIDTH).step_by(NEAR).map(|from| self.reaching(from, first) << from).sum()
    }

    /// Those of the places whose items overlap `low..high` to the page.
    #[cold]
    fn exactly(&self, bits: u64, low: usize, high: usize) -> u64 {
        let overlaps = |at: usize| self.low(at) < high && self.high(at) > low;
        Places { bits, before: WIDTH }.filter(|&at| overlaps(at)).map(|at| 1 << at).sum()
    }

    /// Becomes a node of these items, which are in order, and no more than there is room for.
    pub(super) fn fill(&mut self, items: impl Iterator<Item = Item> + Clone) {
        let low = items.clone().next().map_or(0, |first| first.low);
        self.scale = Scale::of(low, items.clone().map(|item| item.high).max().unwrap_or(low));
        (self.len, self.longest, self.high) = (0, 0, 0);
        for item in items {
            self.put(self.len(), item);
            self.bound(self.len(), item.high);
            self.len += 1;
        }
        let len = self.len();
        self.starts.0[len..].fill(FREE);
    }

    /// Its items with `new` in the place of `gone` of them at `at`.
    pub(super) fn spliced(&self, at: usize, gone: usize, new: &[Item]) -> impl Iterator<Item = Item> + Clone {
        let (before, after) = (self.items().take(at), self.items().skip(at + gone));
        before.chain(new.iter().copied()).chain(after)
    }

    /// Becomes what [`spliced`](Self::spliced) of `from` says. There is room for it.
    pub(super) fn become_spliced(&mut self, from: &Self, at: usize, gone: usize, new: &[Item]) {
        let first = if at > 0 { from.low(0) } else { new.first().map_or_else(|| from.low(gone), |new| new.low) };
        let high = new.iter().fold(from.high, |high, item| high.max(item.high));
        if Scale::of(first, high) != from.scale {
            return self.fill(from.spliced(at, gone, new));
        }
        // Copied whole, as arrays of known size are copied faster than their parts.
        (self.scale, self.starts.0, self.ends, self.what) = (from.scale, from.starts.0, from.ends, from.what);
        let is_cut = self.scale.bits != 0;
        if is_cut {
            self.cut = from.cut;
        }
        self.len = from.len - gone as u32 + new.len() as u32;
        if gone != new.len() {
            let (tail, to) = (at + gone..from.len(), at + new.len());
            self.starts.0.copy_within(tail.clone(), to);
            self.ends.copy_within(tail.clone(), to);
            self.what.copy_within(tail.clone(), to);
            if is_cut {
                self.cut.copy_within(tail, to);
            }
            let len = self.len();
            self.starts.0[len..].fill(FREE);
        }
        for (at, &item) in (at..).zip(new) {
            self.put(at, item);
        }
        // The bounds only grow, unless an item that reached one is gone.
        let reached = |at: usize| from.high(at) == from.high || from.ends[at] - from.starts.0[at] == from.longest;
        if (at..at + gone).any(reached) {
            (self.high, self.longest) = (0, 0);
            (0..self.len()).for_each(|at| self.bound(at, self.high(at)));
        } else {
            (self.high, self.longest) = (from.high, from.longest);
            (at..).zip(new).for_each(|(at, item)| self.bound(at, item.high));
        }
    }

    fn put(&mut self, at: usize, item: Item) {
        let (start, end) = (self.scale.down(item.low), self.scale.up(item.high));
        (self.starts.0[at], self.ends[at], self.what[at]) = (start, end, (item.id, item.link));
        self.cut[at] = [(item.low - self.scale.page(start)) as u8, (self.scale.page(end) - item.high) as u8];
    }

    fn bound(&mut self, at: usize, high: usize) {
        self.high = self.high.max(high);
        self.longest = self.longest.max(self.ends[at] - self.starts.0[at]);
    }

    /// The item that stands for this node, which isn't empty, in the level above.
    pub(super) fn summary(&self, link: Link) -> Item {
        let (low, id) = self.key(0);
        Item { low, high: self.high, id, link }
    }
}

/// Places in a node.
#[derive(Clone)]
pub(super) struct Places {
    bits: u64,
    /// None of them is as high as this.
    before: usize,
}

impl Places {
    /// Whether they are more than a few, at a glance: one, and the fourth behind it.
    #[inline]
    pub(super) fn are_many(&self) -> bool {
        self.bits & self.bits >> 4 != 0
    }

    /// The last place there can be, if it is one and no other is.
    #[inline]
    pub(super) fn only_the_last(&self) -> Option<usize> {
        let last = self.before.checked_sub(1)?;
        (self.bits == 1 << last).then_some(last)
    }
}

impl Iterator for Places {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        let at = self.bits.trailing_zeros() as usize;
        self.bits &= self.bits.wrapping_sub(1);
        (at < WIDTH).then_some(at)
    }
}
