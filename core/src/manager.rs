//! The manager: registers ranges, hands out leases, and ends it all in the right order.

use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use pinfold_invalidate::{Cause, HostRange, Shards, SpaceStats, in_bracket};

use crate::dmabuf::{CpuAccess, DmaBuf, DmaBufPart, Reserved, export};
use crate::engine::Engine;
use crate::object::{Handle, Object};
use crate::ready::{Since, Wait};
use crate::watch::{DmaBufEvent, Record, Scope, WatchConfig, WatchList, WatchQueue, share};
use crate::{Access, Acquire, Config, Device, Error, Lease, Userptr};

/// Hands host memory to one device. Cheap to clone; the last clone to go ends every object, waits for work under way, and joins the workers.
pub struct Manager<D: Device> {
    owner: Arc<Owner<D>>,
}

struct Owner<D: Device> {
    engine: Arc<Engine<D>>,
    /// Where other processes watch. Holds its owner weakly.
    server: OnceLock<share::Server>,
}

impl<D: Device> Manager<D> {
    /// A manager of `device`.
    ///
    /// # Errors
    /// [`Error::Space`] and [`Error::Pool`] if threads or descriptors can't be had, [`Error::Queue`] if the watch socket can't be made.
    pub fn new(device: D, config: Config) -> Result<Self, Error> {
        let socket = config.watch_socket.clone().or_else(share::default_path);
        let engine = Arc::new(Engine::new(device, config)?);
        let owner = Arc::new(Owner { engine, server: OnceLock::new() });
        if let Some(path) = socket {
            let server = listen(&path, &owner)
                .map_err(|error| Error::Queue { errno: error.errno(), source: Arc::new(error) })?;
            owner.server.get_or_init(|| server);
        }
        Ok(Self { owner })
    }

    pub(crate) fn engine(&self) -> &Arc<Engine<D>> {
        &self.owner.engine
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &D {
        self.engine().device()
    }

    /// Registers a range, in microseconds: nothing is touched, nothing needs to be mapped yet. Ranges may overlap and repeat.
    ///
    /// An object takes at most 400 bytes of the heap (its label not counted), and 500 while the device has its pages, besides what the device needs
    /// for an import; no descriptor and no thread.
    ///
    /// # Errors
    /// [`Error::Closed`], [`Error::Forked`].
    ///
    /// # Safety
    /// From the first acquire on, and until the object, its [parts](Userptr::part) and all their leases are gone:
    /// 1. No Rust reference exists to bytes the device may write while a [`Pending`](crate::Pending) that names them is open.
    /// 2. The range is not memory that an allocator trims or unmaps under its lock, unless its coverage is [`NoHold`](crate::Coverage::NoHold).
    /// 3. Unmapping or discarding the memory while the device uses it goes through [`mutate`](Self::mutate), or the range is unregistered first.
    ///    Otherwise the mutation is held off, bounded by the deadline, and reported; where the deadline passes, or on a device without real pins
    ///    (a CPU driver, if the memory is private), the device may then read what is there by then, or crash the process.
    /// 4. Mutations the kernel doesn't report (truncation and hole punching through a descriptor, guard pages) go through `mutate` or
    ///    [`mutate_file`](Self::mutate_file), or are told to [`invalidate`](Self::invalidate) before the next submit.
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
        let mut object = Object::new(range, access, label.into(), Arc::clone(self.engine()));
        *object.unwatched.get_mut() = unwatched;
        Ok(Userptr::first(object))
    }

    /// Registers a part of a dma-buf, which becomes an object like any other: acquired, leased, submitted, retired. The object's range is a name for
    /// it, addresses at which nothing is mapped; [`invalidate`](Self::invalidate) takes it, and makes the next acquire import the buffer anew.
    ///
    /// Its pages stay until everybody has closed it, whatever becomes of its exporter, so there is nothing to hold off. Who else uses it, and
    /// when, is told by its fences: [`wait_dmabuf`](Self::wait_dmabuf).
    ///
    /// # Errors
    /// [`Error::DmaBuf`] if the part isn't inside the buffer; [`Error::Closed`], [`Error::Forked`].
    pub fn register_dmabuf(&self, part: DmaBufPart, access: Access, label: &str) -> Result<Userptr<D>, Error> {
        self.engine().check()?;
        let reserved = Reserved::new(part)?;
        let mut object = Object::new(reserved.range, access, label.into(), Arc::clone(self.engine()));
        object.dmabuf = Some(Box::new(reserved));
        Ok(Userptr::first(object))
    }

