//! Copies: current at every acquire for the price of what was written, and what the device writes comes back where it was declared.

#[path = "fixture/mod.rs"]
mod fixture;
#[path = "fixture/memory.rs"]
mod memory;
#[path = "fixture/mirrored.rs"]
mod mirrored;

use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::thread;

use ash::vk;
use fixture::{Fixture, GENEROUS};
use memory::{Memory, memfd};
use mirrored::{can_track, manager, register};
use pinfold_invalidate::{HostRange, page_size};
use pinfold_vulkan::{
    Access, Config, Coverage, Force, Manager, MirrorPlace, MirrorReason, Outcome, Path, Policy, SetupError, Timeline,
    Uploads,
};

fn mirrors(place: MirrorPlace, fixture: &Fixture) -> Config {
    let mut config = Config::default();
    (config.force, config.mirrors) = (Some(Force::Mirror), place);
    let (device, queue) = (fixture.device.clone(), Arc::new(Mutex::new(fixture.queue)));
    let submit = move |work: &[vk::SubmitInfo<'_>], fence| {
        let queue = queue.lock().unwrap();
        // SAFETY: a test uses its fixture's queue on one thread, which doesn't while it acquires.
        unsafe { device.queue_submit(*queue, work, fence) }
    };
    // SAFETY: the fixture's only queue is of family 0; see above.
    config.uploads = Some(unsafe { Uploads::new([0], submit) });
    config
}

const PLACES: [MirrorPlace; 2] = [MirrorPlace::HostVisible, MirrorPlace::DeviceLocal];

#[test]
fn a_refresh_copies_what_was_written_and_no_more_wherever_the_mirror_is() {
    let Some(fixture) = Fixture::new() else { return };
    let pages = 300;
    for place in PLACES {
        let manager = manager(&fixture, mirrors(place, &fixture));
        let memory = Memory::anonymous(pages);
        memory.fill();
        let object = register(&manager, memory.range(), Access::Read);
        let current = |expected: &[u8]| {
            let lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
            assert_eq!(lease.view(0).path, Path::Mirror(MirrorReason::Forced));
            assert!(fixture.read(&lease.view(0), 0, lease.view(0).size) == expected, "{place:?}");
        };
        current(&memory.bytes());
        let tracked = can_track(&object);
        let mut seed = 9_u64;
        let mut below = |end: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as usize % end
        };
        current(&memory.bytes());
        for round in 0..12 {
            let before = manager.device().copied_bytes();
            let mut written: Vec<_> = (0..below(40)).map(|_| below(pages)).collect();
            for &page in &written {
                memory.write(page * page_size() + below(page_size()), below(256) as u8);
            }
            current(&memory.bytes());
            written.sort_unstable();
            written.dedup();
            let copied = manager.device().copied_bytes() - before;
            if tracked {
                assert_eq!(copied, (written.len() * page_size()) as u64, "round {round}");
            }
        }
        drop(object);
    }
}

#[test]
fn a_discarded_huge_page_is_zeros_in_its_mirror() {
    let Some(fixture) = Fixture::new() else { return };
    let manager = manager(&fixture, mirrors(MirrorPlace::HostVisible, &fixture));
    let huge = 2 << 20;
    let memory = Memory::anonymous(3 * huge / page_size());
    let start = memory.range().start().next_multiple_of(huge);
    let at = std::ptr::with_exposed_provenance_mut::<std::ffi::c_void>(start);
    // SAFETY: inside the test's own mapping. Where there are no huge pages, small ones are discarded.
    let _ = unsafe { libc::madvise(at, huge, libc::MADV_HUGEPAGE) };
    memory.fill();
    let object = register(&manager, memory.range(), Access::Read);
    for round in 0..3 {
        memory.write(start - memory.range().start() + round, 77);
        for _ in 0..2 {
            let lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
            assert!(fixture.read(&lease.view(0), 0, lease.view(0).size) == memory.bytes(), "round {round}");
        }
        if object.coverage() != Some(Coverage::Watched) {
            println!("skipped: the discard, which nobody is told of ({:?})", object.coverage());
            break;
        }
        // SAFETY: as above; nobody relies on the bytes.
        assert_eq!(unsafe { libc::madvise(at, huge, libc::MADV_DONTNEED) }, 0);
        let lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
        assert!(fixture.read(&lease.view(0), 0, lease.view(0).size) == memory.bytes(), "round {round}, discarded");
    }
    drop(object);
}

