//! LATE: a deadline passes, the mutator is let go, and what was still under way is reported, not waited for twice, and kept until its end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pinfold_core::watch::{Note, UserptrEvent, UserptrNote, WatchConfig, WatchQueue};
use pinfold_core::{Access, Config, Error, Manager, Outcome, Pending, State, SubmitError, Userptr};
use pinfold_invalidate::HostRange;
use pinfold_tests::fake::FakeDevice;
use pinfold_tests::fence::Fence;
use pinfold_tests::memory::{Backing, Region};
use pinfold_tests::process::isolated;
use pinfold_tests::{PATIENCE, state_of};

const DEADLINE: Duration = Duration::from_millis(40);

fn hasty() -> Manager<FakeDevice> {
    let mut config = Config::default();
    config.deadline = DEADLINE;
    config.close_limit = PATIENCE;
    Manager::new(FakeDevice::new(), config).unwrap()
}

fn register(manager: &Manager<FakeDevice>, range: HostRange) -> Userptr<FakeDevice> {
    // SAFETY: no reference points into a region.
    unsafe { manager.register(range, Access::Read) }.unwrap()
}

/// Work over the object that is under way until the fence is signalled, and the import it names.
fn busy(manager: &Manager<FakeDevice>, object: &Userptr<FakeDevice>) -> (Fence, Pending<FakeDevice>, u64) {
    let lease = manager.acquire_timeout(&[object], PATIENCE).unwrap();
    let (fence, id) = (Fence::new(), lease.view(0).id);
    // SAFETY: each test signals the fence, and nothing accesses the object.
    let pending = unsafe { lease.submit([fence.clone()], || Ok::<_, Error>(())) }.unwrap();
    (fence, pending, id)
}

/// What the queue holds about invalidations, of which there are so many at least. They may come later than the invalidations are seen: while
/// another thread writes an earlier record, nothing behind that can be read.
fn invalidations(queue: &WatchQueue, count: usize) -> Vec<UserptrNote> {
    let wanted = |note| match note {
        Note::Userptr(note) if note.event == UserptrEvent::Invalidated => Some(note),
        _ => None,
    };
    let mut notes = Vec::new();
    wait_until("the notes", || {
        notes.extend(queue.notes().filter_map(wanted));
        notes.len() >= count
    });
    notes
}

fn wait_until(what: &str, mut come: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !come() {
        assert!(Instant::now() < deadline, "{what} doesn't come about");
        thread::yield_now();
    }
}

#[test]
fn work_that_outlives_the_deadline_is_flagged_with_the_time_the_mutator_was_held() {
    isolated(|| {
        let manager = hasty();
        let queue = manager.watch(WatchConfig::default()).unwrap();
        let region = Region::new(Backing::Anonymous, 4).unwrap();
        let (used, idle) = (register(&manager, region.part(0..2)), register(&manager, region.part(2..4)));
        let (fence, pending, _) = busy(&manager, &used);
        drop(manager.acquire_timeout(&[&idle], PATIENCE).unwrap());
        region.unmap_all().unwrap();
        assert_eq!(fence.outcome(), None, "the mutator returned before the work was over");
        assert_eq!(state_of(&used), State::Invalid);
        assert_eq!(used.in_flight(), 1);
        let notes = invalidations(&queue, 2);
        assert_eq!(notes.len(), 2);
        for note in notes {
            // The neighbour's mutator was held as long, but no work of the neighbour's was late.
            assert_eq!(note.late, note.object == used.id(), "{note:?}");
            assert!(Duration::from_nanos(note.hold_off_ns) >= DEADLINE, "{note:?}");
        }
        let stats = manager.stats();
        assert_eq!((stats.late, stats.space.late), (1, 1));
        assert!(Duration::from_nanos(stats.space.held_ns) >= DEADLINE);
        fence.signal(Outcome::Done);
        assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
        assert_eq!(used.in_flight(), 0);
    })
    .expect_return();
}

