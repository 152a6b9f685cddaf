//! Forks: the child is told so by every call and hurts nobody; the parent doesn't notice.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use pinfold_core::watch::WatchConfig;
use pinfold_core::{Access, Config, Error, Manager, Outcome, State, SubmitError};
use pinfold_tests::PATIENCE;
use pinfold_tests::fake::FakeDevice;
use pinfold_tests::fence::Fence;
use pinfold_tests::memory::{Backing, Region};
use pinfold_tests::process::isolated;

/// How a child says that everything was as it should be.
const FINE: i32 = 7;

/// Runs `child` in a forked process and asserts that it came to its end. `fork` makes the process: 0 in the child.
fn forked(fork: impl FnOnce() -> libc::pid_t, child: impl FnOnce()) {
    let pid = fork();
    assert!(pid >= 0, "fork: {}", std::io::Error::last_os_error());
    if pid == 0 {
        child();
        // SAFETY: ends the child at once; nothing of the parent's is run.
        unsafe { libc::_exit(FINE) };
    }
    assert_eq!(wait_for(pid), Some(FINE), "the child ended otherwise");
}

/// The child's exit code; `None` if a signal ended it.
fn wait_for(pid: libc::pid_t) -> Option<i32> {
    let mut status = 0;
    // SAFETY: `status` is a live int of this frame.
    let got = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert_eq!(got, pid);
    libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status))
}

fn fork() -> libc::pid_t {
    // SAFETY: the children of these tests use only what is theirs, allocate by a C library that survives forks, and leave by _exit.
    unsafe { libc::fork() }
}

/// A fork that runs no handlers, as some sandboxes and runtimes do it.
fn bare_clone() -> libc::pid_t {
    // SAFETY: as for `fork`; without CLONE_VM the child has its own copy of everything.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
    libc::pid_t::try_from(pid).expect("a process id is an int")
}

struct Scene {
    manager: Manager<FakeDevice>,
    device: FakeDevice,
    region: Region,
}

impl Scene {
    fn new() -> Self {
        let mut config = Config::default();
        config.deadline = Duration::from_secs(5);
        let device = FakeDevice::new();
        let manager = Manager::new(device.clone(), config).unwrap();
        Self { manager, device, region: Region::new(Backing::Anonymous, 4).unwrap() }
    }

    fn register(&self) -> pinfold_core::Userptr<FakeDevice> {
        // SAFETY: no reference points into a region.
        unsafe { self.manager.register(self.region.range(), Access::Read) }.unwrap()
    }
}

/// Asserts, in the child, that every call says so. Panics would unwind into the test of the parent's copy, so it leaves instead.
fn every_call_says_forked(
    scene: &Scene,
    object: &pinfold_core::Userptr<FakeDevice>,
    lease: pinfold_core::Lease<FakeDevice>,
) {
    let manager = &scene.manager;
    let mut wrong = Vec::new();
    let mut check = |what: &str, right: bool| {
        if !right {
            wrong.push(what.to_owned());
        }
    };
    check("state", matches!(object.state(), Ok(State::DeadAfterFork)));
    check("generation", matches!(object.generation(), Err(Error::Forked)));
    check("acquire", matches!(manager.acquire(&[object]), Err(Error::Forked)));
    check("acquire_timeout", matches!(manager.acquire_timeout(&[object], PATIENCE), Err(Error::Forked)));
    check("find", matches!(manager.find(scene.region.range().start()), Err(Error::Forked)));
    check("mutate", matches!(manager.mutate(&[scene.region.range()], || ()), Err(Error::Forked)));
    check("invalidate", matches!(manager.invalidate(scene.region.range()), Err(Error::Forked)));
    check("watch", matches!(manager.watch(WatchConfig::default()), Err(Error::Forked)));
    check("cancel", !object.cancel());
    // SAFETY: nothing is submitted.
    let submitted = unsafe { lease.submit(None::<Fence>, || Ok::<_, Error>(())) };
    check("submit", matches!(submitted, Err(SubmitError::Gone(Error::Forked))));
    // SAFETY: no reference points into a region.
    let registered = unsafe { manager.register(scene.region.range(), Access::Read) };
    check("register", matches!(registered, Err(Error::Forked)));
    if !wrong.is_empty() {
        eprintln!("not told that it is a child by: {wrong:?}");
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(1) };
    }
}

fn a_child_is_told(fork: fn() -> libc::pid_t) {
    let scene = Scene::new();
    let object = scene.register();
    let lease = scene.manager.acquire_timeout(&[&object], PATIENCE).unwrap();
    let lease_of_child = scene.manager.acquire_timeout(&[&object], PATIENCE).unwrap();
    let before = scene.region.read(0, scene.region.range().len()).unwrap();
    forked(fork, || {
        every_call_says_forked(&scene, &object, lease_of_child);
        // The child's memory is its own.
        scene.region.fill(0..4, 0xee).unwrap();
        scene.region.unmap_all().unwrap();
    });
    assert_eq!(scene.region.read(0, before.len()).unwrap(), before);
    assert_eq!(object.state().unwrap(), State::Valid);
    let fence = Fence::new();
    fence.signal(Outcome::Done);
    // SAFETY: nothing is accessed.
    let pending = unsafe { lease.submit([fence], || Ok::<_, Error>(())) }.unwrap();
    assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
    scene.region.unmap_all().unwrap();
    assert_eq!(object.state().unwrap(), State::Invalid);
}

