//! Images in memory that the program already has.
//!
//! An image over imported memory is an image like any other, with three differences that Vulkan makes for everything external, and that are
//! easy to get wrong:
//!
//! 1. It starts `UNDEFINED` (VUID-VkImageCreateInfo-pNext-01443), and the first transition out of it may discard what the memory held. So
//!    an image is for what the *device* draws or writes, and the program then reads; bytes that the program has and the device is to read
//!    belong in a buffer (or are copied from one, `vkCmdCopyBufferToImage`).
//! 2. Where pixels lie is the driver's: a linear image has a row pitch of its own, which [`Image::layout`] tells and nobody may assume; what
//!    an optimal one looks like is nobody's business.
//! 3. It lies inside the object: size and alignment are asked from the driver ([`Image::needs`]) and checked here, so that the device can't
//!    write beside it.

use std::fmt;
use std::sync::Arc;

use ash::vk;
use pinfold_core::{DeviceError, Path};
use thiserror::Error;

use crate::block::Block;
use crate::gpu::{Gpu, OwnedMemory};
use crate::import::{EXTERNAL, Store};
use crate::{Import, VulkanDevice};

/// Why an image can't lie where it was to.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The object is a copy, which no image can be placed in.
    #[error("the object is a mirror; copy from its buffer into an image of your own")]
    Mirrored,
    /// The program itself may not write there. Even the first transition of an image may write.
    #[error("the memory is mapped read-only, and the first transition of an image may write; use a buffer")]
    ReadOnly,
    /// The create info asks for something else than `UNDEFINED`.
    #[error("external images start UNDEFINED, not {0:?} (VUID-VkImageCreateInfo-pNext-01443)")]
    Layout(vk::ImageLayout),
    /// The device has no such images.
    #[error("the device has no such image ({format:?}, {tiling:?}, {usage:?}): {code}")]
    Unsupported {
        /// Its format.
        format: vk::Format,
        /// Its tiling.
        tiling: vk::ImageTiling,
        /// Its usages.
        usage: vk::ImageUsageFlags,
        /// What the device answered.
        code: vk::Result,
    },
    /// It would start in the middle of an alignment unit.
    #[error(
        "an image at byte {at} of the object is {over} bytes off the alignment of {alignment} that it needs; start {over} bytes earlier"
    )]
    Misaligned {
        /// Where it was to start inside the object, in bytes.
        at: u64,
        /// What its start in memory must be a multiple of, in bytes.
        alignment: u64,
        /// How many bytes it is beyond the last such multiple.
        over: u64,
    },
    /// It would reach beyond the object, or beyond the chunk it starts in.
    #[error("an image at byte {at} of the object needs {needed} bytes, and {available} are left there")]
    NoRoom {
        /// Where it was to start inside the object, in bytes.
        at: u64,
        /// How many bytes it needs.
        needed: u64,
        /// How many there are, up to the end of the chunk.
        available: u64,
    },
    /// The device was made without an extension that it takes.
    #[error(
        "the device was made without {0}; make it with everything that `requirements` lists, or copy from the object's buffer"
    )]
    NotEnabled(&'static str),
    /// Only dma-bufs have pixels that lie as a modifier says.
    #[error("the object reached the device by {0:?} and not as a dma-buf, so no modifier says how its pixels lie")]
    NotADmaBuf(Path),
    /// The device doesn't know this modifier for this format.
    #[error(
        "the device has no images of {format:?} with the modifier {modifier:#x}; offer the maker what `dmabuf::modifiers` lists"
    )]
    Modifier {
        /// The format.
        format: vk::Format,
        /// The modifier.
        modifier: u64,
    },
    /// Another number of planes than the modifier has.
    #[error("images with the modifier {modifier:#x} have {needed} planes of memory, and {given} were given")]
    Planes {
        /// The modifier.
        modifier: u64,
        /// How many it has.
        needed: u32,
        /// How many there were.
        given: usize,
    },
    /// A plane that starts behind the end of the object.
    #[error("plane {plane} starts at byte {offset}, and the object has {size} bytes")]
    PlaneOutside {
        /// Which one.
        plane: usize,
        /// Where it was to start inside the object, in bytes.
        offset: u64,
        /// The object's size in bytes.
        size: u64,
    },
    /// A budget is used up, or the device is lost.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The device wants it in memory of another type than the import has.
    #[error("the import is of memory type {kind}, and the image allows the types {allowed:#b} only")]
    MemoryType {
        /// The import's type.
        kind: u32,
        /// The image's types, as bits.
        allowed: u32,
    },
    /// A Vulkan command failed.
    #[error("{call} failed: {code}")]
    Vulkan {
        /// The command.
        call: &'static str,
        /// What it answered.
        code: vk::Result,
    },
}

/// What an image needs of the memory it lies in. From [`Image::needs`].
#[derive(Debug, Clone, Copy)]
pub struct ImageNeeds {
    /// How many bytes, with the driver's padding.
    pub size: u64,
    /// What its start in device memory must be a multiple of, in bytes. A page-aligned start of an object satisfies any up to the page size,
    /// as long as the device's import alignment is no coarser than a page.
    pub alignment: u64,
    /// Where the first pixel and the rows lie, of a linear image.
    pub layout: Option<vk::SubresourceLayout>,
}

