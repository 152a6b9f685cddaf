//! Ten thousand objects: registered, acquired, taken back by one call, and gone without a trace.

#[macro_use]
mod userptr;

use pinfold_core::{Access, Device, Manager, State};
use pinfold_tests::PATIENCE;
use pinfold_tests::dma::DmaDevice;
use pinfold_tests::fake::FakeDevice;
use pinfold_tests::leaks::Holdings;
use pinfold_tests::memory::{Backing, Region};
use pinfold_tests::process::isolated;
use pinfold_tests::skip;

use userptr::{patient, space, wait_until};

const OBJECTS: usize = 10_000;

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
    body();
    let before = Holdings::now();
    body();
    let after = Holdings::now();
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
