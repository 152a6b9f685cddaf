//! Posting neither allocates nor frees, whatever it meets, also on a thread that has never posted before.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

use pinfold_core::watch::{
    FilterEntry, Label, Record, Scope, TYPE_WORK, UserptrNote, Wake, WatchConfig, WatchList, WatchQueue, WorkNote,
};

struct Counting;

thread_local! {
    /// Allocator calls of this thread. Has no destructor and a constant start, so touching it doesn't allocate.
    static CALLS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    CALLS.with(|calls| calls.set(calls.get() + 1));
}

// SAFETY: every call is handed to the system allocator unchanged; the counting touches no memory of the allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps `GlobalAlloc::alloc`'s contract, which is the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        count();
        // SAFETY: `block` came from `alloc` above, so from the system allocator, with this layout.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn post_everything(list: &WatchList) {
    for number in 0..2_000 {
        let note = UserptrNote { object: number, label: Label::new("a name"), ..Default::default() };
        list.post(number % 8, &note.record());
        list.post(number % 8, &WorkNote { work: number, ..Default::default() }.record());
        list.post(0, &Record::new(TYPE_WORK, 200, 3, &[1; 119]).expect("a long record"));
    }
}

fn calls_while(work: impl FnOnce()) -> u64 {
    let before = CALLS.get();
    work();
    CALLS.get() - before
}

#[test]
fn the_counter_sees_an_allocation() {
    assert_eq!(calls_while(|| drop(std::hint::black_box(Box::new(1)))), 2);
}

#[test]
fn posting_leaves_the_allocator_alone() {
    let list = WatchList::new();
    let open = |config: WatchConfig| WatchQueue::new(config).expect("an eventfd");
    let full = open(WatchConfig::default().capacity(32));
    let filtered = open(WatchConfig::default().capacity(4096));
    let denied = open(WatchConfig::default().policy(|object, _| object % 2 == 0));
    let armed = open(WatchConfig::default().wake(Wake::OnDemand));
    for (queue, tag) in [(&full, 0), (&filtered, 1), (&denied, 2), (&armed, 3)] {
        list.add_watch(queue, Scope::All, tag).expect("a watch");
        list.add_watch(queue, Scope::Object(5), tag).expect("a watch");
    }
    filtered.set_filter(Some(&[FilterEntry::some_of(TYPE_WORK, &[200])])).expect("a sound filter");
    assert!(!armed.arm());

    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // What posts read is replaced all the time, and freed: by the thread that replaces it.
        scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                filtered.set_filter(Some(&[FilterEntry::all_of(TYPE_WORK)])).expect("a sound filter");
                let brief = open(WatchConfig::default());
                list.add_watch(&brief, Scope::Object(3), 0).expect("a watch");
                filtered.set_filter(None).expect("no filter");
            }
        });
        let fresh = scope.spawn(|| calls_while(|| (0..20).for_each(|_| post_everything(&list))));
        assert_eq!(calls_while(|| (0..20).for_each(|_| post_everything(&list))), 0);
        assert_eq!(fresh.join().expect("the posting thread"), 0);
        done.store(true, Ordering::Release);
    });
    assert!(full.counters().lost > 0 && denied.counters().denied > 0 && filtered.counters().posted > 0);
}
