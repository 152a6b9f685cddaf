//! What was seen, for people and for programs. Every figure was taken in this run.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ash::vk;
use pinfold_demos::device::Gpu;
use pinfold_demos::glb::Glb;
use pinfold_demos::scene::Scene;
use pinfold_vulkan::Coverage;
use serde::{Serialize, Serializer};

/// The part of `--help` that explains the report.
pub(crate) const HELP: &str = "\
The report, and the fields of --json (times in milliseconds):
  model         path, bytes, binary_bytes, named_bytes (those that draws name), draws, triangles, textured_draws, skipped_parts
  device        name, kind, byte_indices, validation_messages (null without the layer)
  picture       path, width, height, samples, drawn_pixels
  in_place      path (Import, AliasImport or Mirror(reason)), coverage, bytes_in_place, bytes_copied, resident_kib and private_kib (the
                kernel's account of the mapping: its pages, and those that are copies), same_picture_as_staged; compared: pairs,
                staged_bytes_copied, and the medians ready and first_frame, each in_place, staged, ratio. `ready` is from mapping the
                file until commands can name its bytes (staged: from allocating until the copy is there), `first_frame` until the frame is over
  busy_unmap    mapping, bytes_copied_for_this_act, path, coverage, scene_drawn_times, deadline_ms, submit, frame (from its submit to its end),
                idle_munmap, held (how long munmap took), frame_running_when_munmap_began, frame_over_when_munmap_returned, late,
                state_before, state_after, became_invalid, same_picture (of the busy frame and the first)
  mapped_again  same_address, path, generation_in_act_1, generation, same_png

Ends with 1, and says why, if the model can't be drawn or one of the proofs fails.";

#[derive(Serialize)]
pub(crate) struct Report {
    pub(crate) model: Model,
    pub(crate) device: Device,
    pub(crate) picture: Picture,
    pub(crate) in_place: InPlace,
    pub(crate) busy_unmap: BusyUnmap,
    pub(crate) mapped_again: MappedAgain,
}

#[derive(Serialize)]
pub(crate) struct Model {
    path: PathBuf,
    bytes: u64,
    binary_bytes: u64,
    named_bytes: u64,
    draws: usize,
    triangles: u64,
    textured_draws: usize,
    skipped_parts: usize,
}

#[derive(Serialize)]
pub(crate) struct Device {
    name: String,
    kind: &'static str,
    byte_indices: bool,
    pub(crate) validation_messages: Option<u64>,
}

#[derive(Serialize)]
pub(crate) struct Picture {
    pub(crate) path: Option<PathBuf>,
    pub(crate) width: u32,
    pub(crate) height: u32,
    pub(crate) samples: u32,
    pub(crate) drawn_pixels: u64,
}

#[derive(Serialize)]
pub(crate) struct InPlace {
    pub(crate) path: String,
    #[serde(serialize_with = "as_text")]
    pub(crate) coverage: Option<Coverage>,
    pub(crate) bytes_in_place: u64,
    pub(crate) bytes_copied: u64,
    pub(crate) resident_kib: u64,
    pub(crate) private_kib: u64,
    pub(crate) same_picture_as_staged: bool,
    pub(crate) compared: Compared,
}

#[derive(Serialize)]
pub(crate) struct Compared {
    pub(crate) pairs: u32,
    pub(crate) staged_bytes_copied: u64,
    pub(crate) ready: Pair,
    pub(crate) first_frame: Pair,
}

/// Two medians and the first divided by the second.
#[derive(Serialize)]
pub(crate) struct Pair {
    in_place: Millis,
    staged: Millis,
    ratio: f64,
}

#[derive(Serialize)]
pub(crate) struct BusyUnmap {
    pub(crate) mapping: String,
    pub(crate) bytes_copied_for_this_act: u64,
    pub(crate) path: String,
    #[serde(serialize_with = "as_text")]
    pub(crate) coverage: Option<Coverage>,
    pub(crate) scene_drawn_times: u32,
    pub(crate) deadline_ms: u64,
    pub(crate) submit: Millis,
    pub(crate) frame: Millis,
    pub(crate) idle_munmap: Millis,
    pub(crate) held: Millis,
    pub(crate) frame_running_when_munmap_began: bool,
    pub(crate) frame_over_when_munmap_returned: bool,
    pub(crate) late: bool,
    pub(crate) state_before: String,
    pub(crate) state_after: String,
    pub(crate) became_invalid: bool,
    pub(crate) same_picture: bool,
    #[serde(skip)]
    pub(crate) watched: bool,
}

#[derive(Serialize)]
pub(crate) struct MappedAgain {
    pub(crate) same_address: bool,
    pub(crate) path: String,
    pub(crate) generation_in_act_1: u64,
    pub(crate) generation: u64,
    pub(crate) same_png: bool,
}

/// A time, written as milliseconds with three decimals.
#[derive(Clone, Copy)]
pub(crate) struct Millis(pub(crate) Duration);

impl Model {
    pub(crate) fn new(path: &Path, glb: &Glb, scene: &Scene) -> Self {
        Self {
            path: path.to_owned(),
            bytes: glb.len,
            binary_bytes: glb.binary.len,
            named_bytes: scene.named_bytes(),
            draws: scene.draws.len(),
            triangles: scene.triangles(),
            textured_draws: scene.textured,
            skipped_parts: scene.skipped,
        }
    }
}

impl Device {
    pub(crate) fn new(gpu: &Gpu) -> Self {
        let kind = match gpu.properties.device_type {
            vk::PhysicalDeviceType::DISCRETE_GPU => "discrete GPU",
            vk::PhysicalDeviceType::INTEGRATED_GPU => "integrated GPU",
            vk::PhysicalDeviceType::VIRTUAL_GPU => "virtual GPU",
            vk::PhysicalDeviceType::CPU => "CPU driver",
            _ => "other",
        };
        Self { name: gpu.name(), kind, byte_indices: gpu.byte_indices, validation_messages: None }
    }
}

impl Pair {
    pub(crate) fn of(in_place: impl Iterator<Item = Duration>, staged: impl Iterator<Item = Duration>) -> Self {
        let (in_place, staged) = (median(in_place), median(staged));
        let ratio = in_place.as_secs_f64() / staged.as_secs_f64().max(f64::EPSILON);
        Self { in_place: Millis(in_place), staged: Millis(staged), ratio: (ratio * 1000.0).round() / 1000.0 }
    }
}

/// The middle one, or the upper of the two in the middle.
fn median(times: impl Iterator<Item = Duration>) -> Duration {
    let mut times: Vec<_> = times.collect();
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

impl Report {
    /// What should have been otherwise. Empty: all is proven.
    pub(crate) fn failures(&self) -> Vec<&'static str> {
        let busy = &self.busy_unmap;
        let again = &self.mapped_again;
        // Where the kernel can't watch the mapping, nothing is held, and the report has said so.
        let watched = busy.watched;
        let wrong = [
            (!self.in_place.same_picture_as_staged, "the picture from the mapping differs from the one from a copy"),
            (!busy.frame_running_when_munmap_began, "the frame was over before munmap was called"),
            (watched && busy.late, "the deadline passed before the frame was over"),
            (watched && !busy.frame_over_when_munmap_returned, "munmap returned before the frame was over"),
            (watched && !busy.became_invalid, "the object did not go from Valid to Invalid"),
            (!busy.same_picture, "the frame during which the file was unmapped is not the same picture"),
            (!again.same_address, "the file was not mapped at the same address again"),
            (again.generation <= again.generation_in_act_1, "the generation did not move"),
            (!again.same_png, "the picture after mapping again is another one"),
            (self.device.validation_messages.is_some_and(|n| n > 0), "the validation layer had something to say"),
        ];
        wrong.into_iter().filter_map(|(wrong, what)| wrong.then_some(what)).collect()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, device, picture, in_place, busy_unmap: busy, mapped_again: again } = self;
        writeln!(f, "model    {}", model.path.display())?;
        let (draws, triangles) = (model.draws, grouped(model.triangles));
        writeln!(f, "         {} bytes, {draws} draws, {triangles} triangles", grouped(model.bytes))?;
        if model.textured_draws > 0 {
            writeln!(
                f,
                "         {} draws have textures, of which only the base colour is used",
                model.textured_draws
            )?;
        }
        if model.skipped_parts > 0 {
            writeln!(f, "         {} parts are points or lines and are not drawn", model.skipped_parts)?;
        }
        let layer = match device.validation_messages {
            Some(0) => "validation layer: silent".into(),
            Some(n) => format!("validation layer: {n} messages"),
            None => "no validation layer".into(),
        };
        writeln!(f, "device   {} ({}), {layer}", device.name, device.kind)?;
        if let Some(path) = &picture.path {
            let Picture { width, height, samples, .. } = picture;
            writeln!(f, "picture  {} ({width}x{height}, {samples} samples per pixel)", path.display())?;
        }

        writeln!(f, "\n1. Drawn in place")?;
        let coverage = in_place.coverage.map_or("not watched".into(), |coverage| format!("{coverage:?}"));
        writeln!(f, "   private read-only mapping of the file: path {}, {coverage}", in_place.path)?;
        let (read, copied) = (grouped(in_place.bytes_in_place), grouped(in_place.bytes_copied));
        writeln!(f, "   the GPU read {read} bytes in place; {copied} bytes were copied")?;
        let (resident, private) = (in_place.resident_kib, in_place.private_kib);
        writeln!(
            f,
            "   the kernel counts {resident} KiB of the file's pages in the mapping and {private} KiB of private copies"
        )?;
        let compared = &in_place.compared;
        let same = if in_place.same_picture_as_staged { "the same picture" } else { "ANOTHER PICTURE" };
        let (bytes, pairs) = (grouped(compared.staged_bytes_copied), compared.pairs);
        writeln!(f, "   against a staged copy of {bytes} bytes, which gives {same} (medians of {pairs} pairs):")?;
        writeln!(f, "     bytes ready  {}", compared.ready)?;
        writeln!(f, "     first frame  {}", compared.first_frame)?;

        writeln!(f, "\n2. Unmapped while the GPU works")?;
        let coverage = busy.coverage.map_or("not watched".into(), |coverage| format!("{coverage:?}"));
        writeln!(f, "   {}: path {}, {coverage}", busy.mapping, busy.path)?;
        if busy.bytes_copied_for_this_act > 0 {
            writeln!(f, "   for this act {} bytes were copied", grouped(busy.bytes_copied_for_this_act))?;
        }
        writeln!(
            f,
            "   a frame was submitted that draws the scene {} times and takes {}",
            busy.scene_drawn_times, busy.frame
        )?;
        writeln!(
            f,
            "   munmap may be held up to {} ms here (the library's default is 100 ms)",
            grouped(busy.deadline_ms)
        )?;
        let over = if busy.frame_over_when_munmap_returned { "over" } else { "STILL RUNNING" };
        writeln!(
            f,
            "   munmap was held {} (idle it takes {}); when it returned, the frame was {over}",
            busy.held, busy.idle_munmap
        )?;
        if busy.late {
            writeln!(f, "   LATE: the deadline of {} ms passed first", busy.deadline_ms)?;
        }
        let same = if busy.same_picture { "the same picture" } else { "ANOTHER PICTURE" };
        writeln!(f, "   the object went from {} to {}; the frame is {same}", busy.state_before, busy.state_after)?;
        if !busy.watched {
            writeln!(f, "   NOT HELD: the kernel can't watch this mapping, so the object was told by hand")?;
        }

        writeln!(f, "\n3. Mapped again")?;
        let place = if again.same_address { "the same address" } else { "ANOTHER ADDRESS" };
        let (before, now) = (again.generation_in_act_1, again.generation);
        writeln!(
            f,
            "   at {place}, and acquired again: path {}, generation {before} before and {now} now",
            again.path
        )?;
        let same = if again.same_png { "identical, byte for byte" } else { "DIFFERENT" };
        writeln!(f, "   the two PNGs are {same}")
    }
}

