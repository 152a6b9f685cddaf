//! The device in software is a fair stand-in: it pins, moves bytes through the pin, keeps an old page when the program gets a new one, and
//! refuses what can't be pinned.

use std::time::Instant;

use pinfold_core::{Access, Config, DeviceError, Manager, Outcome, State};
use pinfold_invalidate::page_size;
use pinfold_tests::dma::DmaDevice;
use pinfold_tests::leaks::{Holdings, pinned};
use pinfold_tests::memory::{Backing, Region};
use pinfold_tests::process::isolated;
use pinfold_tests::{PATIENCE, skip, skip_part};

/// The device, or a skipped test.
macro_rules! device {
    () => {
        match DmaDevice::new() {
            Ok(device) => device,
            Err(e) => skip!("no io_uring here: {e}"),
        }
    };
}

/// What the device takes; a test that leaves files out says so.
macro_rules! pinnable {
    ($device:ident) => {{
        let mut backings = vec![
            Backing::Anonymous,
            Backing::AnonymousHuge,
            Backing::AnonymousShared,
            Backing::Memfd,
            Backing::MemfdPrivate,
        ];
        if $device.pins_files() {
            backings.push(Backing::FilePrivate);
        } else {
            skip_part!("this kernel's io_uring pins no pages of a mapped file (EOPNOTSUPP before Linux 6.5)");
        }
        backings
    }};
}

#[test]
// rows (dma): amdgpu/amd_basic userptr-with-IP-DMA
fn bytes_go_both_ways_through_the_pin() {
    let device = device!();
    for backing in pinnable!(device) {
        let region = Region::new(backing, 8).expect("mapped");
        let import = device.pin(region.part(2..6)).expect("pinnable");
        let job = device.read_job(&import, 10, 3 * page_size()).expect("made");
        job.start();
        let expected = region.read(2 * page_size() + 10, 3 * page_size()).expect("mapped");
        assert_eq!(job.finish().expect("pinned"), expected, "{backing:?}");
        let job = device.write_job(&import, page_size(), b"from the device").expect("made");
        job.start();
        job.finish().expect("pinned");
        assert_eq!(region.read(3 * page_size(), 15).expect("mapped"), b"from the device", "{backing:?}");
    }
}

#[test]
fn a_pin_that_has_become_stale_shows() {
    let device = device!();
    let region = Region::new(Backing::Anonymous, 1).expect("mapped");
    let import = device.pin(region.range()).expect("pinnable");
    region.advise(0..1, libc::MADV_DONTNEED).expect("advised");
    region.fill(0..1, 0xee).expect("writable");
    let job = device.read_job(&import, 0, page_size()).expect("made");
    job.start();
    assert_eq!(job.finish().expect("pinned"), region.original(0..1), "the device sees the page it took");
    let job = device.write_job(&import, 0, &[0x11]).expect("made");
    job.start();
    job.finish().expect("pinned");
    assert_eq!(region.read(0, 1).expect("mapped"), [0xee], "and the program the one it has now");
}

#[test]
fn a_pin_outlives_the_mapping() {
    let device = device!();
    for backing in pinnable!(device) {
        let region = Region::new(backing, 2).expect("mapped");
        let import = device.pin(region.range()).expect("pinnable");
        let job = device.read_job(&import, 0, 2 * page_size()).expect("made").hold();
        job.start();
        region.unmap_all().expect("unmapped");
        assert_eq!(job.finish().expect("pinned"), region.original(0..2), "{backing:?}");
    }
}

#[test]
fn a_holding_job_is_in_flight_until_it_is_opened() {
    let device = device!();
    let region = Region::new(Backing::Anonymous, 1).expect("mapped");
    let import = device.pin(region.range()).expect("pinnable");
    let held = device.write_job(&import, 0, b"late").expect("made").hold();
    held.start();
    // A job that was started later and is over shows that the engine has seen the first one.
    let quick = device.read_job(&import, 0, 4).expect("made");
    quick.start();
    assert_eq!(quick.finish().expect("pinned"), [1; 4]);
    assert_eq!(held.fence().outcome(), None);
    assert_eq!(region.read(0, 4).expect("mapped"), [1; 4]);
    held.finish().expect("pinned");
    assert_eq!(held.fence().outcome(), Some(Outcome::Done));
    assert_eq!(region.read(0, 4).expect("mapped"), b"late");
}

