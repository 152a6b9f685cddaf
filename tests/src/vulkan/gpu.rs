//! The instance, the device, and the ear for messages.

use std::ffi::{CStr, c_void};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use ash::{ext, vk};
use pinfold_vulkan::{DeviceContext, Timeline, requirements};

use super::scan::Scan;
use super::{Driver, Job, Scratch};

const VALIDATION: &CStr = c"VK_LAYER_KHRONOS_validation";

/// A device of the driver under test. Clones are the same device; it goes, and must have had no message, when the last one does.
#[derive(Debug, Clone)]
pub struct Gpu(Arc<Inner>);

struct Inner {
    driver: Driver,
    /// Keeps the loader's library alive.
    _entry: ash::Entry,
    instance: ash::Instance,
    physical: vk::PhysicalDevice,
    device: ash::Device,
    extensions: Vec<&'static CStr>,
    debug: ext::debug_utils::Instance,
    messenger: vk::DebugUtilsMessengerEXT,
    messages: Arc<Mutex<Vec<String>>>,
    /// The queue takes one submit at a time.
    queue: Mutex<vk::Queue>,
    /// The pool, held while something is recorded from it.
    pool: Mutex<vk::CommandPool>,
    /// All semaphores. The library may still be looking at those of finished jobs, so they go with the device.
    semaphores: Mutex<Vec<vk::Semaphore>>,
    /// Those of finished jobs, each with the value to be signalled next.
    spare: Mutex<Vec<Timeline>>,
    scan: Scan,
}