    /// A dma-buf of a part of an object, in bytes from its start: whole pages of one memory file.
    ///
    /// An object that isn't watched becomes watched by this: whoever gets the buffer has promised nothing. It is invalid then, and acquired
    /// again like after any change.
    ///
    /// # Errors
    /// [`Error::DmaBuf`] with the reason: memory that is no single memory file, seals, a part outside the object, no `/dev/udmabuf`, or an object
    /// that can't be watched; [`Error::Fault`], [`Error::Closed`], [`Error::Forked`].
    pub fn export_dmabuf(&self, object: &Userptr<D>, bytes: std::ops::Range<u64>) -> Result<DmaBuf, Error> {
        self.engine().check()?;
        let object = &object.handle.object;
        let buffer = export(object, bytes.clone())?;
        self.engine().counters.dmabufs_exported.fetch_add(1, Ordering::Relaxed);
        let part = DmaBufPart { buffer, offset: bytes.start, len: bytes.end - bytes.start };
        self.engine().note_dmabuf(object, DmaBufEvent::Exported, &part);
        Ok(part.buffer)
    }

    /// Waits until the work that drivers know of is over, on the dma-buf of an object: all of it before a write, what writes before a read. Returns
    /// false when `limit` has passed first, and true at once for objects over other memory.
    ///
    /// # Errors
    /// [`Error::DmaBuf`], [`Error::Closed`], [`Error::Forked`].
    pub fn wait_dmabuf(&self, object: &Userptr<D>, access: CpuAccess, limit: Duration) -> Result<bool, Error> {
        self.engine().check()?;
        let object = &object.handle.object;
        let Some(reserved) = &object.dmabuf else { return Ok(true) };
        let part = &reserved.part;
        let over = part.buffer.wait(access, limit)?;
        self.engine().note_dmabuf(object, DmaBufEvent::SyncWaited, part);
        Ok(over)
    }

    /// A lease of all the objects, if all are valid now. Objects that are not begin to be acquired. Who needs some pages of a large object acquires
    /// a [part](Userptr::part) of it.
    ///
    /// Waits only while memory in the objects' shards is changing hands, at most for two hold-offs.
    ///
    /// # Errors
    /// [`Error::Again`] while workers are on it; [`Error::Fault`], [`Error::Budget`], [`Error::Device`] once for each acquisition that failed.
    pub fn acquire(&self, objects: &[&Userptr<D>]) -> Result<Lease<D>, Error> {
        self.try_acquire(objects, None, false).map_err(|wait| wait.error)
    }

    /// Says that the objects will be acquired soon: those that are not valid begin to be acquired, by workers, so that the acquire need not wait.
    /// Waits for nothing; what goes wrong is told to that acquire.
    ///
    /// # Errors
    /// [`Error::Closed`], [`Error::Forked`], [`Error::Nested`], [`Error::Foreign`].
    pub fn prefetch(&self, objects: &[&Userptr<D>]) -> Result<(), Error> {
        self.begin_all(objects)
    }

