//! Nothing is left behind: descriptors, mappings, pinned pages, threads, watches. And nothing is lost when signals interrupt every call.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pinfold_core::{Access, Config, Device, Error, HostRange, Lease, Manager, Outcome, State, Userptr};
use pinfold_tests::dma::DmaDevice;
use pinfold_tests::fake::FakeDevice;
use pinfold_tests::fence::Fence;
use pinfold_tests::leaks::{Holdings, pinned};
use pinfold_tests::memory::{Backing, Move, Region};
use pinfold_tests::process::{isolated, isolated_case};
use pinfold_tests::{PATIENCE, rounds, skip};

mod stranger;
use stranger::Stranger;

fn patient<D: Device>(device: D) -> Manager<D> {
    let mut config = Config::default();
    config.deadline = Duration::from_secs(10);
    Manager::new(device, config).unwrap()
}

fn register<D: Device>(manager: &Manager<D>, range: HostRange) -> Userptr<D> {
    // SAFETY: no reference points into a region.
    unsafe { manager.register(range, Access::Read) }.unwrap()
}

/// Submits work that is over already.
fn submit<D: Device<Signal = Fence>>(lease: Lease<D>) -> bool {
    let fence = Fence::new();
    fence.signal(Outcome::Done);
    // SAFETY: nothing is accessed.
    let submitted = unsafe { lease.submit([fence], || Ok::<_, Error>(())) };
    submitted.is_ok_and(|pending| pending.wait(PATIENCE) == Some(Outcome::Done))
}

fn wait_until(what: &str, mut come: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !come() {
        assert!(Instant::now() < deadline, "{what} doesn't come about");
        thread::yield_now();
    }
}

/// A manager's whole life.
fn cycle<D: Device<Signal = Fence>>(device: D, round: usize) {
    let manager = patient(device);
    let regions = [Backing::Anonymous, Backing::Memfd].map(|backing| Region::new(backing, 4).unwrap());
    let objects: Vec<_> = regions.iter().map(|region| register(&manager, region.range())).collect();
    for region in &regions {
        drop(register(&manager, region.part(1..2))); // never acquired
    }
    let lease = manager.acquire_timeout(&objects.iter().collect::<Vec<_>>(), PATIENCE).unwrap();
    assert!(submit(lease));
    // Each round ends another way.
    match round % 6 {
        0 => regions[0].advise(0..4, libc::MADV_DONTNEED).unwrap(),
        1 => regions[1].unmap_all().unwrap(),
        2 => regions.iter().for_each(|region| region.map_over(1..3).unwrap()),
        3 => drop(regions[0].relocate(0..4, Move::Away).unwrap()),
        4 => manager.mutate(&[regions[1].range()], || regions[1].truncate(1).unwrap()).unwrap(),
        _ => {}
    }
    for object in &objects {
        drop(manager.acquire_timeout(&[object], PATIENCE)); // some have nothing mapped any more
    }
    if round.is_multiple_of(2) {
        drop(regions);
        drop(objects);
    } else {
        drop(manager);
        assert!(matches!(objects[0].state(), Ok(State::Closed)));
    }
}

/// Lives many lives and compares what the process has with what it had.
fn assert_nothing_is_left<D: Device<Signal = Fence>>(device: impl Fn() -> D) {
    /// What the C library keeps for later (stacks of threads, arenas) is there after these.
    const WARM_UP: usize = 30;
    let third = rounds(300).div_ceil(3);
    (0..WARM_UP).for_each(|round| cycle(device(), round));
    // A thread that has been joined, and a ring that was closed, take the kernel another moment, and older kernels a longer one.
    wait_until("the end of every pin", || pinned() == 0);
    let before = Holdings::now();
    let mut mappings = vec![before.mappings];
    for _ in 0..3 {
        (0..third).for_each(|round| cycle(device(), round));
        wait_until("the end of every thread, descriptor and pin", || {
            let now = Holdings::now();
            now.descriptors <= before.descriptors && now.pinned == 0 && now.threads <= before.threads
        });
        mappings.push(Holdings::now().mappings);
    }
    // The C library's stacks and arenas become more when many threads happen to live at a time, but not again and again; what leaks once in six
    // lives does.
    let least = mappings.windows(2).map(|pair| pair[1].saturating_sub(pair[0])).min();
    assert!(least < Some((third / 6).max(4)), "mappings before, and after each {third} lives: {mappings:?}");
}

#[test]
// rows (fake dma): igt/create-destroy-{unsync,sync}
fn three_hundred_lives_leave_nothing_behind() {
    isolated_case("fake", 2 * PATIENCE, || assert_nothing_is_left(FakeDevice::new)).expect_return();
    let pins = || {
        if let Err(e) = DmaDevice::new() {
            skip!("no io_uring here: {e}");
        }
        assert_nothing_is_left(|| {
            let mut device = DmaDevice::new();
            // What the rings of earlier lives had locked, the kernel takes off the user's account a moment later.
            wait_until("room for a ring", || {
                let is_short = device.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::ENOMEM));
                if is_short {
                    device = DmaDevice::new();
                }
                !is_short
            });
            device.unwrap()
        });
    };
    isolated_case("pins", 2 * PATIENCE, pins).expect_return();
}

