//! The address space of this process, tracked once: shards, index, threads, and who gets told.
//!
//! **Problem.** The kernel tells one listener at a time that a mapping is changing, and keeps the mutator waiting until the listener has read
//! the message. Whoever shares memory with a device wants to use that time; nobody else wants to pay for it.
//!
//! **Law.** A mutator of watched memory goes on only when nothing that was begun over its shard is under way (or the deadline has passed, and
//! then every object it touches is told so), and whoever returned from its mutation finds every object over it invalid.
//!
//! **Protocol.** See [`Gate`] for the two-sided part and `monitor.rs` for the watcher's three passes. A [`Space`] is made by the first who asks
//! and shared by reference count; the last handle ends its threads, unregisters what is still watched, and only then closes the descriptors
//! (a forked child may hold copies of them, and a context that lives on in a child would stop the parent's next `munmap` for ever).

use std::any::Any;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_queue::ArrayQueue;
use thiserror::Error;

use crate::fault::{self, Call};
use crate::fork::{self, ForkMark};
use crate::gate::Gate;
use crate::hull::Hull;
use crate::index::Index;
use crate::ledger::Ledger;
use crate::maps::{MapsError, mapping_at};
pub(crate) use crate::shards::{SHARDS, Shards};
use crate::uffd::{Event, Uffd, feature};
use crate::{HostRange, bracket, monitor, settle, watchdog};

/// The shard whose events are read first and told afterwards.
pub(crate) const NO_HOLD: usize = SHARDS - 1;
/// Watched memory that nobody watched before goes to a shard by blocks of this many bytes, so that neighbours share mappings.
pub(crate) const SHARD_BLOCK: usize = 64 << 20;
/// How long a mutator may be kept waiting unless configured.
pub const DEFAULT_DEADLINE: Duration = Duration::from_millis(100);
/// The longest deadline that is accepted: a mutator in hold-off can't be interrupted, not even by a signal handler.
pub const MAX_DEADLINE: Duration = Duration::from_secs(10);
/// The monitor's thread.
const MONITOR: &str = "pinfold-monitor";
/// Objects that wait for [`Target::settled`], and events that wait for the ledger. When full, the slow way is taken, which forgets nothing.
const QUEUE: usize = 8192;

/// Why memory changed hands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Cause {
    /// The mapping is gone or was replaced.
    Unmap,
    /// The mapping moved elsewhere.
    Remap,
    /// The pages were dropped; the mapping stays.
    Remove,
    /// A mutation announced by [`Space::mutate`].
    Bracket,
    /// [`Space::invalidate`] was called.
    Manual,
    /// Somebody asked for it in order to test what then happens.
    Injected,
    /// What happened was lost with the monitor's round: anything may have changed.
    Lost,
    /// Discarded pages could not be proven gone when they were taken again, so they are taken once more.
    Unproven,
}

/// One change, as a [`Target`] is told of it.
#[derive(Debug, Clone, Copy)]
pub struct Change {
    /// The bytes that change hands. May reach beyond the target's range.
    pub range: HostRange,
    /// Why.
    pub cause: Cause,
    /// How long the mutator has been kept waiting so far.
    pub held: Duration,
    /// Work was still under way when the deadline passed.
    pub late: bool,
    /// The mutator was let go before anybody was told (the range is one without hold-off).
    pub no_hold: bool,
}

/// What wants to know. Both calls may come more often than there were changes, and for changes that are over.
pub trait Target: Any + Send + Sync {
    /// The bytes change hands. When this returns, the target must count as invalid for whoever looks at it through an open gate.
    ///
    /// Called on the monitor thread (or on the thread of [`Space::mutate`] and [`Space::invalidate`]) with the gates of [`shards`](Self::shards)
    /// closed, while a mutator may be asleep in the kernel with the allocator's lock: must not allocate, free, log, call a driver, nor take a
    /// lock that anybody holds while doing so. [`on_event_path`](crate::on_event_path) is true meanwhile.
    fn invalidated(&self, change: &Change);

