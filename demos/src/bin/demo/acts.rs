//! The three acts. One object at one address plays in all of them, as the object is "whatever is mapped there".

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::mman::MapFlags;
use pinfold_demos::camera::Camera;
use pinfold_demos::device::Gpu;
use pinfold_demos::geometry::{Staged, Widened};
use pinfold_demos::glb::Glb;
use pinfold_demos::picture::Picture;
use pinfold_demos::render::{BACKGROUND, Renderer};
use pinfold_demos::scene::Scene;
use pinfold_vulkan::{Force, State};

use crate::mapping::{Mapping, Residence, Shareable};
use crate::object::{DEADLINE, Flight, InPlace, Object, PATIENCE};
use crate::report::{self, Report};

/// The busy frame takes at least this long, so that everybody sees that `munmap` waits for it.
const BUSY: Duration = Duration::from_millis(200);
/// But it draws the scene at most this many times.
const MOST_TIMES: u32 = 2000;

/// What the acts need.
pub(crate) struct Acts<'g> {
    gpu: &'g Gpu,
    glb: &'g Glb,
    scene: &'g Scene,
    path: &'g Path,
    camera: Camera,
    // Dropped in this order: the renderer waits for what is in flight.
    renderer: Renderer<'g>,
    widened: Widened<'g>,
    in_place: InPlace<'g>,
    shown: Option<Picture>,
}

impl<'g> Acts<'g> {
    pub(crate) fn new(
        gpu: &'g Gpu,
        glb: &'g Glb,
        scene: &'g Scene,
        path: &'g Path,
        (width, height): (u32, u32),
        force: Option<Force>,
    ) -> Result<Self> {
        let mut renderer = Renderer::new(gpu, width, height)?;
        renderer.prepare(scene)?;
        Ok(Self {
            gpu,
            glb,
            scene,
            path,
            camera: Camera::framing(scene, width, height),
            widened: Widened::load(gpu, glb, scene)?,
            renderer,
            in_place: InPlace::new(gpu, glb, force)?,
            shown: None,
        })
    }

    /// All three, and what was seen.
    pub(crate) fn play(&mut self, pairs: u32) -> Result<Report> {
        let (staged, compared) = self.first_frames(pairs)?;
        let quiet = Mapping::quiet_place(self.glb.len).and_then(|at| self.map_privately(Some(at)).ok());
        let mapping = quiet.map_or_else(|| self.map_privately(None), Ok)?;
        let object = self.in_place.register(&mapping)?;

        let (frame, first) = self.draw(&object, 1)?;
        let residence = Residence::of(mapping.address()).unwrap_or_default();
        let named = self.scene.named_bytes();
        let mirrored = frame.is_mirror();
        let in_place = report::InPlace {
            path: frame.path(),
            coverage: object.coverage(),
            bytes_in_place: if mirrored { 0 } else { named },
            bytes_copied: self.widened.copied + if mirrored { object.range().len() as u64 } else { 0 },
            resident_kib: residence.resident,
            private_kib: residence.private,
            same_picture_as_staged: first == staged,
            compared,
        };
        let (mapping, busy_unmap) = self.unmap_while_busy(&object, mapping, &first)?;
        let mapped_again = self.map_again(&object, mapping, &first, frame.generation())?;
        drop(object);

        let (drawn_pixels, _) = first.drawn(BACKGROUND);
        Ok(Report {
            model: report::Model::new(self.path, self.glb, self.scene),
            device: report::Device::new(self.gpu),
            picture: report::Picture {
                path: None,
                width: first.width,
                height: first.height,
                samples: self.renderer.samples(),
                drawn_pixels,
            },
            in_place,
            busy_unmap,
            mapped_again,
        })
    }

    /// The PNG of the last frame: the one that was drawn after the file was mapped again.
    pub(crate) fn picture(&self) -> Result<Vec<u8>> {
        png(self.shown.as_ref().context("the acts have been played")?)
    }

