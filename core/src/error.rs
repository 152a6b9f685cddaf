//! What can go wrong, with the numbers and what to do.

use std::sync::Arc;

use pinfold_invalidate::{HostRange, MapsError, MutateError, RangeError, SpaceError, WatchError};
use thiserror::Error;

use crate::dmabuf::DmaBufError;
use crate::{DeviceError, Lease};

/// Why a call didn't do what it was asked to. Cheap to clone: one failed acquisition may be told to several waiters.
#[derive(Debug, Clone, Error)]
#[non_exhaustive]
pub enum Error {
    /// A worker is on it, or a mutation of the memory is under way. Ask again, wait with a deadline, or await. `EAGAIN`.
    #[error(
        "not yet: a worker is taking the pages, or the memory is just changing hands; try again, or use acquire_timeout or acquire_async"
    )]
    Again,
    /// The memory is not what the device needs. Told once for each failed acquisition; the next acquire tries again.
    #[error("range {range} can't be given to the device: {why}")]
    Fault {
        /// The part that is wrong.
        range: HostRange,
        /// What is wrong with it.
        why: &'static str,
        /// `EFAULT`, `EPERM`, ...
        errno: i32,
    },
    /// There is not enough of something that is limited.
    #[error(
        "range {range} needs {needed} bytes of {what}, and {available} are left; unregister what is idle, or raise the budget"
    )]
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
    /// The device said no, or is lost.
    #[error(transparent)]
    Device(Arc<DeviceError>),
    /// A dma-buf can't be made, taken or waited for.
    #[error(transparent)]
    DmaBuf(Arc<DmaBufError>),
    /// A pointer and a length are no range.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// Bytes that are no part of the object: none, or some beyond its end. `EINVAL`.
    #[error(
        "bytes {start:#x}..{end:#x} are no part of an object of {size:#x} bytes (range {range}); a part begins before it ends, and ends with the object at the latest"
    )]
    Part {
        /// First byte asked for, from the object's start.
        start: usize,
        /// Behind the last byte asked for.
        end: usize,
        /// Bytes of the object.
        size: usize,
        /// The object's range.
        range: HostRange,
    },
    /// A flag that doesn't exist. `EINVAL`.
    #[error("flags {0:#x} contain a bit that means nothing here")]
    UnknownFlag(u32),
    /// The range can't be watched now: too many mappings, or the kernel refused.
    #[error(transparent)]
    Watch(Arc<WatchError>),
    /// Tracking of the address space can't be set up.
    #[error(transparent)]
    Space(Arc<SpaceError>),
    /// Worker threads can't be had.
    #[error("can't start the worker pool: {0}; raise the limit on processes (ulimit -u)")]
    Pool(Arc<dyn std::error::Error + Send + Sync>),
    /// The watch queue said no.
    #[error("can't watch the objects: {source}")]
    Queue {
        /// The errno that says the same.
        errno: i32,
        /// Its words.
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// A descriptor that isn't one of a file.
    #[error("can't tell which file this is: {source}; pass an open descriptor of the file that is mapped")]
    File {
        /// What the system said.
        source: Arc<std::io::Error>,
    },
    /// An object of another manager. `EXDEV`.
    #[error("the object belongs to another manager; each manager leases its own objects only")]
    Foreign,
    /// The pending acquisition was cancelled. `ECANCELED`.
    #[error("the acquisition was cancelled; acquire again if the object is still wanted")]
    Cancelled,
    /// The manager is gone. `ESHUTDOWN`.
    #[error("the manager of this object has been dropped")]
    Closed,
    /// This process is a forked child of the one the handle belongs to. `ESTALE`.
    #[error("this handle belongs to the parent process; a forked child has to make its own manager")]
    Forked,
    /// Called inside the closure of `mutate`, where every gate is closed. `EDEADLK`.
    #[error("called inside a bracket on this thread, which would wait for itself; leave the closure of mutate first")]
    Nested,
}

impl Error {
    /// Whether trying again is all there is to do.
    #[must_use]
    pub fn is_again(&self) -> bool {
        matches!(self, Self::Again)
    }

