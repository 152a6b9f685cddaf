//! The group `memory.external_memory_host` of the Vulkan conformance tests, through this library: its eleven cases by their names, and what
//! it leaves out, which is where drivers differ: mapped files, read-only memory, a second import, unmapping, and sizes of more than a few pages.

#[path = "../../vulkan/tests/fixture/mod.rs"]
mod fixture;
#[path = "../../vulkan/tests/fixture/memory.rs"]
mod memory;
mod shader;

use std::thread;

use ash::vk;
use fixture::{Fixture, GENEROUS, Readback};
use memory::{Memory, disk_file, memfd, pattern};
use pinfold_invalidate::{HostRange, page_size};
use pinfold_tests::memory::{Backing, Region};
use pinfold_vulkan::{
    Access, Config, Error, Image, ImageError, Lease, Manager, Outcome, Path, State, Timeline, Userptr,
};
use shader::{Painter, VERTEX};

fn manager(fixture: &Fixture) -> Manager {
    let mut config = Config::default();
    config.deadline = GENEROUS / 3; // work ends when a test says so, not when the time is over
    // SAFETY: the fixture's handles belong together, and tests drop the manager and its leases first.
    unsafe { Manager::new(fixture.context(), config) }.expect("a manager")
}

fn register(manager: &Manager, range: HostRange, access: Access) -> Userptr {
    // SAFETY: tests unmap memory in use only where that is what they are about; no references to it exist.
    unsafe { manager.register(range, access) }.unwrap()
}

fn lease(manager: &Manager, object: &Userptr) -> Lease {
    manager.acquire_timeout(&[object], GENEROUS).unwrap()
}

/// `simple_allocation.minImportedHostPointerAlignment_x1` and `_x3`.
fn simple_allocation(units: usize) {
    let Some(fixture) = Fixture::new() else { return };
    let manager = manager(&fixture);
    let unit = usize::try_from(manager.capabilities().import_alignment).unwrap().max(page_size());
    let memory = Memory::anonymous((units + 1) * unit / page_size());
    let start = memory.range().start().next_multiple_of(unit);
    let object = register(&manager, HostRange::new(start, units * unit).unwrap(), Access::ReadWrite);
    let lease = lease(&manager, &object);
    assert_eq!((lease.view(0).path, lease.view(0).size), (Path::Import, (units * unit) as u64));
}

#[test]
fn simple_allocation_min_imported_host_pointer_alignment_x1() {
    simple_allocation(1);
}

#[test]
fn simple_allocation_min_imported_host_pointer_alignment_x3() {
    simple_allocation(3);
}

