//! Ten thousand objects with a watch of their own, and many in one mapping: registered, acquired, taken back by one call, and gone
//! without a trace. And what an object costs in memory.

#[macro_use]
mod userptr;

use std::alloc::{GlobalAlloc, Layout, System};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pinfold_core::{Access, Device, Manager, State, Userptr, page_size};
use pinfold_invalidate::mappings;
use pinfold_tests::PATIENCE;
use pinfold_tests::dma::DmaDevice;
use pinfold_tests::fake::FakeDevice;
use pinfold_tests::leaks::Holdings;
use pinfold_tests::memory::{Backing, Region};
use pinfold_tests::process::{Ending, isolated};
use pinfold_tests::skip;

use userptr::{patient, space, wait_until};

const OBJECTS: usize = 10_000;

/// In one mapping. `scripts/soak` asks for a hundred thousand, in release; the debug build takes some thirty times as long.
fn many() -> usize {
    std::env::var("PINFOLD_SOAK_OBJECTS").ok().and_then(|objects| objects.parse().ok()).unwrap_or(10_000)
}

/// Counts the bytes that the program has, as it asked for them.
struct Counting;

static BYTES: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call is handed to the system allocator unchanged; the counting touches no memory of the allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size() as u64, Ordering::Relaxed);
        // SAFETY: the caller keeps `GlobalAlloc::alloc`'s contract, which is the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        BYTES.fetch_sub(layout.size() as u64, Ordering::Relaxed);
        // SAFETY: `block` came from `alloc` above, so from the system allocator, with this layout.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Does something so many times and prints how long each took, and what of it this thread was running. For people; nothing is judged by it.
fn each<T>(what: &str, times: usize, work: impl FnOnce() -> T) -> T {
    let (begun, running) = (Instant::now(), thread_time());
    let result = work();
    let (took, ran) = (begun.elapsed(), thread_time() - running);
    let each = |time: Duration| time.as_nanos() as f64 / times as f64;
    println!("{what}: {:.0} ns each, running {:.0} ns, in all {took:.1?}", each(took), each(ran));
    result
}

fn thread_time() -> Duration {
    let now =
        nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).expect("every thread has this clock");
    now.into()
}

/// One page each, with a page between them that is nobody's: each has a watch of its own.
fn ten_thousand_objects<D: Device>(device: D, pinned: u64) {
    let manager = Manager::new(device, patient()).unwrap();
    let region = Region::new(Backing::Anonymous, 2 * OBJECTS).unwrap();
    let idle = Holdings::now();
    let objects: Vec<_> = (0..OBJECTS)
        // SAFETY: no reference points into a region, and nothing is submitted.
        .map(|object| unsafe { manager.register(region.part(2 * object..2 * object + 1), Access::Read) }.unwrap())
        .collect();
    // The allocator takes a mapping or two for the list.
    assert!(Holdings::now().mappings < idle.mappings + 100, "registering asks nothing of the kernel");

    let all: Vec<_> = objects.iter().collect();
    let lease = manager.acquire_timeout(&all, PATIENCE).unwrap();
    let stats = manager.stats();
    assert_eq!((lease.len(), stats.objects, stats.imports), (OBJECTS, OBJECTS as u64, OBJECTS as u64));
    assert_eq!(Holdings::now().pinned - idle.pinned, pinned);
    assert!(Holdings::now().descriptors < idle.descriptors + 10, "an object has no descriptor of its own");
    assert_eq!(manager.find(objects[OBJECTS / 2].range().start()).unwrap()[0].id(), objects[OBJECTS / 2].id());

    region.unmap_all().unwrap();
    for object in &objects {
        // Twice for some: the call is told once for each shard, with all of its range.
        assert!(object.state().unwrap() == State::Invalid && object.generation().unwrap().0 > 0);
    }
    drop((all, lease));
    wait_until("the release of all imports", || manager.stats().imports == 0);
    drop(objects);
    wait_until("the end of all watches", || !space().is_watched(region.range()));
    assert_eq!(manager.stats().objects, 0);
    assert_eq!(Holdings::now().pinned, idle.pinned);
}

/// The process before and after, with an earlier manager's remains (caches of the allocator and the like) in both counts.
fn leave_nothing(body: impl Fn()) {
    let threads = Holdings::now().threads;
    let held_after = || {
        body();
        // The thread that settles may be the last to let go of an object, and then ends the tracking.
        wait_until("the end of all threads", || Holdings::now().threads == threads);
        Holdings::now()
    };
    let (before, after) = (held_after(), held_after());
    assert_eq!((after.descriptors, after.threads, after.pinned), (before.descriptors, before.threads, before.pinned));
    // The allocator may keep a few mappings more; ten thousand objects would be seen.
    assert!(after.mappings < before.mappings + 100, "{before:?} {after:?}");
}

#[test]
// rows (fake): igt/sync-unmap
fn ten_thousand_objects_come_and_go_on_the_scripted_device() {
    isolated(|| {
        leave_nothing(|| {
            let device = FakeDevice::new();
            ten_thousand_objects(device.clone(), 0);
            let counts = device.counts();
            assert_eq!((device.live_imports(), counts.dropped, counts.released), (0, 0, OBJECTS));
        });
    })
    .expect_return();
}

