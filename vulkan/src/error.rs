use ash::vk;
use thiserror::Error;

/// Why there is no manager, or no device to make one for.
///
/// What goes wrong with one range later is an [`Error`](crate::Error) instead.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SetupError {
    /// The physical device is none of the instance's.
    #[error("the physical device is none of this instance's; pass the two that belong together")]
    ForeignPhysicalDevice,
    /// The device lacks something that nothing can stand in for.
    #[error("{device} has no {feature}; choose another device")]
    Unsupported {
        /// Name of the device.
        device: String,
        /// What it lacks.
        feature: &'static str,
    },
    /// The device could do it, but was made without it.
    #[error("{command} isn't there; make the device with everything that `requirements` lists ({needed})")]
    NotEnabled {
        /// The command that can't be called.
        command: &'static str,
        /// The extension or version that brings it.
        needed: &'static str,
    },
    /// The environment variable `PINFOLD_FORCE` has no meaning.
    #[error("PINFOLD_FORCE is {value:?}; it is `mirror`, `import`, `alias` or `dmabuf`, or unset")]
    BadForce {
        /// What it is.
        value: String,
    },
    /// Mirrors are to be in device memory, which only a queue can fill.
    #[error(
        "mirrors in device memory need a queue to be filled through; set Config::uploads, or leave Config::mirrors alone"
    )]
    NoUploads,
    /// A Vulkan command failed.
    #[error("{call} failed: {code}")]
    Vulkan {
        /// The command.
        call: &'static str,
        /// What it answered.
        code: vk::Result,
    },
    /// The allocator that mirrors get their memory from can't be made.
    #[error("can't make the allocator for mirrors: {0}")]
    Allocator(#[source] gpu_allocator::AllocationError),
    /// What a manager needs besides the device can't be had: threads, descriptors, the tracking of the address space.
    #[error(transparent)]
    Manager(#[from] pinfold_core::Error),
}
