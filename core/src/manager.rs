//! The manager: registers ranges, hands out leases, and ends it all in the right order.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use pinfold_invalidate::{Cause, Coverage, DEFAULT_DEADLINE, HostRange, Shards, SpaceStats, in_bracket, mappings};

use crate::acquire::Effort;
use crate::engine::Engine;
use crate::notes::What;
use crate::object::{Handle, Object};
use crate::state::{Generation, Snapshot, State, Step};
use crate::watch::{Scope, WatchConfig, WatchQueue};
use crate::{Access, Device, Error, Lease, Path, protocol};

/// What can be set when a manager is made.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Config {
    /// How long a mutator of memory in use is kept waiting before it is let go and the work is reported LATE. Default 100 ms, at most 10 s; the
    /// longest of all managers of the process counts.
    pub deadline: Duration,
    /// Most bytes the device may have at a time. Default: no limit of ours.
    pub budget: u64,
    /// Ranges up to this many bytes whose pages are resident are taken on the thread that calls `acquire`. Default 256 KiB; 0: never.
    pub inline_limit: usize,
    /// How long dropping the manager waits for work that is under way before it asks the device. Default 5 s.
    pub close_limit: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            deadline: DEFAULT_DEADLINE,
            budget: u64::MAX,
            inline_limit: 256 << 10,
            close_limit: Duration::from_secs(5),
        }
    }
}

/// Hands host memory to one device. Cheap to clone; the last clone to go ends every object, waits for work under way, and joins the workers.
pub struct Manager<D: Device> {
    owner: Arc<Owner<D>>,
}

struct Owner<D: Device> {
    engine: Arc<Engine<D>>,
    /// Every object that has not been closed, by id.
    objects: Mutex<HashMap<u64, Weak<Handle<D>>>>,
}

/// A registered range. Cheap to clone; dropping the last clone (and the last lease of it) ends the registration.
pub struct Userptr<D: Device> {
    handle: Arc<Handle<D>>,
}

/// Ids are never used twice in a process.
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

impl<D: Device> Manager<D> {
    /// A manager of `device`.
    ///
    /// # Errors
    /// [`Error::Space`] and [`Error::Pool`] if threads or descriptors can't be had.
    pub fn new(device: D, config: Config) -> Result<Self, Error> {
        let engine = Arc::new(Engine::new(device, config)?);
        Ok(Self { owner: Arc::new(Owner { engine, objects: Mutex::default() }) })
    }

