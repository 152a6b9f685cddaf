//! Files that are not what they should be: the demo says what is wrong and ends with 1, and the reader never panics, whatever the bytes.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use pinfold_demos::glb::{Array, Glb};
use pinfold_demos::scene::Scene;
use proptest::prelude::*;
use serde_json::json;

#[allow(dead_code, reason = "each test file uses another part of it")]
mod model;
#[allow(dead_code, reason = "each test file uses another part of it")]
mod skip;
use model::{Indices, Model, container};

fn cube() -> Model {
    Model::cube(Indices::U16)
}

/// What the demo prints to stderr when it refuses `path`.
fn refusal(path: &Path, as_nobody: bool) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_demo"));
    command.arg(path).args(["-o", "/dev/null"]);
    if as_nobody {
        command.uid(65534).gid(65534);
    }
    let output = command.output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    assert!(stderr.contains(path.to_str().unwrap()), "the message doesn't name the file: {stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    stderr
}

#[test]
fn every_kind_of_broken_file_is_named_with_what_is_wrong() {
    let cube_bytes = cube().bytes();
    let edited = |at: usize, byte: u8| {
        let mut bytes = cube_bytes.clone();
        bytes[at] = byte;
        bytes
    };
    let json_len = u32::from_le_bytes(cube_bytes[12..16].try_into().unwrap()) as usize;
    let binary_header = 20 + json_len;
    let accessor = |key: &str, value| cube().with(&format!("/accessors/0/{key}"), value).bytes();
    let primitive = "/meshes/0/primitives/0";

    let cases: Vec<(Vec<u8>, &str)> = vec![
        (vec![], "empty (0 bytes)"),
        (b"gl".to_vec(), "truncated: the header"),
        (b"PNG and so on".to_vec(), "not a GLB file"),
        (b"{\"asset\": {}}".to_vec(), "text glTF"),
        (b"\n { \"asset\": {}}".to_vec(), "text glTF"),
        (edited(4, 1), "version 1"),
        (cube_bytes[..10].to_vec(), "truncated: the header"),
        (cube_bytes[..cube_bytes.len() - 1].to_vec(), "truncated: the container"),
        (edited(14, 0xff), "truncated: the JSON chunk"),
        (edited(binary_header + 3, 0x7f), "truncated: the binary chunk"),
        (edited(16, b'X'), "the first one is not JSON"),
        (edited(binary_header + 4, b'X'), "no binary chunk"),
        (container(b"", Some(&[0; 4])), "JSON chunk can't be read"),
        (container(b"[1, 2", Some(&[0; 4])), "JSON chunk can't be read"),
        (container(b"{}", Some(&[0; 4])), "JSON chunk can't be read"),
        (container(cube().json.to_string().as_bytes(), None), "no binary chunk"),
        // Accessors and what they lie in.
        (accessor("count", json!(49)), "outside"),
        (accessor("count", json!(u64::MAX)), "18446744073709551615 elements"),
        (accessor("count", json!(0)), "0 elements"),
        (accessor("byteOffset", json!(u64::MAX - 3)), "outside"),
        (accessor("byteOffset", json!(2)), "begins at byte"),
        (accessor("type", json!("VEC2")), "not what it is used for"),
        (accessor("type", json!("VEC9")), "unknown type"),
        (accessor("componentType", json!(5123)), "not what it is used for"),
        (accessor("componentType", json!(7)), "unknown type"),
        (accessor("bufferView", json!(9)), "buffer view 9, which does not exist"),
        (cube().without("/accessors/0/bufferView").bytes(), "no buffer view"),
        (cube().without("/accessors/0/min").bytes(), "smallest and largest"),
        (accessor("max", json!([1.0, "x", 1.0])), "smallest and largest"),
        (accessor("max", json!([1.0, -2.0, 1.0])), "above its largest"),
        (
            accessor(
                "sparse",
                json!({"count": 1, "indices": {"bufferView": 1, "componentType": 5123},
                                   "values": {"bufferView": 0}}),
            ),
            "sparse",
        ),
        (cube().with("/accessors/1/count", json!(23)).bytes(), "23 elements for 24 positions"),
        (cube().with("/accessors/2/componentType", json!(5126)).bytes(), "not what it is used for"),
        (cube().with("/bufferViews/0/byteStride", json!(4)).bytes(), "stride of 4"),
        (cube().with("/bufferViews/0/byteStride", json!(14)).bytes(), "stride of 14"),
        (cube().with("/bufferViews/1/byteStride", json!(4)).with("/accessors/2/count", json!(18)).bytes(), "packed"),
        (cube().with("/bufferViews/0/byteOffset", json!(u64::MAX)).bytes(), "of a buffer of"),
        (cube().with("/bufferViews/0/byteLength", json!(1 << 20)).bytes(), "of a buffer of"),
        (cube().with("/bufferViews/0/buffer", json!(1)).bytes(), "buffer 1, which does not exist"),
        (cube().with("/buffers/0/byteLength", json!(1 << 20)).bytes(), "the binary chunk has"),
        (cube().with("/buffers/0/uri", json!("cube.bin")).bytes(), "in another file"),
        (cube().with("/buffers/0/uri", json!("data:,x")).bytes(), "inside the JSON"),
        (cube().with("/extensionsRequired", json!(["KHR_draco_mesh_compression"])).bytes(), "compressed"),
        (cube().with("/extensionsRequired", json!(["ACME_cubes"])).bytes(), "requires the extension ACME_cubes"),
        // Indices that lead nowhere, and scenes that are none.
        (cube().with("/scene", json!(3)).bytes(), "scene 3"),
        (cube().with("/scenes/0/nodes", json!([7])).bytes(), "node 7"),
        (cube().with("/nodes/0/children", json!([0])).bytes(), "no tree"),
        (cube().with("/nodes/0/mesh", json!(5)).bytes(), "mesh 5"),
        (cube().with(&format!("{primitive}/attributes/POSITION"), json!(99)).bytes(), "accessor 99"),
        (cube().with(&format!("{primitive}/indices"), json!(99)).bytes(), "accessor 99"),
        (cube().with(&format!("{primitive}/material"), json!(99)).bytes(), "material 99"),
        (cube().without(&format!("{primitive}/attributes/POSITION")).bytes(), "no positions"),
        (cube().with(&format!("{primitive}/mode"), json!(1)).bytes(), "no triangles"),
        (cube().with("/nodes/0/matrix", json!(vec![1e300; 16])).bytes(), "not finite"),
    ];
    let folder = tempfile::tempdir().unwrap();
    for (number, (bytes, wanted)) in cases.iter().enumerate() {
        let path = folder.path().join(format!("case {number}.glb"));
        fs::write(&path, bytes).unwrap();
        let message = refusal(&path, false);
        assert!(message.contains(wanted), "case {number}: wanted {wanted:?} in: {message}");
    }
}

