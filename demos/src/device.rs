//! The Vulkan device that the demos draw with: no window, one queue, every feature that an import needs.
//!
//! Which drivers there are is the Vulkan loader's business (`VK_DRIVER_FILES`); of their devices the fastest kind is taken, or the first
//! whose name contains a given text.

use std::ffi::{CStr, c_void};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail};
use ash::{Entry, ext, vk};
use pinfold_vulkan::DeviceContext;

const VALIDATION: &CStr = c"VK_LAYER_KHRONOS_validation";

/// Whether the validation layer looks on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validation {
    /// If it is installed.
    Wanted,
    /// No.
    Off,
}

/// A device with one queue that draws. Everything made from it must be gone before it is dropped.
pub struct Gpu {
    /// The device's functions.
    pub device: ash::Device,
    /// The instance's functions.
    pub instance: ash::Instance,
    /// The physical device.
    pub physical: vk::PhysicalDevice,
    /// What it says of itself.
    pub properties: vk::PhysicalDeviceProperties,
    /// Its memory types.
    pub memory: vk::PhysicalDeviceMemoryProperties,
    /// The queue. The demos submit from one thread only.
    pub queue: vk::Queue,
    /// The queue's family.
    pub family: u32,
    /// The extensions that are enabled.
    pub extensions: Vec<&'static CStr>,
    /// Indices of one byte can be bound as they are.
    pub byte_indices: bool,
    debug: Option<(ext::debug_utils::Instance, vk::DebugUtilsMessengerEXT)>,
    messages: Box<AtomicU64>,
    // The loader's library stays open as long as its functions are called.
    _entry: Entry,
}

impl Gpu {
    /// Opens a device.
    ///
    /// # Errors
    /// No loader, no driver, no device that can draw, or none whose name contains `name`.
    pub fn open(name: Option<&str>, validation: Validation) -> Result<Self> {
        Self::open_fitting(validation, |_, its_name| name.is_none_or(|name| its_name.contains(name)))
    }

    /// How many devices there are.
    ///
    /// # Errors
    /// No loader, or no driver.
    pub fn count() -> Result<usize> {
        let entry = loader()?;
        let (instance, _) = make_instance(&entry, Validation::Off, &AtomicU64::new(0))?;
        // SAFETY: a query without preconditions.
        let all = unsafe { instance.enumerate_physical_devices() };
        // SAFETY: it has no children.
        unsafe { instance.destroy_instance(None) };
        Ok(all?.len())
    }

    /// The handles, for a manager. The manager must be gone before this is dropped.
    #[must_use]
    pub fn context(&self) -> DeviceContext {
        DeviceContext {
            instance: self.instance.clone(),
            physical: self.physical,
            device: self.device.clone(),
            extensions: self.extensions.clone(),
            buffer_device_address: false,
        }
    }