    /// The change is over, on an ordinary thread where everything is allowed. The place to let go of what the range was used for.
    fn settled(self: Arc<Self>);

    /// The shards in which this target's uses are counted.
    fn shards(&self) -> Shards;

    /// Targets of one group lie over memory that may be taken together; 0 is no group.
    fn group(&self) -> usize {
        0
    }
}

/// The tracking can't be had.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SpaceError {
    /// A thread or a descriptor can't be made.
    #[error("can't set up {what}: {source}; raise the limit on {limit}")]
    Setup {
        /// What was being set up.
        what: &'static str,
        /// Which limit of the process may be in the way.
        limit: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// This process is a forked child of the one the handle belongs to.
    #[error("this handle belongs to the parent process; a forked child has to make its own")]
    Forked,
}

/// What has happened so far. All numbers count since the space was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SpaceStats {
    /// Messages read from the kernel.
    pub events: u64,
    /// Rounds in which mutators were held (one round may free many).
    pub holds: u64,
    /// Nanoseconds mutators were held, summed over rounds.
    pub held_ns: u64,
    /// Rounds in which the deadline passed.
    pub late: u64,
    /// Times the watchdog had to read in the monitor's place.
    pub rescues: u64,
    /// Brackets.
    pub brackets: u64,
    /// Targets that panicked when they were told of a change; a bug of theirs, as they may count as valid still.
    pub panics: u64,
    /// Rounds of the monitor that did not come to their end, after which everybody was told of everything.
    pub recoveries: u64,
    /// 1 if the monitor's thread has ended and the watchdog is the monitor since.
    pub takeovers: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) events: AtomicU64,
    pub(crate) holds: AtomicU64,
    pub(crate) held_ns: AtomicU64,
    pub(crate) late: AtomicU64,
    pub(crate) rescues: AtomicU64,
    pub(crate) brackets: AtomicU64,
    pub(crate) panics: AtomicU64,
    pub(crate) recoveries: AtomicU64,
    pub(crate) takeovers: AtomicU64,
}

/// One userfaultfd with its gate.
#[derive(Debug)]
pub(crate) struct Shard {
    pub(crate) gate: Gate,
    /// `None` where the kernel has no userfaultfd for us: then nothing is watched, and brackets still work.
    pub(crate) uffd: Option<Uffd>,
    /// Closings by the watchdog that the monitor must open. Added to by the watchdog after its last log entry.
    pub(crate) handed: AtomicU32,
    /// Discards told. Written by the monitor, and read by who must know that they are over.
    removes: AtomicU64,
}

impl Shard {
    /// How many discards have been told. Acquire: pairs with the Release in [`removed`](Self::removed).
    pub(crate) fn removes(&self) -> u64 {
        self.removes.load(Ordering::Acquire)
    }

    /// See [`Uffd::is_settled`].
    pub(crate) fn is_settled(&self) -> bool {
        self.uffd.as_ref().is_none_or(Uffd::is_settled)
    }

    /// Counts a discard that has been read and not yet been told.
    pub(crate) fn removed(&self) {
        self.removes.fetch_add(1, Ordering::Release);
    }
}

pub(crate) struct Inner {
    pub(crate) shards: [Shard; SHARDS],
    pub(crate) index: Index<Arc<dyn Target>>,
    /// What is watched. Held across (un)registering, so that the record and the kernel agree; the monitor never takes it.
    ledger: Mutex<Ledger>,
    deadline_ns: AtomicU64,
    pub(crate) fork: ForkMark,
    pub(crate) counters: Counters,
    pub(crate) calm: crate::calm::Calm,
    pub(crate) monitor: monitor::Shared,
    pub(crate) watchdog: watchdog::Shared,
    /// For the settle thread: who to tell, what to write into the ledger.
    pub(crate) settling: ArrayQueue<Arc<dyn Target>>,
    pub(crate) happened: ArrayQueue<Event>,
    /// Some events found that queue full. Raised by whoever tells of an event.
    pub(crate) forgotten: AtomicBool,
    /// Some targets found the queue of those to be settled full.
    pub(crate) unsettled: Hull,
    pub(crate) owes: settle::Owed,
    pub(crate) stop: AtomicBool,
}