#[test]
fn a_mirror_larger_than_the_staging_buffer_is_filled_in_several_goes() {
    let Some(fixture) = Fixture::new() else { return };
    let manager = manager(&fixture, mirrors(MirrorPlace::DeviceLocal, &fixture));
    let pages = (20 << 20) / page_size() + 1;
    let memory = Memory::anonymous(pages);
    let byte = |page: usize, round: usize| (page * 7 + page / 251 + round) as u8;
    let object = register(&manager, memory.range(), Access::Read);
    for round in 0..2 {
        (0..pages).for_each(|page| memory.write(page * page_size() + 9, byte(page, round)));
        let lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
        let seen = fixture.read(&lease.view(0), 0, lease.view(0).size);
        let wrong = (0..pages).find(|page| seen[page * page_size() + 9] != byte(*page, round));
        assert_eq!(wrong, None, "round {round}");
    }
    drop(object);
}

#[test]
fn the_mirror_of_shared_memory_copies_all_unless_nobody_writes_in_another_way() {
    let Some(fixture) = Fixture::new() else { return };
    let pages = 50;
    for sole_writer in [false, true] {
        let mut config = mirrors(MirrorPlace::HostVisible, &fixture);
        config.sole_writer = sole_writer;
        let (manager, file) = (manager(&fixture, config), memfd(pages));
        let (memory, other) = (Memory::of_file(&file, pages, true), Memory::of_file(&file, pages, true));
        memory.fill();
        let object = register(&manager, memory.range(), Access::Read);
        for _ in 0..2 {
            drop(manager.acquire_timeout(&[&object], GENEROUS).unwrap());
        }
        let tracked = can_track(&object);
        for round in 0..4 {
            let before = manager.device().copied_bytes();
            // The tracking doesn't see the second of these, and so isn't relied upon.
            memory.write(round * page_size(), 201);
            if !sole_writer {
                other.write((20 + round) * page_size(), 202);
            }
            let lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
            assert!(fixture.read(&lease.view(0), 0, lease.view(0).size) == memory.bytes(), "round {round}");
            let copied = manager.device().copied_bytes() - before;
            if !sole_writer {
                assert_eq!(copied, memory.range().len() as u64);
            } else if tracked {
                assert_eq!(copied, page_size() as u64);
            }
        }
        drop(object);
    }
}

#[test]
fn mirrors_of_two_managers_over_the_same_bytes_both_see_every_write() {
    let (Some(one), Some(two)) = (Fixture::new(), Fixture::new()) else { return };
    let memory = Memory::anonymous(40);
    memory.fill();
    let part = HostRange::new(memory.range().start() + 10 * page_size(), 20 * page_size()).unwrap();
    let managers = [manager(&one, mirrors(PLACES[0], &one)), manager(&two, mirrors(PLACES[1], &two))];
    let objects = [
        (0, register(&managers[0], memory.range(), Access::Read)),
        (0, register(&managers[0], part, Access::Read)),
        (1, register(&managers[1], part, Access::Read)),
    ];
    for round in 0..30 {
        memory.write((round * 7 % 40) * page_size() + round, 200);
        // Each is asked in its turn, so that the others have to be told of what it took.
        let (which, object) = &objects[round * 2 % 3];
        let lease = managers[*which].acquire_timeout(&[object], GENEROUS).unwrap();
        let first = object.range().start() - memory.range().start();
        let fixture = [&one, &two][*which];
        assert!(fixture.read(&lease.view(0), 0, lease.view(0).size) == memory.bytes()[first..][..object.range().len()]);
    }
    drop(objects);
}

#[test]
fn what_the_device_writes_comes_back_where_it_was_declared() {
    let Some(fixture) = Fixture::new() else { return };
    let manager = manager(&fixture, mirrors(MirrorPlace::DeviceLocal, &fixture));
    for memory in [Memory::anonymous(8), Memory::of_file(&memfd(8), 8, true)] {
        memory.fill();
        let object = register(&manager, memory.range(), Access::ReadWrite);
        let (mut expected, done) = (memory.bytes(), fixture.timeline());
        let mut lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
        lease.declare_written(0, 100..5000);
        lease.declare_written(0, 20_000..20_004);
        let (buffer, size) = (lease.view(0).buffer, lease.view(0).size);
        let commands = fixture.record(|commands| fixture.fill(commands, (buffer, 0), size, 0x0101_0101));
        let submit = || {
            fixture.submit(&[commands], None, Some((done, 1)));
            Ok::<_, Infallible>(())
        };
        // SAFETY: `done` is signalled by the fill, which writes the object through its view.
        let pending = unsafe { lease.submit([Timeline { semaphore: done, value: 1 }], submit) }.unwrap();
        assert_eq!(pending.wait(GENEROUS), Some(Outcome::Done));
        assert!(pending.fault().is_none());
        expected[100..5000].fill(1);
        expected[20_000..20_004].fill(1);
        assert!(memory.bytes() == expected, "only what was declared, and all of it");
        drop(object);
        fixture.destroy_semaphore(done);
    }
}

