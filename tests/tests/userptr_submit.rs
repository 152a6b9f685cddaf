//! Leases and submits on the scripted device: merged, stale, refused, panicking, with several signals, and spoilt on purpose.

mod userptr;

use std::convert::Infallible;
use std::future::Future;
use std::iter;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Wake, Waker};
use std::thread;

use pinfold_core::watch::{Note, NoteCause, WatchConfig};
use pinfold_core::{Error, Outcome, State, SubmitError, Userptr};
use pinfold_tests::PATIENCE;
use pinfold_tests::fake::{Answer, Call};
use pinfold_tests::fence::Fence;
use pinfold_tests::process::isolated;

use userptr::scripted::{anonymous, by_workers, lease, submit};
use userptr::{Fake, alone, patient, register, wait_for_mutator};

#[test]
fn merged_leases_are_one_submit_and_one_stale_object_spoils_it() {
    let _alone = alone();
    let rig = Fake::new();
    let regions = [anonymous(1), anonymous(1), anonymous(1)];
    let objects: Vec<_> = regions.iter().map(|region| register(&rig.manager, region.range())).collect();
    let merged = || {
        let mut merged = lease(&rig, &objects[0]);
        merged.merge(rig.manager.acquire_timeout(&[&objects[1], &objects[2]], PATIENCE).unwrap());
        merged
    };
    let (good, stale, fence) = (merged(), merged(), Fence::new());
    assert_eq!(
        (0..3).map(|index| good.view(index).range).collect::<Vec<_>>(),
        objects.iter().map(Userptr::range).collect::<Vec<_>>()
    );
    let pending = submit(good, std::slice::from_ref(&fence)).unwrap();
    assert!(objects.iter().all(|object| object.in_flight() == 1));
    fence.signal(Outcome::Done);
    assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
    assert!(objects.iter().all(|object| object.in_flight() == 0));
    regions[1].map_over(0..1).unwrap();
    match submit(stale, &[]).unwrap_err() {
        SubmitError::Stale { index: 1, range } => assert_eq!(range, regions[1].range()),
        error => panic!("{error}"),
    }
    assert!(objects.iter().all(|object| object.in_flight() == 0));
    assert_eq!((rig.manager.stats().submits, rig.manager.stats().stale), (1, 1));
}

#[test]
fn work_with_several_signals_is_over_with_the_last_and_lost_if_one_is() {
    let _alone = alone();
    let rig = Fake::new();
    let region = anonymous(1);
    let object = register(&rig.manager, region.range());
    for (ends, outcome) in
        [([Outcome::Done; 3], Outcome::Done), ([Outcome::Done, Outcome::Lost, Outcome::Done], Outcome::Lost)]
    {
        let fences = [Fence::new(), Fence::new(), Fence::new()];
        let pending = submit(lease(&rig, &object), &fences).unwrap();
        for (fence, end) in fences.iter().zip(ends) {
            assert_eq!(pending.poll(), None);
            assert_eq!(object.in_flight(), 1);
            fence.signal(end);
        }
        assert_eq!(pending.wait(PATIENCE), Some(outcome));
        assert_eq!(object.in_flight(), 0);
    }
}

#[test]
fn a_closure_that_fails_has_submitted_nothing_and_gives_the_lease_back() {
    let _alone = alone();
    let rig = Fake::new();
    let region = anonymous(1);
    let object = register(&rig.manager, region.range());
    let fence = Fence::new();
    // SAFETY: nothing is submitted.
    let answer = unsafe { lease(&rig, &object).submit([fence], || Err("the queue is full")) };
    let again = match answer.unwrap_err() {
        SubmitError::Rejected { error: "the queue is full", lease } => lease,
        error => panic!("{error}"),
    };
    assert_eq!((object.in_flight(), rig.manager.stats().submits, rig.manager.stats().in_flight), (0, 0, 0));
    assert_eq!(submit(again, &[]).unwrap().wait(PATIENCE), Some(Outcome::Done), "the lease is as good as before");
    // Nobody waits for the fence, which is never signalled.
    region.unmap_all().unwrap();
    assert_eq!(rig.manager.stats().space.late, 0);
}

