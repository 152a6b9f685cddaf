//! What the device sees of the program's memory, path by path, on a real driver.

#[path = "fixture/mod.rs"]
mod fixture;
#[path = "fixture/memory.rs"]
mod memory;

use std::process::Command;

use ash::vk;
use fixture::{Fixture, GENEROUS, Readback, acquire, refresh};
use memory::{Memory, disk_file, memfd, pattern};
use nix::errno::Errno;
use pinfold_core::{Access, Device as _, DeviceError, MirrorReason, Path, Preparation, Request};
use pinfold_invalidate::{mappings, page_size};
use pinfold_vulkan::{
    Config, Force, MappingKind, Requirements, SetupError, Source, TrialResult, VulkanDevice, requirements,
};

const PAGES: usize = 20;

/// Every kind of mapping the system can make, with the path it is expected to take.
fn every_kind() -> Vec<(MappingKind, Memory, Path)> {
    let mut kinds = Vec::new();
    for writable in [true, false] {
        let mut add = |source, memory: Memory, path| kinds.push((MappingKind { source, writable }, memory, path));
        add(Source::Anonymous, Memory::anonymous(PAGES), Path::Import);
        add(Source::PrivateMemfd, Memory::of_file(&memfd(PAGES), PAGES, false), Path::Import);
        add(Source::SharedMemfd, Memory::of_file(&memfd(PAGES), PAGES, true), Path::AliasImport);
        match disk_file(PAGES) {
            Some(file) => {
                add(Source::PrivateFile, Memory::of_file(&file, PAGES, false), Path::Import);
                add(Source::SharedFile, Memory::of_file(&file, PAGES, true), Path::AliasImport);
            }
            None => println!("skipped: file mappings; no temporary file can be made on a disk"),
        }
    }
    for (kind, memory, _) in &kinds {
        memory.fill();
        if !kind.writable {
            memory.protect_read_only();
        }
    }
    kinds
}

#[test]
fn every_kind_of_memory_is_read_in_place() {
    let Some(fixture) = Fixture::new() else { return };
    let device = fixture.open(&Config::default());
    for (kind, memory, path) in every_kind() {
        assert_eq!(MappingKind::of(&mappings(memory.range()).unwrap()[0]), kind);
        let import = acquire(&device, memory.range(), Access::Read).unwrap();
        assert_eq!(import.path(), path, "{kind}");
        assert_eq!((import.size, import.chunks().len()), (memory.range().len() as u64, 1));
        assert_eq!(fixture.read(&import, 0, import.size), memory.bytes(), "{kind}");
        if kind.writable {
            memory.write(5000, 77); // in place: no refresh, and the device sees it
            assert_eq!(fixture.read(&import, 5000, 8)[0], 77, "{kind}");
        }
        device.release(import);
    }
}

#[test]
// rows: amdgpu/amd_basic userptr-with-IP-DMA
fn what_the_device_writes_is_in_the_programs_own_memory() {
    let Some(fixture) = Fixture::new() else { return };
    let device = fixture.open(&Config::default());
    for (kind, memory, path) in every_kind() {
        let import = acquire(&device, memory.range(), Access::ReadWrite);
        if !kind.writable {
            assert_eq!(import.unwrap_err().errno(), libc::EPERM, "{kind}");
            continue;
        }
        let import = import.unwrap();
        assert_eq!(import.path(), path, "{kind}");
        fixture.write(&import, 0x0506_0708);
        assert!(memory.bytes().chunks(4).all(|word| word == [8, 7, 6, 5]), "{kind}");
    }
}

#[test]
fn the_trial_table_agrees_with_what_then_happens() {
    let Some(fixture) = Fixture::new() else { return };
    let device = fixture.open(&Config::default());
    for trial in device.trials() {
        match trial.result {
            TrialResult::Imported => {}
            TrialResult::NotTried(why) => println!("{}: {why}", trial.kind),
            refused @ TrialResult::Refused(_) => panic!("{}: {refused}; CPU drivers import everything", trial.kind),
        }
    }
}

