//! The whole of it on a real driver: register, acquire, submit, and what `munmap` does meanwhile.

#[path = "fixture/mod.rs"]
mod fixture;
#[path = "fixture/memory.rs"]
mod memory;

use std::convert::Infallible;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use ash::vk;
use fixture::{Fixture, GENEROUS, Readback};
use memory::{Memory, memfd};
use pinfold_invalidate::mappings;
use pinfold_vulkan::{Access, Config, Coverage, Force, Manager, MirrorReason, Outcome, Path, State, Timeline, Userptr};

fn manager(fixture: &Fixture, config: Config) -> Manager {
    // SAFETY: the fixture's handles belong together, and tests drop the manager and its leases first.
    unsafe { Manager::new(fixture.context(), config) }.expect("a manager")
}

fn register(manager: &Manager, memory: &Memory, access: Access) -> Userptr {
    // SAFETY: tests unmap memory in use only where that is what they are about; no references to it exist.
    unsafe { manager.register_labelled(memory.range(), access, "weights") }.unwrap()
}

#[test]
fn an_object_is_read_by_the_device_where_it_is() {
    let Some(fixture) = Fixture::new() else { return };
    let manager = manager(&fixture, Config::default());
    for (memory, path) in
        [(Memory::anonymous(8), Path::Import), (Memory::of_file(&memfd(8), 8, true), Path::AliasImport)]
    {
        memory.fill();
        let object = register(&manager, &memory, Access::Read);
        let lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
        assert_eq!(lease.view(0).path, path);
        assert_eq!(fixture.read(&lease.view(0), 0, lease.view(0).size), memory.bytes());
    }
}

#[test]
fn munmap_returns_only_after_the_work_is_over_and_the_object_is_invalid_then() {
    let Some(fixture) = Fixture::new() else { return };
    let mut config = Config::default();
    config.deadline = Duration::from_secs(10); // the work ends when the test says so, not when the time is over
    let manager = manager(&fixture, config);
    let memory = Memory::of_file(&memfd(256), 256, true);
    memory.fill();
    let (range, expected) = (memory.range(), memory.bytes());
    let object = register(&manager, &memory, Access::Read);
    let (back, go, done) = (Readback::new(&fixture, expected.len() as u64), fixture.timeline(), fixture.timeline());

    let lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
    let view = lease.view(0);
    // Enough of them that the work is still running when `munmap` would return if nobody held it off.
    let commands = fixture.record(|commands| {
        (0..200).for_each(|_| fixture.copy(commands, (view.buffer, view.offset), (back.buffer, 0), view.size));
    });
    let submit = || {
        fixture.submit(&[commands], Some((go, 1)), Some((done, 1)));
        Ok::<_, Infallible>(())
    };
    // SAFETY: `done` is signalled by the copies, which read the object through its view.
    let pending = unsafe { lease.submit([Timeline { semaphore: done, value: 1 }], submit) }.unwrap();
    if object.coverage() == Some(Coverage::Watched) {
        thread::scope(|scope| {
            let (fixture, object) = (&fixture, &object);
            let unmapping = scope.spawn(move || {
                drop(memory);
                assert_eq!(fixture.value(done), 1, "munmap returned while the device worked");
                assert_eq!(object.state().unwrap(), State::Invalid);
            });
            // The kernel takes the mapping away before it waits.
            let deadline = Instant::now() + GENEROUS;
            while mappings(range).is_ok_and(|there| there[0].file.is_some()) {
                assert!(Instant::now() < deadline, "munmap begins");
                thread::yield_now();
            }
            fixture.signal(go, 1);
            unmapping.join().unwrap();
        });
        assert_eq!(manager.stats().late, 0);
    } else {
        println!("skipped: the hold-off, as this system can't watch shared memory ({:?})", object.coverage());
        fixture.signal(go, 1);
    }
    assert_eq!(pending.wait(GENEROUS), Some(Outcome::Done));
    assert_eq!(back.bytes(), expected);
    drop((object, manager));
    fixture.destroy_semaphore(go);
    fixture.destroy_semaphore(done);
}

/// A queue more than the drivers for tests have. It does what a queue does: waits for what its work waits for, then has it done.
struct ExtraQueue<'a, 'f> {
    fixture: &'f Fixture,
    /// The driver's queue, which does the work.
    real: &'a Mutex<()>,
}

impl ExtraQueue<'_, '_> {
    fn run(&self, commands: &[vk::CommandBuffer], wait: (vk::Semaphore, u64), signal: (vk::Semaphore, u64)) {
        self.fixture.wait(wait.0, wait.1);
        let _turn = self.real.lock().unwrap();
        self.fixture.submit(commands, None, Some(signal));
    }
}

