//! Images in dma-bufs whose pixels lie as a DRM format modifier says.
//!
//! A codec, a compositor or another driver says where the pixels are: by a modifier (linear, or a tiling that drivers agree upon) and, for each
//! plane of memory, where it starts and how far apart its rows are. All of it comes from outside, so all of it is compared with what the
//! device says it knows, and what the image needs with what the object has. All planes lie in one buffer.
//!
//! The image has an import of its own, of the whole buffer: a device may want an image of this kind alone in its memory, which the object's
//! import can't be, as a buffer lies in it.

use std::sync::Arc;

use ash::vk;
use pinfold_core::dmabuf::DmaBufPart;

use super::{EXTERNAL, import_memory};
use crate::gpu::Gpu;
use crate::image::bind;
use crate::import::{NotImported, Store};
use crate::{Image, ImageError, Import, Support};

/// The most planes of memory that Vulkan has (`VK_IMAGE_ASPECT_MEMORY_PLANE_3_BIT_EXT`).
const MOST_PLANES: usize = 4;

/// Where one plane of memory lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Plane {
    /// Where it starts in the object, in bytes.
    pub offset: u64,
    /// Bytes from one row to the next.
    pub row_pitch: u64,
}

/// A way for the pixels of a format to lie that the device knows. From [`modifiers`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Modifier {
    /// Its number; 0 is linear.
    pub modifier: u64,
    /// How many planes of memory it has.
    pub planes: u32,
    /// What such images can be used for.
    pub features: vk::FormatFeatureFlags,
}

/// The modifiers that a device knows for a format: what to offer to somebody who is to make the frames. None where
/// [`Capabilities::modifiers`](crate::Capabilities::modifiers) says that there are none.
#[must_use]
pub fn modifiers(device: &crate::VulkanDevice, format: vk::Format) -> Vec<Modifier> {
    known(device.gpu(), format)
}

fn known(gpu: &Gpu, format: vk::Format) -> Vec<Modifier> {
    if gpu.caps.modifiers != Support::Usable {
        return Vec::new();
    }
    let (instance, physical) = (&gpu.context.instance, gpu.context.physical);
    let mut count = vk::DrmFormatModifierPropertiesListEXT::default();
    // SAFETY: the device is live, and the chain holds one structure, of an enabled extension, that asks for the number only.
    unsafe {
        let mut answer = vk::FormatProperties2::default().push_next(&mut count);
        instance.get_physical_device_format_properties2(physical, format, &mut answer);
    };
    let mut each = vec![vk::DrmFormatModifierPropertiesEXT::default(); count.drm_format_modifier_count as usize];
    let mut list = vk::DrmFormatModifierPropertiesListEXT::default().drm_format_modifier_properties(&mut each);
    let mut answer = vk::FormatProperties2::default().push_next(&mut list);
    // SAFETY: as above; the structure has room for as many as it says.
    unsafe { instance.get_physical_device_format_properties2(physical, format, &mut answer) };
    let told = list.drm_format_modifier_count as usize;
    each.truncate(told);
    let modifier = |one: &vk::DrmFormatModifierPropertiesEXT| Modifier {
        modifier: one.drm_format_modifier,
        planes: one.drm_format_modifier_plane_count,
        features: one.drm_format_modifier_tiling_features,
    };
    each.iter().map(modifier).collect()
}

