//! The device under test, and what programs do with host memory without Pinfold: import it by hand, or copy it.

mod owned;

use std::cell::{Cell, RefCell};

use anyhow::{Context, Result, bail, ensure};
use ash::{ext, vk};
use gpu_allocator::vulkan::{AllocationCreateDesc, AllocationScheme, Allocator, AllocatorCreateDesc};
use gpu_allocator::{AllocationSizes, AllocatorDebugSettings, MemoryLocation};
use pinfold_demos::device::{Gpu, Validation};
use pinfold_vulkan::{Config, DeviceContext, Force, Manager, Uploads};

pub(crate) use owned::{Commands, Owned, Plain, Staged};

use crate::machine::memory_available;
use crate::report::{Device, Heap, MemoryType};

/// The usages of every buffer that is compared: what a program may want of plain data.
pub(crate) const USAGE: vk::BufferUsageFlags = vk::BufferUsageFlags::from_raw(
    vk::BufferUsageFlags::TRANSFER_SRC.as_raw()
        | vk::BufferUsageFlags::TRANSFER_DST.as_raw()
        | vk::BufferUsageFlags::STORAGE_BUFFER.as_raw()
        | vk::BufferUsageFlags::VERTEX_BUFFER.as_raw()
        | vk::BufferUsageFlags::INDEX_BUFFER.as_raw(),
);
/// Longer than any sample takes.
const PATIENCE: u64 = 120_000_000_000;
/// Imports by hand are cut into pieces of this size, as ours are: a driver in use refuses a gibibyte.
const PIECE: usize = 512 << 20;

/// The names of all devices, in the order in which `--device` numbers them.
pub(crate) fn list() -> Result<Vec<String>> {
    // SAFETY: the Vulkan loader's initialisers have no preconditions that a Rust program could break.
    let entry = unsafe { ash::Entry::load() }.context("there is no Vulkan loader (libvulkan.so.1)")?;
    let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_1);
    let info = vk::InstanceCreateInfo::default().application_info(&application);
    // SAFETY: what `info` points to is alive.
    let instance = unsafe { entry.create_instance(&info, None) }.context("no Vulkan driver could be started")?;
    // SAFETY: the instance is alive.
    let devices = unsafe { instance.enumerate_physical_devices() };
    let name = |&device: &vk::PhysicalDevice| {
        // SAFETY: the device is the instance's.
        let properties = unsafe { instance.get_physical_device_properties(device) };
        format!("{} ({})", text(properties.device_name_as_c_str()), kind(properties.device_type))
    };
    let names = devices.map(|devices| devices.iter().map(name).collect());
    // SAFETY: nothing made of the instance is left.
    unsafe { instance.destroy_instance(None) };
    Ok(names?)
}

fn text(name: Result<&std::ffi::CStr, impl Sized>) -> String {
    name.map_or_else(|_| "?".into(), |name| name.to_string_lossy().into_owned())
}

fn kind(kind: vk::PhysicalDeviceType) -> &'static str {
    match kind {
        vk::PhysicalDeviceType::DISCRETE_GPU => "discrete GPU",
        vk::PhysicalDeviceType::INTEGRATED_GPU => "integrated GPU",
        vk::PhysicalDeviceType::VIRTUAL_GPU => "virtual GPU",
        vk::PhysicalDeviceType::CPU => "CPU driver",
        _ => "other",
    }
}

/// The device under test with what every group needs of it. The harness uses it from one thread.
pub(crate) struct Card {
    // Dropped in this order: what is made of the device, then the device.
    allocator: RefCell<Option<Allocator>>,
    pool: vk::CommandPool,
    fence: vk::Fence,
    timeline: vk::Semaphore,
    value: Cell<u64>,
    index: usize,
    host_memory: Option<ext::external_memory_host::Device>,
    pub(crate) gpu: Gpu,
}

