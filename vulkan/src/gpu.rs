//! The device as imports, mirrors and the completion threads share it: its commands, its limits, and whether it is lost.

use std::ffi::{CStr, CString};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ash::{ext, khr, vk};
use pinfold_core::DeviceError;
use pinfold_invalidate::HostRange;

use crate::budget::{Allocations, Share};
use crate::completion::On;
use crate::{Capabilities, DeviceContext, SetupError};

/// Commands and facts of one device.
///
/// # Invariants
/// The handles in `context` are live as long as this value is (the contract of [`VulkanDevice::new`](crate::VulkanDevice::new)); every
/// safety proof of this crate that says "the device is live" rests on it.
pub(crate) struct Gpu {
    pub(crate) context: DeviceContext,
    pub(crate) caps: Capabilities,
    pub(crate) memory: vk::PhysicalDeviceMemoryProperties,
    pub(crate) allocations: Allocations,
    pub(crate) host_memory: Option<ext::external_memory_host::Device>,
    /// `None`: the device was made without timeline semaphores, and its work ends with fences.
    wait_semaphores: Option<vk::PFN_vkWaitSemaphores>,
    pub(crate) dmabuf: Option<khr::external_memory_fd::Device>,
    signal_semaphore: Option<vk::PFN_vkSignalSemaphore>,
    names: Option<ext::debug_utils::Device>,
    /// The families of all queues that use objects, each once.
    families: Box<[u32]>,
    /// Set once, by whoever sees `VK_ERROR_DEVICE_LOST` first; never cleared. It orders nothing: Relaxed on both sides.
    lost: AtomicBool,
}

impl Gpu {
    /// # Errors
    /// [`SetupError::NotEnabled`] if the device was made without something it needs.
    ///
    /// # Safety
    /// The handles in `context` are live, belong together, and stay so for as long as the value lives; `extensions` are the ones that were
    /// enabled.
    pub(crate) unsafe fn new(context: DeviceContext) -> Result<Self, SetupError> {
        // SAFETY: the contract of this function is the one asked for.
        let caps = unsafe { Capabilities::read(&context) };
        let enabled = |name| context.extensions.contains(&name);
        let (instance, device) = (&context.instance, &context.device);

        // The tables below fill a missing command with one that aborts, so the commands are looked for first.
        let khr = enabled(khr::timeline_semaphore::NAME);
        let wait = if khr { c"vkWaitSemaphoresKHR" } else { c"vkWaitSemaphores" };
        // SAFETY: live handles (contract).
        let timelines = unsafe { present(&context, wait, "Vulkan 1.2 or VK_KHR_timeline_semaphore") }.is_ok();
        let timelines = timelines.then(|| {
            if khr {
                let table = khr::timeline_semaphore::Device::new(instance, device);
                (table.fp().wait_semaphores_khr, table.fp().signal_semaphore_khr)
            } else {
                (device.fp_v1_2().wait_semaphores, device.fp_v1_2().signal_semaphore)
            }
        });
        let (wait_semaphores, signal_semaphore) = timelines.unzip();
        let host_memory = if enabled(ext::external_memory_host::NAME) {
            // SAFETY: live handles (contract).
            unsafe { present(&context, c"vkGetMemoryHostPointerPropertiesEXT", "VK_EXT_external_memory_host") }?;
            Some(ext::external_memory_host::Device::new(instance, device))
        } else {
            None
        };
        let dmabuf = if enabled(khr::external_memory_fd::NAME) && enabled(ext::external_memory_dma_buf::NAME) {
            // SAFETY: live handles (contract).
            unsafe { present(&context, c"vkGetMemoryFdPropertiesKHR", "VK_KHR_external_memory_fd") }?;
            Some(khr::external_memory_fd::Device::new(instance, device))
        } else {
            None
        };
        let names = if enabled(ext::debug_utils::NAME) {
            // SAFETY: live handles (contract).
            unsafe { present(&context, c"vkSetDebugUtilsObjectNameEXT", "VK_EXT_debug_utils") }?;
            Some(ext::debug_utils::Device::new(instance, device))
        } else {
            None
        };
        // SAFETY: live handles that belong together (contract).
        let memory = unsafe { instance.get_physical_device_memory_properties(context.physical) };
        let allocations = Allocations::new(caps.max_allocations);
        Ok(Self {
            context,
            caps,
            memory,
            allocations,
            host_memory,
            dmabuf,
            wait_semaphores,
            signal_semaphore,
            names,
            families: Box::default(),
            lost: AtomicBool::new(false),
        })
    }

