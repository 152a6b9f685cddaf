//! Every piece of work known to a pool has a slot here, from acceptance to its end.
//!
//! Problem: work is taken from the middle of lists (cancel), from heaps (timers) and from chains (keys), all in
//! constant or logarithmic time, and under a lock that must neither allocate nor free: freeing memory may unmap it, and
//! a user of this crate may be the one that unmapping waits for.
//!
//! Law: under the lock, room exists or the caller leaves and comes back with some.
//!
//! Protocol: slots link to each other by number. They sit in chunks that double in size and never move; when no slot is
//! free, [`Slab::shortage`] says how much to allocate, the caller lets go of the lock, allocates, and hands it in with
//! [`Slab::extend`], which gives back what is to be freed after the lock. The heap and the key table are always as
//! large as the slots need, so they never run out first.

use std::{sync::Arc, time::Instant};

use crate::{
    item::{Item, ItemState},
    job::{Attributes, Hook, Run},
    keys::{KeyRecord, Keys},
};

/// No slot.
pub(crate) const NIL: u32 = u32::MAX;
const FIRST: usize = 64;
/// Enough chunks for 2³² slots; the table of chunks never grows.
const CHUNKS: usize = 26;

/// What is to be called.
pub(crate) enum Body {
    Empty,
    Once(Run),
    Item(Arc<Item>),
}

/// The list a slot is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum On {
    Nothing,
    /// Waits for its queue to have less than `max_active` going.
    Inactive,
    /// Waits for others with its key.
    Chain,
    /// First in, first out.
    Ready,
    /// As `Ready`, but of work that may start beyond the number of processors.
    Express,
}

/// All fields are guarded by the pool's lock. What every job touches comes first, so that it is one pair of cache lines,
/// which processors fetch together, that travels from the submitter's to the worker's and back.
#[repr(C, align(128))]
pub(crate) struct Slot {
    /// Odd while in use; a handle with another value names work that has ended.
    pub(crate) generation: u64,
    pub(crate) body: Body,
    pub(crate) attributes: Attributes,
    // The second line begins here.
    pub(crate) on: On,
    /// Links of the list named by `on`, or of the free list.
    pub(crate) prev: u32,
    pub(crate) next: u32,
    pub(crate) node: u32,
    pub(crate) queue: u32,
    /// The worker that runs it, or NIL.
    pub(crate) worker: u32,
    /// The record of its key while it is on a chain, queued or running.
    pub(crate) key: u32,
    /// Position in the heap of timers, or NIL.
    pub(crate) timer: u32,
    /// Order of arrival on a ready list.
    pub(crate) sequence: u64,
    pub(crate) ready_since: Option<Instant>,
    /// It belongs to an item.
    pub(crate) is_item: bool,
    /// There is a `hook`.
    hooked: bool,
    // What only timers, hooks and items touch.
    due: Option<Instant>,
    /// Called when the running job is told to stop.
    hook: Option<Hook>,
    pub(crate) item: ItemState,
}

const _: () = assert!(std::mem::offset_of!(Slot, hooked) < 128, "what every job touches is one pair of lines");

impl Slot {
    fn new() -> Self {
        Self {
            generation: 0,
            body: Body::Empty,
            is_item: false,
            hooked: false,
            hook: None,
            attributes: Attributes::default(),
            node: 0,
            queue: 0,
            on: On::Nothing,
            prev: NIL,
            next: NIL,
            sequence: 0,
            ready_since: None,
            timer: NIL,
            due: None,
            key: NIL,
            worker: NIL,
            item: ItemState::default(),
        }
    }
}

impl Slot {
    /// Waits for a timer, a queue, a key or a worker.
    pub(crate) fn is_pending(&self) -> bool {
        self.on != On::Nothing || self.timer != NIL
    }

    /// A job, as opposed to an item, that is pending.
    pub(crate) fn is_pending_job(&self) -> bool {
        self.is_pending() && !self.is_item
    }

    /// A job, as opposed to an item, that runs.
    pub(crate) fn is_running_job(&self) -> bool {
        self.worker != NIL && !self.is_item
    }

    pub(crate) fn set_hook(&mut self, hook: Option<Hook>) {
        if hook.is_some() {
            self.hooked = true;
            self.hook = hook;
        }
    }