impl Card {
    /// Opens the device that `--device` names, or the first of the fastest kind. The validation layer stays off: it would be measured.
    pub(crate) fn open(index: Option<usize>) -> Result<Self> {
        let gpu = match index {
            Some(index) => Gpu::open_at(index, Validation::Off)?,
            None => Gpu::open(None, Validation::Off)?,
        };
        let name = format!("{} ({})", gpu.name(), kind(gpu.properties.device_type));
        let index = index.or_else(|| list().ok()?.iter().position(|listed| *listed == name)).unwrap_or_default();
        let allocator = Allocator::new(&AllocatorCreateDesc {
            instance: gpu.instance.clone(),
            device: gpu.device.clone(),
            physical_device: gpu.physical,
            debug_settings: AllocatorDebugSettings::default(),
            buffer_device_address: false,
            allocation_sizes: AllocationSizes::default(),
        })?;
        let info = vk::CommandPoolCreateInfo::default()
            .queue_family_index(gpu.family)
            .flags(vk::CommandPoolCreateFlags::RESET_COMMAND_BUFFER);
        // SAFETY: the device is alive, here and in the next two calls, and the family is the one of its queue.
        let pool = unsafe { gpu.device.create_command_pool(&info, None) }?;
        // SAFETY: as above.
        let fence = unsafe { gpu.device.create_fence(&vk::FenceCreateInfo::default(), None) }?;
        let mut timeline = vk::SemaphoreTypeCreateInfo::default().semaphore_type(vk::SemaphoreType::TIMELINE);
        let info = vk::SemaphoreCreateInfo::default().push_next(&mut timeline);
        // SAFETY: as above; timeline semaphores are among what the device was made with.
        let timeline = unsafe { gpu.device.create_semaphore(&info, None) }?;
        let imports = gpu.extensions.contains(&ext::external_memory_host::NAME);
        let host_memory = imports.then(|| ext::external_memory_host::Device::new(&gpu.instance, &gpu.device));
        let (allocator, value) = (RefCell::new(Some(allocator)), Cell::new(0));
        Ok(Self { allocator, pool, fence, timeline, value, index, host_memory, gpu })
    }

    pub(crate) fn device(&self) -> &ash::Device {
        &self.gpu.device
    }

    /// Whether host memory can be imported at all; if not, why.
    pub(crate) fn imports(&self) -> Result<()> {
        ensure!(self.host_memory.is_some(), "the device has no VK_EXT_external_memory_host");
        Ok(())
    }

    /// A manager of the device. It must be gone before the card is.
    pub(crate) fn manager(&self, config: Config) -> Result<Manager> {
        let context = DeviceContext {
            instance: self.gpu.instance.clone(),
            physical: self.gpu.physical,
            device: self.gpu.device.clone(),
            extensions: self.gpu.extensions.clone(),
            buffer_device_address: false,
        };
        // SAFETY: (1) the handles belong together, and the extensions are those that were enabled; (2) every group drops its manager before it
        // returns, and the card is dropped after the last group; (3) the only timeline is the card's; (4) the queue is used from this thread only.
        Ok(unsafe { Manager::new(context, config) }?)
    }

    /// Settings with which every object is a mirror: on a card with memory of its own in there, filled through the harness's queue.
    ///
    /// While an object of such a manager is being acquired, nothing else may be submitted: the harness, which has one thread, is in the acquire.
    pub(crate) fn mirrors(&self) -> Config {
        let mut config = Config::default();
        config.force = Some(Force::Mirror);
        if !self.shares_memory() {
            let (device, queue) = (self.gpu.device.clone(), self.gpu.queue);
            let submit = move |work: &[vk::SubmitInfo<'_>], fence| {
                // SAFETY: the library's own work, which it keeps alive; the queue is nobody else's meanwhile (see above).
                unsafe { device.queue_submit(queue, work, fence) }
            };
            // SAFETY: (1) the queue is of this family, and access is synchronised as said above; (2) the submit waits for nothing, and the card outlives
            // the managers.
            config.uploads = Some(unsafe { Uploads::new([self.gpu.family], submit) });
        }
        config
    }

