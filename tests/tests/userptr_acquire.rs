//! Acquiring on the scripted device: superseded and cancelled acquisitions, errors, and all the ways of waiting.

mod userptr;

use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Wake, Waker};
use std::thread;
use std::time::Duration;

use pinfold_core::{DeviceError, Error, Manager, Outcome, State};
use pinfold_invalidate::page_size;
use pinfold_tests::PATIENCE;
use pinfold_tests::fake::{Answer, Call, FakeDevice};
use pinfold_tests::fence::Fence;
use pinfold_tests::memory::{Backing, Region};

use userptr::executor::block_on;
use userptr::scripted::{anonymous, by_workers, lease, submit};
use userptr::{Fake, Rig, alone, device_sees, filled, patient, register, wait_until};

// ---- supersede and cancel ----------------------------------------------------------------------------------------------------------------

#[test]
fn a_mutation_during_an_acquisition_throws_its_result_away_and_the_worker_begins_anew() {
    let _alone = alone();
    let rig = by_workers();
    let region = anonymous(2);
    let object = register(&rig.manager, region.range());
    rig.device.script(Call::Import, &[Answer::Hold]);
    assert!(rig.manager.acquire(&[&object]).unwrap_err().is_again());
    rig.device.wait_held(1);
    assert_eq!(object.state().unwrap(), State::Acquiring);
    region.map_over(0..2).unwrap();
    // Nothing is valid yet, so nobody needs to wait for the gates to see that: the news may come a moment after the call has returned.
    wait_until("the invalidation", || object.state().unwrap() == State::Invalid);
    region.fill(0..2, 0x21).unwrap();
    rig.device.let_go();
    assert_eq!(device_sees(&rig, &object), [filled(0x21); 2]);
    assert_eq!(rig.device.live_imports(), 1);
    assert!(rig.manager.stats().retries >= 1);
}

#[test]
// rows (fake): xe/compute-mode-userptr-{free,unmap}
fn an_acquisition_that_was_superseded_does_no_harm_to_the_one_that_came_after() {
    let _alone = alone();
    let rig = Fake::new();
    let region = Region::untouched(Backing::Anonymous, 2).unwrap();
    let object = register(&rig.manager, region.range());
    // Not resident, so a worker's; it is held while it takes the pages.
    rig.device.script(Call::Import, &[Answer::Hold]);
    assert!(rig.manager.acquire(&[&object]).unwrap_err().is_again());
    rig.device.wait_held(1);
    region.map_over(0..2).unwrap();
    region.fill(0..2, 0x31).unwrap();
    wait_until("the invalidation", || object.state().unwrap() == State::Invalid);
    // Resident now, so done here, beside the worker.
    let next = rig.manager.acquire(&[&object]).unwrap();
    assert_eq!(object.state().unwrap(), State::Valid);
    let (id, generation) = (next.view(0).id, next.view(0).generation);
    rig.device.let_go();
    wait_until("the end of the superseded import", || rig.device.counts().released == 1);
    assert!(rig.device.is_live(id));
    assert_eq!(object.generation().unwrap(), generation);
    assert_eq!(lease(&rig, &object).view(0).id, id);
    assert_eq!(rig.start(next).unwrap().finish(), [filled(0x31); 2]);
}

#[test]
fn a_cancelled_acquisition_is_told_to_its_waiters_and_the_next_one_works() {
    let _alone = alone();
    let rig = by_workers();
    let region = anonymous(1);
    let object = register(&rig.manager, region.range());
    assert!(!object.cancel(), "nothing is pending");
    rig.device.script(Call::Import, &[Answer::Hold]);
    thread::scope(|scope| {
        let waiters: Vec<_> =
            (0..3).map(|_| scope.spawn(|| rig.manager.acquire_timeout(&[&object], PATIENCE).map(drop))).collect();
        rig.device.wait_held(1);
        wait_until("three waiters", || rig.manager.stats().acquires >= 3);
        assert!(object.cancel());
        for waiter in waiters {
            let error = waiter.join().unwrap().unwrap_err();
            assert!(matches!(error, Error::Cancelled), "{error}");
        }
    });
    assert_eq!(object.state().unwrap(), State::Invalid);
    assert!(!object.cancel());
    rig.device.let_go();
    let next = lease(&rig, &object);
    wait_until("the end of the cancelled import", || rig.device.live_imports() == 1);
    assert!(rig.device.is_live(next.view(0).id));
    assert_eq!(object.state().unwrap(), State::Valid);
}

