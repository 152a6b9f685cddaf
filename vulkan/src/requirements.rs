//! What a device must be made with, asked before it is made.
//!
//! Nothing is indispensable but Vulkan 1.1. What else is present is taken, and what isn't is done without: no import, for example, means
//! mirrors, and no timeline semaphores mean that submits end with fences.
//!
//! An extension that a later core version absorbed is asked for wherever the device still lists it. It costs nothing, and its commands
//! are then there even if the instance was made for an older version than the device has.

use std::ffi::{CStr, c_char};

use ash::{ext, khr, vk};

use crate::SetupError;

/// Extensions and features to make a device with. From [`requirements`].
#[derive(Debug, Clone)]
pub struct Requirements {
    extensions: Vec<&'static CStr>,
    device: String,
    timeline: bool,
    address_extension: Option<&'static CStr>,
    address_supported: bool,
    address: bool,
}

/// What `physical` must be made a device with. The instance must have been made for Vulkan 1.1 or later.
///
/// ```no_run
/// # fn f(instance: &ash::Instance, physical: ash::vk::PhysicalDevice, queues: &[ash::vk::DeviceQueueCreateInfo]) -> Result<(), pinfold_vulkan::SetupError> {
/// let wanted = pinfold_vulkan::requirements(instance, physical)?;
/// let (names, mut features) = (wanted.extension_names(), wanted.features());
/// let info = ash::vk::DeviceCreateInfo::default().queue_create_infos(queues).enabled_extension_names(&names);
/// let info = features.push(info);
/// # Ok(()) }
/// ```
///
/// # Errors
/// [`SetupError::ForeignPhysicalDevice`]; [`SetupError::Vulkan`] if a query fails.
pub fn requirements(instance: &ash::Instance, physical: vk::PhysicalDevice) -> Result<Requirements, SetupError> {
    // SAFETY: an `ash::Instance` stands for a live instance until the owner destroys it, which is the owner's unsafe call.
    let siblings = unsafe { instance.enumerate_physical_devices() };
    let siblings = siblings.map_err(|code| SetupError::Vulkan { call: "vkEnumeratePhysicalDevices", code })?;
    if !siblings.contains(&physical) {
        return Err(SetupError::ForeignPhysicalDevice);
    }
    let listed = Listed::of(instance, physical)?;
    // SAFETY: `physical` is one of the instance's, as checked above.
    let properties = unsafe { instance.get_physical_device_properties(physical) };
    let device = properties.device_name_as_c_str().unwrap_or_default().to_string_lossy().into_owned();
    let (v1_1, v1_2) = (properties.api_version >= vk::API_VERSION_1_1, properties.api_version >= vk::API_VERSION_1_2);

    let timeline_known = v1_2 || listed.has(khr::timeline_semaphore::NAME);
    let address_known = v1_2 || listed.has(khr::buffer_device_address::NAME);
    let mut timeline = vk::PhysicalDeviceTimelineSemaphoreFeatures::default();
    let mut address = vk::PhysicalDeviceBufferDeviceAddressFeatures::default();
    let mut features = vk::PhysicalDeviceFeatures2::default();
    if timeline_known {
        features = features.push_next(&mut timeline);
    }
    if address_known {
        features = features.push_next(&mut address);
    }
    // SAFETY: `physical` is the instance's, and the chain holds only structures that this device knows by its version or extensions.
    unsafe { instance.get_physical_device_features2(physical, &mut features) };

    let mut extensions = Vec::new();
    if !v1_1 {
        extensions.extend(listed.name(khr::external_memory::NAME));
    }
    // By itself this one brings memory of other devices; the second is useless without it, and the third matters with both.
    extensions.extend(listed.name(khr::external_memory_fd::NAME));
    if [khr::external_memory_fd::NAME, ext::external_memory_dma_buf::NAME].into_iter().all(|name| listed.has(name)) {
        let dmabuf = [ext::external_memory_dma_buf::NAME, ext::queue_family_foreign::NAME];
        extensions.extend(dmabuf.into_iter().filter_map(|name| listed.name(name)));
        // Its own requirement is part of Vulkan from 1.2 on.
        if v1_2 || listed.has(khr::image_format_list::NAME) {
            let images = [ext::image_drm_format_modifier::NAME, khr::image_format_list::NAME];
            extensions.extend(images.into_iter().filter_map(|name| listed.name(name)));
        }
    }
    for name in [ext::external_memory_host::NAME, khr::timeline_semaphore::NAME, ext::memory_budget::NAME] {
        extensions.extend(listed.name(name));
    }
    Ok(Requirements {
        extensions,
        device,
        timeline: timeline.timeline_semaphore == vk::TRUE,
        address_extension: listed.name(khr::buffer_device_address::NAME),
        address_supported: address.buffer_device_address == vk::TRUE,
        address: false,
    })
}

