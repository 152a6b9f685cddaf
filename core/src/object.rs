//! One registered range: its word, its slot, and what happens to it from outside.

use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use pinfold_invalidate::sync::Event;
use pinfold_invalidate::{Cause, Change, Coverage, HostRange, Shards, Target};

use crate::discard::Discarded;
use crate::dmabuf::Reserved;
use crate::engine::Engine;
use crate::holds::{Hold, Holds};
use crate::notes::What;
use crate::reaper::Dead;
use crate::restore::Hot;
use crate::room::Charge;
use crate::state::{Snapshot, State, Step, Word};
use crate::watch::DmaBufEvent;
use crate::{Access, Device, Error, Generation, Path, Policy, Use};

/// Ids are never used twice in a process.
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// A range with a state. Held by its handles (through [`Handle`]) and, until it is closed, by the address space's index.
pub(crate) struct Object<D: Device> {
    pub(crate) id: u64,
    pub(crate) range: HostRange,
    pub(crate) access: Access,
    pub(crate) label: Box<str>,
    /// The caller has promised to tell us of every mutation. Cleared by an export, whose receivers have promised nothing.
    pub(crate) unwatched: AtomicBool,
    /// The object is a part of another, and the device is to take its pages only.
    pub(crate) part: bool,
    /// The object is one over a dma-buf, and its range only a name.
    pub(crate) dmabuf: Option<Box<Reserved>>,
    /// A [`Policy`]. Written by the handle.
    pub(crate) policy: AtomicU8,
    /// How often its pages were taken, and how many leases it has been part of: figures for the device's choice.
    pub(crate) imports: AtomicU64,
    pub(crate) leases: AtomicU64,
    pub(crate) word: Word,
    /// Handles and work under way. Without a handle the object is closed.
    pub(crate) holds: Holds,
    /// The number of the last acquire that asked for it. Written by those who acquire, read by who makes room.
    pub(crate) last_used: AtomicU64,
    /// The engine wants it kept ready; what that takes is in the slot. Written under the object lock.
    pub(crate) hot: AtomicBool,
    /// Pages that were discarded since the last acquisition.
    pub(crate) discarded: Discarded,
    /// Changes when an acquisition has ended, however it did.
    pub(crate) ended: Event,
    /// Object lock. Never taken by the monitor, never held across a device call.
    slot: Mutex<Slot<D>>,
    pub(crate) engine: Arc<Engine<D>>,
}

/// What an object has, under the object lock.
pub(crate) struct Slot<D: Device> {
    /// What the device has, if anything. Belongs to the generation it says; only that generation's leases may use it.
    pub(crate) pin: Option<Arc<Pin<D>>>,
    /// The acquisition that may build this object. Moves on together with the word's step, when one is begun, cancelled or the object closed.
    pub(crate) token: u64,
    /// Somebody builds for this acquisition, and may have been counted what others lack.
    pub(crate) is_built: bool,
    pub(crate) coverage: Option<Coverage>,
    pub(crate) fault: Option<Fault>,
    pub(crate) wakers: Vec<Waker>,
    pub(crate) hot: Option<Box<Hot>>,
}

impl<D: Device> Slot<D> {
    /// Ends the acquisition that was the object's, and returns the next one's number. Who still builds for it finds out when it comes back from
    /// the kernel or the device; what it gives back then is room for others from now on, so they wait for it.
    pub(crate) fn next_acquisition(&mut self, engine: &Engine<D>) -> u64 {
        if std::mem::take(&mut self.is_built) {
            engine.loose.add(0); // until `Object::stop_building`
        }
        self.token += 1;
        self.token
    }
}

/// The end of a failed acquisition.
pub(crate) struct Fault {
    pub(crate) error: Error,
    /// The token of the acquisition; who has waited for it or an earlier one is told.
    pub(crate) token: u64,
    /// Somebody who only asks has been told.
    pub(crate) told: bool,
}

/// Pages that a device has, as leases share them.
pub(crate) struct Pin<D: Device> {
    /// Taken out by drop only.
    taken: Option<Taken<D>>,
    pub(crate) generation: Generation,
    pub(crate) path: Path,
}

/// Pages that a device has. To be given back on a thread that may call the device.
pub(crate) struct Taken<D: Device> {
    import: D::Import,
    /// Dropped behind the import.
    charge: Charge<D>,
}