#[test]
fn a_manager_drives_it_and_its_jobs_retire_submits() {
    let device = device!();
    let manager = Manager::new(device.clone(), Config::default()).expect("a manager");
    let region = Region::new(Backing::Anonymous, 4).expect("mapped");
    // SAFETY: no reference points into a region, which lives longer than the object.
    let object = unsafe { manager.register(region.range(), Access::ReadWrite) }.expect("registered");
    let lease = manager.acquire_timeout(&[&object], PATIENCE).expect("pinnable");
    let job = device.read_job(&lease.view(0), page_size(), page_size()).expect("made").hold();
    let start = || {
        job.start();
        Ok::<_, std::convert::Infallible>(())
    };
    // SAFETY: the fence is the job's, which reads through the view.
    let pending = unsafe { lease.submit([job.fence()], start) }.expect("valid");
    assert_eq!((pending.poll(), object.in_flight()), (None, 1));
    assert_eq!(job.finish().expect("pinned"), region.original(1..2));
    assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
    drop((pending, object, manager));
    assert_eq!(device.live_imports(), 0);
}

/// Whether the kernel takes hold of a job's pages when it is handed over (before Linux 6.15), not when it begins.
fn pinned_at_hand_over() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("/proc");
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
    (numbers.next(), numbers.next()) < (Some(6), Some(15))
}

/// So that a worker takes what an ordinary user may lock.
fn a_page_at_once() -> Config {
    let mut config = Config::default();
    config.inline_limit = page_size(); // and 64 of them, where one object is waited for
    config
}

#[test]
fn pages_that_are_absent_or_zero_are_made_the_programs_own() {
    let device = device!();
    let manager = Manager::new(device.clone(), a_page_at_once()).expect("a manager");
    // As many as the caller takes itself, and as many as a worker takes; a page that was only read is the page of zeros.
    for pages in [4, 32, 512] {
        let region = Region::untouched(Backing::Anonymous, pages).expect("mapped");
        region.read(page_size(), 8).expect("readable");
        // SAFETY: no reference points into a region, which lives longer than the object.
        let object = unsafe { manager.register(region.range(), Access::Read) }.expect("registered");
        let lease = manager.acquire_timeout(&[&object], PATIENCE).expect("pinnable");
        assert_eq!(region.present(), pages);
        region.fill(0..pages, 0xee).expect("writable");
        let job = device.read_job(&lease.view(0), 0, region.range().len()).expect("made");
        job.start();
        assert!(job.finish().expect("pinned").iter().all(|&byte| byte == 0xee), "the program writes to other pages");
    }
}

#[test]
fn a_page_that_can_not_be_had_is_a_fault_and_the_end_of_nobody() {
    const MADV_GUARD_INSTALL: i32 = 102; // linux/mman.h, since Linux 6.13
    let device = device!();
    let manager = Manager::new(device, a_page_at_once()).expect("a manager");
    for pages in [4, 32, 512] {
        let region = Region::new(Backing::Anonymous, pages).expect("mapped");
        if let Err(e) = region.advise(pages / 2..pages / 2 + 1, MADV_GUARD_INSTALL) {
            skip!("this kernel has no guard pages: {e}");
        }
        // SAFETY: no reference points into a region, which lives longer than the object.
        let object = unsafe { manager.register(region.range(), Access::Read) }.expect("registered");
        let error = manager.acquire_timeout(&[&object], PATIENCE).expect_err("a guard page is in it");
        assert_eq!((error.errno(), object.state().expect("alive")), (libc::EFAULT, State::Faulted));
        assert_eq!(manager.stats().imports, 0);
    }
}

#[test]
fn a_page_that_a_forked_child_has_too_is_pinned_as_the_programs_own() {
    isolated(|| {
        let device = device!();
        let manager = Manager::new(device.clone(), Config::default()).expect("a manager");
        let region = Region::new(Backing::Anonymous, 64).expect("mapped");
        region.fill(0..64, 0x11).expect("writable");
        // SAFETY: no reference points into a region, which lives longer than the object.
        let object = unsafe { manager.register(region.range(), Access::Read) }.expect("registered");
        let (end, keep) = std::io::pipe().expect("a pipe");
        // SAFETY: the child makes two system calls and leaves by one.
        let child = unsafe { libc::fork() };
        if child == 0 {
            drop(keep);
            let mut byte = 0_u8;
            // Until the parent has closed its end.
            // SAFETY: room for a byte.
            unsafe { libc::read(std::os::fd::AsRawFd::as_raw_fd(&end), (&raw mut byte).cast(), 1) };
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(0) };
        }
        let lease = manager.acquire_timeout(&[&object], PATIENCE).expect("pinnable");
        region.fill(0..64, 0x22).expect("writable"); // which gives the writer a copy of each page that two have
        let job = device.read_job(&lease.view(0), 0, 64 * page_size()).expect("made");
        job.start();
        assert!(job.finish().expect("pinned").iter().all(|&byte| byte == 0x22));
        drop(keep);
        // SAFETY: a child of this process, and no room for its status.
        assert_eq!(unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) }, child);
    });
}

