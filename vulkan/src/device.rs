//! The device as the object machine sees it: admission, then a plan, then an alias, an import or a mirror.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use ash::vk;
use pinfold_core::dmabuf::DmaBufPart;
use pinfold_core::{Access, Device, DeviceError, MirrorReason, Path, Policy, Preparation, Request, Ticket};
use pinfold_invalidate::{HostRange, Space, mappings, page_size};

use crate::admission::admit;
use crate::alias::{Alias, AliasCache, NoAlias};
use crate::block::Blocks;
use crate::completion::{Completion, Signal};
use crate::gpu::Gpu;
use crate::import::{Import, NotImported, Store, import, imported, usage};
use crate::mirror::{MirrorHeap, mirror};
use crate::path::{MappingKind, Plan, Rules, Run, decide, is_known, is_mirror_cheaper};
use crate::probe::{Costs, Trial, TrialResult, Trials};
use crate::upload::Uploader;
use crate::{Capabilities, Config, DeviceContext, Force, SetupError, Support};

/// One Vulkan device that host memory can be given to.
///
/// Programs use a [`Manager`](crate::Manager), which has one.
pub struct VulkanDevice {
    // Dropped first: its threads use the device.
    completion: Completion,
    pub(crate) gpu: Arc<Gpu>,
    trials: Trials,
    aliases: Arc<AliasCache>,
    blocks: Arc<Blocks>,
    mirrors: Arc<MirrorHeap>,
    /// Where the engine has lent a queue for it; `None` also where it records the copies itself.
    uploader: Mutex<Option<Arc<Uploader>>>,
    rules: Rules,
    pub(crate) dmabuf_trial: OnceLock<Result<(), MirrorReason>>,
    /// The answer that [`Device::wait_idle`] did not wait for to the end.
    waiting: Mutex<Option<Receiver<Result<(), vk::Result>>>>,
}

/// A range whose way to the device is chosen. From [`Device::prepare`] of a [`VulkanDevice`].
#[derive(Debug)]
pub struct Prepared(Chosen);

enum Chosen {
    Import,
    /// An alias, and the part of it that shows the range.
    Alias(Arc<Alias>, HostRange),
    DmaBuf(Run),
    Mirror(MirrorReason),
}

