//! Frames of the demo's renderer, drawn from where the model's vertices lie: in the program's own memory, or in a copy of it.
//!
//! Three cases for each size of model. The first frame: from a model that is in memory until its picture is done. A frame of a model that doesn't change. And
//! a frame of one whose vertices the program has all just moved: the copy has to be made again, what is drawn in place doesn't.

use std::cell::RefCell;
use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use pinfold_demos::camera::Camera;
use pinfold_demos::geometry::{Part, Widened};
use pinfold_demos::glb::{Glb, Span};
use pinfold_demos::render::Renderer;
use pinfold_demos::scene::Scene;
use pinfold_vulkan::{Access, Config, Lease, Manager, Timeline, Userptr};

use crate::groups::import::{PATIENCE, bytes, register, settle};
use crate::groups::index::thousands;
use crate::memory::Memory;
use crate::session::{Contender, Plan, Session};
use crate::stats::floor;
use crate::vulkan::{Card, Staged};

/// A sheet with waves in it: `side` squares along each edge, as binary glTF.
fn sheet(side: u32) -> Result<Vec<u8>> {
    let mut binary: Vec<u8> = Vec::new();
    let edge = side + 1;
    for row in 0..edge {
        for column in 0..edge {
            let (x, z) = (column as f32 / side as f32, row as f32 / side as f32);
            let y = 0.08 * (x * 19.0).sin() * (z * 23.0).cos();
            [x, y, z].iter().for_each(|value| binary.extend(value.to_le_bytes()));
        }
    }
    let positions = binary.len();
    for row in 0..side {
        for column in 0..side {
            let corner = row * edge + column;
            let corners = [corner, corner + edge, corner + 1, corner + 1, corner + edge, corner + edge + 1];
            corners.iter().for_each(|index| binary.extend(index.to_le_bytes()));
        }
    }
    let (all, vertices, indices) = (binary.len(), edge * edge, side * side * 6);
    let document = serde_json::json!({
        "asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1, "material": 0}]}],
        "materials": [{"doubleSided": true, "pbrMetallicRoughness": {"baseColorFactor": [0.2, 0.45, 0.8, 1.0]}}],
        "buffers": [{"byteLength": all}],
        "bufferViews": [{"buffer": 0, "byteOffset": 0, "byteLength": positions},
                        {"buffer": 0, "byteOffset": positions, "byteLength": all - positions}],
        "accessors": [{"bufferView": 0, "componentType": 5126, "count": vertices, "type": "VEC3",
                       "min": [0.0, -0.08, 0.0], "max": [1.0, 0.08, 1.0]},
                      {"bufferView": 1, "componentType": 5125, "count": indices, "type": "SCALAR"}],
    });
    let mut text = serde_json::to_vec(&document)?;
    text.resize(text.len().next_multiple_of(4), b' ');
    binary.resize(binary.len().next_multiple_of(4), 0);
    let mut file = Vec::with_capacity(text.len() + binary.len() + 28);
    let word = |file: &mut Vec<u8>, value: usize| -> Result<()> {
        file.extend(u32::try_from(value)?.to_le_bytes());
        Ok(())
    };
    file.extend(b"glTF");
    word(&mut file, 2)?;
    word(&mut file, 12 + 8 + text.len() + 8 + binary.len())?;
    word(&mut file, text.len())?;
    file.extend(b"JSON");
    file.extend(text);
    word(&mut file, binary.len())?;
    file.extend(b"BIN\0");
    file.extend(binary);
    Ok(file)
}

/// A file that is gone with its owner.
struct Temporary(PathBuf);

impl Temporary {
    fn with(content: &[u8]) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("pinfold-harness-{}.glb", std::process::id()));
        let made = Self(path);
        File::create(&made.0)
            .and_then(|mut file| file.write_all(content))
            .with_context(|| format!("can't write {}", made.0.display()))?;
        Ok(made)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A model in the program's memory, and what draws it.
struct Stage<'c> {
    card: &'c Card,
    renderer: RefCell<Renderer<'c>>,
    widened: Widened<'c>,
    scene: Scene,
    camera: Camera,
    /// The whole file, as offsets are those of the file.
    memory: Memory,
    len: u64,
}

