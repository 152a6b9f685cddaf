//! Who reads which root: what a writer asks before it reuses what it has replaced.
//!
//! A reader must not count itself in a place that others write, and a writer should not pay for each thread that may read. So each thread has a
//! *record* with a few places of its own; a reader writes there which root it reads, and a writer looks at all of them (hazard pointers).
//!
//! Laws:
//! - **What is held stays.** A reader writes the root down, passes its fence, and looks whether it is still the current one; if not, it begins
//!   anew. A writer replaces the root, passes its fence, and looks at the records. One of the two sees the other, as in `gate.rs`.
//! - **A reader waits for nobody.** It begins anew only if somebody has published in between, and neither allocates nor frees: its record
//!   is made once per thread, by [`warm_up`] at the latest, and is given back when the thread ends, to be the next thread's.
//! - **Visits may be nested.** They end in reverse order, so the depth is the place. Where there are too few, the last one says *everything*.

use std::cell::Cell;
use std::ptr;
use std::sync::OnceLock;

use crate::sync::{AtomicPtr, AtomicU32, AtomicUsize, Ordering, fence};

/// Places of a record: with its depth and its link it is one cache line.
const PLACES: usize = 6;
/// The place of all visits that have none of their own.
const LAST: usize = PLACES - 1;
const NOTHING: usize = 0;
const EVERYTHING: usize = usize::MAX;

/// What one thread reads. In lines of its own, as its neighbours' threads write theirs all the time.
#[repr(C, align(128))]
pub(super) struct Record {
    /// The addresses of the roots that are read. Written by the thread, read by writers.
    held: [AtomicUsize; PLACES],
    /// Visits under way. The thread's own.
    depth: AtomicUsize,
    /// Written before the record is in the list, and never again.
    next: *const Record,
    /// 1 while it is a thread's.
    taken: AtomicU32,
}

/// The records of all threads. Those whose threads have ended wait for the next.
#[derive(Default)]
pub(super) struct Records {
    head: AtomicPtr<Record>,
}

// SAFETY: `next` is written before the record is shared, and points at a record that lives as long as the list's statics; the rest is atomic.
unsafe impl Sync for Record {}

/// The current root of an index, kept from being reused until this is dropped.
pub(super) struct Hold<T> {
    pub(super) root: *const T,
    record: &'static Record,
    /// The thread is about to end and has no record of its own any more: this one is given back behind the visit.
    borrowed: bool,
}

impl Record {
    fn new() -> Self {
        let (depth, taken) = (AtomicUsize::new(0), AtomicU32::new(1));
        Self { held: std::array::from_fn(|_| AtomicUsize::new(NOTHING)), depth, next: ptr::null(), taken }
    }

    /// Writes down what `current` has, until that is what it has still.
    #[inline]
    pub(super) fn hold<T>(&self, current: &AtomicPtr<T>) -> *const T {
        let depth = self.depth.load(Ordering::Relaxed);
        self.depth.store(depth + 1, Ordering::Relaxed);
        let mut root = current.load(Ordering::Relaxed);
        loop {
            let what = if depth < LAST { root.addr() } else { EVERYTHING };
            // Release: pairs with the Acquire in `is_held`; who sees this root sees that the reads of the one before are over.
            self.held[depth.min(LAST)].store(what, Ordering::Release);
            fence(Ordering::SeqCst); // between our store to `held` and our load of the root; partner: `Records::is_held`'s callers
            // Acquire: pairs with the Release of who published it.
            let now = current.load(Ordering::Acquire);
            if now == root {
                return root;
            }
            root = now;
        }
    }

    /// Ends the visit that began last.
    #[inline]
    pub(super) fn let_go(&self) {
        let depth = self.depth.load(Ordering::Relaxed) - 1;
        self.depth.store(depth, Ordering::Relaxed);
        if depth <= LAST {
            // Release: pairs with the Acquire in `is_held`; who sees nothing held sees that the reads are over.
            self.held[depth].store(NOTHING, Ordering::Release);
        }
    }
}

impl Records {
    /// A record for one thread: one that is free, or a new one.
    pub(super) fn claim(&self) -> &'static Record {
        let free = |record: &&Record| {
            // Acquire: pairs with the Release of the thread that gave it back.
            record.taken.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_ok()
        };
        if let Some(record) = self.iter().find(free) {
            return record;
        }
        let record = Box::leak(Box::new(Record::new()));
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            record.next = head;
            // Release: pairs with the Acquire in `iter`. The fence in `hold` orders it before the first root that is read.
            match self.head.compare_exchange(head, record, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return record,
                Err(now) => head = now,
            }
        }
    }

    /// Whether some visit reads this root. To be asked behind a `SeqCst` fence that stands behind its replacement, partner of the one in `hold`.
    pub(super) fn is_held(&self, root: usize) -> bool {
        // Acquire: pairs with the Release in `let_go`.
        let holds = |place: &AtomicUsize| [root, EVERYTHING].contains(&place.load(Ordering::Acquire));
        // The tree of nothing has no node that could be reused.
        root != NOTHING && self.iter().any(|record| record.held.iter().any(holds))
    }

    fn iter(&self) -> impl Iterator<Item = &'static Record> {
        // SAFETY: null, or a record that `claim` leaked.
        let first = unsafe { self.head.load(Ordering::Acquire).as_ref() };
        // SAFETY: as above.
        std::iter::successors(first, |record| unsafe { record.next.as_ref() })
    }
}