    /// The queue's timeline, and a value that nobody has used yet.
    pub(crate) fn next_value(&self) -> (vk::Semaphore, u64) {
        self.value.set(self.value.get() + 1);
        (self.timeline, self.value.get())
    }

    /// Whether host memory and the device's own are the same, so that a copy into mapped memory is all a program would make.
    pub(crate) fn shares_memory(&self) -> bool {
        matches!(self.gpu.properties.device_type, vk::PhysicalDeviceType::CPU | vk::PhysicalDeviceType::INTEGRATED_GPU)
    }

    /// Budget and use of every heap, in bytes.
    fn budgets(&self) -> Option<Vec<(u64, u64)>> {
        if !self.gpu.extensions.contains(&ext::memory_budget::NAME) {
            return None;
        }
        let mut budget = vk::PhysicalDeviceMemoryBudgetPropertiesEXT::default();
        let mut all = vk::PhysicalDeviceMemoryProperties2::default().push_next(&mut budget);
        // SAFETY: the device is alive and has the extension of the chained structure.
        unsafe { self.gpu.instance.get_physical_device_memory_properties2(self.gpu.physical, &mut all) };
        Some(budget.heap_budget.into_iter().zip(budget.heap_usage).collect())
    }

    /// Bytes of a heap that can still be taken; its size, where the driver doesn't tell.
    pub(crate) fn heap_left(&self, heap: usize) -> u64 {
        let size = self.gpu.memory.memory_heaps[heap].size;
        self.budgets().map_or(size, |all| all[heap].0.saturating_sub(all[heap].1).min(size))
    }

    /// The most bytes that one object of a measurement may have: a quarter of what is free on this machine, as the object and copies of it exist at
    /// a time, and a third of what is free in the largest heap that is the card's own, and in the largest that isn't. A CPU driver's heap is the
    /// machine's memory, whatever size it claims.
    pub(crate) fn most_bytes(&self) -> usize {
        let heaps = self.gpu.memory.memory_heaps_as_slice().iter().enumerate();
        let largest = |own: bool| {
            let fits = heaps.clone().filter(|(_, heap)| heap.flags.contains(vk::MemoryHeapFlags::DEVICE_LOCAL) == own);
            fits.map(|(index, _)| self.heap_left(index)).max()
        };
        let card = [largest(true), largest(false)].into_iter().flatten().min().unwrap_or(1 << 30) / 3;
        let card = if self.gpu.is_cpu() { u64::MAX } else { card };
        usize::try_from(card.min(memory_available() / 4)).unwrap_or(usize::MAX)
    }

    /// Of these sizes the ones that fit, and the ones that don't.
    pub(crate) fn fitting(&self, sizes: &[usize]) -> (Vec<usize>, Vec<usize>) {
        let most = self.most_bytes();
        sizes.iter().partition(|&&size| size <= most)
    }

    pub(crate) fn describe(&self) -> Device {
        let gpu = &self.gpu;
        let memory = &gpu.memory;
        let budgets = self.budgets();
        let heap = |index: usize| Heap {
            bytes: memory.memory_heaps[index].size,
            budget: budgets.as_ref().map(|all| all[index].0),
            used: budgets.as_ref().map(|all| all[index].1),
            device_local: memory.memory_heaps[index].flags.contains(vk::MemoryHeapFlags::DEVICE_LOCAL),
        };
        let version = gpu.properties.api_version;
        let (driver, alignment) = self.driver_and_alignment();
        Device {
            index: self.index,
            name: gpu.name(),
            kind: kind(gpu.properties.device_type).into(),
            driver,
            api_version: format!("{}.{}", vk::api_version_major(version), vk::api_version_minor(version)),
            import_alignment: alignment,
            extensions: gpu.extensions.iter().map(|name| name.to_string_lossy().into_owned()).collect(),
            heaps: (0..memory.memory_heap_count as usize).map(heap).collect(),
            memory_types: (memory.memory_types_as_slice().iter())
                .map(|kind| MemoryType { heap: kind.heap_index, flags: flags(kind.property_flags) })
                .collect(),
            timestamps: self.tick(),
        }
    }

