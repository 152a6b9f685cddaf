//! The reader's side, in another process.
//!
//! Taking records is what a reader in the program does, over a mapping that can't be written. Its descriptor has to say *readable* as long as there is
//! something to read, and only the program can send wake-up bytes; so a second source, an eventfd of our own, stands beside the connection in an epoll
//! descriptor for the moments when the bytes are drained and a record has come meanwhile.

use std::ffi::OsStr;
use std::io::{self, ErrorKind, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use thiserror::Error;

use super::super::queue::ReadError;
use super::super::record::{HEADER_LEN, MAX_RECORD_LEN, Record};
use super::super::ring::Ring;
use super::super::signal::Signal;
use super::super::sync::lock;
use super::hello::{Greeting, HelloError, WELCOME_LEN, Welcome};
use super::memory::{Files, SharedRing};
use super::place::path_of;

/// How long a program may take to answer.
const ANSWER_TIME: Duration = Duration::from_secs(5);

/// Why a program can't be read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AttachError {
    /// There is no such process. `ESRCH`.
    #[error("there is no process {0}")]
    NoProcess(u32),
    /// Nobody listens there. `ENOENT`.
    #[error(
        "nobody offers to be watched at {0}; start the program with PINFOLD_WATCH=1, or with a path and give that path"
    )]
    NotOffered(PathBuf),
    /// The program, or the folder of its socket, says no. `EPERM`.
    #[error("{0} may not be watched by this user; run as the user of the program")]
    NotPermitted(PathBuf),
    /// The program has as many readers as it wants. `EBUSY`.
    #[error("the program at {0} has as many readers as it wants; end one of them")]
    Busy(PathBuf),
    /// Whoever listens there is no program of ours, or of another version. `EPROTO`.
    #[error("{path} doesn't talk as it should")]
    Hello {
        /// Where.
        path: PathBuf,
        /// What was wrong.
        #[source]
        source: HelloError,
    },
    /// The program refused for another reason.
    #[error("the program at {path} refused: {source}")]
    Refused {
        /// Where.
        path: PathBuf,
        /// Its reason.
        source: io::Error,
    },
    /// The system refused.
    #[error("can't attach to {path}")]
    System {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl AttachError {
    /// The errno of this case.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::NoProcess(_) => libc::ESRCH,
            Self::NotOffered(_) => libc::ENOENT,
            Self::NotPermitted(_) => libc::EPERM,
            Self::Busy(_) => libc::EBUSY,
            Self::Hello { .. } => libc::EPROTO,
            Self::Refused { source, .. } | Self::System { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}

/// A queue of another process.
#[derive(Debug)]
pub struct Remote {
    ring: Ring,
    shared: Arc<SharedRing>,
    connection: UnixStream,
    again: Signal,
    ready: Epoll,
    process: u32,
    /// The reader's lock, and whether the program's end has been seen.
    ended: Mutex<bool>,
}

impl Remote {
    /// Attaches to the program with this process id.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn attach_process(process: u32) -> Result<Self, AttachError> {
        let folder = PathBuf::from(format!("/proc/{process}"));
        if !folder.exists() {
            return Err(AttachError::NoProcess(process));
        }
        Self::attach(&path_told(&folder).unwrap_or_else(|| path_of(process)))
    }

    /// Attaches to the program that listens at this path.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn attach(path: &Path) -> Result<Self, AttachError> {
        let failed = |source: io::Error| match source.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => AttachError::NotOffered(path.into()),
            ErrorKind::PermissionDenied => AttachError::NotPermitted(path.into()),
            _ => AttachError::System { path: path.into(), source },
        };
        let mut connection = UnixStream::connect(path).map_err(failed)?;
        connection.set_read_timeout(Some(ANSWER_TIME)).map_err(failed)?;
        // A program that has too many readers says so before it is greeted, and closes; whether the greeting got through doesn't matter.
        let _ = connection.write_all(&Greeting::default().to_bytes());
        let (bytes, fds) = match receive(&connection) {
            // It hung up, or says nothing: no program of ours does that.
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::WouldBlock) => {
                (vec![], vec![])
            }
            received => received.map_err(failed)?,
        };
        let hello = |source| AttachError::Hello { path: path.into(), source };
        let (process, slots, limit) = match Welcome::from_bytes(&bytes).map_err(hello)? {
            Welcome::Yes { process, slots, limit } => (process, slots, limit),
            Welcome::No(libc::EPERM) => return Err(AttachError::NotPermitted(path.into())),
            Welcome::No(libc::EBUSY) => return Err(AttachError::Busy(path.into())),
            Welcome::No(errno) => {
                return Err(AttachError::Refused { path: path.into(), source: io::Error::from_raw_os_error(errno) });
            }
        };
        let [records, position] = <[OwnedFd; 2]>::try_from(fds).map_err(|_| hello(HelloError::Foreign))?;
        let shared = Arc::new(SharedRing::open(&Files { records, position }, slots as usize).map_err(failed)?);
        connection.set_nonblocking(true).map_err(failed)?;
        let again = Signal::new().map_err(failed)?;
        let ready = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(|errno| failed(errno.into()))?;
        for fd in [connection.as_fd(), again.as_fd()] {
            ready.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, 0)).map_err(|errno| failed(errno.into()))?;
        }
        let ring = Ring::shared(Arc::clone(&shared), limit, 0);
        Ok(Self { ring, shared, connection, again, ready, process, ended: Mutex::new(false) })
    }

    /// The program's process id.
    #[must_use]
    pub fn process(&self) -> u32 {
        self.process
    }

    /// How many records found no room in this reader's ring so far.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.ring.lost()
    }

    /// As [`WatchQueue::read`](super::super::WatchQueue::read). Answers 0 when the program has ended and all it left is read.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn read(&self, out: &mut [u8]) -> Result<usize, ReadError> {
        if out.is_empty() {
            return Ok(0);
        }
        self.read_at_most(out, usize::MAX)
    }

    fn read_at_most(&self, out: &mut [u8], records: usize) -> Result<usize, ReadError> {
        let mut ended = lock(&self.ended);
        loop {
            let total = self.copy(out, records, &mut ended)?;
            if total > 0 {
                if !self.readable() && self.arm(&mut ended) {
                    // The bytes are drained, and a record has come for which none will be sent.
                    self.again.raise();
                }
                return Ok(total);
            }
            if *ended {
                return Ok(0);
            }
            if !self.arm(&mut ended) && !*ended {
                return Err(ReadError::Empty);
            }
        }
    }

    /// The same, but waits for a record: at most `limit`, or for good.
    ///
    /// # Errors
    /// [`ReadError::Empty`] if the time is over, [`ReadError::NoBuffer`] if the first record doesn't fit.
    pub fn read_timeout(&self, out: &mut [u8], limit: Option<Duration>) -> Result<usize, ReadError> {
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        loop {
            match self.read(out) {
                Err(ReadError::Empty) => {}
                done => return done,
            }
            let timeout = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                Some(Duration::ZERO) => return Err(ReadError::Empty),
                // Rounded up, so that it isn't asked again and again within the last millisecond.
                Some(left) => (left + Duration::from_millis(1)).try_into().unwrap_or(PollTimeout::MAX),
                None => PollTimeout::NONE,
            };
            // Readable, timed out, or interrupted: the next turn finds out by looking.
            let _ = poll(&mut [PollFd::new(self.as_fd(), PollFlags::POLLIN)], timeout);
        }
    }

    /// Takes record after record, without waiting, until there is none.
    pub fn records(&self) -> impl Iterator<Item = Record> {
        let mut buffer = [0; MAX_RECORD_LEN + 1];
        std::iter::from_fn(move || {
            let len = self.read_at_most(&mut buffer, 1).ok()?;
            Record::from_bytes(&buffer[..len]).ok()
        })
    }

    fn readable(&self) -> bool {
        let next = self.ring.next();
        next.record || next.lost || next.end
    }

    fn copy(&self, out: &mut [u8], records: usize, ended: &mut bool) -> Result<usize, ReadError> {
        // SAFETY: `ended` is what the reader's lock holds, lent.
        let (ring, mut total) = (unsafe { self.ring.reader() }, 0);
        for _ in 0..records {
            let left = &mut out[total..];
            let next = ring.next();
            let copied = if next.lost {
                let loss = Record::loss();
                let bytes = loss.bytes();
                left.get_mut(..bytes.len()).ok_or(bytes.len()).map(|left| {
                    left.copy_from_slice(bytes);
                    ring.report_loss(next.position);
                    bytes.len()
                })
            } else if next.record {
                ring.copy(next.position, left).inspect(|_| ring.advance(next.position))
            } else {
                *ended |= next.end;
                break;
            };
            match copied {
                // A record without a whole header: the program doesn't keep to the protocol, and there is no telling what else it says.
                Ok(len) if len < HEADER_LEN => {
                    *ended = true;
                    break;
                }
                Ok(len) => total += len,
                Err(_) if total > 0 => break,
                Err(needed) => return Err(ReadError::NoBuffer { needed, given: left.len() }),
            }
        }
        Ok(total)
    }

    /// Drains the wake-up bytes and asks for one at the next record. Answers whether there is something to read already.
    fn arm(&self, ended: &mut bool) -> bool {
        let mut bytes = [0; 64];
        loop {
            match (&self.connection).read(&mut bytes) {
                Ok(0) => *ended = true,
                Ok(_) => continue,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => *ended = true,
            }
            break;
        }
        self.again.drain();
        self.shared.reader().armed.0.fetch_add(1, Ordering::Relaxed);
        // We write the counter, then look for records; the program publishes a record, then looks at the counter.
        fence(Ordering::SeqCst);
        self.readable()
    }
}

