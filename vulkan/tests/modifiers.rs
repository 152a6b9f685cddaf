//! Images in dma-bufs with DRM format modifiers. A driver that needs no GPU has the extension at best where there is a `/dev/udmabuf`, as in
//! `scripts/test-vm`: elsewhere it must say so, and a scripted one has it, with linear images of the real driver under it.

#[path = "fixture/mod.rs"]
mod fixture;
#[path = "fixture/script.rs"]
mod script;

use std::os::fd::AsFd;
use std::sync::atomic::Ordering::SeqCst;

use ash::vk;
use fixture::{Fixture, GENEROUS, Readback};
use pinfold_core::dmabuf::{DmaBuf, DmaBufPart};
use pinfold_core::{HostBuffer, HostBufferKind, HugePages};
use pinfold_vulkan::dmabuf::{Plane, image_from_foreign, image_to_foreign, modifiers};
use pinfold_vulkan::{
    Access, Config, DeviceContext, Image, ImageError, Manager, Path, Support, Userptr, dmabuf, page_size,
};
use script::images::{LAID_OUT, MODIFIERS};
use script::{ALONE, Scripted};

const FORMAT: vk::Format = vk::Format::R8G8B8A8_UNORM;
const WIDTH: u32 = 64;
const HEIGHT: u32 = 32;
const TILED: u64 = MODIFIERS[1].0;

fn manager(context: DeviceContext) -> Manager {
    // SAFETY: the fixture's handles belong together, and tests drop the manager and its leases first.
    unsafe { Manager::new(context, Config::default()) }.expect("a manager")
}

fn info() -> vk::ImageCreateInfo<'static> {
    vk::ImageCreateInfo::default()
        .image_type(vk::ImageType::TYPE_2D)
        .format(FORMAT)
        .extent(vk::Extent3D { width: WIDTH, height: HEIGHT, depth: 1 })
        .mip_levels(1)
        .array_layers(1)
        .samples(vk::SampleCountFlags::TYPE_1)
        .usage(vk::ImageUsageFlags::TRANSFER_SRC)
}

/// Memory that isn't zeros, and it as a dma-buf, or as the memory file that stands in for one.
fn frames(pages: usize) -> (HostBuffer, DmaBuf) {
    let host = HostBuffer::new(pages * page_size(), HostBufferKind::Exportable, HugePages::No).unwrap();
    let bytes: Vec<u8> = (0..host.size()).map(|at| (at / 3 % 251) as u8).collect();
    host.write(0, &bytes).unwrap();
    let file = || DmaBuf::from_memory_file(host.as_fd().try_clone_to_owned().unwrap()).unwrap();
    let buffer = host.export_dmabuf(0..host.size()).unwrap_or_else(|_| file());
    (host, buffer)
}

fn register(manager: &Manager, buffer: &DmaBuf, offset: u64, access: Access) -> Userptr {
    let part = DmaBufPart { buffer: buffer.clone(), offset, len: buffer.size() - offset };
    manager.register_dmabuf(part, access, "frame").unwrap()
}

fn image(manager: &Manager, object: &Userptr, modifier: u64, planes: &[Plane]) -> Result<Image, ImageError> {
    let lease = manager.acquire_timeout(&[object], GENEROUS).unwrap();
    // SAFETY: the info is valid, and the tests drop the image before the manager and after the work that names it.
    unsafe { lease.view(0).image_with_modifier(&info(), modifier, planes) }
}

/// A device that has the extension by the script, and imports dma-bufs by itself.
fn scripted(test: &str, modifiers: u32) -> Option<(Scripted, Manager)> {
    let scripted = Scripted::new()?;
    scripted.script().modifiers.store(modifiers, SeqCst);
    let manager = manager(scripted.context());
    match manager.capabilities().dmabuf {
        Support::Usable => Some((scripted, manager)),
        not => {
            println!("SKIP {test}: {not}");
            None
        }
    }
}

