//! Four mutators and four submitters over the same memory for as long as one likes, and the question whether the device ever reads what is gone.
//!
//! **The oracle** is that of [`race`](super::race): every page carries its version, and a read that is older than a mutation which had returned
//! before the acquire is a failure. Here every kind of memory is asked, every way of taking a page away is used that the device survives by
//! its nature, the submitters' objects overlap, and what the process holds is counted before and after.
//!
//! **Its power.** Who maps the same page of a file again changes no byte of it; so shared memory is punched as well (bracketed, as the end of a
//! bare discard is announced to nobody), and private pages are moved onto private memory. That the oracle notices stale pins at all is shown
//! in `hazard_stale`, by an object that nobody watches.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pinfold_core::{Error, Lease, SubmitError, Userptr};
use pinfold_invalidate::page_size;
use pinfold_tests::leaks::Holdings;
use pinfold_tests::memory::{Backing, HugePages, Move, Region};
use pinfold_tests::process::Ending;
use pinfold_tests::{PATIENCE, skip_part};

use super::{Rig, change::move_onto, register};

const THREADS: usize = 4;
/// Each mutator has two pages of its own, so that the versions of a page are of one writer, and nobody replaces a mapping that somebody else has
/// just put there.
const PAGES: usize = 2 * THREADS;

/// How many of the processor's pages are one page of this kind of memory.
fn unit(backing: Backing) -> usize {
    if backing == Backing::HugeTlb { (2 << 20) / page_size() } else { 1 }
}

/// Huge pages for the region, for what replaces them, and for those that the device still has.
const POOL: u64 = 64;

/// A way of taking a page away, or of seeming to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    MapFixed,
    DontNeed,
    Bracketed(i32),
    PunchHole,
    UnmapAndMap,
    MoveAway,
    MoveLeaving,
    MoveOnto,
    Invalidate,
}

/// What this device survives for this kind of memory, and what the kernel does for it.
fn ways<R: Rig>(rig: &R, backing: Backing) -> Vec<Way> {
    let pins = rig.keeps_pages(Backing::Anonymous);
    // Each piece of anonymous shared memory that is put there is a file of its own, and of several files no device has a mapping of its own.
    let keeps = pins || rig.keeps_pages(backing) && backing != Backing::AnonymousShared;
    let mut ways = vec![Way::MapFixed, Way::Bracketed(libc::MADV_DONTNEED), Way::Invalidate];
    if !pins {
        // Bare, its end is announced to nobody, and until the pages are taken a second time a device that pins may see the old ones.
        ways.push(Way::DontNeed);
    }
    if backing.shared() {
        ways.push(Way::Bracketed(libc::MADV_REMOVE));
        if backing != Backing::AnonymousShared {
            ways.push(Way::PunchHole);
        }
    }
    if matches!(backing, Backing::Anonymous | Backing::AnonymousHuge) {
        ways.push(Way::Bracketed(libc::MADV_FREE));
    }
    if keeps {
        ways.extend([Way::UnmapAndMap, Way::MoveAway]);
    }
    if pins {
        ways.push(Way::MoveLeaving);
        // Over a shared file, the next way would bring back the file's page with the version it had before: old, and the program's all the same.
        // What is moved there is private memory without a file.
        let spans = rig.spans_files() || matches!(backing, Backing::Anonymous | Backing::AnonymousHuge);
        if spans && (!backing.shared() || backing == Backing::AnonymousShared) {
            ways.push(Way::MoveOnto);
        }
    }
    ways
}

/// One page's history, as far as everybody may rely on it.
#[derive(Default)]
struct Page {
    /// The version whose mutation has begun.
    begun: AtomicU64,
    /// The version that is surely there.
    floor: AtomicU64,
}

struct Race<'a, R: Rig> {
    rig: &'a R,
    region: Region,
    ways: Vec<Way>,
    unit: usize,
    history: [Page; PAGES],
    reads: AtomicUsize,
    mutations: AtomicUsize,
    stop: AtomicBool,
    end: Instant,
}

/// How often what happened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    pub mutations: usize,
    pub reads: usize,
}

