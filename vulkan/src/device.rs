//! The device as the object machine sees it: admission, then a plan, then an alias, an import or a mirror.

use std::fmt;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use ash::vk;
use pinfold_core::{Access, Device, DeviceError, MirrorReason, Path, Preparation, Request, Ticket};
use pinfold_invalidate::{HostRange, page_size};

use crate::admission::admit;
use crate::alias::{Alias, AliasCache, NoAlias};
use crate::completion::{Completion, Timeline};
use crate::gpu::Gpu;
use crate::import::{Import, NotImported, Store, import, imported, usage};
use crate::mirror::{MirrorHeap, mirror, refresh};
use crate::path::{MappingKind, Plan, Rules, decide};
use crate::probe::{Trial, TrialResult, Trials};
use crate::{Capabilities, Config, DeviceContext, Error, Force, Support};

/// One Vulkan device that host memory can be given to.
///
/// Programs use a `Manager`, which has one; by itself it is the engine under that.
pub struct VulkanDevice {
    // Dropped first: its threads use the device.
    completion: Completion,
    gpu: Arc<Gpu>,
    trials: Trials,
    aliases: Arc<AliasCache>,
    mirrors: Arc<MirrorHeap>,
    rules: Rules,
}

/// A range whose way to the device is chosen. From [`Device::prepare`] of a [`VulkanDevice`].
#[derive(Debug)]
pub struct Prepared(Chosen);

enum Chosen {
    Import,
    Alias(Arc<Alias>),
    Mirror(MirrorReason),
}

impl fmt::Debug for Chosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Import => f.write_str("Import"),
            Self::Alias(alias) => write!(f, "Alias({})", alias.range()),
            Self::Mirror(reason) => write!(f, "Mirror({reason:?})"),
        }
    }
}

impl fmt::Debug for VulkanDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VulkanDevice").field("capabilities", &self.gpu.caps).finish_non_exhaustive()
    }
}

impl VulkanDevice {
    /// Takes a device into use.
    ///
    /// # Errors
    /// [`Error::BadForce`], [`Error::NotEnabled`], [`Error::Allocator`].
    ///
    /// # Safety
    /// 1. `context` is what its fields say: the handles belong together, and exactly the extensions listed (or more) were enabled.
    /// 2. The handles stay alive until this value and every [`Import`] it made are dropped.
    /// 3. The semaphore of a [`Timeline`] is a timeline semaphore of this device, and stays alive until its submit is retired.
    /// 4. While [`Device::wait_idle`] runs (a manager's teardown calls it), no other thread uses a queue of this device.
    pub unsafe fn new(context: DeviceContext, config: &Config) -> Result<Self, Error> {
        let force = Force::from_env()?.or(config.force);
        // SAFETY: points 1 and 2 of the contract.
        let gpu = Arc::new(unsafe { Gpu::new(context, config.budget) }?);
        let rules = Rules {
            force,
            imports: gpu.caps.import == Support::Usable,
            aliases: gpu.caps.import_alignment <= page_size() as u64,
        };
        Ok(Self {
            completion: Completion::new(&gpu),
            trials: Trials::default(),
            aliases: Arc::default(),
            mirrors: Arc::new(MirrorHeap::new(&gpu)?),
            rules,
            gpu,
        })
    }

    /// What the device says of itself.
    #[must_use]
    pub fn capabilities(&self) -> &Capabilities {
        &self.gpu.caps
    }

    /// What the device answers to an import of this kind of memory; tried now if it hasn't been.
    #[must_use]
    pub fn trial(&self, kind: MappingKind) -> TrialResult {
        self.trials.of(&self.gpu, kind)
    }

    /// The whole trial table. Tries what hasn't been tried.
    #[must_use]
    pub fn trials(&self) -> Vec<Trial> {
        MappingKind::ALL.into_iter().map(|kind| Trial { kind, result: self.trial(kind) }).collect()
    }

    /// The path that is forced, by the environment or the configuration.
    #[must_use]
    pub fn forced(&self) -> Option<Force> {
        self.rules.force
    }

    /// A mirror for a range that can't be imported, or the error that says why that won't do either.
    fn mirrored(&self, request: &Request<'_>, reason: MirrorReason, call: &'static str) -> Result<Chosen, DeviceError> {
        let code = match reason {
            MirrorReason::Refused(raw) => vk::Result::from_raw(raw),
            _ => vk::Result::ERROR_EXTENSION_NOT_PRESENT,
        };
        if matches!(self.rules.force, Some(Force::Import | Force::Alias)) {
            return Err(self.gpu.failed(call, request.range, code));
        }
        if request.access == Access::ReadWrite {
            let why = "the device can't import this memory, and what it writes can't be a copy; use Access::Read, or memory of a kind that \
                       the device imports (the trial table lists them)";
            return Err(DeviceError::Fault { range: request.range, why, errno: libc::EOPNOTSUPP });
        }
        Ok(Chosen::Mirror(reason))
    }

