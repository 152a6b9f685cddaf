//! The program's side: one thread that greets readers, tells each what there is, and notices when it goes.
//!
//! The thread is only ever asked to be patient with readers; posting never waits for it. It holds the [`Source`] weakly, so that it ends with it.

use std::io::{self, ErrorKind, IoSlice, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{ControlMessage, MsgFlags, getsockopt, send, sendmsg};
use thiserror::Error;

use super::super::limit::WatchLimit;
use super::super::list::{Scope, WatchList};
use super::super::note::{UserptrEvent, UserptrNote};
use super::super::queue::{QueueInner, Wakeup};
use super::super::record::Record;
use super::super::ring::Ring;
use super::super::signal::Signal;
use super::hello::{GREETING_LEN, Greeting, HelloError, Welcome};
use super::memory::{Files, SharedRing};

/// How long a connection may take to send its greeting.
const GREETING_TIME: Duration = Duration::from_secs(2);
/// How often a reader is looked at that has not been told all yet because its ring is full.
const FEEDING_TIME: Duration = Duration::from_millis(2);

/// What a server shows.
pub trait Source: Send + Sync + 'static {
    /// Where the events are posted.
    fn watch_list(&self) -> &WatchList;

    /// Puts one record, with [`UserptrEvent::Present`] or its like, for each thing that there is. Called on the server's thread.
    fn present(&self, put: &mut dyn FnMut(Record));
}

/// Who wants to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Credentials {
    /// The process, as it was when it connected.
    pub process: i32,
    /// Its effective user.
    pub user: u32,
    /// Its effective group.
    pub group: u32,
}

type Admit = dyn Fn(Credentials) -> bool + Send;

/// How a program offers itself to readers.
#[must_use]
pub struct Offer {
    records: usize,
    readers: usize,
    admit: Box<Admit>,
}

impl Default for Offer {
    fn default() -> Self {
        // SAFETY: geteuid only answers a number.
        let own = unsafe { libc::geteuid() };
        Self { records: 4096, readers: 8, admit: Box::new(move |them| them.user == own) }
    }
}

impl Offer {
    /// Room for this many records in each reader's ring. Without this call: 4096.
    pub fn records(mut self, records: usize) -> Self {
        self.records = records.clamp(1, super::super::queue::MAX_CAPACITY);
        self
    }

    /// At most this many connections at a time; more are refused with `EBUSY`. Without this call: 8.
    pub fn readers(mut self, readers: usize) -> Self {
        self.readers = readers;
        self
    }

    /// Who may read. Without this call: the user that this process runs as. Whoever may gets to see addresses, labels and times.
    pub fn admit(mut self, admit: impl Fn(Credentials) -> bool + Send + 'static) -> Self {
        self.admit = Box::new(admit);
        self
    }
}

/// Why a program can't be watched.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ListenError {
    /// Somebody answers at that path already. `EADDRINUSE`.
    #[error("another program listens at {0}; set PINFOLD_WATCH to another path")]
    InUse(PathBuf),
    /// The system refused.
    #[error("can't listen at {path}")]
    System {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl ListenError {
    /// The errno of this case.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::InUse(_) => libc::EADDRINUSE,
            Self::System { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}

/// A program's offer to be watched. Dropping it ends every connection.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    stop: Arc<(AtomicBool, Signal)>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Offers `source` at this path to whoever runs as the same user.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn listen<S: Source>(path: &Path, source: Weak<S>) -> Result<Self, ListenError> {
        Self::listen_with(path, source, Offer::default())
    }

    /// The same, on these terms. A socket that a dead program left behind is replaced.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn listen_with<S: Source>(path: &Path, source: Weak<S>, offer: Offer) -> Result<Self, ListenError> {
        let failed = |source| ListenError::System { path: path.into(), source };
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                match UnixStream::connect(path) {
                    Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                    _ => return Err(ListenError::InUse(path.into())),
                }
                std::fs::remove_file(path).map_err(failed)?;
                UnixListener::bind(path)
            }
            bound => bound,
        };
        let listener = listener.map_err(failed)?;
        // Only a courtesy: credentials are checked for each connection.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let stop = Arc::new((AtomicBool::new(false), Signal::new().map_err(failed)?));
        let loop_ = Loop { listener, source, offer, stop: Arc::clone(&stop), readers: Vec::new() };
        let thread = std::thread::Builder::new().name("pinfold-watch".into()).spawn(|| loop_.run()).map_err(failed)?;
        Ok(Self { path: path.into(), stop, thread: Some(thread) })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Release: pairs with the loop's Acquire.
        self.stop.0.store(true, Ordering::Release);
        self.stop.1.raise();
        // The path may be gone already; then there is nothing to do.
        let _ = std::fs::remove_file(&self.path);
        if let Some(thread) = self.thread.take() {
            // If the source's last handle was the thread's own, this runs on that very thread.
            if thread.thread().id() != std::thread::current().id() {
                // A panic of the thread has been reported by the panic hook; there is nothing to add.
                let _ = thread.join();
            }
        }
    }
}