impl<'c> Stage<'c> {
    fn new(card: &'c Card, side: u32, (width, height): (u32, u32)) -> Result<Self> {
        let file = Temporary::with(&sheet(side)?)?;
        let glb = Glb::open(&file.0)?;
        let scene = Scene::load(&glb)?;
        let memory = Memory::populated(usize::try_from(glb.len)?)?;
        let mut content = Vec::new();
        File::open(&file.0)?.read_to_end(&mut content)?;
        // SAFETY: the mapping is at least as long as the file, and nobody else knows it.
        unsafe { memory.pointer().copy_from_nonoverlapping(content.as_ptr(), content.len()) };
        let mut renderer = Renderer::new(&card.gpu, width, height)?;
        renderer.prepare(&scene)?;
        let (widened, camera) = (Widened::load(&card.gpu, &glb, &scene)?, Camera::framing(&scene, width, height));
        Ok(Self { card, renderer: RefCell::new(renderer), widened, scene, camera, memory, len: content.len() as u64 })
    }

    fn record(&self, parts: &[Part]) -> Result<()> {
        self.renderer.borrow_mut().record(&self.scene, &self.camera, parts, &self.widened, 1)
    }

    fn draw_in_place(&self, lease: Lease) -> Result<()> {
        let part = |chunk: &pinfold_vulkan::Chunk| Part {
            span: Span { start: chunk.at, len: chunk.size.min(self.len - chunk.at.min(self.len)) },
            buffer: chunk.buffer,
            offset: chunk.offset,
        };
        let parts: Vec<_> = lease.view(0).chunks().iter().map(part).collect();
        self.record(&parts)?;
        let renderer = self.renderer.borrow();
        let (semaphore, value) = self.card.next_value();
        // SAFETY: what the frame names is the object, which the lease keeps, and what the stage holds; it is waited for below.
        let submit = || unsafe { renderer.submit(Some((semaphore, value))) };
        // SAFETY: the frame signals the value at its end, and only reads the object.
        let submitted = unsafe { lease.submit([Timeline { semaphore, value }], submit) };
        let pending = submitted.map_err(|error| anyhow!("{error}"))?;
        renderer.wait()?;
        pending.wait(PATIENCE).context("the frame didn't end")?;
        Ok(())
    }

    fn draw_staged(&self, staged: &Staged<'_>) -> Result<()> {
        self.record(&[Part { span: Span { start: 0, len: self.len }, buffer: staged.buffer(), offset: 0 }])?;
        let renderer = self.renderer.borrow();
        // SAFETY: the copy is the caller's, who holds it, and the frame is waited for.
        unsafe { renderer.submit(None) }?;
        renderer.wait()
    }

    fn upload(&self, staged: &mut Staged<'_>) -> Result<()> {
        // SAFETY: the harness's memory is readable, and only this thread writes it.
        unsafe { staged.upload(self.memory.pointer()) }
    }

    /// Moves every vertex a little, as an animation does. Each page is written; what is drawn stays the same but for a trifle.
    fn animate(&self) {
        let first = self.scene.draws[0].positions;
        let start = usize::try_from(first.offset).expect("it lies in memory");
        for index in 0..first.count as usize {
            // SAFETY: `Glb::array` has found the array to lie inside the file, which the mapping holds.
            let at = unsafe { self.memory.pointer().add(start + index * first.stride as usize + 4) };
            #[allow(clippy::cast_ptr_alignment)]
            // `Glb::array` has found it to be a multiple of 4, and a mapping is aligned
            let height = at.cast::<f32>();
            // SAFETY: as above, and aligned.
            let value = unsafe { height.read_volatile() };
            // SAFETY: as above; no frame is in flight.
            unsafe { height.write_volatile(value * 0.999) };
        }
    }
}

/// Milliseconds of what `frame` does.
fn timed(frame: impl FnOnce() -> Result<()>) -> Result<f64> {
    let begun = Instant::now();
    frame()?;
    Ok(begun.elapsed().as_secs_f64() * 1e3)
}

fn first_frame(stage: &Stage<'_>, manager: &Manager) -> Result<f64> {
    let time = timed(|| {
        let object = register(manager, &stage.memory, Access::Read)?;
        stage.draw_in_place(manager.acquire_timeout(&[&object], PATIENCE)?)
    })?;
    settle(manager)?;
    Ok(time)
}

