//! What must not hang: whoever could break a hold-off is itself stuck behind it. The deadline, or the watchdog, breaks each.

use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use pinfold_core::{Access, Config, Error, Lease, Manager, Outcome, State};
use pinfold_invalidate::{Change, HostRange, Shards, Space, Target};
use pinfold_tests::fake::FakeDevice;
use pinfold_tests::fence::Fence;
use pinfold_tests::memory::{Backing, Region};
use pinfold_tests::process::isolated;
use pinfold_tests::{PATIENCE, generation_of, state_of};

/// A manager whose deadline passes soon, as these tests wait for it to pass.
fn hasty() -> Manager<FakeDevice> {
    let mut config = Config::default();
    config.deadline = Duration::from_millis(50);
    Manager::new(FakeDevice::new(), config).unwrap()
}

fn lease_of(manager: &Manager<FakeDevice>, region: &Region) -> (pinfold_core::Userptr<FakeDevice>, Lease<FakeDevice>) {
    // SAFETY: no reference points into a region.
    let object = unsafe { manager.register(region.range(), Access::Read) }.unwrap();
    let lease = manager.acquire_timeout(&[&object], PATIENCE).unwrap();
    (object, lease)
}

#[test]
fn the_thread_that_must_signal_the_work_may_be_the_one_in_munmap() {
    isolated(|| {
        let manager = hasty();
        let region = Region::new(Backing::Anonymous, 2).unwrap();
        let (object, lease) = lease_of(&manager, &region);
        let fence = Fence::new();
        // SAFETY: the fence is signalled below, and nothing accesses the object.
        let pending = unsafe { lease.submit([fence.clone()], || Ok::<_, Error>(())) }.unwrap();
        region.unmap_all().unwrap(); // returns by the deadline alone
        assert_eq!(state_of(&object), State::Invalid);
        assert_eq!(manager.stats().late, 1);
        fence.signal(Outcome::Done);
        assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
    })
    .expect_return();
}

#[test]
fn the_closure_of_a_submit_may_unmap_what_it_submits() {
    isolated(|| {
        let manager = hasty();
        let region = Region::new(Backing::Anonymous, 2).unwrap();
        let (object, lease) = lease_of(&manager, &region);
        let fence = Fence::new();
        let unmap = || {
            region.unmap_all().unwrap();
            fence.signal(Outcome::Done);
            Ok::<_, Error>(())
        };
        // SAFETY: as above.
        let pending = unsafe { lease.submit([fence.clone()], unmap) }.unwrap();
        assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
        assert_eq!(state_of(&object), State::Invalid);
        assert_eq!(manager.stats().late, 1);
    })
    .expect_return();
}

#[test]
fn a_submit_that_earlier_work_waits_for_is_let_in_after_the_deadline() {
    isolated(|| {
        let manager = hasty();
        // Two objects in one shard: neighbours within a block of addresses.
        let region = Region::new(Backing::Anonymous, 4).unwrap();
        // SAFETY: no reference points into a region.
        let gone = unsafe { manager.register(region.part(0..2), Access::Read) }.unwrap();
        // SAFETY: as above.
        let kept = unsafe { manager.register(region.part(2..4), Access::Read) }.unwrap();
        let first = manager.acquire_timeout(&[&gone], PATIENCE).unwrap();
        let second = manager.acquire_timeout(&[&kept], PATIENCE).unwrap();
        let fence = Fence::new();
        // SAFETY: the second submit signals the fence.
        let pending = unsafe { first.submit([fence.clone()], || Ok::<_, Error>(())) }.unwrap();
        thread::scope(|scope| {
            scope.spawn(|| region.unmap(0..2).unwrap());
            while pinfold_tests::memory::peek(region.range().start(), 1).is_ok() {
                thread::yield_now();
            }
            let mut lease = second;
            let signal = || {
                fence.signal(Outcome::Done);
                Ok::<_, Error>(())
            };
            loop {
                // SAFETY: as above.
                match unsafe { lease.submit(None::<Fence>, signal) } {
                    Ok(_) => break,
                    Err(pinfold_core::SubmitError::Again(back)) => lease = back,
                    Err(other) => panic!("{other:?}"),
                }
            }
        });
        assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
        assert_eq!(state_of(&kept), State::Valid);
    })
    .expect_return();
}

