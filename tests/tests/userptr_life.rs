//! The life of an object on the scripted device: its release, its watch, and the end of its manager.

mod userptr;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::Duration;

use pinfold_core::{Access, Coverage, Error, Outcome, Path, State, SubmitError, Userptr};
use pinfold_tests::PATIENCE;
use pinfold_tests::fake::{Answer, Call};
use pinfold_tests::fence::Fence;
use pinfold_tests::memory::{Backing, Region};

use userptr::executor::block_on;
use userptr::scripted::{anonymous, by_workers, lease, submit};
use userptr::{
    Fake, alone, assert_faults, assert_taken_back, device_sees, patient, program_sees, register, space,
    wait_for_mutator, wait_until,
};

// ---- release -----------------------------------------------------------------------------------------------------------------------------

#[test]
// rows (fake): igt/{unsync,sync}-unmap-after-close
fn after_release_a_munmap_pays_nothing() {
    let _alone = alone();
    let rig = Fake::new();
    for backing in Backing::ALL.into_iter().filter(|backing| backing.watchable()) {
        let region = Region::new(backing, 4).unwrap();
        let object = register(&rig.manager, region.range());
        drop(lease(&rig, &object));
        assert!(space().is_watched(region.range()), "{backing:?}");
        drop(object);
        wait_until("the end of the watch", || !space().is_watched(region.range()));
        let events = rig.manager.stats().space.events;
        region.unmap_all().unwrap();
        assert_eq!(rig.manager.stats().space.events, events, "{backing:?}");
        rig.device.wait_no_imports();
    }
    assert_eq!(rig.manager.stats().objects, 0);
    assert_eq!(rig.device.counts().dropped, 0);
}

#[test]
// rows (fake): peers/late-unsubscribe-drops-a-newer-registration
fn what_another_object_covers_stays_watched_after_release() {
    let _alone = alone();
    let rig = Fake::new();
    let region = anonymous(6);
    let (first, second) = (register(&rig.manager, region.part(0..4)), register(&rig.manager, region.part(2..6)));
    drop((lease(&rig, &first), lease(&rig, &second)));
    drop(first);
    wait_until("the end of the watch", || !space().is_watched(region.part(0..2)));
    assert!(space().is_watched(region.part(2..6)));
    let generation = second.generation().unwrap();
    region.map_over(0..2).unwrap();
    assert_eq!(second.generation().unwrap(), generation);
    region.map_over(3..4).unwrap();
    assert_taken_back(&second, generation);
}

#[test]
// rows (fake): igt/{unsync,sync}-unmap-after-close
fn an_object_may_be_released_after_its_memory_is_gone() {
    let _alone = alone();
    let rig = Fake::new();
    let region = anonymous(4);
    let (acquired, never) = (register(&rig.manager, region.range()), register(&rig.manager, region.range()));
    drop(lease(&rig, &acquired));
    region.unmap_all().unwrap();
    assert_eq!(never.state().unwrap(), State::New);
    drop((acquired, never));
    rig.device.wait_no_imports();
    wait_until("the end of the watch", || !space().is_watched(region.range()));
    assert_eq!(rig.device.counts().dropped, 0);
}

#[test]
fn a_lease_and_work_under_way_keep_a_released_object_open() {
    let _alone = alone();
    let rig = Fake::new();
    let region = anonymous(1);
    let object = register(&rig.manager, region.range());
    let (held, fence) = (lease(&rig, &object), Fence::new());
    drop(object);
    let id = held.view(0).id;
    let pending = submit(held, std::slice::from_ref(&fence)).unwrap();
    assert!(rig.device.is_live(id));
    thread::scope(|scope| {
        let mutator = scope.spawn(|| {
            region.unmap_all().unwrap();
            assert_eq!(fence.outcome(), Some(Outcome::Done), "munmap has returned while the device worked");
        });
        wait_for_mutator();
        assert!(!mutator.is_finished());
        fence.signal(Outcome::Done);
    });
    assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
    rig.device.wait_no_imports();
}