#[test]
// rows: igt/readonly-unsync
fn a_buffer_over_read_only_memory_cannot_be_written() {
    let Some(fixture) = Fixture::new() else { return };
    let device = fixture.open(&Config::default());
    for memory in [Memory::anonymous(1), Memory::of_file(&memfd(1), 1, true)] {
        memory.protect_read_only();
        let import = acquire(&device, memory.range(), Access::Read).unwrap();
        // Recorded only: it must not run.
        fixture.record(|commands| fixture.fill(commands, (import.buffer, 0), 16, 0));
        let message = fixture.expect_message("VUID-vkCmdFillBuffer-dstBuffer-00029");
        assert!(message.is_none_or(|text| text.contains("weights")), "objects carry their labels");
    }
}

#[test]
// rows: selftests/hmm double_map
fn an_import_of_shared_memory_survives_munmap_while_the_device_works() {
    let Some(fixture) = Fixture::new() else { return };
    let device = fixture.open(&Config::default());
    let memory = Memory::of_file(&memfd(1024), 1024, true);
    memory.fill();
    let (import, expected) = (acquire(&device, memory.range(), Access::Read).unwrap(), memory.bytes());
    let (back, go, done) = (Readback::new(&fixture, import.size), fixture.timeline(), fixture.timeline());
    let commands = fixture.record(|commands| {
        (0..64).for_each(|_| fixture.copy(commands, (import.buffer, import.offset), (back.buffer, 0), import.size));
    });
    // The work can't be over before the mapping is gone, as it waits for `go`.
    fixture.submit(&[commands], Some((go, 1)), Some((done, 1)));
    drop(memory);
    fixture.signal(go, 1);
    fixture.wait(done, 1);
    assert_eq!(back.bytes(), expected);
    device.release(import);
    fixture.destroy_semaphore(go);
    fixture.destroy_semaphore(done);
}

#[test]
fn an_alias_is_made_only_while_nobody_watches_and_is_used_again_while_it_lives() {
    let Some(fixture) = Fixture::new() else { return };
    let device = fixture.open(&Config::default());
    let memory = Memory::of_file(&memfd(2), 2, true);
    let mappings = mappings(memory.range()).unwrap();
    let request = |watched| Request { watched, ..Request::new(memory.range(), Access::Read, &mappings) };
    let prepare = |watched| device.prepare(&request(watched)).unwrap();
    assert!(matches!(prepare(true), Preparation::NeedsUnwatched));
    let Preparation::Ready(prepared) = prepare(false) else { panic!("nobody watches") };
    let import = device.import(&request(true), prepared).unwrap();
    assert_eq!(import.path(), Path::AliasImport);
    // As long as it lives, a watched range can use it; a prepared range that is dropped changes nothing.
    assert!(matches!(prepare(true), Preparation::Ready(_)));
    device.release(import);
    assert!(matches!(prepare(true), Preparation::NeedsUnwatched));
}

#[test]
fn a_range_over_two_kinds_of_memory_is_imported_as_it_is() {
    let Some(fixture) = Fixture::new() else { return };
    let device = fixture.open(&Config::default());
    let memory = Memory::anonymous(4);
    memory.replace_tail(&memfd(2), 2);
    memory.fill();
    let import = acquire(&device, memory.range(), Access::ReadWrite).unwrap();
    assert_eq!(import.path(), Path::Import);
    assert_eq!(fixture.read(&import, 0, import.size), memory.bytes());
}

#[test]
fn a_range_above_1_gib_comes_in_chunks_without_a_gap() {
    let Some(fixture) = Fixture::new() else { return };
    let device = fixture.open(&Config::default());
    let pages = (5 << 28) / page_size() + 3; // 1.25 GiB and a little; only a few pages are ever touched
    for (memory, path) in
        [(Memory::anonymous(pages), Path::Import), (Memory::of_file(&memfd(pages), pages, true), Path::AliasImport)]
    {
        let import = acquire(&device, memory.range(), Access::ReadWrite).unwrap();
        assert_eq!(import.path(), path);
        let chunks = import.chunks();
        assert!(chunks.len() == 2, "{chunks:?}");
        assert_eq!((import.buffer, import.size), (chunks[0].buffer, chunks[0].size));
        assert_eq!(chunks[0].at + chunks[0].size, chunks[1].at);
        assert_eq!(chunks[1].at + chunks[1].size, memory.range().len() as u64);
        assert!(chunks.iter().all(|chunk| chunk.size < 1 << 30));
        // Across the border, and at both ends.
        let border = usize::try_from(chunks[1].at).unwrap();
        for at in [0, border - 64, memory.range().len() - 128] {
            (at..at + 128).for_each(|at| memory.write(at, pattern(at)));
            let seen = fixture.read(&import, at as u64, 128);
            assert!(seen.iter().enumerate().all(|(n, &byte)| byte == pattern(at + n)), "at {at:#x}");
        }
    }
}

