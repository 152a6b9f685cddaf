//! The tree of nodes: how one change makes a new root that shares every node it didn't touch with the old one.
//!
//! A change copies the nodes on one path, so the old root goes on describing the old content for whoever still reads it.
//! Nodes come from a [`Stock`] that was filled before, and those that were replaced are listed there: nothing here
//! allocates or frees.
//!
//! A node that overflows becomes two halves; at the edge where entries keep arriving in order, a full one and the new
//! item. A node that falls below a quarter is joined with a neighbour if the two leave room for growth.

use std::ptr;
use std::sync::atomic::Ordering;

use super::node::{Item, Key, Link, MAX_HEIGHT, Node, WIDTH};

/// One version of the content.
///
/// # Invariants
/// Whoever holds a `Tree` for reading keeps its nodes alive. No node is empty; the tree of nothing has none.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tree {
    root: *const Node,
    /// Levels, leaves included.
    height: usize,
    len: usize,
}

/// Nodes linked through their `next`.
#[derive(Debug)]
pub(super) struct List {
    head: *mut Node,
    len: usize,
}

/// Where a change takes its new nodes from, and where it leaves those that it replaced.
#[derive(Debug)]
pub(super) struct Stock {
    pub(super) spare: List,
    pub(super) replaced: List,
}

/// The one or two items that a change leaves in place of others; none if nothing is left.
#[derive(Clone, Copy)]
struct Few {
    items: [Item; 2],
    len: usize,
}