    fn engine(&self) -> &Arc<Engine<D>> {
        &self.owner.engine
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &D {
        self.engine().device()
    }

    /// Registers a range, in microseconds: nothing is touched, nothing needs to be mapped yet. Ranges may overlap and repeat.
    ///
    /// # Errors
    /// [`Error::Closed`], [`Error::Forked`].
    ///
    /// # Safety
    /// From the first acquire on, and until the object and all its leases are gone:
    /// 1. No Rust reference exists to bytes the device may write while a [`Pending`](crate::Pending) that names them is open.
    /// 2. The range is not memory that an allocator trims or unmaps under its lock, unless its coverage is [`Coverage::NoHold`].
    /// 3. Unmapping or discarding the memory while the device uses it goes through [`mutate`](Self::mutate), or the range is unregistered first.
    ///    Otherwise the mutation is held off, bounded by the deadline, and reported; where the deadline passes, or on a device without real pins
    ///    (a CPU driver, if the memory is private), the device may then read what is there by then, or crash the process.
    /// 4. Mutations the kernel doesn't report (truncation and hole punching through a descriptor, guard pages) go through `mutate`, or are told to
    ///    [`invalidate`](Self::invalidate) before the next submit.
    pub unsafe fn register(&self, range: HostRange, access: Access) -> Result<Userptr<D>, Error> {
        self.add(range, access, "", false)
    }

    /// As [`register`](Self::register), with a name that reaches debug utils, notes and messages.
    ///
    /// # Errors
    /// As [`register`](Self::register).
    ///
    /// # Safety
    /// As [`register`](Self::register).
    pub unsafe fn register_labelled(&self, range: HostRange, access: Access, label: &str) -> Result<Userptr<D>, Error> {
        self.add(range, access, label, false)
    }

    /// Registers a range that is not watched: no userfaultfd, no hold-off but in brackets.
    ///
    /// # Errors
    /// As [`register`](Self::register).
    ///
    /// # Safety
    /// As [`register`](Self::register), and *every* mutation of the range's mappings goes through [`mutate`](Self::mutate).
    pub unsafe fn register_unwatched(&self, range: HostRange, access: Access) -> Result<Userptr<D>, Error> {
        self.add(range, access, "", true)
    }

    fn add(&self, range: HostRange, access: Access, label: &str, unwatched: bool) -> Result<Userptr<D>, Error> {
        self.engine().check()?;
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let mut object = Object::new(id, range, access, label.into(), Arc::clone(self.engine()));
        object.unwatched = unwatched;
        let object = Arc::new(object);
        let handle = Arc::new(Handle { object: Arc::clone(&object) });
        self.owner.objects().insert(id, Arc::downgrade(&handle));
        self.engine().note(&object, What::Registered);
        self.engine().space.insert(range, id, object);
        Ok(Userptr { handle })
    }

    /// A lease of all the objects, if all are valid now. Objects that are not begin to be acquired.
    ///
    /// Waits only while memory in the objects' shards is changing hands, at most for two hold-offs.
    ///
    /// # Errors
    /// [`Error::Again`] while workers are on it; [`Error::Fault`], [`Error::Budget`], [`Error::Device`] once for each acquisition that failed.
    pub fn acquire(&self, objects: &[&Userptr<D>]) -> Result<Lease<D>, Error> {
        self.try_acquire(objects, None).map_err(|wait| wait.error)
    }

    /// As [`acquire`](Self::acquire), waiting up to `limit`.
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire); [`Error::Again`] when the time is over.
    pub fn acquire_timeout(&self, objects: &[&Userptr<D>], limit: Duration) -> Result<Lease<D>, Error> {
        let deadline = Instant::now() + limit;
        let mut since = Since::default();
        loop {
            match self.try_acquire(objects, Some(&mut since)) {
                Ok(lease) => return Ok(lease),
                Err(Wait { error, object: Some((index, seen)) }) if error.is_again() => {
                    if !objects[index].handle.object.ended.wait(seen, Some(deadline)) {
                        return Err(error);
                    }
                }
                Err(Wait { error, .. }) if error.is_again() && Instant::now() < deadline => {}
                Err(Wait { error, .. }) => return Err(error),
            }
        }
    }