    /// Opens the device that the loader lists at `index`, from 0.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_at(index: usize, validation: Validation) -> Result<Self> {
        Self::open_fitting(validation, |at, _| at == index)
    }

    fn open_fitting(validation: Validation, fits: impl Fn(usize, &str) -> bool) -> Result<Self> {
        let entry = loader()?;
        let messages = Box::new(AtomicU64::new(0));
        let (instance, debug) = make_instance(&entry, validation, &messages)?;
        // From here on a failure leaks the instance, and the program ends.
        let (physical, properties, family) = choose(&instance, fits)?;

        let has = |wanted: &CStr, all: &[vk::ExtensionProperties]| {
            all.iter().any(|e| e.extension_name_as_c_str().is_ok_and(|name| name == wanted))
        };
        // SAFETY: `physical` comes from `instance`.
        let available = unsafe { instance.enumerate_device_extension_properties(physical) }?;
        let wanted = pinfold_vulkan::requirements(&instance, physical)?;
        let mut extensions = wanted.extensions().to_vec();
        let mut bytes = vk::PhysicalDeviceIndexTypeUint8FeaturesEXT::default();
        let mut all = vk::PhysicalDeviceFeatures2::default();
        let ask_bytes = has(ext::index_type_uint8::NAME, &available);
        if ask_bytes {
            all = all.push_next(&mut bytes);
        }
        // SAFETY: `physical` comes from `instance`, which is of version 1.1, and the chain holds one known structure.
        unsafe { instance.get_physical_device_features2(physical, &mut all) };
        let features = vk::PhysicalDeviceFeatures {
            // Indices aren't read by the CPU, so nobody checks them but this feature, which every device has.
            robust_buffer_access: vk::TRUE,
            full_draw_index_uint32: all.features.full_draw_index_uint32,
            ..Default::default()
        };
        let byte_indices = ask_bytes && bytes.index_type_uint8 == vk::TRUE;
        if byte_indices {
            extensions.push(ext::index_type_uint8::NAME);
        }

        let priority = [1.0];
        let queues = [vk::DeviceQueueCreateInfo::default().queue_family_index(family).queue_priorities(&priority)];
        let names: Vec<_> = extensions.iter().map(|name| name.as_ptr()).collect();
        let mut bytes = vk::PhysicalDeviceIndexTypeUint8FeaturesEXT::default().index_type_uint8(true);
        let mut info = vk::DeviceCreateInfo::default()
            .queue_create_infos(&queues)
            .enabled_extension_names(&names)
            .enabled_features(&features);
        if byte_indices {
            info = info.push_next(&mut bytes);
        }
        let mut chain = wanted.features();
        let info = chain.push(info);
        // SAFETY: `info` names extensions and features that the device has, and all it points to is alive.
        let device = unsafe { instance.create_device(physical, &info, None) }?;
        // SAFETY: the device was made with one queue of this family.
        let queue = unsafe { device.get_device_queue(family, 0) };
        // SAFETY: `physical` comes from `instance`.
        let memory = unsafe { instance.get_physical_device_memory_properties(physical) };
        Ok(Self {
            device,
            instance,
            physical,
            properties,
            memory,
            queue,
            family,
            extensions,
            byte_indices,
            debug,
            messages,
            _entry: entry,
        })
    }

    /// The device's name.
    #[must_use]
    pub fn name(&self) -> String {
        self.properties.device_name_as_c_str().map_or_else(|_| "?".into(), |name| name.to_string_lossy().into_owned())
    }

    /// Whether it is a program on the CPU, which reads memory through this process's page tables.
    #[must_use]
    pub fn is_cpu(&self) -> bool {
        self.properties.device_type == vk::PhysicalDeviceType::CPU
    }

    /// Whether the validation layer looks on.
    #[must_use]
    pub fn is_validated(&self) -> bool {
        self.debug.is_some()
    }

    /// How many errors and warnings the validation layer has had.
    #[must_use]
    pub fn messages(&self) -> u64 {
        self.messages.load(Ordering::Relaxed)
    }

    /// The first memory type in `bits` with all of `flags`.
    #[must_use]
    pub fn memory_type(&self, bits: u32, flags: vk::MemoryPropertyFlags) -> Option<u32> {
        let types = self.memory.memory_types_as_slice();
        let fits = |i: u32| bits & (1 << i) != 0 && types[i as usize].property_flags.contains(flags);
        (0..self.memory.memory_type_count).find(|&i| fits(i))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // SAFETY: the device is alive; a failure means that it is lost, and then nothing runs.
        let _ = unsafe { self.device.device_wait_idle() };
        // SAFETY: nothing runs, and whoever made children of the device has destroyed them (the type's contract).
        unsafe { self.device.destroy_device(None) };
        if let Some((debug, messenger)) = self.debug.take() {
            // SAFETY: the messenger was made from this instance and is destroyed once.
            unsafe { debug.destroy_debug_utils_messenger(messenger, None) };
        }
        // SAFETY: all children of the instance are destroyed.
        unsafe { self.instance.destroy_instance(None) };
    }
}

type Debug = Option<(ext::debug_utils::Instance, vk::DebugUtilsMessengerEXT)>;