#[test]
fn an_invalid_objects_import_lives_until_the_last_lease_and_the_last_work_are_over() {
    let _alone = alone();
    let rig = Fake::new();
    let region = anonymous(1);
    let object = register(&rig.manager, region.range());
    let (kept, used, fence) = (lease(&rig, &object), lease(&rig, &object), Fence::new());
    let id = kept.view(0).id;
    assert_eq!(used.view(0).id, id, "an import that is still right is kept");
    let pending = submit(used, std::slice::from_ref(&fence)).unwrap();
    rig.manager.invalidate(region.range()).unwrap();
    let next = lease(&rig, &object);
    assert_ne!(next.view(0).id, id);
    assert!(next.changed_since(0, kept.view(0).generation) && !next.changed_since(0, next.view(0).generation));
    assert!(rig.device.is_live(id));
    fence.signal(Outcome::Done);
    assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
    assert!(rig.device.is_live(id), "a lease that is never submitted keeps what it names as well");
    assert!(submit(kept, &[]).unwrap_err().is_stale());
    wait_until("the release of the old import", || !rig.device.is_live(id));
    assert_eq!(rig.device.live_imports(), 1);
}

// ---- objects ---------------------------------------------------------------------------------------------------------------------------

#[test]
// rows (fake): xe/{bindexecqueue,many-execqueues,many-vm}-userptr-{…}
fn an_object_of_another_manager_is_foreign() {
    let _alone = alone();
    let (rig, other) = (Fake::new(), Fake::new());
    let region = anonymous(1);
    let (own, foreign) = (register(&rig.manager, region.range()), register(&other.manager, region.range()));
    for error in [
        rig.manager.acquire(&[&foreign]).unwrap_err(),
        rig.manager.acquire_timeout(&[&own, &foreign], PATIENCE).unwrap_err(),
        block_on(rig.manager.acquire_async(&[&foreign])).unwrap_err(),
    ] {
        assert!(matches!(error, Error::Foreign), "{error}");
    }
    // Two managers over the same memory: both are told, each finds its own.
    drop((lease(&rig, &own), lease(&other, &foreign)));
    assert_eq!(
        rig.manager.find(region.range().start()).unwrap().iter().map(Userptr::id).collect::<Vec<_>>(),
        [own.id()]
    );
    region.map_over(0..1).unwrap();
    assert_eq!((own.state().unwrap(), foreign.state().unwrap()), (State::Invalid, State::Invalid));
}

#[test]
fn find_gives_the_objects_over_an_address() {
    let _alone = alone();
    let rig = Fake::new();
    let region = anonymous(6);
    let (low, high) = (register(&rig.manager, region.part(0..4)), register(&rig.manager, region.part(2..6)));
    let page = pinfold_core::page_size();
    let at = |offset: usize| {
        let mut ids: Vec<_> =
            rig.manager.find(region.range().start() + offset).unwrap().iter().map(Userptr::id).collect();
        ids.sort_unstable();
        ids
    };
    assert_eq!(at(0), [low.id()]);
    assert_eq!(at(2 * page), [low.id(), high.id()]);
    assert_eq!(at(4 * page - 1), [low.id(), high.id()]);
    assert_eq!(at(4 * page), [high.id()]);
    assert!(at(6 * page).is_empty());
    assert!(rig.manager.find(usize::MAX).unwrap().is_empty());
    drop(low);
    assert_eq!(at(2 * page), [high.id()]);
}

