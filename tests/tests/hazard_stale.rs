//! Stale reads: a device that pins real pages must never be seen to read what a mutation that has returned took away.
//!
//! **The oracle.** The first word of every page is its version. The mutator takes a page away, writes the next version into what is there when
//! the call has returned, and only then publishes that number as the page's floor. A reader notes the floors before it acquires: an older version
//! read by the device afterwards comes from a page that was not the program's any more. That the oracle notices is shown by an object whose
//! mutations nobody watches.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pinfold_core::{Access, Config, Error, Lease, Manager, Outcome, SubmitError, Userptr};
use pinfold_invalidate::page_size;
use pinfold_tests::dma::DmaDevice;
use pinfold_tests::memory::{Backing, Region};
use pinfold_tests::process::isolated_case;
use pinfold_tests::{PATIENCE, rounds, skip};

const PAGES: usize = 4;
/// Mutations in one run, while two readers read.
fn mutations() -> u64 {
    rounds(4_000) as u64
}

/// The device, or a skipped test.
macro_rules! device {
    () => {
        match DmaDevice::new() {
            Ok(device) => device,
            Err(e) => skip!("no io_uring here: {e}"),
        }
    };
}

fn patient(device: &DmaDevice) -> Manager<DmaDevice> {
    let mut config = Config::default();
    config.deadline = Duration::from_secs(10);
    Manager::new(device.clone(), config).unwrap()
}

