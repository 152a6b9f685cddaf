//! The demo's dealings with Pinfold: register a mapping, acquire it, submit a frame that reads it.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use ash::vk;
use pinfold_demos::device::Gpu;
use pinfold_demos::geometry::Part;
use pinfold_demos::glb::{Glb, Span};
use pinfold_vulkan::{
    Access, Config, Coverage, DeviceContext, Force, HostRange, Lease, Manager, Outcome, Path, Pending, SubmitError,
    Timeline, Userptr,
};

use crate::clock::Clock;
use crate::mapping::Mapping;

/// How long `munmap` may be held at most. The library's default is 100 ms, which a frame of a CPU driver can exceed.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);
/// How long the demo itself waits for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A registered mapping.
pub(crate) type Object = Userptr;

/// The manager, and what the demo needs around it.
pub(crate) struct InPlace<'g> {
    // Dropped in this order: the manager waits for values of the clock.
    manager: Manager,
    clock: Clock<'g>,
    len: u64,
}

/// A submitted frame.
pub(crate) struct Flight {
    pending: Pending,
    value: u64,
    path: Path,
    generation: u64,
}

impl<'g> InPlace<'g> {
    pub(crate) fn new(gpu: &'g Gpu, glb: &Glb, force: Option<Force>) -> Result<Self> {
        let context = DeviceContext {
            instance: gpu.instance.clone(),
            physical: gpu.physical,
            device: gpu.device.clone(),
            extensions: gpu.extensions.clone(),
            buffer_device_address: false,
        };
        let mut config = Config::default();
        config.deadline = DEADLINE;
        config.force = force;
        let clock = Clock::new(gpu)?;
        // SAFETY: the handles belong together and outlive the manager, which borrows `gpu` through the clock beside it; the device
        // has the extensions it says and the features that `requirements` asked for.
        let manager = unsafe { Manager::new(context, config) }?;
        Ok(Self { manager, clock, len: glb.len })
    }

    /// Registers a mapping. Nothing is read for it.
    pub(crate) fn register(&self, mapping: &Mapping) -> Result<Object> {
        let (start, len) = mapping.bytes();
        let range = HostRange::cover(start, len)?;
        // SAFETY: (1) no Rust reference into the mapping exists, here or anywhere; (2) it is a file's mapping, not an allocator's;
        // (3) it is unmapped behind the library's back on purpose: in the busy act only where that is survivable, a GPU that has
        // pinned the pages or an alias import; (4) the file isn't truncated by this program.
        Ok(unsafe { self.manager.register(range, Access::Read) }?)
    }

    /// Makes the object valid, if it is not.
    pub(crate) fn acquire(&self, object: &Object) -> Result<Lease> {
        self.manager.acquire_timeout(&[object], PATIENCE).context("the mapping can't be given to the device")
    }

    /// Where the bytes of the file are for the device.
    pub(crate) fn parts(&self, lease: &Lease) -> Vec<Part> {
        let view = lease.view(0);
        let chunks = view.chunks().iter();
        // The object is whole pages; the file may end before the last one does.
        let within = chunks.filter(|chunk| chunk.at < self.len);
        within
            .map(|chunk| {
                let span = Span { start: chunk.at, len: chunk.size.min(self.len - chunk.at) };
                Part { span, buffer: chunk.buffer, offset: chunk.offset }
            })
            .collect()
    }

    /// Submits a frame that was recorded for this lease. `None`: the memory has changed hands since, so it has to be acquired and recorded again.
    ///
    /// # Safety
    /// `submit` submits one frame that signals what it is given after all its accesses; it only reads the object, and only through the lease.
    pub(crate) unsafe fn submit(
        &mut self,
        lease: Lease,
        submit: impl FnOnce((vk::Semaphore, u64)) -> Result<(), vk::Result>,
    ) -> Result<Option<Flight>> {
        let (path, generation) = (lease.view(0).path, lease.view(0).generation.0);
        let timeline @ Timeline { semaphore, value } = self.clock.next();
        // SAFETY: the caller's promise.
        match unsafe { lease.submit([timeline], || submit((semaphore, value))) } {
            Ok(pending) => Ok(Some(Flight { pending, value, path, generation })),
            Err(SubmitError::Stale { .. } | SubmitError::Again(_)) => Ok(None),
            Err(error) => bail!("{error}"),
        }
    }

    /// Whether the GPU has ended the frame.
    pub(crate) fn is_over(&self, flight: &Flight) -> Result<bool> {
        Ok(self.clock.now()? >= flight.value)
    }

    /// Whether the kernel tells when the object's memory changes hands.
    pub(crate) fn is_watched(object: &Object) -> bool {
        object.coverage() == Some(Coverage::Watched)
    }

    /// Whether the device has the program's own mapping, and no alias of it.
    pub(crate) fn is_bare_import(object: &Object) -> bool {
        object.path() == Some(Path::Import)
    }

    /// Tells the object that its memory has changed hands, where the kernel doesn't.
    pub(crate) fn tell(&self, object: &Object) -> Result<()> {
        if !Self::is_watched(object) {
            self.manager.invalidate(object.range())?;
        }
        Ok(())
    }

    /// How many hold-offs ended by the deadline.
    pub(crate) fn late(&self) -> u64 {
        self.manager.stats().late
    }
}

impl Flight {
    /// Waits until the library knows that the frame is over.
    pub(crate) fn wait(&self) -> Result<()> {
        match self.pending.wait(PATIENCE) {
            Some(Outcome::Done) => Ok(()),
            Some(Outcome::Lost) => bail!("the device was lost"),
            None => bail!("the frame didn't end"),
        }
    }

    /// How the bytes reached the device.
    pub(crate) fn path(&self) -> String {
        format!("{:?}", self.path)
    }

    /// Whether the device read a copy.
    pub(crate) fn is_mirror(&self) -> bool {
        matches!(self.path, Path::Mirror(_))
    }

    /// How often the memory had changed hands before.
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }
}