    /// As [`acquire`](Self::acquire), for any executor.
    pub fn acquire_async<'a>(&'a self, objects: &'a [&'a Userptr<D>]) -> Acquire<'a, D> {
        Acquire { manager: self, objects, since: Since::default() }
    }

    fn try_acquire(&self, objects: &[&Userptr<D>], since: Option<&mut Since>) -> Result<Lease<D>, Wait> {
        let engine = self.engine();
        engine.check()?;
        if in_bracket() {
            return Err(Error::Nested.into());
        }
        engine.counters.acquires.fetch_add(1, Ordering::Relaxed);
        let mut lease = Lease::new();
        let mut wait = None;
        let since = since.map(|since| since.for_objects(objects));
        for (index, userptr) in objects.iter().enumerate() {
            let object = &userptr.handle.object;
            if !Arc::ptr_eq(&object.engine, engine) {
                return Err(Error::Foreign.into());
            }
            let first = since.as_ref().map_or(u64::MAX, |since| since[index]);
            let seen = object.ended.value(); // before the look: an end that comes after it is noticed
            match object.ready(first)? {
                Some((noted, pin)) => lease.add(Arc::clone(&userptr.handle), noted, pin),
                None => wait = wait.or(Some((index, seen))), // the others begin all the same
            }
        }
        match wait {
            None => Ok(lease),
            object => Err(Wait { error: Error::Again, object }),
        }
    }

    /// Runs a mutation of the address space (or of a file that is mapped there) with an exact beginning and end: when `f` starts, no work uses the
    /// ranges and every object over them is invalid; none becomes valid before `f` has returned. Name every mapped range the mutation touches.
    ///
    /// Work that does not end before the deadline is reported LATE, and `f` runs all the same.
    ///
    /// # Errors
    /// [`Error::Nested`] inside another bracket, [`Error::Forked`]; `f` has not run then.
    pub fn mutate<R>(&self, ranges: &[HostRange], f: impl FnOnce() -> R) -> Result<R, Error> {
        Ok(self.engine().space.mutate(ranges, f)?)
    }

    /// Tells that the memory of a range has changed hands without an event: objects over it are invalid when this returns. Does not wait for work
    /// that is under way.
    ///
    /// # Errors
    /// As [`mutate`](Self::mutate).
    pub fn invalidate(&self, range: HostRange) -> Result<(), Error> {
        Ok(self.engine().space.invalidate(range, Cause::Manual)?)
    }

    /// The objects of this manager over an address.
    ///
    /// # Errors
    /// [`Error::Again`] if memory was changing hands for longer than two hold-offs; [`Error::Nested`], [`Error::Forked`], [`Error::Closed`].
    pub fn find(&self, addr: usize) -> Result<Vec<Userptr<D>>, Error> {
        let engine = self.engine();
        engine.check()?;
        if in_bracket() {
            return Err(Error::Nested);
        }
        let page = pinfold_invalidate::page_size();
        let Ok(range) = HostRange::new(addr & !(page - 1), page) else { return Ok(Vec::new()) };
        if !engine.space.wait_open(Shards::ALL, Instant::now() + engine.patience()) {
            return Err(Error::Again);
        }
        let mut ids = Vec::new();
        engine.space.visit(range, |_, id, _| ids.push(id));
        let objects = self.owner.objects();
        let found = ids.iter().filter_map(|id| objects.get(id)?.upgrade());
        Ok(found.map(|handle| Userptr { handle }).collect())
    }

    /// A queue of everything that happens to this manager's objects, from now on.
    ///
    /// # Errors
    /// [`Error::Queue`] if the descriptor can't be had; [`Error::Forked`], [`Error::Closed`].
    pub fn watch(&self, config: WatchConfig) -> Result<WatchQueue, Error> {
        self.engine().check()?;
        let queue =
            WatchQueue::new(config).map_err(|error| Error::Queue { errno: error.errno(), source: Arc::new(error) })?;
        let added = self.engine().notes.add_watch(&queue, Scope::All, 0);
        added.map_err(|error| Error::Queue { errno: error.errno(), source: Arc::new(error) })?;
        Ok(queue)
    }

    /// What has happened, and what there is.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let engine = self.engine();
        let counters = &engine.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            objects: self.owner.objects().values().filter(|handle| handle.strong_count() > 0).count() as u64,
            imports: engine.pins.count(),
            pinned_bytes: engine.pins.bytes(),
            in_flight: engine.flights.count(),
            acquires: get(&counters.acquires),
            acquired_inline: get(&counters.inline),
            acquired_by_worker: get(&counters.queued),
            imports_made: get(&counters.imports),
            retries: get(&counters.retries),
            second_looks: get(&counters.second_looks),
            faults: get(&counters.faults),
            submits: get(&counters.submits),
            stale: get(&counters.stale),
            invalidated: get(&counters.invalidated),
            late: get(&counters.late),
            space: engine.space.stats(),
        }
    }
}

/// Counts since the manager was made, but for the first four, which say what there is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Objects that are registered.
    pub objects: u64,
    /// Imports that exist, also those kept by old leases and unfinished work.
    pub imports: u64,
    /// Bytes of these.
    pub pinned_bytes: u64,
    /// Submits under way.
    pub in_flight: u64,
    /// Calls of the acquire functions, with every try of those that wait.
    pub acquires: u64,
    /// Acquisitions done on the caller's thread.
    pub acquired_inline: u64,
    /// Acquisitions given to a worker.
    pub acquired_by_worker: u64,
    /// Imports made.
    pub imports_made: u64,
    /// Attempts that were overtaken by a mutation.
    pub retries: u64,
    /// Objects taken a second time because discarded pages could not be proven gone.
    pub second_looks: u64,
    /// Acquisitions that failed.
    pub faults: u64,
    /// Submits.
    pub submits: u64,
    /// Submits refused because a lease was stale.
    pub stale: u64,
    /// Invalidations of objects.
    pub invalidated: u64,
    /// Invalidations of objects whose work had not ended before the deadline.
    pub late: u64,
    /// What the process-wide tracking has seen.
    pub space: SpaceStats,
}

/// Why a try to acquire did not succeed, and on what to sleep.
struct Wait {
    error: Error,
    /// The object whose acquisition has to end first, and the value to sleep on.
    object: Option<(usize, u32)>,
}

impl From<Error> for Wait {
    fn from(error: Error) -> Self {
        Self { error, object: None }
    }
}

/// For each object, the first acquisition a waiter has waited for: a failure of that one or a later one is the waiter's to be told.
#[derive(Default)]
struct Since(Vec<u64>);

impl Since {
    fn for_objects<D: Device>(&mut self, objects: &[&Userptr<D>]) -> &[u64] {
        if self.0.is_empty() {
            self.0 = objects.iter().map(|userptr| userptr.handle.object.first_to_wait_for()).collect();
        }
        &self.0
    }
}

