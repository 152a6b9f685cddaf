//! The demo as a whole, on the driver that the Vulkan loader finds: what it draws, and what it says about it.

use std::fs::{self, File};
use std::io::BufReader;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

use pinfold_demos::picture::Picture;
use pinfold_demos::render::BACKGROUND;
use serde_json::Value;

#[allow(dead_code, reason = "each test file uses another part of it")]
mod model;
#[allow(dead_code, reason = "each test file uses another part of it")]
mod skip;
use model::{Indices, Model};

const ENGINE: &str = "/usr/share/assimp/models/glTF2/2CylinderEngine-glTF-Binary/2CylinderEngine.glb";

/// Whether there is a Vulkan driver; says so if not.
fn driver() -> bool {
    match pinfold_demos::device::Gpu::open(None, pinfold_demos::device::Validation::Off) {
        Ok(gpu) => {
            println!("driver: {}", gpu.name());
            true
        }
        Err(error) => {
            skip::skip(format_args!("{error:#}"));
            false
        }
    }
}

fn engine() -> bool {
    let there = Path::new(ENGINE).exists();
    if !there {
        skip::skip("the engine is not installed (apt-get install assimp-testmodels)");
    }
    there
}

fn demo(arguments: &[&str], output: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_demo"));
    command.args(arguments).arg("-o").arg(output).env_remove("PINFOLD_FORCE").env_remove("PINFOLD_VALIDATION");
    command
}

/// The report and the picture of a run that must succeed.
fn play(arguments: &[&str]) -> (Value, Picture) {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("picture.png");
    let report = report(&demo(&[arguments, &["--json"]].concat(), &output).output().unwrap());
    (report, read_png(&output))
}

fn report(output: &Output) -> Value {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{:?}: {stderr}\n{}", output.status, String::from_utf8_lossy(&output.stdout));
    assert!(!stderr.contains("validation:"), "{stderr}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn read_png(path: &Path) -> Picture {
    let mut reader = png::Decoder::new(BufReader::new(File::open(path).unwrap())).read_info().unwrap();
    let mut rgb = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut rgb).unwrap();
    let rgba = rgb.chunks_exact(3).flat_map(|p| [p[0], p[1], p[2], 255]).collect();
    Picture { width: info.width, height: info.height, rgba }
}

/// What every run must have proven.
fn check_proofs(report: &Value) {
    let (act1, act2, act3) = (&report["in_place"], &report["busy_unmap"], &report["mapped_again"]);
    assert_eq!(act1["same_picture_as_staged"], true, "{report:#}");
    assert_eq!(act2["same_picture"], true, "{report:#}");
    assert_eq!(act2["frame_running_when_munmap_began"], true, "{report:#}");
    assert_eq!(act3["same_address"], true, "{report:#}");
    assert_eq!(act3["same_png"], true, "{report:#}");
    assert!(act3["generation"].as_u64() > act3["generation_in_act_1"].as_u64(), "{report:#}");
    if act2["coverage"] != "Watched" {
        skip::skip_part(format_args!("the hold-off: coverage {}", act2["coverage"]));
        return;
    }
    assert_eq!(act2["frame_over_when_munmap_returned"], true, "{report:#}");
    assert_eq!((&act2["became_invalid"], &act2["late"]), (&true.into(), &false.into()), "{report:#}");
}

#[test]
fn the_engine_is_drawn_in_place_and_looks_like_an_engine() {
    if !driver() || !engine() {
        return;
    }
    let (report, picture) = play(&["--size", "320x180", "--frames", "2"]);
    check_proofs(&report);
    assert_eq!(report["model"]["path"], ENGINE);
    assert_eq!(report["model"]["triangles"], 121_496);
    let act1 = &report["in_place"];
    if act1["path"] == "Import" {
        assert_eq!(act1["bytes_in_place"], report["model"]["named_bytes"]);
        assert_eq!((&act1["bytes_copied"], &act1["private_kib"]), (&0.into(), &0.into()), "{act1:#}");
        assert!(act1["resident_kib"].as_u64().unwrap() * 1024 >= act1["bytes_in_place"].as_u64().unwrap(), "{act1:#}");
    } else {
        skip::skip_part(format_args!("bytes in place: path {}", act1["path"]));
    }

    assert_eq!((picture.width, picture.height), (320, 180));
    let (drawn, area) = picture.drawn(BACKGROUND);
    assert_eq!(report["picture"]["drawn_pixels"], drawn);
    let [left, top, right, bottom] = area.expect("the picture is not blank");
    // It lies across: as wide as the frame allows, and much wider than high.
    assert!((20..36).contains(&left) && (284..300).contains(&right), "{area:?}");
    assert!(top > 2 && bottom < 177 && right - left > (bottom - top) * 3 / 2, "{area:?}");
    assert!(drawn > u64::from((right - left) * (bottom - top)) / 3, "{drawn} pixels in {area:?}");
    assert_ne!(picture.pixel(160, 90), BACKGROUND);
    // The caps of both cylinders are blue, the crankcase between them is grey, and what faces up is brighter than what faces down.
    let blue = |x: u32, y: u32| {
        let [r, g, b, _] = picture.pixel(x, y);
        b > 100 && u32::from(b) > 3 * u32::from(r) && g > r
    };
    let count = |range: std::ops::Range<u32>| {
        range.flat_map(|x| (0..180).map(move |y| (x, y))).filter(|&(x, y)| blue(x, y)).count()
    };
    let (left_cap, middle, right_cap) = (count(0..100), count(100..215), count(215..320));
    assert!(left_cap > 500 && right_cap > 1500 && middle < 200, "{left_cap} {middle} {right_cap}");
    let [r, g, b, _] = picture.pixel(112, 60);
    assert!(r.abs_diff(g) < 12 && g.abs_diff(b) < 12 && r > 90, "the crankcase is {:?}", [r, g, b]);
    let brightness = |y| u32::from(picture.pixel(150, y)[1]);
    assert!(brightness(30) > brightness(70) && brightness(70) > 60, "{} {}", brightness(30), brightness(70));
}