/// How posts wake a reader in another process: once for each time that the reader asks.
pub(in super::super) struct Caller {
    ring: Arc<SharedRing>,
    /// The reader's counter when it was last woken. Ours alone.
    served: AtomicU64,
    connection: Arc<UnixStream>,
}

impl Caller {
    /// Wakes the reader if it has asked since it was last woken. The caller has just published something.
    #[inline]
    pub(in super::super) fn call_if_armed(&self) {
        // We published, then look at the counter; the reader writes the counter, then looks for records. It is another process, so both sides pay.
        fence(Ordering::SeqCst);
        let asked = self.ring.reader().armed.0.load(Ordering::Relaxed);
        // Relaxed: a count that only decides who sends.
        if asked != self.served.load(Ordering::Relaxed) && self.served.swap(asked, Ordering::Relaxed) != asked {
            wake(&self.connection);
        }
    }
}

/// Sends one byte, whatever the reader has done to its end: a full buffer means that it is readable, a closed one that nobody waits.
#[cold]
fn wake(connection: &UnixStream) {
    let _ = send(connection.as_raw_fd(), &[0], MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL);
}

struct Loop<S> {
    listener: UnixListener,
    source: Weak<S>,
    offer: Offer,
    stop: Arc<(AtomicBool, Signal)>,
    readers: Vec<Reader>,
}

/// A connection.
struct Reader {
    connection: Arc<UnixStream>,
    step: Step,
}

impl Drop for Reader {
    fn drop(&mut self) {
        // A post that is under way may hold the queue, and with it the connection, a little longer: the reader shall know now.
        let _ = self.connection.shutdown(Shutdown::Both);
    }
}

enum Step {
    /// Its greeting has not come yet, or not all of it.
    Greeting { since: Instant, bytes: [u8; GREETING_LEN], len: usize },
    /// It has its ring. These records are still to be put into it, last first.
    Reading { queue: Shared, left: Vec<Record> },
}

/// A queue that another process reads; it watches nothing any more when this is dropped.
struct Shared(Arc<QueueInner>);

impl Drop for Shared {
    fn drop(&mut self) {
        self.0.clear();
    }
}

impl<S: Source> Loop<S> {
    fn run(mut self) {
        // Acquire: pairs with the Release in `Server::drop`.
        while !self.stop.0.load(Ordering::Acquire) && self.source.strong_count() > 0 {
            if self.wait() {
                self.accept();
            }
            self.go_on();
        }
    }

    /// Does what each connection is waiting for, and ends those that are over.
    fn go_on(&mut self) {
        let Self { source, offer, readers, .. } = self;
        readers.retain_mut(|reader| reader.go_on(source, offer).is_ok());
    }

    /// Sleeps until there is something to do. Answers whether somebody may want to connect.
    fn wait(&self) -> bool {
        let mut fds = Vec::with_capacity(self.readers.len() + 2);
        fds.push(PollFd::new(self.stop.1.as_fd(), PollFlags::POLLIN));
        fds.push(PollFd::new(self.listener.as_fd(), PollFlags::POLLIN));
        fds.extend(self.readers.iter().map(|reader| PollFd::new(reader.connection.as_fd(), PollFlags::POLLIN)));
        let soonest = self.readers.iter().filter_map(|reader| match &reader.step {
            Step::Greeting { since, .. } => {
                Some(GREETING_TIME.saturating_sub(since.elapsed()) + Duration::from_millis(1))
            }
            Step::Reading { left, .. } => (!left.is_empty()).then_some(FEEDING_TIME),
        });
        let timeout = soonest.min().map_or(PollTimeout::NONE, |time| time.try_into().unwrap_or(PollTimeout::MAX));
        // An interrupted poll is one that found nothing.
        let _ = poll(&mut fds, timeout);
        fds[1].any().unwrap_or(false)
    }