impl Gpu {
    /// Makes an instance with the validation layer on, and a device with all that Pinfold asks for.
    ///
    /// # Errors
    /// What is missing, as a sentence for [`skip!`](crate::skip).
    ///
    /// # Panics
    /// If the driver is there and doesn't work.
    pub fn new() -> Result<Self, String> {
        let driver = Driver::chosen()?;
        // SAFETY: the library is the Vulkan loader, whose initialisation has no conditions.
        let entry = unsafe { ash::Entry::load() }.map_err(|e| format!("no Vulkan loader: {e}"))?;
        // SAFETY: the call has no conditions.
        let layers = unsafe { entry.enumerate_instance_layer_properties() }.expect("the loader lists layers");
        if !layers.iter().any(|layer| layer.layer_name_as_c_str() == Ok(VALIDATION)) {
            return Err("the validation layer is missing; scripts/setup installs it".into());
        }
        let messages = Arc::new(Mutex::new(Vec::new()));
        let mut ear = ear(&messages);
        let (layers, names) = ([VALIDATION.as_ptr()], [ext::debug_utils::NAME.as_ptr()]);
        let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_2);
        let info = vk::InstanceCreateInfo::default()
            .application_info(&application)
            .enabled_layer_names(&layers)
            .enabled_extension_names(&names)
            .push_next(&mut ear);
        // SAFETY: what `info` points to lives until the end of this function, and the messages as long as the instance.
        let instance = unsafe { entry.create_instance(&info, None) }.map_err(|e| format!("no Vulkan instance: {e}"))?;
        let debug = ext::debug_utils::Instance::new(&entry, &instance);
        // SAFETY: as above.
        let messenger =
            unsafe { debug.create_debug_utils_messenger(&self::ear(&messages), None) }.expect("a messenger");
        let physical = physical_device(&instance, driver);
        let wanted = requirements(&instance, physical).expect("the drivers have what Pinfold asks for");
        let (names, mut features) = (wanted.extension_names(), wanted.features());
        // The drivers have one family, which does everything.
        let queues = [vk::DeviceQueueCreateInfo::default().queue_family_index(0).queue_priorities(&[1.0])];
        let info = vk::DeviceCreateInfo::default().queue_create_infos(&queues).enabled_extension_names(&names);
        let info = features.push(info);
        // SAFETY: `physical` is the instance's, and what `info` points to lives until the end of this function.
        let device = unsafe { instance.create_device(physical, &info, None) }.expect("a device");
        // SAFETY: the device was made with this queue.
        let queue = unsafe { device.get_device_queue(0, 0) };
        // SAFETY: the device is alive, as it is in every call until `Inner` is dropped.
        let pool = unsafe { device.create_command_pool(&vk::CommandPoolCreateInfo::default(), None) }.expect("a pool");
        let scan = Scan::new(&device);
        let mut extensions = wanted.extensions().to_vec();
        extensions.push(ext::debug_utils::NAME);
        Ok(Self(Arc::new(Inner {
            driver,
            _entry: entry,
            instance,
            physical,
            device,
            extensions,
            debug,
            messenger,
            messages,
            queue: Mutex::new(queue),
            pool: Mutex::new(pool),
            semaphores: Mutex::default(),
            spare: Mutex::default(),
            scan,
        })))
    }

    /// The driver it belongs to.
    #[must_use]
    pub fn driver(&self) -> Driver {
        self.0.driver
    }

    /// The handles, for a manager. The manager must be gone before the last clone of this is.
    #[must_use]
    pub fn context(&self) -> DeviceContext {
        DeviceContext {
            instance: self.0.instance.clone(),
            physical: self.0.physical,
            device: self.0.device.clone(),
            extensions: self.0.extensions.clone(),
            buffer_device_address: false,
        }
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &ash::Device {
        &self.0.device
    }

    /// The queue, for one submit.
    pub fn queue(&self) -> MutexGuard<'_, vk::Queue> {
        self.0.queue.lock().expect("nothing panics under this lock")
    }

    /// A buffer of the test's own that the host can see, with these bytes in it.
    #[must_use]
    pub fn scratch(&self, bytes: &[u8]) -> Scratch {
        Scratch::new(self, bytes)
    }

    /// A job that copies `size` bytes, `offset` bytes into the buffer, to where the host can see them; `rounds` times, to take its time.
    #[must_use]
    pub fn copy_job(&self, buffer: vk::Buffer, offset: u64, size: u64, rounds: u32) -> Job {
        Job::copy(self, buffer, offset, size, rounds)
    }

    /// A job that reads the bytes `rounds` times, and counts the words that were not `expected` in any round.
    #[must_use]
    pub fn scan_job(&self, buffer: vk::Buffer, offset: u64, size: u64, expected: u32, rounds: u32) -> Job {
        Job::scan(self, buffer, offset, size, expected, rounds)
    }

    /// A job that writes `word` to all of the bytes.
    #[must_use]
    pub fn fill_job(&self, buffer: vk::Buffer, offset: u64, size: u64, word: u32) -> Job {
        Job::fill(self, buffer, offset, size, word)
    }

    /// The messages so far; the test answers for them, and they don't fail it any more.
    #[must_use]
    pub fn take_messages(&self) -> Vec<String> {
        std::mem::take(&mut self.0.messages.lock().expect("nothing panics under this lock"))
    }

    /// A timeline that has not reached this value, which is the user's to signal.
    pub(super) fn timeline(&self) -> Timeline {
        if let Some(spare) = self.0.spare.lock().expect("nothing panics under this lock").pop() {
            return spare;
        }
        let mut kind = vk::SemaphoreTypeCreateInfo::default().semaphore_type(vk::SemaphoreType::TIMELINE);
        let info = vk::SemaphoreCreateInfo::default().push_next(&mut kind);
        // SAFETY: the device has timeline semaphores: Pinfold asks for them.
        let semaphore = unsafe { self.0.device.create_semaphore(&info, None) }.expect("a semaphore");
        self.0.semaphores.lock().expect("nothing panics under this lock").push(semaphore);
        Timeline { semaphore, value: 1 }
    }

    /// Takes back what a job that is over was made of.
    pub(super) fn reuse(&self, commands: vk::CommandBuffer, timelines: impl IntoIterator<Item = Timeline>) {
        let next = |Timeline { semaphore, value }| Timeline { semaphore, value: value + 1 };
        self.0.spare.lock().expect("nothing panics under this lock").extend(timelines.into_iter().map(next));
        let pool = self.0.pool.lock().expect("nothing panics under this lock");
        // SAFETY: they are of this pool, which is this thread's while it holds the lock, and nothing executes them any more.
        unsafe { self.0.device.free_command_buffers(*pool, &[commands]) };
    }

    pub(super) fn scan(&self) -> &Scan {
        &self.0.scan
    }

    /// Records commands, and a barrier behind them that makes what they wrote visible to the host.
    pub(super) fn record(&self, commands: impl FnOnce(vk::CommandBuffer)) -> vk::CommandBuffer {
        let pool = self.0.pool.lock().expect("nothing panics under this lock");
        let info = vk::CommandBufferAllocateInfo::default().command_pool(*pool).command_buffer_count(1);
        // SAFETY: the pool is this thread's while it holds the lock, here and below.
        let buffer = unsafe { self.0.device.allocate_command_buffers(&info) }.expect("a command buffer")[0];
        // SAFETY: the buffer is new.
        unsafe { self.0.device.begin_command_buffer(buffer, &vk::CommandBufferBeginInfo::default()) }.expect("begun");
        commands(buffer);
        self.barrier(buffer, vk::PipelineStageFlags::HOST, vk::AccessFlags::HOST_READ);
        // SAFETY: it is being recorded.
        unsafe { self.0.device.end_command_buffer(buffer) }.expect("recorded");
        buffer
    }

    /// Everything before is over, and visible to the given access behind.
    pub(super) fn barrier(&self, buffer: vk::CommandBuffer, stage: vk::PipelineStageFlags, access: vk::AccessFlags) {
        let all = vk::PipelineStageFlags::TRANSFER | vk::PipelineStageFlags::COMPUTE_SHADER;
        let memory =
            [vk::MemoryBarrier::default().src_access_mask(vk::AccessFlags::MEMORY_WRITE).dst_access_mask(access)];
        // SAFETY: the buffer is being recorded, outside a render pass.
        unsafe {
            self.0.device.cmd_pipeline_barrier(buffer, all, stage, vk::DependencyFlags::empty(), &memory, &[], &[])
        };
    }
}