    /// What the driver calls itself, and the alignment of imports (0 without them).
    fn driver_and_alignment(&self) -> (String, u64) {
        let mut host = vk::PhysicalDeviceExternalMemoryHostPropertiesEXT::default();
        let mut driver = vk::PhysicalDeviceDriverProperties::default();
        let mut all = vk::PhysicalDeviceProperties2::default();
        if self.host_memory.is_some() {
            all = all.push_next(&mut host);
        }
        let told = self.gpu.properties.api_version >= vk::API_VERSION_1_2;
        if told {
            all = all.push_next(&mut driver);
        }
        // SAFETY: the device is alive and knows the structures of the chain by its version or its extensions.
        unsafe { self.gpu.instance.get_physical_device_properties2(self.gpu.physical, &mut all) };
        let name = match told {
            true => format!("{} {}", text(driver.driver_name_as_c_str()), text(driver.driver_info_as_c_str())),
            false => format!("version {:#x}", self.gpu.properties.driver_version),
        };
        (name.trim().to_owned(), host.min_imported_host_pointer_alignment)
    }

    /// Nanoseconds of a timestamp's tick; `None` if the queue has none.
    pub(crate) fn tick(&self) -> Option<f64> {
        // SAFETY: the physical device is the instance's.
        let families = unsafe { self.gpu.instance.get_physical_device_queue_family_properties(self.gpu.physical) };
        let bits = families[self.gpu.family as usize].timestamp_valid_bits;
        let period = f64::from(self.gpu.properties.limits.timestamp_period);
        (bits >= 32 && period > 0.0).then_some(period)
    }