    fn accept(&mut self) {
        while let Ok((connection, _)) = self.listener.accept() {
            if connection.set_nonblocking(true).is_err() {
                continue;
            }
            if self.readers.len() >= self.offer.readers {
                self.go_on(); // one that has gone before this one came may not have been noticed yet
            }
            if self.readers.len() >= self.offer.readers {
                refuse(&connection, libc::EBUSY);
                continue;
            }
            let step = Step::Greeting { since: Instant::now(), bytes: [0; GREETING_LEN], len: 0 };
            self.readers.push(Reader { connection: Arc::new(connection), step });
        }
    }
}

/// The connection is over.
struct Over;

impl Reader {
    fn go_on<S: Source>(&mut self, source: &Weak<S>, offer: &Offer) -> Result<(), Over> {
        match &mut self.step {
            Step::Greeting { since, bytes, len } => {
                match self.connection.as_ref().read(&mut bytes[*len..]) {
                    Ok(0) => return Err(Over),
                    Ok(more) => *len += more,
                    Err(error) if is_patience(&error) => {}
                    Err(_) => return Err(Over),
                }
                if *len == GREETING_LEN {
                    let bytes = *bytes;
                    self.step = self.welcome(&bytes, source, offer)?;
                    self.tell();
                } else if since.elapsed() >= GREETING_TIME {
                    return Err(Over);
                }
            }
            Step::Reading { .. } => {
                // Nothing may come any more, and the end may.
                match self.connection.as_ref().read(&mut [0]) {
                    Err(error) if is_patience(&error) => self.tell(),
                    _ => return Err(Over),
                }
            }
        }
        Ok(())
    }

    fn welcome<S: Source>(&self, greeting: &[u8], source: &Weak<S>, offer: &Offer) -> Result<Step, Over> {
        let refuse = |errno| {
            refuse(&self.connection, errno);
            Over
        };
        match Greeting::from_bytes(greeting) {
            Ok(Greeting {}) => {}
            Err(HelloError::Foreign) => return Err(Over),
            Err(_) => return Err(refuse(libc::EPROTO)),
        }
        let peer = getsockopt(&self.connection.as_fd(), PeerCredentials).map_err(|_| Over)?;
        let peer = Credentials { process: peer.pid(), user: peer.uid(), group: peer.gid() };
        if !(offer.admit)(peer) {
            return Err(refuse(libc::EPERM));
        }
        let source = source.upgrade().ok_or(Over)?;
        // One slot more than asked for is kept for the removal record.
        let slots = (offer.records + 1).next_power_of_two();
        let (ring, files) = SharedRing::create(slots).map_err(|_| refuse(libc::ENOMEM))?;
        let ring = Arc::new(ring);
        let limit = offer.records as u64;
        let caller =
            Caller { ring: Arc::clone(&ring), served: AtomicU64::new(0), connection: Arc::clone(&self.connection) };
        let queue = QueueInner::new(Ring::shared(ring, limit, 1), Wakeup::Caller(caller), None, WatchLimit::new(1));
        let queue = Shared(Arc::new(queue));
        source.watch_list().add_queue(&queue.0, Scope::All, 0).map_err(|_| refuse(libc::ENOMEM))?;
        // After the watch is there: what changes while this runs is heard of twice rather than never.
        let mut left = Vec::new();
        source.present(&mut |record| left.push(record));
        left.push(UserptrNote { event: UserptrEvent::AllPresent, ..Default::default() }.record());
        left.reverse();
        let welcome = Welcome::Yes { process: std::process::id(), slots: slots as u64, limit };
        hand_over(&self.connection, welcome, &files).map_err(|_| Over)?;
        Ok(Step::Reading { queue, left })
    }

    /// Puts what is left to tell into the ring, as far as there is room, leaving half of it to what happens meanwhile.
    fn tell(&mut self) {
        let Step::Reading { queue, left } = &mut self.step else { return };
        while queue.0.room() > queue.0.capacity().unwrap_or(0) as u64 / 2
            && let Some(record) = left.pop()
        {
            queue.0.offer(0, &record, 0);
            if left.is_empty() {
                wake(&self.connection);
            }
        }
    }
}

fn is_patience(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// Tells a reader why it is not welcome. If it isn't there to hear it, nobody minds.
fn refuse(connection: &UnixStream, errno: i32) {
    let _ =
        send(connection.as_raw_fd(), &Welcome::No(errno).to_bytes(), MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL);
}

fn hand_over(connection: &UnixStream, welcome: Welcome, files: &Files) -> nix::Result<()> {
    let raw = |file: &OwnedFd| file.as_raw_fd();
    let fds = [raw(&files.records), raw(&files.position)];
    let bytes = welcome.to_bytes();
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(connection.as_raw_fd(), &[IoSlice::new(&bytes)], &[ControlMessage::ScmRights(&fds)], flags, None)?;
    Ok(())
}