impl<R: Rig> Race<'_, R> {
    /// Not before there was something to see, on however busy a machine.
    fn over(&self) -> bool {
        let seen = self.reads.load(Ordering::Relaxed) >= 5 * THREADS;
        let done = self.mutations.load(Ordering::Relaxed) >= 10 * THREADS;
        self.stop.load(Ordering::Relaxed) || seen && done && Instant::now() >= self.end
    }

    /// One of the pages, as the processor's.
    fn page(&self, page: usize) -> Range<usize> {
        page * self.unit..(page + 1) * self.unit
    }

    /// Maps it anew. The pool of huge pages may be empty for as long as the device has old ones.
    fn map_over(&self, pages: Range<usize>) {
        let end = Instant::now() + PATIENCE;
        while let Err(error) = self.region.map_over(pages.clone()) {
            let waits = self.unit > 1 && error.raw_os_error() == Some(libc::ENOMEM) && Instant::now() < end;
            assert!(waits, "pages {pages:?}: {error}");
            thread::yield_now();
        }
    }

    fn take_away(&self, page: usize, way: Way) {
        let (region, pages) = (&self.region, self.page(page));
        let bracket = |range, f: &dyn Fn()| self.rig.manager().mutate(&[range], f).unwrap();
        match way {
            Way::MapFixed => self.map_over(pages),
            Way::DontNeed => region.advise(pages, libc::MADV_DONTNEED).unwrap(),
            Way::Bracketed(advice) => bracket(region.part(pages.clone()), &|| {
                // What has been made private has no file to punch; it goes by being discarded.
                if region.advise(pages.clone(), advice).is_err() {
                    region.advise(pages.clone(), libc::MADV_DONTNEED).unwrap();
                }
            }),
            Way::PunchHole => bracket(region.part(pages.clone()), &|| region.punch_hole(pages.clone()).unwrap()),
            Way::UnmapAndMap => {
                region.unmap(pages.clone()).unwrap();
                self.map_over(pages);
            }
            Way::MoveAway => {
                drop(region.relocate(pages.clone(), Move::Away).unwrap());
                self.map_over(pages);
            }
            Way::MoveLeaving => {
                // Not for every kind of memory, on every kernel.
                if let Ok(moved) = region.relocate(pages.clone(), Move::DontUnmap) {
                    drop(moved);
                } else {
                    self.map_over(pages);
                }
            }
            Way::MoveOnto => move_onto(region.part(pages), 0).unwrap(),
            Way::Invalidate => self.rig.manager().invalidate(region.part(pages)).unwrap(),
        }
    }

    fn mutate(&self, mutator: usize) {
        let mut rounds = 0;
        while !self.over() {
            // As fast as reads get through between mutations: a storm lets none through on a quiet machine.
            if rounds > self.reads.load(Ordering::Relaxed) + 10 * THREADS {
                thread::yield_now();
                continue;
            }
            let (page, way) = (2 * mutator + rounds % 2, self.ways[rounds / 2 % self.ways.len()]);
            let history = &self.history[page];
            let version = history.floor.load(Ordering::Relaxed) + 1;
            history.begun.store(version, Ordering::SeqCst);
            self.take_away(page, way);
            self.region.write(self.page(page).start * page_size(), &version.to_ne_bytes()).unwrap();
            self.rig.written(self.region.part(self.page(page)));
            history.floor.store(version, Ordering::SeqCst);
            rounds += 1;
            self.mutations.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Acquires, submits and checks.
    fn read(&self, object: &Userptr<R::D>) {
        let first = (object.range().start() - self.region.range().start()) / page_size() / self.unit;
        let history = &self.history[first..first + object.range().pages() / self.unit];
        let load = |which: fn(&Page) -> &AtomicU64| -> Vec<u64> {
            history.iter().map(|page| which(page).load(Ordering::SeqCst)).collect()
        };
        while !self.over() {
            // What has returned before the acquire must not be seen again.
            let floors = load(|page| &page.floor);
            let lease: Lease<R::D> = match self.rig.manager().acquire_timeout(&[object], PATIENCE) {
                Ok(lease) => lease,
                // A hole just then; or pins that the kernel has not yet taken off its account.
                Err(Error::Fault { .. } | Error::Budget { .. }) => continue,
                Err(error) => panic!("{error}"),
            };
            let seen = match self.rig.start(lease) {
                Ok(work) => work.finish(),
                Err(SubmitError::Stale { .. } | SubmitError::Again(_)) => continue,
                Err(error) => panic!("{error}"),
            };
            let begun = load(|page| &page.begun);
            for (page, &version) in seen.iter().step_by(self.unit).enumerate() {
                let (floor, begun) = (floors[page], begun[page]);
                // Zero: a fresh page, between a mutation that began after the acquire and the write of its version.
                let fresh = version == 0 && begun > floor;
                assert!(
                    fresh || version >= floor,
                    "the device read version {version} of page {}, which had been at {floor} before",
                    first + page
                );
                assert!(version <= begun, "page {} had version {version} before its time", first + page);
            }
            self.reads.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Who panics stops everybody.
fn guarded<R: Rig>(race: &Race<'_, R>, body: impl FnOnce()) {
    let end = catch_unwind(AssertUnwindSafe(body));
    if let Err(panic) = end {
        race.stop.store(true, Ordering::Relaxed);
        resume_unwind(panic);
    }
}

fn race<R: Rig>(rig: &R, backing: Backing, time: Duration) -> Tally {
    let unit = unit(backing);
    let region = Region::new(backing, PAGES * unit).unwrap();
    if !backing.shared() && !matches!(backing, Backing::Anonymous | Backing::AnonymousHuge | Backing::HugeTlb) {
        // Fresh pages of a private mapping are the file's: zeros, as everywhere.
        region.truncate(0).and_then(|()| region.truncate(PAGES)).unwrap();
    }
    let history: [Page; PAGES] = Default::default();
    for (page, history) in history.iter().enumerate() {
        region.write(page * unit * page_size(), &1_u64.to_ne_bytes()).unwrap();
        history.begun.store(1, Ordering::SeqCst);
        history.floor.store(1, Ordering::SeqCst);
    }
    let race = Race {
        rig,
        ways: ways(rig, backing),
        unit,
        region,
        history,
        reads: AtomicUsize::new(0),
        mutations: AtomicUsize::new(0),
        stop: AtomicBool::new(false),
        end: Instant::now() + time,
    };
    // Over all of it twice, and over a range and a part that end in the middle of it and of each other.
    let [first, second, range] = [0..PAGES, 0..PAGES, 0..5]
        .map(|pages| register(rig.manager(), race.region.part(pages.start * unit..pages.end * unit)));
    let part = first.part(3 * unit * page_size()..PAGES * unit * page_size()).unwrap();
    let objects = [first, second, range, part];
    thread::scope(|scope| {
        let race = &race;
        for object in &objects {
            scope.spawn(move || guarded(race, || race.read(object)));
        }
        for mutator in 0..THREADS {
            scope.spawn(move || guarded(race, || race.mutate(mutator)));
        }
    });
    let [mutations, reads] = [&race.mutations, &race.reads].map(|count| count.load(Ordering::Relaxed));
    let tally = Tally { mutations, reads };
    let stats = rig.manager().stats();
    println!("{backing:?}: {tally:?} by {:?}, {stats:?}", race.ways);
    assert!(stats.invalidated > 0 && stats.late == 0 && stats.space.late == 0, "{stats:?}");
    tally
}

/// The pool that [`backings`] asks for, where it can be had. It is to be kept while they are used.
pub fn huge_pages() -> Option<HugePages> {
    HugePages::add(POOL).inspect_err(|why| skip_part!("{why}")).ok()
}

/// The kinds of memory that can carry versions, and that somebody tells of.
pub fn backings(pool: Option<&HugePages>) -> impl Iterator<Item = Backing> {
    let huge = pool.map(|_| Backing::HugeTlb);
    Backing::ALL.into_iter().filter(|backing| backing.writable() && backing.watchable()).chain(huge)
}

/// How long each kind of memory is raced over: what `PINFOLD_STRESS_MS` says, in milliseconds.
pub fn time(default_ms: u64) -> Duration {
    let wanted = std::env::var("PINFOLD_STRESS_MS").ok();
    Duration::from_millis(wanted.map_or(default_ms, |ms| ms.parse().expect("PINFOLD_STRESS_MS is in milliseconds")))
}

/// Asserts that the child came to its end, and passes on what it counted.
#[track_caller]
pub fn tell(ending: &Ending) {
    ending.output.lines().filter(|line| line.contains("Tally")).for_each(|line| println!("{line}"));
    ending.expect_return();
}

/// One race, on a device that is made for it and gone after it; nothing is left behind. To be run in a process of its own.
pub fn life<R: Rig>(new: impl Fn() -> R, backing: Backing, time: Duration) {
    let begin = Holdings::now();
    // What the C library and a driver keep for later is there after the first life.
    race(&new(), backing, Duration::from_millis(100));
    let before = Holdings::now();
    let tally = race(&new(), backing, time);
    let end = Instant::now() + PATIENCE;
    loop {
        let after = Holdings::now();
        // Stacks and arenas come and go, and the tracking opens a file or two of /proc when they are first asked; what leaks with every mutation or
        // read shows. A thread that has been joined, and a ring that was closed, take the kernel another moment.
        let mappings = after.mappings < before.mappings + 64;
        let descriptors = after.descriptors <= before.descriptors + 2;
        if mappings && descriptors && after.threads <= before.threads && after.pinned == begin.pinned {
            println!("{backing:?}: Tally of leaks: {begin:?}, {before:?}, {after:?}");
            return;
        }
        assert!(Instant::now() < end, "left behind after {tally:?}: {after:?}, and {before:?} before");
        thread::yield_now();
    }
}