/// What a linear image of the driver looks like: the bytes from row to row, and all of them.
fn linear(manager: &Manager) -> (u64, u64) {
    // SAFETY: the info is valid.
    let needs = unsafe { Image::needs(manager.device(), &info().tiling(vk::ImageTiling::LINEAR)) }.unwrap();
    (needs.layout.unwrap().row_pitch, needs.size)
}

#[test]
fn a_real_device_without_the_extension_refuses_by_its_name() {
    let Some(fixture) = Fixture::new() else { return };
    let manager = manager(fixture.context());
    if manager.capabilities().modifiers == Support::Usable {
        println!("SKIP a_real_device_without_the_extension_refuses_by_its_name: this one has it");
        return;
    }
    assert_eq!(modifiers(manager.device(), FORMAT), []);
    let (host, buffer) = frames(4);
    // SAFETY: no references to the memory exist.
    let mapped = unsafe { manager.register(host.range(), Access::ReadWrite) }.unwrap();
    let mut objects = vec![mapped];
    if manager.capabilities().dmabuf == Support::Usable {
        objects.push(register(&manager, &buffer, 0, Access::ReadWrite));
    }
    for object in &objects {
        let error = image(&manager, object, 0, &[Plane { offset: 0, row_pitch: 256 }]).unwrap_err();
        assert!(matches!(error, ImageError::NotEnabled("VK_EXT_image_drm_format_modifier")), "{error}");
    }
}

/// A driver that shares memory with everybody shows no difference, so the barriers are looked at themselves.
fn assert_that_barriers_hand_over(image: &Image) {
    let ours = (vk::ImageLayout::TRANSFER_SRC_OPTIMAL, vk::AccessFlags::TRANSFER_READ);
    let none = vk::AccessFlags::empty();
    let (take, give) = (image_from_foreign(image, 7, 3, ours), image_to_foreign(image, 7, 3, ours));
    let families = |it: &vk::ImageMemoryBarrier<'_>| (it.src_queue_family_index, it.dst_queue_family_index);
    assert_eq!((families(&take), families(&give)), ((7, 3), (3, 7)));
    let layouts = |it: &vk::ImageMemoryBarrier<'_>| (it.old_layout, it.new_layout);
    assert_eq!(
        (layouts(&take), layouts(&give)),
        ((vk::ImageLayout::GENERAL, ours.0), (ours.0, vk::ImageLayout::GENERAL))
    );
    let accesses = |it: &vk::ImageMemoryBarrier<'_>| (it.src_access_mask, it.dst_access_mask);
    assert_eq!((accesses(&take), accesses(&give)), ((none, ours.1), (ours.1, none)));
    assert_eq!((take.image, give.image), (image.raw(), image.raw()));
}

/// Copies the pixels out of an image over memory that isn't zeros, and compares them with that memory. Returns the image's memory from row to row.
fn assert_that_the_image_is_the_memory(fixture: &Fixture, manager: Manager) -> u64 {
    let (row_pitch, _) = linear(&manager);
    let (host, buffer) = frames(8);
    let object = register(&manager, &buffer, 0, Access::ReadWrite);
    let image = image(&manager, &object, 0, &[Plane { offset: 0, row_pitch }]).unwrap();
    let lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
    assert_eq!(lease.view(0).path(), Path::DmaBuf);
    assert!(image.lies_in(&lease.view(0)));
    assert_that_barriers_hand_over(&image);
    let (back, done) = (Readback::new(fixture, u64::from(WIDTH * HEIGHT * 4)), fixture.timeline());
    let foreign = dmabuf::foreign_family(&fixture.extensions);
    let seen = (vk::ImageLayout::TRANSFER_SRC_OPTIMAL, vk::AccessFlags::TRANSFER_READ);
    let commands = fixture.record(|commands| {
        let (all, none) = (vk::PipelineStageFlags::ALL_COMMANDS, vk::DependencyFlags::empty());
        let take = [image_from_foreign(&image, foreign, 0, seen)];
        // SAFETY: the command buffer is being recorded, and the image is alive.
        unsafe { fixture.device.cmd_pipeline_barrier(commands, all, all, none, &[], &[], &take) };
        let layers = vk::ImageSubresourceLayers {
            aspect_mask: vk::ImageAspectFlags::COLOR,
            layer_count: 1,
            ..Default::default()
        };
        let region = vk::BufferImageCopy::default().image_subresource(layers).image_extent(info().extent);
        // SAFETY: as above; the barrier has left this layout, and the buffer is as large as the picture.
        unsafe { fixture.device.cmd_copy_image_to_buffer(commands, image.raw(), seen.0, back.buffer, &[region]) };
        let give = [image_to_foreign(&image, foreign, 0, seen)];
        // SAFETY: as above.
        unsafe { fixture.device.cmd_pipeline_barrier(commands, all, all, none, &[], &[], &give) };
    });
    fixture.submit(&[commands], None, Some((done, 1)));
    fixture.wait(done, 1);
    let (width, pitch) = (WIDTH as usize * 4, usize::try_from(row_pitch).unwrap());
    let mut all = vec![0; host.size()];
    host.read(0, &mut all).unwrap();
    let rows: Vec<u8> = all.chunks(pitch).take(HEIGHT as usize).flat_map(|row| row[..width].to_vec()).collect();
    assert!(back.bytes() == rows, "the image is the memory");
    manager.invalidate(object.range()).unwrap();
    drop(lease);
    let anew = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
    assert!(!image.lies_in(&anew.view(0)), "it says that it is of the past");
    drop((anew, image, back, object, manager));
    fixture.destroy_semaphore(done);
    row_pitch
}

