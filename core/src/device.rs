//! What the object machine asks of a device, and nothing else: judge a range, take its pages, give them back, say when work is over.
//!
//! The order of the calls for one acquisition is *prepare → (the range becomes watched) → import → … → release*. No lock of this crate is
//! held across any of them, all run on worker threads or on the thread that calls `acquire` or `shrink`, and never on the
//! monitor thread.

use std::ops::Range;
use std::time::Duration;

use pinfold_invalidate::{Coverage, HostRange, Mapping};
use thiserror::Error;

use crate::Ticket;
use crate::dmabuf::DmaBufPart;
use crate::populate::Presence;

/// What the device may do with the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// The device only reads. Read-only mappings are fine.
    Read,
    /// The device reads and writes. Every page must be writable by the program.
    ReadWrite,
}

impl Access {
    /// The access that the flags of a kernel userptr object ask for: bit 0 is `READ_ONLY`. What the kernel calls `UNSYNCHRONIZED` is
    /// [`Manager::register_unwatched`](crate::Manager::register_unwatched).
    ///
    /// # Errors
    /// [`Error::UnknownFlag`](crate::Error::UnknownFlag) for any other bit.
    pub fn from_flags(flags: u32) -> Result<Self, crate::Error> {
        match flags {
            0 => Ok(Self::ReadWrite),
            1 => Ok(Self::Read),
            _ => Err(crate::Error::UnknownFlag(flags)),
        }
    }
}

/// Which way an object's bytes are to reach the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(u8)]
pub enum Policy {
    /// The device chooses, by what it has tried and measured and by how the object is used, and says why ([`Path`]).
    #[default]
    Auto = 0,
    /// The program's own pages. What can't be imported can't be acquired.
    Import = 1,
    /// A copy.
    Mirror = 2,
}

impl Policy {
    pub(crate) fn from_number(number: u8) -> Self {
        match number {
            1 => Self::Import,
            2 => Self::Mirror,
            _ => Self::Auto,
        }
    }
}

/// How an object has been used so far, for devices on which taking pages costs more than copying them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Use {
    /// How often its pages have been taken.
    pub imports: u64,
    /// How many leases it has been part of.
    pub leases: u64,
}

/// A range that is about to be given to a device.
///
/// ```
/// # use pinfold_core::{Access, HostRange, Request, page_size};
/// let range = HostRange::new(page_size(), page_size())?;
/// let request = Request { label: "mesh", ..Request::new(range, Access::Read, &[]) };
/// # Ok::<(), pinfold_core::RangeError>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The range of the object.
    pub range: HostRange,
    /// What the device may do.
    pub access: Access,
    /// The mappings that cover `range`, in address order and without a hole, as they were a moment ago.
    pub mappings: &'a [Mapping],
    /// The range has shared memory, and some page of it is watched by this process already. A second mapping (alias) of it must not be made then: it
    /// would inherit the watch.
    pub watched: bool,
    /// How well the range is watched; `None` before the watch begins. Less than [`Coverage::Watched`] means that changes may go unnoticed.
    pub coverage: Option<Coverage>,
    /// Pages of the range were discarded since they were last taken: what was made of them before must not be used again.
    pub discarded: bool,
    /// Which way the program wants.
    pub policy: Policy,
    /// How the object has been used so far.
    pub used: Use,
    /// Objects whose [`Target::group`](pinfold_invalidate::Target::group) is this may be taken together; 0: none.
    pub group: usize,
    /// The object is a [part](crate::Userptr::part) of another: no registered neighbours are to be taken along.
    pub part: bool,
    /// The object's number: it is larger than those of objects registered before. 0 for what isn't an object.
    pub id: u64,
    /// The object's label, for debug names and messages; may be empty.
    pub label: &'a str,
}

impl<'a> Request<'a> {
    /// A request with nothing but what every request has: nothing is watched or has been used, and the device chooses the way.
    #[must_use]
    pub fn new(range: HostRange, access: Access, mappings: &'a [Mapping]) -> Self {
        Self {
            range,
            access,
            mappings,
            watched: false,
            coverage: None,
            discarded: false,
            policy: Policy::Auto,
            used: Use::default(),
            group: 0,
            part: false,
            id: 0,
            label: "",
        }
    }

    /// Makes the pages of `range` present, as those of the request's own range have been: for pages next to it that a device takes as well.
    ///
    /// # Errors
    /// [`Error::Fault`](crate::Error::Fault) if they can't be.
    pub fn populate(&self, range: HostRange, mappings: &[Mapping]) -> Result<(), crate::Error> {
        crate::populate::populate(range, self.access, mappings, Presence::Unknown)
    }
}

