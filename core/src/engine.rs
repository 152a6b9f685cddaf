//! What all objects of one manager share: device, workers, the address space, the watch list, and the counters.

use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pinfold_invalidate::sync::Event;
use pinfold_invalidate::{Space, Target};
use pinfold_workqueue::{Flags, Job, Queue};

use crate::flights::Flights;
use crate::object::Object;
use crate::reaper::Graveyard;
use crate::room::Victims;
use crate::watch::WatchList;
use crate::work::WorkNotes;
use crate::{Config, Device, DeviceError, Error};

/// Name of the work queue, as threads show it: at most 15 bytes.
const QUEUE: &str = "userptr-acquire";
/// Most acquisitions at a time. Each may sleep in the kernel, so this is also the most threads.
const MAX_ACTIVE: u32 = 64;

pub(crate) struct Engine<D: Device> {
    /// `None` only while a forked child's copy is being thrown away.
    device: Option<D>,
    pub(crate) space: Arc<Space>,
    /// Ended by the manager's drop; work that comes later runs where it is asked for.
    queue: Mutex<Option<Queue>>,
    pub(crate) notes: Arc<WatchList>,
    /// What is told of the queue's work.
    pub(crate) work: Arc<WorkNotes>,
    pub(crate) config: Config,
    pub(crate) counters: Counters,
    /// Imports that exist, and their bytes.
    pub(crate) pins: Level,
    /// Bytes that these lock.
    pub(crate) locked: Level,
    /// How many imports have been given back. Who is short can tell that there is room again.
    pub(crate) returned: AtomicU64,
    /// Objects that are not closed.
    pub(crate) objects: Level,
    /// Submits under way, and whether the manager is closing.
    pub(crate) flights: Flights,
    /// Threads that have taken a stale pin out of its slot, or what is dead out of the graveyard, and not yet let go of it; restores under
    /// way; and who still builds for an acquisition that is over.
    pub(crate) loose: Level,
    /// Acquisitions under way that somebody has asked for and that found no room at first. Until they end: what a device has room for shows only when it
    /// imports.
    pub(crate) short: Level,
    pub(crate) graveyard: Graveyard<D>,
    pub(crate) victims: Victims<D>,
    /// Every so manieth submit is spoilt, if this is not 0.
    pub(crate) inject: AtomicU32,
    /// Set once, when the device has said so.
    lost: AtomicBool,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) acquires: AtomicU64,
    pub(crate) inline: AtomicU64,
    pub(crate) queued: AtomicU64,
    pub(crate) imports: AtomicU64,
    pub(crate) retries: AtomicU64,
    pub(crate) second_looks: AtomicU64,
    pub(crate) faults: AtomicU64,
    pub(crate) stale: AtomicU64,
    pub(crate) invalidated: AtomicU64,
    pub(crate) late: AtomicU64,
    pub(crate) evicted: AtomicU64,
    pub(crate) evicted_bytes: AtomicU64,
    pub(crate) shrunk_bytes: AtomicU64,
    pub(crate) restored: AtomicU64,
    pub(crate) restore_failures: AtomicU64,
    pub(crate) injected: AtomicU64,
    /// Submits since the first that was to be injected.
    pub(crate) tries: AtomicU64,
    pub(crate) dmabufs_exported: AtomicU64,
    pub(crate) dmabufs_imported: AtomicU64,
}

/// A count (and a sum of bytes) that can be waited for to become nothing.
#[derive(Debug, Default)]
pub(crate) struct Level {
    count: AtomicU64,
    bytes: AtomicU64,
    fell: Event,
}