#[test]
// rows (dma): igt/{unsync,sync}-unmap-cycles; peers/pending-invalidations-grow
fn mutations_and_new_acquisitions_of_one_object_pile_nothing_up() {
    let changes = rounds(600);
    isolated(|| {
        let device = match DmaDevice::new() {
            Ok(device) => device,
            Err(e) => skip!("no io_uring here: {e}"),
        };
        let manager = patient(device.clone());
        let region = Region::new(Backing::Anonymous, 8).unwrap();
        let object = register(&manager, region.range());
        let round = |round: usize| {
            let page = round % 8;
            match round % 3 {
                0 => region.advise(page..page + 1, libc::MADV_DONTNEED).unwrap(),
                1 => region.map_over(page..page + 1).unwrap(),
                _ => {
                    manager.mutate(&[region.part(page..page + 1)], || region.map_over(page..page + 1).unwrap()).unwrap()
                }
            }
            drop(manager.acquire_timeout(&[&object], PATIENCE).unwrap());
        };
        (0..30).for_each(round);
        let pins = region.range().len() as u64;
        // Acquired each time, as a kernel that can't prove discarded pages gone has the object taken a second time.
        let lease = || manager.acquire_timeout(&[&object], PATIENCE).unwrap();
        wait_until("one import and its pins", || {
            let _lease = lease();
            device.live_imports() == 1 && pinned() == pins
        });
        let before = Holdings::now();
        (0..changes).for_each(round);
        wait_until("one import and its pins, and no more", || {
            let (_lease, now) = (lease(), Holdings::now());
            let one = device.live_imports() == 1 && manager.stats().imports == 1;
            one && now.descriptors <= before.descriptors && now.pinned == pins
        });
        let after = Holdings::now();
        // Workers come and go, each with a stack and an arena; a mapping left in every other round shows.
        assert!(after.mappings < before.mappings + changes / 2, "{after:?}, and {before:?} before");
    })
    .expect_return();
}

/// Whether somebody else watches the range. A test of its own userfaultfd, which goes away at once.
fn is_watched(range: HostRange) -> bool {
    match Stranger::new().unwrap().register(range) {
        Ok(()) => false,
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => true,
        Err(e) => panic!("{range}: {e}"),
    }
}

#[test]
// rows (fake): peers/cannot-force-deregistration
fn when_the_last_handle_is_gone_the_memory_is_nobodys() {
    isolated(|| {
        if let Err(e) = Stranger::new() {
            skip!("no userfaultfd here: {e}");
        }
        let manager = patient(FakeDevice::new());
        for backing in [Backing::Anonymous, Backing::AnonymousShared, Backing::Memfd] {
            let region = Region::new(backing, 4).unwrap();
            let objects = [register(&manager, region.part(0..3)), register(&manager, region.part(2..4))];
            let lease = manager.acquire_timeout(&[&objects[0], &objects[1]], PATIENCE).unwrap();
            let [first, second] = objects;
            assert!((0..4).all(|page| is_watched(region.part(page..page + 1))), "{backing:?}");
            let clone = first.clone();
            drop(first);
            drop(clone);
            assert!(is_watched(region.part(0..1)), "{backing:?}: the lease is a handle");
            drop(lease);
            wait_until("the end of the first object's watch", || !is_watched(region.part(0..2)));
            assert!(is_watched(region.part(2..3)), "{backing:?}: the second object has it still");
            drop(second);
            wait_until("the end of the second object's watch", || !is_watched(region.range()));
        }
    })
    .expect_return();
}

#[test]
fn when_the_manager_is_gone_what_moved_is_nobodys_either() {
    isolated(|| {
        if let Err(e) = Stranger::new() {
            skip!("no userfaultfd here: {e}");
        }
        for round in 0..20_u32 {
            let manager = patient(FakeDevice::new());
            let region = Region::new(Backing::Anonymous, 8).unwrap();
            let object = register(&manager, region.range());
            drop(manager.acquire_timeout(&[&object], PATIENCE).unwrap());
            // A move takes the watch along, and with DONTUNMAP leaves it behind as well.
            let moved = region.relocate(0..2, Move::Away).unwrap();
            let copied = region.relocate(2..4, Move::DontUnmap).unwrap();
            let twice = copied.relocate(0..1, Move::Away).unwrap();
            region.map_over(5..6).unwrap();
            assert!(is_watched(moved.range()) && is_watched(twice.range()) && is_watched(region.part(6..8)));
            if round.is_multiple_of(2) {
                drop(object);
                drop(manager);
            } else {
                drop(manager);
                drop(object);
            }
            for range in [moved.range(), twice.range(), copied.part(1..2), region.part(2..4), region.part(4..8)] {
                // The thread that tells of changes may be the last to let go of the tracking.
                wait_until("the end of the watch", || !is_watched(range));
            }
        }
    })
    .expect_return();
}

