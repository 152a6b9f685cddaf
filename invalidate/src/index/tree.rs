//! The tree of nodes: how one change makes a new root that shares every node it didn't touch with the old one.
//!
//! A change copies the nodes on one path, so the old root goes on describing the old content for whoever still reads it.
//! Nodes come from a [`Stock`] that was filled before, and those that were replaced are listed there: nothing here
//! allocates or frees.
//!
//! A node that overflows shares its items evenly with a neighbour that has room, and otherwise becomes two halves; at an
//! edge, where entries may keep arriving in order, a full one and the new item. A node that falls below a quarter is
//! joined with a neighbour if that leaves room for growth.

use std::ops::ControlFlow;
use std::ptr;

use super::node::{Item, Link, MAX_HEIGHT, Node, PageKey, WIDTH};
use super::stock::Stock;

/// The bits of a packed tree that are its height.
const MAX_HEIGHT_BITS: usize = align_of::<Node>() - 1;
const _: () = assert!(MAX_HEIGHT <= MAX_HEIGHT_BITS);

/// One version of the content.
///
/// # Invariants
/// Whoever holds a `Tree` for reading keeps its nodes alive. No node is empty; the tree of nothing has none.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tree {
    root: *const Node,
    /// Levels, leaves included.
    height: usize,
}

/// The one or two items that a change leaves in place of others; none if nothing is left.
#[derive(Clone, Copy)]
struct Few {
    items: [Item; 2],
    len: usize,
}

impl Few {
    const NONE: Self = Self { items: [Item { low: 0, high: 0, id: 0, link: ptr::null() }; 2], len: 0 };

    fn one(item: Item) -> Self {
        Self { items: [item; 2], len: 1 }
    }

    fn as_slice(&self) -> &[Item] {
        &self.items[..self.len]
    }
}

/// The nodes from the root to a leaf, and in each the place where the change goes.
struct Path([(*const Node, usize); MAX_HEIGHT]);

impl Tree {
    /// The tree of nothing.
    pub(super) const EMPTY: Self = Self { root: ptr::null(), height: 0 };

    /// The tree as one word, to be published: the height stands in the bits of the root's address that its alignment leaves.
    pub(super) fn pack(self) -> *mut Node {
        self.root.cast_mut().map_addr(|root| root | self.height)
    }

    /// The tree that was packed into this word.
    #[inline]
    pub(super) fn unpack(word: *const Node) -> Self {
        Self { root: word.map_addr(|word| word & !MAX_HEIGHT_BITS), height: word.addr() & MAX_HEIGHT_BITS }
    }

    /// The most spare nodes that one change of this tree takes: two per level where it splits, two more where these share
    /// with a neighbour, a new root.
    pub(super) fn room(&self) -> usize {
        4 * self.height + 1
    }

    /// Tells `hit` the entries that overlap the pages `low..high`, in order, until it answers `Break`, and `seen` how many nodes were looked into.
    ///
    /// # Safety
    /// The nodes of this tree stay alive and unwritten during the call.
    pub(super) unsafe fn visit(
        &self,
        low: usize,
        high: usize,
        seen: &mut impl FnMut(),
        hit: &mut impl FnMut(Item) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        if self.height == 0 {
            return ControlFlow::Continue(());
        }
        // SAFETY: passed on.
        unsafe { visit_below(self.root, self.height, low, high, seen, hit) }
    }

    /// The tree with `item` in it, and the link of the entry that it took the place of.
    ///
    /// # Safety
    /// This tree is the newest made with `stock`, and its nodes are alive. `stock` has [`room`](Self::room).
    pub(super) unsafe fn insert(self, stock: &mut Stock, item: Item) -> (Self, Option<Link>) {
        if self.height == 0 {
            let root = stock.take();
            // SAFETY: a node of the stock is ours alone.
            let into = unsafe { &mut *root };
            into.fill(std::iter::once(item));
            return (Self { root, height: 1 }, None);
        }
        // SAFETY: the nodes are alive.
        let (mut path, place) = unsafe { self.descend((item.low, item.id)) };
        let (leaf, at) = (&mut path.0[self.height - 1], place.unwrap_or_else(|at| at));
        leaf.1 = at;
        // SAFETY: the nodes are alive.
        let old = place.ok().map(|at| unsafe { &*leaf.0 }.link(at));
        // SAFETY: passed on; the path was just taken from this tree.
        (unsafe { self.rewrite(stock, &mut path, usize::from(old.is_some()), Few::one(item)) }, old)
    }