impl<D: Device> Object<D> {
    /// The pin of the object if it is valid, else makes it so: here if that is quick, by a worker if not (then `None`).
    ///
    /// `first` is the first acquisition the caller waits for; without one (`u64::MAX`) it is told a failure nobody has been told yet.
    #[allow(clippy::type_complexity)]
    fn ready(self: &Arc<Self>, first: u64) -> Result<Option<(Snapshot, Arc<crate::object::Pin<D>>)>, Error> {
        let engine = &self.engine;
        let patience = Instant::now() + engine.patience();
        let mut tried_here = false;
        loop {
            let seen = protocol::look(&*engine.space, &self.word, Some(patience)).ok_or(Error::Again)?;
            match seen.state {
                State::Valid => {
                    if let Some(pin) = self.pin_of(seen) {
                        self.refresh(&pin)?;
                        return Ok(Some((seen, pin)));
                    }
                    // No pin of that generation: the word has moved since we looked. So it goes round at most once for each change.
                    if Instant::now() > patience {
                        return Err(Error::Again);
                    }
                }
                State::Queued | State::Acquiring => return Ok(None),
                State::Closed | State::DeadAfterFork => return Err(Error::Closed),
                State::New | State::Invalid | State::Faulted => {
                    // Also an acquisition that was cancelled is told as one that failed.
                    if let Some(error) = self.untold_fault(first) {
                        return Err(error);
                    }
                    if !tried_here && seen.state != State::Faulted && self.is_quick(engine.config.inline_limit) {
                        tried_here = true;
                        if let Some((noted, token)) = self.begin_acquisition(seen, Step::Claim) {
                            engine.counters.inline.fetch_add(1, Ordering::Relaxed);
                            self.build(noted, token, Effort::INLINE);
                        }
                    } else {
                        self.enqueue(seen);
                    }
                }
            }
        }
    }

    /// The acquisition that a waiter who comes now waits for first: one that failed and nobody was told, the one under way, or else the next.
    fn first_to_wait_for(&self) -> u64 {
        let slot = self.slot();
        if let Some(fault) = slot.fault.as_ref().filter(|fault| !fault.told) {
            return fault.token;
        }
        let under_way = matches!(self.word.read().state, State::Queued | State::Acquiring);
        slot.token + u64::from(!under_way)
    }

    fn untold_fault(&self, first: u64) -> Option<Error> {
        let mut slot = self.slot();
        let fault = slot.fault.as_mut()?;
        let mine = if first == u64::MAX { !fault.told } else { fault.token >= first };
        if !mine {
            return None;
        }
        fault.told = true;
        Some(fault.error.clone())
    }

    fn enqueue(self: &Arc<Self>, seen: Snapshot) {
        let Some((_, token)) = self.begin_acquisition(seen, Step::Enqueue) else { return };
        self.engine.counters.queued.fetch_add(1, Ordering::Relaxed);
        self.engine.note(self, What::Queued);
        let object = Arc::clone(self);
        self.engine.spawn(self.id, move |cancelled| object.work(token, cancelled));
    }

    /// Word and token move together: a work item finds either both its own or that it was superseded.
    fn begin_acquisition(&self, seen: Snapshot, step: Step) -> Option<(Snapshot, u64)> {
        let mut slot = self.slot();
        let noted = self.word.step(seen, step).ok()?;
        slot.token += 1;
        Some((noted, slot.token))
    }

    /// Brings a mirror up to date.
    fn refresh(&self, pin: &crate::object::Pin<D>) -> Result<(), Error> {
        if !matches!(pin.path, Path::Mirror(_)) {
            return Ok(());
        }
        let mappings = mappings(self.range)?;
        Ok(self.engine.device().refresh(pin.import(), &self.request(&mappings, true))?)
    }

    /// Takes back an acquisition that is queued or under way.
    fn cancel(&self) -> bool {
        let mut slot = self.slot();
        loop {
            let seen = self.word.read();
            let step = match seen.state {
                State::Queued => Step::Refuse,
                State::Acquiring => Step::Abandon,
                _ => return false,
            };
            if self.word.step(seen, step).is_ok() {
                break;
            }
        }
        let token = slot.token;
        slot.token += 1;
        self.fail(&mut slot, Error::Cancelled, token);
        drop(slot);
        self.wake();
        true
    }
}

impl<D: Device> Userptr<D> {
    /// The range.
    #[must_use]
    pub fn range(&self) -> HostRange {
        self.handle.object.range
    }

