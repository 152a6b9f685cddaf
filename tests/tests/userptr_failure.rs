//! What else can go wrong: the device is lost while somebody waits for it, signals interrupt everything, threads can't be had.

#[macro_use]
mod userptr;

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Wake, Waker};
use std::thread;

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::{Uid, geteuid, setresuid};
use pinfold_core::{Error, Lease, Manager, Outcome, Pending, State, SubmitError, Userptr};
use pinfold_tests::PATIENCE;
use pinfold_tests::fake::{Answer, Call, FakeDevice};
use pinfold_tests::fence::Fence;
use pinfold_tests::leaks::Holdings;
use pinfold_tests::memory::{Backing, Region};
use pinfold_tests::process::isolated;
use pinfold_tests::skip;

use userptr::{Fake, alone, device_sees, filled, patient, register, wait_for_mutator, wait_until};

fn lease(rig: &Fake, object: &Userptr<FakeDevice>) -> Lease<FakeDevice> {
    rig.manager.acquire_timeout(&[object], PATIENCE).unwrap()
}

fn submit(lease: Lease<FakeDevice>, fence: &Fence) -> Pending<FakeDevice> {
    // SAFETY: nothing is submitted, so nothing accesses the objects.
    unsafe { lease.submit([fence.clone()], || Ok::<_, String>(())) }.unwrap()
}

/// Asks for an object on the thread that tells of the end of work, and while it tells.
struct Ask(Arc<Manager<FakeDevice>>, Userptr<FakeDevice>, Mutex<Vec<bool>>);

impl Wake for Ask {
    fn wake(self: Arc<Self>) {
        let lost = self.0.acquire(&[&self.1]).is_err_and(|error| error.is_lost());
        self.2.lock().unwrap().push(lost);
    }
}

#[test]
fn who_is_told_that_work_was_lost_with_the_device_gets_no_lease_any_more() {
    let _alone = alone();
    let device = FakeDevice::new();
    let manager = Arc::new(Manager::new(device.clone(), patient()).unwrap());
    let region = Region::new(Backing::Anonymous, 1).unwrap();
    let object = register(&manager, region.range());
    let fence = Fence::new();
    let mut pending = pin!(submit(manager.acquire_timeout(&[&object], PATIENCE).unwrap(), &fence));
    let ask = Arc::new(Ask(Arc::clone(&manager), object, Mutex::default()));
    assert!(pending.as_mut().poll(&mut Context::from_waker(&Waker::from(Arc::clone(&ask)))).is_pending());
    device.lose();
    fence.signal(Outcome::Lost);
    assert_eq!(*ask.2.lock().unwrap(), [true]);
}

#[test]
fn a_device_that_is_lost_ends_the_hold_off_and_every_call_says_so_and_nothing_stays_pinned() {
    let _alone = alone();
    let rig = Fake::new();
    let region = Region::new(Backing::Anonymous, 4).unwrap();
    let objects: Vec<_> = (0..4).map(|page| register(&rig.manager, region.part(page..page + 1))).collect();
    let (fence, kept) = (Fence::new(), lease(&rig, &objects[1]));
    let pending = submit(lease(&rig, &objects[0]), &fence);
    drop(lease(&rig, &objects[2]));
    objects[2].keep_ready();
    thread::scope(|scope| {
        let mutator = scope.spawn(|| {
            region.unmap(0..1).unwrap();
            assert_eq!(fence.outcome(), Some(Outcome::Lost), "munmap has returned while the device worked");
        });
        wait_for_mutator();
        assert!(!mutator.is_finished());
        rig.device.lose();
        fence.signal(Outcome::Lost);
    });
    assert_eq!(pending.wait(PATIENCE), Some(Outcome::Lost));
    assert_eq!(rig.manager.stats().space.late, 0, "the deadline had no part in it");
    assert!(rig.manager.acquire(&[&objects[3]]).unwrap_err().is_lost(), "who is told of the loss finds it everywhere");
    // SAFETY: nothing is submitted.
    let refused = unsafe { kept.submit([Fence::new()], || Ok::<_, String>(())) }.unwrap_err();
    assert!(matches!(&refused, SubmitError::Gone(error) if error.is_lost()), "{refused:?}");
    drop(refused);
    // Only now is the last lease gone.
    rig.device.wait_no_imports();
    wait_until("the bytes given back", || rig.manager.stats().pinned_bytes == 0);
    assert!(rig.manager.acquire_timeout(&[&objects[2]], PATIENCE).unwrap_err().is_lost());
    assert!(rig.manager.prefetch(&[&objects[2]]).unwrap_err().is_lost());
    assert_ne!(objects[2].state().unwrap(), State::Valid);
    assert_eq!(rig.device.counts().dropped, 0);
}