impl fmt::Debug for Chosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Import => f.write_str("Import"),
            Self::Alias(_, part) => write!(f, "Alias({part})"),
            Self::DmaBuf(run) => write!(f, "DmaBuf({run:?})"),
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
    /// [`SetupError::BadForce`], [`SetupError::NotEnabled`], [`SetupError::Allocator`], [`SetupError::NoUploads`], [`SetupError::Vulkan`],
    /// [`SetupError::Manager`].
    ///
    /// # Safety
    /// 1. `context` is what its fields say: the handles belong together, and exactly the extensions listed (or more) were enabled.
    /// 2. The handles stay alive until this value and every [`Import`] it made are dropped.
    /// 3. A [`Signal`] is what it says: the semaphore of a timeline is a timeline semaphore of this device, and stays alive until its submit is
    ///    retired; a fence is one of this device, unsignalled at the submit, and neither reset nor destroyed until then.
    /// 4. The families in `config` are the device's.
    /// 5. From the first call of [`Device::wait_idle`] (a manager's teardown calls it) until one has answered `Ok` or `Lost`, no thread uses a
    ///    queue of this device, and the device is not destroyed.
    pub unsafe fn new(context: DeviceContext, config: &Config) -> Result<Self, SetupError> {
        let force = Force::from_env()?.or(config.force);
        // SAFETY: points 1 and 2 of the contract.
        let gpu = Arc::new(unsafe { Gpu::new(context) }?.for_families(config.families()));
        let rules = Rules {
            force,
            imports: gpu.caps.import == Support::Usable,
            aliases: gpu.caps.import_alignment <= page_size() as u64,
            dmabufs: gpu.dmabuf.is_some(),
        };
        let space = Space::get(config.deadline).map_err(pinfold_core::Error::from)?;
        let mirrors = Arc::new(MirrorHeap::new(&gpu, &space, config)?);
        let uploader = match &config.uploads {
            Some(uploads) => Uploader::new(&gpu, &mirrors, uploads)?.map(Arc::new),
            None => None,
        };
        Ok(Self {
            completion: Completion::new(&gpu),
            trials: Trials::default(),
            aliases: Arc::default(),
            blocks: Blocks::new(&space),
            mirrors,
            uploader: Mutex::new(uploader),
            rules,
            dmabuf_trial: OnceLock::new(),
            gpu,
            waiting: Mutex::new(None),
        })
    }

    pub(crate) fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// What the device says of itself.
    #[must_use]
    pub fn capabilities(&self) -> &Capabilities {
        &self.gpu.caps
    }

    /// What the device answers to an import of this kind of memory; tried now if it hasn't been.
    #[must_use]
    pub fn trial(&self, kind: MappingKind) -> TrialResult {
        self.trials.of(&self.gpu, kind).result
    }

    /// The whole trial table. Tries what hasn't been tried.
    #[must_use]
    pub fn trials(&self) -> Vec<Trial> {
        MappingKind::ALL.into_iter().map(|kind| self.trials.of(&self.gpu, kind)).collect()
    }

    /// What importing and copying cost on this device; measured now, in some milliseconds, if they haven't been. `None` if it can't import.
    #[must_use]
    pub fn costs(&self) -> Option<Costs> {
        self.trials.costs(&self.gpu)
    }

    /// The path that memory of this kind takes: what forcing, the trial and the table of wishes ([`MappingKind::wish`]) come to. Single ranges
    /// may still be mirrored, for reasons of their own.
    #[must_use]
    pub fn path_of(&self, kind: MappingKind) -> Path {
        match (self.rules.force, self.trial(kind).refusal()) {
            (Some(Force::Mirror), _) => Path::Mirror(MirrorReason::Forced),
            _ if !self.rules.imports => Path::Mirror(MirrorReason::Unsupported),
            (None, Some(code)) => Path::Mirror(MirrorReason::Refused(code.as_raw())),
            (Some(Force::Import), _) => Path::Import,
            _ if kind.wish() == Path::AliasImport && !self.rules.aliases => Path::Import,
            _ => kind.wish(),
        }
    }

    /// Memory allocations of the device that imports have at this moment.
    #[must_use]
    pub fn allocations(&self) -> u32 {
        self.gpu.allocations.alive()
    }

    /// Bytes that mirrors have copied from the program's memory so far.
    #[must_use]
    pub fn copied_bytes(&self) -> u64 {
        self.mirrors.copied()
    }

    pub(crate) fn note_lost(&self) {
        let _ = self.gpu.saw(vk::Result::ERROR_DEVICE_LOST);
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
        let forced = matches!(self.rules.force, Some(Force::Import | Force::Alias | Force::DmaBuf));
        if forced || (request.policy == Policy::Import && self.rules.force.is_none()) {
            return Err(self.gpu.failed(call, request.range, code));
        }
        Ok(Chosen::Mirror(reason))
    }

    /// Why a range that could be imported had better not be.
    fn cheaper(&self, request: &Request<'_>) -> Option<MirrorReason> {
        let free = self.rules.force.is_none() && request.policy == Policy::Auto && request.access == Access::Read;
        // Measuring takes a while, so it isn't done for objects that stay.
        if !free || !is_known(request.used) || !self.rules.imports {
            return None;
        }
        let (costs, bytes) = (self.costs()?, request.range.len() as u64);
        let (import_ns, copy_ns) = (costs.import_ns(bytes), costs.copy_ns(bytes));
        is_mirror_cheaper(request.used, import_ns, copy_ns).then_some(MirrorReason::Cheaper { import_ns, copy_ns })
    }

    /// Waits for the device on a thread of its own, because the command has no time limit. The thread is left behind if the time is over; the
    /// next wait listens to it again, because two threads must not wait for the same queues.
    fn start_waiting(&self) -> io::Result<Receiver<Result<(), vk::Result>>> {
        let (gpu, (done, answer)) = (Arc::clone(&self.gpu), mpsc::sync_channel(1));
        let wait = move || {
            // SAFETY: the device is live, and no other thread uses its queues (point 5 of the contract of `new`).
            let idle = unsafe { gpu.device().device_wait_idle() };
            // If nobody listens any more, the manager is gone.
            let _ = done.send(idle);
        };
        thread::Builder::new().name("pinfold-idle".to_owned()).spawn(wait)?;
        Ok(answer)
    }

    fn imported(&self, request: &Request<'_>, alias: Option<(&Arc<Alias>, HostRange)>) -> Result<Import, NotImported> {
        let (path, usage) = match alias {
            // What the device may do depends on the mapping it goes through.
            Some((alias, _)) => (Path::AliasImport, usage(&self.gpu, [alias.protection()])),
            None => (Path::Import, self.usage(request)),
        };
        let pieces = import(&self.gpu, Some(&self.blocks), request, alias, usage)?;
        Ok(imported(path, pieces))
    }

    fn mirror(&self, request: &Request<'_>, reason: MirrorReason) -> Result<Import, DeviceError> {
        let uploader = self.uploader.lock().unwrap_or_else(PoisonError::into_inner).clone();
        mirror(&self.mirrors, uploader.as_ref(), request, Path::Mirror(reason), self.usage(request))
    }

    /// A new alias of the request's range, or better of all of the mapping around it, for its neighbours.
    fn make_alias(&self, request: &Request<'_>, run: Run) -> Result<Arc<Alias>, NoAlias> {
        if let Some((whole, all)) = self.around(request, run)
            && let Ok(alias) = self.aliases.make(whole, all, request.group)
        {
            return Ok(alias);
        }
        self.aliases.make(request.range, run, request.group)
    }

    /// The whole of the mapping around a range, and what it shows, if nobody watches any of it.
    fn around(&self, request: &Request<'_>, run: Run) -> Option<(HostRange, Run)> {
        let (first, last) = (request.mappings.first()?.whole, request.mappings.last()?.whole);
        let whole = HostRange::new(first.start(), last.end() - first.start()).ok()?;
        let all = Run::of(&mappings(whole).ok()?)?;
        let wanted = request.group != 0 && !self.blocks.space.is_watched(whole);
        (wanted && all.covers(&run)).then_some((whole, all))
    }

    fn usage(&self, request: &Request<'_>) -> vk::BufferUsageFlags {
        usage(&self.gpu, request.mappings.iter().map(|mapping| mapping.protection))
    }
}

