//! What goes wrong around the watcher: no descriptors, signals in every call, handlers that panic, a monitor that is gone, and the end of the
//! process while somebody is held.

mod support;

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use pinfold_invalidate::{Change, Coverage, ManualReason, Shards, Space, SpaceError, Target, mapping_at};
use support::{
    DONE, Memory, Stranger, Told, advise, all_told, is_watched, isolated, map_over, skip, unmap, wait_until,
};

fn space(test: &str, deadline: Duration) -> Option<Arc<Space>> {
    if let Err(error) = Stranger::new() {
        skip(test, format_args!("no userfaultfd here: {error}"));
        return None;
    }
    Some(Space::get(deadline).unwrap())
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count() - 1
}

/// Opens all descriptors that the process may have, some hundred.
fn take_all_descriptors() -> Vec<File> {
    // SAFETY: zero is a valid limit.
    let mut limit: libc::rlimit = unsafe { std::mem::zeroed() };
    // SAFETY: the structure lives through the call, which writes it.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) }, 0);
    limit.rlim_cur = limit.rlim_cur.min(256);
    // SAFETY: the structure lives through the call.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }, 0);
    std::iter::from_fn(|| File::open("/dev/null").ok()).collect()
}

#[test]
fn a_space_without_descriptors_says_so_and_a_watch_needs_none() {
    const TEST: &str = "a_space_without_descriptors_says_so_and_a_watch_needs_none";
    isolated(TEST, || {
        if let Err(error) = Stranger::new() {
            return skip(TEST, format_args!("no userfaultfd here: {error}"));
        }
        mapping_at(0).unwrap(); // the kernel's list of mappings is opened once
        let before = descriptors();
        let mut hogs = take_all_descriptors();
        let mut refused = 0;
        let space = loop {
            match Space::get(Duration::from_secs(10)) {
                Ok(space) => break space,
                Err(error @ SpaceError::Setup { .. }) => assert!(error.to_string().contains("ulimit -n"), "{error}"),
                Err(error) => panic!("{error}"),
            }
            drop(hogs.pop().expect("it needs no more than there are")); // one more for the next, which is also the listing's now
            assert_eq!(descriptors() - hogs.len(), before, "nothing is left of a space that was refused");
            refused += 1;
        };
        assert!(refused > 16, "one for each shard, and some");
        hogs.extend(std::iter::from_fn(|| File::open("/dev/null").ok()));
        let memory = Memory::new(8);
        let (told, watched) = Told::over(&space, memory.part(2, 3), 1);
        assert_eq!(watched.coverage, Coverage::Watched);
        advise(memory.part(3, 1), libc::MADV_DONTNEED);
        all_told(&space);
        assert_eq!(told.times(), 1);
        space.mutate(&[memory.0], || unmap(memory.0)).unwrap();
        assert_eq!(told.times(), 2);
        std::mem::forget(memory);
    });
}

/// Interrupts every thread of the process but this one until told to stop, and counts in `sent`.
fn storm(stop: &AtomicBool, sent: &AtomicU64) {
    // SAFETY: numbers only.
    let (pid, me) = (unsafe { libc::getpid() }, unsafe { libc::gettid() });
    while !stop.load(Ordering::Relaxed) {
        for task in std::fs::read_dir("/proc/self/task").unwrap() {
            let task: libc::pid_t = task.unwrap().file_name().to_str().unwrap().parse().unwrap();
            if task != me {
                // SAFETY: numbers only; a thread that has ended meanwhile is an error that doesn't matter.
                let went = unsafe { libc::syscall(libc::SYS_tgkill, pid, task, libc::SIGUSR1) } == 0;
                sent.fetch_add(went.into(), Ordering::Relaxed);
            }
        }
        std::thread::yield_now();
    }
}