#[test]
fn a_cancelled_acquisition_that_goes_on_is_not_taken_for_the_next_one() {
    let _alone = alone();
    let rig = Fake::new();
    let region = Region::untouched(Backing::Anonymous, 1).unwrap();
    let object = register(&rig.manager, region.range());
    rig.device.script(Call::Import, &[Answer::Hold]);
    assert!(rig.manager.acquire(&[&object]).unwrap_err().is_again());
    rig.device.wait_held(1);
    assert!(object.cancel());
    region.fill(0..1, 0x41).unwrap();
    // The generation has not moved: only the acquisition itself tells the two apart. Told as cancelled first, then begun here.
    assert!(matches!(rig.manager.acquire(&[&object]).unwrap_err(), Error::Cancelled));
    let next = rig.manager.acquire(&[&object]).unwrap();
    let id = next.view(0).id;
    rig.device.let_go();
    wait_until("the end of the cancelled import", || rig.device.counts().released == 1);
    assert!(rig.device.is_live(id));
    assert_eq!(lease(&rig, &object).view(0).id, id);
    assert_eq!(object.state().unwrap(), State::Valid);
}

#[test]
fn a_queued_acquisition_can_be_cancelled_before_it_begins() {
    let _alone = alone();
    let rig = by_workers();
    let region = anonymous(2);
    let (first, second) = (register(&rig.manager, region.part(0..1)), register(&rig.manager, region.part(1..2)));
    rig.device.script(Call::Import, &[Answer::Hold]);
    let _ = rig.manager.acquire(&[&first]);
    rig.device.wait_held(1);
    let _ = rig.manager.acquire(&[&second]);
    // Queued, or done by another worker already: then there is nothing to cancel, and both are in order.
    let cancelled = second.cancel();
    let answer = rig.manager.acquire(&[&second]);
    if cancelled {
        assert!(matches!(answer, Err(Error::Cancelled)), "{answer:?}");
    }
    rig.device.let_go();
    drop((lease(&rig, &first), lease(&rig, &second)));
}

// ---- errors ------------------------------------------------------------------------------------------------------------------------------

#[test]
fn an_error_is_stored_told_once_and_the_next_acquire_tries_again() {
    let _alone = alone();
    let rig = by_workers();
    let region = anonymous(1);
    let object = register(&rig.manager, region.range());
    rig.device.script(Call::Import, &[Answer::Hold, Answer::Fault(libc::EPERM), Answer::Hold]);
    assert!(rig.manager.acquire(&[&object]).unwrap_err().is_again());
    rig.device.wait_held(1);
    rig.device.let_go();
    wait_until("the end of the acquisition", || object.state().unwrap() == State::Faulted);
    assert_eq!(rig.manager.acquire(&[&object]).unwrap_err().errno(), libc::EPERM);
    assert_eq!(object.state().unwrap(), State::Faulted);
    assert!(rig.manager.acquire(&[&object]).unwrap_err().is_again(), "it has been told");
    rig.device.wait_held(1);
    rig.device.let_go();
    drop(lease(&rig, &object));
    let counts = rig.device.counts();
    assert_eq!((counts.imported, counts.dropped), (1, 0));
}

#[test]
fn each_waiter_of_a_failed_acquisition_is_told() {
    let _alone = alone();
    let rig = by_workers();
    let region = anonymous(1);
    let object = register(&rig.manager, region.range());
    rig.device.script(Call::Import, &[Answer::Hold, Answer::Fault(libc::EPERM)]);
    thread::scope(|scope| {
        let waiters: Vec<_> =
            (0..4).map(|_| scope.spawn(|| rig.manager.acquire_timeout(&[&object], PATIENCE).map(drop))).collect();
        rig.device.wait_held(1);
        wait_until("four waiters", || rig.manager.stats().acquires >= 4);
        rig.device.let_go();
        for waiter in waiters {
            assert_eq!(waiter.join().unwrap().unwrap_err().errno(), libc::EPERM);
        }
    });
    assert_eq!(rig.device.counts().imported, 0, "who waits for an acquisition takes its error as his own");
    drop(lease(&rig, &object));
}

#[test]
fn who_comes_back_with_a_wait_after_again_is_told_what_became_of_it() {
    let _alone = alone();
    let rig = by_workers();
    let region = anonymous(1);
    let object = register(&rig.manager, region.range());
    rig.device.script(Call::Import, &[Answer::Hold, Answer::Fault(libc::EPERM)]);
    assert!(rig.manager.acquire(&[&object]).unwrap_err().is_again());
    rig.device.wait_held(1);
    rig.device.let_go();
    wait_until("the end of the acquisition", || object.state().unwrap() == State::Faulted);
    assert_eq!(rig.manager.acquire_timeout(&[&object], PATIENCE).unwrap_err().errno(), libc::EPERM);
    drop(lease(&rig, &object));
}