impl Level {
    pub(crate) fn add(&self, bytes: u64) {
        if bytes > 0 {
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    /// Adds unless the bytes would exceed `most`; `Err` has what is left.
    pub(crate) fn try_add(&self, bytes: u64, most: u64) -> Result<(), u64> {
        let fits = |now: u64| now.checked_add(bytes).filter(|&sum| sum <= most);
        match self.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits) {
            Ok(_) => _ = self.count.fetch_add(1, Ordering::Relaxed),
            Err(now) => return Err(most.saturating_sub(now)),
        }
        Ok(())
    }

    pub(crate) fn sub(&self, bytes: u64) {
        if bytes > 0 {
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
        // Release: pairs with the Acquire in `wait_none`; who sees nothing left sees what the last one did.
        if self.count.fetch_sub(1, Ordering::Release) == 1 {
            self.fell.bump();
        }
    }

    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// False if something is left at the deadline.
    pub(crate) fn wait_none(&self, deadline: Instant) -> bool {
        loop {
            let seen = self.fell.value();
            if self.count.load(Ordering::Acquire) == 0 {
                return true;
            }
            if !self.fell.wait(seen, Some(deadline)) {
                return self.count.load(Ordering::Acquire) == 0;
            }
        }
    }
}

/// One thing more on a [`Level`], until dropped.
pub(crate) struct On<D: Device>(Arc<Engine<D>>, fn(&Engine<D>) -> &Level);

impl<D: Device> On<D> {
    pub(crate) fn loose(engine: &Arc<Engine<D>>) -> Self {
        Self::new(engine, |engine| &engine.loose)
    }

    pub(crate) fn short(engine: &Arc<Engine<D>>) -> Self {
        Self::new(engine, |engine| &engine.short)
    }

    fn new(engine: &Arc<Engine<D>>, level: fn(&Engine<D>) -> &Level) -> Self {
        level(engine).add(0);
        Self(Arc::clone(engine), level)
    }
}

impl<D: Device> Drop for On<D> {
    fn drop(&mut self) {
        (self.1)(&self.0).sub(0);
    }
}

impl<D: Device> Engine<D> {
    pub(crate) fn new(device: D, config: Config) -> Result<Self, Error> {
        let space = Space::get(config.deadline)?;
        let queue = Queue::new(QUEUE, Flags::HIGHPRI | Flags::UNBOUND | Flags::MAY_SLEEP, MAX_ACTIVE);
        let queue = queue.map_err(|error| Error::Pool(Arc::new(error)))?;
        let notes = Arc::new(WatchList::new());
        Ok(Self {
            device: Some(device),
            space,
            queue: Mutex::new(Some(queue)),
            work: WorkNotes::new(Arc::clone(&notes)),
            notes,
            inject: AtomicU32::new(config.inject_invalidate),
            config,
            counters: Counters::default(),
            pins: Level::default(),
            locked: Level::default(),
            returned: AtomicU64::new(0),
            objects: Level::default(),
            flights: Flights::default(),
            loose: Level::default(),
            short: Level::default(),
            graveyard: Graveyard::default(),
            victims: Victims::default(),
            lost: AtomicBool::new(false),
        })
    }

    pub(crate) fn device(&self) -> &D {
        self.device.as_ref().expect("the device is there until the engine is dropped")
    }

    /// The group of this manager's objects: a number that no other manager alive has.
    pub(crate) fn group(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    /// What every call asks first.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.space.is_forked() {
            return Err(Error::Forked);
        }
        if self.flights.is_closing() {
            return Err(Error::Closed);
        }
        if self.is_lost() { Err(DeviceError::Lost.into()) } else { Ok(()) }
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// The device is lost: from now on every call says so, and what it had is given back, by a worker.
    pub(crate) fn lose(self: &Arc<Self>) {
        if self.lost.swap(true, Ordering::Relaxed) {
            return;
        }
        fence(Ordering::SeqCst); // between our store to `lost` and our look at the words; partner: whoever has published
        let engine = Arc::clone(self);
        self.spawn_unordered(move |_| engine.each_object(|object, _| object.give_up()));
    }

    /// The longest anybody waits for a closed gate: two hold-offs.
    pub(crate) fn patience(&self) -> Duration {
        2 * self.space.deadline()
    }

    /// Shows every object that is not yet finished, also as the address space's index has it.
    pub(crate) fn each_object(&self, mut visit: impl FnMut(&Object<D>, &Arc<dyn Target>)) {
        self.space.for_each(|target| {
            let any: &dyn Any = &**target;
            if let Some(object) = any.downcast_ref::<Object<D>>().filter(|object| object.is_of(self)) {
                visit(object, target);
            }
        });
    }

    /// Runs `work` on a worker, after earlier work with the same key, which is an object's id. `work` is told whether it was cancelled instead, and is called in any case.
    pub(crate) fn spawn(&self, key: u64, work: impl FnOnce(bool) + Send + 'static) {
        self.submit(key, work, |job| job.key(key));
    }

    /// As [`spawn`](Self::spawn), in no order.
    pub(crate) fn spawn_unordered(&self, work: impl FnOnce(bool) + Send + 'static) {
        self.submit(0, work, |job| job);
    }

    /// As [`spawn_unordered`](Self::spawn_unordered), not before `delay` has passed.
    pub(crate) fn spawn_after(&self, delay: Duration, work: impl FnOnce(bool) + Send + 'static) {
        self.submit(0, work, |job| job.after(delay));
    }

    fn submit(&self, object: u64, work: impl FnOnce(bool) + Send + 'static, with: impl FnOnce(Job) -> Job) {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match queue {
            Some(queue) => {
                let noted = self.work.queued(object);
                // A refused job has been called as cancelled: nothing is lost.
                _ = queue.submit(with(Job::new(move |context| noted.run(context.cancelled(), work))));
            }
            None => work(true),
        }
    }

    /// Waits for what is under way. For the manager's drop.
    pub(crate) fn wait_flights(&self, limit: Duration) {
        if !self.flights.wait_none(Instant::now() + limit) {
            // Signals that never come: the device is asked instead, and retires them. Whatever it answers, there is nothing else to wait for.
            let _ = self.device().wait_idle(limit);
            self.flights.wait_none(Instant::now() + limit);
        }
    }

    /// Does what is queued and ends the workers, then the device's own threads. For the manager's drop.
    pub(crate) fn end(&self) {
        // Out of the lock first: the queue waits for work that may itself ask for more.
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(queue);
        // The settle thread releases by itself what it takes out now.
        self.loose.wait_none(Instant::now() + self.config.close_limit);
        self.reap(usize::MAX);
        self.device().shut_down();
    }
}

impl<D: Device> Drop for Engine<D> {
    fn drop(&mut self) {
        if self.space.is_forked() {
            // Device and workers are the parent's; the child's copies must not be touched, not even to free them.
            std::mem::forget(self.device.take());
            std::mem::forget(self.queue.get_mut().unwrap_or_else(PoisonError::into_inner).take());
        }
    }
}