#[test]
// rows (fake): peers/allocator-advises-under-its-lock
fn an_allocator_may_discard_pages_under_the_lock_that_completion_needs() {
    isolated(|| {
        let manager = hasty();
        let region = Region::new(Backing::Anonymous, 2).unwrap();
        let (object, lease) = lease_of(&manager, &region);
        let fence = Fence::new();
        // SAFETY: the completion thread signals the fence.
        let pending = unsafe { lease.submit([fence.clone()], || Ok::<_, Error>(())) }.unwrap();
        let arena = Mutex::new(());
        let (locked, is_locked) = mpsc::channel();
        thread::scope(|scope| {
            let (arena, region) = (&arena, &region);
            scope.spawn(move || {
                let _guard = arena.lock().unwrap();
                locked.send(()).unwrap();
                region.advise(0..2, libc::MADV_DONTNEED).unwrap();
            });
            is_locked.recv().unwrap();
            drop(arena.lock().unwrap()); // what a driver's malloc does
            fence.signal(Outcome::Done);
        });
        assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
        assert_ne!(generation_of(&object).0, 0);
        assert_eq!(manager.stats().late, 1);
    })
    .expect_return();
}

/// Frees memory that is itself watched, from inside the handler: the monitor then waits for itself.
struct Foolish {
    region: Mutex<Option<Region>>,
    told: AtomicBool,
    shards: AtomicU16,
}

impl Target for Foolish {
    fn invalidated(&self, _: &Change) {
        if let Some(region) = self.region.lock().unwrap().take() {
            region.unmap_all().unwrap();
        }
        self.told.store(true, Ordering::SeqCst);
    }

    fn settled(self: Arc<Self>) {}

    fn shards(&self) -> Shards {
        Shards(self.shards.load(Ordering::SeqCst))
    }
}

#[test]
// rows: peers/flush-in-the-hook-under-the-heap-lock
fn a_handler_that_unmaps_watched_memory_is_rescued_and_nothing_is_lost() {
    isolated(|| {
        let space = Space::get(Duration::from_millis(20)).unwrap();
        let (own, theirs) = (Region::new(Backing::Anonymous, 2).unwrap(), Region::new(Backing::Anonymous, 2).unwrap());
        let (own_range, range): (HostRange, HostRange) = (own.range(), theirs.range());
        let foolish =
            Arc::new(Foolish { region: Mutex::new(None), told: AtomicBool::new(false), shards: AtomicU16::new(0) });
        // Watched by the space, so that unmapping it from the handler waits for the handler.
        let bystander =
            Arc::new(Foolish { region: Mutex::new(None), told: AtomicBool::new(false), shards: AtomicU16::new(0) });
        space.insert(own_range, 1, bystander.clone());
        space.insert(range, 2, foolish.clone());
        let watched = space.watch(own_range).unwrap();
        bystander.shards.store(watched.shards.0, Ordering::SeqCst);
        let watched = space.watch(range).unwrap();
        foolish.shards.store(watched.shards.0, Ordering::SeqCst);
        *foolish.region.lock().unwrap() = Some(own);

        theirs.unmap_all().unwrap(); // the mutator itself is freed by the monitor's read, before the handler is called
        let deadline = Instant::now() + PATIENCE;
        assert!(space.wait_open(Shards::ALL, deadline), "the gates open again");
        assert!(foolish.told.load(Ordering::SeqCst), "who looks through an open gate finds the target told");
        assert!(bystander.told.load(Ordering::SeqCst), "what the watchdog read is told, too");
        assert!(space.stats().rescues >= 1);
        // And the monitor works as before.
        let again = Region::new(Backing::Anonymous, 2).unwrap();
        space.insert(again.range(), 3, foolish.clone());
        let watched = space.watch(again.range()).unwrap();
        foolish.shards.store(watched.shards.0, Ordering::SeqCst);
        foolish.told.store(false, Ordering::SeqCst);
        again.unmap_all().unwrap();
        assert!(space.wait_open(watched.shards, Instant::now() + PATIENCE));
        assert!(foolish.told.load(Ordering::SeqCst));
    })
    .expect_return();
}
