//! Many buffers and images inside imports: each where it should be, each with the usages it may have, on whatever alignment the driver asks for.

#[path = "../../vulkan/tests/fixture/mod.rs"]
mod fixture;
#[path = "../../vulkan/tests/fixture/memory.rs"]
mod memory;
mod shader;

use ash::vk;
use fixture::{Fixture, GENEROUS, Readback};
use memory::{Memory, memfd};
use pinfold_invalidate::{HostRange, page_size};
use pinfold_vulkan::{Access, Config, Force, Image, ImageError, Lease, Manager, Path, Requirements, Userptr};
use shader::{Compute, Painter};
use vk::DescriptorType as Kind;

fn manager(fixture: &Fixture, force: Option<Force>) -> Manager {
    let mut config = Config::default();
    config.force = force;
    // SAFETY: the fixture's handles belong together, and tests drop the manager and its leases first.
    unsafe { Manager::new(fixture.context(), config) }.expect("a manager")
}

fn register(manager: &Manager, range: HostRange, access: Access) -> Userptr {
    // SAFETY: the tests unmap only what they have let go of; no references to it exist.
    unsafe { manager.register(range, access) }.unwrap()
}

fn lease(manager: &Manager, object: &Userptr) -> Lease {
    manager.acquire_timeout(&[object], GENEROUS).unwrap()
}

fn limits(fixture: &Fixture) -> vk::PhysicalDeviceLimits {
    // SAFETY: the instance is live, and the device its own.
    unsafe { fixture.instance.get_physical_device_properties(fixture.physical) }.limits
}

#[test]
fn a_hundred_objects_of_one_mapping_lie_where_their_bytes_are() {
    let Some(fixture) = Fixture::new() else { return };
    let manager = manager(&fixture, None);
    for memory in [Memory::anonymous(256), Memory::of_file(&memfd(256), 256, true)] {
        memory.fill();
        // Of one to three pages, with gaps, neighbours and overlaps.
        let ranges: Vec<_> = (0..100).map(|n| (n * 5 / 2, 1 + n % 3)).collect();
        let objects: Vec<_> = ranges
            .iter()
            .map(|&(page, pages)| {
                let start = memory.range().start() + page * page_size();
                register(&manager, HostRange::new(start, pages * page_size()).unwrap(), Access::Read)
            })
            .collect();
        let lease = manager.acquire_timeout(&objects.iter().collect::<Vec<_>>(), GENEROUS).unwrap();
        let total: u64 = ranges.iter().map(|&(_, pages)| (pages * page_size()) as u64).sum();
        let back = Readback::new(&fixture, total);
        let mut expected = Vec::new();
        fixture.run(|commands| {
            for (n, &(page, pages)) in ranges.iter().enumerate() {
                let view = lease.view(n);
                assert_eq!(view.size, (pages * page_size()) as u64);
                fixture.copy(commands, (view.buffer, view.offset), (back.buffer, expected.len() as u64), view.size);
                expected.extend(memory.get(page * page_size(), pages * page_size()));
            }
        });
        assert!(back.bytes() == expected);
    }
}

#[test]
// rows: igt/relocations
fn storage_uniform_and_indirect_views_work_at_every_offset_the_device_allows() {
    let Some(fixture) = Fixture::new() else { return };
    let (manager, limits) = (manager(&fixture, None), limits(&fixture));
    let step = limits.min_storage_buffer_offset_alignment.max(limits.min_uniform_buffer_offset_alignment).max(64);
    let (step, views) = (usize::try_from(step).unwrap(), 40);
    // In one object: what is read, what is added, what is written, `views` times each, and how much there is to do.
    let pages = (3 * views * step).div_ceil(page_size()) + 1;
    let compute = Compute::new(
        &fixture,
        include_bytes!(concat!(env!("OUT_DIR"), "/triple.spv")),
        &[Kind::STORAGE_BUFFER, Kind::UNIFORM_BUFFER, Kind::STORAGE_BUFFER],
        u32::try_from(2 * views).unwrap(),
    );
    for memory in [Memory::anonymous(pages), Memory::of_file(&memfd(pages), pages, true)] {
        memory.fill();
        let groups = u32::try_from(step / 4).unwrap().div_ceil(64);
        memory.put((pages - 1) * page_size(), &[groups, 1, 1].map(u32::to_ne_bytes).concat());
        let object = register(&manager, memory.range(), Access::ReadWrite);
        let lease = lease(&manager, &object);
        let view = lease.view(0);
        let arguments = (view.buffer, view.offset + ((pages - 1) * page_size()) as u64);
        let place = |n: usize, size| (view.buffer, view.offset + (n * step) as u64, size);
        let words = step as u64 / 4 * 4;
        fixture.run(|commands| {
            for n in 0..views {
                let set = compute.set(&[place(n, words), place(views + n, 16), place(2 * views + n, words)]);
                compute.dispatch(commands, set, 0, arguments);
            }
        });
        let word = |at| u32::from_ne_bytes(memory.get(at, 4).try_into().unwrap());
        for n in 0..views {
            let added = word((views + n) * step);
            for at in (0..step / 4 * 4).step_by(4) {
                let expected = word(n * step + at).wrapping_mul(3).wrapping_add(added);
                assert_eq!(word((2 * views + n) * step + at), expected, "view {n}, byte {at}");
            }
        }
    }
}