    /// A command buffer with `commands` in it.
    pub(crate) fn record(&self, commands: impl FnOnce(vk::CommandBuffer) -> Result<()>) -> Result<Commands<'_>> {
        let info = vk::CommandBufferAllocateInfo::default().command_pool(self.pool).command_buffer_count(1);
        // SAFETY: the pool is used from this thread only.
        let buffer = unsafe { self.device().allocate_command_buffers(&info) }?[0];
        let made = Commands { card: self, buffer };
        // SAFETY: the buffer is new.
        unsafe { self.device().begin_command_buffer(buffer, &vk::CommandBufferBeginInfo::default()) }?;
        commands(buffer)?;
        // SAFETY: it is being recorded.
        unsafe { self.device().end_command_buffer(buffer) }?;
        Ok(made)
    }

    /// Submits and waits.
    ///
    /// # Safety
    /// What the commands name is alive until this returns.
    pub(crate) unsafe fn run(&self, commands: &Commands<'_>) -> Result<()> {
        let buffers = [commands.buffer];
        let submits = [vk::SubmitInfo::default().command_buffers(&buffers)];
        // SAFETY: the commands are recorded and what they name is alive (contract); the fence is unsignalled, as it is reset below.
        unsafe { self.device().queue_submit(self.gpu.queue, &submits, self.fence) }?;
        // SAFETY: the fence is alive and was given to a submit.
        unsafe { self.device().wait_for_fences(&[self.fence], true, PATIENCE) }.context("the device didn't finish")?;
        // SAFETY: no submit that would signal it is pending.
        unsafe { self.device().reset_fences(&[self.fence]) }?;
        Ok(())
    }

    /// Waits for all that was submitted.
    pub(crate) fn wait_idle(&self) -> Result<()> {
        // SAFETY: only this thread uses the queue.
        unsafe { self.device().queue_wait_idle(self.gpu.queue) }?;
        Ok(())
    }

    fn buffer(&self, size: usize, external: bool) -> Result<vk::Buffer> {
        let handles = vk::ExternalMemoryHandleTypeFlags::HOST_ALLOCATION_EXT;
        let mut external_info = vk::ExternalMemoryBufferCreateInfo::default().handle_types(handles);
        let mut info = vk::BufferCreateInfo::default().size(size as u64).usage(USAGE);
        if external {
            info = info.push_next(&mut external_info);
        }
        // SAFETY: a valid create info.
        Ok(unsafe { self.device().create_buffer(&info, None) }?)
    }

    /// A buffer in memory from gpu-allocator.
    pub(crate) fn allocate(&self, size: usize, location: MemoryLocation) -> Result<Owned<'_>> {
        let buffer = self.buffer(size, false)?;
        let mut owned = Owned { card: self, buffer, allocation: None, size };
        // SAFETY: the buffer was made from this device.
        let requirements = unsafe { self.device().get_buffer_memory_requirements(buffer) };
        let wanted = AllocationCreateDesc {
            name: "harness",
            requirements,
            location,
            linear: true,
            allocation_scheme: AllocationScheme::GpuAllocatorManaged,
        };
        let allocation = self.allocator.borrow_mut().as_mut().expect("taken only by drop").allocate(&wanted)?;
        let (memory, offset) = {
            // SAFETY: the memory is only bound and never freed or mapped here.
            (unsafe { allocation.memory() }, allocation.offset())
        };
        owned.allocation = Some(allocation);
        // SAFETY: the buffer is new, and the allocation was made for its requirements.
        unsafe { self.device().bind_buffer_memory(buffer, memory, offset) }?;
        Ok(owned)
    }

    /// A buffer in memory of exactly this type, allocated for it alone.
    pub(crate) fn allocate_of_type(&self, size: usize, index: u32) -> Result<Plain<'_>> {
        let mut plain = Plain { card: self, buffer: self.buffer(size, false)?, memory: vk::DeviceMemory::null() };
        // SAFETY: the buffer was made from this device.
        let needs = unsafe { self.device().get_buffer_memory_requirements(plain.buffer) };
        ensure!(needs.memory_type_bits & 1 << index != 0, "buffers can't be in memory of type {index}");
        let info = vk::MemoryAllocateInfo::default().allocation_size(needs.size).memory_type_index(index);
        // SAFETY: a valid allocate info.
        plain.memory = unsafe { self.device().allocate_memory(&info, None) }?;
        // SAFETY: both are new and fit each other.
        unsafe { self.device().bind_buffer_memory(plain.buffer, plain.memory, 0) }?;
        Ok(plain)
    }

    /// Imports memory as a program without a library would: ask, allocate, make a buffer, bind. The pieces are freed when dropped.
    ///
    /// # Safety
    /// The memory stays mapped until the result is dropped; address and length are multiples of the import alignment.
    pub(crate) unsafe fn import_by_hand(&self, start: *mut u8, len: usize) -> Result<Vec<Plain<'_>>> {
        let mut pieces = Vec::with_capacity(1);
        for at in (0..len).step_by(PIECE) {
            let size = PIECE.min(len - at);
            // SAFETY: `at` is below the length of the caller's memory.
            let start = unsafe { start.add(at) };
            // SAFETY: a part of the caller's memory, whose pieces keep the alignment.
            pieces.push(unsafe { self.import_piece(start, size) }?);
        }
        Ok(pieces)
    }

    unsafe fn import_piece(&self, start: *mut u8, len: usize) -> Result<Plain<'_>> {
        let host = self.host_memory.as_ref().context("the device has no VK_EXT_external_memory_host")?;
        let handle = vk::ExternalMemoryHandleTypeFlags::HOST_ALLOCATION_EXT;
        let mut found = vk::MemoryHostPointerPropertiesEXT::default();
        let ask = host.fp().get_memory_host_pointer_properties_ext;
        // SAFETY: the device is alive and has the extension; the pointer is to mapped memory with the right alignment (contract).
        let answer = unsafe { ask(self.device().handle(), handle, start.cast(), &raw mut found) };
        if answer != vk::Result::SUCCESS {
            bail!("vkGetMemoryHostPointerPropertiesEXT answers {answer:?}");
        }
        let mut plain = Plain { card: self, buffer: self.buffer(len, true)?, memory: vk::DeviceMemory::null() };
        // SAFETY: the buffer was made from this device.
        let needs = unsafe { self.device().get_buffer_memory_requirements(plain.buffer) };
        let bits = match found.memory_type_bits & needs.memory_type_bits {
            0 => found.memory_type_bits,
            both => both,
        };
        let coherent = vk::MemoryPropertyFlags::HOST_COHERENT;
        let wishes = [coherent | vk::MemoryPropertyFlags::HOST_CACHED, coherent, vk::MemoryPropertyFlags::empty()];
        let index = wishes.iter().find_map(|&flags| self.gpu.memory_type(bits, flags));
        let index = index.context("no memory type for the import")?;
        let mut import = vk::ImportMemoryHostPointerInfoEXT::default().handle_type(handle).host_pointer(start.cast());
        let info = vk::MemoryAllocateInfo::default()
            .allocation_size(len as u64)
            .memory_type_index(index)
            .push_next(&mut import);
        // SAFETY: pointer and size are what the extension asks for (contract), and the type is one of the pointer's.
        plain.memory = unsafe { self.device().allocate_memory(&info, None) }?;
        // SAFETY: both are new; the buffer was made for imported memory.
        unsafe { self.device().bind_buffer_memory(plain.buffer, plain.memory, 0) }?;
        Ok(plain)
    }

    /// Copies one buffer to another on the queue and waits for it.
    pub(crate) fn copy(&self, from: vk::Buffer, to: vk::Buffer, size: usize) -> Result<()> {
        let region = [vk::BufferCopy { size: size as u64, ..Default::default() }];
        let commands = self.record(|buffer| {
            // SAFETY: both buffers are alive, have the usages and this size (the callers').
            unsafe { self.device().cmd_copy_buffer(buffer, from, to, &region) };
            Ok(())
        })?;
        // SAFETY: the callers hold both buffers.
        unsafe { self.run(&commands) }
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        // SAFETY: the device is alive; a failure means that it is lost, and then nothing runs.
        let _ = unsafe { self.gpu.device.device_wait_idle() };
        // What it has allocated is freed before the device is destroyed.
        drop(self.allocator.take());
        // SAFETY: nothing runs, here and below.
        unsafe { self.gpu.device.destroy_semaphore(self.timeline, None) };
        // SAFETY: as above.
        unsafe { self.gpu.device.destroy_fence(self.fence, None) };
        // SAFETY: as above; its command buffers are gone, as they borrow the card.
        unsafe { self.gpu.device.destroy_command_pool(self.pool, None) };
    }
}

/// `DEVICE_LOCAL, HOST_VISIBLE, …` in short.
pub(crate) fn flags(flags: vk::MemoryPropertyFlags) -> String {
    use vk::MemoryPropertyFlags as Flags;
    let names = [
        (Flags::DEVICE_LOCAL, "device-local"),
        (Flags::HOST_VISIBLE, "host-visible"),
        (Flags::HOST_COHERENT, "coherent"),
        (Flags::HOST_CACHED, "cached"),
        (Flags::LAZILY_ALLOCATED, "lazy"),
        (Flags::PROTECTED, "protected"),
    ];
    let set: Vec<_> = names.iter().filter(|(flag, _)| flags.contains(*flag)).map(|(_, name)| *name).collect();
    if set.is_empty() { "plain".into() } else { set.join(" ") }
}