impl Import {
    /// An image over an object that was registered for a dma-buf, with its pixels where `modifier` and `planes` say.
    ///
    /// `info` is the program's own, with its chain; its tiling is replaced, and the structures for the modifier and the external memory are
    /// added. The pixels that are there already are seen after a barrier out of the foreign queue family ([`image_from_foreign`]).
    ///
    /// # Errors
    /// [`ImageError::NotEnabled`] on devices without `VK_EXT_image_drm_format_modifier`; otherwise the [`ImageError`] that says what doesn't fit.
    ///
    /// # Safety
    /// Those of [`image`](Self::image).
    pub unsafe fn image_with_modifier(
        &self,
        info: &vk::ImageCreateInfo<'_>,
        modifier: u64,
        planes: &[Plane],
    ) -> Result<Image, ImageError> {
        let Store::Imported(pieces) = self.store() else { return Err(ImageError::Mirrored) };
        let piece = pieces.first().expect("a range is never empty, so it has a chunk");
        let gpu = piece.block.gpu();
        if let Support::NotEnabled(extension) = gpu.caps.modifiers {
            return Err(ImageError::NotEnabled(extension));
        }
        let Some(part) = &piece.dmabuf else { return Err(ImageError::NotADmaBuf(self.path())) };
        if !piece.writable {
            return Err(ImageError::ReadOnly);
        }
        if info.initial_layout != vk::ImageLayout::UNDEFINED {
            return Err(ImageError::Layout(info.initial_layout));
        }
        let layouts = layouts(gpu, info.format, modifier, planes, part)?;
        let info = (*info).tiling(vk::ImageTiling::DRM_FORMAT_MODIFIER_EXT);
        let dedicated = supported(gpu, &info, modifier)?;
        let mut explicit = vk::ImageDrmFormatModifierExplicitCreateInfoEXT::default()
            .drm_format_modifier(modifier)
            .plane_layouts(&layouts[..planes.len()]);
        let mut external = vk::ExternalMemoryImageCreateInfo::default().handle_types(EXTERNAL);
        let info = info.push_next(&mut explicit).push_next(&mut external);
        // SAFETY: the device is live, knows the modifier with so many planes, and the rest of `info` is valid (contract).
        let raw = unsafe { gpu.device().create_image(&info, None) };
        let raw = raw.map_err(|code| ImageError::Vulkan { call: "vkCreateImage", code: gpu.saw(code) })?;
        let mut image = Image::new(raw, Arc::clone(&piece.block));
        // SAFETY: the device is live, and the image its own.
        let needs = unsafe { gpu.device().get_image_memory_requirements(raw) };
        // Counted from the start of the buffer, as the planes are.
        let available = part.offset.saturating_add(part.len);
        if needs.size > available {
            return Err(ImageError::NoRoom { at: part.offset, needed: needs.size, available });
        }
        let alone = dedicated.then(|| (vk::MemoryDedicatedAllocateInfo::default().image(raw), needs.size));
        let memory = import_memory(gpu, piece.block.program(), &part.buffer, needs.memory_type_bits, alone, "image");
        let (memory, _) = memory.map_err(|why| match why {
            NotImported::Refused { call, code } => ImageError::Vulkan { call, code },
            NotImported::Stop(error) => ImageError::Device(error),
        })?;
        // SAFETY: the image is new and unbound; size and type were checked, 0 is aligned, and both are of the same kind of external memory. The
        // memory goes after the image.
        unsafe { bind(gpu, raw, memory.raw, 0) }?;
        image.keep(memory);
        Ok(image)
    }
}

/// The planes as Vulkan takes them: from the start of the buffer, as many as the modifier has.
fn layouts(
    gpu: &Gpu,
    format: vk::Format,
    modifier: u64,
    planes: &[Plane],
    part: &DmaBufPart,
) -> Result<[vk::SubresourceLayout; MOST_PLANES], ImageError> {
    let known = known(gpu, format).into_iter().find(|known| known.modifier == modifier);
    let Some(known) = known else { return Err(ImageError::Modifier { format, modifier }) };
    if planes.len() != known.planes as usize || planes.len() > MOST_PLANES {
        return Err(ImageError::Planes { modifier, needed: known.planes, given: planes.len() });
    }
    let mut layouts = [vk::SubresourceLayout::default(); MOST_PLANES];
    for (index, (plane, layout)) in planes.iter().zip(&mut layouts).enumerate() {
        if plane.offset >= part.len {
            return Err(ImageError::PlaneOutside { plane: index, offset: plane.offset, size: part.len });
        }
        // The part lies inside the buffer, so the sum is no overflow. Size and the other pitches must be 0.
        *layout = layout.offset(part.offset + plane.offset).row_pitch(plane.row_pitch);
    }
    Ok(layouts)
}

