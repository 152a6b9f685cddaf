//! What the kernel doesn't report: a pin goes stale in silence, unless the mutation is done in a bracket or told afterwards.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use pinfold_core::{Access, Config, Device, Error, Lease, Manager, Outcome, State, SubmitError, Userptr, in_bracket};
use pinfold_invalidate::{HostRange, Shards, Space, page_size};
use pinfold_tests::dma::DmaDevice;
use pinfold_tests::fake::{Answer, Call, FakeDevice};
use pinfold_tests::fence::Fence;
use pinfold_tests::memory::{Backing, Region};
use pinfold_tests::process::{isolated, isolated_case};
use pinfold_tests::{PATIENCE, skip};

/// Since Linux 6.13; not in the libc crate.
const MADV_GUARD_INSTALL: i32 = 102;

fn patient<D: Device>(device: D) -> Manager<D> {
    let mut config = Config::default();
    config.deadline = Duration::from_secs(10);
    Manager::new(device, config).unwrap()
}

fn register<D: Device>(manager: &Manager<D>, range: HostRange) -> Userptr<D> {
    // SAFETY: no reference points into a region; what goes unreported is what the tests are about.
    unsafe { manager.register(range, Access::Read) }.unwrap()
}

fn wait_until(what: &str, mut come: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !come() {
        assert!(Instant::now() < deadline, "{what} doesn't come about");
        thread::yield_now();
    }
}

/// A mutation without an event, and whether the program can read all its pages afterwards.
struct Silent {
    name: &'static str,
    backing: Backing,
    does: fn(&Region) -> io::Result<()>,
    readable: bool,
}

const PAGES: usize = 4;
const SILENT: [Silent; 5] = [
    Silent {
        name: "ftruncate to less and back",
        backing: Backing::Memfd,
        does: |region| region.truncate(1).and_then(|()| region.truncate(PAGES)),
        readable: true,
    },
    Silent { name: "ftruncate", backing: Backing::Memfd, does: |region| region.truncate(1), readable: false },
    Silent {
        name: "FALLOC_FL_PUNCH_HOLE",
        backing: Backing::Memfd,
        does: |region| region.punch_hole(1..3),
        readable: true,
    },
    Silent {
        name: "MADV_GUARD_INSTALL",
        backing: Backing::Anonymous,
        does: |region| region.advise(1..3, MADV_GUARD_INSTALL),
        readable: false,
    },
    Silent {
        name: "mprotect",
        backing: Backing::Anonymous,
        does: |region| region.protect(1..3, libc::PROT_NONE),
        readable: false,
    },
];

/// How the program goes about a silent mutation.
#[derive(Debug, Clone, Copy)]
enum Way {
    Unsaid,
    Told,
    Bracketed,
}

/// The device's view of an object of four pages.
fn device_reads(device: &DmaDevice, lease: Lease<DmaDevice>) -> Vec<u8> {
    let job = device.read_job(&lease.view(0), 0, PAGES * page_size()).unwrap();
    let start = || {
        job.start();
        Ok::<_, Error>(())
    };
    // SAFETY: the fence is the job's, which reads through the view.
    let pending = unsafe { lease.submit([job.fence()], start) }.unwrap();
    let bytes = job.finish().unwrap();
    assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
    bytes
}

/// Runs one silent mutation over a valid object and asserts what must come of it. `Err` if this kernel doesn't have the mutation.
fn run(device: &DmaDevice, silent: &Silent, way: Way) -> io::Result<()> {
    let manager = patient(device.clone());
    let region = Region::new(silent.backing, PAGES).unwrap();
    let object = register(&manager, region.range());
    drop(manager.acquire_timeout(&[&object], PATIENCE).unwrap());
    let generation = object.generation().unwrap();
    match way {
        Way::Unsaid => (silent.does)(&region)?,
        Way::Told => {
            (silent.does)(&region)?;
            manager.invalidate(region.range()).unwrap();
        }
        Way::Bracketed => manager.mutate(&[region.range()], || (silent.does)(&region)).unwrap()?,
    }
    let acquired = match way {
        Way::Unsaid => {
            assert_eq!((object.state().unwrap(), object.generation().unwrap()), (State::Valid, generation));
            manager.acquire(&[&object])
        }
        _ => {
            assert_eq!(object.state().unwrap(), State::Invalid);
            assert!(object.generation().unwrap() > generation);
            manager.acquire_timeout(&[&object], PATIENCE)
        }
    };
    match (way, silent.readable) {
        // The device goes on reading what the program doesn't have any more.
        (Way::Unsaid, _) => assert_eq!(device_reads(device, acquired.unwrap()), region.original(0..PAGES)),
        (_, true) => {
            let seen = device_reads(device, acquired.unwrap());
            assert_ne!(seen, region.original(0..PAGES));
            assert_eq!(seen, region.read(0, PAGES * page_size()).unwrap());
        }
        (_, false) => assert_eq!(acquired.unwrap_err().errno(), libc::EFAULT),
    }
    Ok(())
}