/// Each queue has a timeline of the engine's. What is submitted first waits for what is submitted after it, on the other queue.
#[test]
fn work_of_two_queues_that_waits_before_the_signal_is_submitted_holds_munmap_until_both_are_over() {
    const LAST: u64 = 10;
    let Some(fixture) = Fixture::new() else { return };
    // SAFETY: the device is live.
    let families = unsafe { fixture.instance.get_physical_device_queue_family_properties(fixture.physical) };
    println!(
        "{}: {} queues, of {} families",
        fixture.driver,
        families.iter().map(|family| family.queue_count).sum::<u32>(),
        families.len()
    );
    let mut config = Config::default();
    config.deadline = GENEROUS; // the work ends when the test says so
    let manager = manager(&fixture, config);
    let memory = Memory::of_file(&memfd(16), 16, true);
    memory.fill();
    let (range, expected) = (memory.range(), memory.bytes());
    let mut memory = Some(memory);
    let object = register(&manager, memory.as_ref().unwrap(), Access::Read);
    let [go, graphics, compute] = [(); 3].map(|()| fixture.timeline());
    let backs = [(); 2].map(|()| Readback::new(&fixture, expected.len() as u64));
    let real = Mutex::new(());
    for frame in 1..=LAST {
        thread::scope(|scope| {
            let waits = [(compute, frame), (go, frame)];
            let pending = [0, 1].map(|at| {
                let lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
                let (view, back, signal) = (lease.view(0), &backs[at], ([graphics, compute][at], frame));
                let from = (view.buffer, view.offset);
                let commands = fixture
                    .record(|commands| fixture.copy(commands, from, (back.buffer, 0), back.bytes().len() as u64));
                let (queue, wait) = (ExtraQueue { fixture: &fixture, real: &real }, waits[at]);
                let submit = || {
                    scope.spawn(move || queue.run(&[commands], wait, signal));
                    Ok::<_, Infallible>(())
                };
                // SAFETY: the timeline is signalled behind the copy, which reads the object through its view.
                unsafe { lease.submit([Timeline { semaphore: signal.0, value: signal.1 }], submit) }.unwrap()
            });
            assert_eq!(pending.each_ref().map(|pending| pending.poll()), [None, None]);
            let unmapping =
                memory.take_if(|_| frame == LAST && object.coverage() == Some(Coverage::Watched)).map(|memory| {
                    let (fixture, object) = (&fixture, &object);
                    let unmapping = scope.spawn(move || {
                        drop(memory);
                        assert_eq!(
                            (fixture.value(graphics), fixture.value(compute)),
                            (LAST, LAST),
                            "munmap returned too early"
                        );
                        assert_eq!(object.state().unwrap(), State::Invalid);
                    });
                    // The kernel takes the mapping away before it waits.
                    let deadline = Instant::now() + GENEROUS;
                    while mappings(range).is_ok_and(|there| there[0].file.is_some()) {
                        assert!(Instant::now() < deadline, "munmap begins");
                        thread::yield_now();
                    }
                    unmapping
                });
            fixture.signal(go, frame);
            // The first one can't be over before the second.
            assert_eq!(pending[0].wait(GENEROUS), Some(Outcome::Done));
            assert_eq!(fixture.value(compute), frame);
            assert_eq!(pending[1].wait(GENEROUS), Some(Outcome::Done));
            unmapping.into_iter().for_each(|unmapping| unmapping.join().unwrap());
        });
        assert!(backs.iter().all(|back| back.bytes() == expected), "frame {frame}");
    }
    assert_eq!(manager.stats().late, 0);
    drop((object, manager, memory));
    [go, graphics, compute].into_iter().for_each(|semaphore| fixture.destroy_semaphore(semaphore));
}

#[test]
fn a_manager_dropped_with_work_that_never_starts_ends_all_the_same() {
    let Some(fixture) = Fixture::new() else { return };
    let mut config = Config::default();
    // Also the time that an idle device has to say so; a busy machine needs some.
    config.close_limit = Duration::from_secs(1);
    let manager = manager(&fixture, config);
    let memory = Memory::of_file(&memfd(1), 1, true);
    let object = register(&manager, &memory, Access::Read);
    let done = fixture.timeline();
    let lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
    let nothing = || Ok::<_, Infallible>(());
    // SAFETY: no work is submitted, so none accesses the object; the signal stays out, as of an engine that failed to submit.
    let pending = unsafe { lease.submit([Timeline { semaphore: done, value: 1 }], nothing) }.unwrap();
    drop(object);
    drop(manager);
    assert_eq!(pending.wait(GENEROUS), Some(Outcome::Lost), "nobody knows how it ended");
    fixture.destroy_semaphore(done);
}

#[test]
fn a_mirror_is_fresh_at_every_acquire() {
    let Some(fixture) = Fixture::new() else { return };
    let mut config = Config::default();
    config.force = Some(Force::Mirror);
    let manager = manager(&fixture, config);
    let memory = Memory::anonymous(2);
    let object = register(&manager, &memory, Access::Read);
    for byte in [1, 2, 3] {
        memory.write(17, byte);
        let lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
        assert_eq!(lease.view(0).path, Path::Mirror(MirrorReason::Forced));
        assert_eq!(fixture.read(&lease.view(0), 17, 4)[0], byte);
    }
}

#[test]
fn dropping_objects_gives_back_what_the_device_had() {
    let Some(fixture) = Fixture::new() else { return };
    let manager = manager(&fixture, Config::default());
    let memory = Memory::of_file(&memfd(100), 100, true);
    for _ in 0..3 {
        let objects: Vec<_> = (0..20).map(|_| register(&manager, &memory, Access::Read)).collect();
        let lease = manager.acquire_timeout(&objects.iter().collect::<Vec<_>>(), GENEROUS).unwrap();
        // Workers may still be letting go of those of the last round.
        let deadline = Instant::now() + GENEROUS;
        while manager.stats().imports != 20 {
            assert!(Instant::now() < deadline, "{} imports of 20 objects", manager.stats().imports);
            std::thread::yield_now();
        }
        drop(lease);
        drop(objects);
    }
    drop(manager);
    // The validation layer names what is still alive when the fixture destroys the device.
}