    /// The number that notes carry; never used twice in a process.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.handle.object.id
    }

    /// The state. Waits, at most for two hold-offs, while memory of the object's shards is changing hands: a thread that has returned from
    /// `munmap` never sees the object valid.
    ///
    /// # Errors
    /// [`Error::Again`] if that took longer. A forked child is told [`State::DeadAfterFork`].
    pub fn state(&self) -> Result<State, Error> {
        if self.handle.object.engine.space.is_forked() {
            return Ok(State::DeadAfterFork);
        }
        Ok(self.look()?.state)
    }

    /// The generation: how often the memory has changed hands. Waits as [`state`](Self::state) does.
    ///
    /// # Errors
    /// [`Error::Again`], [`Error::Forked`].
    pub fn generation(&self) -> Result<Generation, Error> {
        Ok(self.look()?.generation)
    }

    fn look(&self) -> Result<Snapshot, Error> {
        let object = &self.handle.object;
        if object.engine.space.is_forked() {
            return Err(Error::Forked);
        }
        if in_bracket() {
            return Err(Error::Nested);
        }
        let patience = Instant::now() + object.engine.patience();
        protocol::look(&*object.engine.space, &object.word, Some(patience)).ok_or(Error::Again)
    }

    /// How well the range is watched; `None` before the first acquisition.
    #[must_use]
    pub fn coverage(&self) -> Option<Coverage> {
        self.handle.object.slot().coverage
    }

    /// How the bytes reach the device; `None` while they don't.
    #[must_use]
    pub fn path(&self) -> Option<Path> {
        self.handle.object.slot().pin.as_ref().map(|pin| pin.path)
    }

    /// Submits under way that use the object.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.handle.object.inflight.load(Ordering::Relaxed)
    }

    /// Takes back an acquisition that is queued or under way, and tells its waiters [`Error::Cancelled`]. Returns whether there was one.
    #[allow(clippy::must_use_candidate)]
    pub fn cancel(&self) -> bool {
        !self.handle.object.engine.space.is_forked() && self.handle.object.cancel()
    }
}

impl<D: Device> Clone for Manager<D> {
    fn clone(&self) -> Self {
        Self { owner: Arc::clone(&self.owner) }
    }
}

impl<D: Device> Clone for Userptr<D> {
    fn clone(&self) -> Self {
        Self { handle: Arc::clone(&self.handle) }
    }
}

impl<D: Device> fmt::Debug for Manager<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Manager").field(&self.stats()).finish()
    }
}

impl<D: Device> fmt::Debug for Userptr<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let object = &self.handle.object;
        f.debug_struct("Userptr")
            .field("id", &object.id)
            .field("range", &object.range)
            .field("word", &object.word.read())
            .finish()
    }
}

impl<D: Device> Owner<D> {
    fn objects(&self) -> MutexGuard<'_, HashMap<u64, Weak<Handle<D>>>> {
        let mut objects = self.objects.lock().unwrap_or_else(PoisonError::into_inner);
        if objects.len() > 64 && objects.len() == objects.capacity() {
            objects.retain(|_, handle| handle.strong_count() > 0);
        }
        objects
    }
}

impl<D: Device> Drop for Owner<D> {
    fn drop(&mut self) {
        if self.engine.space.is_forked() {
            return;
        }
        self.engine.begin_closing();
        self.engine.wait_flights(self.engine.config.close_limit);
        let objects = std::mem::take(&mut *self.objects());
        for handle in objects.values().filter_map(Weak::upgrade) {
            handle.object.close();
        }
        self.engine.end();
    }
}

/// The future of [`Manager::acquire_async`].
pub struct Acquire<'a, D: Device> {
    manager: &'a Manager<D>,
    objects: &'a [&'a Userptr<D>],
    since: Since,
}

impl<D: Device> Future for Acquire<'_, D> {
    type Output = Result<Lease<D>, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        loop {
            let wait = match this.manager.try_acquire(this.objects, Some(&mut this.since)) {
                Err(wait) if wait.error.is_again() => wait,
                done => return Poll::Ready(done.map_err(|wait| wait.error)),
            };
            let Some((index, seen)) = wait.object else {
                // A gate stayed closed for two hold-offs: nobody will tell this task when it opens, so it asks again when others have had a turn.
                context.waker().wake_by_ref();
                return Poll::Pending;
            };
            let object = &this.objects[index].handle.object;
            object.slot().wakers.push(context.waker().clone());
            // Whoever ends an acquisition takes the wakers before it moves `ended`: unmoved means that ours is there to be woken.
            if object.ended.value() == seen {
                return Poll::Pending;
            }
        }
    }
}
