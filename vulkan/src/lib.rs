//! Host memory the program already has becomes Vulkan buffers, without a copy, and safe to unmap.
//!
//! An engine asks for [`requirements`] before it makes its device, makes a [`Manager`] of the device, registers ranges, and takes a [`Lease`] of
//! them for each submit. What the lease shows is an [`Import`]: a buffer, an offset and a size.
//!
//! ```no_run
//! use ash::vk;
//! use pinfold_vulkan::{Access, Config, DeviceContext, HostRange, Manager, Timeline, Userptr};
//! # unsafe fn submit(instance: ash::Instance, physical: vk::PhysicalDevice, device: ash::Device, queue: vk::Queue,
//! #     semaphore: vk::Semaphore, address: *const u8, length: usize, record: impl Fn(vk::Buffer, u64, u64) -> vk::CommandBuffer,
//! # ) -> Result<(), Box<dyn std::error::Error>> {
//! # let wanted = pinfold_vulkan::requirements(&instance, physical)?;
//! let context = DeviceContext {
//!     instance,
//!     physical,
//!     device: device.clone(),
//!     extensions: wanted.extensions().to_vec(),
//!     buffer_device_address: false,
//! };
//! // SAFETY: the handles belong together and outlive the manager.
//! let manager = unsafe { Manager::new(context, Config::default()) }?;
//!
//! // SAFETY: the memory is a mapping of ours that the device only reads, and that nobody punches holes into behind our back.
//! let mesh: Userptr = unsafe { manager.register(HostRange::from_ptr(address, length)?, Access::Read) }?;
//! let lease = manager.acquire_timeout(&[&mesh], std::time::Duration::from_secs(1))?;
//! let view = lease.view(0);
//! let commands = [record(view.buffer, view.offset, view.size)];
//! let (signals, values) = ([semaphore], [1]);
//! let mut timeline = vk::TimelineSemaphoreSubmitInfo::default().signal_semaphore_values(&values);
//! let work = [vk::SubmitInfo::default().command_buffers(&commands).signal_semaphores(&signals).push_next(&mut timeline)];
//! // SAFETY: the semaphore is signalled by the very work that reads the mesh.
//! let pending = unsafe {
//!     lease.submit([Timeline { semaphore, value: 1 }], || device.queue_submit(queue, &work, vk::Fence::null()))
//! };
//! // From here on, `munmap` of the mesh by any thread returns only after the work is over.
//! # drop(pending); Ok(()) }
//! ```
//!
//! # Which way a range goes
//!
//! | memory | way | if the program unmaps it while the device works |
//! | --- | --- | --- |
//! | private: anonymous, `[heap]`, a private file mapping | [`Path::Import`] of the program's mapping | held off; after the deadline, a CPU driver crashes the process |
//! | shared: memfd, `/dev/shm`, a shared file mapping | [`Path::AliasImport`] through a second mapping of ours | held off; after the deadline, the device goes on with the same pages |
//! | shared memory that the device refuses as it is mapped | [`Path::DmaBuf`] through `/dev/udmabuf`, where there is one | held off; after the deadline, the device goes on with the same pages |
//! | the device refuses that kind of memory, or this range | [`Path::Mirror`] | the device has a copy |
//! | without permission (`PROT_NONE`), device memory, a hole | an error | |
//!
//! A range over private and shared memory, or over parts of several files, is imported as it is. What a device refuses is found out by trial,
//! once for each [`MappingKind`] ([`VulkanDevice::trials`] is the table). For people who debug, `PINFOLD_FORCE=mirror`, `import`, `alias` or `dmabuf` in the
//! environment takes one way for everything ([`Force`]). Memory of other processes comes in as a dma-buf: [`dmabuf`].
//! Memory that another device of the same driver has allocated comes in as it is: [`opaque`].

// Driver tests inside and outside the crate share one fixture, which names the crate from outside.
#[cfg(test)]
extern crate self as pinfold_vulkan;
#[cfg(test)]
#[path = "../tests/fixture/mod.rs"]
mod fixture;

/// The example of the project's README is compiled with these documents.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
mod readme {}

#[doc = include_str!("quirks.md")]
pub mod quirks {}

mod admission;
mod alias;
mod block;
mod budget;
mod caps;
mod completion;
mod config;
mod copy;
mod device;
pub mod dmabuf;
mod error;
mod gpu;
mod image;
mod import;
mod manager;
mod mirror;
pub mod opaque;
mod path;
mod probe;
mod recorded;
mod requirements;
mod share;
mod upload;

pub use caps::{Capabilities, Support};
pub use completion::{Signal, Timeline};
pub use config::{Config, DeviceContext, Force, MirrorPlace};
pub use device::{Prepared, VulkanDevice};
pub use error::SetupError;
pub use image::{Image, ImageError, ImageNeeds};
pub use import::{Chunk, Import};
pub use manager::{Lease, Manager, Pending, SubmitError, Userptr, View};
pub use path::{MappingKind, Source};
pub use pinfold_core::watch;
pub use pinfold_core::{
    Access, Coverage, DeviceError, Error, Generation, HostRange, ManualReason, Mapping, MirrorReason, NoHoldReason,
    Outcome, Path, Policy, RangeError, State, Stats, in_bracket, on_event_path, page_size,
};
pub use probe::{Costs, Trial, TrialResult};
pub use requirements::{Features, Requirements, requirements};
pub use upload::Uploads;

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("pinfold needs 64-bit Linux");
