//! Userptr objects over any device, and the watch queue. (Table of contents; the lead engineer fills it.)

mod device;
mod ticket;
pub mod watch;

pub use device::{Access, Device, DeviceError, MirrorReason, Outcome, Path, Preparation, Request};
pub use ticket::Ticket;