#[test]
fn a_silent_mutation_leaves_a_stale_pin_unless_it_is_told_or_bracketed() {
    for silent in &SILENT {
        for way in [Way::Unsaid, Way::Told, Way::Bracketed] {
            let case = || {
                let device = match DmaDevice::new() {
                    Ok(device) => device,
                    Err(e) => skip!("no io_uring here: {e}"),
                };
                match run(&device, silent, way) {
                    Err(e) if e.raw_os_error() == Some(libc::EINVAL) => skip!("this kernel has no {}", silent.name),
                    done => done.unwrap(),
                }
            };
            isolated_case(&format!("{}, {way:?}", silent.name), PATIENCE, case).expect_return();
        }
    }
}

#[test]
fn an_acquisition_that_took_its_pages_before_the_mutation_is_not_published() {
    isolated(|| {
        let manager = patient(FakeDevice::new());
        let device = manager.device();
        let region = Region::untouched(Backing::Anonymous, 2).unwrap();
        let object = register(&manager, region.range());
        device.script(Call::Import, &[Answer::Hold]);
        // Not resident: a worker acquires it, and is kept in the device's import. No shard has the object yet.
        assert!(manager.acquire(&[&object]).unwrap_err().is_again());
        device.wait_held(1);
        let mutation = || {
            // The import goes through with the old contents, and everything behind it is left to do.
            device.let_go();
            wait_until("the import", || device.counts().imported == 1);
            region.fill(0..2, 7).unwrap();
        };
        manager.mutate(&[region.range()], mutation).unwrap();
        let lease = manager.acquire_timeout(&[&object], PATIENCE).unwrap();
        assert_eq!(lease.view(0).words, [u64::from_ne_bytes([7; 8]); 2]);
        assert!(device.counts().imported >= 2);
        wait_until("the release of the first import", || device.live_imports() == 1);
        assert!(device.is_live(lease.view(0).id));
    })
    .expect_return();
}

#[test]
fn an_acquisition_that_was_held_through_a_whole_bracket_is_not_published_either() {
    isolated(|| {
        for (told, bytes) in [(false, 8), (true, 9)] {
            let manager = patient(FakeDevice::new());
            let device = manager.device();
            let region = Region::new(Backing::Anonymous, 2).unwrap();
            let object = register(&manager, region.range());
            device.script(Call::Import, &[Answer::Hold]);
            thread::scope(|scope| {
                // Resident and small: acquired on the thread that asks.
                let acquirer = scope.spawn(|| manager.acquire_timeout(&[&object], PATIENCE).unwrap());
                device.wait_held(1);
                if told {
                    region.fill(0..2, bytes).unwrap();
                    manager.invalidate(region.range()).unwrap();
                } else {
                    manager.mutate(&[region.range()], || region.fill(0..2, bytes).unwrap()).unwrap();
                }
                device.let_go();
                let lease = acquirer.join().unwrap();
                assert_eq!(lease.view(0).words, [u64::from_ne_bytes([bytes; 8]); 2]);
                assert_ne!(lease.view(0).id, 0, "the import that began before the mutation got published");
            });
        }
    })
    .expect_return();
}

#[test]
fn a_panic_inside_a_bracket_opens_the_gates_again() {
    isolated(|| {
        let manager = patient(FakeDevice::new());
        let region = Region::new(Backing::Anonymous, 2).unwrap();
        let object = register(&manager, region.range());
        drop(manager.acquire_timeout(&[&object], PATIENCE).unwrap());
        let bracket = || manager.mutate(&[region.range()], || panic!("on purpose"));
        let panic = catch_unwind(AssertUnwindSafe(bracket)).unwrap_err();
        assert_eq!(panic.downcast_ref(), Some(&"on purpose"));
        assert!(!in_bracket());
        let space = Space::get(Duration::ZERO).unwrap();
        assert!(Shards::ALL.iter().all(|shard| space.gate(shard).is_open()));
        assert_eq!(object.state().unwrap(), State::Invalid);
        drop(manager.acquire_timeout(&[&object], PATIENCE).unwrap());
        manager.mutate(&[region.range()], || ()).unwrap();
        // And what was unregistered for the bracket is watched again.
        drop(manager.acquire_timeout(&[&object], PATIENCE).unwrap());
        region.unmap_all().unwrap();
        assert_eq!(object.state().unwrap(), State::Invalid);
    })
    .expect_return();
}

