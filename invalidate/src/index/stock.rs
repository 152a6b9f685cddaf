//! Nodes that are in no tree: spare ones, and those that a change replaced. Listed through the nodes themselves, so that
//! nothing is allocated to keep them.

use std::ptr;
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