    /// As [`acquire`](Self::acquire), waiting up to `limit`, from where it begins to wait.
    ///
    /// Where a single object is not valid, this thread takes its pages itself instead of waiting for a worker, if they are in memory and
    /// no more than 64 times [`Config::inline_limit`]. That ends when it is done. Where there is no room, it waits for pages that others are giving
    /// back, two hold-offs at most.
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire); [`Error::Again`] when the time is over.
    pub fn acquire_timeout(&self, objects: &[&Userptr<D>], limit: Duration) -> Result<Lease<D>, Error> {
        // The clock is read only where somebody has to wait.
        let mut deadline = None;
        let mut deadline = || *deadline.get_or_insert_with(|| Instant::now() + limit);
        let mut since = Since::default();
        loop {
            match self.try_acquire(objects, Some(&mut since), true) {
                Ok(lease) => return Ok(lease),
                Err(Wait { error, object: Some((index, seen)) }) if error.is_again() => {
                    if !objects[index].handle.object.ended.wait(seen, Some(deadline())) {
                        return Err(error);
                    }
                }
                Err(Wait { error, .. }) if error.is_again() && deadline() > Instant::now() => {}
                Err(Wait { error, .. }) => return Err(error),
            }
        }
    }

    /// As [`acquire`](Self::acquire), for any executor.
    pub fn acquire_async<'a>(&'a self, objects: &'a [&'a Userptr<D>]) -> Acquire<'a, D> {
        Acquire { manager: self, objects, since: Since::default() }
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

    /// Says that the device is lost, which a call of the program's own has answered: from now on every call here says so, and what was taken is
    /// given back. What the device finds out by itself needs no such word.
    pub fn note_lost(&self) {
        self.engine().lose();
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
        if !engine.space.wait_open_for(range, Shards::ALL, Instant::now() + engine.patience()) {
            return Err(Error::Again);
        }
        let mut found = Vec::new();
        engine.space.visit(range, |_, _, target| {
            let object = Object::of(Arc::clone(target)).filter(|object| object.is_of(engine));
            found.extend(object.and_then(Handle::of).map(|handle| Userptr { handle }));
        });
        Ok(found)
    }

    /// For an engine's own tests: from now on, before every `every_nth` submit of this manager one of its objects is invalidated (cause
    /// [`Injected`](crate::watch::NoteCause::Injected)), so that the submit is [`Stale`](crate::SubmitError::Stale) and has to be made anew. 0 ends
    /// it. [`Config::inject_invalidate`] and `PINFOLD_INJECT_INVALIDATE` begin with it.
    pub fn inject_invalidate(&self, every_nth: u32) {
        self.engine().inject.store(every_nth, Ordering::Relaxed);
    }

    /// Takes the pages of objects that nobody uses away from the device, the least recently acquired first, until it is `bytes` or nothing is left;
    /// the objects are then invalid, and their next acquire takes the pages again. Returns the bytes given back: whole objects, so it may be more.
    ///
    /// For memory pressure from outside; the manager's own limits make room by themselves. Objects that are
    /// [kept ready](Userptr::keep_ready) come last, and come back.
    #[allow(clippy::must_use_candidate)]
    pub fn shrink(&self, bytes: u64) -> u64 {
        if self.engine().check().is_err() || in_bracket() { 0 } else { self.engine().shrink(bytes) }
    }

    /// Bytes that the device has of objects nobody uses, which [`shrink`](Self::shrink) could give back. Looks at every object.
    #[must_use]
    pub fn idle_bytes(&self) -> u64 {
        if self.engine().space.is_forked() { 0 } else { self.engine().idle_bytes() }
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
    ///
    /// What an acquire or a [`Pending`](crate::Pending) tells is counted before it is told. A change that a mutator was held for is counted when a look at
    /// an object that it hit ([`Userptr::state`]) has returned, which waits for that, and not yet when the mutator goes on. Pages that nobody uses any
    /// more count until a worker has given them back.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let engine = self.engine();
        let counters = &engine.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            objects: engine.objects.count(),
            imports: engine.pins.count(),
            pinned_bytes: engine.pins.bytes(),
            locked_bytes: engine.locked.bytes(),
            short: engine.short.count(),
            in_flight: u64::from(engine.flights.count()),
            acquires: get(&counters.acquires),
            acquired_inline: get(&counters.inline),
            acquired_by_worker: get(&counters.queued),
            imports_made: get(&counters.imports),
            retries: get(&counters.retries),
            second_looks: get(&counters.second_looks),
            faults: get(&counters.faults),
            submits: engine.flights.launched(),
            stale: get(&counters.stale),
            invalidated: get(&counters.invalidated),
            late: get(&counters.late),
            evicted: get(&counters.evicted),
            evicted_bytes: get(&counters.evicted_bytes),
            shrunk_bytes: get(&counters.shrunk_bytes),
            restored: get(&counters.restored),
            restore_failures: get(&counters.restore_failures),
            injected: get(&counters.injected),
            dmabufs_exported: get(&counters.dmabufs_exported),
            dmabufs_imported: get(&counters.dmabufs_imported),
            space: engine.space.stats(),
        }
    }
}