/// An image in the program's own memory, destroyed when dropped. From [`Import::image`].
///
/// It keeps the import alive, as a lease does: what it names in commands stays valid whatever the program unmaps. As with a view's buffer, an
/// invalidation of the object doesn't change the image, it makes it a thing of the past: [`lies_in`](Self::lies_in) tells.
pub struct Image {
    raw: vk::Image,
    layout: Option<vk::SubresourceLayout>,
    // Dropped after the image, both.
    memory: Option<OwnedMemory>,
    block: Arc<Block>,
}

impl Image {
    /// An image that isn't bound yet, of the object that has this block.
    pub(crate) fn new(raw: vk::Image, block: Arc<Block>) -> Self {
        Self { raw, layout: None, memory: None, block }
    }

    /// Lets it own the memory that it lies in.
    pub(crate) fn keep(&mut self, memory: OwnedMemory) {
        self.memory = Some(memory);
    }

    /// What an image of this kind needs of memory, so that the program can leave room for it. Makes the image and destroys it.
    ///
    /// # Errors
    /// [`ImageError::Layout`], [`ImageError::Unsupported`], [`ImageError::Vulkan`].
    ///
    /// # Safety
    /// `info` is valid, except that the device may not have such images.
    pub unsafe fn needs(device: &VulkanDevice, info: &vk::ImageCreateInfo<'_>) -> Result<ImageNeeds, ImageError> {
        let gpu = device.gpu();
        // SAFETY: the contract is the same.
        let raw = unsafe { create(gpu, EXTERNAL, info) }?;
        // SAFETY: the device is live, and the image its own.
        let needs = unsafe { gpu.device().get_image_memory_requirements(raw) };
        let layout = layout(gpu, info, raw);
        // SAFETY: nobody knows the image yet.
        unsafe { gpu.device().destroy_image(raw, None) };
        Ok(ImageNeeds { size: needs.size, alignment: needs.alignment, layout })
    }

    /// The image, for views and commands.
    #[must_use]
    pub fn raw(&self) -> vk::Image {
        self.raw
    }

    /// Where its first level and layer lie, counted from the place in the object that the image was given: the offset of the first pixel, and the
    /// bytes from one row to the next. `None` unless it is linear.
    #[must_use]
    pub fn layout(&self) -> Option<vk::SubresourceLayout> {
        self.layout
    }

    /// Whether `import`, of a lease taken now, is still the one that the image lies in. If not, the object has changed hands since, and the
    /// image shows memory of before: make another one.
    #[must_use]
    pub fn lies_in(&self, import: &Import) -> bool {
        match import.store() {
            Store::Imported(pieces) => pieces.iter().any(|piece| Arc::ptr_eq(&piece.block, &self.block)),
            Store::Mirrored(_) => false,
        }
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image").field("raw", &self.raw).field("layout", &self.layout).finish_non_exhaustive()
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // SAFETY: the device is live, the image is ours and destroyed once; no unfinished work names it (contract of `Import::image`).
        unsafe { self.block.gpu().device().destroy_image(self.raw, None) };
    }
}

impl Import {
    /// An image `at` bytes into the object.
    ///
    /// `info` is the program's own, with its chain; the external structure is added here.
    ///
    /// # Errors
    /// [`ImageError`]; [`Image::needs`] tells what is needed.
    ///
    /// # Safety
    /// 1. `info` is valid, except that the device may not have such images.
    /// 2. The image is dropped before the manager's device is destroyed, and not before all work that names it is over.
    /// 3. Commands that name it are submitted through a lease of the object in whose import it [lies](Image::lies_in), so that the memory
    ///    is held for them.
    /// 4. The object was registered with [`Access::ReadWrite`](crate::Access::ReadWrite): the first transition may write.
    pub unsafe fn image(&self, at: u64, info: &vk::ImageCreateInfo<'_>) -> Result<Image, ImageError> {
        let Store::Imported(pieces) = self.store() else { return Err(ImageError::Mirrored) };
        // The last chunk that doesn't start behind `at`; there is a first, at 0.
        let index = self.chunks().partition_point(|chunk| chunk.at <= at) - 1;
        let (chunk, piece) = (&self.chunks()[index], &pieces[index]);
        let (block, inside) = (&piece.block, at - chunk.at);
        let gpu = block.gpu();
        if !piece.writable {
            return Err(ImageError::ReadOnly);
        }
        // SAFETY: point 1 of the contract.
        let raw = unsafe { create(gpu, block.handle(), info) }?;
        let mut image = Image::new(raw, Arc::clone(block));
        image.layout = layout(gpu, info, raw);
        // SAFETY: the device is live, and the image its own.
        let needs = unsafe { gpu.device().get_image_memory_requirements(raw) };
        let (offset, available) = (piece.start.saturating_add(inside), chunk.size.saturating_sub(inside));
        if !offset.is_multiple_of(needs.alignment) {
            return Err(ImageError::Misaligned { at, alignment: needs.alignment, over: offset % needs.alignment });
        }
        if available < needs.size {
            return Err(ImageError::NoRoom { at, needed: needs.size, available });
        }
        if !block.suits(needs.memory_type_bits) {
            return Err(ImageError::MemoryType { kind: block.kind(), allowed: needs.memory_type_bits });
        }
        // SAFETY: the image is new and unbound; alignment, size and type were checked, and both were made for the same kind of external memory.
        unsafe { bind(gpu, raw, block.memory(), offset) }?;
        Ok(image)
    }
}