    pub(crate) fn take_hook(&mut self) -> Option<Hook> {
        if std::mem::take(&mut self.hooked) { self.hook.take() } else { None }
    }

    pub(crate) fn hook(&self) -> Option<Hook> {
        self.hook.clone()
    }
}

/// How much to allocate before the next slot can be handed out.
pub(crate) struct Shortage {
    chunk: usize,
    total: usize,
}

/// Room made outside the lock.
pub(crate) struct Extension {
    chunk: Box<[Slot]>,
    heap: Vec<u32>,
    records: Vec<KeyRecord>,
    buckets: Vec<u32>,
}

impl Shortage {
    pub(crate) fn allocate(self) -> Extension {
        Extension {
            chunk: (0..self.chunk).map(|_| Slot::new()).collect(),
            heap: Vec::with_capacity(self.total),
            records: Vec::with_capacity(self.total),
            buckets: vec![NIL; self.total.next_power_of_two()],
        }
    }
}

#[repr(C)]
pub(crate) struct Slab {
    /// Head of the free list.
    free: u32,
    chunks: Vec<Box<[Slot]>>,
    /// Slots in all chunks.
    capacity: usize,
    /// Slots whose timer runs, a binary heap by `due`.
    pub(crate) heap: Vec<u32>,
    pub(crate) keys: Keys,
    /// How often two timers changed places in the heap.
    #[cfg(test)]
    exchanges: u32,
}

impl Slab {
    pub(crate) fn new() -> Self {
        Self {
            free: NIL,
            chunks: Vec::with_capacity(CHUNKS),
            capacity: 0,
            heap: Vec::new(),
            keys: Keys::default(),
            #[cfg(test)]
            exchanges: 0,
        }
    }

    /// Says what is missing before [`take`](Self::take) can succeed, if anything is.
    pub(crate) fn shortage(&self) -> Option<Shortage> {
        (self.free == NIL).then(|| {
            let chunk = FIRST << self.chunks.len();
            Shortage { chunk, total: self.capacity + chunk }
        })
    }

    /// Takes in new room, and returns what is to be dropped once the lock is released.
    pub(crate) fn extend(&mut self, mut new: Extension) -> Extension {
        if new.chunk.len() != FIRST << self.chunks.len() {
            return new; // somebody else was faster
        }
        let base = self.capacity as u32;
        let length = new.chunk.len() as u32;
        for (offset, slot) in (0..length).zip(new.chunk.iter_mut()) {
            slot.next = if offset + 1 == length { self.free } else { base + offset + 1 };
        }
        self.free = base;
        self.capacity += new.chunk.len();
        self.chunks.push(std::mem::take(&mut new.chunk));
        new.heap.append(&mut self.heap);
        std::mem::swap(&mut self.heap, &mut new.heap);
        self.keys.grow(&mut new.records, &mut new.buckets);
        new
    }

    /// Takes a free slot. The caller has seen to it that there is one.
    pub(crate) fn take(&mut self) -> u32 {
        let slot = self.free;
        self.free = self[slot].next;
        self[slot].next = NIL;
        self[slot].generation += 1;
        slot
    }

    /// Gives a slot back; its body has been moved out, so nothing is dropped here.
    pub(crate) fn free(&mut self, slot: u32) {
        let free = self.free;
        let entry = &mut self[slot];
        debug_assert!(matches!(entry.body, Body::Empty) && !entry.hooked);
        debug_assert!(entry.on == On::Nothing && entry.timer == NIL);
        entry.generation += 1;
        if std::mem::take(&mut entry.is_item) {
            entry.item = ItemState::default();
        }
        entry.next = free;
        self.free = slot;
    }

    pub(crate) fn current(&self, slot: u32, generation: u64) -> bool {
        self[slot].generation == generation
    }

    pub(crate) fn capacity(&self) -> u32 {
        self.capacity as u32
    }

    /// Starts the timer of `slot`.
    pub(crate) fn start_timer(&mut self, slot: u32, due: Instant) {
        debug_assert_eq!(self[slot].timer, NIL);
        self[slot].due = Some(due);
        let at = self.heap.len();
        debug_assert!(at < self.heap.capacity());
        self.heap.push(slot);
        self[slot].timer = at as u32;
        self.sift_up(at);
    }

