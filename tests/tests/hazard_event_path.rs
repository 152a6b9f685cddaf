//! The event path neither allocates nor frees, whatever comes along it: this program's allocator ends it if it does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pinfold_core::watch::{Note, NoteCause, UserptrEvent, UserptrNote, WatchConfig, WatchQueue};
use pinfold_core::{Access, Config, Coverage, Error, Manager, Outcome, State, Userptr};
use pinfold_invalidate::{Change, HostRange, Shards, Space, Target};
use pinfold_tests::fake::FakeDevice;
use pinfold_tests::fence::Fence;
use pinfold_tests::fire_door::FireDoorAllocator;
use pinfold_tests::memory::{Backing, Move, Region};
use pinfold_tests::process::{isolated, isolated_case};
use pinfold_tests::{PATIENCE, skip_part, state_of};

#[global_allocator]
static ALLOCATOR: FireDoorAllocator = FireDoorAllocator;

/// A handler that breaks a rule, or none.
struct Handler {
    does: fn(&Self),
    /// What it may unmap; a length of 0 once it has.
    memory: (usize, AtomicUsize),
    told: AtomicBool,
    shards: AtomicU16,
}

impl Handler {
    /// Over memory that is watched from now on.
    fn over(space: &Space, range: HostRange, id: u64, unmaps: Option<HostRange>, does: fn(&Self)) -> Arc<Self> {
        let memory = unmaps.map_or((0, 0), |range| (range.start(), range.len()));
        let memory = (memory.0, AtomicUsize::new(memory.1));
        let handler = Arc::new(Self { does, memory, told: AtomicBool::new(false), shards: AtomicU16::new(0) });
        space.insert(range, id, handler.clone());
        handler.shards.store(space.watch(range).unwrap().shards.0, Ordering::SeqCst);
        handler
    }

    fn unmap(&self) {
        let len = self.memory.1.swap(0, Ordering::SeqCst);
        if len != 0 {
            // SAFETY: a region's pages, into which no reference points; the region has been told to forget them.
            unsafe { libc::munmap(std::ptr::without_provenance_mut(self.memory.0), len) };
        }
    }
}

impl Target for Handler {
    fn invalidated(&self, _: &Change) {
        (self.does)(self);
        self.told.store(true, Ordering::SeqCst);
    }

    fn settled(self: Arc<Self>) {}

    fn shards(&self) -> Shards {
        Shards(self.shards.load(Ordering::SeqCst))
    }
}

#[test]
// rows: peers/free-under-the-monitors-lock
fn a_handler_that_allocates_ends_the_program_and_one_that_does_not_is_left_alone() {
    let run = |does: fn(&Handler)| {
        let space = Space::get(Duration::from_secs(5)).unwrap();
        let region = Region::new(Backing::Anonymous, 1).unwrap();
        let handler = Handler::over(&space, region.range(), 1, None, does);
        region.unmap_all().unwrap();
        assert!(space.wait_open(handler.shards(), Instant::now() + PATIENCE));
        assert!(handler.told.load(Ordering::SeqCst));
    };
    let ending = isolated_case("allocates", PATIENCE, || run(|_| drop(std::hint::black_box(Box::new(1)))));
    ending.expect_signal(libc::SIGABRT);
    isolated_case("does nothing", PATIENCE, || run(|_| {})).expect_return();
}

fn manager(deadline: Duration) -> (Manager<FakeDevice>, WatchQueue) {
    let mut config = Config::default();
    config.deadline = deadline;
    let manager = Manager::new(FakeDevice::new(), config).unwrap();
    let queue = manager.watch(WatchConfig::default()).unwrap();
    (manager, queue)
}

fn valid(manager: &Manager<FakeDevice>, range: HostRange) -> Userptr<FakeDevice> {
    // SAFETY: no reference points into a region.
    let object = unsafe { manager.register(range, Access::Read) }.unwrap();
    drop(manager.acquire_timeout(&[&object], PATIENCE).unwrap());
    object
}

/// What the queue holds about invalidations of this object, of which there is one at least. It may come later than the invalidation is seen: while
/// another thread writes an earlier record, nothing behind that can be read.
fn invalidations(queue: &WatchQueue, object: &Userptr<FakeDevice>) -> Vec<UserptrNote> {
    let ours = |note| match note {
        Note::Userptr(note) if note.object == object.id() && note.event == UserptrEvent::Invalidated => Some(note),
        _ => None,
    };
    let (mut notes, deadline) = (Vec::new(), Instant::now() + PATIENCE);
    while notes.is_empty() {
        assert!(Instant::now() < deadline, "no invalidation of {object:?} is told");
        notes.extend(queue.notes().filter_map(ours));
    }
    notes
}

type Mutate = fn(&Region) -> std::io::Result<()>;

/// Every way in which the kernel is asked to take memory away, and what it reports then.
const MUTATIONS: [(&str, NoteCause, Mutate); 9] = [
    ("munmap", NoteCause::Unmap, |region| region.unmap(1..3)),
    ("MAP_FIXED", NoteCause::Unmap, |region| region.map_over(1..3)),
    ("mremap away", NoteCause::Remap, |region| region.relocate(0..4, Move::Away).map(drop)),
    ("mremap of a part", NoteCause::Remap, |region| region.relocate(1..2, Move::Away).map(drop)),
    ("MREMAP_DONTUNMAP", NoteCause::Remap, |region| region.relocate(0..4, Move::DontUnmap).map(drop)),
    ("mremap to less", NoteCause::Unmap, |region| region.shrink(2)),
    ("MADV_DONTNEED", NoteCause::Remove, |region| region.advise(0..4, libc::MADV_DONTNEED)),
    ("MADV_FREE", NoteCause::Remove, |region| region.advise(0..4, libc::MADV_FREE)),
    ("MADV_REMOVE", NoteCause::Remove, |region| region.advise(0..4, libc::MADV_REMOVE)),
];

