//! What a device says of itself. Nothing here decides alone: capability sources contradict each other, so a trial import has the last word.

use std::fmt;

use ash::{ext, khr, vk};
use pinfold_invalidate::page_size;

use crate::DeviceContext;

/// Imports and their chunks stay below this size: one driver in use takes sizes of 32 bits, another refuses from exactly 1 GiB on.
const LARGEST_CHUNK: u64 = 1 << 30;
/// Chunks end at multiples of this, the size of a huge page, wherever the limits allow such chunks.
const CHUNK_EDGE: u64 = 2 << 20;

/// What the device and its driver are and can, with the reason where they can't.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Capabilities {
    /// Name of the device.
    pub device_name: String,
    /// Kind of device. A [`CPU`](vk::PhysicalDeviceType::CPU) device goes through the program's page tables, so that a private mapping
    /// which vanishes under running work crashes the process.
    pub device_type: vk::PhysicalDeviceType,
    /// Version of Vulkan that the device has.
    pub api_version: u32,
    /// Identity of the driver, where the driver tells.
    pub driver_id: Option<vk::DriverId>,
    /// Name of the driver, where the driver tells; else empty.
    pub driver_name: String,
    /// The driver's own text about itself, where it tells; else empty.
    pub driver_info: String,
    /// Whether host memory can be imported.
    pub import: Support,
    /// Whether dma-bufs can be imported (`VK_EXT_external_memory_dma_buf`).
    pub dmabuf: Support,
    /// Whether images can be made over them whose pixels lie as a DRM format modifier says (`VK_EXT_image_drm_format_modifier`).
    pub modifiers: Support,
    /// Whether the driver tells how much memory is left.
    pub memory_budget: Support,
    /// Pointers and sizes of imports are multiples of this, in bytes (`minImportedHostPointerAlignment`). 1 without import.
    pub import_alignment: u64,
    /// The largest part of a range that is imported or mirrored in one piece, in bytes.
    pub chunk_size: u64,
    /// The most memory allocations alive at a time (`maxMemoryAllocationCount`).
    pub max_allocations: u32,
    /// The largest part of a buffer that a shader sees through one storage-buffer binding, in bytes.
    pub max_storage_buffer_range: u32,
}

/// Whether something can be used, and if not, why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Support {
    /// It can.
    Usable,
    /// The device was made without this extension; it may not have it.
    NotEnabled(&'static str),
}

impl fmt::Display for Support {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usable => f.write_str("usable"),
            Self::NotEnabled(extension) => write!(f, "the device was made without {extension}"),
        }
    }
}

impl Capabilities {
    /// Asks the device.
    ///
    /// # Safety
    /// `context` is what it says: live handles that belong together, and the extensions that were enabled.
    pub(crate) unsafe fn read(context: &DeviceContext) -> Self {
        let enabled = |name| context.extensions.contains(&name);
        // SAFETY: both handles are live and belong together (contract).
        let plain = unsafe { context.instance.get_physical_device_properties(context.physical) };
        let v1_2 = plain.api_version >= vk::API_VERSION_1_2;
        let v1_3 = plain.api_version >= vk::API_VERSION_1_3;

        let mut host = vk::PhysicalDeviceExternalMemoryHostPropertiesEXT::default();
        let mut driver = vk::PhysicalDeviceDriverProperties::default();
        let mut maintenance3 = vk::PhysicalDeviceMaintenance3Properties::default();
        let mut maintenance4 = vk::PhysicalDeviceMaintenance4Properties::default();
        let mut properties = vk::PhysicalDeviceProperties2::default().push_next(&mut maintenance3);
        let imports = enabled(ext::external_memory_host::NAME);
        if imports {
            properties = properties.push_next(&mut host);
        }
        if v1_2 || enabled(khr::driver_properties::NAME) {
            properties = properties.push_next(&mut driver);
        }
        if v1_3 || enabled(khr::maintenance4::NAME) {
            properties = properties.push_next(&mut maintenance4);
        }
        // SAFETY: as above, and the chain holds only structures this device knows by its version (1.1 at least) or enabled extensions.
        unsafe { context.instance.get_physical_device_properties2(context.physical, &mut properties) };

        let alignment = if imports { host.min_imported_host_pointer_alignment.max(1) } else { 1 };
        let support = |name, text| if enabled(name) { Support::Usable } else { Support::NotEnabled(text) };
        let text =
            |text: Result<&std::ffi::CStr, _>| text.map(|t| t.to_string_lossy().into_owned()).unwrap_or_default();
        Self {
            device_name: text(plain.device_name_as_c_str()),
            device_type: plain.device_type,
            api_version: plain.api_version,
            driver_id: (driver.driver_id != vk::DriverId::default()).then_some(driver.driver_id),
            driver_name: text(driver.driver_name_as_c_str()),
            driver_info: text(driver.driver_info_as_c_str()),
            import: support(ext::external_memory_host::NAME, "VK_EXT_external_memory_host"),
            dmabuf: support(ext::external_memory_dma_buf::NAME, "VK_EXT_external_memory_dma_buf"),
            modifiers: support(ext::image_drm_format_modifier::NAME, "VK_EXT_image_drm_format_modifier"),
            memory_budget: support(ext::memory_budget::NAME, "VK_EXT_memory_budget"),
            import_alignment: alignment,
            chunk_size: chunk_size(
                maintenance3.max_memory_allocation_size,
                maintenance4.max_buffer_size,
                alignment.max(page_size() as u64),
            ),
            max_allocations: plain.limits.max_memory_allocation_count,
            max_storage_buffer_range: plain.limits.max_storage_buffer_range,
        }
    }
}

/// The largest size that is a multiple of `alignment`, *below* 1 GiB and below both limits (0: the driver doesn't tell), and a multiple of
/// [`CHUNK_EDGE`] if it is larger than that.
fn chunk_size(max_allocation: u64, max_buffer: u64, alignment: u64) -> u64 {
    let limit = [max_allocation, max_buffer].into_iter().filter(|&limit| limit > 0).fold(LARGEST_CHUNK, u64::min);
    let edge = if limit > CHUNK_EDGE { CHUNK_EDGE.max(alignment) } else { alignment };
    let below = (limit - 1) / edge * edge;
    below.max(alignment)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_lie_below_every_limit() {
        let mib = 1 << 20;
        assert_eq!(chunk_size(0, 0, 4096), 1022 * mib);
        assert_eq!(chunk_size(1 << 30, 1 << 30, 4096), 1022 * mib); // a driver that refuses exactly 1 GiB
        assert_eq!(chunk_size(1 << 31, 0xffff_ffff, 4096), 1022 * mib);
        assert_eq!(chunk_size(64 * mib, 0, 65536), 62 * mib);
        assert_eq!(chunk_size(mib, 0, 65536), mib - 65536);
        assert_eq!(chunk_size(65536, 0, 65536), 65536); // no smaller one exists
    }
}