#[test]
fn the_address_of_a_buffer_leads_to_the_object_also_where_several_are_asked() {
    let Some(fixture) = Fixture::with(Requirements::with_buffer_device_address) else { return };
    let manager = manager(&fixture, None);
    let memory = Memory::anonymous(16);
    let objects: Vec<_> = (0..4)
        .map(|n| {
            let start = memory.range().start() + 4 * n * page_size();
            register(&manager, HostRange::new(start, 4 * page_size()).unwrap(), Access::ReadWrite)
        })
        .collect();
    let lease = manager.acquire_timeout(&objects.iter().collect::<Vec<_>>(), GENEROUS).unwrap();
    let addresses: Vec<_> = (0..4)
        .map(|n| {
            let info = vk::BufferDeviceAddressInfo::default().buffer(lease.view(n).buffer);
            // SAFETY: a live buffer with that usage on memory with that flag; the validation layer would say otherwise.
            unsafe { fixture.device.get_buffer_device_address(&info) + lease.view(n).offset }
        })
        .collect();
    for (n, &address) in addresses.iter().enumerate() {
        assert_ne!(address, 0);
        // No two objects overlap, wherever the device sees them.
        let size = lease.view(n).size;
        assert!(
            addresses
                .iter()
                .enumerate()
                .all(|(m, &other)| m == n || other >= address + size || other + size <= address)
        );
    }
}

const RGBA: vk::Format = vk::Format::R8G8B8A8_UNORM;
const EXTENT: vk::Extent2D = vk::Extent2D { width: 61, height: 37 };

fn image_info(tiling: vk::ImageTiling, usage: vk::ImageUsageFlags) -> vk::ImageCreateInfo<'static> {
    vk::ImageCreateInfo::default()
        .image_type(vk::ImageType::TYPE_2D)
        .format(RGBA)
        .extent(vk::Extent3D { width: EXTENT.width, height: EXTENT.height, depth: 1 })
        .mip_levels(1)
        .array_layers(1)
        .samples(vk::SampleCountFlags::TYPE_1)
        .tiling(tiling)
        .usage(usage)
}

fn whole() -> vk::BufferImageCopy {
    let layers =
        vk::ImageSubresourceLayers { aspect_mask: vk::ImageAspectFlags::COLOR, layer_count: 1, ..Default::default() };
    let extent = vk::Extent3D { width: EXTENT.width, height: EXTENT.height, depth: 1 };
    vk::BufferImageCopy { image_subresource: layers, image_extent: extent, ..Default::default() }
}

/// Records a transition to `GENERAL`, which may discard what the memory held.
fn to_general(fixture: &Fixture, commands: vk::CommandBuffer, image: vk::Image) {
    let barrier = [vk::ImageMemoryBarrier::default()
        .dst_access_mask(vk::AccessFlags::TRANSFER_WRITE)
        .new_layout(vk::ImageLayout::GENERAL)
        .src_queue_family_index(vk::QUEUE_FAMILY_IGNORED)
        .dst_queue_family_index(vk::QUEUE_FAMILY_IGNORED)
        .image(image)
        .subresource_range(vk::ImageSubresourceRange {
            aspect_mask: vk::ImageAspectFlags::COLOR,
            level_count: 1,
            layer_count: 1,
            ..Default::default()
        })];
    let (from, to) = (vk::PipelineStageFlags::TOP_OF_PIPE, vk::PipelineStageFlags::TRANSFER);
    // SAFETY: the commands are being recorded.
    unsafe {
        fixture.device.cmd_pipeline_barrier(commands, from, to, vk::DependencyFlags::empty(), &[], &[], &barrier)
    };
}

