//! Host memory the program already has becomes Vulkan buffers, without a copy.

// Driver tests inside and outside the crate share one fixture, which names the crate from outside.
#[cfg(test)]
extern crate self as pinfold_vulkan;
#[cfg(test)]
#[path = "../tests/fixture/mod.rs"]
mod fixture;

mod admission;
mod alias;
mod budget;
mod caps;
mod completion;
mod config;
mod device;
mod error;
mod gpu;
mod import;
mod mirror;
mod path;
mod probe;
mod requirements;

pub use caps::{Capabilities, Support};
pub use completion::Timeline;
pub use config::{Config, DeviceContext, Force};
pub use device::{Prepared, VulkanDevice};
pub use error::Error;
pub use import::{Chunk, Import};
pub use path::{MappingKind, Source};
pub use probe::{Trial, TrialResult};
pub use requirements::{Features, Requirements, requirements};

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("pinfold needs 64-bit Linux");