impl List {
    pub(super) const fn new() -> Self {
        Self { head: ptr::null_mut(), len: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// # Safety
    /// `node` is a live allocation by [`Box`], in no list and not written by anyone else.
    pub(super) unsafe fn push(&mut self, node: *mut Node) {
        // SAFETY: `node` is live; readers that still look at it don't look at `next`, which is atomic besides.
        let next = unsafe { &(*node).next };
        // Relaxed: lists are only used under the writers' lock, or by one owner.
        next.store(self.head, Ordering::Relaxed);
        (self.head, self.len) = (node, self.len + 1);
    }

    pub(super) fn pop(&mut self) -> Option<*mut Node> {
        let node = self.head;
        // SAFETY: what is in a list is live.
        let next = unsafe { &node.as_ref()?.next };
        (self.head, self.len) = (next.load(Ordering::Relaxed), self.len - 1);
        Some(node)
    }

    /// Frees every node.
    ///
    /// # Safety
    /// Nobody reads any of them any more.
    pub(super) unsafe fn free(&mut self) {
        while let Some(node) = self.pop() {
            // SAFETY: nodes are made by `Box`, this one is in no list any more, and by the contract nobody reads it.
            drop(unsafe { Box::from_raw(node) });
        }
    }
}

impl Stock {
    fn take(&mut self) -> *mut Node {
        let node = self.spare.pop().expect("room was made before the lock was taken");
        // SAFETY: a spare node is live, and nobody but the owner of the stock knows it.
        unsafe { (*node).clear() };
        node
    }

    /// # Safety
    /// `node` was reachable from the tree under change, or was taken from this stock, and isn't replaced yet.
    unsafe fn replace(&mut self, node: *const Node) {
        // SAFETY: by the contract it is live and in no list.
        unsafe { self.replaced.push(node.cast_mut()) };
    }
}

impl Few {
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
    pub(super) const EMPTY: Self = Self { root: ptr::null(), height: 0, len: 0 };

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The most spare nodes that one change of this tree takes: a copy of each level, one more where it splits or joins,
    /// a new root.
    pub(super) fn room(&self) -> usize {
        2 * self.height + 1
    }

    /// Tells `hit` every entry that overlaps `low..high`, in order, and `seen` how many nodes were looked into.
    ///
    /// # Safety
    /// The nodes of this tree stay alive and unwritten during the call.
    pub(super) unsafe fn visit(&self, low: usize, high: usize, seen: &mut impl FnMut(), hit: &mut impl FnMut(Item)) {
        if self.height == 0 {
            return;
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
            unsafe { (*root).push(item) };
            return (Self { root, height: 1, len: 1 }, None);
        }
        // SAFETY: the nodes are alive.
        let (mut path, place) = unsafe { self.descend((item.low, item.id)) };
        let (leaf, at) = (&mut path.0[self.height - 1], place.unwrap_or_else(|at| at));
        leaf.1 = at;
        // SAFETY: the nodes are alive.
        let old = place.ok().map(|at| unsafe { &*leaf.0 }.item(at).link);
        let len = self.len + usize::from(old.is_none());
        // SAFETY: passed on; the path was just taken from this tree.
        let tree = unsafe { self.rewrite(stock, &mut path, usize::from(old.is_some()), Few::one(item)) };
        (Self { len, ..tree }, old)
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
        let tree = unsafe { self.rewrite(stock, &mut path, 1, Few { len: 0, ..Few::one(old) }) };
        Some((Self { len: self.len - 1, ..tree }, old.link))
    }

    /// The path to the leaf where `key` is (`Ok`) or would be (`Err`), whose own place is left open.
    ///
    /// # Safety
    /// The tree isn't empty and its nodes are alive.
    unsafe fn descend(&self, key: Key) -> (Path, Result<usize, usize>) {
        let mut path = Path([(ptr::null(), 0); MAX_HEIGHT]);
        let mut node = self.root;
        for step in &mut path.0[..self.height - 1] {
            // SAFETY: alive by the contract.
            let inner = unsafe { &*node };
            *step = (node, inner.child_for(key));
            node = inner.item(step.1).link.cast();
        }
        path.0[self.height - 1].0 = node;
        // SAFETY: alive by the contract.
        (path, unsafe { &*node }.find(key))
    }

    /// Puts `new` in the place of `gone` items at the end of `path`, and what that makes of each node in its parent's
    /// place, up to the root. `len` is left to the caller.
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
            if let ([only], Some(parent)) = (new.as_slice(), depth.checked_sub(1)) {
                // SAFETY: the parent and its children are alive; `only` stands for the child at the parent's place.
                if let Some(joined) = unsafe { join(stock, &mut path.0[parent], *only) } {
                    (new, gone) = (Few::one(joined), 2);
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
                for &item in two {
                    // SAFETY: a node of the stock is ours alone.
                    unsafe { (*root).push(item) };
                }
                root
            }
        };
        loop {
            // SAFETY: alive by the contract.
            let node = unsafe { &*root };
            if height == 1 || node.len() > 1 {
                return Self { root, height, len: self.len };
            }
            // SAFETY: it is reachable from `new` and is left out of the tree here.
            unsafe { stock.replace(root) };
            root = node.item(0).link.cast();
            height -= 1;
        }
    }

    /// Takes the whole tree apart: every entry's link goes to `entry`, every node to `nodes`.
    ///
    /// # Safety
    /// Nobody else uses the tree, now or later.
    pub(super) unsafe fn take_apart(self, nodes: &mut List, entry: &mut impl FnMut(Link)) {
        if self.height == 0 {
            return;
        }
        // SAFETY: alive and nobody else's.
        let node = unsafe { &*self.root };
        for &link in node.links() {
            if self.height == 1 {
                entry(link);
            } else {
                // SAFETY: children are alive, nobody else's, and reached once.
                unsafe { Self { root: link.cast(), height: self.height - 1, len: 0 }.take_apart(nodes, entry) };
            }
        }
        // SAFETY: it is alive and, as part of a tree, in no list.
        unsafe { nodes.push(self.root.cast_mut()) };
    }
}

/// # Safety
/// `node` and all below it stay alive and unwritten during the call; `height` is its distance from the values.
unsafe fn visit_below(
    node: *const Node,
    height: usize,
    low: usize,
    high: usize,
    seen: &mut impl FnMut(),
    hit: &mut impl FnMut(Item),
) {
    // SAFETY: alive by the contract.
    let node = unsafe { &*node };
    seen();
    for at in node.overlapping(low, high) {
        let item = node.item(at);
        if height == 1 {
            hit(item);
        } else {
            // SAFETY: above the leaves a link is a child, alive by the contract.
            unsafe { visit_below(item.link.cast(), height - 1, low, high, seen, hit) };
        }
    }
}

/// New nodes with the items of `node` in which `new` has taken the place of `gone` items at `at`.
fn splice(stock: &mut Stock, node: &Node, at: usize, gone: usize, new: Few) -> Few {
    let new = new.as_slice();
    let total = node.len() - gone + new.len();
    let make = |stock: &mut Stock, from: usize, to: usize| {
        let made = stock.take();
        // SAFETY: a node of the stock is ours alone.
        let into = unsafe { &mut *made };
        // Places `from..to` of: the items before `at`, the new ones, the items after those that are gone.
        let (middle, tail) = (at, at + new.len());
        if from < middle {
            into.extend(node, from..to.min(middle));
        }
        for place in from.max(middle)..to.min(tail) {
            into.push(new[place - middle]);
        }
        if to > tail {
            let shift = |place: usize| place - new.len() + gone;
            into.extend(node, shift(from.max(tail))..shift(to));
        }
        into.summary(made.cast_const().cast())
    };
    if total == 0 {
        return Few { items: [Item { low: 0, high: 0, id: 0, link: ptr::null() }; 2], len: 0 };
    }
    if total <= WIDTH {
        return Few::one(make(stock, 0, total));
    }
    let cut = match at {
        _ if at + gone == node.len() => total - 1,
        0 => 1,
        _ => total / 2,
    };
    Few { items: [make(stock, 0, cut), make(stock, cut, total)], len: 2 }
}

/// Joins the new child `only` with its neighbour in `parent`, if it is small and the two fit well into one node. The
/// parent's place then is the first of the two.
///
/// # Safety
/// `parent` is a live node and the place in it of the child that `only` replaces; its children are alive.
unsafe fn join(stock: &mut Stock, parent: &mut (*const Node, usize), only: Item) -> Option<Item> {
    let small: *const Node = only.link.cast();
    // SAFETY: the node that `only` stands for was just made.
    let child = unsafe { &*small };
    // SAFETY: alive by the contract.
    let above = unsafe { &*parent.0 };
    if child.len() >= WIDTH / 4 || above.len() < 2 {
        return None;
    }
    let at = parent.1;
    let beside: *const Node = above.item(if at > 0 { at - 1 } else { 1 }).link.cast();
    // SAFETY: alive by the contract.
    let neighbour = unsafe { &*beside };
    if child.len() + neighbour.len() > WIDTH * 3 / 4 {
        return None;
    }
    let (first, second) = if at > 0 { (neighbour, child) } else { (child, neighbour) };
    let made = stock.take();
    // SAFETY: a node of the stock is ours alone.
    let into = unsafe { &mut *made };
    into.extend(first, 0..first.len());
    into.extend(second, 0..second.len());
    parent.1 = at.saturating_sub(1);
    for node in [small, beside] {
        // SAFETY: one was just made from the stock, the other is reachable from the tree under change and leaves it here.
        unsafe { stock.replace(node) };
    }
    Some(into.summary(made.cast_const().cast()))
}

#[cfg(test)]
impl Tree {
    /// Checks what is said of trees and nodes, and returns the number of levels.
    ///
    /// # Safety
    /// As [`visit`](Self::visit).
    pub(super) unsafe fn check(&self) -> usize {
        fn below(node: &Node, height: usize) -> (usize, Item) {
            let items: Vec<_> = (0..node.len()).map(|at| node.item(at)).collect();
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
        if self.height > 0 {
            // SAFETY: alive by the contract.
            let (len, _) = below(unsafe { &*self.root }, self.height);
            assert_eq!(len, self.len);
        }
        self.height
    }
}
