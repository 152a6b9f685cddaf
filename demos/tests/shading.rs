//! The renderer on a real driver: what a cube must look like from outside, in whatever form its bytes are stored.

use std::fs;

use pinfold_demos::camera::Camera;
use pinfold_demos::device::{Gpu, Validation};
use pinfold_demos::geometry::{Staged, Widened};
use pinfold_demos::glb::Glb;
use pinfold_demos::picture::Picture;
use pinfold_demos::render::{BACKGROUND, Renderer};
use pinfold_demos::scene::Scene;
use serde_json::json;

#[allow(dead_code, reason = "each test file uses another part of it")]
mod model;
#[allow(dead_code, reason = "each test file uses another part of it")]
mod skip;
use model::{Indices, Model};

const SIZE: (u32, u32) = (160, 120);

/// A device, or the reason to skip.
fn gpu() -> Option<Gpu> {
    match Gpu::open(None, Validation::Wanted) {
        Ok(gpu) => Some(gpu),
        Err(error) => {
            skip::skip(format_args!("{error:#}"));
            None
        }
    }
}

/// The picture of a model, from a staged copy.
fn draw(gpu: &Gpu, model: &Model) -> Picture {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), model.bytes()).unwrap();
    let glb = Glb::open(file.path()).unwrap();
    let scene = Scene::load(&glb).unwrap();
    let mut renderer = Renderer::new(gpu, SIZE.0, SIZE.1).unwrap();
    let camera = Camera::framing(&scene, SIZE.0, SIZE.1);
    let staged = Staged::load(gpu, renderer.pool, &glb).unwrap();
    let widened = Widened::load(gpu, &glb, &scene).unwrap();
    renderer.record(&scene, &camera, &[staged.part], &widened, 1).unwrap();
    // SAFETY: `staged` and `widened` live until the wait has returned.
    unsafe { renderer.submit(None) }.unwrap();
    renderer.wait().unwrap();
    assert_eq!(gpu.messages(), 0, "the validation layer has something to say");
    renderer.picture()
}

/// The largest difference of a channel, and how many pixels differ by more than 3.
fn difference(a: &Picture, b: &Picture) -> (u8, usize) {
    let pixels = || a.rgba.chunks_exact(4).zip(b.rgba.chunks_exact(4));
    let of = |a: &[u8], b: &[u8]| a.iter().zip(b).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
    (pixels().map(|(a, b)| of(a, b)).max().unwrap(), pixels().filter(|(a, b)| of(a, b) > 3).count())
}

#[test]
fn a_cube_shows_three_faces_lit_from_the_left_and_above_and_fills_the_frame() {
    let Some(gpu) = gpu() else { return };
    let picture = draw(&gpu, &Model::cube(Indices::U16));
    let (count, area) = picture.drawn(BACKGROUND);
    let [left, top, right, bottom] = area.unwrap();
    // The frame leaves 4 % on each side of the tighter direction, which is the vertical one here.
    assert!((3..=8).contains(&top) && (111..=116).contains(&bottom), "{area:?}");
    assert!(left > 20 && right < 140 && left.abs_diff(SIZE.0 - 1 - right) <= 2, "{area:?}");
    assert!(count > u64::from((right - left) * (bottom - top)) * 6 / 10, "{count} pixels in {area:?}");

    let (x, y) = ((left + right) / 2, (top + bottom) / 2);
    let (roof, front, side) =
        (picture.pixel(x, top + 20), picture.pixel(x - 20, y + 15), picture.pixel(x + 25, y + 10));
    for face in [roof, front, side] {
        assert!(face[0] > 3 * face[1] && face[0] > 3 * face[2] / 2, "not red: {face:?}");
    }
    assert!(roof[0] > front[0] && front[0] > side[0], "roof {roof:?}, front {front:?}, side {side:?}");
}

#[test]
fn the_form_of_the_indices_changes_no_pixel() {
    let Some(gpu) = gpu() else { return };
    let wanted = draw(&gpu, &Model::cube(Indices::U16));
    for form in [Indices::U8, Indices::U32, Indices::None] {
        assert_eq!(draw(&gpu, &Model::cube(form)), wanted, "{form:?}");
    }
}

#[test]
fn indices_of_one_byte_are_widened_where_the_device_cannot_bind_them() {
    let Some(mut gpu) = gpu() else { return };
    let wanted = draw(&gpu, &Model::cube(Indices::U16));
    gpu.byte_indices = false;
    let model = Model::cube(Indices::U8);
    assert_eq!(draw(&gpu, &model), wanted);

    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), model.bytes()).unwrap();
    let glb = Glb::open(file.path()).unwrap();
    let scene = Scene::load(&glb).unwrap();
    assert_eq!(Widened::load(&gpu, &glb, &scene).unwrap().copied, 36);
}

#[test]
fn without_normals_a_cube_looks_the_same() {
    let Some(gpu) = gpu() else { return };
    let smooth = draw(&gpu, &Model::cube(Indices::U16));
    let flat = draw(&gpu, &Model::cube(Indices::U16).without("/meshes/0/primitives/0/attributes/NORMAL"));
    let (_, different) = difference(&smooth, &flat);
    // Where two faces meet in one pixel, derivatives may take the neighbour's.
    assert!(different < 60, "{different} pixels differ");
}

#[test]
fn a_mirrored_or_unevenly_scaled_cube_is_lit_from_outside() {
    let Some(gpu) = gpu() else { return };
    let wanted = draw(&gpu, &Model::cube(Indices::U16));
    let mirrored = draw(&gpu, &Model::cube(Indices::U16).with("/nodes/0/scale", json!([-1, 1, 1])));
    assert!(difference(&wanted, &mirrored).1 < 10);
    // A box of another shape, scaled to be the cube again: its normals must not be scaled with it.
    let nodes = json!([{"scale": [4, 1, 0.5], "children": [1]}, {"scale": [0.25, 1, 2], "mesh": 0}]);
    let undone = draw(&gpu, &Model::cube(Indices::U16).with("/nodes", nodes));
    assert!(difference(&wanted, &undone).1 < 10);
}

#[test]
fn the_inside_of_a_single_sided_cube_is_not_seen_and_of_a_double_sided_one_is() {
    let Some(gpu) = gpu() else { return };
    // Only the three faces that turn away from the camera: their backs are towards it.
    let away = |model: Model| {
        let mut model = model;
        let at = model.binary.len() - 72;
        let kept: Vec<u8> =
            [1_usize, 3, 5].into_iter().flat_map(|face| model.binary[at + 12 * face..][..12].to_vec()).collect();
        model.binary[at..at + 36].copy_from_slice(&kept);
        model.with("/accessors/2/count", json!(18))
    };
    let single = draw(&gpu, &away(Model::cube(Indices::U16)));
    assert_eq!(single.drawn(BACKGROUND).0, 0);
    let double = away(Model::cube(Indices::U16)).with("/materials/0/doubleSided", json!(true));
    assert!(draw(&gpu, &double).drawn(BACKGROUND).0 > 3000);
}

#[test]
fn an_index_beyond_the_vertices_crashes_nothing() {
    let Some(gpu) = gpu() else { return };
    let mut model = Model::cube(Indices::U32);
    let at = model.binary.len() - 8;
    model.binary[at..].copy_from_slice(&[0xf0, 0xff, 0xff, 0x7f, 0xff, 0xff, 0xff, 0x00]);
    assert!(draw(&gpu, &model).drawn(BACKGROUND).0 > 3000);
}
