//! Translates the shader from WGSL, which people read, to SPIR-V, which drivers read.

use std::{env, fs, path::Path};

use anyhow::{Context, Result, anyhow};
use naga::back::spv;
use naga::valid::{Capabilities, ValidationFlags, Validator};

fn main() -> Result<()> {
    let out = env::var_os("OUT_DIR").context("cargo sets OUT_DIR")?;
    let source = "shaders/count_others.wgsl";
    println!("cargo::rerun-if-changed={source}");
    let wgsl = fs::read_to_string(source)?;
    let module = naga::front::wgsl::parse_str(&wgsl).map_err(|e| anyhow!(e.emit_to_string(&wgsl)))?;
    let info = Validator::new(ValidationFlags::all(), Capabilities::empty())
        .validate(&module)
        .map_err(|e| anyhow!(e.emit_to_string(&wgsl)))?;
    let options = spv::Options { lang_version: (1, 3), ..spv::Options::default() };
    let words = spv::write_vec(&module, &info, &options, None)?;
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    fs::write(Path::new(&out).join("count_others.spv"), bytes)?;
    Ok(())
}