#[test]
fn what_waits_for_a_gate_is_refused_inside_a_bracket() {
    let _alone = alone();
    let rig = Fake::new();
    let (region, elsewhere) = (anonymous(1), anonymous(1));
    let (object, other) = (register(&rig.manager, region.range()), register(&rig.manager, elsewhere.range()));
    let held = lease(&rig, &other);
    let manager = &rig.manager;
    let mut held = Some(held);
    manager
        .mutate(&[region.range()], || {
            let nested = |error: Error| assert!(matches!(error, Error::Nested), "{error}");
            nested(manager.acquire(&[&object]).unwrap_err());
            nested(manager.acquire_timeout(&[&object], PATIENCE).unwrap_err());
            nested(block_on(manager.acquire_async(&[&object])).unwrap_err());
            nested(manager.mutate(&[elsewhere.range()], || ()).unwrap_err());
            nested(manager.invalidate(elsewhere.range()).unwrap_err());
            nested(manager.find(region.range().start()).map(drop).unwrap_err());
            nested(object.state().unwrap_err());
            nested(object.generation().unwrap_err());
            match submit(held.take().unwrap(), &[]).unwrap_err() {
                SubmitError::Gone(error) => nested(error),
                error => panic!("{error}"),
            }
            // What waits for nothing is allowed.
            let another = register(manager, elsewhere.range());
            assert_eq!(another.in_flight(), 0);
            assert!(!another.cancel());
            drop(another);
        })
        .unwrap();
    drop(lease(&rig, &object));
}

#[test]
fn a_bracket_that_panics_opens_the_gates_again() {
    let _alone = alone();
    let rig = Fake::new();
    let region = anonymous(1);
    let object = register(&rig.manager, region.range());
    drop(lease(&rig, &object));
    let panicked = catch_unwind(AssertUnwindSafe(|| rig.manager.mutate(&[region.range()], || panic!("on purpose"))));
    assert!(panicked.is_err());
    assert_eq!(object.state().unwrap(), State::Invalid);
    drop(lease(&rig, &object));
    rig.manager.mutate(&[region.range()], || ()).unwrap();
}

#[test]
// rows (fake): igt/unsync-unmap; igt/access-control
fn an_unwatched_object_sends_no_event_and_is_right_in_brackets() {
    let _alone = alone();
    let rig = Fake::new();
    let region = anonymous(2);
    // SAFETY: no reference points into a region; the one mutation outside a bracket below is followed by `invalidate`.
    let object = unsafe { rig.manager.register_unwatched(region.range(), Access::Read) }.unwrap();
    drop(lease(&rig, &object));
    assert!(matches!(object.coverage(), Some(Coverage::Manual(_))));
    let (generation, events) = (object.generation().unwrap(), rig.manager.stats().space.events);
    region.map_over(0..2).unwrap();
    assert_eq!((object.generation().unwrap(), rig.manager.stats().space.events), (generation, events));
    rig.manager.invalidate(region.range()).unwrap();
    assert_taken_back(&object, generation);
    let fence = Fence::new();
    let pending = submit(lease(&rig, &object), std::slice::from_ref(&fence)).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let unmap = || {
                assert_eq!(fence.outcome(), Some(Outcome::Done), "the bracket was entered while the device worked");
                region.unmap_all().unwrap();
            };
            rig.manager.mutate(&[region.range()], unmap).unwrap();
        });
        wait_until("a closed gate", || !space().gate(0).is_open());
        fence.signal(Outcome::Done);
    });
    assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
    assert_faults(&rig.manager, &object);
}

#[test]
fn an_acquisition_that_nothing_has_changed_for_costs_no_import() {
    let _alone = alone();
    let rig = Fake::new();
    let region = anonymous(3);
    let object = register(&rig.manager, region.range());
    let (first, second) = (lease(&rig, &object), lease(&rig, &object));
    assert_eq!(first.view(0).generation, second.view(0).generation);
    assert_eq!((object.path(), rig.manager.stats().imports_made), (Some(Path::Import), 1));
    assert_eq!(device_sees(&rig, &object), program_sees(&region));
    assert_eq!(rig.manager.stats().imports_made, 1);
}

// ---- the manager's end -------------------------------------------------------------------------------------------------------------------