/// Puts an image on memory.
///
/// # Safety
/// `memory` is live, of a type this image allows and for the same kind of external memory, has room for it at `offset`, outlives it, and the image
/// isn't bound yet.
pub(crate) unsafe fn bind(gpu: &Gpu, raw: vk::Image, memory: vk::DeviceMemory, offset: u64) -> Result<(), ImageError> {
    // SAFETY: the device is live; everything else is the contract.
    let bound = unsafe { gpu.device().bind_image_memory(raw, memory, offset) };
    bound.map_err(|code| ImageError::Vulkan { call: "vkBindImageMemory", code: gpu.saw(code) })
}

/// The image that `info` describes, for external memory.
///
/// # Safety
/// `info` is valid, except that the device may not have such images.
unsafe fn create(
    gpu: &Gpu,
    handle: vk::ExternalMemoryHandleTypeFlags,
    info: &vk::ImageCreateInfo<'_>,
) -> Result<vk::Image, ImageError> {
    if info.initial_layout != vk::ImageLayout::UNDEFINED {
        return Err(ImageError::Layout(info.initial_layout));
    }
    supported(gpu, handle, info).map_err(|code| ImageError::Unsupported {
        format: info.format,
        tiling: info.tiling,
        usage: info.usage,
        code: gpu.saw(code),
    })?;
    let mut external = vk::ExternalMemoryImageCreateInfo::default().handle_types(handle);
    let info = (*info).push_next(&mut external);
    // SAFETY: the device is live, and `info` valid (contract).
    let raw = unsafe { gpu.device().create_image(&info, None) };
    raw.map_err(|code| ImageError::Vulkan { call: "vkCreateImage", code: gpu.saw(code) })
}

/// Whether the device has images of this kind. It is asked for external ones first; a driver that says no to those and has them all the same is
/// in use, so then the answer for ordinary ones counts, and after that the bind.
fn supported(
    gpu: &Gpu,
    handle: vk::ExternalMemoryHandleTypeFlags,
    info: &vk::ImageCreateInfo<'_>,
) -> Result<(), vk::Result> {
    let (instance, physical) = (&gpu.context.instance, gpu.context.physical);
    let plain = vk::PhysicalDeviceImageFormatInfo2::default()
        .format(info.format)
        .ty(info.image_type)
        .tiling(info.tiling)
        .usage(info.usage)
        .flags(info.flags);
    let ask = |asked: &vk::PhysicalDeviceImageFormatInfo2<'_>, answer: &mut vk::ImageFormatProperties2<'_>| {
        // SAFETY: the handles are live, and both structures valid.
        unsafe { instance.get_physical_device_image_format_properties2(physical, asked, answer) }?;
        let most = answer.image_format_properties;
        let extent = info.extent.width <= most.max_extent.width
            && info.extent.height <= most.max_extent.height
            && info.extent.depth <= most.max_extent.depth;
        let parts = info.mip_levels <= most.max_mip_levels && info.array_layers <= most.max_array_layers;
        let fits = extent && parts && most.sample_counts.contains(info.samples);
        if fits { Ok(()) } else { Err(vk::Result::ERROR_FORMAT_NOT_SUPPORTED) }
    };
    // The chained answer must be there exactly if the chained question is: one driver in use writes to it unseen, another reads the question
    // wherever it sees the answer.
    let mut question = vk::PhysicalDeviceExternalImageFormatInfo::default().handle_type(handle);
    let mut chained = vk::ExternalImageFormatProperties::default();
    let mut answer = vk::ImageFormatProperties2::default().push_next(&mut chained);
    ask(&plain.push_next(&mut question), &mut answer)
        .or_else(|_| ask(&plain, &mut vk::ImageFormatProperties2::default()))
}

/// Where the first level and layer of a linear image lie.
fn layout(gpu: &Gpu, info: &vk::ImageCreateInfo<'_>, raw: vk::Image) -> Option<vk::SubresourceLayout> {
    if info.tiling != vk::ImageTiling::LINEAR {
        return None;
    }
    let aspect = match info.format {
        vk::Format::D16_UNORM | vk::Format::X8_D24_UNORM_PACK32 | vk::Format::D32_SFLOAT => vk::ImageAspectFlags::DEPTH,
        _ => vk::ImageAspectFlags::COLOR,
    };
    let first = vk::ImageSubresource::default().aspect_mask(aspect);
    // SAFETY: the device is live, and the image its own and linear.
    Some(unsafe { gpu.device().get_image_subresource_layout(raw, first) })
}
