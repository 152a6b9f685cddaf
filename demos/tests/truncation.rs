//! Somebody else truncates the file after it was opened and mapped: an error, and no SIGBUS.

use std::fs;
use std::num::NonZeroUsize;
use std::time::Duration;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use pinfold_demos::device::{Gpu, Validation};
use pinfold_demos::geometry::Staged;
use pinfold_demos::glb::Glb;
use pinfold_demos::render::Renderer;
use pinfold_vulkan::{Access, Config, DeviceContext, HostRange, Manager, page_size};

#[allow(dead_code, reason = "each test file uses another part of it")]
mod model;
#[allow(dead_code, reason = "each test file uses another part of it")]
mod skip;
use model::{Indices, Model};

fn gpu() -> Option<Gpu> {
    Gpu::open(None, Validation::Wanted).inspect_err(|error| skip::skip(format_args!("{error:#}"))).ok()
}

/// A model of several pages, open, and a way to cut it.
fn opened() -> (tempfile::NamedTempFile, Glb) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut model = Model::cube(Indices::U16);
    model.binary.resize(4 * page_size(), 0);
    let len = model.binary.len();
    fs::write(file.path(), model.with("/buffers/0/byteLength", len.into()).bytes()).unwrap();
    let glb = Glb::open(file.path()).unwrap();
    (file, glb)
}

#[test]
fn a_staged_copy_of_a_file_that_was_truncated_is_an_error() {
    let Some(gpu) = gpu() else { return };
    let (file, glb) = opened();
    let renderer = Renderer::new(&gpu, 16, 16).unwrap();
    assert!(Staged::load(&gpu, renderer.pool, &glb).is_ok());
    file.as_file().set_len(page_size() as u64).unwrap();
    let error = Staged::load(&gpu, renderer.pool, &glb).err().expect("most of the bytes are gone").to_string();
    assert!(error.contains("truncated"), "{error}");
}

#[test]
fn acquiring_a_mapping_whose_file_was_truncated_is_an_error() {
    let Some(gpu) = gpu() else { return };
    let (file, glb) = opened();
    let context = DeviceContext {
        instance: gpu.instance.clone(),
        physical: gpu.physical,
        device: gpu.device.clone(),
        extensions: gpu.extensions.clone(),
        buffer_device_address: false,
    };
    // SAFETY: the handles belong together and outlive the manager, which is dropped first.
    let manager = unsafe { Manager::new(context, Config::default()) }.unwrap();
    let len = usize::try_from(glb.len).unwrap();
    let size = NonZeroUsize::new(len).unwrap();
    // SAFETY: a new mapping at a place that the kernel chooses.
    let start = unsafe { mmap(None, size, ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE, &glb.file, 0) }.unwrap();
    file.as_file().set_len(page_size() as u64).unwrap();
    let range = HostRange::cover(start.as_ptr().cast_const(), len).unwrap();
    // SAFETY: no reference into the mapping exists, and it is unmapped after the object is gone.
    let object = unsafe { manager.register(range, Access::Read) }.unwrap();
    let error =
        manager.acquire_timeout(&[&object], Duration::from_secs(30)).expect_err("three pages have no file behind them");
    assert!(!error.is_again(), "{error}");

    // The object means whatever is there: once the file has its length again, it can be had.
    file.as_file().set_len(glb.len).unwrap();
    assert!(manager.acquire_timeout(&[&object], Duration::from_secs(30)).is_ok());
    drop(object);
    drop(manager);
    // SAFETY: the mapping made above, which nobody uses any more.
    unsafe { munmap(start, len) }.unwrap();
    assert_eq!(gpu.messages(), 0);
}