#[test]
fn a_directory_a_missing_file_a_pipe_and_a_forbidden_file_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    assert!(refusal(folder.path(), false).contains("directory"));
    assert!(refusal(&folder.path().join("none.glb"), false).contains("No such file"));
    let pipe = folder.path().join("pipe.glb");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
    assert!(refusal(&pipe, false).contains("pipe"));

    // Root may read everything, so the demo runs as somebody else there.
    let root = nix::unistd::geteuid().is_root();
    let forbidden = folder.path().join("forbidden.glb");
    fs::write(&forbidden, cube().bytes()).unwrap();
    fs::set_permissions(&forbidden, fs::Permissions::from_mode(0o000)).unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let runs = Command::new(env!("CARGO_BIN_EXE_demo")).arg("--help").uid(nobody(root)).output();
    if root && !runs.is_ok_and(|output| output.status.success()) {
        skip::skip_part("a forbidden file: the demo can't be run as another user from where it was built");
        return;
    }
    assert!(refusal(&forbidden, root).contains("Permission denied"));
}

fn nobody(root: bool) -> u32 {
    if root { 65534 } else { nix::unistd::geteuid().as_raw() }
}

#[test]
fn a_chunk_nobody_knows_is_skipped_and_what_follows_the_container_is_ignored() {
    let plain = cube().bytes();
    let json_end = 20 + u32::from_le_bytes(plain[12..16].try_into().unwrap()) as usize;
    let extra = [4_u32.to_le_bytes().as_slice(), b"WHAT", b"ever"].concat();
    let mut bytes = [&plain[..json_end], &extra, &plain[json_end..]].concat();
    let len = u32::try_from(bytes.len()).unwrap();
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes.extend(b"a signature");
    let (glb, scene) = load(&bytes).unwrap();
    assert_eq!(scene.triangles(), 12);
    assert_eq!(glb.binary.end(), u64::from(len));
}

