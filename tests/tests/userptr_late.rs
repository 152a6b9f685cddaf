//! What happens when the deadline passes, and where nobody is held at all.

#[macro_use]
mod userptr;

use std::convert::Infallible;
use std::time::Duration;

use pinfold_core::watch::{Note, UserptrEvent, UserptrNote, WatchConfig};
use pinfold_core::{Config, Coverage, HostRange, NoHoldReason, Outcome, Pending, State, Userptr};
use pinfold_invalidate::Space;
use pinfold_tests::fake::FakeDevice;
use pinfold_tests::fence::Fence;
use pinfold_tests::memory::{Backing, Region, find_mapping};
use pinfold_tests::process::isolated;
use pinfold_tests::{PATIENCE, state_of};

use userptr::{Fake, Rig, alone, assert_taken_back, device_sees, patient, register, wait_until};

/// A manager whose deadline the tests wait for.
fn hasty() -> Fake {
    let mut config = Config::default();
    config.deadline = Duration::from_millis(30);
    Fake::with(config)
}

fn submit(rig: &Fake, object: &Userptr<FakeDevice>, fence: &Fence) -> Pending<FakeDevice> {
    let lease = rig.manager.acquire_timeout(&[object], PATIENCE).unwrap();
    // SAFETY: nothing is submitted, so nothing accesses the object.
    unsafe { lease.submit([fence.clone()], || Ok::<_, Infallible>(())) }.unwrap()
}

#[test]
// rows (fake): igt/nohangcheck; xe/compute-mode-userptr-{free,unmap}
fn work_that_outlives_the_deadline_is_late_once_and_later_mutations_do_not_pay_for_it() {
    let _alone = alone();
    let rig = hasty();
    let queue = rig.manager.watch(WatchConfig::default()).unwrap();
    let before = rig.manager.stats().space.late; // of an earlier test's manager that is not wholly gone
    let region = Region::new(Backing::Anonymous, 4).unwrap();
    let (used, other) = (register(&rig.manager, region.part(0..2)), register(&rig.manager, region.part(2..4)));
    let mut invalidated = Vec::<UserptrNote>::new();
    let mut next_invalidation = || {
        wait_until("the note of an invalidation", || {
            invalidated.extend(queue.notes().filter_map(|note| match note {
                Note::Userptr(note) if note.event == UserptrEvent::Invalidated => Some(note),
                _ => None,
            }));
            !invalidated.is_empty()
        });
        invalidated.remove(0)
    };

    let fence = Fence::new();
    let pending = submit(&rig, &used, &fence);
    let id = rig.manager.acquire(&[&used]).unwrap().view(0).id;
    region.map_over(0..1).unwrap(); // returns by the deadline alone
    assert_eq!(state_of(&used), State::Invalid);
    let note = next_invalidation();
    assert!(note.late && note.object == used.id() && note.hold_off_ns > 0, "{note:?}");
    let late = || (rig.manager.stats().late, rig.manager.stats().space.late - before);
    assert_eq!(late(), (1, 1));
    assert_eq!((used.in_flight(), pending.poll()), (1, None), "the work goes on");
    assert!(rig.device.is_live(id), "and keeps what it names");

    // The same shard, the same object acquired anew, the very same pages: nobody waits for that work any more.
    drop(rig.manager.acquire_timeout(&[&used, &other], PATIENCE).unwrap());
    region.map_over(3..4).unwrap();
    assert!(!next_invalidation().late);
    region.map_over(0..2).unwrap();
    assert!(!next_invalidation().late);
    rig.manager.mutate(&[region.range()], || ()).unwrap();
    assert_eq!(late(), (1, 1));

    // Newer work is waited for as ever, and ends in its own count. On a busy machine it may end long after the short deadline.
    let _patient = Space::get(patient().deadline).unwrap();
    let quick = Fence::new();
    let newer = submit(&rig, &used, &quick);
    std::thread::scope(|scope| {
        scope.spawn(|| region.map_over(0..1).unwrap());
        userptr::wait_for_mutator();
        quick.signal(Outcome::Done);
    });
    assert_eq!(newer.wait(PATIENCE), Some(Outcome::Done));
    fence.signal(Outcome::Done);
    assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
    wait_until("the release of what the late work named", || !rig.device.is_live(id));
    let generation = used.generation().unwrap();
    assert!(!device_sees(&rig, &used).is_empty());
    region.map_over(1..2).unwrap();
    assert_taken_back(&used, generation);
}