/// Interrupts every thread of the process but the calling one, over and over, until told to stop, and counts the signals.
fn storm(stop: &AtomicBool, sent: &AtomicUsize) {
    // SAFETY: numbers only.
    let (pid, me) = (unsafe { libc::getpid() }, unsafe { libc::gettid() });
    while !stop.load(Ordering::Relaxed) {
        for task in std::fs::read_dir("/proc/self/task").unwrap() {
            let task: libc::pid_t = task.unwrap().file_name().to_str().unwrap().parse().unwrap();
            if task != me {
                // SAFETY: numbers only; a thread that has ended meanwhile is an error that doesn't matter.
                let signalled = unsafe { libc::syscall(libc::SYS_tgkill, pid, task, libc::SIGUSR1) } == 0;
                sent.fetch_add(usize::from(signalled), Ordering::Relaxed);
            }
        }
        thread::yield_now();
    }
}

/// From now on `SIGUSR1` does nothing, but ends the system calls it meets with `EINTR`.
fn make_signals_interrupt() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    let handler: extern "C" fn(libc::c_int) = nothing;
    // SAFETY: all zeros is a valid sigaction: no flags (so no SA_RESTART), nothing blocked.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as libc::sighandler_t;
    // SAFETY: the action lives through the call, and its handler is async-signal-safe, as it does nothing.
    let set = unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[test]
// rows (fake): peers/signal-kills-the-event-thread
fn a_storm_of_signals_loses_nothing() {
    let mutations = rounds(600);
    isolated(|| {
        make_signals_interrupt().unwrap();
        let manager = patient(FakeDevice::new());
        let region = Region::new(Backing::Anonymous, 2).unwrap();
        let objects = [register(&manager, region.part(0..1)), register(&manager, region.part(1..2))];
        let stop = AtomicBool::new(false);
        let [sent, submits, told] = [const { AtomicUsize::new(0) }; 3];
        thread::scope(|scope| {
            let (manager, region, objects) = (&manager, &region, &objects);
            let (stop, sent, submits, told) = (&stop, &sent, &submits, &told);
            let storm = scope.spawn(|| storm(stop, sent));
            for object in objects {
                scope.spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        let lease = manager.acquire_timeout(&[object], PATIENCE);
                        match lease {
                            Ok(lease) => submits.fetch_add(usize::from(submit(lease)), Ordering::Relaxed),
                            Err(Error::Again) => continue,
                            Err(e) => panic!("a signal became an error: {e}"),
                        };
                    }
                });
            }
            let mutators = [0, 1].map(|page| {
                scope.spawn(move || {
                    // On a busy machine the threads get ahead of each other: all go on until each has done enough.
                    let enough = || {
                        let [sent, submits, told] = [sent, submits, told].map(|count| count.load(Ordering::Relaxed));
                        sent > mutations && submits > 0 && told > mutations
                    };
                    let deadline = Instant::now() + PATIENCE / 2;
                    for round in 0.. {
                        if round >= mutations && (enough() || Instant::now() > deadline) {
                            break;
                        }
                        drop(manager.acquire_timeout(&[&objects[page]], PATIENCE).unwrap());
                        let before = objects[page].generation().unwrap();
                        // Not if its discarded pages were to be taken a second time just then; watched if it is.
                        let valid = objects[page].state().unwrap() == State::Valid;
                        match round % 3 {
                            0 => region.advise(page..page + 1, libc::MADV_DONTNEED).unwrap(),
                            1 => region.map_over(page..page + 1).unwrap(),
                            _ => manager
                                .mutate(&[region.part(page..page + 1)], || region.fill(page..page + 1, 1).unwrap())
                                .unwrap(),
                        }
                        let after = objects[page].generation().unwrap();
                        assert!(!valid || after > before, "round {round}: valid as before");
                        told.fetch_add(usize::from(valid), Ordering::Relaxed);
                    }
                })
            });
            let ends = mutators.map(thread::ScopedJoinHandle::join);
            stop.store(true, Ordering::Relaxed);
            ends.into_iter().for_each(|end| end.unwrap());
            storm.join().unwrap();
        });
        println!("{sent:?} signals, {submits:?} submits, {told:?} mutations of valid objects, {:?}", manager.stats());
        assert!(sent.into_inner() > mutations && submits.into_inner() > 0 && told.into_inner() > mutations);
        for object in &objects {
            drop(manager.acquire_timeout(&[object], PATIENCE).unwrap());
        }
        let stats = manager.stats();
        assert_eq!((stats.late, stats.space.late, stats.space.rescues, stats.faults), (0, 0, 0, 0));
        assert_eq!(stats.in_flight, 0);
        // The last one before these may still be on its way out, with the lease that named it.
        wait_until("one import for each object", || manager.stats().imports == 2);
        region.unmap_all().unwrap();
        assert!(objects.iter().all(|object| object.state().unwrap() == State::Invalid));
        let device = manager.device().clone();
        drop((objects, manager));
        assert_eq!((device.live_imports(), device.counts().dropped), (0, 0));
    })
    .expect_return();
}