/// Whether such an image must be alone in its memory; an error if the device has no such images, or imports none.
fn supported(gpu: &Gpu, info: &vk::ImageCreateInfo<'_>, modifier: u64) -> Result<bool, ImageError> {
    let no = |code| ImageError::Unsupported {
        format: info.format,
        tiling: info.tiling,
        usage: info.usage,
        code: gpu.saw(code),
    };
    let mut way = vk::PhysicalDeviceImageDrmFormatModifierInfoEXT {
        drm_format_modifier: modifier,
        sharing_mode: info.sharing_mode,
        queue_family_index_count: info.queue_family_index_count,
        p_queue_family_indices: info.p_queue_family_indices,
        ..Default::default()
    };
    let mut from = vk::PhysicalDeviceExternalImageFormatInfo::default().handle_type(EXTERNAL);
    let asked = vk::PhysicalDeviceImageFormatInfo2::default()
        .format(info.format)
        .ty(info.image_type)
        .tiling(info.tiling)
        .usage(info.usage)
        .flags(info.flags)
        .push_next(&mut way)
        .push_next(&mut from);
    let mut able = vk::ExternalImageFormatProperties::default();
    let mut answer = vk::ImageFormatProperties2::default().push_next(&mut able);
    let (instance, physical) = (&gpu.context.instance, gpu.context.physical);
    // SAFETY: the handles are live, and both chains are valid: their structures belong to enabled extensions, and the families to `info`.
    unsafe { instance.get_physical_device_image_format_properties2(physical, &asked, &mut answer) }.map_err(no)?;
    let most = answer.image_format_properties;
    let fits = info.extent.width <= most.max_extent.width
        && info.extent.height <= most.max_extent.height
        && info.extent.depth <= most.max_extent.depth
        && info.mip_levels <= most.max_mip_levels
        && info.array_layers <= most.max_array_layers
        && most.sample_counts.contains(info.samples);
    let features = able.external_memory_properties.external_memory_features;
    if !fits || !features.contains(vk::ExternalMemoryFeatureFlags::IMPORTABLE) {
        return Err(no(vk::Result::ERROR_FORMAT_NOT_SUPPORTED));
    }
    Ok(features.contains(vk::ExternalMemoryFeatureFlags::DEDICATED_ONLY))
}

/// As [`from_foreign`](super::from_foreign), for an image of one level and layer, which then has the layout `then`. What is in it stays.
pub fn image_from_foreign(
    image: &Image,
    foreign: u32,
    ours: u32,
    then: (vk::ImageLayout, vk::AccessFlags),
) -> vk::ImageMemoryBarrier<'static> {
    let barrier = whole(image).src_queue_family_index(foreign).dst_queue_family_index(ours);
    barrier.old_layout(vk::ImageLayout::GENERAL).new_layout(then.0).dst_access_mask(then.1)
}

/// As [`to_foreign`](super::to_foreign), for an image that has the layout and was used as `before` says.
pub fn image_to_foreign(
    image: &Image,
    foreign: u32,
    ours: u32,
    before: (vk::ImageLayout, vk::AccessFlags),
) -> vk::ImageMemoryBarrier<'static> {
    let barrier = whole(image).src_queue_family_index(ours).dst_queue_family_index(foreign);
    barrier.old_layout(before.0).new_layout(vk::ImageLayout::GENERAL).src_access_mask(before.1)
}

fn whole(image: &Image) -> vk::ImageMemoryBarrier<'static> {
    let first = vk::ImageSubresourceRange {
        aspect_mask: vk::ImageAspectFlags::COLOR,
        level_count: 1,
        layer_count: 1,
        ..Default::default()
    };
    vk::ImageMemoryBarrier::default().image(image.raw()).subresource_range(first)
}
