//! A device without a GPU that does what a GPU's memory unit does: it pins the program's real pages and moves bytes through the pin, by itself
//! and later. So a pin that has become stale shows: the device still sees the old page where the program sees a new one.
//!
//! **Problem.** Vulkan's CPU drivers go through the page table like the program itself; with them a stale import can't be told from a good one.
//!
//! **Law.** Pages are taken when the range is imported, by the kernel, for long and for writing, and held until the import is released.
//! What can't be taken so is *not pinnable*: memory the program may not write, and shared mappings of files on a disk (before Linux 6.5,
//! private ones too).
//!
//! **Protocol.** Pins are fixed buffers of one io_uring; a transfer is a read or write of such a buffer against a memfd, which stands for the
//! device's own memory. One thread, the engine, submits all transfers and takes their completions: the kernel finishes a request in the thread
//! that submitted it, which must not be one that may be asleep in `munmap` just then. Imports and releases are made by the callers' threads, as a
//! pin may take its time.

mod engine;
mod hold;
mod job;
mod pins;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pinfold_core::{Device, DeviceError, Path, Preparation, Request, Ticket};
use pinfold_invalidate::HostRange;

use crate::fence::{Fence, Followed};
use crate::leaks;
use crate::memory::{Backing, Region};
use crate::skip_part;
use engine::Engine;
use hold::Hold;
pub use job::Job;
pub use pins::DmaImport;
use pins::Pins;

/// The device. Clones are the same device; it stops when the last one is dropped, and cancels what has not begun.
#[derive(Debug, Clone)]
pub struct DmaDevice(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    engine: Engine,
    pins: Arc<Pins>,
    followed: Followed,
    hold: Hold,
}

impl DmaDevice {
    /// Starts a device.
    ///
    /// # Errors
    /// Those of `io_uring_setup`: `ENOSYS` or `EPERM` where the kernel or a filter allows none.
    pub fn new() -> io::Result<Self> {
        let pins = Arc::new(Pins::new()?);
        let engine = Engine::start(Arc::clone(&pins))?;
        Ok(Self(Arc::new(Inner { engine, pins, followed: Followed::default(), hold: Hold::default() })))
    }

    /// Pins the pages of a range.
    ///
    /// # Errors
    /// [`DeviceError::Fault`] for what is not pinnable, [`DeviceError::Budget`] beyond `RLIMIT_MEMLOCK` and the device's own limits.
    pub fn pin(&self, range: HostRange) -> Result<DmaImport, DeviceError> {
        self.0.pins.pin(range)
    }

    /// Whether the device pins private mappings of a file: before Linux 6.5, io_uring refuses them with `EOPNOTSUPP`.
    ///
    /// # Panics
    /// If it can't be tried, or is refused for another reason.
    #[must_use]
    pub fn pins_files(&self) -> bool {
        let region = Region::new(Backing::FilePrivate, 1).expect("a mapped file");
        match self.pin(region.range()) {
            Ok(_) => true,
            Err(DeviceError::Fault { errno: libc::EOPNOTSUPP, .. }) => false,
            Err(e) => panic!("a private mapping of a file: {e}"),
        }
    }

    /// Whether one pin may lie in several files, as anonymous shared memory does after a mapping over a part of it: not before Linux 6.5. Found out
    /// by trying it.
    ///
    /// # Panics
    /// If it can't be tried, or is refused for another reason.
    #[must_use]
    pub fn spans_files(&self) -> bool {
        let region = Region::new(Backing::AnonymousShared, 2).expect("shared memory");
        region.map_over(1..2).expect("more of it");
        match self.pin(region.range()) {
            Ok(_) => true,
            Err(DeviceError::Fault { errno: libc::EINVAL, .. }) => {
                skip_part!("this kernel's io_uring pins memory of one file at a time (before Linux 6.5)");
                false
            }
            Err(e) => panic!("two pieces of shared memory: {e}"),
        }
    }

    /// Whether pages are unpinned as soon as their import is dropped, as a GPU's driver does it; found out by trying it. The io_uring of older kernels
    /// (6.1 is one) collects what it has to let go of for a second.
    ///
    /// # Panics
    /// If it can't be tried.
    #[must_use]
    pub fn lets_go_at_once(&self) -> bool {
        let region = Region::new(Backing::Anonymous, 1).expect("a page");
        let (before, began) = (leaks::pinned(), Instant::now());
        drop(self.pin(region.range()).expect("a page that can be pinned"));
        while leaks::pinned() > before && began.elapsed() < Duration::from_millis(500) {
            std::thread::yield_now();
        }
        leaks::pinned() <= before
    }

    /// The next import takes its pages and is then kept waiting until [`let_go`](Self::let_go).
    pub fn hold_next_import(&self) {
        self.0.hold.arm();
    }

    /// Waits until an import is held.
    ///
    /// # Panics
    /// If that doesn't come about.
    pub fn wait_held(&self) {
        self.0.hold.wait_held();
    }

    /// Lets the held import go on, and holds none.
    pub fn let_go(&self) {
        self.0.hold.let_go();
    }

    /// How many imports are alive.
    #[must_use]
    pub fn live_imports(&self) -> usize {
        self.0.pins.live()
    }

    /// A job in which the device reads the program's memory: `len` bytes, `offset` bytes into the import.
    ///
    /// # Errors
    /// Those of making the device's memory.
    ///
    /// # Panics
    /// If the bytes lie outside the import.
    pub fn read_job(&self, import: &DmaImport, offset: usize, len: usize) -> io::Result<Job> {
        self.0.engine.job(import.place(offset, len), None)
    }

    /// A job in which the device writes `bytes` into the program's memory, `offset` bytes into the import.
    ///
    /// # Errors
    /// Those of making the device's memory.
    ///
    /// # Panics
    /// If the bytes lie outside the import.
    pub fn write_job(&self, import: &DmaImport, offset: usize, bytes: &[u8]) -> io::Result<Job> {
        self.0.engine.job(import.place(offset, bytes.len()), Some(bytes))
    }
}

impl Device for DmaDevice {
    type Prepared = ();
    type Import = DmaImport;
    type Signal = Fence;
    type Commands = ();

    fn prepare(&self, _: &Request<'_>) -> Result<Preparation<()>, DeviceError> {
        // Whether a range is pinnable only the kernel knows, and it tells when it is asked to pin.
        Ok(Preparation::Ready(()))
    }

    fn import(&self, request: &Request<'_>, (): ()) -> Result<DmaImport, DeviceError> {
        let import = self.pin(request.range)?;
        self.0.hold.pass();
        Ok(import)
    }

    fn locked_bytes(&self, range: HostRange) -> u64 {
        range.len() as u64
    }

    fn refresh(&self, _: &DmaImport, _: &Request<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn release(&self, import: DmaImport) {
        drop(import);
    }

    fn path(&self, _: &DmaImport) -> Path {
        Path::Import
    }

    fn follow(&self, signal: Fence, ticket: Ticket) {
        self.0.followed.follow(signal, ticket);
    }

    fn wait_idle(&self, limit: Duration) -> Result<(), DeviceError> {
        if !self.0.engine.wait_idle(limit) {
            return Err(DeviceError::StillBusy(limit));
        }
        self.0.followed.give_up();
        Ok(())
    }
}
