//! Translates the shaders from WGSL, which people read, to SPIR-V, which drivers read.

use std::{env, fs, path::Path};

use anyhow::{Context, Result, anyhow};
use naga::back::spv;
use naga::valid::{Capabilities, ValidationFlags, Validator};

fn main() -> Result<()> {
    let out = env::var_os("OUT_DIR").context("cargo sets OUT_DIR")?;
    for name in ["frame", "mesh", "particles"] {
        let source = format!("shaders/{name}.wgsl");
        println!("cargo::rerun-if-changed={source}");
        let words = translate(&fs::read_to_string(&source)?)?;
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        fs::write(Path::new(&out).join(name).with_extension("spv"), bytes)?;
    }
    Ok(())
}

/// SPIR-V words with every entry point of `wgsl`.
fn translate(wgsl: &str) -> Result<Vec<u32>> {
    let module = naga::front::wgsl::parse_str(wgsl).map_err(|e| anyhow!(e.emit_to_string(wgsl)))?;
    let info = Validator::new(ValidationFlags::all(), Capabilities::IMMEDIATES)
        .validate(&module)
        .map_err(|e| anyhow!(e.emit_to_string(wgsl)))?;
    // The projections already have Vulkan's downward Y axis.
    let mut options = spv::Options { lang_version: (1, 3), ..spv::Options::default() };
    options.flags.remove(spv::WriterFlags::ADJUST_COORDINATE_SPACE);
    // WGSL can't say how large a point is; it is one pixel, and has to be said.
    options.flags.insert(spv::WriterFlags::FORCE_POINT_SIZE);
    Ok(spv::write_vec(&module, &info, &options, None)?)
}