impl Device for VulkanDevice {
    type Prepared = Prepared;
    type Import = Import;
    type Signal = Signal;
    type Commands = vk::CommandBuffer;

    fn prepare(&self, request: &Request<'_>) -> Result<Preparation<Prepared>, DeviceError> {
        self.gpu.check_alive()?;
        admit(request.mappings, request.access)?;
        if let Some(reason) = self.cheaper(request) {
            return Ok(Preparation::Ready(Prepared(Chosen::Mirror(reason))));
        }
        let run = match decide(&self.rules, request.policy, request.mappings, |kind| self.trial(kind)) {
            Plan::Mirror(reason) => {
                let chosen = self.mirrored(request, reason, "vkAllocateMemory (trial import)")?;
                return Ok(Preparation::Ready(Prepared(chosen)));
            }
            Plan::Import => return Ok(Preparation::Ready(Prepared(Chosen::Import))),
            Plan::DmaBuf(run) => {
                let forced = self.rules.force == Some(Force::DmaBuf);
                let chosen = match self.dmabuf_trial() {
                    Err(_) if !forced => {
                        // What the device said of the memory itself tells more than what stands in the way of the detour.
                        let kinds = request.mappings.iter().map(MappingKind::of);
                        let code = kinds.filter(|_| self.rules.imports).find_map(|kind| self.trial(kind).refusal());
                        let reason =
                            code.map_or(MirrorReason::Unsupported, |code| MirrorReason::Refused(code.as_raw()));
                        self.mirrored(request, reason, "vkAllocateMemory (trial import)")?
                    }
                    _ => Chosen::DmaBuf(run),
                };
                return Ok(Preparation::Ready(Prepared(chosen)));
            }
            Plan::Alias(run) => run,
        };
        let alias = match self.aliases.get(run) {
            Some(alias) => Ok(alias),
            None if request.watched => return Ok(Preparation::NeedsUnwatched),
            None => self.make_alias(request, run),
        };
        match alias {
            Ok(alias) => {
                let part = alias.part(run);
                Ok(Preparation::Ready(Prepared(Chosen::Alias(alias, part))))
            }
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
            Chosen::Alias(alias, part) => self.imported(request, Some((&alias, part))),
            Chosen::DmaBuf(run) => self.import_shared(request, run),
            Chosen::Mirror(reason) => return self.mirror(request, reason),
        };
        match imported {
            Ok(import) => Ok(import),
            Err(NotImported::Stop(error)) => Err(error),
            Err(NotImported::Refused { call, code }) => {
                let reason = MirrorReason::Refused(code.as_raw());
                self.mirrored(request, reason, call)?;
                self.mirror(request, reason)
            }
        }
    }