    /// The tree without the entry of exactly these bounds and id, and that entry's link; `None` if there is none.
    ///
    /// # Safety
    /// As [`insert`](Self::insert).
    pub(super) unsafe fn remove(self, stock: &mut Stock, low: usize, high: usize, id: u64) -> Option<(Self, Link)> {
        if self.height == 0 {
            return None;
        }
        // SAFETY: the nodes are alive.
        let (mut path, place) = unsafe { self.descend((low, id)) };
        let leaf = &mut path.0[self.height - 1];
        leaf.1 = place.ok()?;
        // SAFETY: the nodes are alive.
        let old = unsafe { &*leaf.0 }.item(leaf.1);
        if old.high != high {
            return None;
        }
        // SAFETY: passed on; the path was just taken from this tree.
        Some((unsafe { self.rewrite(stock, &mut path, 1, Few::NONE) }, old.link))
    }

    /// The path to the leaf where `key` is (`Ok`) or would be (`Err`), whose own place is left open.
    ///
    /// # Safety
    /// The tree isn't empty and its nodes are alive.
    unsafe fn descend(&self, key: PageKey) -> (Path, Result<usize, usize>) {
        let mut path = Path([(ptr::null(), 0); MAX_HEIGHT]);
        let mut node = self.root;
        for step in &mut path.0[..self.height - 1] {
            // SAFETY: alive by the contract.
            let inner = unsafe { &*node };
            *step = (node, inner.child_for(key));
            node = inner.link(step.1).cast();
        }
        path.0[self.height - 1].0 = node;
        // SAFETY: alive by the contract.
        (path, unsafe { &*node }.find(key))
    }

    /// Puts `new` in the place of `gone` items at the end of `path`, and what that makes of each node in its parent's
    /// place, up to the root.
    ///
    /// # Safety
    /// As [`insert`](Self::insert), and `path` leads from the root to a leaf.
    unsafe fn rewrite(self, stock: &mut Stock, path: &mut Path, mut gone: usize, mut new: Few) -> Self {
        for depth in (0..self.height).rev() {
            let (node, at) = path.0[depth];
            // SAFETY: nodes of the path are alive.
            new = splice(stock, unsafe { &*node }, at, gone, new);
            // SAFETY: it was reachable from this tree, and each node is on the path once.
            unsafe { stock.replace(node) };
            gone = 1;
            if let Some(parent) = depth.checked_sub(1) {
                // SAFETY: the parent and its children are alive; `new` stands for the child at the parent's place.
                if let Some(shared) = unsafe { share(stock, &mut path.0[parent], new) } {
                    (new, gone) = (shared, 2);
                }
            }
        }
        // SAFETY: what `new` links to was made above from nodes that are alive.
        unsafe { self.with_root(stock, new) }
    }

    /// The tree whose root holds or is `new`.
    ///
    /// # Safety
    /// `new` links to live nodes of this tree's height.
    unsafe fn with_root(self, stock: &mut Stock, new: Few) -> Self {
        let mut height = self.height;
        let mut root: *const Node = match new.as_slice() {
            [] => return Self::EMPTY,
            [only] => only.link.cast(),
            two => {
                height += 1;
                assert!(height <= MAX_HEIGHT, "nodes are a quarter full on average");
                let root = stock.take();
                // SAFETY: a node of the stock is ours alone.
                let into = unsafe { &mut *root };
                into.fill(two.iter().copied());
                root
            }
        };
        loop {
            // SAFETY: alive by the contract.
            let node = unsafe { &*root };
            if height == 1 || node.len() > 1 {
                return Self { root, height };
            }
            // SAFETY: it is reachable from `new` and is left out of the tree here.
            unsafe { stock.replace(root) };
            root = node.link(0).cast();
            height -= 1;
        }
    }

    /// Takes the whole tree apart: every entry's link goes to `entry`.
    ///
    /// # Safety
    /// Nobody else uses the tree, now or later.
    pub(super) unsafe fn take_apart(self, entry: &mut impl FnMut(Link)) {
        if self.height == 0 {
            return;
        }
        // SAFETY: alive and nobody else's.
        let node = unsafe { &*self.root };
        for Item { link, .. } in node.items() {
            if self.height == 1 {
                entry(link);
            } else {
                // SAFETY: children are alive, nobody else's, and reached once.
                unsafe { Self { root: link.cast(), height: self.height - 1 }.take_apart(entry) };
            }
        }
    }
}

/// # Safety
/// `node` and all below it stay alive and unwritten during the call; `height` is its distance from the values.
unsafe fn visit_below(
    mut node: *const Node,
    mut height: usize,
    low: usize,
    high: usize,
    seen: &mut impl FnMut(),
    hit: &mut impl FnMut(Item) -> ControlFlow<()>,
) -> ControlFlow<()> {
    loop {
        seen();
        // SAFETY: alive by the contract.
        let this = unsafe { &*node };
        let places = this.overlapping(low, high);
        if height == 1 {
            if places.are_many() {
                places.clone().for_each(|at| this.prefetch_value(at));
            }
            return { places }.try_for_each(|at| hit(this.item(at)));
        }
        height -= 1;
        // Nearly always. So the processor goes on with this child while it still compares ends.
        if let Some(at) = places.only_the_last() {
            node = this.link(at).cast();
            continue;
        }
        for at in places {
            // SAFETY: above the leaves a link is a child, alive by the contract.
            unsafe { visit_below(this.link(at).cast(), height, low, high, seen, hit) }?;
        }
        return ControlFlow::Continue(());
    }
}