    /// Whether the device is lost: nothing works any more but dropping everything.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        matches!(self, Self::Device(error) if matches!(**error, DeviceError::Lost))
    }

    /// The errno that says the same.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Again => libc::EAGAIN,
            Self::Fault { errno, .. } => *errno,
            Self::Budget { .. } => libc::ENOMEM,
            Self::Device(error) => error.errno(),
            Self::DmaBuf(error) => error.errno(),
            Self::Range(error) => error.errno(),
            Self::Part { .. } | Self::UnknownFlag(_) => libc::EINVAL,
            Self::Watch(_) | Self::Space(_) => libc::ENOMEM,
            Self::Pool(_) => libc::EAGAIN,
            Self::Queue { errno, .. } => *errno,
            Self::File { source } => source.raw_os_error().unwrap_or(libc::EBADF),
            Self::Foreign => libc::EXDEV,
            Self::Cancelled => libc::ECANCELED,
            Self::Closed => libc::ESHUTDOWN,
            Self::Forked => libc::ESTALE,
            Self::Nested => libc::EDEADLK,
        }
    }
}

impl From<DeviceError> for Error {
    fn from(error: DeviceError) -> Self {
        match error {
            DeviceError::Fault { range, why, errno } => Self::Fault { range, why, errno },
            DeviceError::Budget { range, what, needed, available } => Self::Budget { range, what, needed, available },
            other => Self::Device(Arc::new(other)),
        }
    }
}

impl From<DmaBufError> for Error {
    fn from(error: DmaBufError) -> Self {
        Self::DmaBuf(Arc::new(error))
    }
}

impl From<WatchError> for Error {
    fn from(error: WatchError) -> Self {
        match error {
            WatchError::Maps(error) => error.into(),
            other => Self::Watch(Arc::new(other)),
        }
    }
}

impl From<MapsError> for Error {
    fn from(error: MapsError) -> Self {
        match error {
            MapsError::Hole { range, at } => {
                let page = pinfold_invalidate::page_size();
                let hole = HostRange::new(at, page).unwrap_or(range);
                Self::Fault {
                    range: hole,
                    why: "nothing is mapped there; map the whole range first",
                    errno: libc::EFAULT,
                }
            }
            other => Self::Watch(Arc::new(other.into())),
        }
    }
}

impl From<SpaceError> for Error {
    fn from(error: SpaceError) -> Self {
        match error {
            SpaceError::Forked => Self::Forked,
            other => Self::Space(Arc::new(other)),
        }
    }
}

impl From<MutateError> for Error {
    fn from(error: MutateError) -> Self {
        match error {
            MutateError::Forked => Self::Forked,
            _ => Self::Nested,
        }
    }
}

/// Why a submit did not happen. Nothing has been counted, and the closure has not run unless it is what failed.
#[derive(Error)]
#[non_exhaustive]
pub enum SubmitError<D: crate::Device, E> {
    /// The memory of an object has changed hands since the lease was taken: the commands would use what is gone. Acquire again and record anew.
    #[error("object {index} of the lease (range {range}) has changed hands since it was acquired; acquire again")]
    Stale {
        /// Which object, in the order of the lease.
        index: usize,
        /// Its range.
        range: HostRange,
    },
    /// A mutation of memory in the same shard is under way and took longer than a hold-off may. The lease may still be good. `EAGAIN`.
    #[error("memory near this is changing hands and the mutation has not ended in time; submit again")]
    Again(Lease<D>),
    /// The closure answered that nothing was submitted.
    #[error("the submit was refused: {error}")]
    Rejected {
        /// Its words.
        error: E,
        /// The lease, for another try.
        lease: Lease<D>,
    },
    /// This process is a forked child, the manager is gone, or the call came from inside a bracket.
    #[error(transparent)]
    Gone(Error),
}

impl<D: crate::Device, E> SubmitError<D, E> {
    /// Whether the objects have to be acquired again.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        matches!(self, Self::Stale { .. })
    }
}

impl<D: crate::Device, E: std::fmt::Display> std::fmt::Debug for SubmitError<D, E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SubmitError({self})")
    }
}