/// A share in the tracking of this process's address space.
pub struct Space {
    pub(crate) inner: Arc<Inner>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// The one space of this process, for those who come later and for the fork handlers. A leaf lock but for the making of a space.
static CURRENT: Mutex<std::sync::Weak<Space>> = Mutex::new(std::sync::Weak::new());

impl Space {
    /// The tracking of this process: the existing one, or a new one. `deadline` is how long a mutator may be kept waiting; the longest of all
    /// who ask counts (nobody's work is given up on before the time it asked for), at most [`MAX_DEADLINE`].
    ///
    /// Where the kernel offers no userfaultfd this succeeds all the same; [`watch`](Self::watch) then says that nothing can be watched.
    ///
    /// # Errors
    /// [`SpaceError::Setup`] if threads or descriptors can't be had.
    pub fn get(deadline: Duration) -> Result<Arc<Self>, SpaceError> {
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        let deadline = u64::try_from(deadline.min(MAX_DEADLINE).as_nanos()).expect("ten seconds fit");
        if let Some(space) = current.upgrade().filter(|space| !space.is_forked()) {
            space.inner.deadline_ns.fetch_max(deadline, Ordering::Relaxed);
            return Ok(space);
        }
        let space = Arc::new(Self::start(deadline)?);
        fork::install(&space.inner);
        *current = Arc::downgrade(&space);
        Ok(space)
    }

    /// The tracking of this process, if somebody has asked for it and still has it.
    #[must_use]
    pub fn current() -> Option<Arc<Self>> {
        let current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        current.filter(|space| !space.is_forked())
    }

    pub(crate) fn start(deadline_ns: u64) -> Result<Self, SpaceError> {
        let files =
            |what: &'static str| move |source| SpaceError::Setup { what, limit: "open files (ulimit -n)", source };
        let open = || match Uffd::open(feature::WANTED) {
            // All three events or none: half a watch would be believed to be a whole one.
            Ok((uffd, got)) => Ok((got & feature::EVENTS == feature::EVENTS).then_some(uffd)),
            // Not a refusal to watch, and some shards may have theirs already.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) => {
                Err(error)
            }
            Err(_) => Ok(None),
        };
        let shard = |uffd| Shard { gate: Gate::new(), uffd, handed: AtomicU32::new(0), removes: AtomicU64::new(0) };
        let mut shards = [const { None }; SHARDS].map(shard);
        for shard in &mut shards {
            shard.uffd = open().map_err(files("a userfaultfd"))?;
        }
        if shards.iter().any(|shard| shard.uffd.is_none()) {
            shards.iter_mut().for_each(|shard| shard.uffd = None); // all or none, too
        }
        // Opens the list of mappings, so that a watch needs no descriptor.
        if let Err(MapsError::Unreadable(source)) = mapping_at(0) {
            return Err(files("the list of mappings (/proc/self/maps)")(source));
        }
        let inner = Arc::new(Inner {
            monitor: monitor::Shared::new(&shards)?,
            watchdog: watchdog::Shared::new(),
            shards,
            index: Index::new(),
            ledger: Mutex::new(Ledger::default()),
            deadline_ns: AtomicU64::new(deadline_ns),
            fork: ForkMark::new(),
            counters: Counters::default(),
            calm: crate::calm::Calm::default(),
            settling: ArrayQueue::new(QUEUE),
            happened: ArrayQueue::new(QUEUE),
            forgotten: AtomicBool::new(false),
            unsettled: Hull::new(),
            owes: settle::Owed::new(),
            stop: AtomicBool::new(false),
        });
        // From here on dropping `space` ends what has been started.
        let space = Self { inner, threads: Mutex::new(Vec::new()) };
        space.spawn(MONITOR, monitor::run)?;
        space.spawn("pinfold-watchdg", watchdog::run)?;
        space.spawn("pinfold-settle", settle::run)?;
        Ok(space)
    }

