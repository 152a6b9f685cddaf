//! The main promise, on the scripted device: a mutator of memory in use is held until the use is over, and finds the object invalid.

use std::thread;
use std::time::Duration;

use pinfold_core::{Access, Config, Coverage, Error, Manager, Outcome, State};
use pinfold_tests::PATIENCE;
use pinfold_tests::fake::{Answer, Call, FakeDevice};
use pinfold_tests::fence::Fence;
use pinfold_tests::fire_door::FireDoorAllocator;
use pinfold_tests::memory::{Backing, Region};
use pinfold_tests::process::isolated;

#[global_allocator]
static ALLOCATOR: FireDoorAllocator = FireDoorAllocator;

fn patient() -> Config {
    let mut config = Config::default();
    config.deadline = Duration::from_secs(10);
    config
}

#[test]
fn a_mutator_is_held_until_the_work_is_over_and_finds_the_object_invalid() {
    // By a closure: that is how a child knows which test is its own.
    #[allow(clippy::redundant_closure)]
    isolated(|| hold_and_find_invalid()).expect_return();
}

fn hold_and_find_invalid() {
    let device = FakeDevice::new();
    let manager = Manager::new(device.clone(), patient()).unwrap();
    for backing in Backing::ALL.into_iter().filter(|backing| backing.watchable()) {
        let region = Region::new(backing, 4).unwrap();
        // SAFETY: no reference points into a region.
        let object = unsafe { manager.register(region.range(), Access::Read) }.unwrap();
        let lease = manager.acquire_timeout(&[&object], PATIENCE).unwrap();
        assert_eq!(object.coverage(), Some(Coverage::Watched), "{backing:?}");
        let fence = Fence::new();
        // SAFETY: the fence is signalled below; nothing is accessed.
        let pending = unsafe { lease.submit([fence.clone()], || Ok::<_, Error>(())) }.unwrap();
        let generation = object.generation().unwrap();
        thread::scope(|scope| {
            let mutator = scope.spawn(|| {
                region.unmap_all().unwrap();
                // Whoever has returned from munmap finds the work over and the object invalid.
                assert_eq!(fence.outcome(), Some(Outcome::Done), "{backing:?}");
                assert_eq!(object.state().unwrap(), State::Invalid, "{backing:?}");
                assert_ne!(object.generation().unwrap(), generation);
            });
            // The gate closes when the mutator has begun: then, and only then, is it held.
            while manager.stats().space.events == 0 && !mutator.is_finished() && fence.outcome().is_none() {
                if object.in_flight() == 1 && pinfold_tests::memory::peek(region.range().start(), 1).is_err() {
                    fence.signal(Outcome::Done);
                }
                thread::yield_now();
            }
            fence.signal(Outcome::Done);
        });
        assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
        assert!(manager.acquire_timeout(&[&object], PATIENCE).unwrap_err().errno() == libc::EFAULT);
    }
    assert_eq!(manager.stats().late, 0);
    drop(manager);
    assert_eq!(device.counts().dropped, 0);
    assert_eq!(device.live_imports(), 0);
}

#[test]
fn a_builder_that_was_overtaken_leaves_the_next_ones_work_alone() {
    // Alone: an acquisition on the caller's thread doesn't wait for a gate that another test's mutation has closed.
    #[allow(clippy::redundant_closure)]
    isolated(|| overtake_a_builder()).expect_return();
}

fn overtake_a_builder() {
    for cancel in [false, true] {
        let device = FakeDevice::new();
        let manager = Manager::new(device.clone(), patient()).unwrap();
        let region = Region::untouched(Backing::Anonymous, 4).unwrap();
        // SAFETY: no reference points into a region.
        let object = unsafe { manager.register(region.range(), Access::Read) }.unwrap();
        device.script(Call::Import, &[Answer::Hold]);
        // Not resident: a worker takes the pages, and is kept in the device's import.
        assert!(manager.acquire(&[&object]).unwrap_err().is_again());
        device.wait_held(1);
        if cancel {
            assert!(object.cancel());
            assert!(matches!(manager.acquire(&[&object]), Err(Error::Cancelled)));
        } else {
            manager.invalidate(region.range()).unwrap();
        }
        // Resident by now: taken here, while the worker is still at it.
        let lease = manager.acquire(&[&object]).unwrap();
        let id = lease.view(0).id;
        device.let_go();
        while device.counts().imported < 2 || device.live_imports() > 1 {
            thread::yield_now(); // until the worker has thrown away what it took
        }
        assert!(device.is_live(id));
        assert_eq!(object.state().unwrap(), State::Valid);
        assert_eq!(manager.acquire(&[&object]).unwrap().view(0).id, id);
        drop(lease);
        drop(manager);
        device.wait_no_imports();
        assert_eq!(device.counts().dropped, 0);
    }
}