#[test]
fn a_job_whose_import_was_released_says_so() {
    let device = device!();
    let region = Region::new(Backing::Anonymous, 1).expect("mapped");
    let import = device.pin(region.range()).expect("pinnable");
    let job = device.read_job(&import, 0, 4).expect("made").hold();
    job.start();
    drop(import);
    match job.finish() {
        Err(e) => assert_eq!(e.raw_os_error(), Some(libc::EFAULT)),
        // Such a kernel keeps what a job names until the job is over, and the slot's number is looked up by nobody after that.
        Ok(bytes) if pinned_at_hand_over() => {
            assert_eq!(bytes, region.original(0..1)[..4]);
            skip!(
                "before Linux 6.15, io_uring looks up a job's pages when it is handed over, so this job still has them"
            );
        }
        Ok(bytes) => panic!("read {bytes:?} through an import that was released"),
    }
}

#[test]
fn what_can_not_be_pinned_is_a_fault_with_the_kernels_errno() {
    let device = device!();
    for backing in
        [Backing::FileReadOnly, Backing::FileSharedReadOnly, Backing::MemfdSealedReadOnly, Backing::FileShared]
    {
        let region = Region::new(backing, 1).expect("mapped");
        let error = device.pin(region.range()).expect_err("not pinnable");
        assert!(matches!(error, DeviceError::Fault { range, .. } if range == region.range()), "{backing:?}: {error}");
        assert!([libc::EFAULT, libc::EOPNOTSUPP].contains(&error.errno()), "{backing:?}: {error}");
    }
    let region = Region::new(Backing::Anonymous, 3).expect("mapped");
    region.unmap(1..2).expect("unmapped");
    assert_eq!(device.pin(region.range()).expect_err("a hole").errno(), libc::EFAULT);
    assert_eq!(device.live_imports(), 0);
}

#[test]
fn pins_are_counted_by_the_kernel_and_given_back() {
    let ending = isolated(|| {
        let device = device!();
        let before = Holdings::now();
        let region = Region::new(Backing::Anonymous, 64).expect("mapped");
        let imports: Vec<_> = (0..8).map(|i| device.pin(region.part(i * 8..i * 8 + 8)).expect("pinnable")).collect();
        assert_eq!(device.live_imports(), 8);
        assert_eq!(pinned() - before.pinned, 64 * page_size() as u64);
        drop((imports, region));
        assert_eq!(device.live_imports(), 0);
        // A kernel before 6.13 lets go of them a moment later.
        let end = Instant::now() + PATIENCE;
        while pinned() != before.pinned {
            assert!(Instant::now() < end, "{} bytes stay pinned, {} before", pinned(), before.pinned);
            std::thread::yield_now();
        }
    });
    ending.expect_return();
}

#[test]
fn more_than_the_limit_of_locked_memory_is_a_budget_error() {
    let ending = isolated(|| {
        let limit = nix::sys::resource::Resource::RLIMIT_MEMLOCK;
        if nix::unistd::geteuid().is_root() {
            skip!("root is exempt from RLIMIT_MEMLOCK");
        }
        nix::sys::resource::setrlimit(limit, 16 * page_size() as u64, 16 * page_size() as u64).expect("lowered");
        let device = device!();
        let region = Region::new(Backing::Anonymous, 64).expect("mapped");
        let error = device.pin(region.range()).expect_err("too much");
        assert!(matches!(error, DeviceError::Budget { .. }), "{error}");
    });
    ending.expect_return();
}

#[test]
fn dropping_the_device_cancels_what_has_not_begun_and_leaves_nothing() {
    let ending = isolated(|| {
        let before = Holdings::now();
        let region = Region::new(Backing::Anonymous, 1).expect("mapped");
        let device = device!();
        let import = device.pin(region.range()).expect("pinnable");
        let jobs: Vec<_> = (0..400).map(|_| device.write_job(&import, 0, &[9]).expect("made").hold()).collect();
        jobs.iter().for_each(pinfold_tests::dma::Job::start);
        drop(device);
        for job in &jobs {
            assert_eq!(job.fence().wait(PATIENCE), Some(Outcome::Lost));
        }
        assert_eq!(region.read(0, 1).expect("mapped"), [1]);
        drop((jobs, import, region));
        assert_eq!(Holdings::now().descriptors, before.descriptors);
    });
    ending.expect_return();
}