    fn spawn(&self, name: &'static str, run: fn(&Arc<Inner>)) -> Result<(), SpaceError> {
        let inner = Arc::clone(&self.inner);
        let make = || std::thread::Builder::new().name(name.into()).spawn(move || run(&inner));
        let spawned = fault::at(Call::Thread).and_then(|()| make());
        let handle =
            spawned.map_err(|source| SpaceError::Setup { what: "a thread", limit: "processes (ulimit -u)", source })?;
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(handle);
        Ok(())
    }

    /// Whether this process is a forked child of the one that made this space. Costs a load.
    #[must_use]
    #[inline]
    pub fn is_forked(&self) -> bool {
        self.inner.fork.is_child()
    }

    /// The gate of a shard, for those who begin uses.
    #[must_use]
    #[inline]
    pub fn gate(&self, shard: usize) -> &Gate {
        &self.inner.shards[shard].gate
    }

    /// How long a mutator may be kept waiting.
    #[must_use]
    pub fn deadline(&self) -> Duration {
        self.inner.deadline()
    }

    /// Puts a target over a range. From now on it is told of changes that somebody sees: the bracket and [`invalidate`](Self::invalidate) at
    /// once, the program's own mutations when the pages are [watched](Self::watch). Touches neither the pages nor the kernel.
    pub fn insert(&self, range: HostRange, id: u64, target: Arc<dyn Target>) {
        self.inner.index.insert(range, id, Arc::new(target));
    }

    /// Whether any page of the range is watched.
    #[must_use]
    pub fn is_watched(&self, range: HostRange) -> bool {
        !self.inner.ledger().is_free(range)
    }

    /// Calls `visit` with each target over the range.
    pub fn visit(&self, range: HostRange, mut visit: impl FnMut(HostRange, u64, &Arc<dyn Target>)) {
        self.inner.index.visit_overlapping(range, |entry| visit(entry.range, entry.id, entry.value));
    }

    /// Calls `visit` with each target, in address order.
    pub fn for_each(&self, mut visit: impl FnMut(&Arc<dyn Target>)) {
        self.inner.index.for_each(|entry| visit(entry.value));
    }

    /// Waits until no gate of the set is closed and everything is told. Returns false when `deadline` has passed first: then nothing may be looked
    /// at.
    #[must_use]
    pub fn wait_open(&self, shards: Shards, deadline: Instant) -> bool {
        shards.iter().all(|shard| self.gate(shard).wait_open(Some(deadline)))
    }

    /// As [`wait_open`](Self::wait_open), for whoever looks at what lies over these bytes only: doesn't wait until others are told.
    #[must_use]
    pub fn wait_open_for(&self, range: HostRange, shards: Shards, deadline: Instant) -> bool {
        shards.iter().all(|shard| self.gate(shard).wait_open_for(range, Some(deadline)))
    }

    /// The shard in which uses of a range are counted that nobody watches.
    #[must_use]
    pub fn home(&self, range: HostRange) -> Shards {
        Shards::one(Inner::home(range))
    }

    /// Runs a mutation of the address space that is known beforehand, so that beginning *and* end are exact: nothing uses the ranges when `f`
    /// starts, every target over them is invalid, and none becomes valid again before `f` has returned. It is the only way to get the
    /// operations right of which the kernel sends no event (file truncation, hole punching, guard pages), and the only way in which whoever
    /// handles these events may unmap watched memory itself.
    ///
    /// # Errors
    /// [`bracket::MutateError`]: called inside another bracket on the same thread, or in a forked child. `f` has not run then.
    pub fn mutate<R>(&self, ranges: &[HostRange], f: impl FnOnce() -> R) -> Result<R, bracket::MutateError> {
        bracket::mutate(&self.inner, ranges, f)
    }

    /// Invalidates what lies over the range without waiting for uses that are under way. For mutations nobody reports.
    ///
    /// # Errors
    /// As [`mutate`](Self::mutate).
    pub fn invalidate(&self, range: HostRange, cause: Cause) -> Result<(), bracket::MutateError> {
        bracket::invalidate(&self.inner, range, cause)
    }

