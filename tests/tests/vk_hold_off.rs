//! The main promise on a real driver: whoever takes memory away that the device is reading is held until the device is done.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use pinfold_invalidate::page_size;
use pinfold_tests::memory::{Backing, Region, peek};
use pinfold_tests::process::{Verdict, isolated, isolated_case};
use pinfold_tests::vulkan::Gpu;
use pinfold_tests::{PATIENCE, gpu, skip_part};
use pinfold_vulkan::{Access, Config, Manager, Outcome, Path, State};

const PAGES: usize = 256;
const SEVENS: u32 = 0x0707_0707;

fn manager(gpu: &Gpu) -> Manager {
    let mut config = Config::default();
    config.deadline = Duration::from_secs(10);
    // SAFETY: the handles belong together, and the manager goes before the device.
    unsafe { Manager::new(gpu.context(), config) }.unwrap()
}

/// Memory full of sevens, an object over it, and what `during` does while a job that reads it is on the device and cannot end before it is opened.
fn with_reader(backing: Backing, mutate: fn(&Region), begun: fn(&Region) -> bool) {
    let gpu = gpu!();
    let region = Region::new(backing, PAGES).unwrap();
    if backing.writable() {
        region.fill(0..PAGES, 7).unwrap();
    }
    let manager = manager(&gpu);
    // SAFETY: no reference points into a region; the shared mappings of this test are imported through an alias, which outlives them.
    let object = unsafe { manager.register(region.range(), Access::Read) }.unwrap();
    let lease = manager.acquire_timeout(&[&object], PATIENCE).unwrap();
    assert_eq!(lease.view(0).path, Path::AliasImport, "{backing:?}");
    let view = lease.view(0);
    let job = gpu.scan_job(view.buffer, view.offset, view.size, SEVENS, 3).hold();
    // SAFETY: the signal is the job's, which reads through the view.
    let pending = unsafe { lease.submit([job.signal()], || job.start()) }.unwrap();
    let returned = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            mutate(&region);
            assert!(job.is_over(), "{backing:?}: returned while the device was reading");
            assert_eq!(object.state().unwrap(), State::Invalid, "{backing:?}");
            returned.store(true, Ordering::SeqCst);
        });
        while !begun(&region) {
            thread::yield_now();
        }
        assert!(!returned.load(Ordering::SeqCst));
        job.open();
    });
    assert_eq!(job.others(), 0, "{backing:?}: the device read what it was given, to the end");
    assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
    assert_eq!(manager.stats().late, 0);
    drop(manager);
}

#[test]
fn munmap_of_shared_memory_waits_for_the_device() {
    for (case, backing) in [
        ("memfd", Backing::Memfd),
        ("shm", Backing::Shm),
        ("shared anonymous", Backing::AnonymousShared),
        ("shared file", Backing::FileShared),
    ] {
        isolated_case(case, PATIENCE, move || {
            if let Err(why) = Region::new(backing, 1) {
                skip_part!("{backing:?}: {why}");
                return;
            }
            // The mapping is gone from the moment on at which its mutator begins to wait.
            with_reader(
                backing,
                |region| region.unmap_all().unwrap(),
                |region| peek(region.range().start(), 1).is_err(),
            );
        })
        .expect_return();
    }
}

#[test]
fn another_mapping_put_over_the_memory_waits_for_the_device() {
    isolated(|| {
        let begun = |region: &Region| peek(region.range().start(), 1).is_ok_and(|byte| byte != [7]);
        with_reader(Backing::AnonymousShared, |region| region.map_over(0..PAGES).unwrap(), begun);
    })
    .expect_return();
}

/// A CPU driver reads private memory through the program's own page tables, so nothing can be held for it: when the event comes, the mapping is gone.
/// The verdict of such a driver is the crash; a device that pins pages must come through.
#[test]
fn munmap_of_private_memory_under_running_work_crashes_a_cpu_driver_by_nature() {
    let cpu = {
        let gpu = gpu!();
        let manager = manager(&gpu);
        manager.capabilities().device_type == ash::vk::PhysicalDeviceType::CPU
    };
    let ending = isolated(|| {
        let gpu = gpu!();
        let region = Region::new(Backing::Anonymous, PAGES).unwrap();
        region.fill(0..PAGES, 7).unwrap();
        let manager = manager(&gpu);
        // SAFETY: no reference points into a region. That a CPU driver may crash is what is shown here, in a process of its own.
        let object = unsafe { manager.register(region.range(), Access::Read) }.unwrap();
        let lease = manager.acquire_timeout(&[&object], PATIENCE).unwrap();
        assert_eq!(lease.view(0).path, Path::Import);
        let view = lease.view(0);
        let job = gpu.scan_job(view.buffer, view.offset, view.size, SEVENS, 1000).hold();
        // SAFETY: the signal is the job's, which reads through the view.
        let pending = unsafe { lease.submit([job.signal()], || job.start()) }.unwrap();
        thread::scope(|scope| {
            scope.spawn(|| region.unmap_all().unwrap());
            while peek(region.range().start(), page_size()).is_ok() {
                thread::yield_now();
            }
            job.open();
        });
        assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
    });
    ending.expect(if cpu { Verdict::Signal(libc::SIGSEGV) } else { Verdict::Returned });
}
