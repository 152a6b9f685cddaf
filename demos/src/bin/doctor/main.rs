//! Says what this machine can do for Pinfold, device by device, and what Pinfold will do on it. All of it is asked or tried, nothing is assumed:
//! the table of memory comes from real objects, acquired by a real manager.

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use pinfold_demos::device::{Gpu, Validation};
use serde::Serialize;

mod advice;
mod device;
mod kernel;
mod memory;
mod text;

use device::Device;
use kernel::Kernel;

/// Show what the kernel and every Vulkan device can do for Pinfold, and what Pinfold will do.
///
/// Which drivers there are is the Vulkan loader's choice (VK_DRIVER_FILES). Every kind of memory is imported once, 16 MiB each, and copied for comparison.
#[derive(Debug, Parser)]
#[command(name = "doctor")]
struct Arguments {
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// Everything that was found out.
#[derive(Serialize)]
struct Report {
    pinfold: &'static str,
    kernel: Kernel,
    /// Why there are no devices, if there are none.
    no_devices: Option<String>,
    devices: Vec<Device>,
    advice: Vec<String>,
}

fn main() -> ExitCode {
    let arguments = Arguments::try_parse().unwrap_or_else(|error| {
        let _ = error.print();
        std::process::exit(i32::from(error.use_stderr()));
    });
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("doctor: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let kernel = Kernel::ask();
    let (devices, no_devices) = match Gpu::count() {
        Ok(0) => (Vec::new(), Some("the Vulkan loader knows no device".to_owned())),
        Ok(count) => ((0..count).map(|n| Device::ask(n, validation(), &kernel)).collect(), None),
        Err(error) => (Vec::new(), Some(format!("{error:#}"))),
    };
    let advice = advice::advice(&kernel, &devices);
    let report = Report { pinfold: env!("CARGO_PKG_VERSION"), kernel, no_devices, devices, advice };
    let text = match arguments.json {
        true => serde_json::to_string_pretty(&report)? + "\n",
        false => report.to_string(),
    };
    std::io::stdout().write_all(text.as_bytes()).context("standard output")
}

fn validation() -> Validation {
    let wanted = std::env::var_os("PINFOLD_VALIDATION").is_some_and(|value| value != "0");
    if wanted { Validation::Wanted } else { Validation::Off }
}