    /// First frames from a fresh mapping and from a fresh copy, in turns. Returns the picture from the copy, too.
    fn first_frames(&mut self, pairs: u32) -> Result<(Picture, report::Compared)> {
        // One of each to warm up: the driver compiles, threads start, and the file is in the page cache.
        let (staged, _) = self.first_frame_staged()?;
        self.first_frame_in_place()?;
        let (mut of_mapping, mut of_copy) = (Vec::new(), Vec::new());
        let mut copied = 0;
        for pair in 0..pairs {
            for turn in [pair % 2, (pair + 1) % 2] {
                if turn == 0 {
                    of_mapping.push(self.first_frame_in_place()?);
                } else {
                    let (_, times) = self.first_frame_staged()?;
                    of_copy.push((times.0, times.1));
                    copied = times.2;
                }
            }
        }
        let compared = report::Compared {
            pairs,
            staged_bytes_copied: copied,
            ready: report::Pair::of(of_mapping.iter().map(|t| t.0), of_copy.iter().map(|t| t.0)),
            first_frame: report::Pair::of(of_mapping.iter().map(|t| t.1), of_copy.iter().map(|t| t.1)),
        };
        Ok((staged, compared))
    }

    /// Map, register, acquire, draw, wait: when commands could be recorded, and when the frame was over.
    fn first_frame_in_place(&mut self) -> Result<(Duration, Duration)> {
        let begin = Instant::now();
        let mapping = self.map_privately(None)?;
        let object = self.in_place.register(&mapping)?;
        let lease = self.in_place.acquire(&object)?;
        let ready = begin.elapsed();
        drop(lease);
        let flight = self.submit(&object, 1)?;
        self.renderer.wait()?;
        let over = begin.elapsed();
        flight.wait()?;
        drop(object);
        mapping.unmap()?;
        Ok((ready, over))
    }

    /// Allocate, read, draw, wait: the picture, the same two moments, and how many bytes were moved.
    fn first_frame_staged(&mut self) -> Result<(Picture, (Duration, Duration, u64))> {
        let begin = Instant::now();
        let staged = Staged::load(self.gpu, self.renderer.pool, self.glb)?;
        let ready = begin.elapsed();
        self.renderer.record(self.scene, &self.camera, &[staged.part], &self.widened, 1)?;
        // SAFETY: the copy and the widened indices live until the wait has returned.
        unsafe { self.renderer.submit(None) }?;
        self.renderer.wait()?;
        let over = begin.elapsed();
        Ok((self.renderer.picture(), (ready, over, staged.copied)))
    }

    /// Calls `munmap` while a frame reads the mapping.
    fn unmap_while_busy(
        &mut self,
        object: &Object,
        mapping: Mapping,
        wanted: &Picture,
    ) -> Result<(usize, report::BusyUnmap)> {
        let address = mapping.address();
        // What the call costs when nothing is in flight. The object goes Invalid, and takes what comes next at its address.
        let idle = mapping.unmap()?;
        self.in_place.tell(object)?;
        let (mapping, kind, copied) = self.map_for_the_busy_act(address)?;

        let mut times = self.calibrate(object)?;
        if self.gpu.is_cpu() && InPlace::is_bare_import(object) {
            // The pages are gone before the library hears of it, and the driver's threads would crash this process.
            bail!(
                "a CPU driver survives a busy unmap only by an alias import or a mirror, and PINFOLD_FORCE forbids both"
            );
        }
        let late_before = self.in_place.late();
        let (begin, submitted, flight, before) = loop {
            let begin = Instant::now();
            let flight = self.submit(object, times)?;
            let submitted = begin.elapsed();
            // What is said afterwards is a change only if it was otherwise before.
            let before = object.state()?;
            if !self.in_place.is_over(&flight)? || times == MOST_TIMES {
                break (begin, submitted, flight, before);
            }
            // A busy machine has made the frame look longer than it is.
            self.renderer.wait()?;
            flight.wait()?;
            times = (times * 4).min(MOST_TIMES);
        };
        let running = !self.in_place.is_over(&flight)?;
        let held = mapping.unmap()?;
        let over = self.in_place.is_over(&flight)?;
        let after = object.state()?;
        self.renderer.wait()?;
        let frame = begin.elapsed();
        flight.wait()?;
        let picture = self.renderer.picture();
        self.in_place.tell(object)?;
        let report = report::BusyUnmap {
            mapping: kind,
            bytes_copied_for_this_act: copied,
            path: flight.path(),
            coverage: object.coverage(),
            scene_drawn_times: times,
            deadline_ms: u64::try_from(DEADLINE.as_millis())?,
            submit: report::Millis(submitted),
            frame: report::Millis(frame),
            idle_munmap: report::Millis(idle),
            held: report::Millis(held),
            frame_running_when_munmap_began: running,
            frame_over_when_munmap_returned: over,
            late: self.in_place.late() > late_before,
            state_before: format!("{before:?}"),
            state_after: format!("{after:?}"),
            became_invalid: before == State::Valid && after == State::Invalid,
            same_picture: picture == *wanted,
            watched: InPlace::is_watched(object),
        };
        Ok((address, report))
    }

