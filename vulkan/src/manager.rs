//! What an engine holds: the manager of one Vulkan device, under names that don't spell the device out.

use std::fmt;
use std::ops::Deref;

use crate::{Capabilities, Config, DeviceContext, SetupError, VulkanDevice};

/// A registered range. See [`pinfold_core::Userptr`].
pub type Userptr = pinfold_core::Userptr<VulkanDevice>;
/// Objects that were all valid when it was taken. See [`pinfold_core::Lease`].
pub type Lease = pinfold_core::Lease<VulkanDevice>;
/// How the device sees one object of a lease; dereferences to an [`Import`](crate::Import). See [`pinfold_core::View`].
pub type View<'a> = pinfold_core::View<'a, VulkanDevice>;
/// Work under way. See [`pinfold_core::Pending`].
pub type Pending = pinfold_core::Pending<VulkanDevice>;
/// Why a submit did not happen. See [`pinfold_core::SubmitError`].
pub type SubmitError<E> = pinfold_core::SubmitError<VulkanDevice, E>;

/// Hands host memory to one Vulkan device. Cheap to clone; has all methods of [`pinfold_core::Manager`].
///
/// The last clone to go ends every object and waits for work under way.
#[derive(Clone)]
pub struct Manager(pinfold_core::Manager<VulkanDevice>);

impl Manager {
    /// A manager of the device.
    ///
    /// # Errors
    /// [`SetupError::BadForce`], [`SetupError::NotEnabled`], [`SetupError::Allocator`], [`SetupError::Manager`].
    ///
    /// # Safety
    /// 1. `context` is what its fields say: the handles belong together, and the extensions listed were enabled.
    /// 2. The handles stay alive until the last clone of the manager and the last lease are gone.
    /// 3. The semaphore of every [`Timeline`](crate::Timeline) given to a submit is a timeline semaphore of this device, and a fence is one of this
    ///    device, unsignalled then. It stays alive (and a fence is not reset) until that submit's [`Pending`] is over, or the manager gone.
    /// 4. When the last clone is dropped while submits are still under way after [`Config::close_limit`], the manager waits for the whole device
    ///    (`vkDeviceWaitIdle`): from then on no thread uses a queue of the device until the drop has returned. If the device is still busy even
    ///    then, it is not destroyed.
    pub unsafe fn new(context: DeviceContext, config: Config) -> Result<Self, SetupError> {
        // SAFETY: the four points are the contract of the device, as far as the manager doesn't see to them itself.
        let device = unsafe { VulkanDevice::new(context, &config) }?;
        Ok(Self(pinfold_core::Manager::new(device, config.objects())?))
    }

    /// Says that a call of the program's own has answered `VK_ERROR_DEVICE_LOST`, a submit for instance. Work under way then ends as
    /// [`Outcome::Lost`](crate::Outcome::Lost) within moments, and every call says that the device is lost. What calls of this crate answer is
    /// noticed without that.
    pub fn note_lost(&self) {
        self.device().note_lost();
        self.0.note_lost();
    }

    /// What the device says of itself.
    #[must_use]
    pub fn capabilities(&self) -> &Capabilities {
        self.device().capabilities()
    }
}

impl Deref for Manager {
    type Target = pinfold_core::Manager<VulkanDevice>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl fmt::Debug for Manager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Manager").field(self.device()).finish()
    }
}