#[test]
// rows (fake): peers/subscribe-failure-becomes-another-error
fn each_kind_of_failure_of_the_device_arrives_as_what_it_is() {
    let _alone = alone();
    let rig = Fake::new();
    let region = anonymous(1);
    for call in [Call::Prepare, Call::Import] {
        let object = register(&rig.manager, region.range());
        rig.device.script(call, &[Answer::Fault(libc::EACCES), Answer::Budget, Answer::Failed(-7)]);
        let mut errors = (0..3).map(|_| rig.manager.acquire_timeout(&[&object], PATIENCE).unwrap_err());
        assert!(
            matches!(errors.next().unwrap(), Error::Fault { errno: libc::EACCES, range, .. } if range == region.range())
        );
        assert!(
            matches!(errors.next().unwrap(), Error::Budget { needed, .. } if needed == region.range().len() as u64)
        );
        assert!(
            matches!(errors.next().unwrap(), Error::Device(error) if matches!(*error, DeviceError::Failed { raw: -7, .. }))
        );
        assert_eq!(object.state().unwrap(), State::Faulted);
        drop(lease(&rig, &object));
    }
    assert_eq!(rig.manager.stats().faults, 6);
}

#[test]
fn an_acquire_of_several_objects_is_all_or_none() {
    let _alone = alone();
    let rig = Fake::new();
    let region = anonymous(3);
    let objects: Vec<_> = (0..3).map(|page| register(&rig.manager, region.part(page..page + 1))).collect();
    let all: Vec<_> = objects.iter().collect();
    rig.device.script(Call::Import, &[Answer::Fine, Answer::Fault(libc::EPERM)]);
    assert_eq!(rig.manager.acquire_timeout(&all, PATIENCE).unwrap_err().errno(), libc::EPERM);
    let lease = rig.manager.acquire_timeout(&all, PATIENCE).unwrap();
    assert_eq!(lease.len(), 3);
    for (index, object) in objects.iter().enumerate() {
        assert_eq!(lease.view(index).range, object.range());
    }
    assert!(rig.manager.acquire(&[]).unwrap().is_empty());
}

#[test]
fn the_budget_is_kept_and_says_what_is_left() {
    let _alone = alone();
    let page = pinfold_core::page_size() as u64;
    let mut config = patient();
    config.budget = 3 * page;
    let rig = Fake::with(config);
    let region = anonymous(8);
    let two = register(&rig.manager, region.part(0..2));
    let other = register(&rig.manager, region.part(2..4));
    let big = register(&rig.manager, region.part(4..8));
    let expect = |object, wanted, left| match rig.manager.acquire_timeout(&[object], PATIENCE).unwrap_err() {
        Error::Budget { needed, available, range, .. } => {
            assert_eq!((needed, available, range), (wanted * page, left * page, object.range()));
        }
        error => panic!("{error}"),
    };
    expect(&big, 4, 3);
    let held = lease(&rig, &two);
    assert_eq!(rig.manager.stats().pinned_bytes, 2 * page);
    expect(&other, 2, 1);
    drop((two, held));
    drop(lease(&rig, &other)); // at once: what is done with is room
    assert_eq!(rig.manager.stats().pinned_bytes, 2 * page);
    rig.device.script(Call::Import, &[Answer::Failed(1)]);
    rig.manager.invalidate(other.range()).unwrap();
    assert!(rig.manager.acquire_timeout(&[&other], PATIENCE).is_err());
    wait_until("the bytes of a failed import given back", || rig.manager.stats().pinned_bytes == 0);
}

// ---- waiting -----------------------------------------------------------------------------------------------------------------------------