    /// A mapping at `address` that a busy device survives to lose, what it is, and how many bytes were copied for it.
    ///
    /// A CPU driver reads through this process's page tables: it would crash if private memory vanished under it, however long the unmapping
    /// is held off by whom. A shared mapping reaches it through an alias, which stays.
    fn map_for_the_busy_act(&self, address: usize) -> Result<(Mapping, String, u64)> {
        if !self.gpu.is_cpu() {
            return Ok((self.map_privately(Some(address))?, "private mapping of the file".into(), 0));
        }
        let source = Shareable::open(self.path, &self.glb.file, self.glb.len)?;
        let mapping = Mapping::new(&source.file, self.glb.len, MapFlags::MAP_SHARED, Some(address))?;
        Ok(match source.copied_because {
            None => (mapping, "shared mapping of the file".into(), 0),
            Some(error) => {
                let kind =
                    format!("shared mapping of a copy in memory, as the file can't be opened for writing ({error})");
                (mapping, kind, self.glb.len)
            }
        })
    }

    /// How many times the scene is to be drawn in one frame to keep the device busy long enough.
    fn calibrate(&mut self, object: &Object) -> Result<u32> {
        let mut times = 1;
        loop {
            let begin = Instant::now();
            self.draw(object, times)?;
            let took = begin.elapsed();
            if took >= BUSY || times == MOST_TIMES {
                return Ok(times);
            }
            // Rounded up and at least doubled, so this ends soon; what a frame costs besides drawing makes the first guesses too low.
            let wanted = BUSY.as_secs_f64() / took.as_secs_f64() * f64::from(times);
            #[allow(clippy::cast_sign_loss)] // a ratio of durations
            let wanted = wanted.ceil().min(f64::from(MOST_TIMES)) as u32;
            times = wanted.max(times * 2).min(MOST_TIMES);
        }
    }

    /// Maps the file where it was, and draws it again.
    fn map_again(
        &mut self,
        object: &Object,
        address: usize,
        wanted: &Picture,
        generation: u64,
    ) -> Result<report::MappedAgain> {
        let mapping = self.map_privately(Some(address))?;
        let (flight, picture) = self.draw(object, 1)?;
        let report = report::MappedAgain {
            same_address: mapping.address() == address,
            path: flight.path(),
            generation_in_act_1: generation,
            generation: flight.generation(),
            same_png: png(&picture)? == png(wanted)?,
        };
        self.shown = Some(picture);
        mapping.unmap()?;
        Ok(report)
    }

    /// Draws a frame from the object and waits for it.
    fn draw(&mut self, object: &Object, times: u32) -> Result<(Flight, Picture)> {
        let flight = self.submit(object, times)?;
        self.renderer.wait()?;
        flight.wait()?;
        Ok((flight, self.renderer.picture()))
    }

    /// Acquires the object and submits a frame that reads it.
    fn submit(&mut self, object: &Object, times: u32) -> Result<Flight> {
        let begin = Instant::now();
        loop {
            let lease = self.in_place.acquire(object)?;
            let parts = self.in_place.parts(&lease);
            self.renderer.record(self.scene, &self.camera, &parts, &self.widened, times)?;
            let renderer = &self.renderer;
            // SAFETY: the commands name only buffers of the lease, which live until the frame is over, and the widened indices,
            // which live as long as `self`.
            let submit = |timeline| unsafe { renderer.submit(Some(timeline)) };
            // SAFETY: the frame's one batch signals the timeline at its end, and its commands only read what they name.
            match unsafe { self.in_place.submit(lease, submit) }? {
                Some(flight) => return Ok(flight),
                None if begin.elapsed() < PATIENCE => {}
                None => bail!("the object's memory changed hands all the time"),
            }
        }
    }

    fn map_privately(&self, at: Option<usize>) -> Result<Mapping> {
        Mapping::new(&self.glb.file, self.glb.len, MapFlags::MAP_PRIVATE, at)
    }
}

fn png(picture: &Picture) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    picture.write_png(&mut bytes)?;
    Ok(bytes)
}