#[test]
fn ten_linear_images_in_one_object_have_their_rows_where_the_driver_says() {
    let Some(fixture) = Fixture::new() else { return };
    let manager = manager(&fixture, None);
    let info = image_info(vk::ImageTiling::LINEAR, vk::ImageUsageFlags::TRANSFER_DST);
    // SAFETY: a valid create info.
    let needs = unsafe { Image::needs(manager.device(), &info) }.unwrap();
    let step = needs.size.next_multiple_of(needs.alignment);
    let pages = usize::try_from(10 * step).unwrap().div_ceil(page_size());
    let (memory, source) = (Memory::anonymous(pages), Memory::anonymous(3));
    source.fill();
    let (target, pixels) =
        (register(&manager, memory.range(), Access::ReadWrite), register(&manager, source.range(), Access::Read));
    let lease = manager.acquire_timeout(&[&target, &pixels], GENEROUS).unwrap();
    let images: Vec<_> = (0..10)
        // SAFETY: the images are dropped before the device, after the work; they are used through this lease; the object may be written.
        .map(|n| unsafe { lease.view(0).image(n * step, &info) }.unwrap())
        .collect();
    fixture.run(|commands| {
        for (n, image) in images.iter().enumerate() {
            to_general(&fixture, commands, image.raw());
            let region = [vk::BufferImageCopy { buffer_offset: lease.view(1).offset + 4 * n as u64, ..whole() }];
            let general = vk::ImageLayout::GENERAL;
            // SAFETY: the commands are being recorded; the layer watches the rest.
            unsafe {
                fixture.device.cmd_copy_buffer_to_image(commands, lease.view(1).buffer, image.raw(), general, &region)
            };
        }
    });
    let row_bytes = EXTENT.width as usize * 4;
    for (n, image) in images.iter().enumerate() {
        let layout = image.layout().unwrap();
        assert!(layout.row_pitch >= row_bytes as u64 && layout.offset + layout.size <= needs.size, "{layout:?}");
        for y in 0..EXTENT.height as usize {
            let row = usize::try_from(n as u64 * step + layout.offset + y as u64 * layout.row_pitch).unwrap();
            assert!(memory.get(row, row_bytes) == source.get(4 * n + y * row_bytes, row_bytes), "image {n}, row {y}");
        }
    }
}

#[test]
fn an_optimal_image_in_host_memory_is_drawn_to_and_copied_from() {
    let Some(fixture) = Fixture::new() else { return };
    let manager = manager(&fixture, None);
    let usage = vk::ImageUsageFlags::COLOR_ATTACHMENT | vk::ImageUsageFlags::TRANSFER_SRC;
    let info = image_info(vk::ImageTiling::OPTIMAL, usage);
    // SAFETY: a valid create info.
    let needs = unsafe { Image::needs(manager.device(), &info) }.unwrap();
    assert!(needs.layout.is_none());
    let behind = usize::try_from(needs.size + needs.alignment).unwrap().next_multiple_of(page_size());
    let memory = Memory::of_file(&memfd(behind / page_size() + 1), behind / page_size() + 1, true);
    let corner = |x: f32, y: f32| [x, y, 0.0, 1.0, 0.0, 1.0].map(f32::to_ne_bytes).concat();
    memory.put(behind, &[corner(-1.0, -1.0), corner(3.0, -1.0), corner(-1.0, 3.0)].concat());
    memory.put(behind + 256, &[0_u16, 1, 2].map(u16::to_ne_bytes).concat());
    let object = register(&manager, memory.range(), Access::ReadWrite);
    let lease = lease(&manager, &object);
    let view = lease.view(0);
    // SAFETY: as above.
    let image = unsafe { view.image(needs.alignment, &info) }.unwrap();
    let painter = Painter::new(&fixture, image.raw(), RGBA, EXTENT, vk::ImageLayout::TRANSFER_SRC_OPTIMAL);
    let back = Readback::new(&fixture, u64::from(EXTENT.width * EXTENT.height * 4));
    let of = |at: usize| (view.buffer, view.offset + at as u64);
    fixture.run(|commands| {
        painter.draw(commands, of(behind), of(behind + 256), 3);
        // SAFETY: the commands are being recorded; the layer watches the rest.
        unsafe {
            fixture.device.cmd_copy_image_to_buffer(
                commands,
                image.raw(),
                vk::ImageLayout::TRANSFER_SRC_OPTIMAL,
                back.buffer,
                &[whole()],
            )
        };
    });
    assert!(back.bytes().chunks(4).all(|pixel| pixel == [0, 255, 0, 255]));
    drop(painter);
}