    /// Stops the timer of `slot`; false if it was not running.
    pub(crate) fn stop_timer(&mut self, slot: u32) -> bool {
        let at = self[slot].timer;
        if at == NIL {
            return false;
        }
        self[slot].timer = NIL;
        self[slot].due = None;
        let at = at as usize;
        let last = self.heap.pop().expect("a slot whose timer runs is in the heap");
        if last != slot {
            self.heap[at] = last;
            self[last].timer = at as u32;
            let settled = self.sift_up(at);
            self.sift_down(settled);
        }
        true
    }

    /// When the next timer is due, and whose it is.
    pub(crate) fn next_timer(&self) -> Option<(Instant, u32)> {
        let &slot = self.heap.first()?;
        Some((self[slot].due.expect("a running timer has a time"), slot))
    }

    fn sift_up(&mut self, mut at: usize) -> usize {
        while at > 0 {
            let parent = (at - 1) / 2;
            if self[self.heap[parent]].due <= self[self.heap[at]].due {
                break;
            }
            self.exchange(at, parent);
            at = parent;
        }
        at
    }

    fn sift_down(&mut self, mut at: usize) {
        loop {
            let left = 2 * at + 1;
            if left >= self.heap.len() {
                return;
            }
            let right = left + 1;
            let smaller = if right < self.heap.len() && self[self.heap[right]].due < self[self.heap[left]].due {
                right
            } else {
                left
            };
            if self[self.heap[at]].due <= self[self.heap[smaller]].due {
                return;
            }
            self.exchange(at, smaller);
            at = smaller;
        }
    }

    fn exchange(&mut self, a: usize, b: usize) {
        #[cfg(test)]
        {
            self.exchanges += 1;
        }
        self.heap.swap(a, b);
        for at in [a, b] {
            let slot = self.heap[at];
            self[slot].timer = at as u32;
        }
    }
}

/// Chunk n holds `FIRST << n` slots, so the first of it is number `FIRST * (2ⁿ - 1)`.
fn locate(slot: u32) -> (usize, usize) {
    let group = slot as usize / FIRST + 1;
    let chunk = group.ilog2() as usize;
    (chunk, slot as usize - FIRST * ((1 << chunk) - 1))
}

impl std::ops::Index<u32> for Slab {
    type Output = Slot;

    fn index(&self, slot: u32) -> &Slot {
        let (chunk, offset) = locate(slot);
        &self.chunks[chunk][offset]
    }
}

impl std::ops::IndexMut<u32> for Slab {
    fn index_mut(&mut self, slot: u32) -> &mut Slot {
        let (chunk, offset) = locate(slot);
        &mut self.chunks[chunk][offset]
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_timer_among_a_million_starts_and_stops_in_a_step_for_each_level_of_the_heap() {
        const TIMERS: u32 = 1_000_000;
        let mut slab = Slab::new();
        let start = Instant::now();
        // Most in no order, the last ones each earlier than all before: those climb from the bottom to the top.
        let due = |n: u32| match n {
            0..999_000 => 1_000_000 + u64::from(n.wrapping_mul(2_654_435_761) >> 8),
            _ => u64::from(TIMERS - n),
        };
        let levels = TIMERS.ilog2();
        let (mut highest, mut slots) = (0, Vec::new());
        let mut steps = |slab: &mut Slab| highest = highest.max(std::mem::take(&mut slab.exchanges));
        for n in 0..TIMERS {
            while let Some(shortage) = slab.shortage() {
                slab.extend(shortage.allocate());
            }
            slots.push(slab.take());
            slab.start_timer(slots[n as usize], start + std::time::Duration::from_nanos(due(n)));
            steps(&mut slab);
        }
        for &slot in slots.iter().step_by(3) {
            assert!(slab.stop_timer(slot) && !slab.stop_timer(slot));
            steps(&mut slab);
        }
        // The first to be due are those that are next in an independent order.
        let mut rest: Vec<_> =
            (0..TIMERS).filter(|n| n % 3 != 0).map(|n| start + std::time::Duration::from_nanos(due(n))).collect();
        rest.sort_unstable();
        for expected in &rest[..50_000] {
            let (due, slot) = slab.next_timer().expect("there are more");
            assert_eq!(due, *expected);
            slab.stop_timer(slot);
            steps(&mut slab);
        }
        assert_eq!(highest, levels, "one exchange a level, and the worst case is among them");
    }
}
