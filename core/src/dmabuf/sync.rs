//! Implicit synchronisation made explicit: the fences inside a dma-buf as a descriptor, and back.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{CpuAccess, DmaBuf, DmaBufError, sys};

/// Work that somebody has submitted, as a descriptor that becomes readable when it is over. A Vulkan semaphore of handle type `SYNC_FD` takes it
/// and gives it.
#[derive(Debug)]
pub struct SyncFile(OwnedFd);

impl SyncFile {
    /// Takes a descriptor that came from anywhere.
    ///
    /// # Errors
    /// [`DmaBufError::System`] if it is no sync_file.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, DmaBufError> {
        sys::sync_file_status(fd.as_fd()).map_err(DmaBufError::system("SYNC_IOC_FILE_INFO", "the descriptor"))?;
        Ok(Self(fd))
    }

    /// Whether the work is over, without waiting.
    ///
    /// # Errors
    /// [`DmaBufError::System`] with the errno that the work ended with, if it did so badly.
    pub fn is_signalled(&self) -> Result<bool, DmaBufError> {
        let asked = sys::sync_file_status(self.as_fd());
        match asked.map_err(DmaBufError::system("SYNC_IOC_FILE_INFO", "the sync_file"))? {
            0 => Ok(false),
            bad if bad < 0 => Err(DmaBufError::system("the work", "a sync_file")(Errno::from_raw(-bad))),
            _ => Ok(true),
        }
    }

    /// Waits for it. Returns false when `limit` has passed first.
    ///
    /// # Errors
    /// [`DmaBufError::System`].
    pub fn wait(&self, limit: Duration) -> Result<bool, DmaBufError> {
        wait_for(self.as_fd(), PollFlags::POLLIN, limit)
    }
}

impl AsFd for SyncFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<SyncFile> for OwnedFd {
    fn from(file: SyncFile) -> Self {
        file.0
    }
}

impl DmaBuf {
    /// What an access of this kind has to wait for: before a read, those who write; before a write, everybody.
    ///
    /// # Errors
    /// [`DmaBufError::System`]; `ENOTTY` before Linux 6.0 and for memory files, where [`wait`](Self::wait) is what there is.
    pub fn export_sync_file(&self, access: CpuAccess) -> Result<SyncFile, DmaBufError> {
        let made = sys::export_sync_file(self.as_fd(), access.flags());
        made.map(SyncFile).map_err(DmaBufError::system("DMA_BUF_IOCTL_EXPORT_SYNC_FILE (Linux 6.0)", "the buffer"))
    }

    /// Makes everybody who uses the buffer from now on wait for this work, which reads or writes it.
    ///
    /// # Errors
    /// As [`export_sync_file`](Self::export_sync_file).
    pub fn import_sync_file(&self, file: &SyncFile, access: CpuAccess) -> Result<(), DmaBufError> {
        let failed = DmaBufError::system("DMA_BUF_IOCTL_IMPORT_SYNC_FILE (Linux 6.0)", "the buffer");
        sys::import_sync_file(self.as_fd(), file.as_fd(), access.flags()).map_err(failed)
    }
}

/// Waits until one of `flags` is up. An error condition of the descriptor counts as up: nothing will come any more.
pub(super) fn wait_for(fd: BorrowedFd<'_>, flags: PollFlags, limit: Duration) -> Result<bool, DmaBufError> {
    let deadline = Instant::now().checked_add(limit);
    loop {
        let left = deadline.map_or(Duration::from_secs(3600), |at| at.saturating_duration_since(Instant::now()));
        // Rounded up, so that the last wait isn't a busy one.
        let millis = left.as_nanos().div_ceil(1_000_000);
        let timeout = i32::try_from(millis)
            .map_or(PollTimeout::MAX, |millis| PollTimeout::try_from(millis).expect("a time is not negative"));
        match poll(&mut [PollFd::new(fd, flags)], timeout) {
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(DmaBufError::system("poll", "a fence")(errno)),
        }
    }
}
