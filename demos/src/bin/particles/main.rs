//! A million particles that all cores move and the GPU draws, in the same bytes: nothing is uploaded, frame after frame.
//!
//! Each frame is drawn twice: from the particles where they are, and from a mapped buffer that they were copied into, as an engine would do it that
//! can't import them. The two pictures must be the same; the times are told side by side.

use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use ash::vk;
use clap::Parser;
use pinfold_demos::device::{Gpu, Validation};
use pinfold_demos::resource::Buffer;
use pinfold_vulkan::{Access, Config, Manager, Outcome, Timeline, Userptr};
use serde::Serialize;

mod develop;
mod draw;
mod simulation;

use draw::Sky;
use simulation::Simulation;

const PATIENCE: Duration = Duration::from_secs(60);

/// Move a million particles with all cores, draw the very same bytes with the GPU, and write pictures of it.
///
/// Writes OUTPUT-first.png, OUTPUT-last.png and OUTPUT.png, which moves. The Vulkan driver is the loader's choice (VK_DRIVER_FILES).
#[derive(Debug, Parser)]
#[command(name = "particles")]
struct Arguments {
    /// Beginning of the pictures' names
    #[arg(short, long, default_value = "particles")]
    output: PathBuf,
    /// How many particles
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1..=50_000_000))]
    count: u32,
    /// How many frames
    #[arg(long, default_value_t = 72, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    frames: u32,
    /// Width of the pictures in pixels; they are 16:9
    #[arg(long, default_value_t = 1280, value_parser = clap::value_parser!(u32).range(32..=7680))]
    width: u32,
    /// Print the figures as one JSON object
    #[arg(long)]
    json: bool,
}

/// Medians over the frames, in milliseconds.
#[derive(Serialize)]
struct Report {
    device: String,
    path: String,
    particles: u32,
    bytes: usize,
    frames: u32,
    threads: usize,
    step: f64,
    /// From the particles in place to the finished frame, and the part of it until commands could name them.
    in_place: f64,
    acquire: f64,
    /// From the particles in place to the finished frame, and the part of it that copied them.
    copied: f64,
    copy: f64,
    same_pictures: bool,
    validation_messages: Option<u64>,
}