#[test]
fn a_closure_that_panics_may_have_submitted_and_is_waited_for() {
    let _alone = alone();
    let rig = Fake::new();
    let region = anonymous(1);
    let object = register(&rig.manager, region.range());
    let (held, fence) = (lease(&rig, &object), Fence::new());
    let id = held.view(0).id;
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: nothing is submitted.
        unsafe { held.submit([fence.clone()], || -> Result<(), Infallible> { panic!("on purpose") }) }
    }));
    assert_eq!(panicked.unwrap_err().downcast_ref(), Some(&"on purpose"));
    assert_eq!((object.in_flight(), rig.manager.stats().in_flight), (1, 1));
    thread::scope(|scope| {
        scope.spawn(|| {
            region.unmap_all().unwrap();
            assert_eq!(fence.outcome(), Some(Outcome::Done), "munmap has returned while the device may work");
        });
        wait_for_mutator();
        assert!(rig.device.is_live(id));
        fence.signal(Outcome::Done);
    });
    rig.device.wait_no_imports();
    assert_eq!(rig.manager.stats().in_flight, 0);
}

#[test]
fn work_not_all_of_whose_signals_are_known_keeps_what_it_uses() {
    isolated(|| {
        let rig = Fake::new();
        let region = anonymous(1);
        let object = register(&rig.manager, region.range());
        let (held, fence) = (lease(&rig, &object), Fence::new());
        let id = held.view(0).id;
        let signals = iter::once(fence.clone()).chain(iter::once_with(|| panic!("on purpose")));
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            // SAFETY: nothing is submitted.
            unsafe { held.submit(signals, || Ok::<_, Infallible>(())) }
        }));
        assert_eq!(panicked.unwrap_err().downcast_ref(), Some(&"on purpose"));
        fence.signal(Outcome::Done);
        assert_eq!((object.in_flight(), rig.manager.stats().in_flight), (1, 1), "the other signal hasn't come");
        rig.manager.invalidate(object.range()).unwrap();
        drop(object);
        assert!(rig.device.is_live(id));
        // Whoever unmaps it waits for the deadline, and so would the end of the manager.
        std::mem::forget((rig, region));
    })
    .expect_return();
}

/// A waker that panics.
struct Bomb;

impl Wake for Bomb {
    fn wake(self: Arc<Self>) {
        panic!("on purpose");
    }
}

#[test]
fn a_panic_of_somebodys_waker_ends_the_work_all_the_same() {
    let _alone = alone();
    let rig = by_workers();
    let region = anonymous(1);
    let object = register(&rig.manager, region.range());
    let fence = Fence::new();
    let pending = submit(lease(&rig, &object), std::slice::from_ref(&fence)).unwrap();
    // Somebody waits for the next acquisition, with a waker that panics; when the work is over, the object is nobody's and is closed.
    rig.manager.invalidate(object.range()).unwrap();
    rig.device.script(Call::Import, &[Answer::Hold]);
    {
        let asked = [&object];
        let acquire = pin!(rig.manager.acquire_async(&asked));
        assert!(acquire.poll(&mut Context::from_waker(&Waker::from(Arc::new(Bomb)))).is_pending());
    }
    rig.device.wait_held(1);
    drop(object);
    assert!(catch_unwind(AssertUnwindSafe(|| fence.signal(Outcome::Done))).is_err());
    assert_eq!((pending.poll(), rig.manager.stats().in_flight), (Some(Outcome::Done), 0));
    rig.device.let_go();
    rig.device.wait_no_imports();
}