    /// The same, with objects for queues of these families, each named once.
    pub(crate) fn for_families(self, families: Box<[u32]>) -> Self {
        Self { families, ..self }
    }

    /// What an object's buffer is made of, for the queues that use objects.
    pub(crate) fn shared<'a>(&'a self, info: vk::BufferCreateInfo<'a>) -> vk::BufferCreateInfo<'a> {
        // With one family there is nothing to share, and the mode asks for two.
        if self.families.len() < 2 {
            return info;
        }
        info.sharing_mode(vk::SharingMode::CONCURRENT).queue_family_indices(&self.families)
    }

    pub(crate) fn device(&self) -> &ash::Device {
        &self.context.device
    }

    pub(crate) fn has_timelines(&self) -> bool {
        self.wait_semaphores.is_some()
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// `Err(Lost)` from the first lost answer on.
    pub(crate) fn check_alive(&self) -> Result<(), DeviceError> {
        if self.is_lost() { Err(DeviceError::Lost) } else { Ok(()) }
    }

    /// Notes a lost device, whichever call it was that found out.
    pub(crate) fn saw(&self, code: vk::Result) -> vk::Result {
        if code == vk::Result::ERROR_DEVICE_LOST {
            self.lost.store(true, Ordering::Relaxed);
        }
        code
    }

    /// `code` of `call` as an error about `range`.
    pub(crate) fn failed(&self, call: &'static str, range: HostRange, code: vk::Result) -> DeviceError {
        if self.saw(code) == vk::Result::ERROR_DEVICE_LOST {
            return DeviceError::Lost;
        }
        DeviceError::Failed { call, range, code: format!("{code:?}"), raw: code.as_raw() }
    }

    /// Whether a semaphore reached `value`, or a fence was signalled, within `limit`.
    ///
    /// # Safety
    /// `on` is a live timeline semaphore or fence of this device until the call is over.
    pub(crate) unsafe fn wait(&self, on: On, value: u64, limit: Duration) -> Result<bool, vk::Result> {
        let limit = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
        let answer = match on {
            On::Semaphore(semaphore) => {
                let Some(wait) = self.wait_semaphores else { return Err(vk::Result::ERROR_FEATURE_NOT_PRESENT) };
                let (semaphores, values) = ([semaphore], [value]);
                let info = vk::SemaphoreWaitInfo::default().semaphores(&semaphores).values(&values);
                // SAFETY: the device is live, the semaphore too (contract), and `info` points to two live arrays of one element each.
                unsafe { wait(self.device().handle(), &raw const info, limit) }
            }
            // SAFETY: the device is live, and the fence too (contract).
            On::Fence(fence) => match unsafe { self.device().wait_for_fences(&[fence], true, limit) } {
                Ok(()) => vk::Result::SUCCESS,
                Err(code) => code,
            },
        };
        match answer {
            vk::Result::SUCCESS => Ok(true),
            vk::Result::TIMEOUT => Ok(false),
            code => Err(self.saw(code)),
        }
    }

    /// Signals `value` on `semaphore` from the host.
    ///
    /// # Safety
    /// `semaphore` is a live timeline semaphore of this device, and `value` higher than all that are or will be signalled before.
    pub(crate) unsafe fn signal(&self, semaphore: vk::Semaphore, value: u64) -> Result<(), vk::Result> {
        let Some(signal) = self.signal_semaphore else { return Err(vk::Result::ERROR_FEATURE_NOT_PRESENT) };
        let info = vk::SemaphoreSignalInfo::default().semaphore(semaphore).value(value);
        // SAFETY: the device is live, `info` is complete, and the rest is the contract.
        let answer = unsafe { signal(self.device().handle(), &raw const info) };
        answer.result().map_err(|code| self.saw(code))
    }

    /// Bytes that the driver thinks can still be taken from a heap; `None` if it doesn't tell.
    pub(crate) fn heap_left(&self, heap: u32) -> Option<u64> {
        if self.caps.memory_budget != crate::Support::Usable {
            return None;
        }
        let mut budget = vk::PhysicalDeviceMemoryBudgetPropertiesEXT::default();
        let mut properties = vk::PhysicalDeviceMemoryProperties2::default().push_next(&mut budget);
        // SAFETY: the device is live, and the chained structure is of an enabled extension.
        unsafe { self.context.instance.get_physical_device_memory_properties2(self.context.physical, &mut properties) };
        let heap = heap as usize;
        // Some drivers book imports on another heap, or not at all; the sum of our own is the least there can be in use.
        let ours = self.allocations.bytes[heap].load(Ordering::Relaxed);
        Some(budget.heap_budget[heap].saturating_sub(budget.heap_usage[heap].max(ours)))
    }

    /// Gives a Vulkan object of ours a name in debug tools. A name that can't be given is no error.
    pub(crate) fn name<H: vk::Handle>(&self, handle: H, label: &str) {
        let Some(names) = self.names.as_ref().filter(|_| !label.is_empty()) else { return };
        let Ok(label) = CString::new(label) else { return };
        let info = vk::DebugUtilsObjectNameInfoEXT::default().object_handle(handle).object_name(&label);
        // SAFETY: the device is live; `handle` is an object of it that only the calling thread knows yet, so access is synchronised.
        let _ = unsafe { names.set_debug_utils_object_name(&info) };
    }
}

/// Whether the device has `command`.
///
/// # Safety
/// The handles in `context` are live.
unsafe fn present(context: &DeviceContext, command: &'static CStr, needed: &'static str) -> Result<(), SetupError> {
    // SAFETY: both handles are live (contract), and the name is a C string.
    let found = unsafe { context.instance.get_device_proc_addr(context.device.handle(), command.as_ptr()) };
    let command = command.to_str().expect("names of commands are ASCII");
    found.map(|_| ()).ok_or(SetupError::NotEnabled { command, needed })
}

/// A buffer of ours, destroyed when dropped.
pub(crate) struct OwnedBuffer {
    pub(crate) gpu: Arc<Gpu>,
    pub(crate) raw: vk::Buffer,
}

impl OwnedBuffer {
    pub(crate) fn new(gpu: &Arc<Gpu>, info: &vk::BufferCreateInfo<'_>, label: &str) -> Result<Self, vk::Result> {
        // SAFETY: the device is live, and `info` is a complete, valid structure built by a caller in this crate.
        let raw = unsafe { gpu.device().create_buffer(info, None) }.map_err(|code| gpu.saw(code))?;
        gpu.name(raw, label);
        Ok(Self { gpu: Arc::clone(gpu), raw })
    }