    fn import_dmabuf(&self, request: &Request<'_>, part: &DmaBufPart) -> Result<Import, DeviceError> {
        self.gpu.check_alive()?;
        self.import_registered(request, part)
    }

    fn refresh(&self, import: &Import, _: &Request<'_>) -> Result<(), DeviceError> {
        self.gpu.check_alive()?;
        match import.store() {
            Store::Imported(_) => Ok(()),
            Store::Mirrored(mirror) => mirror.refresh(),
        }
    }

    unsafe fn record_upload(&self, import: &Import, commands: vk::CommandBuffer) -> u64 {
        match import.store() {
            Store::Imported(_) => 0,
            // SAFETY: the contract is the same.
            Store::Mirrored(mirror) => unsafe { mirror.record(self.gpu.device(), commands) },
        }
    }

    fn uploaded(&self, import: &Import, mark: u64) {
        if let Store::Mirrored(mirror) = import.store() {
            mirror.submitted(mark);
        }
    }

    fn expect_writes(&self, import: &Import, written: &[Range<usize>]) {
        if let Store::Mirrored(mirror) = import.store() {
            mirror.expect(written);
        }
    }

    fn write_back(
        &self,
        import: &Import,
        _: HostRange,
        written: &[Range<usize>],
        is_current: &dyn Fn(HostRange) -> bool,
    ) -> Result<(), DeviceError> {
        match import.store() {
            Store::Imported(_) => Ok(()),
            Store::Mirrored(mirror) => mirror.write_back(written, is_current),
        }
    }

    fn forget_writes(&self, import: &Import, written: &[Range<usize>]) {
        if let Store::Mirrored(mirror) = import.store() {
            mirror.forget(written);
        }
    }

    fn unregistered(&self, range: HostRange) {
        self.aliases.give_up_unwanted(&self.blocks.space, range);
    }

    fn release(&self, import: Import) {
        let program = import.alias_of();
        drop(import);
        // If the program has mapped something else there, nobody will want the alias again.
        if let Some(range) = program {
            self.aliases.give_up_moved(range);
        }
    }

    fn path(&self, import: &Import) -> Path {
        import.path()
    }

    fn follow(&self, signal: Signal, ticket: Ticket) {
        self.completion.follow(signal, ticket);
    }

    fn is_lost(&self) -> bool {
        self.gpu.is_lost()
    }

    fn wait_idle(&self, limit: Duration) -> Result<(), DeviceError> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = match waiting.take() {
            Some(answer) => answer,
            None => self.start_waiting().map_err(|_| DeviceError::StillBusy(limit))?,
        };
        let Ok(idle) = answer.recv_timeout(limit) else {
            *waiting = Some(answer);
            return Err(DeviceError::StillBusy(limit));
        };
        // A wait that failed for want of memory says nothing about the device.
        idle.map_err(|code| self.gpu.saw(code)).or_else(|code| match code {
            vk::Result::ERROR_DEVICE_LOST => Ok(()),
            _ => Err(DeviceError::StillBusy(limit)),
        })?;
        self.completion.finish();
        self.gpu.check_alive()
    }

    fn shut_down(&self) {
        // The device may be dropped later than the manager, by a thread that is just looking at an object, and then its handles are gone.
        self.aliases.clear();
        drop(self.uploader.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.mirrors.close();
        self.completion.finish();
    }
}
