//! The life of an object from register to release, on the scripted device: errors, waiting, superseding, cancelling, leases, ends.

#[macro_use]
mod userptr;

use std::cell::Cell;
use std::convert::Infallible;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;
use std::time::Duration;

use pinfold_core::watch::{
    FilterEntry, Note, NoteCause, NotePath, NoteState, TYPE_USERPTR, UserptrEvent, UserptrNote, WatchConfig, WatchQueue,
};
use pinfold_core::{Access, Coverage, DeviceError, Error, Lease, Outcome, Path, State, SubmitError, Userptr};
use pinfold_invalidate::page_size;
use pinfold_tests::PATIENCE;
use pinfold_tests::fake::{Answer, Call, FakeDevice};
use pinfold_tests::fence::Fence;
use pinfold_tests::memory::{Backing, Move, Region};

use userptr::{
    Fake, Rig, alone, assert_faults, assert_taken_back, device_sees, filled, patient, program_sees, register, space,
    wait_for_mutator, wait_until,
};

/// No acquisition on the calling thread.
fn by_workers() -> Fake {
    let mut config = patient();
    config.inline_limit = 0;
    Fake::with(config)
}

fn anonymous(pages: usize) -> Region {
    Region::new(Backing::Anonymous, pages).unwrap()
}

fn lease(rig: &Fake, object: &Userptr<FakeDevice>) -> Lease<FakeDevice> {
    rig.manager.acquire_timeout(&[object], PATIENCE).unwrap()
}

/// Submits nothing that would be over before the fence is signalled.
fn submit(
    lease: Lease<FakeDevice>,
    fences: &[Fence],
) -> Result<pinfold_core::Pending<FakeDevice>, SubmitError<FakeDevice, Infallible>> {
    // SAFETY: nothing is submitted, so nothing accesses the objects.
    unsafe { lease.submit(fences.iter().cloned(), || Ok(())) }
}

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

/// Wakes the thread that waits, and remembers that it has.
struct Alarm(thread::Thread, AtomicBool);

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        self.1.store(true, Ordering::SeqCst);
        self.0.unpark();
    }
}

/// The smallest executor: polls when it was woken, and only then.
fn block_on<F: Future>(future: F) -> F::Output {
    let alarm = Arc::new(Alarm(thread::current(), AtomicBool::new(false)));
    let waker = Waker::from(Arc::clone(&alarm));
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return output;
        }
        wait_until("the wake-up", || {
            thread::park_timeout(Duration::from_millis(100));
            alarm.1.swap(false, Ordering::SeqCst)
        });
    }
}

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

// ---- leases and submits ------------------------------------------------------------------------------------------------------------------

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

// ---- notes -------------------------------------------------------------------------------------------------------------------------------

