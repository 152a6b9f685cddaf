//! Draws a model straight from the page cache, and shows that unmapping it while the GPU works is survived.
//!
//! The file is mapped, and the mapping is what the GPU reads: no byte of a vertex passes through this program. Three acts prove it, each
//! with figures taken in the same run: drawing in place against drawing from a staged copy; `munmap` called while the GPU works, which
//! returns only when the frame is over; and the same address mapped again and drawn again.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use pinfold_demos::device::{Gpu, Validation};
use pinfold_demos::glb::Glb;
use pinfold_demos::scene::Scene;
use pinfold_vulkan::Force;

mod acts;
mod clock;
mod mapping;
mod object;
mod report;

use acts::Acts;

/// Where Debian's package `assimp-testmodels` puts the engine.
const DEFAULT_MODEL: &str = "/usr/share/assimp/models/glTF2/2CylinderEngine-glTF-Binary/2CylinderEngine.glb";

/// Draw a binary glTF file straight from the page cache, and unmap it while the GPU is busy.
///
/// Drawn are triangles with base colours and one lamp; textures, skins, morphs and transparency are not. The model must not be truncated while
/// it is drawn: a CPU driver reads the mapping as the program would, and beyond the file's end that is SIGBUS. The Vulkan driver is the loader's
/// choice (VK_DRIVER_FILES). Debug builds run under the validation layer where it is installed; PINFOLD_VALIDATION=0 or 1 decides otherwise.
#[derive(Debug, Parser)]
#[command(name = "demo", after_help = report::HELP)]
struct Arguments {
    /// The model; by default the engine from Debian's package assimp-testmodels
    #[arg(default_value = DEFAULT_MODEL, hide_default_value = true)]
    model: PathBuf,
    /// Where the picture goes
    #[arg(short, long, default_value = "demo.png")]
    output: PathBuf,
    /// Size of the picture in pixels
    #[arg(long, default_value = "1280x720", value_parser = size)]
    size: (u32, u32),
    /// How many first frames are timed on each of the two ways, in turns; the report has the medians
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..=1000))]
    frames: u32,
    /// How the mapping reaches the GPU
    #[arg(long, value_enum, default_value_t = Way::Auto)]
    path: Way,
    /// Use the first device whose name contains this text
    #[arg(long)]
    gpu: Option<String>,
    /// Print the figures as one JSON object instead of lines
    #[arg(long)]
    json: bool,
}

/// How the mapping reaches the GPU.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Way {
    /// Imported where the driver can, else copied
    Auto,
    /// Imported, itself or by an alias, or an error
    Import,
    /// Copied into memory of the device, and kept fresh
    Mirror,
}

fn main() -> ExitCode {
    let arguments = Arguments::try_parse().unwrap_or_else(|error| {
        let _ = error.print();
        // Clap's own code for a wrong command line is 2; a script that calls the demo knows one kind of failure.
        std::process::exit(i32::from(error.use_stderr()));
    });
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let model = &arguments.model;
    let about = || match model.as_path() == Path::new(DEFAULT_MODEL) && !model.exists() {
        true => format!("{}: the default model comes with: apt-get install assimp-testmodels", model.display()),
        false => model.display().to_string(),
    };
    let glb = Glb::open(model).with_context(about)?;
    let scene = Scene::load(&glb).with_context(about)?;
    let gpu = Gpu::open(arguments.gpu.as_deref(), validation())?;
    let force = match arguments.path {
        Way::Auto => None,
        // `Force::Import` forbids aliases too, without which a CPU driver can't survive the second act.
        Way::Import => Some(Force::Alias),
        Way::Mirror => Some(Force::Mirror),
    };

    let mut acts = Acts::new(&gpu, &glb, &scene, model, arguments.size, force)?;
    let mut report = acts.play(arguments.frames)?;
    let picture = acts.picture()?;
    drop(acts);
    report.picture.path = Some(arguments.output.clone());
    std::fs::write(&arguments.output, picture).with_context(|| arguments.output.display().to_string())?;
    report.device.validation_messages = gpu.is_validated().then(|| gpu.messages());

    let text = match arguments.json {
        true => serde_json::to_string_pretty(&report)? + "\n",
        false => report.to_string(),
    };
    std::io::stdout().write_all(text.as_bytes()).context("standard output")?;
    match report.failures().as_slice() {
        [] => Ok(()),
        failures => bail!("{}: the proof failed: {}", model.display(), failures.join("; ")),
    }
}

fn validation() -> Validation {
    let wanted = std::env::var_os("PINFOLD_VALIDATION").map_or(cfg!(debug_assertions), |value| value != "0");
    if wanted { Validation::Wanted } else { Validation::Off }
}

/// `1280x720`
fn size(text: &str) -> Result<(u32, u32), String> {
    let (width, height) = text.split_once('x').ok_or("it is WIDTHxHEIGHT, as in 1280x720")?;
    let number = |text: &str| text.parse().map_err(|error| format!("{text:?}: {error}"));
    Ok((number(width)?, number(height)?))
}
