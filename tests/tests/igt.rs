//! What IGT's tests of the kernel's userptr do, and no other program here: on the devices in software, and in processes that end.

mod stranger;
#[macro_use]
mod userptr;

use std::os::unix::process::CommandExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::thread;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use pinfold_core::{Coverage, ManualReason, Outcome, State, page_size};
use pinfold_tests::PATIENCE;
use pinfold_tests::memory::{Backing, Region};
use pinfold_tests::process::{Verdict, isolated, isolated_case};
use pinfold_tests::skip;

use stranger::Stranger;
use userptr::{Fake, Rig, device_sees, filled, patient, program_sees, register, wait_for_mutator, wait_until};

for_devices!([fake dma] igt {
    probe
    huge_split
    stress_mm_invalidate_close
    sizes
    mlocked
    prefetch
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

/// Memory whose pages somebody else has to bring keeps its own acquirer waiting, and nobody else.
#[test]
// rows (fake): igt/userfault
fn userfault() {
    isolated(|| {
        let stranger = match Stranger::of_kernel_faults() {
            Ok(stranger) => stranger,
            Err(e) => skip!("no userfaultfd that answers for the kernel: {e}"),
        };
        let rig = Fake::new();
        let (theirs, ours) =
            (Region::untouched(Backing::Anonymous, 2).unwrap(), Region::new(Backing::Anonymous, 2).unwrap());
        stranger.register(theirs.range()).unwrap();
        let (waiting, other) = (register(&rig.manager, theirs.range()), register(&rig.manager, ours.range()));
        assert!(rig.manager.acquire(&[&waiting]).unwrap_err().is_again());
        wait_until("the fault of the acquirer", || stranger.is_asked());
        assert_eq!(waiting.state().unwrap(), State::Acquiring);
        // Acquiring, using and mutating other memory wait for nothing meanwhile.
        assert_eq!(device_sees(&rig, &other), program_sees(&ours));
        ours.map_over(0..1).unwrap();
        assert_eq!(other.state().unwrap(), State::Invalid);
        assert_eq!(device_sees(&rig, &other), program_sees(&ours));
        assert_eq!(waiting.state().unwrap(), State::Acquiring);
        for page in 0..2 {
            stranger.bring(theirs.part(page..page + 1), 0x33).unwrap();
        }
        assert_eq!(device_sees(&rig, &waiting), [filled(0x33); 2]);
        assert_eq!(waiting.coverage(), Some(Coverage::Manual(ManualReason::Foreign)));
    })
    .expect_return();
}

extern "C" fn nothing(_: i32) {}

/// From now on, system calls of this process are interrupted.
fn interrupt_system_calls() {
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing.
    unsafe { sigaction(Signal::SIGALRM, &action) }.unwrap();
    let tick = libc::timeval { tv_sec: 0, tv_usec: 500 };
    let timer = libc::itimerval { it_interval: tick, it_value: tick };
    // SAFETY: both pointers are null or point to a value of this frame.
    assert_eq!(unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) }, 0);
}

/// Two managers over the same objects, more than either's budget takes; each is used, changed, and pressed to give pages back.
fn storm() {
    const OBJECTS: usize = 8;
    let rig = || {
        let mut config = patient();
        config.budget = 3 * page_size() as u64;
        Fake::with(config)
    };
    let rigs = [rig(), rig()];
    let region = Region::new(Backing::Anonymous, OBJECTS).unwrap();
    let part = |page: usize| region.part(page..page + 1);
    let objects = [0, 1].map(|of| (0..OBJECTS).map(|page| register(&rigs[of].manager, part(page))).collect::<Vec<_>>());
    for round in 0..12 * OBJECTS {
        let (page, byte) = (round * 5 % OBJECTS, u8::try_from(round % 250).unwrap());
        if round % 3 == 0 {
            region.map_over(page..page + 1).unwrap();
        }
        region.fill(page..page + 1, byte).unwrap();
        rigs[0].written(part(page)); // all managers of a process are told by one
        if round % 7 == 0 {
            region.advise(0..OBJECTS, libc::MADV_PAGEOUT).unwrap();
        }
        for (rig, objects) in rigs.iter().zip(&objects) {
            assert_eq!(device_sees(rig, &objects[page]), [filled(byte)], "round {round}");
        }
        if round % 11 == 0 {
            rigs[round % 2].manager.shrink(u64::MAX);
        }
    }
    for rig in &rigs {
        let stats = rig.manager.stats();
        assert!(stats.evicted > 0 && stats.shrunk_bytes > 0, "{stats:?}");
    }
}

/// Forked processes side by side, each with managers of its own, also with system calls that are interrupted, and a parent whose object is in use.
#[test]
// rows (fake): igt/forked-{sync,unsync}{,-swapping}{,-multifd}{,-mempressure}-{normal,interruptible}
fn forked() {
    const FINE: i32 = 7;
    isolated(|| {
        let rig = Fake::new();
        let region = Region::new(Backing::Anonymous, 4).unwrap();
        let object = register(&rig.manager, region.range());
        let work = rig.start(rig.manager.acquire_timeout(&[&object], PATIENCE).unwrap()).unwrap();
        let expected = program_sees(&region);
        let children: Vec<libc::pid_t> = (0..4)
            .map(|child| {
                // SAFETY: the child uses what it makes itself, with a C library that survives forks, and leaves by `_exit`.
                let pid = unsafe { libc::fork() };
                if pid == 0 {
                    let body = || {
                        if child % 2 == 1 {
                            interrupt_system_calls();
                        }
                        storm();
                    };
                    let code = if catch_unwind(AssertUnwindSafe(body)).is_ok() { FINE } else { 1 };
                    // SAFETY: ends the child at once; nothing of the parent's is run.
                    unsafe { libc::_exit(code) };
                }
                assert!(pid > 0, "{}", std::io::Error::last_os_error());
                pid
            })
            .collect();
        storm();
        for child in children {
            let mut status = 0;
            // SAFETY: the status is an int of this frame.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
            assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == FINE, "a child ended by {status:#x}");
        }
        assert_eq!(work.finish(), expected);
        assert_eq!((object.state().unwrap(), rig.manager.stats().late), (State::Valid, 0));
    })
    .expect_return();
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
