//! What the doctor says, against what then happens on the driver that the Vulkan loader finds.

use std::process::Command;
use std::time::Duration;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use pinfold_core::dmabuf::Heap;
use pinfold_core::{HostBuffer, HostBufferKind, HugePages};
use pinfold_demos::device::{Gpu, Validation};
use pinfold_vulkan::{Access, Config, HostRange, Manager, MappingKind, Path, Source, Support, page_size};
use serde_json::Value;

#[allow(dead_code, reason = "each test file uses another part of it")]
mod skip;

fn doctor(arguments: &[&str], force: Option<&str>) -> Option<String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_doctor"));
    command.args(arguments).env("PINFOLD_VALIDATION", "1").env_remove("PINFOLD_FORCE");
    if let Some(force) = force {
        command.env("PINFOLD_FORCE", force);
    }
    let output = command.output().unwrap();
    let (said, error) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && !error.contains("validation:"), "{error}\n{said}");
    if said.contains("no Vulkan driver") {
        skip::skip("no Vulkan driver could be started");
        return None;
    }
    Some(said)
}

fn json(force: Option<&str>) -> Option<Value> {
    Some(serde_json::from_str(&doctor(&["--json"], force)?).unwrap())
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("a number, not {value}"))
}

#[test]
fn what_it_says_of_the_device_is_what_the_device_says() {
    let Some(report) = json(None) else { return };
    let gpu = Gpu::open_at(0, Validation::Off).unwrap();
    let device = &report["devices"][0];
    assert_eq!(device["name"], gpu.name());
    assert_eq!(device["validation_messages"].as_u64().unwrap_or(0), 0);
    let limits = &gpu.properties.limits;
    assert_eq!(number(&device["limits"]["max_storage_buffer_range"]), u64::from(limits.max_storage_buffer_range));
    assert_eq!(number(&device["limits"]["max_allocations"]), u64::from(limits.max_memory_allocation_count));
    let heaps: Vec<u64> = gpu.memory.memory_heaps_as_slice().iter().map(|heap| heap.size).collect();
    let said: Vec<u64> = device["heaps"].as_array().unwrap().iter().map(|heap| number(&heap["size"])).collect();
    assert_eq!(said, heaps);
    assert_eq!(device["memory_types"].as_array().unwrap().len(), gpu.memory.memory_types_as_slice().len());
    // What it calls present, Pinfold has asked for and got; what it calls missing can't be enabled.
    let enabled = |name: &str| gpu.extensions.iter().any(|enabled| enabled.to_str() == Ok(name));
    let extensions = device["extensions"].as_array().unwrap();
    let wanted = extensions.iter().find(|it| it["name"] == "VK_EXT_external_memory_host").unwrap();
    assert_eq!(wanted["present"], enabled("VK_EXT_external_memory_host"));
}

#[test]
fn the_path_and_the_coverage_of_every_kind_are_those_that_objects_get() {
    let Some(report) = json(None) else { return };
    let gpu = Gpu::open_at(0, Validation::Off).unwrap();
    // SAFETY: the handles are the device's own, and the manager is dropped first.
    let manager = unsafe { Manager::new(gpu.context(), Config::default()) }.unwrap();
    let rows = report["devices"][0]["memory"].as_array().unwrap();
    assert_eq!(rows.len(), MappingKind::ALL.len());
    for (row, kind) in rows.iter().zip(MappingKind::ALL) {
        assert_eq!(row["memory"], kind.to_string());
        let word = match manager.device().path_of(kind) {
            Path::Import => "import",
            Path::AliasImport => "alias import",
            Path::Mirror(_) => "copy",
            _ => panic!("a path that the doctor has no word for"),
        };
        if row["acquire_us"].is_null() {
            skip::skip_part(format_args!("{kind}: {}", row["path"]));
            continue;
        }
        assert!(row["path"].as_str().unwrap().starts_with(word), "{row:#} {word}");
        assert!(row["acquire_us"].as_f64().unwrap() > 0.0 && row["copy_us"].as_f64().unwrap() > 0.0, "{row:#}");
    }
    // One kind in full: an object of this process, acquired here.
    let kind = MappingKind { source: Source::Anonymous, writable: true };
    let row = rows.iter().find(|row| row["memory"] == kind.to_string()).unwrap();
    let (write, len) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, 4 * page_size());
    // SAFETY: a new mapping at an address that the kernel chooses.
    let at = unsafe { mmap_anonymous(None, len.try_into().unwrap(), write, MapFlags::MAP_PRIVATE) }.unwrap();
    let range = HostRange::from_ptr(at.as_ptr(), len).unwrap();
    // SAFETY: the mapping is unmapped after the manager is gone, and no work is submitted.
    let object = unsafe { manager.register(range, Access::Read) }.unwrap();
    drop(manager.acquire_timeout(&[&object], Duration::from_secs(30)).unwrap());
    assert_eq!(row["coverage"], object.coverage().map_or("not watched".into(), |coverage| format!("{coverage:?}")));
    if report["kernel"]["userfaultfd"]["events"] == true {
        assert_eq!(row["coverage"], "Watched");
    }
    drop((object, manager));
    // SAFETY: the mapping is this test's.
    unsafe { munmap(at, len) }.unwrap();
}