/// New nodes with the items of `node` in which `new` has taken the place of `gone` items at `at`.
fn splice(stock: &mut Stock, node: &Node, at: usize, gone: usize, new: Few) -> Few {
    let new = new.as_slice();
    let total = node.len() - gone + new.len();
    if total == 0 {
        return Few::NONE;
    }
    if total <= WIDTH {
        let made = stock.take();
        // SAFETY: a node of the stock is ours alone.
        let into = unsafe { &mut *made };
        into.become_spliced(node, at, gone, new);
        return Few::one(into.summary(made.cast_const().cast()));
    }
    let cut = match at {
        _ if at + gone == node.len() => total - 1,
        0 => 1,
        _ => total / 2,
    };
    let items = node.spliced(at, gone, new);
    let halves = [(0, cut), (cut, total)].map(|(from, to)| {
        let made = stock.take();
        // SAFETY: a node of the stock is ours alone.
        let into = unsafe { &mut *made };
        into.fill(items.clone().skip(from).take(to - from));
        into.summary(made.cast_const().cast())
    });
    Few { items: halves, len: 2 }
}

/// Shares the items of the one or two new nodes that take a child's place with a neighbour of that child, between as many
/// nodes as there are new: one that is small is joined, two that were just split need not both stay. `None` if they stay as
/// they are. The parent's place then is the first of the two children that are gone.
///
/// # Safety
/// `parent` is a live node and the place in it of the child that `new` replaces; its children are alive.
unsafe fn share(stock: &mut Stock, parent: &mut (*const Node, usize), new: Few) -> Option<Few> {
    // SAFETY: alive by the contract.
    let above = unsafe { &*parent.0 };
    let at = parent.1;
    if above.len() < 2 || new.len == 0 {
        return None;
    }
    let beside = above.link(if at > 0 { at - 1 } else { 1 });
    let halves = new.items.map(|item| item.link);
    let links: &[Link] = match (at > 0, new.len) {
        (true, 1) => &[beside, halves[0]],
        (true, _) => &[beside, halves[0], halves[1]],
        (false, 1) => &[halves[0], beside],
        (false, _) => &[halves[0], halves[1], beside],
    };
    // SAFETY: the new nodes were just made, the neighbour is alive by the contract.
    let node = |link: Link| unsafe { &*link.cast::<Node>() };
    let small = halves[..new.len].iter().map(|&link| node(link).len()).min()?;
    let total: usize = links.iter().map(|&link| node(link).len()).sum();
    let fits = match new.len {
        1 => small < WIDTH / 4 && total <= WIDTH * 3 / 4,
        _ => small > 1 && total <= 2 * (WIDTH * 7 / 8),
    };
    if !fits {
        return None;
    }
    let items = links.iter().flat_map(|&link| node(link).items());
    let part = total.div_ceil(new.len);
    let mut shared = Few { len: new.len, ..Few::NONE };
    for (nth, place) in shared.items[..new.len].iter_mut().enumerate() {
        let made = stock.take();
        // SAFETY: a node of the stock is ours alone.
        let into = unsafe { &mut *made };
        into.fill(items.clone().skip(nth * part).take(part));
        *place = into.summary(made.cast_const().cast());
    }
    parent.1 = at.saturating_sub(1);
    for &link in links {
        // SAFETY: some were just made from the stock, one is reachable from the tree under change and leaves it here.
        unsafe { stock.replace(link.cast()) };
    }
    Some(shared)
}

#[cfg(all(test, not(loom)))]
impl Tree {
    /// Checks what is said of trees and nodes, and returns the number of levels and of entries.
    ///
    /// # Safety
    /// As [`visit`](Self::visit).
    pub(super) unsafe fn check(&self) -> (usize, usize) {
        fn below(node: &Node, height: usize) -> (usize, Item) {
            let items: Vec<_> = node.items().collect();
            assert!(!items.is_empty() && items.len() <= WIDTH, "a node has {} items", items.len());
            assert!(items.is_sorted_by_key(|item| (item.low, item.id)), "items are in the order of their keys");
            let mut len = items.len();
            if height > 1 {
                len = 0;
                for item in &items {
                    // SAFETY: above the leaves a link is a child, alive by the caller's contract.
                    let (below, child) = below(unsafe { &*item.link.cast() }, height - 1);
                    assert_eq!((child.low, child.high, child.id), (item.low, item.high, item.id));
                    len += below;
                }
            }
            let summary = node.summary(ptr::null());
            assert_eq!(summary.high, items.iter().map(|item| item.high).max().expect("not empty"));
            (len, summary)
        }
        // SAFETY: null, or alive by the contract.
        let root = unsafe { self.root.as_ref() };
        (self.height, root.map_or(0, |root| below(root, self.height).0))
    }
}