/// What keeps an object open: engine handles, leases, and work under way.
pub(crate) struct Handle<D: Device> {
    pub(crate) object: Arc<Object<D>>,
    /// `None` when it has been let go of.
    hold: Option<Hold>,
}

impl<D: Device> Object<D> {
    pub(crate) fn new(range: HostRange, access: Access, label: Box<str>, engine: Arc<Engine<D>>) -> Self {
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let slot =
            Slot { pin: None, token: 0, is_built: false, coverage: None, fault: None, wakers: Vec::new(), hot: None };
        Self {
            id,
            range,
            access,
            label,
            unwatched: AtomicBool::new(false),
            part: false,
            dmabuf: None,
            policy: AtomicU8::new(Policy::Auto as u8),
            imports: AtomicU64::new(0),
            leases: AtomicU64::new(0),
            word: Word::default(),
            holds: Holds::default(),
            last_used: AtomicU64::new(0),
            hot: AtomicBool::new(false),
            discarded: Discarded::new(),
            ended: Event::new(),
            slot: Mutex::new(slot),
            engine,
        }
    }

    pub(crate) fn is_of(&self, engine: &Engine<D>) -> bool {
        std::ptr::eq(&raw const *self.engine, engine)
    }

    pub(crate) fn slot(&self) -> MutexGuard<'_, Slot<D>> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn policy(&self) -> Policy {
        Policy::from_number(self.policy.load(Ordering::Relaxed))
    }

    pub(crate) fn used(&self) -> Use {
        Use { imports: self.imports.load(Ordering::Relaxed), leases: self.leases.load(Ordering::Relaxed) }
    }

    /// The pin of exactly this word, if it is valid and still there.
    pub(crate) fn pin_of(&self, seen: Snapshot) -> Option<Arc<Pin<D>>> {
        let slot = self.slot();
        slot.pin.as_ref().filter(|pin| seen.state == State::Valid && pin.generation == seen.generation).cloned()
    }

    /// Tells everybody who waits that an acquisition has ended.
    pub(crate) fn wake(&self) {
        // In this order: who has pushed a waker and then sees `ended` unmoved is found in the list.
        self.ended.bump();
        let wakers = std::mem::take(&mut self.slot().wakers);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Takes out what belongs to an earlier generation. Dropping the result hands it to a worker.
    pub(crate) fn take_stale_pin(&self) -> Option<Arc<Pin<D>>> {
        let mut slot = self.slot();
        let now = self.word.read();
        let stale = slot.pin.as_ref().is_some_and(|pin| pin.generation != now.generation || now.state == State::Closed);
        if stale { slot.pin.take() } else { None }
    }

    /// The object that the address space's index tells of a change, if it is one of this device.
    pub(crate) fn of(target: Arc<dyn Target>) -> Option<Arc<Self>> {
        let any: Arc<dyn Any + Send + Sync> = target;
        any.downcast().ok()
    }

    /// The device is lost: nothing is valid any more, and the pages are for nobody.
    pub(crate) fn give_up(&self) {
        self.word.take_back(Step::Invalidate);
        drop(self.take_stale_pin());
    }

    /// Ends the object: from now on every lease of it is stale. Runs once; the rest is a worker's, behind an acquisition that is under way.
    pub(crate) fn close(self: &Arc<Self>) {
        let before = {
            let mut slot = self.slot();
            slot.next_acquisition(&self.engine);
            self.word.take_back(Step::Close)
        };
        if before.state == State::Closed {
            return;
        }
        self.wake();
        self.engine.objects.sub(0);
        self.engine.note(self, What::Closed);
        let object = Arc::clone(self);
        if matches!(before.state, State::Queued | State::Acquiring) {
            self.engine.spawn(self.id, move |_| _ = object.finish());
        } else {
            self.engine.bury(Dead::Object(object)); // no acquisition can begin any more
        }
    }

    /// Gives the pages back, then ends the watch, so that no change in between goes unnoticed. Returns the bytes of the pages.
    pub(crate) fn finish(&self) -> u64 {
        let pin = self.slot().pin.take();
        let bytes = pin.and_then(Arc::into_inner).map_or(0, Pin::release);
        if let Some(reserved) = &self.dmabuf {
            self.engine.note_dmabuf(self, DmaBufEvent::Closed, &reserved.part);
        }
        self.engine.space.remove(self.range, self.id);
        self.engine.notes.remove_object(self.id);
        self.engine.device().unregistered(self.range);
        bytes
    }
}