#[test]
fn what_it_says_of_dma_bufs_is_what_happens_to_one() {
    let (Some(report), Some(text)) = (json(None), doctor(&[], None)) else { return };
    let sample = HostBuffer::new(1, HostBufferKind::Exportable, HugePages::No).unwrap();
    let exported = sample.export_dmabuf(0..sample.size());
    let said = &report["kernel"]["udmabuf"];
    assert_eq!(said["usable"], exported.is_ok());
    assert_eq!(said["error"].as_str().map(str::to_owned), exported.as_ref().err().map(ToString::to_string));
    let heaps: Vec<_> = Heap::names().into_iter().map(Value::from).collect();
    assert_eq!(report["kernel"]["dma_heaps"], Value::from(heaps));

    let gpu = Gpu::open_at(0, Validation::Off).unwrap();
    // SAFETY: the handles are the device's own, and the manager is dropped first.
    let manager = unsafe { Manager::new(gpu.context(), Config::default()) }.unwrap();
    let (usable, trial) = (manager.capabilities().dmabuf == Support::Usable, manager.device().dmabuf_trial());
    let said = report["devices"][0]["dmabuf_import"].as_str().unwrap();
    assert_eq!(said.starts_with("yes"), trial.is_ok(), "{said}");
    assert_eq!(said.starts_with("not tried"), usable && exported.is_err(), "{said}");
    assert_eq!(said.contains("VK_EXT_external_memory_dma_buf"), !usable, "{said}");
    assert!(text.contains(said), "{text}");
}

#[test]
fn a_forced_copy_is_told_as_one_and_advised_against() {
    let Some(report) = json(Some("mirror")) else { return };
    let device = &report["devices"][0];
    assert_eq!(device["forced"], "Mirror");
    for row in device["memory"].as_array().unwrap() {
        let path = row["path"].as_str().unwrap();
        assert!(row["acquire_us"].is_null() || path.starts_with("copy (Forced"), "{row:#}");
    }
    let advice = report["advice"].as_array().unwrap();
    assert!(advice.iter().any(|line| line.as_str().unwrap().contains("PINFOLD_FORCE")), "{advice:#?}");
}

#[test]
fn the_text_has_what_the_object_has_and_fits_a_terminal() {
    let (Some(report), Some(text)) = (json(None), doctor(&[], None)) else { return };
    let device = &report["devices"][0];
    for part in [&device["name"], &device["vulkan"], &report["kernel"]["release"]] {
        let part = part.as_str().unwrap();
        assert!(text.contains(part), "{part:?} is missing in:\n{text}");
    }
    for row in device["memory"].as_array().unwrap() {
        let line = text.lines().find(|line| line.trim_start().starts_with(row["memory"].as_str().unwrap())).unwrap();
        assert!(line.contains(row["path"].as_str().unwrap()), "{line}");
    }
    for line in text.lines() {
        assert!(line.chars().count() <= 120 && line.trim_end() == line, "{line:?}");
    }
}