/// Draws into an image that lies in host memory, from vertices and indices that lie in the same object, and looks at every pixel
/// there. The left half of the picture is green, the rest stays red.
fn bind_image_memory_and_render(format: vk::Format, one: &[u8], offset: bool) {
    let Some(fixture) = Fixture::new() else { return };
    let manager = manager(&fixture);
    let extent = vk::Extent2D { width: 250, height: 100 };
    let info = image_info(format, extent, vk::ImageTiling::LINEAR, vk::ImageUsageFlags::COLOR_ATTACHMENT);
    // SAFETY: a valid create info.
    let needs = match unsafe { Image::needs(manager.device(), &info) } {
        Ok(needs) => needs,
        Err(ImageError::Unsupported { code, .. }) => {
            let test = thread::current().name().unwrap_or("bind_image_memory_and_render").to_owned();
            println!("SKIP {test}: linear images of {format:?} can't be drawn to: {code}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let at = if offset { needs.alignment } else { 0 };
    let behind = usize::try_from(at + needs.size).unwrap().next_multiple_of(page_size());
    let memory = Memory::anonymous(behind / page_size() + 1);
    let (vertices, indices) = scene();
    memory.put(behind, &vertices);
    memory.put(behind + 512, &indices);

    let object = register(&manager, memory.range(), Access::ReadWrite);
    let lease = lease(&manager, &object);
    let view = lease.view(0);
    // SAFETY: the image is dropped before the device, after the work; it is used through this lease; the object may be written.
    let image = unsafe { view.image(at, &info) }.unwrap();
    let painter = Painter::new(&fixture, image.raw(), format, extent, vk::ImageLayout::GENERAL);
    let of = |at: usize| (view.buffer, view.offset + at as u64);
    fixture.run(|commands| painter.draw(commands, of(behind), of(behind + 512), 6));

    let layout = image.layout().expect("it is linear");
    let zero = vec![0; one.len()];
    let (red, green) = ([one, &zero, &zero, one].concat(), [&zero, one, &zero, one].concat());
    for y in 0..100 {
        let row = usize::try_from(at + layout.offset + y * layout.row_pitch).unwrap();
        let pixels = memory.get(row, 250 * red.len());
        for (x, pixel) in pixels.chunks_exact(red.len()).enumerate() {
            assert_eq!(pixel, if x < 125 { &*green } else { &*red }, "{format:?} at {x}, {y}");
        }
    }
    // What lies before the image is not the device's to write.
    assert!(memory.get(0, usize::try_from(at).unwrap()).iter().all(|&byte| byte == 0));
    drop(painter);
}

fn image_info(
    format: vk::Format,
    extent: vk::Extent2D,
    tiling: vk::ImageTiling,
    usage: vk::ImageUsageFlags,
) -> vk::ImageCreateInfo<'static> {
    vk::ImageCreateInfo::default()
        .image_type(vk::ImageType::TYPE_2D)
        .format(format)
        .extent(vk::Extent3D { width: extent.width, height: extent.height, depth: 1 })
        .mip_levels(1)
        .array_layers(1)
        .samples(vk::SampleCountFlags::TYPE_1)
        .tiling(tiling)
        .usage(usage)
}

/// Vertices and indices of a green rectangle over the left half.
fn scene() -> (Vec<u8>, Vec<u8>) {
    let corner = |x: f32, y: f32| [x, y, 0.0, 1.0, 0.0, 1.0].map(f32::to_ne_bytes).concat();
    let vertices = [corner(-1.0, -1.0), corner(0.0, -1.0), corner(-1.0, 1.0), corner(0.0, 1.0)].concat();
    assert_eq!(vertices.len(), 4 * VERTEX);
    let indices = [0_u16, 1, 2, 2, 1, 3].map(u16::to_ne_bytes).concat();
    (vertices, indices)
}

const UNORM_8: &[u8] = &[0xff];
const UNORM_16: [u8; 2] = [0xff, 0xff];
const HALF: [u8; 2] = 0x3c00_u16.to_ne_bytes();
const SINGLE: [u8; 4] = 1_f32.to_ne_bytes();

#[test]
fn bind_image_memory_and_render_with_zero_offset_r8g8b8a8_unorm() {
    bind_image_memory_and_render(vk::Format::R8G8B8A8_UNORM, UNORM_8, false);
}

#[test]
fn bind_image_memory_and_render_with_zero_offset_r16g16b16a16_unorm() {
    bind_image_memory_and_render(vk::Format::R16G16B16A16_UNORM, &UNORM_16, false);
}

#[test]
fn bind_image_memory_and_render_with_zero_offset_r16g16b16a16_sfloat() {
    bind_image_memory_and_render(vk::Format::R16G16B16A16_SFLOAT, &HALF, false);
}

#[test]
fn bind_image_memory_and_render_with_zero_offset_r32g32b32a32_sfloat() {
    bind_image_memory_and_render(vk::Format::R32G32B32A32_SFLOAT, &SINGLE, false);
}

#[test]
fn bind_image_memory_and_render_with_non_zero_offset_r8g8b8a8_unorm() {
    bind_image_memory_and_render(vk::Format::R8G8B8A8_UNORM, UNORM_8, true);
}

#[test]
fn bind_image_memory_and_render_with_non_zero_offset_r16g16b16a16_unorm() {
    bind_image_memory_and_render(vk::Format::R16G16B16A16_UNORM, &UNORM_16, true);
}

#[test]
fn bind_image_memory_and_render_with_non_zero_offset_r16g16b16a16_sfloat() {
    bind_image_memory_and_render(vk::Format::R16G16B16A16_SFLOAT, &HALF, true);
}

#[test]
fn bind_image_memory_and_render_with_non_zero_offset_r32g32b32a32_sfloat() {
    bind_image_memory_and_render(vk::Format::R32G32B32A32_SFLOAT, &SINGLE, true);
}

/// The device waits for a timeline value that the host signals after it has written; what was written before is not what it sees.
#[test]
fn synchronization_synchronization() {
    let Some(fixture) = Fixture::new() else { return };
    let manager = manager(&fixture);
    let memory = Memory::anonymous(4);
    let object = register(&manager, memory.range(), Access::Read);
    let (go, done) = (fixture.timeline(), fixture.timeline());
    let lease = lease(&manager, &object);
    let view = lease.view(0);
    let back = Readback::new(&fixture, view.size);
    let commands =
        fixture.record(|commands| fixture.copy(commands, (view.buffer, view.offset), (back.buffer, 0), view.size));
    let submit = || {
        fixture.submit(&[commands], Some((go, 1)), Some((done, 1)));
        Ok::<_, vk::Result>(())
    };
    // SAFETY: the signal is that of the work, which only reads.
    let pending = unsafe { lease.submit([Timeline { semaphore: done, value: 1 }], submit) }.unwrap();
    memory.fill();
    fixture.signal(go, 1);
    assert_eq!(pending.wait(GENEROUS), Some(Outcome::Done));
    assert_eq!(back.bytes(), memory.bytes());
    drop((object, manager));
    fixture.destroy_semaphore(go);
    fixture.destroy_semaphore(done);
}

/// Beyond the group: every kind of file mapping, read-only or not.
#[test]
fn mapped_files_and_read_only_memory_are_seen_as_they_are() {
    let Some(fixture) = Fixture::new() else { return };
    let manager = manager(&fixture);
    let mut kinds = vec![Memory::anonymous(5), Memory::anonymous(5)];
    for shared in [false, true] {
        kinds.extend((0..2).map(|_| Memory::of_file(&memfd(5), 5, shared)));
        match disk_file(5) {
            Some(file) => kinds.extend((0..2).map(|_| Memory::of_file(&file, 5, shared))),
            None => pinfold_tests::skip_part!("file mappings; no temporary file can be made on a disk"),
        }
    }
    for (n, memory) in kinds.iter().enumerate() {
        memory.fill();
        let writable = n % 2 == 0;
        if !writable {
            memory.protect_read_only();
            let forbidden = register(&manager, memory.range(), Access::ReadWrite);
            match manager.acquire_timeout(&[&forbidden], GENEROUS) {
                Err(error) => assert_eq!(error.errno(), libc::EPERM, "{error}"),
                Ok(lease) => panic!("read-only memory for writing: {:?}", lease.view(0).path),
            }
        }
        let object = register(&manager, memory.range(), Access::Read);
        let lease = lease(&manager, &object);
        assert_eq!(fixture.read(&lease.view(0), 0, lease.view(0).size), memory.bytes(), "mapping {n}");
    }
}

/// Beyond the group: one range imported twice into one device, and into a second device.
#[test]
fn a_second_import_of_the_same_range_sees_what_the_first_one_writes() {
    let Some(fixture) = Fixture::new() else { return };
    let Some(other) = Fixture::new() else { return };
    let (first, second, third) = (manager(&fixture), manager(&fixture), manager(&other));
    for memory in [Memory::anonymous(8), Memory::of_file(&memfd(8), 8, true)] {
        let objects = [&first, &second, &third].map(|manager| register(manager, memory.range(), Access::ReadWrite));
        let leases = [lease(&first, &objects[0]), lease(&second, &objects[1]), lease(&third, &objects[2])];
        fixture.write(&leases[0].view(0), 0x0403_0201);
        let expected: Vec<u8> = [1, 2, 3, 4].into_iter().cycle().take(memory.range().len()).collect();
        assert_eq!(memory.bytes(), expected);
        assert_eq!(fixture.read(&leases[1].view(0), 0, expected.len() as u64), expected);
        assert_eq!(other.read(&leases[2].view(0), 0, expected.len() as u64), expected);
        // What is left of them stays valid when one goes.
        let [first_lease, second_lease, third_lease] = leases;
        let [first_object, ..] = objects;
        drop((first_lease, first_object));
        fixture.write(&second_lease.view(0), 0x0807_0605);
        assert_eq!(other.read(&third_lease.view(0), 0, 4), [5, 6, 7, 8]);
    }
}

/// Beyond the group: the memory is unmapped while the device reads it, and something else is there then.
#[test]
fn memory_unmapped_under_running_work_is_read_to_the_end() {
    let Some(fixture) = Fixture::new() else { return };
    let manager = manager(&fixture);
    // Where no thread and no driver is given what was unmapped.
    let region = Region::new(Backing::Memfd, 64).unwrap();
    let expected = region.original(0..64);
    let object = register(&manager, region.range(), Access::Read);
    let (go, done) = (fixture.timeline(), fixture.timeline());
    let lease = lease(&manager, &object);
    let view = lease.view(0);
    let back = Readback::new(&fixture, view.size);
    let commands =
        fixture.record(|commands| fixture.copy(commands, (view.buffer, view.offset), (back.buffer, 0), view.size));
    let submit = || {
        fixture.submit(&[commands], Some((go, 1)), Some((done, 1)));
        Ok::<_, vk::Result>(())
    };
    // SAFETY: the signal is that of the work, which only reads.
    let pending = unsafe { lease.submit([Timeline { semaphore: done, value: 1 }], submit) }.unwrap();
    let unmapper = thread::spawn(move || region.unmap_all().map(|()| region));
    fixture.signal(go, 1);
    assert_eq!(pending.wait(GENEROUS), Some(Outcome::Done));
    let _region = unmapper.join().unwrap().unwrap();
    assert_eq!(back.bytes(), expected);
    assert_eq!(object.state().unwrap(), State::Invalid);
    match manager.acquire_timeout(&[&object], GENEROUS) {
        Err(Error::Fault { .. }) => {}
        other => panic!("nothing is mapped there any more: {other:?}"),
    }
    drop((object, manager));
    fixture.destroy_semaphore(go);
    fixture.destroy_semaphore(done);
}

/// Beyond the group: 4 KiB to 1 GiB. Only a few pages of the large ones are ever touched.
#[test]
fn sizes_from_a_page_to_a_gib_are_seen_to_their_last_byte() {
    let Some(fixture) = Fixture::new() else { return };
    let manager = manager(&fixture);
    let page = page_size();
    for size in [page, 8 * page, 64 * page, 512 * page, 16 << 20, 128 << 20, 1 << 30] {
        // A file, so that populating the range to read it takes no memory.
        let memory = Memory::of_file(&memfd(size / page), size / page, size >= 16 << 20);
        let ends = [0, size / 2, size - 256];
        ends.iter().for_each(|&at| (at..at + 256).for_each(|at| memory.write(at, pattern(at))));
        let object = register(&manager, memory.range(), Access::Read);
        let lease = lease(&manager, &object);
        for at in ends {
            let seen = fixture.read(&lease.view(0), at as u64, 256);
            assert!(seen.iter().enumerate().all(|(n, &byte)| byte == pattern(at + n)), "{size:#x} bytes, at {at:#x}");
        }
    }
}