/// Counts since the manager was made, but for the first five, which say what there is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Objects that are registered.
    pub objects: u64,
    /// Imports that exist or are being made, also those kept by old leases and unfinished work.
    pub imports: u64,
    /// Bytes of these.
    pub pinned_bytes: u64,
    /// Bytes that they count against `RLIMIT_MEMLOCK`, as the device tells.
    pub locked_bytes: u64,
    /// Acquisitions under way that somebody has asked for and that found no room at first.
    pub short: u64,
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
    /// Submits. One that is still being checked counts as well, and no more if it is refused.
    pub submits: u64,
    /// Submits refused because a lease was stale.
    pub stale: u64,
    /// Invalidations of objects.
    pub invalidated: u64,
    /// Invalidations of objects whose work had not ended before the deadline.
    pub late: u64,
    /// Objects that were evicted to make room for others.
    pub evicted: u64,
    /// Bytes of these.
    pub evicted_bytes: u64,
    /// Bytes given back by [`Manager::shrink`].
    pub shrunk_bytes: u64,
    /// Objects made valid again in the background, see [`Userptr::keep_ready`].
    pub restored: u64,
    /// Tries of that which failed.
    pub restore_failures: u64,
    /// Invalidations by [`Manager::inject_invalidate`].
    pub injected: u64,
    /// Dma-bufs made of objects.
    pub dmabufs_exported: u64,
    /// Imports of objects over dma-bufs.
    pub dmabufs_imported: u64,
    /// What the process-wide tracking has seen.
    pub space: SpaceStats,
}

impl<D: Device> Clone for Manager<D> {
    fn clone(&self) -> Self {
        Self { owner: Arc::clone(&self.owner) }
    }
}

impl<D: Device> fmt::Debug for Manager<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Manager").field(&self.stats()).finish()
    }
}

/// Several managers of one process share its setting, not its socket.
fn listen<D: Device>(path: &Path, owner: &Arc<Owner<D>>) -> Result<share::Server, share::ListenError> {
    let mut result = share::Server::listen(path, Arc::downgrade(owner));
    for number in 2..=9 {
        if !matches!(result, Err(share::ListenError::InUse(_))) {
            break;
        }
        let mut next = path.as_os_str().to_owned();
        next.push(format!(".{number}"));
        result = share::Server::listen(Path::new(&next), Arc::downgrade(owner));
    }
    result
}

impl<D: Device> share::Source for Owner<D> {
    fn watch_list(&self) -> &WatchList {
        &self.engine.notes
    }

    fn present(&self, put: &mut dyn FnMut(Record)) {
        for handle in self.handles() {
            put(self.engine.present(&handle.object));
        }
        put(self.engine.work.present());
    }
}

impl<D: Device> Owner<D> {
    /// A handle of every object that has one. Made inside the visit and used outside, where everything is allowed.
    fn handles(&self) -> Vec<Handle<D>> {
        let mut handles = Vec::new();
        self.engine.each_object(|_, target| handles.extend(Object::of(Arc::clone(target)).and_then(Handle::of)));
        handles
    }
}

impl<D: Device> Drop for Owner<D> {
    fn drop(&mut self) {
        if self.engine.space.is_forked() {
            return;
        }
        self.engine.flights.close();
        self.engine.wait_flights(self.engine.config.close_limit);
        for handle in self.handles() {
            handle.object.close();
        }
        self.engine.end();
    }
}
