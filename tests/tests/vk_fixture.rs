//! The Vulkan device of the tests works on the driver it says, tells words apart, waits when it is told to, and lets no message pass.

use ash::vk;
use pinfold_tests::memory::{Backing, Region};
use pinfold_tests::{PATIENCE, gpu};
use pinfold_vulkan::{Access, Config, Manager, Outcome};

const PAGES: usize = 64;

#[test]
fn a_copy_job_sees_the_bytes() {
    let gpu = gpu!();
    let bytes: Vec<u8> = (0..=255).cycle().take(PAGES * 4096).collect();
    let source = gpu.scratch(&bytes);
    let job = gpu.copy_job(source.buffer, 1024, 4096, 3);
    job.start().expect("submitted");
    assert_eq!(job.finish(), bytes[1024..5120]);
}

#[test]
fn a_scan_counts_what_differs_in_every_round() {
    let gpu = gpu!();
    let mut words = vec![7_u32; 100_000];
    (words[0], words[64], words[99_999]) = (1, 2, 3);
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let source = gpu.scratch(&bytes);
    for (offset, others) in [(0, 3), (4, 2), (65 * 4, 1)] {
        let job = gpu.scan_job(source.buffer, offset, bytes.len() as u64 - offset, 7, 5);
        job.start().expect("submitted");
        assert_eq!(job.others(), others * 5, "from {offset} on");
    }
}

#[test]
fn a_fill_job_writes() {
    let gpu = gpu!();
    let target = gpu.scratch(&[1; 4096]);
    let job = gpu.fill_job(target.buffer, 1024, 2048, 0x0202_0202);
    job.start().expect("submitted");
    let _ = job.finish();
    assert_eq!(target.bytes(), [[1; 1024], [2; 1024], [2; 1024], [1; 1024]].as_flattened());
}

#[test]
fn a_holding_job_reads_only_after_it_is_opened() {
    let gpu = gpu!();
    let mut source = gpu.scratch(&[1; 4096]);
    let held = gpu.copy_job(source.buffer, 0, 4096, 1).hold();
    held.start().expect("submitted");
    source.write(&[2; 4096]);
    assert!(!held.is_over());
    assert_eq!(held.finish(), [2; 4096]);
    assert!(held.is_over());
}

#[test]
fn a_manager_takes_it_and_its_jobs_retire_submits() {
    let gpu = gpu!();
    // SAFETY: the handles belong together, and the manager goes before the device.
    let manager = unsafe { Manager::new(gpu.context(), Config::default()) }.expect("a manager");
    let region = Region::new(Backing::Memfd, PAGES).expect("mapped");
    region.fill(0..PAGES, 7).expect("writable");
    // SAFETY: no reference points into a region, which lives longer than the object.
    let object = unsafe { manager.register(region.range(), Access::Read) }.expect("registered");
    let lease = manager.acquire_timeout(&[&object], PATIENCE).expect("importable");
    let view = lease.view(0);
    let job = gpu.scan_job(view.buffer, view.offset, view.size, 0x0707_0707, 10).hold();
    // SAFETY: the signal is the job's, which reads through the view.
    let pending = unsafe { lease.submit([job.signal()], || job.start()) }.expect("valid");
    assert_eq!((pending.poll(), object.in_flight()), (None, 1));
    assert_eq!(job.others(), 0);
    assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
}

#[test]
fn a_message_of_the_layer_is_heard() {
    let gpu = gpu!();
    let info = vk::BufferCreateInfo::default().size(16);
    // SAFETY: it isn't valid to make a buffer without any usage; the layer says so, and both drivers make one all the same.
    let buffer = unsafe { gpu.device().create_buffer(&info, None) };
    if let Ok(buffer) = buffer {
        // SAFETY: the buffer is not in use.
        unsafe { gpu.device().destroy_buffer(buffer, None) };
    }
    let messages = gpu.take_messages();
    assert!(messages.iter().any(|message| message.contains("usage")), "{messages:?}");
}