#[test]
fn whatever_would_wait_for_the_bracket_it_is_called_in_says_so() {
    isolated(|| {
        let manager = patient(FakeDevice::new());
        let (region, other) =
            (Region::new(Backing::Anonymous, 2).unwrap(), Region::new(Backing::Anonymous, 2).unwrap());
        let (object, bystander) = (register(&manager, region.range()), register(&manager, other.range()));
        let lease = manager.acquire_timeout(&[&bystander], PATIENCE).unwrap();
        let closure = || {
            assert!(in_bracket());
            let mut inner = false;
            assert!(matches!(manager.mutate(&[other.range()], || inner = true), Err(Error::Nested)));
            assert!(!inner, "the inner closure has not run");
            assert!(matches!(manager.invalidate(other.range()), Err(Error::Nested)));
            assert!(matches!(manager.acquire(&[&object]), Err(Error::Nested)));
            assert!(matches!(manager.acquire_timeout(&[&object], PATIENCE), Err(Error::Nested)));
            assert!(matches!(manager.find(other.range().start()), Err(Error::Nested)));
            assert!(matches!(object.state(), Err(Error::Nested)));
            assert!(matches!(object.generation(), Err(Error::Nested)));
            // SAFETY: nothing is submitted.
            let submitted = unsafe { lease.submit(None::<Fence>, || Ok::<_, Error>(())) };
            assert!(matches!(submitted, Err(SubmitError::Gone(Error::Nested))));
            // What waits for nothing works: registering, and unmapping what the bracket names.
            let registered = register(&manager, other.range());
            region.unmap_all().unwrap();
            registered
        };
        let registered = manager.mutate(&[region.range()], closure).unwrap();
        assert_eq!(registered.state().unwrap(), State::New);
        assert_eq!(bystander.state().unwrap(), State::Valid, "what the bracket did not name");
        assert_eq!(manager.acquire_timeout(&[&object], PATIENCE).unwrap_err().errno(), libc::EFAULT);
    })
    .expect_return();
}

#[test]
fn two_brackets_at_once_run_side_by_side_and_the_gates_open_after_the_second() {
    isolated(|| {
        let manager = patient(FakeDevice::new());
        let (first, second) =
            (Region::new(Backing::Anonymous, 2).unwrap(), Region::new(Backing::Anonymous, 2).unwrap());
        let objects = [register(&manager, first.range()), register(&manager, second.range())];
        drop(manager.acquire_timeout(&[&objects[0], &objects[1]], PATIENCE).unwrap());
        let (both_inside, over) = (Barrier::new(2), AtomicBool::new(false));
        let (left, has_left) = mpsc::channel();
        thread::scope(|scope| {
            let (manager, objects, both_inside, over) = (&manager, &objects, &both_inside, &over);
            let (first, second) = (&first, &second);
            scope.spawn(move || {
                manager.mutate(&[first.range()], || both_inside.wait()).unwrap();
                left.send(()).unwrap();
                assert_eq!(objects[0].state().unwrap(), State::Invalid);
                assert!(over.load(Ordering::SeqCst), "the gates have opened while the other bracket was open");
                drop(manager.acquire_timeout(&[&objects[0]], PATIENCE).unwrap());
            });
            scope.spawn(move || {
                let closure = || {
                    both_inside.wait();
                    has_left.recv().unwrap();
                    let space = Space::get(Duration::ZERO).unwrap();
                    assert!(Shards::ALL.iter().all(|shard| !space.gate(shard).is_open()));
                    over.store(true, Ordering::SeqCst);
                };
                manager.mutate(&[second.range()], closure).unwrap();
                drop(manager.acquire_timeout(&[&objects[1]], PATIENCE).unwrap());
            });
        });
        assert_eq!(manager.stats().space.brackets, 2);
    })
    .expect_return();
}

#[test]
fn a_bracket_runs_its_mutation_only_when_the_work_is_over() {
    isolated(|| {
        let manager = patient(FakeDevice::new());
        let region = Region::new(Backing::Memfd, 2).unwrap();
        let object = register(&manager, region.range());
        let lease = manager.acquire_timeout(&[&object], PATIENCE).unwrap();
        let fence = Fence::new();
        // SAFETY: the fence is signalled below, and nothing accesses the object.
        let pending = unsafe { lease.submit([fence.clone()], || Ok::<_, Error>(())) }.unwrap();
        let (space, ran) = (Space::get(Duration::ZERO).unwrap(), AtomicBool::new(false));
        thread::scope(|scope| {
            let mutator = scope.spawn(|| {
                let closure = || {
                    ran.store(true, Ordering::SeqCst);
                    assert_eq!(fence.outcome(), Some(Outcome::Done), "the mutation ran while the work was under way");
                    region.truncate(1).unwrap();
                };
                manager.mutate(&[region.range()], closure).unwrap();
            });
            wait_until("the bracket", || Shards::ALL.iter().all(|shard| !space.gate(shard).is_open()));
            // Turns in which a bracket that doesn't wait would run its closure; fewer on a busy machine, where they might take until the deadline.
            let enough = Instant::now() + Duration::from_secs(1);
            (0..1_000).take_while(|_| Instant::now() < enough).for_each(|_| thread::yield_now());
            assert!(!ran.load(Ordering::SeqCst) && !mutator.is_finished());
            fence.signal(Outcome::Done);
        });
        assert!(ran.load(Ordering::SeqCst));
        assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
        assert_eq!(manager.stats().late, 0);
        assert_eq!(object.state().unwrap(), State::Invalid);
    })
    .expect_return();
}