fn next(queue: &WatchQueue) -> UserptrNote {
    let mut next = None;
    wait_until("a note", || {
        next = next.take().or_else(|| queue.notes().next());
        next.is_some()
    });
    match next {
        Some(Note::Userptr(note)) => note,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_end_of_work_is_told_when_the_last_that_names_the_object_is_over() {
    let _alone = alone();
    let rig = by_workers();
    let queue = rig.manager.watch(WatchConfig::default()).unwrap();
    let region = anonymous(1);
    let object = register(&rig.manager, region.range());
    let fences = [Fence::new(), Fence::new()];
    let work = fences.each_ref().map(|fence| submit(lease(&rig, &object), std::slice::from_ref(fence)).unwrap());
    let told = || {
        let of_this = |note| matches!(note, Note::Userptr(note) if note.event == UserptrEvent::Retired);
        queue.notes().filter(|note| of_this(*note)).count()
    };
    for (nth, (fence, pending)) in fences.iter().zip(work).enumerate() {
        assert_eq!((object.in_flight() as usize, told()), (2 - nth, 0));
        fence.signal(Outcome::Done);
        assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
        wait_until("the work's end", || object.in_flight() as usize == 1 - nth);
    }
    wait_until("a note", || told() == 1);
}

#[test]
fn the_watch_queue_tells_a_whole_life() {
    let _alone = alone();
    let rig = by_workers();
    let queue = rig.manager.watch(WatchConfig::default()).unwrap();
    queue.set_filter(Some(&[FilterEntry::all_of(TYPE_USERPTR)])).unwrap();
    let region = anonymous(4);
    // SAFETY: no reference points into a region, and every mutation is held off or bracketed.
    let object = unsafe { rig.manager.register_labelled(region.range(), Access::ReadWrite, "weights") }.unwrap();
    let (id, range) = (object.id(), region.range());
    // The end of work and the change that waited for it are told by two threads, in either order.
    let (submitted, retired) = (Cell::new(0), Cell::new(0));
    let expect = |event, state, generation| {
        let note = loop {
            let note = next(&queue);
            match note.event {
                UserptrEvent::Submitted => submitted.set(submitted.get() + 1),
                UserptrEvent::Retired => retired.set(retired.get() + 1),
                _ => break note,
            }
        };
        assert_eq!((note.event, note.state, note.generation), (event, state, generation), "{note:?}");
        assert_eq!((note.object, note.label.as_str(), note.writes), (id, "weights", true));
        note
    };
    let bounds = |note: &UserptrNote| (note.start, note.end);
    let all = (range.start() as u64, range.end() as u64);

    let note = expect(UserptrEvent::Registered, NoteState::New, 0);
    assert_eq!((bounds(&note), note.path, note.cause), (all, NotePath::None, NoteCause::None));

    let acquire = |generation| {
        let held = lease(&rig, &object);
        expect(UserptrEvent::Queued, NoteState::Queued, generation);
        assert_eq!(expect(UserptrEvent::Acquired, NoteState::Valid, generation).path, NotePath::Import);
        held
    };
    // Held: for as long as the work takes, and told so.
    let fence = Fence::new();
    let pending = submit(acquire(0), std::slice::from_ref(&fence)).unwrap();
    thread::scope(|scope| {
        let mutator = scope.spawn(|| region.unmap(1..2).unwrap());
        wait_for_mutator();
        assert!(!mutator.is_finished());
        fence.signal(Outcome::Done);
    });
    assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
    let note = expect(UserptrEvent::Invalidated, NoteState::Invalid, 1);
    let hole = region.part(1..2);
    assert_eq!((bounds(&note), note.cause), ((hole.start() as u64, hole.end() as u64), NoteCause::Unmap));
    assert!(note.hold_off_ns > 0 && !note.late && !note.no_hold);

    assert_eq!(rig.manager.acquire_timeout(&[&object], PATIENCE).unwrap_err().errno(), libc::EFAULT);
    expect(UserptrEvent::Queued, NoteState::Queued, 1);
    assert_eq!(expect(UserptrEvent::Faulted, NoteState::Faulted, 1).errno, libc::EFAULT);

    region.map_over(1..2).unwrap();
    drop(acquire(1));
    rig.manager.mutate(&[region.part(0..1)], || ()).unwrap();
    let note = expect(UserptrEvent::Invalidated, NoteState::Invalid, 2);
    assert_eq!((note.cause, note.start, note.end), (NoteCause::Bracket, all.0, region.part(0..1).end() as u64));

    drop(acquire(2));
    rig.manager.invalidate(range).unwrap();
    assert_eq!(expect(UserptrEvent::Invalidated, NoteState::Invalid, 3).cause, NoteCause::Manual);

    drop(acquire(3));
    let moved = region.relocate(0..1, Move::Away).unwrap();
    assert_eq!(expect(UserptrEvent::Invalidated, NoteState::Invalid, 4).cause, NoteCause::Remap);
    drop(moved);
    let mut last = 4;
    region.map_over(0..1).unwrap();
    // A mapping that moves away is reported as moved, and then as unmapped where it was.
    let generation = object.generation().unwrap().0;
    while last < generation {
        let note = next(&queue);
        assert_eq!((note.event, note.cause), (UserptrEvent::Invalidated, NoteCause::Unmap), "{note:?}");
        last = note.generation;
    }

    drop(acquire(last));
    region.advise(0..1, libc::MADV_DONTNEED).unwrap();
    assert_eq!(expect(UserptrEvent::Invalidated, NoteState::Invalid, last + 1).cause, NoteCause::Remove);
    drop(object);
    expect(UserptrEvent::Closed, NoteState::Closed, last + 2);
    rig.device.wait_no_imports();
    assert!(queue.notes().next().is_none());
    assert_eq!((submitted.get(), retired.get()), (1, 1));
}

// ---- for engines' own tests --------------------------------------------------------------------------------------------------------------

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