#[test]
fn work_that_was_given_up_on_holds_nobody_a_second_time() {
    isolated(|| {
        let manager = hasty();
        let region = Region::new(Backing::Anonymous, 4).unwrap();
        let (used, neighbour) = (register(&manager, region.part(0..2)), register(&manager, region.part(2..4)));
        let (fence, pending, _) = busy(&manager, &used);
        region.advise(0..2, libc::MADV_DONTNEED).unwrap();
        assert_eq!(state_of(&used), State::Invalid); // waits until the change has been told, as the counts don't
        assert_eq!(manager.stats().space.late, 1);
        let queue = manager.watch(WatchConfig::default()).unwrap();
        for round in 0..5_u8 {
            region.fill(0..4, round).unwrap();
            for object in [&used, &neighbour] {
                drop(manager.acquire_timeout(&[object], PATIENCE).unwrap());
            }
            region.advise(0..4, libc::MADV_DONTNEED).unwrap();
        }
        assert_eq!((fence.outcome(), used.in_flight()), (None, 1));
        assert_eq!((state_of(&used), state_of(&neighbour)), (State::Invalid, State::Invalid));
        let stats = manager.stats();
        assert_eq!((stats.late, stats.space.late), (1, 1), "only the first round was late");
        let notes = invalidations(&queue, 10);
        assert!(notes.iter().all(|note| !note.late), "{notes:?}");
        // New work counts as ever: its end is waited for, and the late work's end is not taken for it.
        region.fill(0..4, 9).unwrap();
        let (second, second_pending, _) = loop {
            let lease = manager.acquire_timeout(&[&used], PATIENCE).unwrap();
            let (second, id) = (Fence::new(), lease.view(0).id);
            // SAFETY: the fence is signalled below, and nothing accesses the object.
            if let Ok(pending) = unsafe { lease.submit([second.clone()], || Ok::<_, Error>(())) } {
                break (second, pending, id); // else: discarded pages were taken a second time
            }
        };
        fence.signal(Outcome::Done);
        assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
        region.unmap_all().unwrap();
        assert_eq!(second.outcome(), None);
        assert_eq!(manager.stats().space.late, 2, "the end of the late work was not that of the new");
        second.signal(Outcome::Done);
        assert_eq!(second_pending.wait(PATIENCE), Some(Outcome::Done));
    })
    .expect_return();
}

#[test]
fn an_import_that_late_work_names_is_kept_until_the_work_is_over() {
    isolated(|| {
        let manager = hasty();
        let device = manager.device().clone();
        let (region, other) =
            (Region::new(Backing::Anonymous, 2).unwrap(), Region::new(Backing::Anonymous, 2).unwrap());
        let (used, idle) = (register(&manager, region.range()), register(&manager, other.range()));
        let (fence, pending, id) = busy(&manager, &used);
        drop(manager.acquire_timeout(&[&idle], PATIENCE).unwrap());
        assert_eq!(device.live_imports(), 2);
        region.unmap_all().unwrap();
        other.unmap_all().unwrap();
        // What was invalidated later is given back: so would have been what was invalidated earlier.
        wait_until("the release of the idle object's import", || device.live_imports() == 1);
        assert!(device.is_live(id));
        drop(used); // nor does the object's end touch it
        drop(idle);
        wait_until("the end of the idle object", || manager.stats().objects <= 1);
        assert!(device.is_live(id));
        fence.signal(Outcome::Done);
        assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
        device.wait_no_imports();
        assert_eq!(device.counts().dropped, 0);
    })
    .expect_return();
}

#[test]
fn a_manager_that_is_dropped_with_late_work_waits_for_it() {
    isolated(|| {
        let manager = hasty();
        let device = manager.device().clone();
        let (region, other) =
            (Region::new(Backing::Anonymous, 2).unwrap(), Region::new(Backing::Anonymous, 2).unwrap());
        let (used, spare) = (register(&manager, region.range()), register(&manager, other.range()));
        let (fence, pending, id) = busy(&manager, &used);
        let mut probe = manager.acquire_timeout(&[&spare], PATIENCE).unwrap();
        region.unmap_all().unwrap();
        assert_eq!(state_of(&used), State::Invalid);
        assert_eq!(manager.stats().late, 1);
        let ending = AtomicBool::new(false);
        thread::scope(|scope| {
            let (ending, device) = (&ending, &device);
            let dropper = scope.spawn(move || {
                drop(manager);
                assert!(ending.load(Ordering::SeqCst), "the manager went while the work was under way");
                assert!(!device.is_live(id));
            });
            // A submit is refused as soon as the drop has begun, and until then by its closure.
            loop {
                // SAFETY: nothing is submitted.
                match unsafe { probe.submit(None::<Fence>, || Err(Error::Cancelled)) } {
                    Err(SubmitError::Rejected { lease, .. } | SubmitError::Again(lease)) => probe = lease,
                    Err(SubmitError::Gone(Error::Closed)) => break,
                    other => panic!("{other:?}"),
                }
            }
            assert!(device.is_live(id));
            assert!(!dropper.is_finished());
            ending.store(true, Ordering::SeqCst);
            fence.signal(Outcome::Done);
        });
        assert_eq!(pending.poll(), Some(Outcome::Done), "its own end, not one that the drop made up");
        assert!(matches!(used.state(), Ok(State::Closed)));
        drop((pending, used, spare));
        device.wait_no_imports();
        assert_eq!(device.counts().dropped, 0);
    })
    .expect_return();
}