    fn imported(&self, request: &Request<'_>, alias: Option<Arc<Alias>>) -> Result<Import, NotImported> {
        let (path, range, usage) = match &alias {
            // What the device may do depends on the mapping it goes through.
            Some(alias) => (Path::AliasImport, alias.range(), usage(&self.gpu, [alias.protection()])),
            None => (Path::Import, request.range, self.usage(request)),
        };
        let pieces = import(&self.gpu, request, range, usage)?;
        Ok(imported(path, pieces, alias))
    }

    fn usage(&self, request: &Request<'_>) -> vk::BufferUsageFlags {
        usage(&self.gpu, request.mappings.iter().map(|mapping| mapping.protection))
    }
}

impl Device for VulkanDevice {
    type Prepared = Prepared;
    type Import = Import;
    type Signal = Timeline;

    fn prepare(&self, request: &Request<'_>) -> Result<Preparation<Prepared>, DeviceError> {
        self.gpu.check_alive()?;
        admit(request.mappings, request.access)?;
        let run = match decide(&self.rules, request.mappings, |kind| self.trial(kind)) {
            Plan::Mirror(reason) => {
                let chosen = self.mirrored(request, reason, "vkAllocateMemory (trial import)")?;
                return Ok(Preparation::Ready(Prepared(chosen)));
            }
            Plan::Import => return Ok(Preparation::Ready(Prepared(Chosen::Import))),
            Plan::Alias(run) => run,
        };
        let alias = match self.aliases.get(run) {
            Some(alias) => Ok(alias),
            None if request.watched => return Ok(Preparation::NeedsUnwatched),
            None => self.aliases.make(request.range, run),
        };
        match alias {
            Ok(alias) => Ok(Preparation::Ready(Prepared(Chosen::Alias(alias)))),
            Err(NoAlias::Fault(fault)) => Err(fault),
            Err(NoAlias::Impossible(errno)) if self.rules.force == Some(Force::Alias) => Err(DeviceError::Failed {
                call: "mremap (making an alias)",
                range: request.range,
                code: errno.to_string(),
                raw: errno as i32,
            }),
            Err(NoAlias::Impossible(_)) => Ok(Preparation::Ready(Prepared(Chosen::Import))),
        }
    }

    fn import(&self, request: &Request<'_>, prepared: Prepared) -> Result<Import, DeviceError> {
        self.gpu.check_alive()?;
        // The mappings may have changed since the range was prepared.
        admit(request.mappings, request.access)?;
        let imported = match prepared.0 {
            Chosen::Import => self.imported(request, None),
            Chosen::Alias(alias) => self.imported(request, Some(alias)),
            Chosen::Mirror(reason) => return mirror(&self.mirrors, request, Path::Mirror(reason), self.usage(request)),
        };
        match imported {
            Ok(import) => Ok(import),
            Err(NotImported::Stop(error)) => Err(error),
            Err(NotImported::Refused { call, code }) => {
                let reason = MirrorReason::Refused(code.as_raw());
                self.mirrored(request, reason, call)?;
                mirror(&self.mirrors, request, Path::Mirror(reason), self.usage(request))
            }
        }
    }

    fn refresh(&self, import: &Import, request: &Request<'_>) -> Result<(), DeviceError> {
        self.gpu.check_alive()?;
        match import.store() {
            Store::Imported(_) => Ok(()),
            Store::Mirrored(pieces) => refresh(pieces, request.range),
        }
    }

    fn release(&self, import: Import) {
        drop(import);
    }

    fn path(&self, import: &Import) -> Path {
        import.path()
    }

    fn follow(&self, signal: Timeline, ticket: Ticket) {
        self.completion.follow(signal, ticket);
    }

    fn wait_idle(&self, limit: Duration) -> Result<(), DeviceError> {
        // The command has no time limit, so it gets a thread of its own, which is left behind if the time is over.
        let (gpu, (done, answer)) = (Arc::clone(&self.gpu), mpsc::sync_channel(1));
        let wait = move || {
            // SAFETY: the device is live, and no other thread uses its queues (point 4 of the contract of `new`).
            let idle = unsafe { gpu.device().device_wait_idle() };
            // Nobody listens any more if the time was over.
            let _ = done.send(idle);
        };
        let failed = |call, code: String| {
            let range = HostRange::new(0, page_size()).expect("page 0 is a range");
            Err(DeviceError::Failed { call, range, code, raw: vk::Result::TIMEOUT.as_raw() })
        };
        if let Err(error) = thread::Builder::new().name("pinfold-idle".to_owned()).spawn(wait) {
            return failed("starting a thread for vkDeviceWaitIdle", error.to_string());
        }
        match answer.recv_timeout(limit) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(code)) => Err(self.gpu.failed(
                "vkDeviceWaitIdle",
                HostRange::new(0, page_size()).expect("page 0 is a range"),
                code,
            )),
            Err(_) => failed("vkDeviceWaitIdle", format!("the device was still busy after {limit:?}")),
        }
    }
}
