//! Every call that the kernel may refuse is refused: what is said of it, and what is left behind.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::fault::{Call, meanwhile, refuse, refused};
use crate::uffd::{Uffd, feature};
use crate::{
    Change, Coverage, DirtyTracker, HostRange, ManualReason, Missing, Shards, Space, SpaceError, Taken, Target,
    WatchError, WatchSpan, Watched, any_present, mappings, missing, monitor, page_size, still_watched,
};

const PATIENCE: Duration = Duration::from_secs(60);
const ALWAYS: u32 = u32::MAX;

#[derive(Default)]
struct Counts(AtomicU64);

impl Target for Counts {
    fn invalidated(&self, _: &Change) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    fn settled(self: Arc<Self>) {}

    fn shards(&self) -> Shards {
        Shards::ALL
    }
}

/// A space of the test's own, that no other test has a share in.
fn space() -> Result<Space, SpaceError> {
    Space::start(1_000_000_000)
}

/// Four pages: two, one that may not be written, one. Between two that may not be touched, so that no other test's memory joins them.
struct Memory(HostRange);

impl Memory {
    fn new() -> Self {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping anywhere; nothing is replaced.
        let at = unsafe { libc::mmap(ptr::null_mut(), 6 * page_size(), libc::PROT_NONE, flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        let memory = Self(HostRange::new(at.expose_provenance() + page_size(), 4 * page_size()).unwrap());
        let write = libc::PROT_READ | libc::PROT_WRITE;
        for (page, protection) in [write, write, libc::PROT_READ, write].into_iter().enumerate() {
            let at = ptr::with_exposed_provenance_mut(memory.page(page).start());
            // SAFETY: a page of the mapping just made, which no reference points into.
            assert_eq!(unsafe { libc::mprotect(at, page_size(), protection) }, 0);
        }
        memory
    }

    /// As [`new`](Self::new), but all four pages may be written, and are one mapping.
    fn writable() -> Self {
        let memory = Self::new();
        map(memory.0);
        memory
    }

    fn page(&self, at: usize) -> HostRange {
        HostRange::new(self.0.start() + at * page_size(), page_size()).unwrap()
    }

    /// Which pages somebody watches.
    fn watched(&self) -> [bool; 4] {
        let (stranger, _) = Uffd::open(feature::WANTED).unwrap();
        std::array::from_fn(|page| match stranger.register(self.page(page)) {
            Ok(()) => false,
            Err(error) => error.raw_os_error() == Some(libc::EBUSY),
        })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: memory of the test, which no reference points into.
        unsafe { libc::munmap(ptr::with_exposed_provenance_mut(self.0.start()), self.0.len()) };
    }
}

/// Maps writable pages there, in the place of what is there.
fn map(range: HostRange) {
    let (at, flags) = (ptr::with_exposed_provenance_mut(range.start()), libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, flags | libc::MAP_FIXED);
    // SAFETY: memory of the test, which no reference points into.
    assert_eq!(unsafe { libc::mmap(at, range.len(), protection, flags, -1, 0) }, at);
}

fn unmap(range: HostRange) {
    // SAFETY: as in `map`.
    assert_eq!(unsafe { libc::munmap(ptr::with_exposed_provenance_mut(range.start()), range.len()) }, 0);
}

/// The question that ends a watch: which mappings there are.
fn last_question() -> Call {
    let page = HostRange::new(page_size(), page_size()).unwrap();
    let asks = |call| {
        let _ = refuse(call, 0, 1, libc::EPERM, || mappings(page));
        refused() > 0
    };
    if asks(Call::Query) { Call::Query } else { Call::Text }
}

/// Whether anything can be watched here at all.
fn is_possible() -> bool {
    let open = Uffd::open(feature::WANTED);
    if let Err(error) = &open {
        println!("SKIP {}: no userfaultfd here: {error}", std::thread::current().name().unwrap_or("?"));
    }
    open.is_ok()
}

type Check = fn(&Result<Watched, WatchError>) -> bool;

const IS_WATCHED: Check = |answer| answer.as_ref().is_ok_and(|watched| watched.coverage == Coverage::Watched);
const IS_MOVING: Check = |answer| matches!(answer, Err(WatchError::Moving { .. }));
const IS_REFUSED: Check = |answer| matches!(answer, Err(WatchError::Refused { .. }));
const HAS_TOO_MANY: Check = |answer| matches!(answer, Err(WatchError::TooManyMappings { limit: 1.., .. }));
const IS_FOREIGN: Check =
    |answer| answer.as_ref().is_ok_and(|watched| watched.coverage == Coverage::Manual(ManualReason::Foreign));
const IS_READ_ONLY: Check =
    |answer| answer.as_ref().is_ok_and(|watched| watched.coverage == Coverage::Manual(ManualReason::SharedReadOnly));

#[test]
fn a_mapping_that_was_not_among_those_asked_for_is_moving() {
    if !is_possible() {
        return;
    }
    let (space, memory) = (space().unwrap(), Memory::new());
    space.insert(memory.0, 1, Arc::new(Counts::default()));
    let known = mappings(memory.0).unwrap();
    let second = ptr::with_exposed_provenance_mut(memory.page(1).start());
    // SAFETY: a page of the test's, which no reference points into.
    assert_eq!(unsafe { libc::mprotect(second, page_size(), libc::PROT_READ) }, 0);
    // All of it can be watched, and page 1 begins a mapping that wasn't there when the list was made.
    let answer = space.watch_as(memory.0, &known);
    assert!(IS_MOVING(&answer), "{answer:?}");
    let answer = space.watch(memory.0);
    assert!(IS_WATCHED(&answer), "{answer:?}");
    space.remove(memory.0, 1);
}

#[test]
fn a_hole_that_is_filled_while_its_range_is_being_watched_is_moving() {
    if !is_possible() {
        return;
    }
    let last = last_question();
    for hole in 0..4 {
        let (space, memory) = (space().unwrap(), Memory::writable());
        let (range, hole) = (memory.0, memory.page(hole));
        space.insert(range, 1, Arc::new(Counts::default()));
        let known = mappings(range).unwrap();
        assert_eq!(known.len(), 1);
        // Registered without the hole, and then listed without one.
        unmap(hole);
        let answer = meanwhile(last, move || map(hole), || space.watch_as(range, &known));
        assert!(IS_MOVING(&answer), "{hole}: {answer:?}");
        let answer = space.watch_as(range, &mappings(range).unwrap());
        assert!(IS_WATCHED(&answer), "{hole}: {answer:?}");
        assert_eq!(memory.watched(), [true; 4]);
        space.remove(range, 1);
    }
}

#[test]
fn a_hole_is_not_taken_for_watched_because_the_mapping_around_it_is() {
    if !is_possible() {
        return;
    }
    let (space, memory) = (space().unwrap(), Memory::writable());
    let hole = memory.page(1);
    space.insert(hole, 1, Arc::new(Counts::default()));
    let known = mappings(hole).unwrap();
    assert_eq!(known[0].whole, memory.0);
    unmap(hole);
    // Behind the registration of all of the mapping, of which the rest is there.
    let watch = || space.watch_spanning(hole, &known, WatchSpan::Mapping);
    let answer = meanwhile(Call::Protect, move || map(hole), watch);
    assert!(IS_MOVING(&answer), "{answer:?}");
    assert_eq!(memory.watched(), [true, false, true, true]);
    space.remove(hole, 1);
}

#[test]
fn what_is_replaced_before_it_is_listed_has_been_told() {
    if !is_possible() {
        return;
    }
    let last = last_question();
    let (space, memory, counts) = (space().unwrap(), Memory::writable(), Arc::new(Counts::default()));
    let range = memory.0;
    space.insert(range, 1, Arc::<Counts>::clone(&counts));
    let known = mappings(range).unwrap();
    let answer = meanwhile(last, move || map(range), || space.watch_as(range, &known));
    assert!(IS_WATCHED(&answer), "as it was: {answer:?}");
    assert!(space.wait_open(Shards::ALL, Instant::now() + PATIENCE));
    assert_eq!(counts.0.load(Ordering::SeqCst), 1);
    space.remove(range, 1);
}

#[test]
fn a_watch_that_is_refused_says_so_leaves_nothing_unrecorded_and_works_the_next_time() {
    if !is_possible() {
        return;
    }
    let cases: [(Call, i32, u32, Check); 17] = [
        // One shard after the other may be the owner; if none is, a stranger is.
        (Call::Register, libc::EBUSY, 1, IS_WATCHED),
        (Call::Register, libc::EBUSY, ALWAYS, IS_FOREIGN),
        (Call::Register, libc::EPERM, ALWAYS, IS_READ_ONLY),
        (Call::Register, libc::EINVAL, 1, IS_MOVING),
        (Call::Register, libc::EINVAL, ALWAYS, IS_MOVING),
        // All of the mapping instead, which needs no split.
        (Call::Register, libc::ENOMEM, 1, IS_WATCHED),
        (Call::Register, libc::ENOMEM, ALWAYS, HAS_TOO_MANY),
        (Call::Register, libc::EFAULT, 1, IS_REFUSED),
        (Call::Register, libc::EAGAIN, 1, IS_REFUSED),
        (Call::Register, libc::EINTR, 1, IS_REFUSED),
        (Call::Register, libc::EBADF, ALWAYS, IS_REFUSED),
        (Call::Probe, libc::EAGAIN, ALWAYS, IS_WATCHED),
        // The text tells as much.
        (Call::Query, libc::ENOMEM, 1, IS_WATCHED),
        (Call::Query, libc::EPERM, ALWAYS, IS_WATCHED),
        (Call::Query, libc::EMFILE, ALWAYS, IS_WATCHED),
        (Call::Query, libc::EINTR, 1, IS_WATCHED),
        (Call::Query, libc::EIO, ALWAYS, IS_WATCHED),
    ];
    for (call, errno, times, expected) in cases {
        // At its first turn, and wherever else it may come: mappings before it are watched already.
        for before in 0..6 {
            let what = format!("{call:?} {errno} after {before}");
            let (space, memory, counts) = (space().unwrap(), Memory::new(), Arc::new(Counts::default()));
            space.insert(memory.0, 1, Arc::<Counts>::clone(&counts));
            let answer = refuse(call, before, times, errno, || space.watch(memory.0));
            assert!(expected(&answer) || refused() == 0, "{what}: {answer:?}");
            if let Err(error) = &answer {
                assert!(
                    error.to_string().contains(&format!("{:#x}", memory.0.start())) || before > 0,
                    "{what}: {error}"
                );
            }
            // What the kernel watches is in the ledger, so that it can be ended.
            let recorded = std::array::from_fn(|page| space.is_watched(memory.page(page)));
            assert_eq!(memory.watched(), recorded, "{what}: {answer:?}");

            let again = space.watch(memory.0);
            assert!(IS_WATCHED(&again), "{what}: {again:?}");
            assert_eq!(memory.watched(), [true; 4], "{what}");
            // SAFETY: memory of the test, which no reference points into.
            unsafe {
                libc::madvise(ptr::with_exposed_provenance_mut(memory.0.start()), page_size(), libc::MADV_DONTNEED)
            };
            assert!(space.wait_open(Shards::ALL, Instant::now() + PATIENCE));
            assert_eq!(counts.0.load(Ordering::SeqCst), 1, "{what}");
            space.remove(memory.0, 1);
            assert_eq!(memory.watched(), [false; 4], "{what}");
        }
    }
}

#[test]
fn an_end_of_a_watch_that_is_refused_is_made_up_for_at_the_end_of_the_space() {
    if !is_possible() {
        return;
    }
    for errno in [libc::ENOMEM, libc::EAGAIN, libc::EBUSY] {
        let (space, memory) = (space().unwrap(), Memory::new());
        space.insert(memory.0, 1, Arc::new(Counts::default()));
        assert!(IS_WATCHED(&space.watch(memory.0)));
        refuse(Call::Unregister, 0, ALWAYS, errno, || space.remove(memory.0, 1));
        assert_eq!((memory.watched(), space.is_watched(memory.0)), ([true; 4], true), "{errno}");
        drop(space);
        assert_eq!(memory.watched(), [false; 4], "{errno}");
    }
}

#[test]
fn a_bracket_that_can_not_end_the_watch_is_held_by_nobody() {
    if !is_possible() {
        return;
    }
    let (space, memory, counts) = (space().unwrap(), Memory::new(), Arc::new(Counts::default()));
    space.insert(memory.0, 1, Arc::<Counts>::clone(&counts));
    assert!(IS_WATCHED(&space.watch(memory.0)));
    let range = memory.0;
    let mutation = || {
        drop(memory); // waits for the monitor, as it is watched still
        counts.0.load(Ordering::SeqCst)
    };
    let told = refuse(Call::Unregister, 0, ALWAYS, libc::ENOMEM, || space.mutate(&[range], mutation)).unwrap();
    assert!(told >= 1, "by the bracket at least");
    assert!(space.wait_open(Shards::ALL, Instant::now() + PATIENCE));
    assert!(!space.is_watched(range));
    space.remove(range, 1);
}

#[test]
fn a_space_that_is_refused_says_what_it_lacks_or_does_without() {
    if !is_possible() {
        return;
    }
    for call in [Call::Open, Call::Api, Call::Epoll, Call::EventFd, Call::Thread, Call::Query, Call::Mark] {
        for errno in [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::EPERM, libc::ENOSYS, libc::EAGAIN] {
            for before in [0, 1, 2, 7, 31] {
                let made = refuse(call, before, ALWAYS, errno, space);
                let what = format!("{call:?} {errno} after {before}");
                let scarce = matches!(errno, libc::EMFILE | libc::ENFILE | libc::ENOMEM);
                match made {
                    Ok(_) if refused() == 0 || matches!(call, Call::Query | Call::Mark) => {}
                    // No userfaultfd for us: everything is said to be manual, also where some shards had got theirs.
                    Ok(space) => {
                        assert!(matches!(call, Call::Open | Call::Api) && !scarce, "{what}");
                        let memory = Memory::new();
                        let watched = space.watch(memory.0).unwrap();
                        assert_eq!(watched.coverage, Coverage::Manual(ManualReason::NoUserfaultfd), "{what}");
                        assert_eq!(memory.watched(), [false; 4], "{what}");
                    }
                    Err(error @ SpaceError::Setup { .. }) => {
                        assert!(scarce || !matches!(call, Call::Open | Call::Api), "{what}");
                        assert!(error.to_string().contains("(ulimit -"), "{what}: {error}");
                    }
                    Err(error) => panic!("{what}: {error}"),
                }
            }
        }
    }
}

#[test]
fn after_a_round_that_came_to_no_end_everybody_is_told_and_the_gates_are_open() {
    let (space, memory, counts) = (space().unwrap(), Memory::new(), Arc::new(Counts::default()));
    space.insert(memory.0, 1, Arc::<Counts>::clone(&counts));
    for shard in [0, 3, 15] {
        space.gate(shard).close();
    }
    space.inner.monitor.leave_closed(Shards(1 | 1 << 3 | 1 << 15));
    monitor::recover(&space.inner);
    assert_eq!(counts.0.load(Ordering::SeqCst), 1);
    assert!((0..crate::SHARDS).all(|shard| space.gate(shard).is_open()));
    let end = Instant::now() + PATIENCE;
    while space.inner.forgotten.load(Ordering::SeqCst) {
        assert!(Instant::now() < end, "the ledger is compared");
        std::thread::yield_now();
    }
    assert_eq!(space.stats().recoveries, 1);
}

#[test]
fn who_finds_the_gates_open_after_a_recovery_finds_it_counted() {
    let space = space().unwrap();
    // So that nobody compares it. Who does may get hold of what another test has just ceased to watch, and the monitor be sent an event of it:
    // the end of its round would make it forget the gate that is left closed.
    let _ledger = space.inner.ledger();
    for round in 1..=2000 {
        space.gate(15).close();
        space.inner.monitor.leave_closed(Shards(1 << 15));
        std::thread::scope(|scope| {
            // Asleep, so that opening the gate takes a system call, behind which the one who looks all the time may come.
            let (gate, epoch) = (space.gate(15), space.gate(15).epoch());
            scope.spawn(move || gate.wait_epoch(epoch, Some(Instant::now() + PATIENCE)));
            let recovery = scope.spawn(|| monitor::recover(&space.inner));
            while !space.gate(15).is_open() && !recovery.is_finished() {
                std::hint::spin_loop();
            }
            assert_eq!(space.stats().recoveries, round);
        });
    }
}

#[test]
fn page_tables_that_can_not_be_asked_tell_nothing_and_everything_counts_as_written() {
    let memory = Memory::new();
    let page = memory.page(0);
    // SAFETY: a writable page of the test, which no reference points into.
    unsafe { ptr::with_exposed_provenance_mut::<u8>(page.start()).write_volatile(1) };
    if any_present(page).unwrap().is_none() {
        return println!("SKIP {}: no PAGEMAP_SCAN here", std::thread::current().name().unwrap_or("?"));
    }
    for errno in [libc::ENOTTY, libc::EACCES, libc::EPERM] {
        assert_eq!(refuse(Call::Scan, 0, ALWAYS, errno, || any_present(page)).unwrap(), None, "{errno}");
    }
    for errno in [libc::ENOMEM, libc::EMFILE, libc::EINTR] {
        let error = refuse(Call::Scan, 0, ALWAYS, errno, || any_present(page)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(errno));
        assert_eq!(refuse(Call::Scan, 0, ALWAYS, errno, || still_watched(page)), None, "{errno}");
    }
    let mut shown = Vec::new();
    let show = || {
        missing(page, Missing::Absent, |part| {
            shown.push(part);
            Ok::<_, ()>(())
        })
    };
    refuse(Call::Scan, 0, ALWAYS, libc::ENOTTY, show).unwrap();
    assert_eq!(shown, [page], "what nobody tells is missing");
    assert_eq!(refuse(Call::Scan, 0, 1, libc::EPERM, || still_watched(page)), Some(false), "that it isn't watched");
    assert_eq!(refuse(Call::Scan, 0, ALWAYS, libc::EPERM, || still_watched(page)), None, "that nothing may be asked");

    // Whichever of its questions is refused, a tracker tells all of the range, and tracks anew.
    let mut tracker = DirtyTracker::new(page);
    if tracker.refused().is_some() {
        return;
    }
    for before in 0..3 {
        for errno in [libc::ENOMEM, libc::ENOTTY, libc::EINTR] {
            let mut written = Vec::new();
            let taken = refuse(Call::Scan, before, 1, errno, || tracker.take(&mut written));
            let expected = if refused() == 0 { Taken::Exact } else { Taken::Everything };
            assert_eq!(taken, expected, "{errno} after {before}");
            assert!(taken == Taken::Exact || written == [page], "{written:?}");
        }
    }
    let mut written = Vec::new();
    assert_eq!((tracker.take(&mut written), written.len()), (Taken::Exact, 0));
    let refused_for_good = refuse(Call::Scan, 0, ALWAYS, libc::ENOMEM, || tracker.take(&mut written));
    assert_eq!((refused_for_good, written.as_slice()), (Taken::Everything, &[page][..]));
    assert_eq!(tracker.refused().unwrap().raw_os_error(), Some(libc::ENOMEM));
}
