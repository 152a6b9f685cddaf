//! Two processes and one frame, as a whole: what the second one's device saw is what the first one has, and the figures are true.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::process::Command;

use pinfold_core::dmabuf::Udmabuf;
use pinfold_demos::device::{Gpu, Validation};
use pinfold_vulkan::{Config, Manager, Support};
use serde_json::Value;

#[allow(dead_code, reason = "each test file uses another part of it")]
mod skip;

/// Whether there is a device, and whether it imports dma-bufs.
fn takes_dmabufs() -> Option<bool> {
    let gpu = match Gpu::open(None, Validation::Off) {
        Ok(gpu) => gpu,
        Err(error) => {
            skip::skip(format_args!("{error:#}"));
            return None;
        }
    };
    // SAFETY: the handles are the device's own, and the manager is dropped first.
    let manager = unsafe { Manager::new(gpu.context(), Config::default()) }.unwrap();
    Some(manager.capabilities().dmabuf == Support::Usable)
}

/// Runs it; the last frame that the viewer's device saw, as RGB, and the figures.
fn share(folder: &Path, arguments: &[&str], force: Option<&str>) -> (Vec<u8>, Value) {
    let output = folder.join("seen.png");
    let mut command = Command::new(env!("CARGO_BIN_EXE_share"));
    command.args(arguments).args(["--width", "161", "--height", "90", "--json", "-o"]).arg(&output);
    command.env_remove("PINFOLD_FORCE").env_remove("PINFOLD_VALIDATION");
    if let Some(force) = force {
        command.env("PINFOLD_FORCE", force);
    }
    let run = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success() && !stderr.contains("validation:"), "{stderr}");
    let mut reader = png::Decoder::new(BufReader::new(File::open(output).unwrap())).read_info().unwrap();
    let mut rgb = vec![0; reader.output_buffer_size().unwrap()];
    reader.next_frame(&mut rgb).unwrap();
    (rgb, serde_json::from_slice(&run.stdout).unwrap())
}

#[test]
fn the_second_process_sees_the_frames_of_the_first_and_nothing_is_copied() {
    let Some(imports) = takes_dmabufs() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (rgb, report) = share(folder.path(), &["--frames", "5"], None);
    assert_eq!((&report["frames"], &report["right"]), (&5.into(), &5.into()), "{report:#}");
    assert_eq!(report["bytes_copied"], 0);
    assert!(rgb.chunks(3).any(|pixel| pixel != &rgb[..3]), "rings, not one colour");

    // By which way, and what stands in the way of a better one.
    let (path, because) = (report["path"].as_str().unwrap(), report["because"].to_string());
    let no_device = Udmabuf::open().err();
    match (imports, &no_device) {
        (true, None) => assert_eq!((&report["handed_over"], path), (&"a dma-buf".into(), "DmaBuf: the dma-buf")),
        (true, Some(error)) => {
            assert_eq!(report["handed_over"], "the memory file");
            assert!(because.contains(&error.to_string()), "{because}");
        }
        (false, _) => {
            assert_eq!(report["handed_over"], "the memory file");
            assert!(path.ends_with("the mapped memory file"), "{path}");
            assert!(because.contains("VK_EXT_external_memory_dma_buf"), "{because}");
        }
    }
}

#[test]
fn raw_video_comes_out_as_it_is_in_the_file() {
    if takes_dmabufs().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let pixels = 161 * 90;
    let raw: Vec<u8> = (0..pixels * 4 * 2 + 100).map(|at: usize| (at * at / 3 % 256) as u8).collect();
    let file = folder.path().join("video.raw");
    std::fs::write(&file, &raw).unwrap();
    let (rgb, report) = share(folder.path(), &[file.to_str().unwrap()], None);
    assert_eq!(report["frames"], 2, "and a rest that is no frame");
    let last: Vec<u8> = raw[pixels * 4..pixels * 8].chunks(4).flat_map(|pixel| pixel[..3].to_vec()).collect();
    assert!(rgb == last, "the picture is the last frame of the file");
}

#[test]
fn a_copy_is_told_as_one() {
    let Some(imports) = takes_dmabufs() else { return };
    if imports {
        skip::skip("a device that imports the buffer itself copies nothing");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (_, report) = share(folder.path(), &["--frames", "3"], Some("mirror"));
    assert_eq!((&report["frames"], &report["right"]), (&3.into(), &3.into()), "{report:#}");
    assert!(report["path"].as_str().unwrap().starts_with("Mirror"), "{report:#}");
    assert!(report["bytes_copied"].as_u64().unwrap() >= 3 * 161 * 90 * 4, "{report:#}");
}

#[test]
fn a_file_that_holds_no_frame_is_refused_with_the_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("short.raw");
    std::fs::write(&file, [0; 100]).unwrap();
    let run = Command::new(env!("CARGO_BIN_EXE_share")).arg(&file).current_dir(folder.path()).output().unwrap();
    let stderr = String::from_utf8_lossy(&run.stderr);
    assert!(!run.status.success() && stderr.contains("100 bytes; a frame has 8294400"), "{stderr}");
}