#[test]
fn late_work_does_not_keep_the_manager_from_ending_in_order() {
    let _alone = alone();
    let rig = hasty();
    let region = Region::new(Backing::Anonymous, 1).unwrap();
    let object = register(&rig.manager, region.range());
    let fence = Fence::new();
    let pending = submit(&rig, &object, &fence);
    region.unmap_all().unwrap();
    assert_eq!(state_of(&object), State::Invalid); // and with that everything has been counted
    assert_eq!(rig.manager.stats().late, 1);
    std::thread::scope(|scope| {
        let Fake { device, manager, .. } = rig;
        let dropper = scope.spawn(|| {
            drop(manager);
            assert_eq!(fence.outcome(), Some(Outcome::Done), "the manager is gone while late work may run");
        });
        assert_eq!(device.live_imports(), 1);
        assert!(!dropper.is_finished());
        fence.signal(Outcome::Done);
        dropper.join().unwrap();
        assert_eq!(device.live_imports(), 0);
    });
    assert_eq!(pending.poll(), Some(Outcome::Done));
}

/// A page inside a mapping that the C library owns. The last one of `[heap]` is often beyond what was touched, and trimmed away; so the first.
fn page_of(name: &str) -> Option<HostRange> {
    let mapping = find_mapping(name)?;
    HostRange::new(mapping.start(), pinfold_core::page_size()).ok()
}

/// Work is under way that ends only after the mutation has returned: who held it would wait for itself.
fn nobody_holds(range: HostRange, reason: NoHoldReason, mutate: impl FnOnce()) {
    let rig = Fake::with(userptr::patient());
    let queue = rig.manager.watch(WatchConfig::default()).unwrap();
    let object = register(&rig.manager, range);
    let fence = Fence::new();
    let pending = submit(&rig, &object, &fence);
    assert_eq!(object.coverage(), Some(Coverage::NoHold(reason)));
    let generation = object.generation().unwrap();
    mutate();
    assert_eq!(fence.outcome(), None);
    wait_until("the invalidation", || object.generation().unwrap() > generation);
    let mut told = None;
    wait_until("its note", || {
        told = told.or_else(|| {
            queue.notes().find_map(|note| match note {
                Note::Userptr(note) if note.event == UserptrEvent::Invalidated => Some(note),
                _ => None,
            })
        });
        told.is_some()
    });
    assert!(told.is_some_and(|note| note.no_hold && !note.late));
    assert_eq!(rig.manager().stats().space.late, 0);
    fence.signal(Outcome::Done);
    assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
}

#[test]
fn the_heap_is_told_of_and_not_held() {
    isolated(|| {
        // Room at the top of the heap that nothing lives in.
        // SAFETY: the break moves up by pages that nobody else has been given.
        let top = unsafe { libc::sbrk(0) }.addr().next_multiple_of(pinfold_core::page_size());
        let page = pinfold_core::page_size();
        let grown = |to: usize| {
            // SAFETY: up, or back down over the pages that this test has added and nobody uses.
            unsafe { libc::brk(std::ptr::without_provenance_mut(to)) }
        };
        assert_eq!(grown(top + 8 * page), 0);
        let range = HostRange::new(top + page, 4 * page).unwrap();
        nobody_holds(range, NoHoldReason::Heap, || {
            // SAFETY: nothing lives in these pages.
            let answer =
                unsafe { libc::madvise(std::ptr::without_provenance_mut(range.start()), page, libc::MADV_DONTNEED) };
            assert_eq!(answer, 0);
        });
        // And trimming it, as the allocator does under its lock.
        let range = HostRange::new(top + 5 * page, 3 * page).unwrap();
        nobody_holds(range, NoHoldReason::Heap, || assert_eq!(grown(top + 5 * page), 0));
    })
    .expect_return();
}

#[test]
fn the_main_stack_is_told_of_and_not_held() {
    isolated(|| {
        // The lowest page is one that was touched once, deep in some call, and is not in use.
        let range = page_of("[stack]").expect("a main stack");
        nobody_holds(range, NoHoldReason::Stack, || {
            // SAFETY: below every frame that is alive: this is another thread's stack, which is asleep in a wait for this test.
            let answer = unsafe {
                libc::madvise(std::ptr::without_provenance_mut(range.start()), range.len(), libc::MADV_DONTNEED)
            };
            assert_eq!(answer, 0);
        });
    })
    .expect_return();
}
