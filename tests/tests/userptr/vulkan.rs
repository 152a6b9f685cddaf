//! A real Vulkan driver as a device of these tests.

use std::convert::Infallible;

use pinfold_core::{Lease, Manager, SubmitError};
use pinfold_tests::memory::Backing;
use pinfold_tests::vulkan::Gpu;
use pinfold_vulkan::VulkanDevice;

use super::{Rig, Work, first_words, patient};

/// A driver, and a manager over it, which goes first.
pub struct Vulkan {
    pub manager: pinfold_vulkan::Manager,
    pub gpu: Gpu,
}

impl Vulkan {
    pub fn new(gpu: Gpu) -> Self {
        let mut config = pinfold_vulkan::Config::default();
        config.deadline = patient().deadline;
        // SAFETY: the fixture's handles belong together, and it outlives the manager.
        let manager = unsafe { pinfold_vulkan::Manager::new(gpu.context(), config) }.unwrap();
        Self { manager, gpu }
    }
}

impl Rig for Vulkan {
    type D = VulkanDevice;
    /// An import on a driver under validation takes a hundred times what a pin takes.
    const TRIES: usize = 5_000;

    fn manager(&self) -> &Manager<VulkanDevice> {
        &self.manager
    }

    fn takes(&self, _: Backing) -> bool {
        true
    }

    /// The drivers run on the CPU and go through the page table like the program; only a mapping of our own keeps the pages.
    fn pins(&self) -> bool {
        false
    }

    fn keeps_pages(&self, backing: Backing) -> bool {
        backing.shared()
    }

    fn start(
        &self,
        lease: Lease<VulkanDevice>,
    ) -> Result<Work<'_, VulkanDevice>, SubmitError<VulkanDevice, Infallible>> {
        let view = lease.view(0);
        let job = self.gpu.copy_job(view.buffer, view.offset, view.size, 1).hold();
        let hand_over = || {
            job.start().expect("the queue takes it");
            Ok(())
        };
        // SAFETY: the job signals when it is over, and it reads the buffer of the view only.
        let pending = unsafe { lease.submit([job.signal()], hand_over) }?;
        Ok(Work::new(pending, move || first_words(&job.finish())))
    }
}