#[test]
fn signals_in_every_call_of_every_thread_lose_nothing() {
    const TEST: &str = "signals_in_every_call_of_every_thread_lose_nothing";
    const ROUNDS: usize = 300;
    const SIGNALS: u64 = 2000;
    isolated(TEST, || {
        extern "C" fn nothing(_: libc::c_int) {}
        let Some(space) = space(TEST, Duration::from_secs(10)) else { return };
        let handler: extern "C" fn(libc::c_int) = nothing;
        // SAFETY: all zeros is a valid sigaction: nothing blocked, and no SA_RESTART, so that calls end with EINTR.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as libc::sighandler_t;
        // SAFETY: the action lives through the call; its handler does nothing.
        assert_eq!(unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()) }, 0);
        let (stop, sent, memory) = (AtomicBool::new(false), AtomicU64::new(0), Memory::new(16));
        std::thread::scope(|scope| {
            let (stop, sent, space, memory) = (&stop, &sent, &space, &memory);
            scope.spawn(|| storm(stop, sent));
            let mutators = [0, 8].map(|first| {
                scope.spawn(move || {
                    let range = memory.part(first, 2);
                    let told = Told::over_patiently(space, range, first as u64);
                    for round in (0..).take_while(|&n| n < ROUNDS || sent.load(Ordering::Relaxed) < SIGNALS) {
                        let before = told.times();
                        match round % 3 {
                            0 => advise(range, libc::MADV_DONTNEED),
                            1 => map_over(range),
                            _ => space.mutate(&[range], || map_over(range)).unwrap(),
                        }
                        all_told(space);
                        assert!(told.times() > before, "round {round}");
                        told.watch_patiently(space, range);
                    }
                })
            });
            let ends = mutators.map(std::thread::ScopedJoinHandle::join);
            stop.store(true, Ordering::Relaxed);
            ends.into_iter().for_each(|end| end.unwrap());
        });
        let stats = space.stats();
        assert_eq!((stats.late, stats.rescues, stats.recoveries, stats.takeovers), (0, 0, 0, 0));
    });
}

/// A handler with a fault, for once.
struct Faulty {
    /// Times it was called.
    times: AtomicU64,
    fault: fn(),
}

impl Target for Faulty {
    fn invalidated(&self, _: &Change) {
        if self.times.fetch_add(1, Ordering::SeqCst) == 0 {
            (self.fault)();
        }
    }

    fn settled(self: Arc<Self>) {}

    fn shards(&self) -> Shards {
        Shards::ALL
    }
}

/// Three targets over one page, of which the second one's handler fails. Returns the other two, told of a discard.
fn failing(space: &Space, memory: &Memory, fault: fn()) -> [Arc<Told>; 2] {
    let range = memory.part(2, 1);
    let first = Told::over(space, range, 1).0;
    space.insert(range, 2, Arc::new(Faulty { times: AtomicU64::new(0), fault }));
    let last = Told::over(space, range, 3).0;
    advise(range, libc::MADV_DONTNEED); // returns: the read that frees it comes before the handlers
    all_told(space);
    assert!(first.times() > 0 && last.times() > 0, "{first:?} {last:?}");
    [first, last]
}

#[test]
fn a_handler_that_panics_keeps_nobody_from_being_told() {
    const TEST: &str = "a_handler_that_panics_keeps_nobody_from_being_told";
    isolated(TEST, || {
        let Some(space) = space(TEST, Duration::from_secs(10)) else { return };
        let memory = Memory::new(4);
        let others = failing(&space, &memory, || panic!("on purpose"));
        let stats = space.stats();
        assert_eq!((stats.panics, stats.recoveries, stats.takeovers, stats.rescues), (1, 0, 0, 0));
        let before = others[1].times();
        advise(memory.part(2, 1), libc::MADV_DONTNEED);
        all_told(&space);
        assert_eq!(others[1].times(), before + 1);
    });
}

