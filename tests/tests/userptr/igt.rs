//! What IGT's tests of the kernel's userptr do, where no other test here does it already. Named after theirs.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::without_provenance_mut;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use pinfold_core::{Error, HostRange, State};
use pinfold_invalidate::page_size;
use pinfold_tests::leaks::pinned;
use pinfold_tests::memory::{Backing, Region};
use pinfold_tests::{PATIENCE, rounds, skip};

use super::{Rig, device_sees, filled, program_sees, register};

/// What one page of a layout is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Page {
    Mapped,
    Hole,
    Forbidden,
    Device,
}

impl Page {
    const ALL: [Self; 4] = [Self::Mapped, Self::Hole, Self::Forbidden, Self::Device];

    /// Puts it there, whatever was there before.
    fn put(self, region: &Region, page: usize, device: &OwnedFd) {
        let pages = page..page + 1;
        region.map_over(pages.clone()).unwrap();
        match self {
            Self::Mapped => region.fill(pages, 0x41).unwrap(),
            Self::Hole => region.unmap(pages).unwrap(),
            Self::Forbidden => region.protect(pages, libc::PROT_NONE).unwrap(),
            Self::Device => {
                let (at, len) = (without_provenance_mut(region.part(pages).start()), page_size());
                let (protection, flags) = (libc::PROT_READ, libc::MAP_SHARED | libc::MAP_FIXED);
                // SAFETY: the page is the region's, into which no reference points.
                let mapped = unsafe { libc::mmap(at, len, protection, flags, device.as_raw_fd(), 0) };
                assert_ne!(mapped, libc::MAP_FAILED, "{}", io::Error::last_os_error());
            }
        }
    }
}