#[test]
fn the_device_never_sees_memory_without_readable_pages() {
    let Some(fixture) = Fixture::new() else { return };
    let device = fixture.open(&Config::default());
    let memory = Memory::anonymous(3);
    memory.protect_none(1);
    for access in [Access::Read, Access::ReadWrite] {
        let error = acquire(&device, memory.range(), access).unwrap_err();
        assert_eq!(error.errno(), libc::EFAULT, "{error}");
    }
}

#[test]
fn a_forced_mirror_is_a_copy_that_refresh_makes_current() {
    let Some(fixture) = Fixture::new() else { return };
    let mut config = Config::default();
    config.force = Some(Force::Mirror);
    let device = fixture.open(&config);
    for (kind, memory, _) in every_kind() {
        let import = acquire(&device, memory.range(), Access::Read).unwrap();
        assert_eq!(import.path(), Path::Mirror(MirrorReason::Forced), "{kind}");
        assert_eq!(fixture.read(&import, 0, import.size), memory.bytes(), "{kind}");
        if kind.writable {
            let old = memory.bytes()[5000];
            memory.write(5000, old ^ 1);
            assert_eq!(fixture.read(&import, 5000, 8)[0], old, "{kind}: a copy doesn't change by itself");
            refresh(&device, &import, memory.range()).unwrap();
            assert_eq!(fixture.read(&import, 5000, 8)[0], old ^ 1, "{kind}");
        }
        match acquire(&device, memory.range(), Access::ReadWrite) {
            Ok(import) => assert!(kind.writable && matches!(import.path(), Path::Mirror(_)), "{kind}"),
            Err(error) => assert_eq!((error.errno(), kind.writable), (libc::EPERM, false), "{kind}: {error}"),
        }
    }
}

#[test]
fn a_mirror_of_memory_that_vanished_is_a_fault_and_no_crash() {
    let Some(fixture) = Fixture::new() else { return };
    let mut config = Config::default();
    config.force = Some(Force::Mirror);
    let device = fixture.open(&config);
    let file = memfd(4);
    let (truncated, mut unmapped) = (Memory::of_file(&file, 4, true), Memory::anonymous(4));
    let ranges = [truncated.range(), unmapped.range()];
    let imports = ranges.map(|range| acquire(&device, range, Access::Read).unwrap());
    nix::unistd::ftruncate(&file, i64::try_from(page_size()).unwrap()).unwrap();
    unmapped.unmap_tail(1);
    for (import, range) in imports.iter().zip(ranges) {
        match refresh(&device, import, range) {
            Err(DeviceError::Fault { errno: libc::EFAULT, range: named, .. }) => assert_eq!(named, range),
            other => panic!("{other:?}"),
        }
    }
    // A new mirror of it fails in the same way, and leaves nothing behind.
    assert_eq!(acquire(&device, truncated.range(), Access::Read).unwrap_err().errno(), libc::EFAULT);
}

#[test]
fn forced_import_and_alias_take_that_way() {
    let Some(fixture) = Fixture::new() else { return };
    for (force, private, shared) in
        [(Force::Import, Path::Import, Path::Import), (Force::Alias, Path::Import, Path::AliasImport)]
    {
        let mut config = Config::default();
        config.force = Some(force);
        let device = fixture.open(&config);
        for (memory, path) in [(Memory::anonymous(1), private), (Memory::of_file(&memfd(1), 1, true), shared)] {
            assert_eq!(acquire(&device, memory.range(), Access::Read).unwrap().path(), path, "{force:?}");
        }
    }
}

