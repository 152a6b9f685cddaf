//! What backs a mapping, told by its name and its file.
//!
//! A name can lie: any program may create `/memfd:x`, and `(deleted)` may be part of a name. So what the kernel makes
//! itself is known by the device number of the kernel's own mounts, and by being no file at all; names decide only where
//! no number exists.

use std::ffi::OsStr;
use std::fs;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::OnceLock;

use super::{Backing, FileId};
use crate::page_size;

/// What a mapping with this name and file is backed by.
pub(super) fn classify(name: &OsStr, file: Option<FileId>) -> Backing {
    match file {
        None => without_file(name.as_bytes()),
        Some(file) => with_file(name, file),
    }
}

fn without_file(name: &[u8]) -> Backing {
    match name {
        b"[heap]" => Backing::Heap,
        b"[stack]" => Backing::Stack,
        // Kernels before 4.5 named the stacks of threads too.
        _ if name.is_empty() || name.starts_with(b"[anon:") || name.starts_with(b"[stack:") => Backing::Anonymous,
        // `[vdso]`, `[vvar]`, `[vvar_vclock]`, `[vsyscall]`, `[uprobes]`, `[shadow_stack]`, `[vectors]`.
        _ => Backing::Special,
    }
}

fn with_file(name: &OsStr, file: FileId) -> Backing {
    let bytes = name.as_bytes();
    let device = (file.major, file.minor);
    match devices() {
        Devices { shared_memory: Some(own), .. } if *own == device => return Backing::SharedMemory,
        Devices { huge_pages: Some((own, _)), .. } if *own == device => return Backing::SharedMemory,
        Devices { dev_shm: Some(own), .. } if *own == device => return Backing::SharedMemory,
        // Without a memfd to compare with, the names that the kernel gives must do.
        Devices { shared_memory: None, .. } if kernel_shared_memory(bytes) => return Backing::SharedMemory,
        _ => {}
    }
    if bytes == b"/dev/zero" {
        return Backing::Anonymous; // mapped privately; shared, it is shared memory
    }
    // io_uring and perf rings, packet rings: a file without a path.
    if bytes.starts_with(b"anon_inode:") || bytes.starts_with(b"socket:[") {
        return Backing::Special;
    }
    // DMA buffers have a made-up path, device nodes and kernel windows a real one.
    let stat = |wanted: FileId| {
        let found = fs::metadata(name).ok().filter(|found| found.ino() == wanted.inode);
        found.map(|found| found.file_type())
    };
    if bytes.starts_with(b"/dmabuf:") && stat(file).is_none() {
        return Backing::Special;
    }
    if bytes.starts_with(b"/dev/") && stat(file).is_some_and(|kind| kind.is_char_device()) {
        return Backing::Special;
    }
    if bytes.starts_with(b"/sys/") || bytes.starts_with(b"/proc/") {
        return Backing::Special;
    }
    Backing::File
}

/// Bytes of the pages that a mapping of this file is made of: those of the pool of huge pages are watched as wholes only. Of a pool that isn't
/// the default one, and of files on a mounted one, that isn't known.
pub(crate) fn page_size_of(file: Option<FileId>) -> usize {
    match (file, &devices().huge_pages) {
        (Some(file), &Some((own, bytes))) if own == (file.major, file.minor) => bytes,
        _ => page_size(),
    }
}

fn kernel_shared_memory(name: &[u8]) -> bool {
    [&b"/memfd:"[..], b"/SYSV", b"[anon_shmem:"].iter().any(|prefix| name.starts_with(prefix))
        || name == b"/dev/zero (deleted)"
}

/// Device numbers of the kernel's own mounts, which no program can put a file on by a path.
struct Devices {
    /// memfd, System V, shared anonymous memory.
    shared_memory: Option<(u32, u32)>,
    /// The same with huge pages of the default size, which follows.
    huge_pages: Option<((u32, u32), usize)>,
    /// `/dev/shm`, where it is a mount of its own.
    dev_shm: Option<(u32, u32)>,
}

fn devices() -> &'static Devices {
    static DEVICES: OnceLock<Devices> = OnceLock::new();
    DEVICES.get_or_init(|| {
        let device = |path: &str| fs::metadata(path).ok().map(|found| found.dev());
        let own_mount = device("/dev/shm").filter(|shm| Some(*shm) != device("/dev") && Some(*shm) != device("/"));
        Devices {
            shared_memory: memfd_device(0).map(|(device, _)| device),
            huge_pages: memfd_device(libc::MFD_HUGETLB),
            dev_shm: own_mount.map(|device| (libc::major(device), libc::minor(device))),
        }
    })
}

/// Where such a memfd lies, and the bytes of its pages.
fn memfd_device(flags: libc::c_uint) -> Option<((u32, u32), usize)> {
    // SAFETY: the name is a terminated string; the call makes a descriptor and has no other effect.
    let fd = unsafe { libc::memfd_create(c"pinfold".as_ptr(), flags | libc::MFD_CLOEXEC) };
    // SAFETY: a descriptor that is not negative was just made for us, and nobody else knows it.
    let fd = (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })?;
    let about = fs::File::from(fd).metadata().ok()?;
    Some(((libc::major(about.dev()), libc::minor(about.dev())), usize::try_from(about.blksize()).ok()?))
}