#[test]
fn a_device_that_is_lost_in_an_acquisition_is_lost_for_all() {
    let _alone = alone();
    for call in [Call::Prepare, Call::Import] {
        let rig = Fake::new();
        let region = Region::new(Backing::Anonymous, 3).unwrap();
        let objects: Vec<_> = (0..3).map(|page| register(&rig.manager, region.part(page..page + 1))).collect();
        drop(lease(&rig, &objects[0]));
        // A second one is just being built, and comes too late to be kept.
        let untouched = Region::untouched(Backing::Anonymous, 1).unwrap();
        let slow = register(&rig.manager, untouched.range());
        rig.device.script(Call::Import, &[Answer::Hold]);
        assert!(rig.manager.acquire(&[&slow]).unwrap_err().is_again());
        rig.device.wait_held(1);
        rig.device.script(call, &[Answer::Lost]);
        assert!(rig.manager.acquire_timeout(&[&objects[1]], PATIENCE).unwrap_err().is_lost());
        assert!(rig.manager.acquire_timeout(&[&objects[0], &objects[2]], PATIENCE).unwrap_err().is_lost());
        rig.device.let_go();
        rig.device.wait_no_imports();
        assert_eq!(rig.device.counts().dropped, 0);
    }
}

static SIGNALS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: i32) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
}

#[test]
fn signals_that_interrupt_every_wait_change_nothing() {
    isolated(|| {
        let mut config = patient();
        config.inline_limit = 0;
        let rig = Fake::with(config);
        let region = Region::untouched(Backing::Anonymous, 64).unwrap();
        let object = register(&rig.manager, region.range());
        // Without SA_RESTART, so that system calls are interrupted; to whichever thread the kernel likes, ours among them.
        let action = SigAction::new(SigHandler::Handler(count), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler adds to an atomic and does nothing else.
        unsafe { sigaction(Signal::SIGALRM, &action) }.unwrap();
        let tick = libc::timeval { tv_sec: 0, tv_usec: 100 };
        let timer = libc::itimerval { it_interval: tick, it_value: tick };
        // SAFETY: both pointers are null or point to a value of this frame.
        assert_eq!(unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) }, 0);
        let mut round = 0_u8;
        while round < 100 || SIGNALS.load(Ordering::Relaxed) < 200 {
            round = round.wrapping_add(1);
            let fence = Fence::new();
            let pending = loop {
                let lease = lease(&rig, &object);
                // SAFETY: nothing is submitted.
                match unsafe { lease.submit([fence.clone()], || Ok::<_, String>(())) } {
                    Ok(pending) => break pending,
                    Err(error) => assert!(error.is_stale(), "{error}"),
                }
            };
            thread::scope(|scope| {
                scope.spawn(|| {
                    region.map_over(0..64).unwrap();
                    assert_eq!(fence.outcome(), Some(Outcome::Done));
                });
                scope.spawn(|| assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done)));
                wait_for_mutator();
                fence.signal(Outcome::Done);
            });
            region.fill(0..64, round).unwrap();
            rig.manager.invalidate(region.range()).unwrap();
            assert_eq!(device_sees(&rig, &object), [filled(round); 64]);
            rig.manager.mutate(&[region.range()], || region.advise(0..64, libc::MADV_DONTNEED).unwrap()).unwrap();
        }
        assert_eq!(rig.manager.stats().space.late, 0);
    })
    .expect_return();
}

/// Becomes a user that has no other process, so that a limit on processes is one on our threads.
fn become_nobody_else() -> bool {
    let free = Uid::from_raw(64_000 + std::process::id() % 1000);
    geteuid().is_root() && setresuid(free, free, free).is_ok()
}

fn limit_threads(most: u64) {
    setrlimit(Resource::RLIMIT_NPROC, most, most).unwrap();
}

#[test]
fn a_manager_that_gets_no_threads_says_so_and_leaves_nothing() {
    isolated(|| {
        if !become_nobody_else() {
            skip!("only root can become another user");
        }
        drop(Manager::new(FakeDevice::new(), patient()).unwrap()); // what is made once and kept
        let before = Holdings::now();
        for most in 1..8 {
            limit_threads(8);
            let threads = Holdings::now().threads;
            assert_eq!(threads, before.threads);
            // The limit can only be lowered by an ordinary user, so it is the soft one that moves.
            setrlimit(Resource::RLIMIT_NPROC, most.min(8), 8).unwrap();
            match Manager::new(FakeDevice::new(), patient()) {
                Err(error @ (Error::Pool(_) | Error::Space(_))) => {
                    assert!(error.to_string().contains("ulimit -u"), "{error}");
                }
                Err(error) => panic!("{error}"),
                Ok(manager) => drop(manager),
            }
            let after = Holdings::now();
            assert_eq!((after.descriptors, after.threads), (before.descriptors, before.threads), "limit {most}");
        }
    })
    .expect_return();
}

#[test]
fn an_acquisition_for_which_no_thread_can_be_had_is_done_or_refused_and_never_hangs() {
    isolated(|| {
        if !become_nobody_else() {
            skip!("only root can become another user");
        }
        let mut config = patient();
        config.inline_limit = 0;
        let rig = Fake::with(config);
        let region = Region::new(Backing::Anonymous, 32).unwrap();
        let objects: Vec<_> = (0..32).map(|page| register(&rig.manager, region.part(page..page + 1))).collect();
        limit_threads(1);
        for object in &objects {
            match rig.manager.acquire_timeout(&[object], PATIENCE) {
                Ok(lease) => assert_eq!(lease.len(), 1),
                Err(error) => assert!(matches!(error, Error::Cancelled | Error::Pool(_)), "{error}"),
            }
        }
        drop(objects);
        rig.device.wait_no_imports();
    })
    .expect_return();
}