#[test]
fn the_pixels_of_a_frame_are_seen_where_its_sender_says() {
    let test = "the_pixels_of_a_frame_are_seen_where_its_sender_says";
    // With memory of its own, too: its size is then exactly what the image needs.
    for (modifiers, alone) in [(1, false), (2, true)] {
        let Some((scripted, manager)) = scripted(test, modifiers) else { return };
        let (_, needed) = linear(&manager);
        let row_pitch = assert_that_the_image_is_the_memory(&scripted.fixture, manager);
        assert_eq!(*LAID_OUT.lock().unwrap(), Some((0, vec![(0, row_pitch)])));
        assert_eq!(ALONE.load(SeqCst) == needed, alone);
    }
}

/// How many modifiers the device has in `VkDrmFormatModifierPropertiesList2EXT`, the list with the wider features.
fn second_list(fixture: &Fixture) -> u32 {
    let mut list = vk::DrmFormatModifierPropertiesList2EXT::default();
    let mut answer = vk::FormatProperties2::default().push_next(&mut list);
    // SAFETY: the device is live, and the chain holds one structure that asks for the number only.
    unsafe { fixture.instance.get_physical_device_format_properties2(fixture.physical, FORMAT, &mut answer) };
    list.drm_format_modifier_count
}

#[test]
fn a_real_device_with_the_extension_sees_them_there() {
    let Some(fixture) = Fixture::new() else { return };
    let manager = manager(fixture.context());
    if let not @ Support::NotEnabled(_) = manager.capabilities().modifiers {
        println!("SKIP a_real_device_with_the_extension_sees_them_there: {not}");
        return;
    }
    let known = modifiers(manager.device(), FORMAT);
    let linear = known.iter().find(|known| known.modifier == 0).expect("linear is among them");
    assert!(linear.planes == 1 && linear.features.contains(vk::FormatFeatureFlags::TRANSFER_SRC), "{linear:?}");
    let second = second_list(&fixture);
    assert_that_the_image_is_the_memory(&fixture, manager);
    if second == 0 {
        // The layer looks a modifier's features up in the second list, which Vulkan 1.3 has and lavapipe 25.0 doesn't know; so it finds none,
        // though the first one has what the copy needs (asserted above).
        fixture.expect_message("VUID-vkCmdCopyImageToBuffer-srcImage-01998");
    }
}