/// What [`Device::prepare`] answers.
#[derive(Debug)]
pub enum Preparation<P> {
    /// All that had to happen before the range becomes watched has happened.
    Ready(P),
    /// An alias has to be made and `Request::watched` is true: call again with the range unwatched.
    NeedsUnwatched,
}

/// How an object's bytes reach the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Path {
    /// The program's own mapping is imported.
    Import,
    /// A second mapping of the same shared pages, owned by us, is imported. It outlives the program's `munmap`.
    AliasImport,
    /// A dma-buf: of the program's own shared memory, or one that the object was registered for.
    DmaBuf,
    /// A copy in device memory.
    Mirror(MirrorReason),
}

/// Why a copy stands in for the program's own pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MirrorReason {
    /// `PINFOLD_FORCE=mirror`, or the same in the configuration.
    Forced,
    /// The object's [`Policy`].
    Asked,
    /// Taking the object's pages costs this device more than copying them, and the object changes hands too often to make up for it.
    Cheaper {
        /// Nanoseconds that taking pages of this size costs, as measured by the trial.
        import_ns: u64,
        /// Nanoseconds that copying them costs.
        copy_ns: u64,
    },
    /// The device has no way to import host memory.
    Unsupported,
    /// The trial import of this kind of mapping, or the import of this very range, was refused with this code of the device.
    Refused(i32),
}

/// What a device answers when it can't.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The memory is not what the device needs: a hole, no permission, device memory. The object becomes `Faulted`.
    #[error("range {range} can't be given to the device: {why}")]
    Fault {
        /// The part that is wrong.
        range: HostRange,
        /// What is wrong with it, and what to do.
        why: &'static str,
        /// `EFAULT`, `EPERM`, ...
        errno: i32,
    },
    /// There is not enough device memory, host memory or budget.
    #[error("range {range} needs {needed} bytes of {what}, and {available} are left")]
    Budget {
        /// The range asked for.
        range: HostRange,
        /// Which budget.
        what: &'static str,
        /// Bytes needed.
        needed: u64,
        /// Bytes left.
        available: u64,
    },
    /// The device is lost: nothing it was given is used any more, and nothing works from now on.
    #[error("the device is lost; unregister everything, and make a new device and a new manager")]
    Lost,
    /// The device did not come to rest in time.
    #[error("the device was still working after {0:?}; wait for your queues before the manager goes")]
    StillBusy(Duration),
    /// A call of the device's interface failed.
    #[error("{call} failed for range {range}: {code} (code {raw})")]
    Failed {
        /// Name of the call.
        call: &'static str,
        /// The range asked for.
        range: HostRange,
        /// The device's name for the error.
        code: String,
        /// The device's number for the error.
        raw: i32,
    },
}

impl DeviceError {
    /// The errno that says the same.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Fault { errno, .. } => *errno,
            Self::Budget { .. } => libc::ENOMEM,
            Self::Lost => libc::ENODEV,
            Self::StillBusy(_) => libc::ETIMEDOUT,
            Self::Failed { .. } => libc::EIO,
        }
    }
}

/// How work on a device ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It ran to its end.
    Done,
    /// The device was lost, or nobody can tell any more when the work ends (and the device promises that it doesn't run any more).
    Lost,
}

