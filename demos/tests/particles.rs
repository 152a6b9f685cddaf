//! The particles as a whole, a few thousand of them: the same picture both ways, and pictures that show something and move.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::process::Command;

use pinfold_demos::device::{Gpu, Validation};
use serde_json::Value;

#[allow(dead_code, reason = "each test file uses another part of it")]
mod skip;

/// The pixels of every frame of a PNG.
fn frames(path: &Path) -> Vec<Vec<u8>> {
    let mut reader = png::Decoder::new(BufReader::new(File::open(path).unwrap())).read_info().unwrap();
    let count = reader.info().animation_control().map_or(1, |animation| animation.num_frames);
    let frame = |_| {
        let mut rgb = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut rgb).unwrap();
        rgb
    };
    (0..count).map(frame).collect()
}

#[test]
fn pictures_from_the_particles_themselves_and_from_a_copy_are_the_same_and_they_move() {
    if let Err(error) = Gpu::open(None, Validation::Off) {
        skip::skip(format_args!("{error:#}"));
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("sky");
    let run = Command::new(env!("CARGO_BIN_EXE_particles"))
        .args(["--count", "20000", "--frames", "6", "--width", "320", "--json", "-o"])
        .arg(&output)
        .env_remove("PINFOLD_FORCE")
        .env_remove("PINFOLD_VALIDATION")
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success() && !stderr.contains("validation:"), "{stderr}");
    let report: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!((&report["same_pictures"], &report["frames"]), (&true.into(), &6.into()), "{report:#}");
    assert_eq!(report["bytes"], 20_000 * 32);
    for time in ["step", "in_place", "acquire", "copied", "copy"] {
        assert!(report[time].as_f64().is_some_and(|time| time >= 0.0), "{time} in {report:#}");
    }

    let (first, last) = (frames(&folder.path().join("sky-first.png")), frames(&folder.path().join("sky-last.png")));
    let moving = frames(&folder.path().join("sky.png"));
    assert_eq!(moving.len(), 6);
    assert!(moving.windows(2).all(|pair| pair[0] != pair[1]), "a frame is the same as the one before");
    assert_ne!(first, last);
    // Stars, on a ground that is dark.
    let bright = first[0].chunks(3).filter(|pixel| pixel.iter().any(|&channel| channel > 100)).count();
    assert!((200..320 * 180 / 2).contains(&bright), "{bright} bright pixels");
}