#[test]
fn a_monitor_that_is_gone_is_replaced_and_everybody_is_told() {
    const TEST: &str = "a_monitor_that_is_gone_is_replaced_and_everybody_is_told";
    isolated(TEST, || {
        let Some(space) = space(TEST, Duration::from_secs(1)) else { return };
        let (memory, elsewhere) = (Memory::new(4), Memory::new(4));
        let bystander = Told::over(&space, elsewhere.part(1, 1), 9).0;
        let others = failing(&space, &memory, || {
            // SAFETY: ends the calling thread without unwinding it. What it owned is lost, which is what this test is about.
            unsafe { libc::syscall(libc::SYS_exit, 0) };
        });
        wait_until("the take-over", || space.stats().recoveries == 1);
        all_told(&space);
        assert!(
            space.stats().takeovers == 1 && bystander.times() > 0,
            "nobody knows what was lost: {:?}",
            space.stats()
        );
        // From now on as ever: told, held, watched anew, and ended.
        for round in 0..20 {
            let before = [others[0].times(), bystander.times()];
            others[0].watch_patiently(&space, memory.part(2, 1));
            bystander.watch_patiently(&space, elsewhere.part(1, 1));
            advise(memory.part(2, 1), libc::MADV_DONTNEED);
            map_over(elsewhere.part(1, 1));
            all_told(&space);
            assert!(others[0].times() > before[0] && bystander.times() > before[1], "round {round}");
        }
        bystander.watch_patiently(&space, elsewhere.part(1, 1));
        drop(space);
        assert!(!is_watched(elsewhere.0) && !is_watched(memory.0));
    });
}

/// Ends the process by `end` while one of its threads is held in `munmap`, and sees that this thread never returned from it.
fn ends_while_held(test: &str, end: fn()) {
    let wrote = isolated(test, || {
        let Some(space) = space(test, Duration::from_secs(10)) else { return };
        let memory = Memory::new(4);
        let (_, watched) = Told::over(&space, memory.part(1, 1), 1);
        let shard = watched.shards.iter().next().unwrap();
        space.gate(shard).try_enter().unwrap().begin(); // work that never ends
        let range = memory.0;
        std::mem::forget(memory);
        std::thread::spawn(move || {
            unmap(range);
            println!("the mutator has returned");
        });
        wait_until("the mutator", || space.is_busy(watched.shards) && !space.gate(shard).is_open());
        end();
    });
    assert!(!wrote.contains("has returned"), "{wrote}");
}

#[test]
fn a_process_exits_while_a_mutator_is_held() {
    ends_while_held("a_process_exits_while_a_mutator_is_held", || std::process::exit(DONE));
}

#[test]
fn a_process_becomes_another_program_while_a_mutator_is_held() {
    ends_while_held("a_process_becomes_another_program_while_a_mutator_is_held", || {
        let error = Command::new("/bin/sh").args(["-c", &format!("exit {DONE}")]).exec();
        panic!("{error}");
    });
}

#[test]
fn pages_of_a_strangers_are_manual_and_stay_the_strangers() {
    const TEST: &str = "pages_of_a_strangers_are_manual_and_stay_the_strangers";
    isolated(TEST, || {
        let Some(space) = space(TEST, Duration::from_secs(10)) else { return };
        let memory = Memory::with(8, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        let stranger = Stranger::new().unwrap();
        stranger.take(memory.part(4, 1)).unwrap();
        let (told, watched) = Told::over(&space, memory.part(2, 4), 1);
        assert_eq!(watched.coverage, Coverage::Manual(ManualReason::Foreign));
        assert!(!space.is_watched(memory.part(4, 1)) && !watched.shards.is_empty());
        space.mutate(&[memory.part(4, 1)], || advise(memory.part(4, 1), libc::MADV_DONTNEED)).unwrap();
        assert_eq!(told.times(), 1);
        space.remove(memory.part(2, 4), 1);
        assert!(is_watched(memory.part(4, 1)), "by the stranger still");
        drop(stranger);
        assert!(!is_watched(memory.0));
    });
}