#[test]
fn what_was_declared_of_an_object_stays_its_own_when_leases_are_merged() {
    let Some(fixture) = Fixture::new() else { return };
    let manager = manager(&fixture, mirrors(MirrorPlace::DeviceLocal, &fixture));
    let memories = [4, 5, 6].map(Memory::anonymous);
    memories.iter().for_each(Memory::fill);
    let objects = memories.each_ref().map(|memory| register(&manager, memory.range(), Access::ReadWrite));
    let (mut expected, done) = (memories.each_ref().map(Memory::bytes), fixture.timeline());
    let mut lease = manager.acquire_timeout(&[&objects[0]], GENEROUS).unwrap();
    let mut other = manager.acquire_timeout(&[&objects[1], &objects[2]], GENEROUS).unwrap();
    // Not in the order of the objects, and one of them in two goes.
    other.declare_written(1, 8..16);
    other.declare_written(0, 0..4);
    lease.merge(other);
    lease.declare_written(2, 5000..5004);
    let views = [0, 1, 2].map(|index| (lease.view(index).buffer, lease.view(index).size));
    let fill =
        |commands| views.iter().for_each(|&(buffer, size)| fixture.fill(commands, (buffer, 0), size, 0x0101_0101));
    let commands = fixture.record(fill);
    let submit = || {
        fixture.submit(&[commands], None, Some((done, 1)));
        Ok::<_, Infallible>(())
    };
    // SAFETY: `done` is signalled by the fills, which write the objects through their views.
    let pending = unsafe { lease.submit([Timeline { semaphore: done, value: 1 }], submit) }.unwrap();
    assert_eq!(pending.wait(GENEROUS), Some(Outcome::Done));
    expected[1][..4].fill(1);
    expected[2][8..16].fill(1);
    expected[2][5000..5004].fill(1);
    assert!(memories.each_ref().map(Memory::bytes) == expected, "each its own, and nothing of the first");
    drop(objects);
    fixture.destroy_semaphore(done);
}

#[test]
fn an_acquire_while_the_device_writes_neither_overwrites_its_results_nor_loses_the_programs() {
    let Some(fixture) = Fixture::new() else { return };
    let manager = manager(&fixture, mirrors(MirrorPlace::HostVisible, &fixture));
    let memory = Memory::anonymous(4);
    let object = register(&manager, memory.range(), Access::ReadWrite);
    let (go, done, filled) = (fixture.timeline(), fixture.timeline(), fixture.timeline());
    let mut lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
    lease.declare_written(0, 64..128);
    let view = lease.view(0);
    let (buffer, size) = (view.buffer, view.size);
    // Its result is written at once, and the work goes on until `go`.
    let first = fixture.record(|commands| fixture.fill(commands, (buffer, 64), 64, 0x0202_0202));
    let submit = || {
        fixture.submit(&[first], None, Some((filled, 1)));
        fixture.submit(&[], Some((go, 1)), Some((done, 1)));
        Ok::<_, Infallible>(())
    };
    // SAFETY: `done` is signalled behind the fill on the same queue, which writes the object through its view.
    let pending = unsafe { lease.submit([Timeline { semaphore: done, value: 1 }], submit) }.unwrap();
    fixture.wait(filled, 1);
    // In the very page that the device has written.
    memory.write(8, 3);
    let again = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
    fixture.signal(go, 1);
    assert_eq!(pending.wait(GENEROUS), Some(Outcome::Done));
    let mut expected = vec![0; memory.range().len()];
    expected[64..128].fill(2);
    expected[8] = 3;
    assert!(memory.bytes() == expected);
    assert!(fixture.read(&again.view(0), 0, size) == expected);
    drop((again, object, manager));
    fixture.destroy_semaphore(go);
    fixture.destroy_semaphore(filled);
    fixture.destroy_semaphore(done);
}

