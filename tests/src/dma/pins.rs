//! The device's page table: which slot of the ring's buffer table pins which range.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};

use io_uring::IoUring;
use nix::sys::resource::{Resource, getrlimit};
use pinfold_core::DeviceError;
use pinfold_invalidate::HostRange;

use crate::leaks;

/// The kernel's limit for one table.
const SLOTS: u16 = 16_384;
/// The kernel's limit for one slot.
const MAX_LEN: usize = 1 << 30;

/// The ring, its table, and which slots are free.
pub(super) struct Pins {
    pub(super) ring: IoUring,
    free: Mutex<Vec<u16>>,
}

impl Pins {
    pub(super) fn new() -> io::Result<Self> {
        let ring = IoUring::builder().setup_cqsize(4096).build(256)?;
        ring.submitter().register_buffers_sparse(SLOTS.into())?;
        Ok(Self { ring, free: Mutex::new((0..SLOTS).rev().collect()) })
    }

    pub(super) fn live(&self) -> usize {
        usize::from(SLOTS) - self.free.lock().expect("nothing panics under this lock").len()
    }

    pub(super) fn pin(self: &Arc<Self>, range: HostRange) -> Result<DmaImport, DeviceError> {
        let full = |what, needed, available| DeviceError::Budget { range, what, needed, available };
        if range.len() > MAX_LEN {
            return Err(full("address space for one pin", range.len() as u64, MAX_LEN as u64));
        }
        let slot = self.free.lock().expect("nothing panics under this lock").pop();
        let Some(slot) = slot else { return Err(full("slots for pins", 1, 0)) };
        let pinned = self.point(slot, range.start(), range.len());
        let Err(error) = pinned else { return Ok(DmaImport { pins: Arc::clone(self), slot, range }) };
        self.free.lock().expect("nothing panics under this lock").push(slot);
        match error.raw_os_error().unwrap_or(libc::EIO) {
            libc::ENOMEM => {
                let (limit, _) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap_or_default();
                Err(full("lockable memory (RLIMIT_MEMLOCK)", range.len() as u64, limit.saturating_sub(leaks::pinned())))
            }
            errno @ (libc::EFAULT | libc::EOPNOTSUPP | libc::EINVAL | libc::EPERM) => {
                let why = "the kernel can't pin it for writing: it has a hole, may not be written, or is a shared mapping of a file";
                Err(DeviceError::Fault { range, why, errno })
            }
            raw => {
                Err(DeviceError::Failed { call: "IORING_REGISTER_BUFFERS_UPDATE", range, code: error.to_string(), raw })
            }
        }
    }

    /// Lets a slot pin a range; at address 0 with length 0, nothing.
    fn point(&self, slot: u16, start: usize, len: usize) -> io::Result<()> {
        let buffer = libc::iovec { iov_base: std::ptr::without_provenance_mut(start), iov_len: len };
        // SAFETY: the kernel pins the pages, so they stay alive whatever becomes of the mapping. That their contents change under the program is
        // what this device is for; no reference points into memory that tests give it.
        unsafe { self.ring.submitter().register_buffers_update(slot.into(), &[buffer], None) }
    }
}

impl fmt::Debug for Pins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pins").field("live", &self.live()).finish_non_exhaustive()
    }
}

/// Pages of the program that the device holds. They are let go when it is dropped.
#[derive(Debug)]
pub struct DmaImport {
    pins: Arc<Pins>,
    slot: u16,
    range: HostRange,
}

impl DmaImport {
    /// The range whose pages were pinned.
    #[must_use]
    pub fn range(&self) -> HostRange {
        self.range
    }

    /// Names bytes by slot, as a command names device addresses: who releases the import too early leaves the command pointing at nothing, or at
    /// what came after.
    pub(super) fn place(&self, offset: usize, len: usize) -> Place {
        assert!(offset + len <= self.range.len(), "bytes {offset}+{len} of an import of {}", self.range.len());
        let len = u32::try_from(len).expect("a pin has at most 1 GiB");
        Place { slot: self.slot, address: self.range.start() + offset, len }
    }
}

impl Drop for DmaImport {
    fn drop(&mut self) {
        self.pins.point(self.slot, 0, 0).expect("a slot can always be emptied");
        self.pins.free.lock().expect("nothing panics under this lock").push(self.slot);
    }
}

/// Bytes behind a pin.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) slot: u16,
    pub(super) address: usize,
    pub(super) len: u32,
}
