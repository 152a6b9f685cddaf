//! Frames that one process makes and another one draws with its GPU, from the same pages: no copy on the way.
//!
//! The maker fills a `HostBuffer` (with a picture of its own, or with raw video from a file), and hands it over once: as a dma-buf if it can make one and the
//! viewer's device imports it, else as the memory file itself, with the reason. The viewer is a second process with a device of its own. It
//! draws every frame from where it lies, and what its device saw is compared, by a sum over all bytes, with what the maker has in its memory.

use std::fs::File;
use std::io::BufWriter;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use pinfold_demos::device::Validation;
use serde::{Deserialize, Serialize};

mod draw;
mod maker;
mod viewer;
mod wire;

/// Longer than a frame takes anywhere.
const PATIENCE: Duration = Duration::from_secs(120);

/// Hand frames to a second process whose GPU draws them from where they lie, and write what it saw as a PNG.
///
/// The Vulkan driver is the loader's choice (VK_DRIVER_FILES).
#[derive(Debug, Parser)]
#[command(name = "share")]
struct Arguments {
    /// Raw video or a raw picture: frames of RGBA bytes one after the other. Without it, the maker draws
    input: Option<PathBuf>,
    /// Width of a frame in pixels
    #[arg(long, default_value_t = 1920, value_parser = clap::value_parser!(u32).range(1..=7680))]
    width: u32,
    /// Height of a frame in pixels
    #[arg(long, default_value_t = 1080, value_parser = clap::value_parser!(u32).range(1..=4320))]
    height: u32,
    /// How many frames at most
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    frames: u32,
    /// The last frame, as the viewer's device saw it
    #[arg(short, long, default_value = "share.png")]
    output: PathBuf,
    /// Print the figures as one JSON object
    #[arg(long)]
    json: bool,
    /// This is the viewer; the socket is its standard input
    #[arg(long, hide = true)]
    viewer: bool,
}

/// What the viewer tells in the end.
#[derive(Serialize, Deserialize)]
struct Seen {
    device: String,
    /// What the viewer's device took, and how.
    path: String,
    /// Why not by a better way, if there is one.
    because: Vec<String>,
    frames: u32,
    /// Bytes of frames that were copied between the maker's memory and the device.
    bytes_copied: u64,
    /// Frames whose bytes, as the device saw them, are those that the maker has.
    right: u32,
    /// Medians, in milliseconds: until commands could name the frame, and until it was drawn.
    acquire: f64,
    drawn: f64,
    validation_messages: Option<u64>,
}

/// All of it.
#[derive(Serialize)]
struct Report {
    width: u32,
    height: u32,
    /// What went to the other process.
    handed_over: &'static str,
    /// What it told of frames besides, in bytes.
    told: u64,
    #[serde(flatten)]
    seen: Seen,
}

fn main() -> ExitCode {
    let arguments = Arguments::try_parse().unwrap_or_else(|error| {
        let _ = error.print();
        std::process::exit(i32::from(error.use_stderr()));
    });
    let who = if arguments.viewer { "share (viewer)" } else { "share" };
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{who}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    if arguments.viewer {
        let socket: UnixStream = std::io::stdin().as_fd().try_clone_to_owned()?.into();
        let output = File::create(&arguments.output).with_context(|| arguments.output.display().to_string())?;
        return viewer::view(&socket, BufWriter::new(output), validation());
    }
    let (ours, theirs) = UnixStream::pair()?;
    let mut viewer = Command::new(std::env::current_exe()?)
        .arg("--viewer")
        .arg("-o")
        .arg(&arguments.output)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()
        .context("the second process")?;
    let made = maker::make(&ours, arguments);
    drop(ours); // a viewer that still waits for something sees the end
    let status = viewer.wait()?;
    let report = made.with_context(|| format!("the viewer ended with {status}"))?;
    ensure!(status.success(), "the viewer ended with {status}");
    match arguments.json {
        true => println!("{}", serde_json::to_string_pretty(&report)?),
        false => print(&report, arguments),
    }
    ensure!(report.seen.right == report.seen.frames, "the device saw other bytes than the maker has");
    ensure!(report.seen.validation_messages.unwrap_or(0) == 0, "the validation layer had something to say");
    Ok(())
}

fn validation() -> Validation {
    let wanted = std::env::var_os("PINFOLD_VALIDATION").map_or(cfg!(debug_assertions), |value| value != "0");
    if wanted { Validation::Wanted } else { Validation::Off }
}

fn print(report: &Report, arguments: &Arguments) {
    let Report { width, height, handed_over, told, seen } = report;
    let all = u64::from(*width) * u64::from(*height) * 4 * u64::from(seen.frames);
    println!("{}: {} frames of {width}x{height}, {} MiB", seen.device, seen.frames, all >> 20);
    println!("handed over    {handed_over}");
    println!("path           {}", seen.path);
    for because in &seen.because {
        println!("               {because}");
    }
    println!("bytes copied   {}; {told} bytes went through the socket", seen.bytes_copied);
    println!("a frame        {:.3} ms to the picture, of which acquire {:.3}", seen.drawn, seen.acquire);
    println!("pixels         {} of {} frames as the maker has them", seen.right, seen.frames);
    println!("{}", arguments.output.display());
}