impl fmt::Display for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in place, {} staged: {:.3} times as long", self.in_place, self.staged, self.ratio)
    }
}

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.0.as_secs_f64() * 1e3;
        let decimals = if millis < 10.0 { 3 } else { 1 };
        write!(f, "{millis:.decimals$} ms")
    }
}

impl Serialize for Millis {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // Whole microseconds: what lies below is noise.
        #[allow(clippy::cast_precision_loss)] // 2^53 microseconds are centuries
        let millis = self.0.as_micros() as f64 / 1e3;
        serializer.serialize_f64(millis)
    }
}

fn as_text<S: Serializer>(coverage: &Option<Coverage>, serializer: S) -> Result<S::Ok, S::Error> {
    match coverage {
        Some(coverage) => serializer.collect_str(&format_args!("{coverage:?}")),
        None => serializer.serialize_none(),
    }
}

/// `1,838,084`
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut result = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            result.push(',');
        }
        result.push(digit);
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_come_in_threes() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1_838_084), "1,838,084");
    }

    #[test]
    fn a_median_is_the_middle_one_whatever_the_order() {
        let ms = |n: &[u64]| median(n.iter().map(|&n| Duration::from_millis(n))).as_millis();
        assert_eq!(ms(&[9, 1, 5]), 5);
        assert_eq!(ms(&[7]), 7);
        assert_eq!(ms(&[]), 0);
    }
}
