//! What went wrong in registration caches, and goes wrong in nobody's sight: tests named after the fault.
//!
//! `tests/README.md` lists all of these faults, the tests of other programs that answer them, and those that can't come up here: no code is patched and
//! no symbol hooked (so nothing races with a running thread over it), and no lock is taken around a lookup.

mod userptr;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use pinfold_core::{State, Userptr};
use pinfold_tests::PATIENCE;
use pinfold_tests::memory::{Backing, Region};
use pinfold_tests::process::isolated;

use userptr::{Fake, alone, assert_taken_back, register};

/// An old object's end, which a worker brings about later, must not end the watch of a new one at the same address.
#[test]
// rows (fake): peers/late-unsubscribe-drops-a-newer-registration
fn a_late_end_of_an_old_registration_ends_a_newer_one_at_the_same_address() {
    let _alone = alone();
    let rig = Fake::new();
    let region = Region::new(Backing::Anonymous, 2).unwrap();
    let mut old: Option<Userptr<_>> = None;
    for round in 0..300 {
        let object = register(&rig.manager, region.range());
        // Before, between and behind the steps of the new one.
        if round % 3 == 0 {
            old = None;
        }
        drop(rig.manager.acquire_timeout(&[&object], PATIENCE).unwrap());
        if round % 3 == 1 {
            old = None;
        }
        let generation = object.generation().unwrap();
        assert_eq!(object.state().unwrap(), State::Valid);
        region.map_over(0..2).unwrap();
        assert_taken_back(&object, generation);
        drop(rig.manager.acquire_timeout(&[&object], PATIENCE).unwrap());
        drop(old.replace(object));
    }
    drop(old);
    rig.device.wait_no_imports();
}

/// Many threads fork at once, while others mutate, also in brackets, and acquire. Each child allocates, which it could not if a thread of the parent
/// had taken the allocator's lock with it; and it is told what it is.
#[test]
// rows (fake): peers/child-deadlocks; igt/forked-access
fn a_storm_of_forks_leaves_a_child_in_a_lock() {
    isolated(|| {
        let rig = Fake::new();
        let region = Region::new(Backing::Anonymous, 4).unwrap();
        let object = register(&rig.manager, region.range());
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let (rig, region, object, stop) = (&rig, &region, &object, &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    region.advise(0..1, libc::MADV_DONTNEED).unwrap();
                    rig.manager.mutate(&[region.part(1..3)], || region.map_over(1..3).unwrap()).unwrap();
                }
            });
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    drop(rig.manager.acquire_timeout(&[object], PATIENCE).unwrap());
                }
            });
            let forkers: Vec<_> = (0..4).map(|_| scope.spawn(move || (0..25).for_each(|_| fork_one(object)))).collect();
            let ends: Vec<_> = forkers.into_iter().map(thread::ScopedJoinHandle::join).collect();
            stop.store(true, Ordering::Relaxed);
            ends.into_iter().for_each(|end| end.unwrap());
        });
        drop(rig.manager.acquire_timeout(&[&object], PATIENCE).unwrap());
        assert_eq!(rig.manager.stats().space.late, 0);
    })
    .expect_return();
}

fn fork_one<D: pinfold_core::Device>(object: &Userptr<D>) {
    // SAFETY: the child allocates, by a C library that survives forks, looks at what is its own, and leaves by _exit.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork: {}", std::io::Error::last_os_error());
    if pid == 0 {
        let block = std::hint::black_box(vec![1_u8; 100_000]);
        let told = matches!(object.state(), Ok(State::DeadAfterFork));
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(if told && block[99_999] == 1 { 7 } else { 1 }) };
    }
    let mut status = 0;
    // SAFETY: `status` is a live int of this frame.
    let got = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert_eq!(got, pid);
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 7, "the child ended otherwise: {status:#x}");
}