#[test]
fn a_manager_dropped_with_work_under_way_waits_for_it() {
    let _alone = alone();
    let rig = Fake::new();
    let region = anonymous(1);
    let object = register(&rig.manager, region.range());
    let fence = Fence::new();
    let pending = submit(lease(&rig, &object), std::slice::from_ref(&fence)).unwrap();
    let Fake { device, manager, .. } = rig;
    thread::scope(|scope| {
        let dropper = scope.spawn(|| {
            drop(manager);
            assert_eq!(fence.outcome(), Some(Outcome::Done), "the manager is gone while the device works");
        });
        assert_eq!(device.live_imports(), 1);
        assert!(!dropper.is_finished());
        fence.signal(Outcome::Done);
    });
    assert_eq!(pending.poll(), Some(Outcome::Done));
    device.wait_no_imports();
    assert_eq!(object.state().unwrap(), State::Closed);
    drop(object);
    assert_eq!(device.counts().dropped, 0);
}

#[test]
// rows (fake): igt/nohangcheck
fn a_manager_dropped_with_work_that_never_ends_asks_the_device_and_ends() {
    let _alone = alone();
    let mut config = patient();
    config.close_limit = Duration::from_millis(20);
    let Fake { device, manager, .. } = Fake::with(config);
    let region = anonymous(1);
    let object = register(&manager, region.range());
    let held = manager.acquire_timeout(&[&object], PATIENCE).unwrap();
    let pending = submit(held, &[Fence::new()]).unwrap();
    drop(manager);
    assert_eq!(pending.wait(PATIENCE), Some(Outcome::Lost));
    device.wait_no_imports();
    region.unmap_all().unwrap();
}

#[test]
fn leases_and_handles_that_outlive_their_manager_are_harmless() {
    let _alone = alone();
    let Fake { device, manager, .. } = Fake::new();
    let region = anonymous(2);
    let (object, queued) = (register(&manager, region.part(0..1)), register(&manager, region.part(1..2)));
    let (used, kept) = (manager.acquire(&[&object]).unwrap(), manager.acquire(&[&object]).unwrap());
    let clone = manager.clone();
    drop(manager);
    assert_eq!(object.state().unwrap(), State::Valid, "a clone keeps everything going");
    drop(clone);
    assert_eq!((object.state().unwrap(), queued.state().unwrap()), (State::Closed, State::Closed));
    assert!(matches!(submit(used, &[]).unwrap_err(), SubmitError::Gone(Error::Closed)));
    assert!(!object.cancel());
    assert_eq!(kept.view(0).range, object.range());
    drop((object, queued));
    assert_eq!(device.live_imports(), 1, "the lease keeps what it names");
    drop(kept);
    device.wait_no_imports();
    assert_eq!(device.counts().dropped, 0);
    region.unmap_all().unwrap();
}

#[test]
fn a_manager_dropped_during_an_acquisition_waits_for_the_worker_and_tells_the_waiter() {
    let _alone = alone();
    let Fake { device, manager, .. } = by_workers();
    let region = anonymous(1);
    let object = register(&manager, region.range());
    device.script(Call::Import, &[Answer::Hold]);
    let waiting = manager.clone();
    thread::scope(|scope| {
        let waiter = scope.spawn(|| waiting.acquire_timeout(&[&object], PATIENCE).map(drop));
        device.wait_held(1);
        drop(manager);
        device.let_go();
        waiter.join().unwrap().unwrap();
    });
    device.script(Call::Import, &[Answer::Hold]);
    waiting.invalidate(region.range()).unwrap();
    assert!(waiting.acquire(&[&object]).unwrap_err().is_again());
    device.wait_held(1);
    thread::scope(|scope| {
        scope.spawn(|| drop(waiting));
        wait_until("the manager's end begins", || object.state().unwrap() == State::Closed);
        device.let_go();
    });
    device.wait_no_imports();
    assert_eq!(device.counts().dropped, 0);
}
