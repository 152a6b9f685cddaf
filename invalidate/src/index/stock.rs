//! Nodes that are in no tree: spare ones, and those that a change replaced. Listed through the nodes themselves, so that
//! nothing is allocated to keep them.
//!
//! Nodes are allocated many at a time and freed with the index, so that a large index lies in huge pages: a quarter of what a
//! question among 100,000 entries waits for is the address translation of nodes that nobody looked at for a while.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::{self, NonNull};
use std::sync::atomic::Ordering;

use super::node::Node;

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

impl List {
    pub(super) const fn new() -> Self {
        Self { head: ptr::null_mut(), len: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// # Safety
    /// `node` is one of a live slab, in no list and not written by anyone else.
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
}

/// Nodes that were allocated together.
pub(super) struct Slab {
    nodes: NonNull<Node>,
    layout: Layout,
    /// Those that were there before.
    next: Option<Box<Slab>>,
}

/// Bytes of a huge page, where pages are of 4 KiB.
const HUGE: usize = 2 << 20;

impl Slab {
    /// Nodes of the first slabs: enough for one change of a tree of seven levels, which no address space can fill.
    pub(super) const FEW: usize = 32;
    /// Nodes of later ones.
    pub(super) const MANY: usize = HUGE / size_of::<Node>();

    pub(super) fn new(count: usize) -> Box<Self> {
        let align = if count < Self::MANY { align_of::<Node>() } else { HUGE };
        let layout = Layout::array::<Node>(count).and_then(|layout| layout.align_to(align));
        let layout = layout.expect("a few megabytes");
        // SAFETY: nodes have a size, and `count` isn't 0.
        let memory = unsafe { alloc(layout) };
        #[expect(clippy::cast_ptr_alignment, reason = "the layout has a node's at least")]
        let Some(nodes) = NonNull::new(memory.cast::<Node>()) else { handle_alloc_error(layout) };
        #[cfg(not(miri))]
        if align == HUGE {
            // Advice: a kernel without huge pages refuses, and nothing depends on it.
            // SAFETY: the memory was just allocated and is ours; the advice changes no contents.
            unsafe { libc::madvise(memory.cast(), layout.size(), libc::MADV_HUGEPAGE) };
        }
        // SAFETY: as many bytes were just allocated.
        unsafe { ptr::write_bytes(memory, 0, layout.size()) };
        Box::new(Self { nodes, layout, next: None })
    }

    pub(super) fn len(&self) -> usize {
        self.layout.size() / size_of::<Node>()
    }

    /// Hands its nodes over to `spare`, and takes its place before the slabs that there are.
    ///
    /// # Safety
    /// Only once. The list is used no longer than the slab lives.
    pub(super) unsafe fn join(mut self: Box<Self>, slabs: &mut Option<Box<Self>>, spare: &mut List) {
        for nth in 0..self.len() {
            // SAFETY: it is one of the slab's.
            let node = unsafe { self.nodes.add(nth) };
            // SAFETY: zeros are a node: numbers, null pointers, no items. By the contract it is in no list and nobody else's.
            unsafe { spare.push(node.as_ptr()) };
        }
        self.next = slabs.take();
        *slabs = Some(self);
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` with this layout. A node has nothing to drop.
        unsafe { dealloc(self.nodes.as_ptr().cast(), self.layout) };
    }
}

impl Stock {
    /// A node that nobody else knows, with whatever it held before.
    pub(super) fn take(&mut self) -> *mut Node {
        self.spare.pop().expect("room was made before the lock was taken")
    }

    /// # Safety
    /// `node` was reachable from the tree under change, or was taken from this stock, and isn't replaced yet.
    pub(super) unsafe fn replace(&mut self, node: *const Node) {
        // SAFETY: by the contract it is live and in no list.
        unsafe { self.replaced.push(node.cast_mut()) };
    }
}