#[test]
fn results_for_memory_that_changed_hands_are_reported_and_never_written_over_what_is_there_now() {
    let Some(fixture) = Fixture::new() else { return };
    let mut config = mirrors(MirrorPlace::HostVisible, &fixture);
    config.deadline = GENEROUS;
    let manager = manager(&fixture, config);
    let memory = Memory::anonymous(4);
    memory.fill();
    let object = register(&manager, memory.range(), Access::ReadWrite);
    let (go, done) = (fixture.timeline(), fixture.timeline());
    let mut lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
    lease.declare_written(0, 0..memory.range().len());
    let (buffer, size) = (lease.view(0).buffer, lease.view(0).size);
    let commands = fixture.record(|commands| fixture.fill(commands, (buffer, 0), size, 0x0303_0303));
    let submit = || {
        fixture.submit(&[commands], Some((go, 1)), Some((done, 1)));
        Ok::<_, Infallible>(())
    };
    // SAFETY: `done` is signalled by the fill, which writes the object through its view.
    let pending = unsafe { lease.submit([Timeline { semaphore: done, value: 1 }], submit) }.unwrap();
    if object.coverage() == Some(Coverage::Watched) {
        thread::scope(|scope| {
            // Held until the results are where they belong, or are known to be lost.
            let replacing = scope.spawn(|| memory.replace_tail(&memfd(4), 4));
            let new = || pinfold_invalidate::mappings(memory.range()).is_ok_and(|there| there[0].file.is_some());
            while !new() {
                thread::yield_now();
            }
            fixture.signal(go, 1);
            replacing.join().unwrap();
        });
        assert_eq!(pending.wait(GENEROUS), Some(Outcome::Done));
        assert_eq!(pending.fault().map(|fault| fault.errno()), Some(libc::EFAULT));
        assert!(memory.bytes().iter().all(|&byte| byte == 0), "the new mapping is untouched");
    } else {
        println!("skipped: the replaced mapping, as this system can't watch memory ({:?})", object.coverage());
        fixture.signal(go, 1);
        assert_eq!(pending.wait(GENEROUS), Some(Outcome::Done));
    }
    drop((object, manager));
    fixture.destroy_semaphore(go);
    fixture.destroy_semaphore(done);
}

#[test]
fn an_object_changes_its_way_and_stays_right() {
    let Some(fixture) = Fixture::new() else { return };
    let mut config = mirrors(MirrorPlace::HostVisible, &fixture);
    config.force = None;
    let manager = manager(&fixture, config);
    let memory = Memory::anonymous(16);
    memory.fill();
    let object = register(&manager, memory.range(), Access::Read);
    for (round, policy) in
        [Policy::Auto, Policy::Mirror, Policy::Import, Policy::Mirror, Policy::Auto].iter().enumerate()
    {
        object.set_policy(*policy).unwrap();
        for _ in 0..3 {
            memory.write(round * page_size() + 5, 100);
            let lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
            match (policy, lease.view(0).path) {
                (Policy::Mirror, Path::Mirror(MirrorReason::Asked))
                | (Policy::Import, Path::Import)
                | (Policy::Auto, _) => {}
                other => panic!("{other:?}"),
            }
            assert!(fixture.read(&lease.view(0), 0, lease.view(0).size) == memory.bytes());
        }
    }
    drop(object);
}

#[test]
fn mirrors_in_device_memory_need_a_queue() {
    let Some(fixture) = Fixture::new() else { return };
    let mut config = Config::default();
    config.mirrors = MirrorPlace::DeviceLocal;
    // SAFETY: the fixture's handles belong together, and nothing is made.
    let refused = unsafe { Manager::new(fixture.context(), config) };
    assert!(matches!(refused, Err(SetupError::NoUploads)));
}

#[test]
fn a_submit_ends_with_a_fence_or_with_all_of_several_signals() {
    let Some(fixture) = Fixture::new() else { return };
    let manager = manager(&fixture, Config::default());
    let memory = Memory::anonymous(2);
    memory.fill();
    let object = register(&manager, memory.range(), Access::Read);
    // SAFETY: the device is live.
    let fence = unsafe { fixture.device.create_fence(&vk::FenceCreateInfo::default(), None) }.unwrap();
    let (go, other) = (fixture.timeline(), fixture.timeline());
    for frame in 1..=20 {
        let lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
        let submit = || {
            fixture.submit_fenced(&[], Some((go, frame)), fence);
            Ok::<_, Infallible>(())
        };
        let signals: [pinfold_vulkan::Signal; 2] = [fence.into(), Timeline { semaphore: other, value: frame }.into()];
        // SAFETY: no work accesses the object.
        let pending = unsafe { lease.submit(signals, submit) }.unwrap();
        assert_eq!(pending.poll(), None);
        fixture.signal(go, frame);
        assert_eq!(pending.poll(), None, "the second signal is still out");
        fixture.signal(other, frame);
        assert_eq!(pending.wait(GENEROUS), Some(Outcome::Done));
        // SAFETY: the submit is over.
        unsafe { fixture.device.reset_fences(&[fence]) }.unwrap();
    }
    drop((object, manager));
    // SAFETY: nobody waits for it any more.
    unsafe { fixture.device.destroy_fence(fence, None) };
    fixture.destroy_semaphore(go);
    fixture.destroy_semaphore(other);
}