fn several(frames: usize, mut frame: impl FnMut() -> Result<f64>) -> Result<Vec<f64>> {
    (0..frames).map(|_| frame()).collect()
}

pub(crate) fn run(session: &mut Session, card: &Card) -> Result<()> {
    let picture = session.mode.pick((320, 180), (640, 360), (640, 360));
    let sides = session.mode.pick(vec![32, 192], vec![32, 192, 512], vec![32, 256, 1024]);
    session.fact("picture", format!("{} x {}", picture.0, picture.1));
    let manager = card.manager(Config::default())?;
    let mut curves = [Vec::new(), Vec::new(), Vec::new()];
    for side in sides {
        let stage = Stage::new(card, side, picture)?;
        let triangles = 2 * side as usize * side as usize;
        let of = format!("{} triangles, {}", thousands(triangles), bytes(stage.memory.len() / 1024 * 1024));

        if curves[0].is_empty() {
            let staged = RefCell::new(Staged::new(card, stage.memory.len())?);
            stage.upload(&mut staged.borrow_mut())?;
            let frame = || Contender::new("staged", || timed(|| stage.draw_staged(&staged.borrow())));
            session.measure(Plan::new("staged frame", "ms", frame()).against(frame(), None).control())?;
        }

        let copied = || {
            timed(|| {
                let mut staged = Staged::new(card, stage.memory.len())?;
                stage.upload(&mut staged)?;
                stage.draw_staged(&staged)
            })
        };
        let plan =
            Plan::new(format!("first frame, {of}"), "ms", Contender::new("in place", || first_frame(&stage, &manager)));
        curves[0].push((
            triangles as f64,
            session.measure(plan.against(Contender::new("staged", copied), None).at_most(21))?,
        ));

        // As many frames a sample as a tenth of a second has, so that a slow device doesn't take minutes.
        let one = timed(|| {
            let mut staged = Staged::new(card, stage.memory.len())?;
            stage.upload(&mut staged)?;
            stage.draw_staged(&staged)
        })?;
        let frames = floor(100.0 / one.max(1.0)).clamp(1, session.mode.pick(2, 10, 20));
        let object: Userptr = register(&manager, &stage.memory, Access::Read)?;
        let staged = RefCell::new(Staged::new(card, stage.memory.len())?);
        stage.upload(&mut staged.borrow_mut())?;
        for (number, changes) in [(1, false), (2, true)] {
            let in_place = || {
                several(frames, || {
                    if changes {
                        stage.animate();
                    }
                    timed(|| stage.draw_in_place(manager.acquire_timeout(&[&object], PATIENCE)?))
                })
            };
            let copied = || {
                several(frames, || {
                    if changes {
                        stage.animate();
                    }
                    timed(|| {
                        if changes {
                            stage.upload(&mut staged.borrow_mut())?;
                        }
                        stage.draw_staged(&staged.borrow())
                    })
                })
            };
            let what = if changes { "frame after all vertices moved" } else { "frame of a model at rest" };
            let plan = Plan::new(format!("{what}, {of}"), "ms", Contender::many("in place", in_place));
            let plan = plan.against(Contender::many("staged", copied), None);
            curves[number].push((triangles as f64, session.measure(plan.at_most(41))?));
            // The slowest of each round is what a player notices; it takes several to have one.
            if frames < 5 {
                continue;
            }
            let plan = Plan::new(format!("{what}, {of}, 99th percentile"), "ms", Contender::many("in place", in_place));
            session.measure(
                plan.against(Contender::many("staged", copied), None).p99().at_most(session.mode.pick(5, 15, 31)),
            )?;
        }
        drop(object);
        settle(&manager)?;
    }
    for (curve, name) in
        curves.into_iter().zip(["first frame", "frame of a model at rest", "frame after all vertices moved"])
    {
        session.curve(name, "triangles", "ms", curve)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_is_one_that_the_demo_can_read() {
        let file = Temporary::with(&sheet(8).unwrap()).unwrap();
        let glb = Glb::open(&file.0).unwrap();
        let scene = Scene::load(&glb).unwrap();
        assert_eq!((scene.draws.len(), scene.triangles()), (1, 128));
    }
}