#[test]
fn an_image_that_does_not_fit_is_refused_with_the_numbers() {
    let Some(fixture) = Fixture::new() else { return };
    let imports = manager(&fixture, None);
    let info = image_info(vk::ImageTiling::LINEAR, vk::ImageUsageFlags::TRANSFER_DST);
    // SAFETY: a valid create info.
    let needs = unsafe { Image::needs(imports.device(), &info) }.unwrap();
    let memory = Memory::anonymous(usize::try_from(needs.size).unwrap().div_ceil(page_size()));
    let object = register(&imports, memory.range(), Access::ReadWrite);
    let lease_of = lease(&imports, &object);
    let place = |lease: &Lease, at, info: &vk::ImageCreateInfo<'_>| {
        // SAFETY: as above; no work uses it.
        unsafe { lease.view(0).image(at, info) }.map(|_| ())
    };
    place(&lease_of, 0, &info).unwrap();
    let off = needs.alignment / 2;
    if off > 0 {
        match place(&lease_of, off, &info) {
            Err(ImageError::Misaligned { at, alignment, over }) => {
                assert_eq!((at, alignment, over), (off, needs.alignment, off));
            }
            other => panic!("{other:?}"),
        }
    }
    let late = (memory.range().len() as u64 - needs.size).next_multiple_of(needs.alignment) + needs.alignment;
    match place(&lease_of, late, &info) {
        Err(ImageError::NoRoom { needed, available, .. }) => {
            assert_eq!((needed, available), (needs.size, memory.range().len() as u64 - late));
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(
        place(&lease_of, u64::MAX / 2, &info),
        Err(ImageError::NoRoom { .. } | ImageError::Misaligned { .. })
    ));
    let filled = info.initial_layout(vk::ImageLayout::PREINITIALIZED);
    assert!(matches!(place(&lease_of, 0, &filled), Err(ImageError::Layout(vk::ImageLayout::PREINITIALIZED))));
    let huge = info.extent(vk::Extent3D { width: 1 << 30, height: 1, depth: 1 });
    assert!(matches!(place(&lease_of, 0, &huge), Err(ImageError::Unsupported { .. })));

    memory.protect_read_only();
    let read_only = register(&imports, memory.range(), Access::Read);
    assert!(matches!(place(&lease(&imports, &read_only), 0, &info), Err(ImageError::ReadOnly)));
    let mirrors = manager(&fixture, Some(Force::Mirror));
    let mirrored = register(&mirrors, memory.range(), Access::Read);
    assert!(matches!(place(&lease(&mirrors, &mirrored), 0, &info), Err(ImageError::Mirrored)));
}

#[test]
fn an_image_outlives_its_mapping_and_says_that_it_is_of_the_past() {
    let Some(fixture) = Fixture::new() else { return };
    let manager = manager(&fixture, None);
    let info = image_info(vk::ImageTiling::OPTIMAL, vk::ImageUsageFlags::TRANSFER_DST);
    // SAFETY: a valid create info.
    let needs = unsafe { Image::needs(manager.device(), &info) }.unwrap();
    let pages = usize::try_from(needs.size).unwrap().div_ceil(page_size());
    let memory = Memory::of_file(&memfd(pages), pages, true);
    let object = register(&manager, memory.range(), Access::ReadWrite);
    let first = lease(&manager, &object);
    assert_eq!(first.view(0).path, Path::AliasImport);
    // SAFETY: as above.
    let image = unsafe { first.view(0).image(0, &info) }.unwrap();
    assert!(image.lies_in(&first.view(0)));
    drop(first);
    memory.replace_tail(&memfd(pages), pages); // other memory, at the same place
    let second = lease(&manager, &object);
    assert!(!image.lies_in(&second.view(0)));
    drop((second, object));
    // The alias under it is still there, so even work that comes too late finds memory.
    fixture.run(|commands| to_general(&fixture, commands, image.raw()));
    drop(image);
    drop(manager);
}