#[test]
fn the_bytes_that_draws_name_are_counted_once() {
    for (form, named) in [(Indices::U8, 24 * 24 + 36), (Indices::U32, 24 * 24 + 144), (Indices::None, 36 * 24)] {
        let (_, scene) = load(&Model::cube(form).bytes()).unwrap();
        assert_eq!(scene.named_bytes(), named, "{form:?}");
    }
    let twice = cube().with("/nodes", json!([{"mesh": 0}, {"mesh": 0}])).with("/scenes/0/nodes", json!([0, 1]));
    let (glb, scene) = load(&twice.bytes()).unwrap();
    assert_eq!(scene.draws.len(), 2);
    assert_eq!(scene.named_bytes(), glb.binary.len);
}

/// The file and its scene, or the message.
fn load(bytes: &[u8]) -> Result<(Glb, Scene), String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    let glb = Glb::open(file.path()).map_err(|e| e.to_string())?;
    let scene = Scene::load(&glb).map_err(|e| e.to_string())?;
    Ok((glb, scene))
}

/// What the GPU is given lies inside the file and is aligned, or there was an error.
fn check(bytes: &[u8]) {
    let Ok((glb, scene)) = load(bytes) else { return };
    for draw in &scene.draws {
        for array in [Some(draw.positions), draw.normals, draw.indices].into_iter().flatten() {
            let Array { offset, count, stride, component, bytes: len } = array;
            assert!(glb.binary.start <= offset && offset + len <= glb.binary.end() && glb.binary.end() <= glb.len);
            assert!(offset % u64::from(component) == 0 && stride % component == 0, "{array:?}");
            assert!(count > 0 && u64::from(count - 1) * u64::from(stride) < len, "{array:?}");
        }
    }
}

/// The cube's JSON with its `which`th number replaced by `text`.
fn with_number(which: usize, text: &str) -> Vec<u8> {
    let (model, mut result, mut number) = (cube(), String::new(), 0);
    let json = model.json.to_string();
    let mut rest = json.as_str();
    while let Some(start) = rest.find(|c: char| c.is_ascii_digit()) {
        let end = rest[start..].find(|c: char| !c.is_ascii_digit()).map_or(rest.len(), |n| start + n);
        result.push_str(&rest[..start]);
        result.push_str(if number == which { text } else { &rest[start..end] });
        (rest, number) = (&rest[end..], number + 1);
    }
    result.push_str(rest);
    container(result.as_bytes(), Some(&model.binary))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_truncation_makes_the_reader_panic_or_reach_outside(len in 0_usize..3000) {
        let bytes = cube().bytes();
        check(&bytes[..len.min(bytes.len())]);
    }

    #[test]
    fn no_flipped_bytes_make_the_reader_panic_or_reach_outside(flips in prop::collection::vec((0_usize..1600, any::<u8>()), 1..6)) {
        let mut bytes = cube().bytes();
        for (at, value) in flips {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        check(&bytes);
    }

    #[test]
    fn no_number_in_the_json_makes_the_reader_panic_or_reach_outside(
        which in 0_usize..80,
        value in prop_oneof![any::<u64>(), 0_u64..2000, Just(u64::MAX), Just(1 << 32), Just(u64::from(u32::MAX))],
    ) {
        check(&with_number(which, &value.to_string()));
    }
}
