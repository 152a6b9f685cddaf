//! Memory that one device has allocated, as a buffer of another device of the same driver, made by another instance.

#[path = "fixture/mod.rs"]
mod fixture;

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};

use ash::{khr, vk};
use fixture::{Fixture, Readback};
use pinfold_vulkan::opaque::{Exported, Identity, OpaqueError};
use pinfold_vulkan::{Config, Manager};

const OPAQUE: vk::ExternalMemoryHandleTypeFlags = vk::ExternalMemoryHandleTypeFlags::OPAQUE_FD;
const SIZE: u64 = 70_000;

fn usage() -> vk::BufferUsageFlags {
    vk::BufferUsageFlags::TRANSFER_SRC | vk::BufferUsageFlags::TRANSFER_DST | vk::BufferUsageFlags::STORAGE_BUFFER
}

fn manager(fixture: &Fixture) -> Manager {
    // SAFETY: the fixture's handles belong together, and tests drop the manager and its buffers first.
    unsafe { Manager::new(fixture.context(), Config::default()) }.expect("a manager")
}

/// A buffer whose memory can be exported.
struct Exporter<'a> {
    fixture: &'a Fixture,
    buffer: vk::Buffer,
    memory: vk::DeviceMemory,
    exported: Exported,
}

impl<'a> Exporter<'a> {
    fn new(test: &str, fixture: &'a Fixture) -> Option<Self> {
        let asked = vk::PhysicalDeviceExternalBufferInfo::default().usage(usage()).handle_type(OPAQUE);
        let mut able = vk::ExternalBufferProperties::default();
        let (instance, device) = (&fixture.instance, &fixture.device);
        // SAFETY: the instance is live, and both structures are complete.
        unsafe { instance.get_physical_device_external_buffer_properties(fixture.physical, &asked, &mut able) };
        let features = able.external_memory_properties.external_memory_features;
        let enabled = fixture.extensions.contains(&khr::external_memory_fd::NAME);
        if !enabled || !features.contains(vk::ExternalMemoryFeatureFlags::EXPORTABLE) {
            println!(
                "SKIP {test}: {} exports no opaque descriptors (extension: {enabled}, {features:?})",
                fixture.driver
            );
            return None;
        }
        let mut external = vk::ExternalMemoryBufferCreateInfo::default().handle_types(OPAQUE);
        let info = vk::BufferCreateInfo::default().size(SIZE).usage(usage()).push_next(&mut external);
        // SAFETY: the device is live, and `info` is valid.
        let buffer = unsafe { device.create_buffer(&info, None) }.unwrap();
        // SAFETY: a live buffer.
        let needs = unsafe { device.get_buffer_memory_requirements(buffer) };
        let memory_type = needs.memory_type_bits.trailing_zeros();
        let mut export = vk::ExportMemoryAllocateInfo::default().handle_types(OPAQUE);
        let info = vk::MemoryAllocateInfo::default()
            .allocation_size(needs.size)
            .memory_type_index(memory_type)
            .push_next(&mut export);
        // SAFETY: the device is live, and `info` is valid.
        let memory = unsafe { device.allocate_memory(&info, None) }.unwrap();
        // SAFETY: new, unbound, and the memory was made for it.
        unsafe { device.bind_buffer_memory(buffer, memory, 0) }.unwrap();
        // SAFETY: live handles that belong together.
        let from = unsafe { Identity::of(instance, fixture.physical) };
        Some(Self { fixture, buffer, memory, exported: Exported { size: needs.size, memory_type, from } })
    }

    fn descriptor(&self) -> OwnedFd {
        let export = khr::external_memory_fd::Device::new(&self.fixture.instance, &self.fixture.device);
        let info = vk::MemoryGetFdInfoKHR::default().memory(self.memory).handle_type(OPAQUE);
        // SAFETY: the memory is live and was allocated for export.
        let fd = unsafe { export.get_memory_fd(&info) }.unwrap();
        // SAFETY: a new descriptor, which the caller owns.
        unsafe { OwnedFd::from_raw_fd(fd) }
    }
}

impl Drop for Exporter<'_> {
    fn drop(&mut self) {
        // SAFETY: no work is running.
        unsafe { self.fixture.device.destroy_buffer(self.buffer, None) };
        // SAFETY: as above, and the buffer on it is gone.
        unsafe { self.fixture.device.free_memory(self.memory, None) };
    }
}

fn fill(fixture: &Fixture, buffer: vk::Buffer, word: u32) {
    fixture.run(|commands| fixture.fill(commands, (buffer, 0), SIZE, word));
}