    pub(crate) fn requirements(&self) -> vk::MemoryRequirements {
        // SAFETY: the device is live, and `raw` is a buffer of it that lives as long as `self`.
        unsafe { self.gpu.device().get_buffer_memory_requirements(self.raw) }
    }

    /// Puts the buffer on memory.
    ///
    /// # Safety
    /// `memory` is live, of a type this buffer allows, has room for it at `offset`, outlives it, and the buffer isn't bound yet.
    pub(crate) unsafe fn bind(&self, memory: vk::DeviceMemory, offset: u64) -> Result<(), vk::Result> {
        // SAFETY: the device is live; everything else is the contract.
        unsafe { self.gpu.device().bind_buffer_memory(self.raw, memory, offset) }.map_err(|code| self.gpu.saw(code))
    }
}

impl Drop for OwnedBuffer {
    fn drop(&mut self) {
        // SAFETY: the device is live, the buffer is ours and is destroyed once; an import is dropped only when no unfinished work names it.
        unsafe { self.gpu.device().destroy_buffer(self.raw, None) };
    }
}

/// Device memory of ours with its share of the budget, freed when dropped.
pub(crate) struct OwnedMemory {
    share: Share,
    pub(crate) raw: vk::DeviceMemory,
}

impl OwnedMemory {
    /// # Safety
    /// `info` is valid, also in its chain: host pointers it imports are mapped as the allocation rules ask.
    pub(crate) unsafe fn new(share: Share, info: &vk::MemoryAllocateInfo<'_>, label: &str) -> Result<Self, vk::Result> {
        let gpu = share.gpu();
        // SAFETY: the device is live, and `info` is valid (contract).
        let raw = unsafe { gpu.device().allocate_memory(info, None) }.map_err(|code| gpu.saw(code))?;
        gpu.name(raw, label);
        Ok(Self { share, raw })
    }

    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        self.share.gpu()
    }
}

impl Drop for OwnedMemory {
    fn drop(&mut self) {
        // SAFETY: the device is live, the memory is ours and is freed once; the buffer on it was dropped before.
        unsafe { self.share.gpu().device().free_memory(self.raw, None) };
    }
}