#[test]
fn acquiring_can_be_awaited() {
    let _alone = alone();
    let rig = by_workers();
    let region = anonymous(2);
    let (first, second) = (register(&rig.manager, region.part(0..1)), register(&rig.manager, region.part(1..2)));
    let both = [&first, &second];
    rig.device.script(Call::Import, &[Answer::Hold, Answer::Hold]);
    thread::scope(|scope| {
        let tasks: Vec<_> = (0..3)
            .map(|_| scope.spawn(|| block_on(rig.manager.acquire_async(&both)).map(|lease| lease.len())))
            .collect();
        rig.device.wait_held(2);
        rig.device.let_go();
        for task in tasks {
            assert_eq!(task.join().unwrap().unwrap(), 2);
        }
    });
    // A valid object is ready at once; a failure is told; a future that is dropped leaves nothing behind.
    assert_eq!(block_on(rig.manager.acquire_async(&both)).unwrap().len(), 2);
    rig.manager.invalidate(region.range()).unwrap();
    rig.device.script(Call::Import, &[Answer::Fault(libc::EPERM)]);
    assert_eq!(block_on(rig.manager.acquire_async(&[&first])).unwrap_err().errno(), libc::EPERM);
    rig.device.script(Call::Import, &[Answer::Hold]);
    {
        let objects = [&first];
        let mut future = pin!(rig.manager.acquire_async(&objects));
        let mut context = Context::from_waker(Waker::noop());
        assert!(future.as_mut().poll(&mut context).is_pending());
        assert!(future.as_mut().poll(&mut context).is_pending());
    }
    rig.device.wait_held(1);
    rig.device.let_go();
    drop(lease(&rig, &first));
}

#[test]
fn work_can_be_awaited_and_waited_for_only_so_long() {
    let _alone = alone();
    let rig = Fake::new();
    let region = anonymous(1);
    let object = register(&rig.manager, region.range());
    let fence = Fence::new();
    let pending = submit(lease(&rig, &object), std::slice::from_ref(&fence)).unwrap();
    assert_eq!(pending.wait(Duration::ZERO), None);
    thread::scope(|scope| {
        let task = scope.spawn(|| block_on(pending));
        fence.signal(Outcome::Done);
        assert_eq!(task.join().unwrap(), Outcome::Done);
    });
}

#[test]
fn who_waits_for_one_object_takes_it_and_several_go_to_workers() {
    let _alone = alone();
    let mut config = patient();
    config.inline_limit = page_size();
    let rig = Fake::with(config);
    let regions = [2, 3, 65].map(anonymous);
    let [one, other, large] = [0, 1, 2].map(|n: usize| register(&rig.manager, regions[n].range()));
    let taken = || {
        let stats = rig.manager.stats();
        (stats.acquired_inline, stats.acquired_by_worker)
    };
    drop(lease(&rig, &one));
    assert_eq!(taken(), (1, 0));
    drop(rig.manager.acquire_timeout(&[&one, &other, &one], PATIENCE).unwrap());
    assert_eq!(taken(), (2, 0), "the only one that isn't valid");
    drop(lease(&rig, &large));
    assert_eq!(taken(), (2, 1), "more than 64 times the limit");
    rig.manager.invalidate(one.range()).unwrap();
    let _ = rig.manager.acquire(&[&one]); // may find it done already
    drop(lease(&rig, &one));
    assert_eq!(taken(), (2, 2), "who doesn't wait");
    [&one, &other].into_iter().for_each(|object| rig.manager.invalidate(object.range()).unwrap());
    drop(rig.manager.acquire_timeout(&[&one, &other], PATIENCE).unwrap());
    // Side by side; but where a worker is done with the first before the second is looked at, that one is the only one.
    assert!(matches!(taken(), (2, 4) | (3, 3)), "{:?}", taken());
}

#[test]
fn a_wait_that_is_over_answers_again_and_leaves_the_acquisition_going() {
    let _alone = alone();
    let rig = by_workers();
    let region = anonymous(1);
    let object = register(&rig.manager, region.range());
    rig.device.script(Call::Import, &[Answer::Hold]);
    assert!(rig.manager.acquire_timeout(&[&object], Duration::ZERO).unwrap_err().is_again());
    rig.device.wait_held(1);
    assert!(rig.manager.acquire_timeout(&[&object], Duration::from_millis(1)).unwrap_err().is_again());
    rig.device.let_go();
    drop(lease(&rig, &object));
    assert_eq!(rig.device.counts().imported, 1);
}

#[test]
fn a_prefetch_waits_for_nothing_and_the_acquire_after_it_is_a_hit() {
    let _alone = alone();
    let rig = Fake::new();
    let region = Region::untouched(Backing::Anonymous, 2).unwrap();
    let (one, two) = (register(&rig.manager, region.part(0..1)), register(&rig.manager, region.part(1..2)));
    rig.device.script(Call::Import, &[Answer::Hold]);
    rig.manager.prefetch(&[&one]).unwrap();
    rig.device.wait_held(1);
    rig.manager.prefetch(&[&one, &two]).unwrap();
    wait_until("the other", || two.state().unwrap() == State::Valid);
    rig.device.let_go();
    wait_until("the first", || one.state().unwrap() == State::Valid);
    let imports = rig.manager.stats().imports_made;
    assert_eq!(rig.manager.acquire(&[&one, &two]).unwrap().len(), 2);
    assert_eq!(rig.manager.stats().imports_made, imports);
    // What goes wrong is told to the acquire.
    rig.device.script(Call::Import, &[Answer::Fault(libc::EPERM)]);
    rig.manager.invalidate(one.range()).unwrap();
    rig.manager.prefetch(&[&one]).unwrap();
    wait_until("the fault", || one.state().unwrap() == State::Faulted);
    assert_eq!(rig.manager.acquire(&[&one]).unwrap_err().errno(), libc::EPERM);
    let nested = rig.manager.mutate(&[one.range()], || rig.manager.prefetch(&[&one]).unwrap_err()).unwrap();
    assert!(matches!(nested, Error::Nested));
}