#[test]
fn a_mirror_gives_the_same_proofs_and_counts_its_copy() {
    if !driver() {
        return;
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), Model::cube(Indices::U16).bytes()).unwrap();
    let arguments = [file.path().to_str().unwrap(), "--size", "96x96", "--frames", "1"];
    let (imported, picture) = play(&arguments);
    check_proofs(&imported);
    let (mirrored, same) = play(&[arguments.as_slice(), &["--path", "mirror"]].concat());
    check_proofs(&mirrored);
    assert_eq!(same, picture);
    let act1 = &mirrored["in_place"];
    assert!(act1["path"].as_str().unwrap().starts_with("Mirror"), "{act1:#}");
    assert_eq!(act1["bytes_in_place"], 0);
    assert!(act1["bytes_copied"].as_u64().unwrap() >= fs::metadata(file.path()).unwrap().len(), "{act1:#}");
}

#[test]
fn an_import_is_what_is_asked_for_and_a_forbidden_alias_is_an_error_on_a_cpu_driver_instead_of_a_crash() {
    if !driver() {
        return;
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), Model::cube(Indices::U16).bytes()).unwrap();
    let arguments = [file.path().to_str().unwrap(), "--size", "64x64", "--frames", "1", "--path", "import", "--json"];
    let output = demo(&arguments, Path::new("/dev/null")).output().unwrap();
    if String::from_utf8_lossy(&output.stderr).contains("VK_EXT_external_memory_host") {
        skip::skip("this device can't import host memory");
        return;
    }
    let imported = report(&output);
    check_proofs(&imported);
    assert_eq!(imported["in_place"]["path"], "Import");
    if imported["device"]["kind"] == "CPU driver" {
        assert_eq!(imported["busy_unmap"]["path"], "AliasImport");
        let output = demo(&arguments, Path::new("/dev/null")).env("PINFOLD_FORCE", "import").output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{:?}", output.status);
        assert!(String::from_utf8_lossy(&output.stderr).contains("PINFOLD_FORCE"));
    }
}

#[test]
fn a_model_that_may_only_be_read_is_copied_for_the_busy_act_on_a_cpu_driver() {
    if !driver() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let path = folder.path().join("cube.glb");
    fs::write(&path, Model::cube(Indices::U8).bytes()).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
    let arguments = [path.to_str().unwrap(), "--size", "96x96", "--frames", "1", "--json"];
    let mut command = demo(&arguments, &folder.path().join("picture.png"));
    if nix::unistd::geteuid().is_root() {
        command.uid(65534).gid(65534);
    }
    let Ok(output) = command.output() else {
        skip::skip("the demo can't be run as another user from where it was built");
        return;
    };
    let report = report(&output);
    check_proofs(&report);
    if report["device"]["kind"] == "CPU driver" {
        let act2 = &report["busy_unmap"];
        assert_eq!(act2["bytes_copied_for_this_act"], fs::metadata(&path).unwrap().len());
        assert!(act2["mapping"].as_str().unwrap().contains("Permission denied"), "{act2:#}");
    }
}

#[test]
fn the_lines_for_people_say_what_was_proven() {
    if !driver() {
        return;
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), Model::cube(Indices::U16).bytes()).unwrap();
    let output = demo(&[file.path().to_str().unwrap(), "--size", "64x64", "--frames", "1"], Path::new("/dev/null"));
    let output = { output }.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    for part in ["bytes were copied", "medians of 1 pairs", "munmap was held", "generation", "identical, byte for byte"]
    {
        assert!(text.contains(part), "{part:?} is missing in:\n{text}");
    }
}

#[test]
fn a_picture_of_no_size_and_an_unwritable_place_are_refused() {
    if !driver() {
        return;
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), Model::cube(Indices::U16).bytes()).unwrap();
    let model = file.path().to_str().unwrap();
    for (arguments, wanted) in [
        (&[model, "--size", "0x10"][..], "not 0x10"),
        (&[model, "--size", "10"], "WIDTHxHEIGHT"),
        (&[model, "--frames", "0"], "0"),
        (&[model, "--gpu", "no such device"], "none of the devices"),
        (&[model, "--size", "64x64", "--frames", "1"], "/nowhere/picture.png"),
    ] {
        let output = demo(arguments, Path::new("/nowhere/picture.png")).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains(wanted) && !stderr.contains("panicked"), "{stderr}");
    }
}
