//! A visiting thread neither allocates nor frees, whatever writers do meanwhile.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use pinfold_invalidate::index::{Index, warm_up_thread};
use pinfold_invalidate::{HostRange, page_size};

struct Counting;

thread_local! {
    /// Calls of the allocator by this thread. `const` and without a destructor, so that it needs no allocation itself.
    static CALLS: Cell<usize> = const { Cell::new(0) };
}

fn count() {
    CALLS.with(|calls| calls.set(calls.get() + 1));
}

// SAFETY: every call is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count();
        // SAFETY: passed on.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: passed on.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn calls() -> usize {
    CALLS.with(Cell::get)
}

fn range(n: usize) -> HostRange {
    HostRange::new((2 * n + 1) * page_size(), (1 + n % 4) * page_size()).unwrap()
}

/// Visits, and holds a visit open while the writers go on, in every way there is.
fn look_around(index: &Index<usize>, round: usize, changes: &AtomicUsize) {
    index.find((2 * round + 1) * page_size() + 5, |entry| assert_eq!(*entry.value.as_ref(), entry.id as usize));
    index.visit_overlapping(range(round % 2000), |entry| {
        let before = changes.load(Ordering::Relaxed);
        while round.is_multiple_of(64) && changes.load(Ordering::Relaxed) < before + 3 {
            std::hint::spin_loop();
        }
        assert_eq!(*entry.value.as_ref(), entry.id as usize);
    });
    if round.is_multiple_of(16) {
        index.for_each(|entry| {
            black_box(entry.range);
        });
        // More visits at once than a record has places, so that some hold every root.
        index.find(range(0).start(), |_| nested(index, 12));
        black_box((index.len(), index.is_empty()));
    }
}

fn nested(index: &Index<usize>, depth: usize) {
    if depth > 0 {
        index.find(range(0).start(), |_| nested(index, depth - 1));
    }
}

#[test]
fn a_reader_never_allocates_or_frees_while_writers_churn() {
    let index = &Index::new();
    for n in 0..2000 {
        index.insert(range(n), n as u64, Arc::new(n));
    }
    let (done, changes) = (&AtomicBool::new(false), &AtomicUsize::new(0));
    thread::scope(|scope| {
        for writer in 0..2 {
            scope.spawn(move || {
                let mut n = writer;
                while !done.load(Ordering::Relaxed) {
                    // The entries at the very front stay, as the nested visits start from one.
                    let at = 10 + n % 1990;
                    if index.remove(range(at), at as u64).is_none() {
                        index.insert(range(at), at as u64, Arc::new(at));
                    }
                    changes.fetch_add(1, Ordering::Relaxed);
                    n += 7;
                }
            });
        }
        let reader = scope.spawn(move || {
            warm_up_thread();
            let before = calls();
            for round in 0..3000 {
                look_around(index, round, changes);
            }
            let made = calls() - before;
            done.store(true, Ordering::Relaxed);
            made
        });
        let made = reader.join();
        done.store(true, Ordering::Relaxed); // also when an assertion of the reader failed
        assert_eq!(made.expect("the reader's assertions hold"), 0, "allocator calls on the reading thread");
    });
    assert!(changes.load(Ordering::Relaxed) > 100, "writers did write");
    assert_eq!(index.sweep(), 0);
}

#[test]
fn a_thread_that_did_not_warm_up_allocates_at_its_first_visit_at_most() {
    // Shows that the counter counts, and that warming up is what the first visit would do.
    let index = &Index::<usize>::new();
    let (cold, later) = thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let before = calls();
            index.find(0, |_| {});
            let cold = calls() - before;
            index.find(0, |_| {});
            (cold, calls() - before - cold)
        });
        reader.join().expect("nothing panics")
    });
    assert_eq!(later, 0);
    eprintln!("the first visit of a thread calls the allocator {cold} times");
    let before = calls();
    drop(black_box(Box::new(1)));
    assert_eq!(calls() - before, 2, "the counter counts");
}
