//! The handle of a registered range.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use pinfold_invalidate::{Cause, Coverage, HostRange, in_bracket};

use crate::notes::What;
use crate::object::{Handle, Object};
use crate::state::{Generation, Snapshot, State};
use crate::{Device, Error, Path, Policy, protocol};

/// A registered range. Cheap to clone; dropping the last clone (and the last lease of it) ends the registration.
pub struct Userptr<D: Device> {
    pub(crate) handle: Handle<D>,
}

impl<D: Device> Userptr<D> {
    /// The first handle of a new object, which from now on is told of changes.
    pub(crate) fn first(object: Object<D>) -> Self {
        let (id, range, object) = (object.id, object.range, Arc::new(object));
        let handle = Handle::first(Arc::clone(&object));
        let engine = &handle.object.engine;
        engine.objects.add(0);
        engine.note(&object, What::Registered);
        engine.space.insert(range, id, object);
        Self { handle }
    }

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
        let patience = || Instant::now() + object.engine.patience();
        protocol::look(&*object.engine.space, &object.word, object.range, || Some(patience())).ok_or(Error::Again)
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

    /// Which way the bytes are to reach the device.
    #[must_use]
    pub fn policy(&self) -> Policy {
        self.handle.object.policy()
    }

    /// Changes the way. An object that goes another way now is invalid from here on, and the next acquire takes the new one.
    ///
    /// # Errors
    /// [`Error::Nested`] inside a bracket, [`Error::Forked`].
    pub fn set_policy(&self, policy: Policy) -> Result<(), Error> {
        let object = &self.handle.object;
        object.policy.store(policy as u8, Ordering::Relaxed);
        let other_way = match (policy, self.path()) {
            // Its builder may have asked for the policy already.
            (_, None) => object.word.read().state == State::Acquiring,
            (Policy::Auto, Some(_)) => false,
            (Policy::Import, Some(path)) => matches!(path, Path::Mirror(_)),
            (Policy::Mirror, Some(path)) => !matches!(path, Path::Mirror(_)),
        };
        if other_way {
            object.engine.space.invalidate(object.range, Cause::Manual)?;
        }
        Ok(())
    }

    /// Submits under way that use the object. One that a mutator was held for may be counted a moment longer than the mutator was held, but not when its
    /// [`Pending`](crate::Pending) is over.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.handle.object.holds.submits()
    }

    /// Wants it kept ready: from now on it is acquired in the background, now and whenever it has been invalidated or evicted, so that the next
    /// acquire need not wait. Begins 1 ms after the invalidation, doubles the pause while there are more, up to 1 s; evicts nobody, and is evicted
    /// after all that isn't kept ready. Memory that can't be acquired is left alone until it changes or is acquired again.
    pub fn keep_ready(&self) {
        if self.handle.object.engine.check().is_ok() {
            self.handle.object.heat();
        }
    }

    /// Takes [`keep_ready`](Self::keep_ready) back.
    pub fn let_rest(&self) {
        if !self.handle.object.engine.space.is_forked() {
            self.handle.object.cool();
        }
    }

    /// Takes back an acquisition that is queued or under way, and tells its waiters [`Error::Cancelled`]. Returns whether there was one.
    #[allow(clippy::must_use_candidate)]
    pub fn cancel(&self) -> bool {
        !self.handle.object.engine.space.is_forked() && self.handle.object.cancel()
    }
}

impl<D: Device> Clone for Userptr<D> {
    fn clone(&self) -> Self {
        Self { handle: self.handle.clone() }
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
