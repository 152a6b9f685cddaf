//! Doubly linked lists of slots: removal from anywhere in constant time, no memory of their own.

use crate::slab::{NIL, On, Slab};

#[derive(Debug, Clone, Copy)]
pub(crate) struct List {
    head: u32,
    tail: u32,
    len: u32,
}

impl Default for List {
    fn default() -> Self {
        Self { head: NIL, tail: NIL, len: 0 }
    }
}

impl List {
    pub(crate) fn is_empty(&self) -> bool {
        self.head == NIL
    }

    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    pub(crate) fn head(&self) -> Option<u32> {
        (self.head != NIL).then_some(self.head)
    }

    /// Appends `slot`, which is on no list, and notes there which list it is on.
    pub(crate) fn push(&mut self, slab: &mut Slab, slot: u32, on: On) {
        let entry = &mut slab[slot];
        debug_assert_eq!(entry.on, On::Nothing);
        entry.on = on;
        entry.prev = self.tail;
        entry.next = NIL;
        if self.tail == NIL {
            self.head = slot;
        } else {
            slab[self.tail].next = slot;
        }
        self.tail = slot;
        self.len += 1;
    }

    /// Takes out `slot`, which is on this list.
    pub(crate) fn remove(&mut self, slab: &mut Slab, slot: u32) {
        let entry = &mut slab[slot];
        let (prev, next) = (entry.prev, entry.next);
        entry.on = On::Nothing;
        entry.prev = NIL;
        entry.next = NIL;
        if prev == NIL {
            self.head = next;
        } else {
            slab[prev].next = next;
        }
        if next == NIL {
            self.tail = prev;
        } else {
            slab[next].prev = prev;
        }
        self.len -= 1;
    }

    pub(crate) fn pop(&mut self, slab: &mut Slab) -> Option<u32> {
        let slot = self.head()?;
        self.remove(slab, slot);
        Some(slot)
    }
}
