//! Device memory of another Vulkan device or instance, handed over as an opaque descriptor (`VK_EXTERNAL_MEMORY_HANDLE_TYPE_OPAQUE_FD_BIT`).
//!
//! Such a descriptor means something to the driver that made it and to nobody else: one driver's is a plain file, another's has a header before
//! the bytes. So nothing is asked from the descriptor. Size and memory type are the exporter's word, and whether it is the same device of the
//! same driver is what both drivers say of themselves, compared before the descriptor is handed over.
//!
//! It is no host memory: nobody unmaps it behind anybody's back, so there is no object, no lease and no watch. Whose turn it is, both sides agree upon
//! among themselves.

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

use ash::{khr, vk};
use pinfold_core::DeviceError;
use pinfold_invalidate::{HostRange, page_size};
use thiserror::Error;

use crate::budget::Share;
use crate::gpu::{OwnedBuffer, OwnedMemory};
use crate::{Manager, VulkanDevice};

const EXTERNAL: vk::ExternalMemoryHandleTypeFlags = vk::ExternalMemoryHandleTypeFlags::OPAQUE_FD;

/// Which device of which driver, in numbers that two instances, processes or virtual machines can compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    /// `deviceUUID`.
    pub device: [u8; vk::UUID_SIZE],
    /// `driverUUID`.
    pub driver: [u8; vk::UUID_SIZE],
}

impl Identity {
    /// Asks a device. The instance must have been made for Vulkan 1.1 or later.
    ///
    /// # Safety
    /// Both handles are live, and `physical` is one of the instance's.
    #[must_use]
    pub unsafe fn of(instance: &ash::Instance, physical: vk::PhysicalDevice) -> Self {
        let mut id = vk::PhysicalDeviceIDProperties::default();
        let mut properties = vk::PhysicalDeviceProperties2::default().push_next(&mut id);
        // SAFETY: live handles that belong together (contract).
        unsafe { instance.get_physical_device_properties2(physical, &mut properties) };
        Self { device: id.device_uuid, driver: id.driver_uuid }
    }
}

/// What the exporter says of the memory. It must travel along with the descriptor, which can't be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exported {
    /// `allocationSize` of its allocation, in bytes.
    pub size: u64,
    /// `memoryTypeIndex` of its allocation.
    pub memory_type: u32,
    /// The device that it was allocated on.
    pub from: Identity,
}

/// Why memory of another device didn't come in. Its descriptor has been closed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpaqueError {
    /// The device was made without the extension.
    #[error(
        "the device has no VK_KHR_external_memory_fd enabled; make it with everything that `requirements` lists, or copy"
    )]
    NotEnabled,
    /// The device imports no such memory for such a buffer.
    #[error("the device imports no opaque descriptors for a buffer with these usages ({features:?}); copy instead")]
    NotImportable {
        /// What it says it can do.
        features: vk::ExternalMemoryFeatureFlags,
    },
    /// Another device, or another version of the driver.
    #[error(
        "the memory is of device {theirs:02x?} and this is device {ours:02x?}; only the same device of the same driver can use it"
    )]
    Foreign {
        /// The exporter.
        theirs: Identity,
        /// The manager's device.
        ours: Identity,
    },
    /// The exporter's memory type can't hold a buffer with these usages.
    #[error("memory type {memory_type} can't hold this buffer (it takes {allowed:#b}); export memory of such a type")]
    MemoryType {
        /// The exporter's.
        memory_type: u32,
        /// A bit for each that can.
        allowed: u32,
    },
    /// The memory is smaller than the buffer.
    #[error("a buffer of {size} bytes needs {needed} bytes of memory, and {available} were exported")]
    TooSmall {
        /// Size of the buffer.
        size: u64,
        /// Bytes that the device wants for it.
        needed: u64,
        /// Bytes that there are.
        available: u64,
    },
    /// A budget, a lost device, or a call that failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// A buffer over memory of another device. Freed when dropped; the exporter's memory lives on.
///
/// # Invariants
/// Dropped in this order.
pub struct OpaqueBuffer {
    buffer: OwnedBuffer,
    _memory: OwnedMemory,
    size: u64,
}

impl OpaqueBuffer {
    /// The buffer.
    #[must_use]
    pub fn raw(&self) -> vk::Buffer {
        self.buffer.raw
    }

    /// Its size, in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }
}

impl std::fmt::Debug for OpaqueBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpaqueBuffer").field("buffer", &self.buffer.raw).field("size", &self.size).finish()
    }
}