/// What the device reads through the lease; `None` if the memory has changed hands since it was taken.
fn device_reads(device: &DmaDevice, lease: Lease<DmaDevice>) -> Option<Vec<u8>> {
    let job = device.read_job(&lease.view(0), 0, PAGES * page_size()).unwrap();
    let start = || {
        job.start();
        Ok::<_, Error>(())
    };
    // SAFETY: the fence is the job's, which reads through the view.
    match unsafe { lease.submit([job.fence()], start) } {
        Ok(pending) => {
            let bytes = job.finish().expect("the pages are pinned until the work is over");
            assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
            Some(bytes)
        }
        Err(SubmitError::Stale { .. }) => None,
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn after_pages_are_discarded_and_refilled_the_device_reads_the_new_bytes() {
    for backing in
        [Backing::Anonymous, Backing::AnonymousHuge, Backing::AnonymousShared, Backing::Memfd, Backing::MemfdPrivate]
    {
        let case = || {
            let device = device!();
            let manager = patient(&device);
            let region = Region::new(backing, PAGES).unwrap();
            // SAFETY: no reference points into a region.
            let object = unsafe { manager.register(region.range(), Access::Read) }.unwrap();
            drop(manager.acquire_timeout(&[&object], PATIENCE).unwrap());
            for round in 1..=u8::try_from(rounds(50)).unwrap() {
                region.advise(0..PAGES, libc::MADV_DONTNEED).unwrap();
                region.fill(0..PAGES, round).unwrap();
                let seen = loop {
                    // Stale: the pages were taken a second time, as they could not be proven gone the first time.
                    let lease = manager.acquire_timeout(&[&object], PATIENCE).unwrap();
                    if let Some(seen) = device_reads(&device, lease) {
                        break seen;
                    }
                };
                assert!(seen.iter().all(|&byte| byte == round), "round {round}: the device read {}", seen[0]);
            }
        };
        isolated_case(&format!("{backing:?}"), PATIENCE, case).expect_return();
    }
}

/// `MADV_REMOVE` punches its hole without the address space's lock, some time after its event has been read: nothing tells when. Pages that were
/// taken in between are stale until they are taken a second time, which comes by itself. So this is no part of the race below.
#[test]
fn after_a_hole_is_punched_by_advice_the_device_comes_to_read_the_new_bytes_by_itself() {
    for backing in [Backing::AnonymousShared, Backing::Memfd] {
        let case = || {
            let device = device!();
            let manager = patient(&device);
            let region = Region::new(backing, PAGES).unwrap();
            // SAFETY: no reference points into a region.
            let object = unsafe { manager.register(region.range(), Access::Read) }.unwrap();
            let (region, manager, object) = (&region, &manager, &object);
            for round in 1..=u8::try_from(rounds(100)).unwrap() {
                let stop = AtomicBool::new(false);
                thread::scope(|scope| {
                    // Somebody who takes the pages at the worst of times.
                    scope.spawn(|| {
                        while !stop.load(Ordering::Relaxed) {
                            drop(manager.acquire_timeout(&[object], PATIENCE));
                        }
                    });
                    region.advise(0..1, libc::MADV_REMOVE).unwrap();
                    stop.store(true, Ordering::Relaxed);
                });
                region.fill(0..1, round).unwrap();
                let end = Instant::now() + PATIENCE;
                loop {
                    let lease = manager.acquire_timeout(&[object], PATIENCE).unwrap();
                    if device_reads(&device, lease).is_some_and(|seen| seen[0] == round) {
                        break;
                    }
                    assert!(Instant::now() < end, "round {round}: the device goes on reading the old page");
                }
            }
        };
        isolated_case(&format!("{backing:?}"), PATIENCE, case).expect_return();
    }
}

/// One page's history, as far as everybody may rely on it.
#[derive(Default)]
struct Page {
    /// The version whose mutation has begun.
    begun: AtomicU64,
    /// The version that is surely there.
    floor: AtomicU64,
}

struct Race<'a> {
    device: &'a DmaDevice,
    manager: &'a Manager<DmaDevice>,
    object: &'a Userptr<DmaDevice>,
    region: &'a Region,
    watched: bool,
    history: [Page; PAGES],
    stop: AtomicBool,
    reads: AtomicUsize,
    stale: AtomicUsize,
}

impl Race<'_> {
    /// Takes one page after the other away, each in another way.
    fn mutate(&self) {
        let shared = self.region.backing().shared();
        for version in 2..mutations() {
            let (page, way) = (version as usize % PAGES, version as usize / PAGES % 4);
            let (pages, history) = (page..page + 1, &self.history[page]);
            history.begun.store(version, Ordering::SeqCst);
            match way {
                // Bare, its end is announced to nobody, and until the pages are taken a second time a device that pins may see the old ones.
                0 if self.watched => {
                    let discard = || self.region.advise(pages.clone(), libc::MADV_DONTNEED).unwrap();
                    self.manager.mutate(&[self.region.part(pages.clone())], discard).unwrap();
                }
                0 => self.region.advise(pages, libc::MADV_DONTNEED).unwrap(),
                1 if shared && !self.watched => self.region.advise(pages, libc::MADV_REMOVE).unwrap(),
                2 => {
                    self.region.unmap(pages.clone()).unwrap();
                    self.region.map_over(pages).unwrap();
                }
                _ => self.region.map_over(pages).unwrap(),
            }
            self.region.write(page * page_size(), &version.to_ne_bytes()).unwrap();
            history.floor.store(version, Ordering::SeqCst);
            // The readers get a turn every now and then, so that there is something to take away.
            let seen = self.reads.load(Ordering::Relaxed);
            while version.is_multiple_of(8)
                && self.reads.load(Ordering::Relaxed) == seen
                && !self.stop.load(Ordering::Relaxed)
            {
                thread::yield_now();
            }
        }
    }

    fn read(&self) {
        let load =
            |which: fn(&Page) -> &AtomicU64| self.history.each_ref().map(|page| which(page).load(Ordering::SeqCst));
        while !self.stop.load(Ordering::Relaxed) {
            // What has returned before the acquire must not be seen again.
            let floors = load(|page| &page.floor);
            // An error: a page was unmapped just then.
            let Ok(lease) = self.manager.acquire_timeout(&[self.object], PATIENCE) else { continue };
            let Some(bytes) = device_reads(self.device, lease) else { continue };
            let begun = load(|page| &page.begun);
            for (page, bytes) in bytes.chunks(page_size()).enumerate() {
                let version = u64::from_ne_bytes(*bytes.first_chunk().expect("a page has eight bytes"));
                // Zero: a fresh page, between a mutation that began after the acquire and the write of its version.
                let fresh = version == 0 && begun[page] > floors[page];
                if !fresh && version < floors[page] {
                    self.stale.fetch_add(1, Ordering::Relaxed);
                }
                assert!(version <= begun[page], "page {page} had version {version} before its time");
            }
            self.reads.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// How many stale pages the device read while a mutator was at it.
fn stale_reads(backing: Backing, watched: bool) -> usize {
    let device = DmaDevice::new().unwrap();
    let manager = patient(&device);
    let region = Region::new(backing, PAGES).unwrap();
    let history: [Page; PAGES] = Default::default();
    for (page, history) in history.iter().enumerate() {
        region.write(page * page_size(), &1_u64.to_ne_bytes()).unwrap();
        history.begun.store(1, Ordering::SeqCst);
        history.floor.store(1, Ordering::SeqCst);
    }
    let object = if watched {
        // SAFETY: no reference points into a region.
        unsafe { manager.register(region.range(), Access::Read) }
    } else {
        // SAFETY: that its mutations go unnoticed is the point: the pins keep the device's accesses sound.
        unsafe { manager.register_unwatched(region.range(), Access::Read) }
    };
    let race = Race {
        device: &device,
        manager: &manager,
        object: &object.unwrap(),
        region: &region,
        watched,
        history,
        stop: AtomicBool::new(false),
        reads: AtomicUsize::new(0),
        stale: AtomicUsize::new(0),
    };
    thread::scope(|scope| {
        /// Ends the race, also when one of its threads has panicked.
        struct Over<'a>(&'a AtomicBool);
        impl Drop for Over<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        for _ in 0..2 {
            scope.spawn(|| {
                let _over = Over(&race.stop);
                race.read();
            });
        }
        let _over = Over(&race.stop);
        race.mutate();
    });
    println!("{backing:?}: {:?} reads, {:?} stale pages, {:?}", race.reads, race.stale, manager.stats());
    let (reads, stats) = (race.reads.into_inner(), manager.stats());
    assert!(reads as u64 >= mutations() / 8 - 1, "{reads} reads");
    if watched {
        assert!(stats.invalidated > mutations() / 8 && stats.space.late == 0, "{stats:?}");
    }
    race.stale.into_inner()
}

#[test]
fn no_version_is_read_that_is_older_than_a_mutation_that_had_returned() {
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let case = || {
            drop(device!());
            assert_eq!(stale_reads(backing, true), 0);
        };
        isolated_case(&format!("{backing:?}"), 2 * PATIENCE, case).expect_return();
    }
}

#[test]
fn the_oracle_notices_stale_reads_where_nobody_watches() {
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let case = || {
            drop(device!());
            assert!(stale_reads(backing, false) > 0, "the oracle sees nothing");
        };
        isolated_case(&format!("{backing:?}"), 2 * PATIENCE, case).expect_return();
    }
}