fn main() -> ExitCode {
    let arguments = Arguments::try_parse().unwrap_or_else(|error| {
        let _ = error.print();
        std::process::exit(i32::from(error.use_stderr()));
    });
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("particles: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let wanted = std::env::var_os("PINFOLD_VALIDATION").map_or(cfg!(debug_assertions), |value| value != "0");
    let gpu = Gpu::open(None, if wanted { Validation::Wanted } else { Validation::Off })?;
    let mut report = film(&gpu, arguments)?;
    report.validation_messages = gpu.is_validated().then(|| gpu.messages());
    match arguments.json {
        true => println!("{}", serde_json::to_string_pretty(&report)?),
        false => print(&report, &arguments.output),
    }
    ensure!(report.same_pictures, "a picture drawn in place differs from the one drawn from a copy");
    ensure!(report.validation_messages.unwrap_or(0) == 0, "the validation layer had something to say");
    Ok(())
}

/// The times of one frame.
#[derive(Default)]
struct Times {
    step: Vec<Duration>,
    acquire: Vec<Duration>,
    in_place: Vec<Duration>,
    copy: Vec<Duration>,
    copied: Vec<Duration>,
}

fn film(gpu: &Gpu, arguments: &Arguments) -> Result<Report> {
    let &Arguments { ref output, count, frames, width, .. } = arguments;
    let height = width * 9 / 16 / 2 * 2;
    let mut simulation = Simulation::new(count as usize).context("memory for the particles")?;
    let sky = Sky::new(gpu, width, height)?;
    use vk::MemoryPropertyFlags as Flags;
    let wishes = [Flags::HOST_VISIBLE | Flags::HOST_COHERENT];
    let copy = Buffer::new(gpu, simulation.bytes() as u64, vk::BufferUsageFlags::VERTEX_BUFFER, &wishes)?;
    // SAFETY: the handles are the device's own; the manager is dropped before it.
    let manager = unsafe { Manager::new(gpu.context(), Config::default()) }?;
    // SAFETY: the mapping goes after the object and the manager, at the end of this function at the earliest; the particles are changed only while no
    // work is under way, and the device only reads them.
    let object = unsafe { manager.register_labelled(simulation.range(), Access::Read, "particles") }?;

    let brightness = 0.085 * (1_000_000.0 / f64::from(count)) as f32 * (width as f32 / 1280.0).powi(2);
    let (mut times, mut same, mut shots, mut path, mut value) = (Times::default(), true, Vec::new(), String::new(), 0);
    for frame in 0..frames {
        let begun = Instant::now();
        simulation.step();
        times.step.push(begun.elapsed());
        let look = Look { count, turn: 0.35 - 0.5 * frame as f32 / frames as f32, brightness };
        let mut lights = [Vec::new(), Vec::new()];
        // In turns, so that neither is always the one that finds the caches warm.
        for way in if frame % 2 == 0 { [0, 1] } else { [1, 0] } {
            value += 1;
            match way {
                0 => in_place(&sky, &manager, &object, &look, value, &mut times, &mut path)?,
                _ => from_copy(&sky, &simulation, &copy, &look, value, &mut times)?,
            }
            lights[way] = sky.light();
        }
        same &= lights[0] == lights[1];
        shots.push(develop::develop(&lights[0], width, height));
    }
    drop((object, manager));
    write_pictures(output, &shots)?;
    let middle = |mut times: Vec<Duration>| {
        times.sort_unstable();
        (times[times.len() / 2].as_secs_f64() * 1e6).round() / 1e3
    };
    Ok(Report {
        device: gpu.name(),
        path,
        particles: count,
        bytes: simulation.bytes(),
        frames,
        threads: rayon::current_num_threads(),
        step: middle(times.step),
        in_place: middle(times.in_place),
        acquire: middle(times.acquire),
        copied: middle(times.copied),
        copy: middle(times.copy),
        same_pictures: same,
        validation_messages: None,
    })
}

struct Look {
    count: u32,
    turn: f32,
    brightness: f32,
}

/// Draws the particles where they are.
fn in_place(
    sky: &Sky<'_>,
    manager: &Manager,
    object: &Userptr,
    look: &Look,
    value: u64,
    times: &mut Times,
    path: &mut String,
) -> Result<()> {
    let begun = Instant::now();
    let lease = manager.acquire_timeout(&[object], PATIENCE)?;
    let acquired = begun.elapsed();
    let view = lease.view(0);
    *path = format!("{:?}", view.path);
    sky.record(view.buffer, view.offset, look.count, look.turn, look.brightness)?;
    let done = Timeline { semaphore: sky.timeline, value };
    // SAFETY: the signal is that of the frame, which only reads the particles.
    let pending = unsafe { lease.submit([done], || sky.submit(value)) }.map_err(|error| anyhow!("{error}"))?;
    ensure!(pending.wait(PATIENCE) == Some(Outcome::Done), "the frame didn't end");
    times.in_place.push(begun.elapsed());
    times.acquire.push(acquired);
    Ok(())
}

/// Copies the particles into a mapped buffer, and draws them from there.
fn from_copy(
    sky: &Sky<'_>,
    simulation: &Simulation,
    copy: &Buffer<'_>,
    look: &Look,
    value: u64,
    times: &mut Times,
) -> Result<()> {
    let begun = Instant::now();
    let to = copy.mapped().context("host-visible memory is mapped")?;
    // SAFETY: both have that many bytes, and no work is under way.
    unsafe { simulation.first().copy_to_nonoverlapping(to, simulation.bytes()) };
    let copied = begun.elapsed();
    sky.record(copy.handle, 0, look.count, look.turn, look.brightness)?;
    sky.submit(value)?;
    sky.wait(value)?;
    times.copied.push(begun.elapsed());
    times.copy.push(copied);
    Ok(())
}

/// Names of the pictures: the first, the last, and all of them.
fn names(output: &Path) -> [PathBuf; 3] {
    ["-first.png", "-last.png", ".png"].map(|end| {
        let mut name = output.as_os_str().to_owned();
        name.push(end);
        name.into()
    })
}

fn write_pictures(output: &Path, shots: &[pinfold_demos::picture::Picture]) -> Result<()> {
    let [first, last, all] = names(output);
    for (name, shot) in [(first, shots.first()), (last, shots.last())] {
        let file = File::create(&name).with_context(|| name.display().to_string())?;
        shot.context("there is a frame")?
            .write_png(BufWriter::new(file))
            .with_context(|| name.display().to_string())?;
    }
    let small: Vec<_> = shots.iter().map(develop::halved).collect();
    develop::write_animation(&all, &small)
}

fn print(report: &Report, output: &Path) {
    let Report { device, path, particles, bytes, frames, threads, .. } = report;
    println!("{device}: {particles} particles in {} MiB, {frames} frames, path {path}", bytes >> 20);
    println!("medians of a frame, in ms:");
    println!("  moved by {threads} threads            {:>9.3}", report.step);
    println!("  drawn in place                {:>9.3}   of which acquire {:.3}", report.in_place, report.acquire);
    println!("  copied, and drawn from there  {:>9.3}   of which the copy {:.3}", report.copied, report.copy);
    println!("pictures of both ways: {}", if report.same_pictures { "identical in every frame" } else { "DIFFERENT" });
    let [first, last, all] = names(output);
    println!("{}, {}, {} (moves)", first.display(), last.display(), all.display());
}