#[test]
// rows (fake): igt/forked-access; peers/memory-missing-in-the-child
fn every_call_of_a_forked_child_says_so_and_the_parent_is_intact() {
    isolated(|| a_child_is_told(fork)).expect_return();
}

#[test]
fn a_child_made_without_fork_handlers_is_recognised_too() {
    isolated(|| a_child_is_told(bare_clone)).expect_return();
}

#[test]
fn dropping_everything_in_a_child_does_nothing_to_the_device() {
    isolated(|| {
        let scene = Scene::new();
        let object = scene.register();
        let lease = scene.manager.acquire_timeout(&[&object], PATIENCE).unwrap();
        let device = scene.device.clone();
        let pid = fork();
        if pid == 0 {
            drop((lease, object, scene));
            let untouched = device.live_imports() == 1 && device.counts().released == 0;
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(if untouched { FINE } else { 1 }) };
        }
        assert_eq!(wait_for(pid), Some(FINE));
        assert_eq!(device.live_imports(), 1);
        drop((lease, object, scene));
        assert_eq!(device.live_imports(), 0);
    })
    .expect_return();
}

#[test]
fn a_child_may_make_a_manager_of_its_own() {
    isolated(|| {
        let scene = Scene::new();
        let object = scene.register();
        drop(scene.manager.acquire_timeout(&[&object], PATIENCE).unwrap());
        forked(fork, || {
            let own = Scene::new();
            let object = own.register();
            drop(own.manager.acquire_timeout(&[&object], PATIENCE).unwrap());
            own.region.unmap_all().unwrap();
            assert_eq!(object.state().unwrap(), State::Invalid);
        });
        assert_eq!(object.state().unwrap(), State::Valid);
    })
    .expect_return();
}

#[test]
// rows (fake): peers/dereg-after-free-breaks-fork
fn a_child_that_lives_on_does_not_stop_the_parent_from_ending_and_unmapping() {
    for (case, fork) in [("fork", fork as fn() -> libc::pid_t), ("clone", bare_clone)] {
        pinfold_tests::process::isolated_case(case, PATIENCE, move || {
            let scene = Scene::new();
            let object = scene.register();
            drop(scene.manager.acquire_timeout(&[&object], PATIENCE).unwrap());
            let moved = Region::new(Backing::Anonymous, 4).unwrap();
            // SAFETY: no reference points into a region.
            let mover = unsafe { scene.manager.register(moved.range(), Access::Read) }.unwrap();
            drop(scene.manager.acquire_timeout(&[&mover], PATIENCE).unwrap());
            let moved = moved.relocate(0..4, pinfold_tests::memory::Move::DontUnmap).unwrap();
            let pid = fork();
            if pid == 0 {
                loop {
                    // SAFETY: sleeps until the parent kills this process.
                    unsafe { libc::pause() };
                }
            }
            let Scene { manager, device, region } = scene;
            drop((object, mover, manager));
            assert_eq!(device.live_imports(), 0);
            // With a context that lives on in the child, each of these would wait for a reader that doesn't exist.
            region.advise(0..4, libc::MADV_DONTNEED).unwrap();
            region.unmap_all().unwrap();
            moved.unmap_all().unwrap();
            // SAFETY: the process is this one's child, and has not been waited for.
            unsafe { libc::kill(pid, libc::SIGKILL) };
            assert_eq!(wait_for(pid), None);
        })
        .expect_return();
    }
}

#[test]
// rows (fake): peers/child-deadlocks
fn forks_of_a_busy_parent_neither_hang_nor_disturb_it() {
    isolated(|| {
        let scene = Scene::new();
        let object = scene.register();
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let Ok(lease) = scene.manager.acquire_timeout(&[&object], PATIENCE) else { continue };
                        let fence = Fence::new();
                        fence.signal(Outcome::Done);
                        // SAFETY: nothing is accessed.
                        drop(unsafe { lease.submit([fence], || Ok::<_, Error>(())) });
                    }
                });
            }
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    scene.region.advise(0..4, libc::MADV_DONTNEED).unwrap();
                }
            });
            for _ in 0..100 {
                forked(fork, || {
                    if !matches!(object.state(), Ok(State::DeadAfterFork)) {
                        // SAFETY: ends the child at once.
                        unsafe { libc::_exit(1) };
                    }
                });
            }
            stop.store(true, Ordering::Relaxed);
        });
        scene.manager.acquire_timeout(&[&object], PATIENCE).unwrap();
        assert_eq!(scene.manager.stats().late, 0);
    })
    .expect_return();
}