impl AsFd for Remote {
    /// The descriptor to poll for reading: readable while there is a record, or the program's end, to be read.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ready.0.as_fd()
    }
}

impl AsRawFd for Remote {
    fn as_raw_fd(&self) -> RawFd {
        self.ready.0.as_raw_fd()
    }
}

/// The path that the process was told by its environment, if that can be read and says one.
fn path_told(folder: &Path) -> Option<PathBuf> {
    let environment = std::fs::read(folder.join("environ")).ok()?;
    let told = environment.split(|&byte| byte == 0).find_map(|entry| entry.strip_prefix(b"PINFOLD_WATCH="))?;
    // A path is as the program sees it, so from its own working directory; `1` and the like aren't paths.
    let told = OsStr::from_bytes(told);
    (told.len() > 1).then(|| folder.join("cwd").join(told))
}

/// Receives a welcome and the descriptors that come with it.
fn receive(connection: &UnixStream) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0; WELCOME_LEN];
    let mut space = nix::cmsg_space!([RawFd; 2]);
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let message = recvmsg::<()>(connection.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let fds = message.cmsgs()?.filter_map(|control| match control {
        ControlMessageOwned::ScmRights(fds) => Some(fds),
        _ => None,
    });
    // SAFETY: the kernel has just put these descriptors into this process for us, and nobody else knows them.
    let fds = fds.flatten().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect();
    let len = message.bytes;
    bytes.truncate(len);
    Ok((bytes, fds))
}
