//! Copies in memory that the host doesn't see, filled in the engine's own order: recorded into its work, or ahead of work that waits for them.

#[path = "fixture/mod.rs"]
mod fixture;
#[path = "fixture/memory.rs"]
mod memory;
#[path = "fixture/mirrored.rs"]
mod mirrored;

use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use ash::vk;
use fixture::{Fixture, GENEROUS, Readback};
use memory::Memory;
use mirrored::{can_track, manager, register};
use pinfold_invalidate::page_size;
use pinfold_vulkan::{
    Access, Config, Force, Lease, Manager, MirrorPlace, Outcome, SubmitError, Timeline, Uploads, Userptr,
};

fn recorded() -> Config {
    let mut config = Config::default();
    (config.force, config.mirrors) = (Some(Force::Mirror), MirrorPlace::DeviceLocal);
    // SAFETY: the fixture's only queue is of family 0.
    config.uploads = Some(unsafe { Uploads::recorded([0]) });
    config
}

/// Work that records the uploads of its lease and then copies the lease's only object to where the test sees it.
struct Reader<'a> {
    fixture: &'a Fixture,
    lease: Lease,
    back: Readback<'a>,
    commands: vk::CommandBuffer,
}

impl<'a> Reader<'a> {
    fn record(fixture: &'a Fixture, manager: &Manager, object: &Userptr) -> Self {
        let mut lease = manager.acquire_timeout(&[object], GENEROUS).unwrap();
        let (buffer, size) = (lease.view(0).buffer, lease.view(0).size);
        let back = Readback::new(fixture, size);
        let commands = fixture.record(|commands| {
            // SAFETY: being recorded, and submitted with this lease if at all.
            unsafe { lease.record_uploads(commands) };
            fixture.copy(commands, (buffer, 0), (back.buffer, 0), size);
        });
        Self { fixture, lease, back, commands }
    }

    fn submit(self) -> Vec<u8> {
        let (fixture, commands, done) = (self.fixture, self.commands, self.fixture.timeline());
        let submit = || {
            fixture.submit(&[commands], None, Some((done, 1)));
            Ok::<_, Infallible>(())
        };
        // SAFETY: `done` is signalled behind the copy, which reads the object through its view.
        let pending = unsafe { self.lease.submit([Timeline { semaphore: done, value: 1 }], submit) }.unwrap();
        assert_eq!(pending.wait(GENEROUS), Some(Outcome::Done));
        fixture.destroy_semaphore(done);
        self.back.bytes()
    }
}

#[test]
fn work_that_records_its_uploads_sees_every_write_whatever_became_of_other_leases() {
    let Some(fixture) = Fixture::new() else { return };
    let manager = manager(&fixture, recorded());
    let pages = 60;
    let memory = Memory::anonymous(pages);
    memory.fill();
    let object = register(&manager, memory.range(), Access::Read);
    let mut seed = 21_u64;
    let mut below = |end: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % end
    };
    for round in 0..60 {
        let mut write = || {
            (0..below(5)).for_each(|_| memory.write(below(pages * page_size()), below(256) as u8));
            memory.bytes()
        };
        write();
        match round % 6 {
            0 => drop(manager.acquire_timeout(&[&object], GENEROUS).unwrap()), // records nothing
            1 => drop(Reader::record(&fixture, &manager, &object)),            // submits nothing
            2 => {
                let reader = Reader::record(&fixture, &manager, &object);
                // SAFETY: nothing is submitted.
                let refused = unsafe { reader.lease.submit::<()>([] as [Timeline; 0], || Err(())) };
                assert!(matches!(refused, Err(SubmitError::Rejected { .. })));
            }
            3 => {
                // Overtaken by a lease that was taken later.
                let early = Reader::record(&fixture, &manager, &object);
                let expected = write();
                assert!(Reader::record(&fixture, &manager, &object).submit() == expected, "round {round}");
                assert!(early.submit() == expected, "round {round}: it is no older than what it was recorded with");
            }
            4 => {
                // What is staged between the recording and the submit stays for the next.
                let early = Reader::record(&fixture, &manager, &object);
                write();
                drop(manager.acquire_timeout(&[&object], GENEROUS).unwrap());
                early.submit();
            }
            _ => {}
        }
        let expected = write();
        assert!(Reader::record(&fixture, &manager, &object).submit() == expected, "round {round}");
    }
    drop(object);
}