impl Manager {
    /// A buffer of `size` bytes, with these usages, at the start of memory that another device has allocated and exported.
    ///
    /// # Errors
    /// [`OpaqueError`]; the descriptor has been closed then.
    ///
    /// # Safety
    /// 1. `fd` is from `vkGetMemoryFdKHR` with the handle type `OPAQUE_FD`, and everything in `exported` is true of its memory.
    /// 2. The memory wasn't allocated for one buffer or image (`VkMemoryDedicatedAllocateInfo`).
    /// 3. The buffer is dropped before the device is destroyed, and when no unfinished work names it.
    /// 4. No two devices access the same bytes at the same time, unless both only read.
    pub unsafe fn import_opaque(
        &self,
        fd: OwnedFd,
        exported: &Exported,
        size: u64,
        usage: vk::BufferUsageFlags,
    ) -> Result<OpaqueBuffer, OpaqueError> {
        // SAFETY: the contract is the same.
        unsafe { import(self.device(), fd, exported, size, usage) }
    }
}

/// # Safety
/// That of [`Manager::import_opaque`].
unsafe fn import(
    device: &VulkanDevice,
    fd: OwnedFd,
    exported: &Exported,
    size: u64,
    usage: vk::BufferUsageFlags,
) -> Result<OpaqueBuffer, OpaqueError> {
    let gpu = &device.gpu;
    gpu.check_alive()?;
    let context = &gpu.context;
    if !context.extensions.contains(&khr::external_memory_fd::NAME) {
        return Err(OpaqueError::NotEnabled);
    }
    // SAFETY: the device is live.
    let ours = unsafe { Identity::of(&context.instance, context.physical) };
    if ours != exported.from {
        return Err(OpaqueError::Foreign { theirs: exported.from, ours });
    }
    let asked = vk::PhysicalDeviceExternalBufferInfo::default().usage(usage).handle_type(EXTERNAL);
    let mut able = vk::ExternalBufferProperties::default();
    // SAFETY: the device is live, and both structures are complete.
    unsafe { context.instance.get_physical_device_external_buffer_properties(context.physical, &asked, &mut able) };
    let features = able.external_memory_properties.external_memory_features;
    let (wanted, dedicated) =
        (vk::ExternalMemoryFeatureFlags::IMPORTABLE, vk::ExternalMemoryFeatureFlags::DEDICATED_ONLY);
    if !features.contains(wanted) || features.contains(dedicated) {
        return Err(OpaqueError::NotImportable { features });
    }

    // Errors name a range, which this memory has not.
    let nowhere = HostRange::new(page_size(), page_size()).expect("a page");
    let failed = |call| move |code| OpaqueError::Device(gpu.failed(call, nowhere, code));
    let mut external = vk::ExternalMemoryBufferCreateInfo::default().handle_types(EXTERNAL);
    let info = vk::BufferCreateInfo::default().size(size).usage(usage).push_next(&mut external);
    let buffer = OwnedBuffer::new(gpu, &info, "opaque import").map_err(failed("vkCreateBuffer"))?;
    let (needs, memory_type) = (buffer.requirements(), exported.memory_type);
    if memory_type >= gpu.memory.memory_type_count || needs.memory_type_bits & (1 << memory_type) == 0 {
        return Err(OpaqueError::MemoryType { memory_type, allowed: needs.memory_type_bits });
    }
    if needs.size > exported.size {
        return Err(OpaqueError::TooSmall { size, needed: needs.size, available: exported.size });
    }
    let heap = gpu.memory.memory_types[memory_type as usize].heap_index;
    let share = Share::take(gpu, nowhere, heap, exported.size)?;

    let fd = fd.into_raw_fd();
    let mut from = vk::ImportMemoryFdInfoKHR::default().handle_type(EXTERNAL).fd(fd);
    let mut flags = vk::MemoryAllocateFlagsInfo::default().flags(vk::MemoryAllocateFlags::DEVICE_ADDRESS);
    let mut info = vk::MemoryAllocateInfo::default()
        .allocation_size(exported.size)
        .memory_type_index(memory_type)
        .push_next(&mut from);
    if gpu.context.buffer_device_address {
        info = info.push_next(&mut flags);
    }
    // SAFETY: `fd` stands for memory of this device and driver (compared above), of this size and type (contract); the driver owns it if it says yes.
    let memory = unsafe { OwnedMemory::new(share, &info, "opaque import") };
    let memory = memory.inspect_err(|_| {
        // SAFETY: the driver has refused, so the descriptor is still ours, and nobody else knows it.
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
    });
    let memory = memory.map_err(failed("vkAllocateMemory (import of an opaque descriptor)"))?;
    // SAFETY: the buffer is new and unbound, fits by size and type (checked above), both were made for the same handle type, and the memory is
    // dropped after the buffer.
    unsafe { buffer.bind(memory.raw, 0) }.map_err(failed("vkBindBufferMemory"))?;
    Ok(OpaqueBuffer { buffer, _memory: memory, size })
}
