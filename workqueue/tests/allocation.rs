//! Queueing an existing item allocates nothing and frees nothing, nor does submitting a job whose function captures
//! nothing, once the pool has room for it.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    sync::mpsc,
    time::Duration,
};

use pinfold_workqueue::{Job, Pool};

/// Counts calls per thread.
struct Counting;

thread_local! {
    static CALLS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    // A thread that ends frees after its counters are gone.
    let _ = CALLS.try_with(|calls| calls.set(calls.get() + 1));
}

// SAFETY: every call goes to the system allocator unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `alloc`, which is passed on whole.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count();
        // SAFETY: the caller keeps the contract of `dealloc`, which is passed on whole.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn calls_during(run: impl FnOnce()) -> u64 {
    let before = CALLS.with(Cell::get);
    run();
    CALLS.with(Cell::get) - before
}

#[test]
fn queueing_an_item_and_taking_it_back_allocates_and_frees_nothing() {
    let pool = Pool::builder("test").submitters_never_start_threads().build().expect("a pool");
    let items: Vec<_> = (0..1000).map(|_| pool.work(|_| {})).collect();
    let calls = calls_during(|| {
        for round in 0..20 {
            for item in &items {
                match round % 4 {
                    0 => drop(item.queue()),
                    1 => drop(item.queue_delayed(Duration::from_secs(60))),
                    2 => drop(item.modify_delayed(Duration::from_micros(100))),
                    _ => {
                        let _ = item.cancel_delayed();
                    }
                }
            }
        }
        for item in &items {
            drop(item.cancel_sync());
            drop(item.flush());
        }
    });
    assert_eq!(calls, 0);
}

#[test]
fn submitting_a_function_without_captures_allocates_nothing_once_there_is_room() {
    let pool = Pool::builder("test").bounded(1).submitters_never_start_threads().build().expect("a pool");
    let submit_while_busy = || {
        let (release, gate) = mpsc::channel::<()>();
        let occupying = Job::new(move |_| {
            let _ = gate.recv();
        });
        pool.submit(occupying).expect("accepted");
        let calls = calls_during(|| {
            for key in 0..1000 {
                drop(pool.submit(Job::new(|_| {}).key(key)));
            }
        });
        drop(release);
        let (last, done) = Job::tracked(|_| Ok(()));
        pool.submit(last).expect("accepted");
        done.wait().expect("it runs");
        calls
    };
    assert!(submit_while_busy() > 0, "the counter counts the room that is made");
    assert_eq!(submit_while_busy(), 0);
}
