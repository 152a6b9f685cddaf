//! A sample of each kind of memory that a program can have, to be given to a device.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::ptr::NonNull;

use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, mprotect, munmap};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use pinfold_vulkan::{HostRange, MappingKind, Source};

/// A mapping of one kind, with other bytes in every page.
pub(crate) struct Sample {
    at: NonNull<libc::c_void>,
    len: usize,
    _file: Option<File>,
}

impl Sample {
    /// # Errors
    /// Why there is no such memory here.
    pub(crate) fn new(kind: MappingKind, len: usize) -> Result<Self, String> {
        let file = match kind.source {
            Source::Anonymous => None,
            Source::PrivateMemfd | Source::SharedMemfd => Some(memfd(len)?),
            Source::PrivateFile | Source::SharedFile => Some(disk_file(len)?),
        };
        let sharing = match kind.source {
            Source::SharedMemfd | Source::SharedFile => MapFlags::MAP_SHARED,
            _ => MapFlags::MAP_PRIVATE,
        };
        let size = len.try_into().map_err(|_| "no bytes".to_owned())?;
        let write = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let at = match &file {
            // SAFETY: a new mapping at an address that the kernel chooses.
            None => unsafe { mmap_anonymous(None, size, write, sharing) },
            // SAFETY: as above.
            Some(file) => unsafe { mmap(None, size, write, sharing, file.as_fd(), 0) },
        };
        let sample = Self { at: at.map_err(|e| format!("it can't be mapped: {e}"))?, len, _file: file };
        for page in (0..len).step_by(pinfold_vulkan::page_size()) {
            let at = sample.at.as_ptr().cast::<u8>().wrapping_add(page);
            // SAFETY: inside the mapping, which is writable and nobody else's.
            unsafe { at.write_volatile((page >> 12) as u8) };
        }
        if !kind.writable {
            // SAFETY: the mapping is this sample's.
            unsafe { mprotect(sample.at, len, ProtFlags::PROT_READ) }
                .map_err(|e| format!("it can't be protected: {e}"))?;
        }
        Ok(sample)
    }

    pub(crate) fn range(&self) -> HostRange {
        HostRange::from_ptr(self.at.as_ptr(), self.len).expect("a mapping is a range")
    }

    /// Its first byte.
    pub(crate) fn bytes(&self) -> *const u8 {
        self.at.as_ptr().cast_const().cast()
    }
}

impl Drop for Sample {
    fn drop(&mut self) {
        // SAFETY: the mapping is this sample's, and who gave it to a device has taken it back.
        let _ = unsafe { munmap(self.at, self.len) };
    }
}

fn memfd(len: usize) -> Result<File, String> {
    let fd = memfd_create(c"doctor", MFdFlags::MFD_CLOEXEC).map_err(|e| format!("no memfd can be made: {e}"))?;
    sized(File::from(fd), len)
}

/// A nameless file on a real file system.
fn disk_file(len: usize) -> Result<File, String> {
    let nameless = |folder: PathBuf| {
        let file =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(folder).ok()?;
        (fstatfs(&file).ok()?.filesystem_type() != TMPFS_MAGIC).then_some(file)
    };
    let folders = [std::env::temp_dir(), PathBuf::from("/var/tmp"), PathBuf::from(".")];
    let file = folders.into_iter().find_map(nameless);
    sized(file.ok_or("no temporary file can be made on a disk")?, len)
}

fn sized(file: File, len: usize) -> Result<File, String> {
    file.set_len(len as u64).map_err(|e| format!("a file can't be given its size: {e}"))?;
    Ok(file)
}