impl<D: Device> Target for Object<D> {
    fn invalidated(&self, change: &Change) {
        let before = self.word.take_back(Step::Invalidate);
        if change.cause == Cause::Remove {
            // Behind a closed gate still, so a builder that notes the new generation sees this, too.
            self.discarded.note(change.range, before.generation.next());
        }
        if before.state == State::Closed {
            return;
        }
        self.engine.counters.invalidated.fetch_add(1, Ordering::Relaxed);
        self.engine.note_change(self, change, before.generation);
    }

    fn settled(self: Arc<Self>) {
        // Counted, so that the manager's end waits for a pin that is in nobody's slot and not yet released.
        self.engine.loose.add(0);
        drop(self.take_stale_pin());
        self.engine.loose.sub(0);
        if self.hot.load(Ordering::Relaxed) {
            self.restore_later();
        }
    }

    fn shards(&self) -> Shards {
        self.word.read().shards
    }

    fn group(&self) -> usize {
        let alone = self.unwatched.load(Ordering::Relaxed) || self.dmabuf.is_some();
        if alone || self.policy() == Policy::Mirror { 0 } else { self.engine.group() }
    }
}

impl<D: Device> Pin<D> {
    pub(crate) fn new(import: D::Import, generation: Generation, charge: Charge<D>) -> Self {
        charge.engine.counters.imports.fetch_add(1, Ordering::Relaxed);
        let path = charge.engine.device().path(&import);
        Self { taken: Some(Taken { import, charge }), generation, path }
    }

    pub(crate) fn import(&self) -> &D::Import {
        &self.taken.as_ref().expect("a pin has its import until it is dropped").import
    }

    pub(crate) fn into_taken(mut self) -> Option<Taken<D>> {
        self.taken.take()
    }

    /// Gives the pages back on this thread, which must be one that may call the device. Returns their bytes.
    pub(crate) fn release(self) -> u64 {
        self.into_taken().map_or(0, Taken::give_back)
    }
}

impl<D: Device> Taken<D> {
    /// Gives the pages back on this thread, which must be one that may call the device. Returns their bytes.
    pub(crate) fn give_back(self) -> u64 {
        self.charge.engine.device().release(self.import);
        self.charge.bytes
    }
}

impl<D: Device> Drop for Pin<D> {
    fn drop(&mut self) {
        let Some(taken) = self.taken.take() else { return };
        if taken.charge.engine.space.is_forked() {
            std::mem::forget(taken); // the device is the parent's
            return;
        }
        // The last lease or the last retirement may end anywhere, also where the driver must not be called.
        let engine = Arc::clone(&taken.charge.engine);
        engine.bury(Dead::Taken(taken));
    }
}

impl<D: Device> Handle<D> {
    /// One more handle; `None` if the last is gone, or the object closed by the manager.
    pub(crate) fn of(object: Arc<Object<D>>) -> Option<Self> {
        object.holds.try_add().then(|| Self { object, hold: Some(Hold::Handle) })
    }

    /// The first handle of a new object.
    pub(crate) fn first(object: Arc<Object<D>>) -> Self {
        object.holds.open();
        Self { object, hold: Some(Hold::Handle) }
    }

    /// Counts a submit as well, until it is [refused](Self::refuse_submit), or is over and this is dropped.
    pub(crate) fn begin_submit(&mut self) {
        self.object.holds.begin_submit();
        self.hold = Some(Hold::Submit);
    }

    /// Takes [`begin_submit`](Self::begin_submit) back.
    pub(crate) fn refuse_submit(&mut self) {
        self.object.holds.refuse_submit();
        self.hold = Some(Hold::Handle);
    }
}

impl<D: Device> Clone for Handle<D> {
    fn clone(&self) -> Self {
        self.object.holds.add();
        Self { object: Arc::clone(&self.object), hold: Some(Hold::Handle) }
    }
}

impl<D: Device> Handle<D> {
    /// What dropping it does, but that the object's memory, and with it the engine's, is still there. Only once, and then nothing keeps the object open.
    pub(crate) fn let_go(&mut self) {
        let Some(hold) = self.hold.take() else { return };
        let left = self.object.holds.let_go(hold);
        if left.retired {
            self.object.engine.note(&self.object, What::Retired);
        }
        if left.nothing && !self.object.engine.space.is_forked() {
            self.object.close();
        }
    }
}

impl<D: Device> Drop for Handle<D> {
    fn drop(&mut self) {
        self.let_go();
    }
}