static RECORDS: OnceLock<Records> = OnceLock::new();

thread_local! {
    /// Without a destructor, so that a visit finds it by one load.
    static MINE: Cell<Option<&'static Record>> = const { Cell::new(None) };
    static LEAVING: Leaving = const { Leaving };
}

/// Gives the thread's record back.
struct Leaving;

impl Drop for Leaving {
    fn drop(&mut self) {
        if let Some(record) = MINE.take() {
            record.taken.store(0, Ordering::Release); // as in `claim`
        }
    }
}

/// The records of this process.
pub(super) fn records() -> &'static Records {
    RECORDS.get_or_init(Records::default)
}

/// Holds what `current` has.
#[inline]
pub(super) fn hold<T>(current: &AtomicPtr<T>) -> Hold<T> {
    let (record, borrowed) = match MINE.get() {
        Some(record) => (record, false),
        None => claim(),
    };
    Hold { root: record.hold(current), record, borrowed }
}

/// Makes the thread's record.
pub(super) fn warm_up() {
    if MINE.get().is_none() {
        let (record, borrowed) = claim();
        give_back(record, borrowed);
    }
}

#[cold]
fn claim() -> (&'static Record, bool) {
    let record = records().claim();
    let stays = LEAVING.try_with(|_| ()).is_ok();
    if stays {
        MINE.set(Some(record));
    }
    (record, !stays)
}

#[inline]
fn give_back(record: &Record, borrowed: bool) {
    if borrowed {
        record.taken.store(0, Ordering::Release); // as in `claim`
    }
}

/// In a forked child: the other threads, which don't exist here, read nothing. Async-signal-safe.
pub(crate) fn forget_others() {
    let mine = MINE.get().map(ptr::from_ref);
    for record in RECORDS.get().into_iter().flat_map(Records::iter) {
        if mine.is_none_or(|mine| !ptr::eq(mine, record)) {
            record.depth.store(0, Ordering::Relaxed);
            record.held.iter().for_each(|place| place.store(NOTHING, Ordering::Relaxed));
            record.taken.store(0, Ordering::Relaxed);
        }
    }
}

impl<T> Drop for Hold<T> {
    #[inline]
    fn drop(&mut self) {
        self.record.let_go();
        give_back(self.record, self.borrowed);
    }
}

#[cfg(all(test, loom))]
mod models {
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::thread;

    use super::*;

    /// Two roots that take turns, as nodes are reused.
    struct World {
        records: Records,
        current: AtomicPtr<UnsafeCell<u32>>,
        roots: [UnsafeCell<u32>; 2],
    }

    impl World {
        fn root(&self, which: usize) -> *mut UnsafeCell<u32> {
            ptr::from_ref(&self.roots[which]).cast_mut()
        }

        /// Looks at what is current, as loom would not let it if anybody wrote there meanwhile.
        fn read(&self, record: &Record) -> u32 {
            let root = record.hold(&self.current);
            // SAFETY: one of the two roots of `self`.
            let value = unsafe { &*root }.with(|value| {
                // SAFETY: loom checks that nobody writes it now.
                unsafe { *value }
            });
            record.let_go();
            value
        }

        /// Makes the other root current, if nobody reads it any more.
        fn publish(&self, which: usize, value: u32) -> bool {
            fence(Ordering::SeqCst); // between the replacing of this root and the look at the records, as in `bury`
            if self.records.is_held(self.root(which).addr()) {
                return false;
            }
            self.roots[which].with_mut(|place| {
                // SAFETY: loom checks that nobody else reads or writes it now.
                unsafe { *place = value };
            });
            self.current.store(self.root(which), Ordering::Release);
            true
        }
    }

    fn world() -> Arc<World> {
        let world = Arc::new(World {
            records: Records::default(),
            current: AtomicPtr::new(ptr::null_mut()),
            roots: [UnsafeCell::new(1), UnsafeCell::new(0)],
        });
        world.current.store(world.root(0), Ordering::Relaxed);
        world
    }

    /// A reader that comes while the root is replaced twice, so that the first is written anew.
    #[test]
    fn a_root_that_is_read_is_not_reused() {
        loom::model(|| {
            let world = world();
            let reader = thread::spawn({
                let world = Arc::clone(&world);
                move || {
                    let record = world.records.claim();
                    let first = world.read(record);
                    let second = world.read(record);
                    assert!(first <= second, "a reader doesn't go back");
                }
            });
            assert!(world.publish(1, 2));
            world.publish(0, 3);
            reader.join().unwrap();
        });
    }

    /// Visits inside visits, and then more than there are places.
    #[test]
    fn nested_visits_hold_each_their_root() {
        loom::model(|| {
            let world = world();
            let reader = thread::spawn({
                let world = Arc::clone(&world);
                move || {
                    let record = world.records.claim();
                    record.depth.store(LAST, Ordering::Relaxed); // as below five others
                    let outer = record.hold(&world.current);
                    let inner = world.read(record);
                    // SAFETY: one of the two roots of `world`.
                    let value = unsafe { &*outer }.with(|value| {
                        // SAFETY: loom checks that nobody writes it now.
                        unsafe { *value }
                    });
                    record.let_go();
                    assert!(value <= inner);
                }
            });
            assert!(world.publish(1, 2));
            world.publish(0, 3);
            reader.join().unwrap();
        });
    }
}
