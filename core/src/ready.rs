//! Making objects ready for a lease: all or none, on this thread where that is quick, by a worker where it is not.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Instant;

use pinfold_invalidate::{Handful, in_bracket, mappings};

use crate::notes::What;
use crate::object::Object;
use crate::state::{Snapshot, State, Step};
use crate::{Device, Error, Lease, Manager, Path, Userptr, protocol};

/// How many times more bytes a thread takes itself that would only wait meanwhile: 16 MiB by default, which takes as long as some wake-ups.
const PATIENT: usize = 64;

impl<D: Device> Manager<D> {
    /// A lease if all are valid, or can be made so at once. A caller who `waits` had rather take the pages itself than wait for others to, where that
    /// is one object only, and up to a larger limit.
    pub(crate) fn try_acquire(
        &self,
        objects: &[&Userptr<D>],
        since: Option<&mut Since>,
        waits: bool,
    ) -> Result<Lease<D>, Wait> {
        self.ask_for(objects)?;
        let limit = self.engine().config.inline_limit;
        let alone = if waits { limit.saturating_mul(PATIENT) } else { limit };
        let mut lease = Lease::with_capacity(objects.len());
        let mut wait = None;
        let since = since.map(|since| since.for_objects(objects));
        for (index, userptr) in objects.iter().enumerate() {
            let object = &userptr.handle.object;
            let first = since.as_ref().map_or(u64::MAX, |since| since[index]);
            let seen = object.ended.value(); // before the look: an end that comes after it is noticed
            // Several go to workers, who take them side by side.
            let is_ready = |other: &&Userptr<D>| other.handle.object.word.read().state == State::Valid;
            let here = || if wait.is_none() && objects[index + 1..].iter().all(is_ready) { alone } else { limit };
            match object.ready(first, here, waits)? {
                Some((noted, pin)) => lease.add(userptr.handle.clone(), noted, pin),
                None => wait = wait.or(Some((index, seen))), // the others begin all the same
            }
        }
        match wait {
            None => Ok(lease),
            object => Err(Wait { error: Error::Again, object }),
        }
    }

