//! Userptr objects over any device: host memory the program already has, handed to a device and taken back in time.
//!
//! A [`Manager`] registers ranges. [`Manager::acquire`] makes the device take what is mapped there *now*, and answers with a [`Lease`];
//! [`Lease::submit`] checks that nothing has changed hands since, and counts the work, so that whoever unmaps, moves or discards the memory is
//! held off until the work is over. Then the object is invalid, and the next acquire takes what is mapped *then*.
//!
//! What is where: `state` has the table of states; `protocol` the three places where an object's word meets the gates; `acquire` the order in
//! which pages are taken; `room` evicts what is idle, `restore` brings back what is to be kept ready; [`watch`] the queue of everything that happens; [`Device`] what a device must be able to do. Vulkan is one such device,
//! in `pinfold-vulkan`, which is the crate that engines name.
//!
//! Under `cfg(loom)` the protocol and the watch queue are compiled against loom's atomics; what shows them to the world is left out.

mod acquire;
mod config;
mod device;
mod discard;
pub mod dmabuf;
mod ending;
mod engine;
mod error;
#[cfg(not(loom))]
mod file;
mod flights;
mod holds;
mod host_buffer;
mod lease;
mod limits;
#[cfg(not(loom))]
mod manager;
mod notes;
mod object;
#[cfg(not(loom))]
mod part;
mod pending;
mod populate;
#[doc(hidden)]
pub mod protocol;
#[cfg(not(loom))]
mod ready;
mod reaper;
mod restore;
mod room;
#[doc(hidden)]
pub mod state;
mod ticket;
#[cfg(not(loom))]
mod userptr;
pub mod watch;
mod words;
mod work;
mod writes;

pub use config::Config;
pub use device::{Access, Device, DeviceError, MirrorReason, Outcome, Path, Policy, Preparation, Request, Use};
pub use error::{Error, SubmitError};
pub use host_buffer::{HostBuffer, HostBufferError, HostBufferKind, HugePages};
pub use lease::{Lease, View};
#[cfg(not(loom))]
pub use manager::{Manager, Stats};
pub use pending::Pending;
pub use pinfold_invalidate::{
    Coverage, HostRange, ManualReason, Mapping, NoHoldReason, RangeError, in_bracket, on_event_path, page_size,
};
#[cfg(not(loom))]
pub use ready::Acquire;
pub use state::{Generation, State};
pub use ticket::Ticket;
#[cfg(not(loom))]
pub use userptr::Userptr;

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("pinfold needs 64-bit Linux");
