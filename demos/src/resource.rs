//! Buffers and images that own their memory. They borrow the [`Gpu`], so they are gone before it is; that no work on the queue names
//! them any more is for their owner to see to, as everywhere in Vulkan.

use anyhow::{Context, Result};
use ash::vk;

use crate::device::Gpu;

/// A buffer with memory of its own.
pub struct Buffer<'g> {
    /// The buffer.
    pub handle: vk::Buffer,
    /// Its size in bytes.
    pub size: u64,
    memory: vk::DeviceMemory,
    mapped: *mut u8,
    gpu: &'g Gpu,
}

impl<'g> Buffer<'g> {
    /// A buffer in the first memory type that has all flags of one of `wishes`. It is mapped if the type can be.
    ///
    /// # Errors
    /// No such memory type, or no memory.
    pub fn new(
        gpu: &'g Gpu,
        size: u64,
        usage: vk::BufferUsageFlags,
        wishes: &[vk::MemoryPropertyFlags],
    ) -> Result<Self> {
        let info = vk::BufferCreateInfo::default().size(size).usage(usage);
        // SAFETY: a valid create info.
        let handle = unsafe { gpu.device.create_buffer(&info, None) }?;
        let mut buffer = Self { handle, size, memory: vk::DeviceMemory::null(), mapped: std::ptr::null_mut(), gpu };
        // SAFETY: the buffer was made from this device.
        let needs = unsafe { gpu.device.get_buffer_memory_requirements(handle) };
        let (memory, index) = allocate(gpu, needs, wishes)?;
        buffer.memory = memory;
        // SAFETY: buffer and memory are new, of one device, and the type and size are what the buffer needs.
        unsafe { gpu.device.bind_buffer_memory(handle, memory, 0) }?;
        let flags = gpu.memory.memory_types[index as usize].property_flags;
        if flags.contains(vk::MemoryPropertyFlags::HOST_VISIBLE) {
            // SAFETY: the memory is host-visible and not yet mapped.
            let start = unsafe { gpu.device.map_memory(memory, 0, vk::WHOLE_SIZE, vk::MemoryMapFlags::empty()) }?;
            buffer.mapped = start.cast();
        }
        Ok(buffer)
    }

    /// Where the host sees it, if it does.
    #[must_use]
    pub fn mapped(&self) -> Option<*mut u8> {
        (!self.mapped.is_null()).then_some(self.mapped)
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        // SAFETY: no work names the buffer any more (see the module), and it is destroyed once.
        unsafe { self.gpu.device.destroy_buffer(self.handle, None) };
        // SAFETY: the same for its memory, which may be null.
        unsafe { self.gpu.device.free_memory(self.memory, None) };
    }
}

/// An image with memory of its own and a view of all of it.
pub struct Image<'g> {
    /// The image.
    pub handle: vk::Image,
    /// A view of its one level and layer.
    pub view: vk::ImageView,
    memory: vk::DeviceMemory,
    gpu: &'g Gpu,
}

impl<'g> Image<'g> {
    /// A two-dimensional image in the device's own memory.
    ///
    /// # Errors
    /// No memory, or a format that the device can't use so.
    pub fn new(
        gpu: &'g Gpu,
        size: vk::Extent2D,
        format: vk::Format,
        samples: vk::SampleCountFlags,
        usage: vk::ImageUsageFlags,
        aspect: vk::ImageAspectFlags,
    ) -> Result<Self> {
        let info = vk::ImageCreateInfo::default()
            .image_type(vk::ImageType::TYPE_2D)
            .format(format)
            .extent(vk::Extent3D { width: size.width, height: size.height, depth: 1 })
            .mip_levels(1)
            .array_layers(1)
            .samples(samples)
            .usage(usage);
        // SAFETY: a valid create info.
        let handle = unsafe { gpu.device.create_image(&info, None) }?;
        let (view, memory) = (vk::ImageView::null(), vk::DeviceMemory::null());
        let mut image = Self { handle, view, memory, gpu };
        // SAFETY: the image was made from this device.
        let needs = unsafe { gpu.device.get_image_memory_requirements(handle) };
        (image.memory, _) = allocate(gpu, needs, &[vk::MemoryPropertyFlags::DEVICE_LOCAL])?;
        // SAFETY: image and memory are new, of one device, and the type and size are what the image needs.
        unsafe { gpu.device.bind_image_memory(handle, image.memory, 0) }?;
        let all =
            vk::ImageSubresourceRange { aspect_mask: aspect, level_count: 1, layer_count: 1, ..Default::default() };
        let info = vk::ImageViewCreateInfo::default()
            .image(handle)
            .view_type(vk::ImageViewType::TYPE_2D)
            .format(format)
            .subresource_range(all);
        // SAFETY: a valid create info for an image that is bound.
        image.view = unsafe { gpu.device.create_image_view(&info, None) }?;
        Ok(image)
    }
}

impl Drop for Image<'_> {
    fn drop(&mut self) {
        // SAFETY: no work names the view any more (see the module); it may be null.
        unsafe { self.gpu.device.destroy_image_view(self.view, None) };
        // SAFETY: the same for the image.
        unsafe { self.gpu.device.destroy_image(self.handle, None) };
        // SAFETY: the same for its memory, which may be null.
        unsafe { self.gpu.device.free_memory(self.memory, None) };
    }
}

/// Memory for `needs` with all flags of the first wish that some type meets, and the type's index.
fn allocate(
    gpu: &Gpu,
    needs: vk::MemoryRequirements,
    wishes: &[vk::MemoryPropertyFlags],
) -> Result<(vk::DeviceMemory, u32)> {
    let index = wishes.iter().find_map(|&flags| gpu.memory_type(needs.memory_type_bits, flags));
    let index = index.context("the device has no memory type that fits")?;
    let info = vk::MemoryAllocateInfo::default().allocation_size(needs.size).memory_type_index(index);
    // SAFETY: a valid allocate info.
    let memory = unsafe { gpu.device.allocate_memory(&info, None) };
    Ok((memory.with_context(|| format!("the device has no {} bytes left", needs.size))?, index))
}