    /// What every acquire begins with.
    fn ask_for(&self, objects: &[&Userptr<D>]) -> Result<(), Error> {
        let engine = self.engine();
        engine.check()?;
        if in_bracket() {
            return Err(Error::Nested);
        }
        let number = engine.counters.acquires.fetch_add(1, Ordering::Relaxed) + 1;
        for object in objects.iter().map(|userptr| &userptr.handle.object) {
            if !object.is_of(engine) {
                return Err(Error::Foreign);
            }
            // All before any is built: none of them makes room for another.
            object.last_used.fetch_max(number, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Lets workers begin with all that is not valid.
    pub(crate) fn begin_all(&self, objects: &[&Userptr<D>]) -> Result<(), Error> {
        self.ask_for(objects)?;
        for object in objects.iter().map(|userptr| &userptr.handle.object) {
            // A hint: no look through the gates is needed, as nothing is believed but that it isn't valid.
            let seen = object.word.read();
            match seen.state {
                State::New | State::Invalid | State::Faulted => object.enqueue(seen),
                _ => object.adopt(),
            }
        }
        Ok(())
    }
}

/// Why a try to acquire did not succeed, and on what to sleep.
pub(crate) struct Wait {
    pub(crate) error: Error,
    /// The object whose acquisition has to end first, and the value to sleep on.
    pub(crate) object: Option<(usize, u32)>,
}

impl From<Error> for Wait {
    fn from(error: Error) -> Self {
        Self { error, object: None }
    }
}

/// For each object, the first acquisition a waiter has waited for: a failure of that one or a later one is the waiter's to be told.
#[derive(Default)]
pub(crate) struct Since(Handful<u64>);

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
    /// `first` is the first acquisition the caller waits for; without one (`u64::MAX`) it is told a failure nobody has been told yet. `limit` says
    /// how many bytes are quick.
    #[allow(clippy::type_complexity)]
    fn ready(
        self: &Arc<Self>,
        first: u64,
        limit: impl Fn() -> usize,
        waits: bool,
    ) -> Result<Option<(Snapshot, Arc<crate::object::Pin<D>>)>, Error> {
        let engine = &self.engine;
        // The time is read only where somebody has to wait.
        let mut patience = None;
        let mut patience = || *patience.get_or_insert_with(|| Instant::now() + engine.patience());
        let mut tried_here = false;
        loop {
            let seen =
                protocol::look(&*engine.space, &self.word, self.range, || Some(patience())).ok_or(Error::Again)?;
            match seen.state {
                State::Valid => {
                    if let Some(pin) = self.pin_of(seen) {
                        self.refresh(&pin)?;
                        self.leases.fetch_add(1, Ordering::Relaxed);
                        return Ok(Some((seen, pin)));
                    }
                    // No pin of that generation: the word has moved since we looked. So it goes round at most once for each change.
                    if Instant::now() > patience() {
                        return Err(Error::Again);
                    }
                }
                State::Queued | State::Acquiring => {
                    self.adopt();
                    return Ok(None);
                }
                State::Closed | State::DeadAfterFork => return Err(Error::Closed),
                State::New | State::Invalid | State::Faulted => {
                    // Also an acquisition that was cancelled is told as one that failed. Of a new object none has.
                    if seen.state != State::New
                        && let Some(error) = self.untold_fault(first)
                    {
                        return Err(error);
                    }
                    let may_try = !tried_here && seen.state != State::Faulted;
                    if let Some(effort) = may_try.then(|| self.quick(limit(), waits)).flatten() {
                        tried_here = true;
                        if let Some((noted, token)) = self.begin_acquisition(seen, Step::Claim) {
                            engine.counters.inline.fetch_add(1, Ordering::Relaxed);
                            self.build(noted, token, effort);
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
        if self.word.read().state == State::New {
            return 1; // none has begun yet
        }
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
        let token = slot.next_acquisition(&self.engine);
        slot.is_built = step == Step::Claim;
        Some((noted, token))
    }

    /// Brings a mirror up to date.
    fn refresh(&self, pin: &crate::object::Pin<D>) -> Result<(), Error> {
        if !matches!(pin.path, Path::Mirror(_)) {
            return Ok(());
        }
        let mappings = mappings(self.range)?;
        self.engine.device().refresh(pin.import(), &self.request(&mappings, true)).map_err(|error| {
            if matches!(error, crate::DeviceError::Lost) {
                self.engine.lose();
            }
            error.into()
        })
    }

    /// Takes back an acquisition that is queued or under way.
    pub(crate) fn cancel(&self) -> bool {
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
        slot.next_acquisition(&self.engine);
        self.fail(&mut slot, Error::Cancelled, token);
        drop(slot);
        self.wake();
        true
    }
}

/// The future of [`Manager::acquire_async`].
pub struct Acquire<'a, D: Device> {
    pub(crate) manager: &'a Manager<D>,
    pub(crate) objects: &'a [&'a Userptr<D>],
    pub(crate) since: Since,
}

impl<D: Device> Future for Acquire<'_, D> {
    type Output = Result<Lease<D>, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        loop {
            let wait = match this.manager.try_acquire(this.objects, Some(&mut this.since), false) {
                Err(wait) if wait.error.is_again() => wait,
                done => return Poll::Ready(done.map_err(|wait| wait.error)),
            };
            let Some((index, seen)) = wait.object else {
                // A gate stayed closed for two hold-offs: nobody will tell this task when it opens, so it asks again when others have had a turn.
                context.waker().wake_by_ref();
                return Poll::Pending;
            };
            let object = &this.objects[index].handle.object;
            {
                let mut slot = object.slot();
                if !slot.wakers.iter().any(|waker| waker.will_wake(context.waker())) {
                    slot.wakers.push(context.waker().clone());
                }
            }
            // Whoever ends an acquisition moves `ended` before it takes the wakers: unmoved means that ours is there to be woken.
            if object.ended.value() == seen {
                return Poll::Pending;
            }
        }
    }
}