impl Requirements {
    /// Asks for buffer device addresses too, so that imports can be used by address.
    ///
    /// # Errors
    /// [`SetupError::Unsupported`] if the device has none.
    pub fn with_buffer_device_address(mut self) -> Result<Self, SetupError> {
        if !self.address_supported {
            return Err(SetupError::Unsupported { device: self.device, feature: "buffer device addresses" });
        }
        if !self.address {
            self.extensions.extend(self.address_extension);
            self.address = true;
        }
        Ok(self)
    }

    /// Whether the device has timeline semaphores. Without them, submits end with fences ([`Signal::Fence`](crate::Signal::Fence)).
    #[must_use]
    pub fn timeline_semaphores(&self) -> bool {
        self.timeline
    }

    /// The names of the device extensions to enable.
    #[must_use]
    pub fn extensions(&self) -> &[&'static CStr] {
        &self.extensions
    }

    /// The same names as `vkCreateDevice` takes them.
    #[must_use]
    pub fn extension_names(&self) -> Vec<*const c_char> {
        self.extensions.iter().map(|name| name.as_ptr()).collect()
    }

    /// Whether buffer device addresses were asked for.
    #[must_use]
    pub fn buffer_device_address(&self) -> bool {
        self.address
    }

    /// The features to enable, as structures for the `pNext` chain of `vkCreateDevice`.
    ///
    /// A program whose chain holds a `VkPhysicalDeviceVulkan12Features` must not chain these too (VUID-VkDeviceCreateInfo-pNext-02830):
    /// it sets `timelineSemaphore`, and `bufferDeviceAddress` if it asked for that, in its own structure.
    #[must_use]
    pub fn features(&self) -> Features {
        let timeline = vk::PhysicalDeviceTimelineSemaphoreFeatures::default().timeline_semaphore(true);
        let address = vk::PhysicalDeviceBufferDeviceAddressFeatures::default().buffer_device_address(true);
        Features { timeline: self.timeline.then_some(timeline), address: self.address.then_some(address) }
    }
}

/// Feature structures that `vkCreateDevice` reads. From [`Requirements::features`].
#[derive(Debug)]
pub struct Features {
    timeline: Option<vk::PhysicalDeviceTimelineSemaphoreFeatures<'static>>,
    address: Option<vk::PhysicalDeviceBufferDeviceAddressFeatures<'static>>,
}

impl Features {
    /// `info` with the features in its chain.
    pub fn push<'a>(&'a mut self, info: vk::DeviceCreateInfo<'a>) -> vk::DeviceCreateInfo<'a> {
        let info = match &mut self.timeline {
            Some(timeline) => info.push_next(timeline),
            None => info,
        };
        match &mut self.address {
            Some(address) => info.push_next(address),
            None => info,
        }
    }
}

/// The extensions that a physical device lists.
pub(crate) struct Listed(Vec<vk::ExtensionProperties>);

impl Listed {
    /// `physical` must be one of the instance's.
    fn of(instance: &ash::Instance, physical: vk::PhysicalDevice) -> Result<Self, SetupError> {
        // SAFETY: `physical` is one of the instance's; the caller has made sure.
        let listed = unsafe { instance.enumerate_device_extension_properties(physical) };
        listed.map(Self).map_err(|code| SetupError::Vulkan { call: "vkEnumerateDeviceExtensionProperties", code })
    }

    fn has(&self, name: &CStr) -> bool {
        self.0.iter().any(|listed| listed.extension_name_as_c_str() == Ok(name))
    }

    fn name(&self, name: &'static CStr) -> Option<&'static CStr> {
        self.has(name).then_some(name)
    }
}