/// A device that works on host memory.
pub trait Device: Send + Sync + 'static {
    /// What [`prepare`](Self::prepare) hands to [`import`](Self::import): the chosen path, an alias. Dropping it undoes the preparation.
    type Prepared: Send;
    /// Memory of the device over the program's pages (or a mirror of them). What a lease shows to the engine.
    type Import: Send + Sync + 'static;
    /// How the engine says when a submit is over: a timeline semaphore and a value, for Vulkan.
    type Signal: Send + 'static;
    /// What the engine records its work into: a command buffer, for Vulkan. `()` where nothing is recorded.
    type Commands: Copy;

    /// Judges the range and does what must be done before it is watched.
    ///
    /// # Errors
    /// [`DeviceError::Fault`] if the device must never see this range; the driver's word is not asked for that, as CPU drivers accept anything.
    fn prepare(&self, request: &Request<'_>) -> Result<Preparation<Self::Prepared>, DeviceError>;

    /// Takes the pages. May block and may be slow. The pages are populated and watched, and may still vanish at any moment: then the caller
    /// throws the import away, and all this call must guarantee is that it neither crashes nor leaks.
    ///
    /// # Errors
    /// Any; the range is then as if it had never been given.
    fn import(&self, request: &Request<'_>, prepared: Self::Prepared) -> Result<Self::Import, DeviceError>;

    /// Bytes that an import of the range counts against `RLIMIT_MEMLOCK`. None, unless the device says otherwise.
    ///
    /// Where it does, objects that nobody uses are evicted before the limit is reached. A device whose limit can't be told beforehand answers
    /// [`DeviceError::Budget`] to an import: then others are evicted, and it is asked again.
    fn locked_bytes(&self, range: HostRange) -> u64 {
        let _ = range;
        0
    }

    /// Takes a part of a dma-buf, for an object that was registered for one: `request.range` has its addresses, where nothing is mapped, and no
    /// mappings. What else is true of [`import`](Self::import) is true of this.
    ///
    /// # Errors
    /// Any. Without an implementation: that the device imports no dma-bufs.
    fn import_dmabuf(&self, request: &Request<'_>, part: &DmaBufPart) -> Result<Self::Import, DeviceError> {
        let _ = part;
        let why = "this device imports no dma-bufs";
        Err(DeviceError::Fault { range: request.range, why, errno: libc::EOPNOTSUPP })
    }

    /// Makes what the device sees current. Called at every acquire of a valid object; does nothing where the device reads the program's own pages.
    ///
    /// # Errors
    /// [`DeviceError::Fault`] if the program's pages vanished meanwhile.
    fn refresh(&self, import: &Self::Import, request: &Request<'_>) -> Result<(), DeviceError>;

    /// Records what brings the copy up to date that the device has of the import, where the engine has that done by its own work. Returns a mark
    /// for [`uploaded`](Self::uploaded).
    ///
    /// # Safety
    /// That of [`Lease::record_uploads`](crate::Lease::record_uploads).
    unsafe fn record_upload(&self, import: &Self::Import, commands: Self::Commands) -> u64 {
        let _ = (import, commands);
        0
    }

    /// Work that recorded an upload has been submitted; `mark` is what [`record_upload`](Self::record_upload) said of it.
    fn uploaded(&self, import: &Self::Import, mark: u64) {
        let _ = (import, mark);
    }

    /// Work is about to be submitted that writes these bytes of the range (counted from its start). Does nothing where the device writes to the
    /// program's own pages. [`forget_writes`](Self::forget_writes) ends it, with the same `written`.
    fn expect_writes(&self, import: &Self::Import, written: &[Range<usize>]) {
        let _ = (import, written);
    }

    /// The work is over: brings what it wrote into the program's memory, as far as `is_current` says of each part, immediately before it is
    /// written, that it still is the memory the object stands for.
    ///
    /// Mutators wait meanwhile, so nothing is allocated or freed, and no driver is called.
    ///
    /// # Errors
    /// [`DeviceError::Fault`] about the first part that could not be brought back.
    fn write_back(
        &self,
        import: &Self::Import,
        range: HostRange,
        written: &[Range<usize>],
        is_current: &dyn Fn(HostRange) -> bool,
    ) -> Result<(), DeviceError> {
        let _ = (import, range, written, is_current);
        Ok(())
    }

    /// The work is over and its results have been [brought back](Self::write_back), or it is lost, or was never submitted.
    fn forget_writes(&self, import: &Self::Import, written: &[Range<usize>]) {
        let _ = (import, written);
    }

    /// An object over this range is gone. The place to give up what was kept for its next acquisition.
    fn unregistered(&self, range: HostRange) {
        let _ = range;
    }

    /// Gives the pages back. Called once per import, when no lease and no unfinished work names it.
    fn release(&self, import: Self::Import);

    /// How the bytes reach the device.
    fn path(&self, import: &Self::Import) -> Path;

    /// Calls `ticket.retire(..)` when the work that `signal` stands for is over. Returns at once.
    ///
    /// The thread that does so should not allocate before it calls `retire`: a mutator that holds the allocator's lock may be waiting for it.
    fn follow(&self, signal: Self::Signal, ticket: Ticket);

    /// Waits until no work runs on the device, at most `limit`, and then retires every ticket it still follows: their signals will never come.
    /// Called by the manager's teardown only, when submits have not ended by themselves.
    ///
    /// # Errors
    /// [`DeviceError::Lost`] if it is lost (then nothing runs, and all tickets have been retired), [`DeviceError::StillBusy`] if the time is over.
    fn wait_idle(&self, limit: Duration) -> Result<(), DeviceError>;

    /// Whether the device is known to be lost. Asked when work ended as [`Outcome::Lost`], which may have other reasons; if it is, the manager gives
    /// back everything and refuses everything. [`DeviceError::Lost`] from any other call says the same.
    fn is_lost(&self) -> bool {
        false
    }

    /// The manager is gone: ends the device's own threads and gives up what belongs to no import. Called once, last, when nothing is under way.
    /// Imports that old leases still keep may be [released](Self::release) even later.
    fn shut_down(&self) {}
}
