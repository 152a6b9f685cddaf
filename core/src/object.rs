//! One registered range: its word, its slot, and what happens to it from outside.

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use pinfold_invalidate::sync::Futex;
use pinfold_invalidate::{Cause, Change, Coverage, HostRange, Shards, Target};

use crate::discard::Discarded;
use crate::engine::Engine;
use crate::notes::What;
use crate::state::{Snapshot, State, Step, Word};
use crate::{Access, Device, Error, Generation, Path, Policy, Use};

/// A range with a state. Held by its handles (through [`Handle`]) and, until it is closed, by the address space's index.
pub(crate) struct Object<D: Device> {
    pub(crate) id: u64,
    pub(crate) range: HostRange,
    pub(crate) access: Access,
    pub(crate) label: Box<str>,
    /// The caller has promised to tell us of every mutation.
    pub(crate) unwatched: bool,
    /// A [`Policy`]. Written by the handle.
    pub(crate) policy: AtomicU8,
    /// How often its pages were taken, and how many leases it has been part of: figures for the device's choice.
    pub(crate) imports: AtomicU64,
    pub(crate) leases: AtomicU64,
    pub(crate) word: Word,
    /// Submits under way. Written by submit and retirement; for reports only, the protocol counts by shard.
    pub(crate) inflight: AtomicU32,
    /// One more than the generation of the last work that ended after a hold-off had given up on it. Written by retirement.
    pub(crate) ended_late: AtomicU64,
    /// Pages that were discarded since the last acquisition.
    pub(crate) discarded: Discarded,
    /// Changes when an acquisition has ended, however it did.
    pub(crate) ended: Futex,
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
    pub(crate) coverage: Option<Coverage>,
    pub(crate) fault: Option<Fault>,
    pub(crate) wakers: Vec<Waker>,
}

/// The end of a failed acquisition.
pub(crate) struct Fault {
    pub(crate) error: Error,
    /// The token of the acquisition; who has waited for it or an earlier one is told.
    pub(crate) token: u64,
    /// Somebody who only asks has been told.
    pub(crate) told: bool,
}

/// Pages that a device has.
pub(crate) struct Pin<D: Device> {
    /// Taken out by drop only.
    import: Option<D::Import>,
    pub(crate) generation: Generation,
    pub(crate) path: Path,
    bytes: u64,
    engine: Arc<Engine<D>>,
}

/// What keeps an object open: engine handles, leases, and work under way.
pub(crate) struct Handle<D: Device> {
    pub(crate) object: Arc<Object<D>>,
}

impl<D: Device> Object<D> {
    pub(crate) fn new(id: u64, range: HostRange, access: Access, label: Box<str>, engine: Arc<Engine<D>>) -> Self {
        let slot = Slot { pin: None, token: 0, coverage: None, fault: None, wakers: Vec::new() };
        Self {
            id,
            range,
            access,
            label,
            unwatched: false,
            policy: AtomicU8::new(Policy::Auto as u8),
            imports: AtomicU64::new(0),
            leases: AtomicU64::new(0),
            word: Word::default(),
            inflight: AtomicU32::new(0),
            ended_late: AtomicU64::new(0),
            discarded: Discarded::new(),
            ended: Futex::new(),
            slot: Mutex::new(slot),
            engine,
        }
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

    /// Ends the object: from now on every lease of it is stale. Runs once; the rest is a worker's, behind an acquisition that is under way.
    pub(crate) fn close(self: &Arc<Self>) {
        let before = {
            let mut slot = self.slot();
            slot.token += 1;
            self.word.take_back(Step::Close)
        };
        if before.state == State::Closed {
            return;
        }
        self.wake();
        self.engine.note(self, What::Closed);
        let object = Arc::clone(self);
        self.engine.spawn(self.id, move |_| object.finish());
    }

    /// Gives the pages back, then ends the watch, so that no change in between goes unnoticed.
    pub(crate) fn finish(&self) {
        let pin = self.slot().pin.take();
        if let Some(pin) = pin.and_then(Arc::into_inner) {
            pin.release();
        }
        self.engine.space.remove(self.range, self.id);
        self.engine.notes.remove_object(self.id);
        self.engine.device().unregistered(self.range);
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
    }

    fn shards(&self) -> Shards {
        self.word.read().shards
    }

    fn group(&self) -> usize {
        if self.unwatched || self.policy() == Policy::Mirror { 0 } else { self.engine.group() }
    }
}

impl<D: Device> Pin<D> {
    /// `bytes` have been counted in `engine.pins` already, and are taken off when the import is released.
    pub(crate) fn new(import: D::Import, generation: Generation, bytes: u64, engine: Arc<Engine<D>>) -> Self {
        engine.counters.imports.fetch_add(1, Ordering::Relaxed);
        let path = engine.device().path(&import);
        Self { import: Some(import), generation, path, bytes, engine }
    }

    pub(crate) fn import(&self) -> &D::Import {
        self.import.as_ref().expect("a pin has its import until it is dropped")
    }

    /// Gives the pages back on this thread, which must be one that may call the device.
    pub(crate) fn release(mut self) {
        self.give_back();
    }

    fn give_back(&mut self) {
        if let Some(import) = self.import.take() {
            self.engine.device().release(import);
            self.engine.pins.sub(self.bytes);
        }
    }
}

impl<D: Device> Drop for Pin<D> {
    fn drop(&mut self) {
        let Some(import) = self.import.take() else { return };
        if self.engine.space.is_forked() {
            std::mem::forget(import); // the device is the parent's
            return;
        }
        // The last lease or the last retirement may end anywhere, also where the driver must not be called.
        let pin = Self { import: Some(import), engine: Arc::clone(&self.engine), ..*self };
        self.engine.spawn_unordered(move |_| pin.release());
    }
}

impl<D: Device> Drop for Handle<D> {
    fn drop(&mut self) {
        if !self.object.engine.space.is_forked() {
            self.object.close();
        }
    }
}
