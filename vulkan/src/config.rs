//! What the program decides: which device, how much of it, and for people who debug, which path.

use std::env;
use std::ffi::CStr;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use ash::vk;

use crate::{SetupError, Uploads};

/// The device that imports go to. The handles stay the program's: nothing here is destroyed by Pinfold.
#[derive(Clone)]
pub struct DeviceContext {
    /// The instance, made for Vulkan 1.1 or later.
    pub instance: ash::Instance,
    /// The physical device, one of the instance's.
    pub physical: vk::PhysicalDevice,
    /// The device, made of `physical` with everything that [`requirements`](crate::requirements) lists.
    pub device: ash::Device,
    /// The names of the extensions that were enabled, as [`Requirements::extensions`](crate::Requirements::extensions) lists them.
    /// With `VK_EXT_debug_utils` among them (an instance extension), buffers and memory carry the labels of their objects.
    pub extensions: Vec<&'static CStr>,
    /// Whether the feature `bufferDeviceAddress` was enabled. Imports can then be used by address.
    pub buffer_device_address: bool,
}

impl fmt::Debug for DeviceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceContext")
            .field("physical", &self.physical)
            .field("device", &self.device.handle())
            .field("extensions", &self.extensions)
            .field("buffer_device_address", &self.buffer_device_address)
            .finish_non_exhaustive()
    }
}

/// How a manager works. The default suits every program.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Config {
    /// The path that every range takes, whatever the device says. `PINFOLD_FORCE` in the environment wins over this.
    pub force: Option<Force>,
    /// Where mirrors are. Default: where the device reads them best.
    pub mirrors: MirrorPlace,
    /// A queue that mirrors in device memory are filled through. Default: none, and then mirrors are where the program sees them, too.
    pub uploads: Option<Uploads>,
    /// The families of all queues whose work uses objects, if they are several. Imports and mirrors are then made for all of them
    /// (`VK_SHARING_MODE_CONCURRENT`), together with those of `uploads`. Default: none, and an object belongs to one family at a time, as any
    /// exclusive buffer does: the engine hands it over with barriers of its own.
    pub queue_families: Vec<u32>,
    /// Promises that shared memory and files, where they are mirrored, are written through the registered mappings only: not through another
    /// mapping, not by another process, not by `write`. Then mirrors of them copy only what was written, too. Default: no, and they are copied in
    /// full at every acquire.
    pub sole_writer: bool,
    /// As in [`pinfold_core::Config::deadline`].
    pub deadline: Duration,
    /// As in [`pinfold_core::Config::budget`].
    pub budget: u64,
    /// As in [`pinfold_core::Config::inline_limit`].
    pub inline_limit: usize,
    /// As in [`pinfold_core::Config::watch_socket`].
    pub watch_socket: Option<PathBuf>,
    /// As in [`pinfold_core::Config::close_limit`].
    pub close_limit: Duration,
}

impl Default for Config {
    fn default() -> Self {
        let pinfold_core::Config { deadline, budget, inline_limit, watch_socket, close_limit, .. } =
            pinfold_core::Config::default();
        Self {
            force: None,
            mirrors: MirrorPlace::default(),
            uploads: None,
            queue_families: Vec::new(),
            sole_writer: false,
            deadline,
            budget,
            inline_limit,
            watch_socket,
            close_limit,
        }
    }
}

impl Config {
    /// Each family whose queues use objects, once.
    pub(crate) fn families(&self) -> Box<[u32]> {
        let uploads = self.uploads.as_ref().map_or(&[][..], Uploads::families);
        let mut families = [uploads, &self.queue_families].concat();
        families.sort_unstable();
        families.dedup();
        families.into()
    }

    /// The part that isn't about Vulkan.
    pub(crate) fn objects(&self) -> pinfold_core::Config {
        let mut objects = pinfold_core::Config::default();
        objects.deadline = self.deadline;
        objects.budget = self.budget;
        objects.inline_limit = self.inline_limit;
        objects.watch_socket.clone_from(&self.watch_socket);
        objects.close_limit = self.close_limit;
        objects
    }
}

/// Where the copy of an object is. What the device writes is always copied where the program sees it, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum MirrorPlace {
    /// In device memory if the device is a discrete one and there are [`Uploads`](Config::uploads), else where the program sees it, too.
    #[default]
    Auto,
    /// In memory that the program and the device both see.
    HostVisible,
    /// In the device's own memory, which is filled through [`Config::uploads`].
    DeviceLocal,
}

/// A path that is taken whatever trials say, for people who debug. Tools that replay a program need `Mirror`, for example.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Force {
    /// Every object is a copy. What the device writes comes back where it is declared
    /// ([`declare_written`](pinfold_core::Lease::declare_written)).
    Mirror,
    /// Every object is an import of the program's own mapping. No mirror stands in: a refusal is an error.
    Import,
    /// Shared mappings go by way of a dma-buf made of them, private ones are imported directly. No mirror stands in: a refusal is an error.
    DmaBuf,
    /// Shared mappings are imported through an alias, private ones (which have no alias) directly. No mirror stands in: a refusal is an
    /// error.
    Alias,
}

impl Force {
    /// What `PINFOLD_FORCE` says; `None` if it is unset or empty.
    ///
    /// # Errors
    /// [`SetupError::BadForce`] for any other value than `mirror`, `import`, `alias` and `dmabuf`.
    pub fn from_env() -> Result<Option<Self>, SetupError> {
        env::var_os("PINFOLD_FORCE").map_or(Ok(None), |value| Self::parse(&value.to_string_lossy()))
    }

    fn parse(value: &str) -> Result<Option<Self>, SetupError> {
        match value {
            "" => Ok(None),
            "mirror" => Ok(Some(Self::Mirror)),
            "import" => Ok(Some(Self::Import)),
            "alias" => Ok(Some(Self::Alias)),
            "dmabuf" => Ok(Some(Self::DmaBuf)),
            other => Err(SetupError::BadForce { value: other.to_owned() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_force_value_nobody_knows_is_named_in_the_error() {
        assert_eq!(Force::parse("alias").unwrap(), Some(Force::Alias));
        assert_eq!(Force::parse("").unwrap(), None);
        let message = Force::parse("Mirror").unwrap_err().to_string();
        assert!(
            message.contains("\"Mirror\"") && message.contains("`mirror`, `import`, `alias` or `dmabuf`"),
            "{message}"
        );
    }
}