/// The instance's device of this driver.
fn physical_device(instance: &ash::Instance, driver: Driver) -> vk::PhysicalDevice {
    // SAFETY: the instance is alive.
    let devices = unsafe { instance.enumerate_physical_devices() }.expect("the loader lists devices");
    let mut names = Vec::new();
    for device in devices {
        let mut identity = vk::PhysicalDeviceDriverProperties::default();
        let mut properties = vk::PhysicalDeviceProperties2::default().push_next(&mut identity);
        // SAFETY: the device is the instance's, and knows this structure since Vulkan 1.2.
        unsafe { instance.get_physical_device_properties2(device, &mut properties) };
        if identity.driver_id == driver.id() {
            return device;
        }
        names.push(identity.driver_id);
    }
    panic!("{driver:?} is to be tested, and the loader offers {names:?}");
}

/// Hears warnings and errors of the layer, the loader and the driver.
fn ear(messages: &Arc<Mutex<Vec<String>>>) -> vk::DebugUtilsMessengerCreateInfoEXT<'static> {
    use vk::{DebugUtilsMessageSeverityFlagsEXT as Severity, DebugUtilsMessageTypeFlagsEXT as Kind};
    vk::DebugUtilsMessengerCreateInfoEXT::default()
        .message_severity(Severity::WARNING | Severity::ERROR)
        .message_type(Kind::VALIDATION | Kind::PERFORMANCE | Kind::GENERAL)
        .pfn_user_callback(Some(hear))
        .user_data(Arc::as_ptr(messages).cast_mut().cast())
}

unsafe extern "system" fn hear(
    _: vk::DebugUtilsMessageSeverityFlagsEXT,
    _: vk::DebugUtilsMessageTypeFlagsEXT,
    data: *const vk::DebugUtilsMessengerCallbackDataEXT<'_>,
    messages: *mut c_void,
) -> vk::Bool32 {
    // SAFETY: the pointer that `ear` gave; `Gpu::new` and then `Inner` hold the messages for as long as the instance lives.
    let messages = unsafe { &*messages.cast::<Mutex<Vec<String>>>() };
    // SAFETY: the loader gives a valid structure for the time of the call.
    let data = unsafe { &*data };
    // SAFETY: as its text.
    let text = unsafe { data.message_as_c_str() }.unwrap_or_default().to_string_lossy().into_owned();
    messages.lock().expect("nothing panics under this lock").push(text);
    vk::FALSE
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: this was the last clone, so no other thread uses the queue.
        unsafe { self.device.device_wait_idle() }.expect("the work of a test ends");
        self.scan.destroy(&self.device);
        for semaphore in self.semaphores.get_mut().expect("nothing panics under this lock").drain(..) {
            // SAFETY: the device is idle, and the manager that may have waited for it is gone.
            unsafe { self.device.destroy_semaphore(semaphore, None) };
        }
        // SAFETY: the device is idle.
        unsafe {
            self.device.destroy_command_pool(*self.pool.get_mut().expect("nothing panics under this lock"), None)
        };
        // SAFETY: all that was made of it is destroyed; if not, the layer says so.
        unsafe { self.device.destroy_device(None) };
        // SAFETY: nobody uses the messenger any more; the instance has an ear of its own for its end.
        unsafe { self.debug.destroy_debug_utils_messenger(self.messenger, None) };
        // SAFETY: the device is destroyed.
        unsafe { self.instance.destroy_instance(None) };
        let messages = self.messages.lock().expect("nothing panics under this lock");
        assert!(messages.is_empty() || std::thread::panicking(), "the validation layer says: {messages:#?}");
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner").field("driver", &self.driver).finish_non_exhaustive()
    }
}