    /// What has happened so far.
    #[must_use]
    pub fn stats(&self) -> SpaceStats {
        let c = &self.inner.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        SpaceStats {
            events: get(&c.events),
            holds: get(&c.holds),
            held_ns: get(&c.held_ns),
            late: get(&c.late),
            rescues: get(&c.rescues),
            brackets: get(&c.brackets),
            panics: get(&c.panics),
            recoveries: get(&c.recoveries),
            takeovers: get(&c.takeovers),
        }
    }
}

impl Inner {
    pub(crate) fn deadline(&self) -> Duration {
        Duration::from_nanos(self.deadline_ns.load(Ordering::Relaxed))
    }

    /// The record of what is watched, brought up to date with the events the monitor has read.
    pub(crate) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        // Acquire: pairs with the Release in `happens`.
        ledger.unsure |= self.forgotten.load(Ordering::Acquire);
        // That it is empty is told by two loads; to find it so by taking something out costs a fence.
        while let Some(event) = (!self.happened.is_empty()).then(|| self.happened.pop()).flatten() {
            match event {
                Event::Unmap(range) => ledger.unmapped(range),
                // The old place is cut by the UNMAP that follows, unless the mapping stays there (MREMAP_DONTUNMAP).
                Event::Remap { from, to } => ledger.moved(from, to),
                Event::Remove(_) => {}
            }
        }
        ledger
    }

    /// Writes an event down for the ledger, before any target is told of it. Neither allocates nor waits.
    pub(crate) fn happens(&self, event: Event) {
        if self.happened.push(event).is_err() {
            // Release: pairs with the Acquire in `ledger`; raised before the gates open, so whoever was told finds the ledger unsure.
            self.forgotten.store(true, Ordering::Release);
        }
    }

    /// The shard for pages nobody watches yet.
    pub(crate) fn home(range: HostRange) -> usize {
        range.start() / SHARD_BLOCK % NO_HOLD
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        let threads = std::mem::take(self.threads.get_mut().unwrap_or_else(PoisonError::into_inner));
        if self.is_forked() {
            std::mem::forget(threads); // they live in the parent
            self.inner.close_descriptors();
            return;
        }
        // A mutator goes on as soon as its message is read, and what it moved is in the ledger a moment later, before the gate opens. Who sees it unmoved
        // leaves it watched, and where a forked child has the descriptor, too, whoever unmaps that waits for ever.
        let patience = Instant::now() + 2 * self.deadline();
        let _ = self.wait_open(Shards::ALL, patience);
        self.inner.unwatch_all();
        fork::uninstall(&self.inner);
        self.inner.stop.store(true, Ordering::SeqCst);
        self.inner.monitor.kick();
        self.inner.watchdog.kick();
        self.inner.owes.wake();
        let me = std::thread::current().id();
        let is_gone = self.inner.counters.takeovers.load(Ordering::Relaxed) > 0;
        for thread in threads {
            // Nobody can wait for a thread that ended without a word.
            if thread.thread().id() != me && !(is_gone && thread.thread().name() == Some(MONITOR)) {
                let _ = thread.join(); // a panic there has been reported by its hook
            }
        }
        self.inner.close_descriptors();
    }
}

impl Inner {
    /// Async-signal-safe: a forked child's handler calls it.
    pub(crate) fn close_descriptors(&self) {
        for uffd in self.shards.iter().filter_map(|shard| shard.uffd.as_ref()) {
            uffd.close();
        }
        self.monitor.close();
    }
}

impl fmt::Debug for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Space").field("targets", &self.inner.index.len()).field("stats", &self.stats()).finish()
    }
}

impl fmt::Debug for dyn Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Target")
    }
}

/// The fork handlers need the lock that guards the making and ending of spaces.
pub(crate) fn lock_current() -> MutexGuard<'static, std::sync::Weak<Space>> {
    CURRENT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Once per process.
pub(crate) static FORK_HANDLERS: OnceLock<()> = OnceLock::new();