#[test]
// rows (dma): igt/sync-unmap
fn ten_thousand_objects_come_and_go_on_the_device_that_pins() {
    isolated(|| {
        if let Err(e) = DmaDevice::new() {
            skip!("no io_uring here: {e}");
        }
        if !nix::unistd::geteuid().is_root() {
            skip!("ten thousand pins need more than the usual RLIMIT_MEMLOCK, from which only root is exempt");
        }
        leave_nothing(|| {
            let device = DmaDevice::new().unwrap();
            ten_thousand_objects(device.clone(), (OBJECTS * pinfold_core::page_size()) as u64);
            assert_eq!(device.live_imports(), 0);
        });
    })
    .expect_return();
}

/// Shows what the child has measured.
fn told(ending: &Ending) {
    print!("{}", ending.output);
    ending.expect_return();
}

/// Objects over one mapping, whose pages are present.
fn in_one_mapping(count: usize, pages: usize, object: impl Fn(usize) -> Range<usize>) {
    let device = FakeDevice::new();
    let manager = Manager::new(device.clone(), patient()).unwrap();
    let region = Region::untouched(Backing::Anonymous, pages).unwrap();
    region.fill(0..pages, 1).unwrap();
    let objects: Vec<_> = each("register", count, || {
        // SAFETY: no reference points into a region, and nothing is submitted.
        (0..count).map(|at| unsafe { manager.register(region.part(object(at)), Access::Read) }.unwrap()).collect()
    });
    assert_eq!(manager.stats().objects, objects.len() as u64);
    // In pieces, as frames would; all of them remain valid.
    let all: Vec<&Userptr<FakeDevice>> = objects.iter().collect();
    each("acquire", count, || {
        for some in all.chunks(1000) {
            assert_eq!(manager.acquire_timeout(some, PATIENCE).unwrap().len(), some.len());
        }
    });
    each("acquire again", count, || assert_eq!(manager.acquire(&all).unwrap().len(), count));
    assert_eq!(manager.stats().imports_made, objects.len() as u64, "nothing was taken twice");
    // Of this memory alone: sixty workers have stacks and arenas of their own, if the machine is slow enough for them.
    let pieces = mappings(region.range()).unwrap().len();
    assert!(pieces < 200, "watches of neighbours are one, and not {pieces}");
    each("find", count, || {
        for object in &objects {
            let found = manager.find(object.range().start()).unwrap();
            assert!(found.iter().any(|found| found.id() == object.id()));
        }
    });
    each("munmap over all, for its caller", 1, || region.unmap_all().unwrap());
    // Whoever comes next pays for his own only: it is done while a hundred thousand are being given back.
    let other = Region::new(Backing::Anonymous, 1).unwrap();
    // SAFETY: as above.
    let next = unsafe { manager.register(other.range(), Access::Read) }.unwrap();
    each("the next acquire", 1, || drop(manager.acquire_timeout(&[&next], PATIENCE).unwrap()));
    assert!(objects.iter().all(|object| object.state().unwrap() == State::Invalid));
    each("all given back", count, || wait_until("the release of all imports", || manager.stats().imports == 1));
    each("drop", count, || drop(objects));
    each("all forgotten", count, || wait_until("the end of all watches", || !space().is_watched(region.range())));
    let counts = device.counts();
    assert_eq!((device.live_imports(), counts.dropped, counts.imported, counts.released), (1, 0, count + 1, count));
}

#[test]
fn objects_side_by_side_in_one_mapping_are_taken_back_by_one_call() {
    told(&isolated(|| in_one_mapping(many(), many(), |at| at..at + 1)));
}

#[test]
fn objects_over_each_other_in_one_mapping_are_taken_back_by_one_call() {
    // Four begin on each page.
    told(&isolated(|| in_one_mapping(many(), many() / 4 + 4, |at| at / 4..at / 4 + 1 + at % 4)));
}

#[test]
fn an_object_costs_a_few_hundred_bytes() {
    told(&isolated(|| {
        let manager = Manager::new(FakeDevice::new(), patient()).unwrap();
        let region = Region::new(Backing::Anonymous, OBJECTS).unwrap();
        let mut objects = Vec::with_capacity(OBJECTS);
        let before = BYTES.load(Ordering::Relaxed);
        for page in 0..OBJECTS {
            // SAFETY: no reference points into a region, and nothing is submitted.
            objects.push(unsafe { manager.register(region.part(page..page + 1), Access::Read) }.unwrap());
        }
        let registered = (BYTES.load(Ordering::Relaxed) - before) / OBJECTS as u64;
        for object in &objects {
            drop(manager.acquire_timeout(&[object], PATIENCE).unwrap());
        }
        // Of these, the device's own part of an import is `FakeImport` and its copy of one word.
        let devices = (size_of::<pinfold_tests::fake::FakeImport>() + 8 + 16) as u64;
        let valid = (BYTES.load(Ordering::Relaxed) - before) / OBJECTS as u64 - devices;
        println!("registered: {registered} bytes an object, valid: {valid}, page size {}", page_size());
        assert!(registered <= REGISTERED && valid <= VALID, "{registered} {valid}");
    }));
}

/// Most bytes of the heap that an object takes, the index's part of it included; the documentation of `Manager::register` names them.
const REGISTERED: u64 = 400;
/// As above, when the device has its pages, without what the device itself needs for that.
const VALID: u64 = 500;