fn make_instance(entry: &Entry, validation: Validation, messages: &AtomicU64) -> Result<(ash::Instance, Debug)> {
    // SAFETY: a query without preconditions.
    let version = unsafe { entry.try_enumerate_instance_version() }?.unwrap_or(vk::API_VERSION_1_0);
    if version < vk::API_VERSION_1_1 {
        bail!("the Vulkan loader is of version 1.0; 1.1 is needed");
    }
    // SAFETY: a query without preconditions.
    let layers = unsafe { entry.enumerate_instance_layer_properties() }?;
    let installed = layers.iter().any(|layer| layer.layer_name_as_c_str().is_ok_and(|name| name == VALIDATION));
    let validate = installed && validation == Validation::Wanted;
    let (layers, extensions) = match validate {
        true => (vec![VALIDATION.as_ptr()], vec![ext::debug_utils::NAME.as_ptr()]),
        false => (vec![], vec![]),
    };
    let application = vk::ApplicationInfo::default().application_name(c"pinfold demo").api_version(vk::API_VERSION_1_2);
    let mut to_stderr = vk::DebugUtilsMessengerCreateInfoEXT::default()
        .message_severity(vk::DebugUtilsMessageSeverityFlagsEXT::WARNING | vk::DebugUtilsMessageSeverityFlagsEXT::ERROR)
        .message_type(vk::DebugUtilsMessageTypeFlagsEXT::VALIDATION)
        .pfn_user_callback(Some(on_message))
        .user_data(std::ptr::from_ref(messages).cast_mut().cast());
    let mut info = vk::InstanceCreateInfo::default()
        .application_info(&application)
        .enabled_layer_names(&layers)
        .enabled_extension_names(&extensions);
    if validate {
        info = info.push_next(&mut to_stderr);
    }
    // SAFETY: `info` names a layer and an extension that exist, and all it points to is alive.
    let instance = unsafe { entry.create_instance(&info, None) }.context("no Vulkan driver could be started")?;
    if !validate {
        return Ok((instance, None));
    }
    let debug = ext::debug_utils::Instance::new(entry, &instance);
    to_stderr.p_next = std::ptr::null();
    // SAFETY: the extension is enabled; `messages` is boxed by the caller and outlives the messenger.
    let messenger = unsafe { debug.create_debug_utils_messenger(&to_stderr, None) }?;
    Ok((instance, Some((debug, messenger))))
}

fn loader() -> Result<Entry> {
    // SAFETY: the Vulkan loader's initialisers have no preconditions that a Rust program could break.
    let entry = unsafe { Entry::load() };
    entry.context("there is no Vulkan loader (libvulkan.so.1); on Debian: apt-get install libvulkan1")
}

/// The device that draws: a discrete GPU before an integrated one before a virtual one before a CPU.
fn choose(
    instance: &ash::Instance,
    fits: impl Fn(usize, &str) -> bool,
) -> Result<(vk::PhysicalDevice, vk::PhysicalDeviceProperties, u32)> {
    // SAFETY: a query without preconditions.
    let all = unsafe { instance.enumerate_physical_devices() }?;
    let mut found = Vec::new();
    let mut names = Vec::new();
    for (index, physical) in all.into_iter().enumerate() {
        // SAFETY: `physical` comes from `instance`.
        let properties = unsafe { instance.get_physical_device_properties(physical) };
        // SAFETY: as above.
        let families = unsafe { instance.get_physical_device_queue_family_properties(physical) };
        let family = families.iter().position(|family| family.queue_flags.contains(vk::QueueFlags::GRAPHICS));
        let its_name = properties.device_name_as_c_str().unwrap_or(c"?").to_string_lossy().into_owned();
        let rank = match properties.device_type {
            vk::PhysicalDeviceType::DISCRETE_GPU => 0,
            vk::PhysicalDeviceType::INTEGRATED_GPU => 1,
            vk::PhysicalDeviceType::VIRTUAL_GPU => 2,
            _ => 3,
        };
        if let Some(family) = family
            && fits(index, &its_name)
            && properties.api_version >= vk::API_VERSION_1_1
        {
            found.push((rank, physical, properties, u32::try_from(family)?));
        }
        names.push(its_name);
    }
    let best = found.into_iter().min_by_key(|&(rank, ..)| rank);
    let (_, physical, properties, family) = best.with_context(|| match names.as_slice() {
        [] => "no Vulkan driver offers a device; on Debian: apt-get install mesa-vulkan-drivers".to_owned(),
        _ => format!("none of the devices fits what was asked for, Vulkan 1.1 and drawing: {}", names.join(", ")),
    })?;
    Ok((physical, properties, family))
}

/// Counts a message of the validation layer and prints it.
unsafe extern "system" fn on_message(
    _: vk::DebugUtilsMessageSeverityFlagsEXT,
    _: vk::DebugUtilsMessageTypeFlagsEXT,
    data: *const vk::DebugUtilsMessengerCallbackDataEXT<'_>,
    messages: *mut c_void,
) -> vk::Bool32 {
    // SAFETY: the pointer given at creation is to an AtomicU64 that outlives the instance.
    unsafe { &*messages.cast::<AtomicU64>() }.fetch_add(1, Ordering::Relaxed);
    // SAFETY: the layer passes a valid structure for the time of the call.
    let data = unsafe { &*data };
    if !data.p_message.is_null() {
        // SAFETY: the message is a null-terminated string for the time of the call.
        let text = unsafe { CStr::from_ptr(data.p_message) };
        eprintln!("validation: {}", text.to_string_lossy());
    }
    vk::FALSE
}
