//! The Vulkan device of the tests works on the driver it says, tells words apart, waits when it is told to, and lets no message pass.

use ash::vk;
use pinfold_tests::gpu;

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
