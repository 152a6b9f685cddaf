//! What IGT's tests of the kernel's userptr do, and no other program here: on the devices in software, and in processes that end.

#[macro_use]
mod userptr;

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;

use pinfold_core::{Outcome, State};
use pinfold_tests::PATIENCE;
use pinfold_tests::memory::{Backing, Region};
use pinfold_tests::process::{Verdict, isolated_case};

use userptr::{Fake, Rig, register, wait_for_mutator};

for_devices!([fake dma] igt {
    probe
    huge_split
    stress_mm_invalidate_close
    sizes
    mlocked
});

/// A process whose objects are in use, and whose mutators are held, ends at once, by exit or by becoming another program.
#[test]
// rows (fake): igt/process-exit{,-busy}
fn process_exit_busy() {
    for (case, verdict) in [("idle", Verdict::Exited(5)), ("exit", Verdict::Exited(5)), ("exec", Verdict::Exited(6))] {
        let ending = isolated_case(case, PATIENCE, move || {
            let rig = Fake::new();
            let region = Region::new(Backing::Anonymous, 4).unwrap();
            let object = register(&rig.manager, region.range());
            if case != "idle" {
                let work = rig.start(rig.manager.acquire_timeout(&[&object], PATIENCE).unwrap()).unwrap();
                std::mem::forget(work); // it never ends
                thread::spawn(move || region.unmap_all().unwrap());
                wait_for_mutator();
            }
            if case == "exec" {
                // Returns only if it fails.
                panic!("{}", Command::new("/bin/sh").args(["-c", "exit 6"]).exec());
            }
            std::process::exit(5);
        });
        ending.expect(verdict);
    }
}

/// A raw system call is noticed like one through the C library.
#[test]
// rows (fake): peers/raw-system-calls-are-missed; peers/first-touch-hangs
fn raw_system_calls_and_first_touches() {
    let _alone = userptr::alone();
    let rig = Fake::new();
    let region = Region::untouched(Backing::Anonymous, 4).unwrap();
    let object = register(&rig.manager, region.range());
    drop(rig.manager.acquire_timeout(&[&object], PATIENCE).unwrap());
    // SAFETY: numbers only; no reference points into a region.
    let advised =
        unsafe { libc::syscall(libc::SYS_madvise, region.range().start(), region.range().len(), libc::MADV_DONTNEED) };
    assert_eq!((advised, object.state().unwrap()), (0, State::Invalid));
    // Absent pages of a watched range: the first read and the first write return.
    assert_eq!(region.present(), 0);
    assert_eq!(region.read(0, 1).unwrap(), [0]);
    region.fill(1..2, 3).unwrap();
    rig.written(region.range());
    let work = rig.start(rig.manager.acquire_timeout(&[&object], PATIENCE).unwrap()).unwrap();
    assert_eq!(work.pending.poll(), None::<Outcome>);
    assert_eq!(work.finish()[1], userptr::filled(3));
}