/// A performance counter that counts nothing. Its page is the kernel's own, mapped like a device's; unlike a ring of io_uring, where one likes.
fn counter() -> io::Result<OwnedFd> {
    const SOFTWARE: u32 = 1;
    const DUMMY: u64 = 9;
    /// `disabled`, `exclude_kernel`, `exclude_hv`: what everybody may count.
    const FLAGS: u64 = 1 | 1 << 5 | 1 << 6;
    /// The first version of `struct perf_event_attr`: type, size, config, period, sample type, read format, flags, wake-up and breakpoint.
    const SIZE: u32 = 64;
    let mut attributes = [0_u64; 8];
    attributes[0] = u64::from(SOFTWARE) | u64::from(SIZE) << 32;
    attributes[1] = DUMMY;
    attributes[5] = FLAGS;
    let cloexec = 8_u64;
    // SAFETY: the attributes are as long as they say, and live through the call, which copies them.
    let fd = unsafe { libc::syscall(libc::SYS_perf_event_open, attributes.as_ptr(), 0, -1, -1, cloexec) };
    let fd = i32::try_from(fd).expect("a descriptor is an int");
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above made this descriptor, and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Five pages, each mapped, a hole, forbidden, or a device's; an object over the middle three. It is to be had if these three are mapped, whatever
/// lies at their edges; else the fault names a page that is none.
// rows: igt/probe; igt/invalid-mmap-offset-unsync; igt/map-fixed-invalidate{,-overlap}{,-busy}; selftests/hmm snapshot
pub fn probe<R: Rig>(rig: &R) {
    let device = match counter() {
        Ok(device) => device,
        Err(e) => skip!("no device memory that can be mapped where one likes: {e}"),
    };
    let region = Region::new(Backing::Anonymous, 5).unwrap();
    let object = register(rig.manager(), region.part(1..4));
    let mut there = [None; 5];
    let (mut taken, mut refused) = (0, 0);
    for layout in 0..1024_usize {
        let wanted: [Page; 5] = std::array::from_fn(|page| Page::ALL[layout >> (2 * page) & 3]);
        for (page, wanted) in wanted.into_iter().enumerate() {
            if there[page] != Some(wanted) {
                wanted.put(&region, page, &device);
                there[page] = Some(wanted);
            }
        }
        rig.written(region.part(1..4));
        let bad: Vec<HostRange> =
            (1..4).filter(|&page| wanted[page] != Page::Mapped).map(|page| region.part(page..page + 1)).collect();
        match rig.manager().acquire_timeout(&[&object], PATIENCE) {
            Ok(lease) if bad.is_empty() => {
                drop(lease);
                assert_eq!(device_sees(rig, &object), [filled(0x41); 3], "{wanted:?}");
                taken += 1;
            }
            Err(Error::Fault { range, .. }) if !bad.is_empty() => {
                assert!(bad.iter().any(|bad| bad.overlaps(range)), "{wanted:?}: {range} is told");
                refused += 1;
            }
            other => panic!("{wanted:?}: {other:?}"),
        }
    }
    assert_eq!((taken, refused), (16, 1008));
}

/// Mappings put over both ends of huge pages leave an object in their middle alone, also while it is in use.
// rows: igt/huge-split
pub fn huge_split<R: Rig>(rig: &R) {
    let huge = (2 << 20) / page_size();
    let region = Region::new(Backing::AnonymousHuge, huge).unwrap();
    let middle = huge / 2..huge / 2 + 4;
    let object = register(rig.manager(), region.part(middle.clone()));
    let expected = program_sees(&region)[middle].to_vec();
    let lease = rig.manager().acquire_timeout(&[&object], PATIENCE).unwrap();
    let generation = lease.view(0).generation;
    let work = rig.start(lease).unwrap();
    for end in [0..huge / 4, 3 * huge / 4..huge] {
        // Were this held, it would wait for itself and be late.
        region.map_over(end).unwrap();
    }
    assert_eq!((object.state().unwrap(), object.generation().unwrap()), (State::Valid, generation));
    assert_eq!(work.finish(), expected);
    assert_eq!(rig.manager().stats().space.late, 0);
    region.map_over(0..huge).unwrap();
    assert_eq!(device_sees(rig, &object).len(), 4);
    assert!(object.generation().unwrap() > generation);
}

/// Objects, also overlapping ones, are made, acquired and closed while their memory is discarded, idle ones are taken back, and another thread
/// maps, asks for huge pages and unmaps.
// rows: igt/stress-mm; igt/stress-mm-invalidate-close{,-overlap}
pub fn stress_mm_invalidate_close<R: Rig>(rig: &R) {
    let region = Region::new(Backing::Anonymous, 4).unwrap();
    let (stop, made) = (AtomicBool::new(false), AtomicUsize::new(0));
    let others = thread::scope(|scope| {
        let (region, stop, made) = (&region, &stop, &made);
        let discard = scope.spawn(move || {
            let mut rounds = 0;
            while !stop.load(Ordering::Relaxed) {
                // A storm lets no acquisition through on a machine with more to do than processors.
                if rounds > 20 * made.load(Ordering::Relaxed) + 20 {
                    thread::yield_now();
                    continue;
                }
                region.advise(rounds % 4..rounds % 4 + 1, libc::MADV_DONTNEED).unwrap();
                rounds += 1;
                thread::yield_now();
            }
            rounds
        });
        let maps = scope.spawn(move || {
            let mut rounds = 0;
            while !stop.load(Ordering::Relaxed) {
                drop(Region::new(Backing::AnonymousHuge, 512).unwrap());
                rounds += 1;
            }
            rounds
        });
        for round in 0..rounds(150) {
            let objects = [register(rig.manager(), region.range()), register(rig.manager(), region.part(round % 2..3))];
            match rig.manager().acquire_timeout(&[&objects[0], &objects[1]], PATIENCE) {
                Ok(lease) if round % 3 == 0 => drop(rig.start(lease).map(super::Work::finish)),
                Ok(lease) => drop(lease),
                Err(Error::Fault { .. } | Error::Budget { .. }) => {}
                Err(error) => panic!("{error}"),
            }
            made.store(round + 1, Ordering::Relaxed);
        }
        stop.store(true, Ordering::Relaxed);
        [discard, maps].map(|other| other.join().unwrap())
    });
    assert!(others.iter().all(|&rounds| rounds > 0), "{others:?}");
    let stats = || rig.manager().stats();
    super::wait_until("the end of every object", || stats().objects == 0 && stats().imports == 0);
    assert_eq!(stats().late, 0);
}

/// Every size by powers of two, whole, in two halves, and off the alignment of its size by a page.
// rows: xe/{large,mixed,…}-userptr{-split,-misaligned}-binds-N
pub fn sizes<R: Rig>(rig: &R) {
    let before = pinned();
    for log in 0..=8 {
        let pages = 1 << log;
        let region = Region::new(Backing::Anonymous, 2 * pages + 1).unwrap();
        let all = program_sees(&region);
        for range in [0..pages, pages..2 * pages, 0..2 * pages, 1..pages + 1, 1..2 * pages + 1] {
            let object = register(rig.manager(), region.part(range.clone()));
            assert_eq!(device_sees(rig, &object), all[range]);
            drop(object);
            // What may be locked is little, and a part of a huge page counts as the whole. It is let go by a worker, and io_uring of older kernels
            // lets go of it a second later.
            super::wait_until("the end of the imports", || rig.manager().stats().imports == 0 && pinned() <= before);
        }
    }
}

/// Locked memory is as good as any; that it is locked keeps no change from being noticed.
// rows: igt/{mlocked,swapping,minor,major}-{sync,unsync}-{normal,interruptible}
pub fn mlocked<R: Rig>(rig: &R) {
    let region = Region::new(Backing::Anonymous, 4).unwrap();
    let (at, len) = (without_provenance_mut::<libc::c_void>(region.range().start()), region.range().len());
    // SAFETY: locking pages changes nothing about them.
    if unsafe { libc::mlock(at, len) } != 0 {
        skip!("nothing may be locked here: {}", io::Error::last_os_error());
    }
    let object = register(rig.manager(), region.range());
    assert_eq!(device_sees(rig, &object), program_sees(&region));
    let generation = object.generation().unwrap();
    region.map_over(1..3).unwrap();
    super::assert_taken_back(&object, generation);
    region.fill(0..4, 0x29).unwrap();
    rig.written(region.range());
    assert_eq!(device_sees(rig, &object), [filled(0x29); 4]);
}

/// What is asked for in time is brought by a worker, untouched as it is, so that the acquire before the work waits for nothing.
// rows: xe/fault-mode-prefetch
pub fn prefetch<R: Rig>(rig: &R) {
    let region = Region::untouched(Backing::Anonymous, 16).unwrap();
    let object = register(rig.manager(), region.range());
    assert_eq!((region.present(), object.state().unwrap()), (0, State::New));
    rig.manager().prefetch(&[&object]).unwrap();
    super::wait_until("the pages", || object.state().unwrap() == State::Valid);
    assert_eq!(region.present(), 16);
    let lease = rig.manager().acquire(&[&object]).expect("nothing is left to wait for");
    let stats = rig.manager().stats();
    assert_eq!((stats.acquired_inline, stats.acquired_by_worker, stats.imports_made), (0, 1, 1));
    assert_eq!(rig.start(lease).unwrap().finish(), [0; 16]);
}