#[test]
// rows (fake): selftests/uffd events{,-wp}; peers/debug-print-in-the-hook-allocates
fn no_kind_of_event_allocates_or_frees_and_each_is_told_to_the_watch_queue() {
    isolated(|| {
        let (manager, queue) = manager(Duration::from_secs(5));
        let mut told = [0; MUTATIONS.len()];
        for backing in Backing::ALL.into_iter().filter(|backing| backing.watchable()) {
            for (mutation, &(name, cause, mutate)) in MUTATIONS.iter().enumerate() {
                let region = Region::new(backing, 4).unwrap();
                let object = valid(&manager, region.range());
                let coverage = object.coverage();
                if coverage != Some(Coverage::Watched) {
                    skip_part!("{backing:?}: this kernel tells nothing about it: {coverage:?}");
                    break;
                }
                let (events, generation) = (manager.stats().space.events, object.generation().unwrap());
                let result = mutate(&region);
                if object.generation().unwrap() == generation {
                    // Nothing was done: the kernel refuses this for that kind of memory.
                    let error = result.expect_err("a mutation that was done has been told");
                    assert!(
                        matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EPERM | libc::EACCES)),
                        "{backing:?} {name}: {error}"
                    );
                    continue;
                }
                assert!(manager.stats().space.events > events);
                let notes = invalidations(&queue, &object);
                assert_eq!(notes[0].cause, cause, "{backing:?} {name}: {notes:?}");
                assert!(notes.iter().all(|note| !note.late && !note.no_hold), "{backing:?} {name}: {notes:?}");
                told[mutation] += 1;
            }
        }
        assert!(told.iter().all(|&told| told > 0), "kinds of memory, by mutation: {told:?}");
    })
    .expect_return();
}

#[test]
fn work_that_is_late_and_brackets_over_it_allocate_nothing() {
    isolated(|| {
        let (manager, queue) = manager(Duration::from_millis(30));
        type Mutate<'a> = &'a dyn Fn(&Region);
        let mutations: [(&str, Mutate<'_>); 4] = [
            ("munmap", &|region| region.unmap_all().unwrap()),
            ("madvise", &|region| region.advise(0..2, libc::MADV_DONTNEED).unwrap()),
            ("mutate", &|region| manager.mutate(&[region.range()], || region.unmap_all().unwrap()).unwrap()),
            ("invalidate", &|region| manager.invalidate(region.range()).unwrap()),
        ];
        for (name, mutate) in mutations {
            let region = Region::new(Backing::Anonymous, 2).unwrap();
            let object = valid(&manager, region.range());
            let lease = manager.acquire_timeout(&[&object], PATIENCE).unwrap();
            let fence = Fence::new();
            // SAFETY: the fence is signalled below, and nothing accesses the object.
            let pending = unsafe { lease.submit([fence.clone()], || Ok::<_, Error>(())) }.unwrap();
            mutate(&region);
            assert_eq!(state_of(&object), State::Invalid, "{name}");
            let notes = invalidations(&queue, &object);
            assert_eq!(notes.len(), 1, "{name}: {notes:?}");
            // Only invalidate doesn't wait for work, so none can be late.
            assert_eq!(notes[0].late, name != "invalidate", "{name}");
            fence.signal(Outcome::Done);
            assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
        }
    })
    .expect_return();
}

#[test]
fn what_the_watchdog_reads_is_told_without_an_allocation() {
    isolated(|| {
        let space = Space::get(Duration::from_millis(20)).unwrap();
        let (manager, queue) = manager(Duration::from_millis(20));
        let trap = Region::new(Backing::Anonymous, 2).unwrap();
        let second = Region::new(Backing::Anonymous, 2).unwrap();
        let object = valid(&manager, second.range());
        // The trap's handler unmaps the second, which is watched: the monitor waits for itself.
        let handler = Handler::over(&space, trap.range(), u64::MAX, Some(second.range()), Handler::unmap);
        trap.unmap_all().unwrap();
        assert!(space.wait_open(Shards::ALL, Instant::now() + PATIENCE), "the gates open again");
        assert!(handler.told.load(Ordering::SeqCst));
        assert!(space.stats().rescues >= 1);
        assert_eq!(invalidations(&queue, &object)[0].cause, NoteCause::Unmap);
        assert_eq!(object.state().unwrap(), State::Invalid);
        std::mem::forget(second); // its pages are gone already
    })
    .expect_return();
}

#[test]
fn more_objects_than_the_settle_queue_has_room_for_are_invalidated_and_let_go_of_all_the_same() {
    /// The queue holds 8,192.
    const OBJECTS: usize = 9_000;
    isolated(|| {
        let (manager, queue) = manager(Duration::from_secs(5));
        let region = Region::new(Backing::Anonymous, OBJECTS).unwrap();
        let objects: Vec<_> = (0..OBJECTS).map(|page| valid(&manager, region.part(page..page + 1))).collect();
        assert_eq!(manager.device().live_imports(), OBJECTS);
        assert!(queue.notes().count() > 0);
        let before = manager.stats();
        region.unmap_all().unwrap();
        for object in &objects {
            assert_eq!(object.state().unwrap(), State::Invalid, "{object:?}");
        }
        let after = manager.stats();
        assert_eq!(after.invalidated - before.invalidated, OBJECTS as u64);
        // More than the ring holds, too: what is missing is told to be missing.
        assert!(queue.notes().any(|note| note == Note::Lost));
        manager.device().wait_no_imports();
        assert_eq!(manager.stats().late, 0);
    })
    .expect_return();
}