fn read(fixture: &Fixture, buffer: vk::Buffer) -> Vec<u8> {
    let back = Readback::new(fixture, SIZE);
    fixture.run(|commands| fixture.copy(commands, (buffer, 0), (back.buffer, 0), SIZE));
    back.bytes()
}

#[test]
fn memory_of_another_device_is_written_and_read_by_both() {
    let (Some(one), Some(two)) = (Fixture::new(), Fixture::new()) else { return };
    let name = "memory_of_another_device_is_written_and_read_by_both";
    let Some(exporter) = Exporter::new(name, &one) else { return };
    let manager = manager(&two);
    fill(&one, exporter.buffer, 0x0404_0404);
    for round in 0..3 {
        // SAFETY: the descriptor and what is said of it are the exporter's; the two devices take turns.
        let import =
            unsafe { manager.import_opaque(exporter.descriptor(), &exporter.exported, SIZE, usage()) }.unwrap();
        assert_eq!(import.size(), SIZE);
        assert!(read(&two, import.raw()).iter().all(|&byte| byte == 4), "round {round}");
        fill(&two, import.raw(), 0x0909_0909);
        assert!(read(&one, exporter.buffer).iter().all(|&byte| byte == 9), "round {round}");
        fill(&one, exporter.buffer, 0x0404_0404);
        assert_eq!(manager.device().allocations(), 1, "it counts as an import");
        drop(import);
        assert_eq!(manager.device().allocations(), 0);
    }
    // The importer's goes on when the exporter's is gone.
    // SAFETY: as above.
    let import = unsafe { manager.import_opaque(exporter.descriptor(), &exporter.exported, SIZE, usage()) }.unwrap();
    drop(exporter);
    assert!(read(&two, import.raw()).iter().all(|&byte| byte == 4));
    drop((import, manager));
}

#[test]
fn memory_of_another_driver_or_device_is_refused_before_the_driver_is_asked() {
    let Some(fixture) = Fixture::new() else { return };
    // SAFETY: live handles that belong together.
    let ours = unsafe { Identity::of(&fixture.instance, fixture.physical) };
    let manager = manager(&fixture);
    let mut others = [ours; 2];
    others[0].device[3] ^= 1;
    others[1].driver[3] ^= 1;
    for from in others {
        // Any file will do: it is closed, and nobody looks at it.
        let file = File::open("/proc/self/exe").unwrap().into();
        let exported = Exported { size: SIZE, memory_type: 0, from };
        // SAFETY: what is said is of another device, so the driver never sees the descriptor.
        match unsafe { manager.import_opaque(file, &exported, SIZE, usage()) } {
            Err(OpaqueError::Foreign { theirs, .. }) => assert_eq!(theirs, from),
            Err(OpaqueError::NotEnabled) => println!(
                "SKIPPED PART OF memory_of_another_driver_or_device_is_refused_before_the_driver_is_asked: no VK_KHR_external_memory_fd"
            ),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_with_the_numbers() {
    let Some(fixture) = Fixture::new() else { return };
    let Some(exporter) = Exporter::new("what_does_not_fit_is_refused_with_the_numbers", &fixture) else { return };
    let manager = manager(&fixture);
    let large = exporter.exported.size + 1;
    // SAFETY: the descriptor is the exporter's, and what doesn't fit is refused before the driver sees it.
    match unsafe { manager.import_opaque(exporter.descriptor(), &exporter.exported, large, usage()) } {
        Err(OpaqueError::TooSmall { available, needed, .. }) => assert!(needed > available),
        other => panic!("{other:?}"),
    }
    let exported = Exported { memory_type: 31, ..exporter.exported };
    // SAFETY: as above.
    match unsafe { manager.import_opaque(exporter.descriptor(), &exported, SIZE, usage()) } {
        Err(OpaqueError::MemoryType { memory_type: 31, allowed }) => assert!(allowed != 0),
        other => panic!("{other:?}"),
    }
    drop(manager);
}

#[test]
fn a_device_without_the_extension_says_so() {
    let Some(mut fixture) = Fixture::new() else { return };
    fixture.extensions.retain(|&name| name != khr::external_memory_fd::NAME);
    // SAFETY: live handles that belong together.
    let from = unsafe { Identity::of(&fixture.instance, fixture.physical) };
    let (manager, file) = (manager(&fixture), File::open("/proc/self/exe").unwrap().into());
    // SAFETY: refused before the driver sees the descriptor.
    let refused = unsafe { manager.import_opaque(file, &Exported { size: SIZE, memory_type: 0, from }, SIZE, usage()) };
    assert!(matches!(refused, Err(OpaqueError::NotEnabled)), "{refused:?}");
    drop(manager);
}