// ---- how a failure is told ---------------------------------------------------------------------------------------------------------------

/// Looks at how many imports are counted, and how many are short of room, on the thread that tells of an acquisition's end and while it tells.
struct Look(Arc<Manager<FakeDevice>>, Mutex<Vec<(u64, u64)>>);

impl Wake for Look {
    fn wake(self: Arc<Self>) {
        let stats = self.0.stats();
        self.1.lock().unwrap().push((stats.imports, stats.short));
    }
}

/// A manager that leaves every acquisition to a worker and has room for one page, and two pages.
fn room_for_one(device: &FakeDevice) -> (Arc<Manager<FakeDevice>>, Region) {
    let mut config = patient();
    (config.inline_limit, config.budget) = (0, page_size() as u64);
    (Arc::new(Manager::new(device.clone(), config).unwrap()), Region::new(Backing::Anonymous, 2).unwrap())
}

/// Has a worker acquire an object of one page, which takes until something is done `meanwhile`, and tells what was counted when it was told.
fn counted_when_told(manager: &Arc<Manager<FakeDevice>>, region: &Region, meanwhile: impl FnOnce()) -> (u64, u64) {
    let object = register(manager, region.part(0..1));
    let look = Arc::new(Look(Arc::clone(manager), Mutex::default()));
    let objects = [&object];
    let mut acquire = pin!(manager.acquire_async(&objects));
    assert!(acquire.as_mut().poll(&mut Context::from_waker(&Waker::from(Arc::clone(&look)))).is_pending());
    meanwhile();
    wait_until("the end of the acquisition", || !look.1.lock().unwrap().is_empty());
    let looks = look.1.lock().unwrap();
    assert_eq!(looks.len(), 1);
    looks[0]
}

#[test]
fn what_a_failed_acquisition_was_counted_with_is_room_before_anybody_is_told() {
    let _alone = alone();
    let device = FakeDevice::new();
    device.script(Call::Import, &[Answer::Hold, Answer::Fault(libc::EPERM)]);
    let (manager, region) = room_for_one(&device);
    let counted = counted_when_told(&manager, &region, || {
        device.wait_held(1);
        device.let_go();
    });
    assert_eq!(counted, (0, 0));
}

#[test]
fn who_found_no_room_at_first_is_short_no_more_when_he_is_told() {
    let _alone = alone();
    for (end, imports) in [(Answer::Fine, 1), (Answer::Fault(libc::EPERM), 0)] {
        let device = FakeDevice::new();
        let (manager, region) = room_for_one(&device);
        let other = register(&manager, region.part(1..2));
        drop(manager.acquire_timeout(&[&other], PATIENCE).unwrap());
        device.script(Call::Import, &[Answer::Hold, end]);
        let counted = counted_when_told(&manager, &region, || {
            device.wait_held(1);
            assert_eq!(manager.stats().short, 1);
            device.let_go();
        });
        assert_eq!(counted, (imports, 0));
    }
}

#[test]
fn what_an_acquisition_that_was_given_up_was_counted_with_is_room_before_anybody_is_told() {
    let _alone = alone();
    let device = FakeDevice::new();
    // A worker's attempts, in each of which the mapping isn't the same before and after.
    const ATTEMPTS: usize = 8;
    device.script(Call::Prepare, &[Answer::Hold, Answer::Fine].repeat(ATTEMPTS));
    let (manager, region) = room_for_one(&device);
    let counted = counted_when_told(&manager, &region, || {
        for attempt in 1..=ATTEMPTS {
            wait_until("the next attempt", || device.counts().prepared == attempt);
            device.wait_held(1);
            let write = if attempt % 2 == 0 { libc::PROT_WRITE } else { 0 };
            region.protect(0..1, libc::PROT_READ | write).unwrap();
            device.let_go();
        }
    });
    assert_eq!((counted, device.counts().prepared), ((0, 0), ATTEMPTS));
}