#[test]
fn waiting_for_an_idle_device_ends_in_time_either_way() {
    let Some(fixture) = Fixture::new() else { return };
    let device = fixture.open(&Config::default());
    device.wait_idle(GENEROUS).unwrap();
    let go = fixture.timeline();
    let commands = fixture.record(|_| ());
    fixture.submit(&[commands], Some((go, 1)), None);
    let limit = std::time::Duration::from_millis(50);
    match device.wait_idle(limit) {
        Err(error @ DeviceError::StillBusy(_)) => assert_eq!(Errno::from_raw(error.errno()), Errno::ETIMEDOUT),
        other => panic!("the device waits for the test: {other:?}"),
    }
    fixture.signal(go, 1);
    device.wait_idle(GENEROUS).unwrap();
    fixture.destroy_semaphore(go);
}

#[test]
fn a_device_made_without_import_mirrors_everything_and_says_why() {
    let Some(mut fixture) = Fixture::new() else { return };
    fixture.extensions.retain(|&name| name != ash::ext::external_memory_host::NAME);
    let device = fixture.open(&Config::default());
    let memory = Memory::anonymous(2);
    memory.fill();
    let import = acquire(&device, memory.range(), Access::Read).unwrap();
    assert_eq!(import.path(), Path::Mirror(MirrorReason::Unsupported));
    assert_eq!(fixture.read(&import, 0, import.size), memory.bytes());
    assert!(device.capabilities().import.to_string().contains("VK_EXT_external_memory_host"));
}

#[test]
fn imports_and_mirrors_have_addresses_if_they_were_asked_for() {
    let Some(fixture) = Fixture::with(Requirements::with_buffer_device_address) else { return };
    for (force, path) in [(None, Path::Import), (Some(Force::Mirror), Path::Mirror(MirrorReason::Forced))] {
        let mut config = Config::default();
        config.force = force;
        let (device, memory) = (fixture.open(&config), Memory::anonymous(2));
        let import = acquire(&device, memory.range(), Access::Read).unwrap();
        assert_eq!(import.path(), path);
        let info = vk::BufferDeviceAddressInfo::default().buffer(import.buffer);
        // SAFETY: a live buffer with that usage on memory with that flag; the validation layer would say otherwise.
        assert_ne!(unsafe { fixture.device.get_buffer_device_address(&info) }, 0);
    }
}

#[test]
fn requirements_of_another_instances_device_are_refused() {
    let Some(fixture) = Fixture::new() else { return };
    let foreign = vk::PhysicalDevice::null();
    assert!(matches!(requirements(&fixture.instance, foreign), Err(SetupError::ForeignPhysicalDevice)));
}

/// Runs itself in child processes, as the environment of this one belongs to all tests.
#[test]
fn the_environment_forces_a_path_or_is_told_what_it_can_say() {
    const CHILD: &str = "PINFOLD_TEST_CHILD";
    if std::env::var_os(CHILD).is_some() {
        let Some(fixture) = Fixture::new() else { return };
        let mut config = Config::default();
        config.force = Some(Force::Import);
        // SAFETY: as in `Fixture::open`.
        match unsafe { VulkanDevice::new(fixture.context(), &config) } {
            Ok(device) => println!("<{:?}>", device.forced()),
            Err(error) => println!("<{error}>"),
        }
        return;
    }
    if fixture::choose_driver().is_none() {
        return;
    }
    let bad = "<PINFOLD_FORCE is \"mirrors\"; it is `mirror`, `import`, `alias` or `dmabuf`, or unset>";
    for (value, answer) in [("mirror", "<Some(Mirror)>"), ("", "<Some(Import)>"), ("mirrors", bad)] {
        let this = std::env::current_exe().unwrap();
        let child = Command::new(this)
            .args(["--exact", "the_environment_forces_a_path_or_is_told_what_it_can_say", "--nocapture"])
            .envs([(CHILD, "1"), ("PINFOLD_FORCE", value)])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stdout);
        assert!(child.status.success() && said.contains(answer), "{value:?}: {said}");
    }
}