#[test]
fn what_was_recorded_and_submitted_is_not_recorded_again() {
    let Some(fixture) = Fixture::new() else { return };
    let manager = manager(&fixture, recorded());
    let memory = Memory::anonymous(20);
    memory.fill();
    let object = register(&manager, memory.range(), Access::Read);
    for _ in 0..2 {
        assert!(Reader::record(&fixture, &manager, &object).submit() == memory.bytes());
    }
    if can_track(&object) {
        let lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
        // What no engine does: another byte in the copy, which only an upload would replace.
        fixture.run(|commands| fixture.fill(commands, (lease.view(0).buffer, 0), lease.view(0).size, 0x0707_0707));
        memory.write(3 * page_size() + 1, 200);
        let mut expected = vec![7; memory.range().len()];
        let page = 3 * page_size()..4 * page_size();
        expected[page.clone()].copy_from_slice(&memory.bytes()[page]);
        assert!(Reader::record(&fixture, &manager, &object).submit() == expected);
        drop(lease);
    }
    drop(object);
}

#[test]
fn acquires_dont_wait_for_ordered_uploads_and_work_that_does_sees_them() {
    let Some(fixture) = Fixture::new() else { return };
    let (go, mut config) = (fixture.timeline(), recorded());
    let (device, queue) = (fixture.device.clone(), Arc::new(Mutex::new(fixture.queue)));
    let submit = move |work: &[vk::SubmitInfo<'_>], fence| {
        let (queue, semaphores, values) = (queue.lock().unwrap(), [go], [1]);
        let mut timeline = vk::TimelineSemaphoreSubmitInfo::default().wait_semaphore_values(&values);
        let held = vk::SubmitInfo::default()
            .wait_semaphores(&semaphores)
            .wait_dst_stage_mask(&[vk::PipelineStageFlags::ALL_COMMANDS])
            .push_next(&mut timeline);
        // SAFETY: a test uses its fixture's queue on one thread, which doesn't while it acquires.
        unsafe { device.queue_submit(*queue, &[held], vk::Fence::null()) }?;
        // SAFETY: as above.
        unsafe { device.queue_submit(*queue, work, fence) }
    };
    // SAFETY: the fixture's only queue is of family 0; see above.
    config.uploads = Some(unsafe { Uploads::new([0], submit) }.ordered());
    let manager = manager(&fixture, config);
    // The second takes more than can be under way.
    for (pages, held) in [(20, true), ((20 << 20) / page_size(), false)] {
        let memory = Memory::anonymous(pages);
        memory.fill();
        let object = register(&manager, memory.range(), Access::Read);
        for round in 0..3 {
            memory.write(round * page_size() + round, 90);
            let lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
            let (buffer, size, uploaded) =
                (lease.view(0).buffer, lease.view(0).size, lease.view(0).uploaded().unwrap());
            if held && round == 0 {
                assert!(
                    fixture.value(uploaded.semaphore) < uploaded.value,
                    "the queue is held up, and nobody has waited"
                );
            }
            let (back, done) = (Readback::new(&fixture, size), fixture.timeline());
            let commands = fixture.record(|commands| fixture.copy(commands, (buffer, 0), (back.buffer, 0), size));
            let submit = || {
                fixture.submit(&[commands], Some((uploaded.semaphore, uploaded.value)), Some((done, 1)));
                Ok::<_, Infallible>(())
            };
            // SAFETY: `done` is signalled behind the copy, which reads the object through its view.
            let pending = unsafe { lease.submit([Timeline { semaphore: done, value: 1 }], submit) }.unwrap();
            if held && round == 0 {
                fixture.signal(go, 1);
            }
            assert_eq!(pending.wait(GENEROUS), Some(Outcome::Done));
            assert!(back.bytes() == memory.bytes(), "{pages} pages, round {round}");
            fixture.destroy_semaphore(done);
        }
        drop(object);
    }
    drop(manager);
    fixture.destroy_semaphore(go);
}
