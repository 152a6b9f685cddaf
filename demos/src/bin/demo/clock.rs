//! A timeline semaphore and its next value: how the end of a frame is told to the manager, and asked for by the demo.

use anyhow::Result;
use ash::{khr, vk};
use pinfold_demos::device::Gpu;
use pinfold_vulkan::Timeline;

/// Counts frames. The manager of the objects must be gone before it is dropped.
pub(crate) struct Clock<'g> {
    gpu: &'g Gpu,
    semaphore: vk::Semaphore,
    last: u64,
}

impl<'g> Clock<'g> {
    pub(crate) fn new(gpu: &'g Gpu) -> Result<Self> {
        let mut kind = vk::SemaphoreTypeCreateInfo::default().semaphore_type(vk::SemaphoreType::TIMELINE);
        let info = vk::SemaphoreCreateInfo::default().push_next(&mut kind);
        // SAFETY: a valid create info; the feature is one of those that the device was made with.
        let semaphore = unsafe { gpu.device.create_semaphore(&info, None) }?;
        Ok(Self { gpu, semaphore, last: 0 })
    }

    /// The value that the next frame signals.
    pub(crate) fn next(&mut self) -> Timeline {
        self.last += 1;
        Timeline { semaphore: self.semaphore, value: self.last }
    }

    /// The value that the GPU has reached.
    pub(crate) fn now(&self) -> Result<u64> {
        let gpu = self.gpu;
        if gpu.extensions.contains(&khr::timeline_semaphore::NAME) {
            let functions = khr::timeline_semaphore::Device::new(&gpu.instance, &gpu.device);
            // SAFETY: the semaphore is a timeline of this device.
            return Ok(unsafe { functions.get_semaphore_counter_value(self.semaphore) }?);
        }
        // SAFETY: as above; a device without the extension's name has the command in its core.
        Ok(unsafe { gpu.device.get_semaphore_counter_value(self.semaphore) }?)
    }
}

impl Drop for Clock<'_> {
    fn drop(&mut self) {
        // SAFETY: the device is alive; a failure means that it is lost, and then nothing runs.
        let _ = unsafe { self.gpu.device.device_wait_idle() };
        // SAFETY: no work is pending, and the manager, which waits for values, is gone (the type's contract).
        unsafe { self.gpu.device.destroy_semaphore(self.semaphore, None) };
    }
}
