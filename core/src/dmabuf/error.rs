use std::io;
use std::path::PathBuf;
use std::time::Duration;

use nix::errno::Errno;
use thiserror::Error;

use super::HandOverError;

/// Why there is no dma-buf, or no access to it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DmaBufError {
    /// The kernel has no such device. `ENOENT`.
    #[error("there is no {path}; the kernel needs {option} (modprobe {module} if it is a module)")]
    NoDevice {
        /// The device node.
        path: PathBuf,
        /// The option of the kernel's configuration that brings it.
        option: &'static str,
        /// The module that it may be in.
        module: &'static str,
    },
    /// This user may not open the device. `EACCES`.
    #[error(
        "{path} may not be opened by this user; give it to the user's group by a udev rule, or run as a user who may"
    )]
    Denied {
        /// The device node.
        path: PathBuf,
    },
    /// A seal is missing, or is there and must not be. `EINVAL`.
    #[error("the memory file {} the seal {seal}; HostBufferKind::Exportable has the right ones", if *present { "must not have" } else { "needs" })]
    Seal {
        /// Which one.
        seal: &'static str,
        /// It is there and must not be.
        present: bool,
    },
    /// A part of a buffer that isn't one: empty, unaligned, or beyond the end. `EINVAL`.
    #[error("{len} bytes at {offset} are no part of a buffer of {size} bytes, in steps of {step}")]
    Part {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
        /// Bytes there are.
        size: u64,
        /// Offset and length are multiples of this.
        step: u64,
    },
    /// More than udmabuf makes in one piece. `EINVAL`.
    #[error("{asked} {what} are more than the {most} that udmabuf takes; raise its module parameter {parameter}")]
    UdmabufLimit {
        /// Asked for.
        asked: u64,
        /// Of what.
        what: &'static str,
        /// The limit.
        most: u64,
        /// The parameter that sets it.
        parameter: &'static str,
    },
    /// Above the budget, or above what the machine has. `ENOMEM`.
    #[error("{needed} bytes are more than {what}, of which {available} are left")]
    Budget {
        /// Bytes needed.
        needed: u64,
        /// Which budget.
        what: &'static str,
        /// Bytes left.
        available: u64,
    },
    /// The descriptor is something else. `EINVAL`.
    #[error("the descriptor is no dma-buf: {what}")]
    NotADmaBuf {
        /// What it is.
        what: &'static str,
    },
    /// A name of a heap that can't be one, or a name that is too long. `EINVAL`.
    #[error("a name of {len} bytes is none: at most 31 bytes, no zero byte, and no slash in the name of a heap")]
    Name {
        /// Its length.
        len: usize,
    },
    /// Somebody's fence was not signalled in time. `ETIMEDOUT`.
    #[error("the buffer was still in use after {0:?}; wait longer, or ask who uses it")]
    Busy(Duration),
    /// The object's memory can't be watched, so its dma-buf could go stale without anybody knowing. `EPERM`.
    #[error("the object can't be tracked ({0}), and what isn't tracked isn't exported; use a HostBuffer, which can be")]
    Untracked(&'static str),
    /// The object's memory has no file to export. `EINVAL`.
    #[error("the memory can't be exported: {0}; use a HostBuffer of kind Exportable")]
    NotExportable(&'static str),
    /// What came from another process is wrong.
    #[error(transparent)]
    HandOver(#[from] HandOverError),
    /// The system said no.
    #[error("{call} for {what} failed: {source}")]
    System {
        /// The call.
        call: &'static str,
        /// What for.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl DmaBufError {
    /// The errno that says the same.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::NoDevice { .. } => libc::ENOENT,
            Self::Denied { .. } => libc::EACCES,
            Self::Budget { .. } => libc::ENOMEM,
            Self::Busy(_) => libc::ETIMEDOUT,
            Self::Untracked(_) => libc::EPERM,
            Self::Seal { .. }
            | Self::Part { .. }
            | Self::UdmabufLimit { .. }
            | Self::NotADmaBuf { .. }
            | Self::Name { .. }
            | Self::NotExportable(_) => libc::EINVAL,
            Self::HandOver(error) => error.errno(),
            Self::System { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
        }
    }

    pub(super) fn system(call: &'static str, what: &'static str) -> impl Fn(Errno) -> Self {
        move |errno| Self::System { call, what, source: errno.into() }
    }

    /// Why a device node can't be opened.
    pub(super) fn open(path: PathBuf, option: &'static str, module: &'static str, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::NotFound => Self::NoDevice { path, option, module },
            io::ErrorKind::PermissionDenied => Self::Denied { path },
            _ => Self::System { call: "open", what: "the device node", source },
        }
    }
}