#[test]
fn planes_are_counted_from_the_object_and_given_from_the_buffer() {
    let Some((_scripted, manager)) = scripted("planes_are_counted_from_the_object_and_given_from_the_buffer", 1) else {
        return;
    };
    let known: Vec<_> = modifiers(manager.device(), FORMAT).iter().map(|m| (m.modifier, m.planes)).collect();
    assert_eq!(known, MODIFIERS);
    let (_host, buffer) = frames(8);
    let page = page_size() as u64;
    let object = register(&manager, &buffer, page, Access::ReadWrite);
    let planes = [Plane { offset: 512, row_pitch: 256 }, Plane { offset: 2 * page, row_pitch: 64 }];
    drop(image(&manager, &object, TILED, &planes).unwrap());
    assert_eq!(*LAID_OUT.lock().unwrap(), Some((TILED, vec![(page + 512, 256), (3 * page, 64)])));
}

#[test]
fn what_a_sender_says_and_cannot_be_is_refused_before_the_driver_hears_of_it() {
    let test = "what_a_sender_says_and_cannot_be_is_refused_before_the_driver_hears_of_it";
    let Some((scripted, manager)) = scripted(test, 1) else { return };
    let (host, buffer) = frames(8);
    let page = page_size() as u64;
    let object = register(&manager, &buffer, page, Access::ReadWrite);
    let plane = |offset| Plane { offset, row_pitch: 256 };
    let at = |modifier, planes: &[Plane]| image(&manager, &object, modifier, planes).unwrap_err();
    assert!(matches!(at(1, &[plane(0)]), ImageError::Modifier { modifier: 1, .. }));
    for planes in [&[][..], &[plane(0); 2], &[plane(0); 5]] {
        let error = at(0, planes);
        assert!(matches!(error, ImageError::Planes { needed: 1, given, .. } if given == planes.len()), "{error}");
    }
    let size = buffer.size() - page;
    for offset in [size, size + 1, u64::MAX] {
        let error = at(TILED, &[plane(0), plane(offset)]);
        assert!(matches!(error, ImageError::PlaneOutside { plane: 1, .. }), "{error}");
    }
    assert_eq!(*LAID_OUT.lock().unwrap(), None, "no image was made");

    // What only the driver knows: rows that it can't have, and how much the image needs.
    let code = vk::Result::ERROR_INVALID_DRM_FORMAT_MODIFIER_PLANE_LAYOUT_EXT;
    scripted.script().create_image.store(code.as_raw(), SeqCst);
    let error = at(0, &[plane(0)]);
    assert!(matches!(error, ImageError::Vulkan { call: "vkCreateImage", code: told } if told == code), "{error}");
    scripted.script().create_image.store(script::PASS, SeqCst);
    scripted.script().image_size.store(buffer.size() + 1, SeqCst);
    let error = at(0, &[plane(0)]);
    assert!(matches!(error, ImageError::NoRoom { available, .. } if available == buffer.size()), "{error}");
    scripted.script().image_size.store(script::PASS_U64, SeqCst);

    // What the program asks for and can't have.
    let lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
    // SAFETY: the info is valid but for what is refused before the driver hears of it.
    let asked = |info: vk::ImageCreateInfo<'_>| unsafe { lease.view(0).image_with_modifier(&info, 0, &[plane(0)]) };
    let layout = vk::ImageLayout::PREINITIALIZED;
    let error = asked(info().initial_layout(layout)).unwrap_err();
    assert!(matches!(error, ImageError::Layout(told) if told == layout), "{error}");
    let wide = vk::Extent3D { width: u32::MAX, height: 1, depth: 1 };
    for info in [info().extent(wide), info().mip_levels(40), info().array_layers(u32::MAX)] {
        let error = asked(info).unwrap_err();
        assert!(matches!(error, ImageError::Unsupported { format: FORMAT, .. }), "{error}");
    }
    drop(lease);

    // And what isn't for images at all.
    let read = register(&manager, &buffer, 0, Access::Read);
    assert!(matches!(image(&manager, &read, 0, &[plane(0)]), Err(ImageError::ReadOnly)));
    // SAFETY: no references to the memory exist.
    let mapped = unsafe { manager.register(host.range(), Access::ReadWrite) }.unwrap();
    let error = image(&manager, &mapped, 0, &[plane(0)]).unwrap_err();
    assert!(matches!(error, ImageError::NotADmaBuf(Path::AliasImport)), "{error}");
}