#[test]
fn leases_of_several_managers_are_no_submit() {
    let _alone = alone();
    let (ours, theirs) = (Fake::new(), Fake::new());
    let regions = [anonymous(1), anonymous(1)];
    let objects = [register(&ours.manager, regions[0].range()), register(&theirs.manager, regions[1].range())];
    let merged = || {
        let (mut first, mut second) = (lease(&ours, &objects[0]), lease(&theirs, &objects[1]));
        let mut all = lease(&ours, &objects[0]);
        second.merge(lease(&theirs, &objects[1]));
        first.merge(second);
        all.merge(first);
        all
    };
    assert!(matches!(submit(merged(), &[]), Err(SubmitError::Gone(Error::Foreign))));
    assert!(objects.iter().all(|object| object.in_flight() == 0));
    assert_eq!((ours.manager.stats().submits, ours.manager.stats().in_flight), (0, 0));
    assert!(submit(lease(&ours, &objects[0]), &[]).is_ok());
}

#[test]
fn a_submit_of_an_empty_lease_is_just_a_submit() {
    let _alone = alone();
    let rig = Fake::new();
    assert_eq!(submit(rig.manager.acquire(&[]).unwrap(), &[]).unwrap().poll(), Some(Outcome::Done));
}

#[test]
fn work_whose_pending_was_dropped_is_waited_for_all_the_same() {
    let _alone = alone();
    let rig = Fake::new();
    let region = anonymous(1);
    let object = register(&rig.manager, region.range());
    let fence = Fence::new();
    drop(submit(lease(&rig, &object), std::slice::from_ref(&fence)).unwrap());
    thread::scope(|scope| {
        scope.spawn(|| {
            region.unmap_all().unwrap();
            assert_eq!(fence.outcome(), Some(Outcome::Done));
        });
        wait_for_mutator();
        fence.signal(Outcome::Done);
    });
}

#[test]
fn a_lease_from_before_an_invalidation_is_refused_although_the_object_is_valid_again() {
    let _alone = alone();
    let rig = Fake::new();
    let region = anonymous(1);
    let object = register(&rig.manager, region.range());
    let old = lease(&rig, &object);
    region.map_over(0..1).unwrap();
    let new = lease(&rig, &object);
    assert_eq!(object.state().unwrap(), State::Valid);
    // SAFETY: nothing is submitted.
    let answer =
        unsafe { old.submit([Fence::new()], || -> Result<(), Infallible> { panic!("commands of an old import") }) };
    assert!(answer.unwrap_err().is_stale());
    assert!(submit(new, &[]).is_ok());
}

#[test]
// rows (fake): xe/userptr-inval-inject
fn every_nth_submit_finds_one_of_its_objects_invalidated_each_in_its_turn() {
    let _alone = alone();
    let rig = Fake::new();
    let region = anonymous(3);
    let objects: Vec<_> = (0..3).map(|page| register(&rig.manager, region.part(page..page + 1))).collect();
    let all: Vec<_> = objects.iter().collect();
    let queue = rig.manager.watch(WatchConfig::default()).unwrap();
    rig.manager.inject_invalidate(3);
    let mut stale = Vec::new();
    for number in 1..=18 {
        match submit(rig.manager.acquire_timeout(&all, PATIENCE).unwrap(), &[]) {
            Err(SubmitError::Stale { index, .. }) => stale.push((number, index)),
            other => drop(other.unwrap()),
        }
    }
    assert_eq!(stale, [(3, 1), (6, 2), (9, 0), (12, 1), (15, 2), (18, 0)]);
    let causes = queue
        .records()
        .filter(|record| matches!(record.note(), Note::Userptr(note) if note.cause == NoteCause::Injected));
    assert_eq!((causes.count(), rig.manager.stats().injected), (6, 6));
    rig.manager.inject_invalidate(0);
    for _ in 0..10 {
        submit(rig.manager.acquire_timeout(&all, PATIENCE).unwrap(), &[]).unwrap();
    }
    let mut config = patient();
    config.inject_invalidate = 1;
    let rig = Fake::with(config);
    let object = register(&rig.manager, region.part(0..1));
    assert!(submit(lease(&rig, &object), &[]).unwrap_err().is_stale());
}
