//! What an engine holds: a lease of objects that were valid together, and the submit of work that uses them.

use std::ops::{Deref, Range};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use pinfold_invalidate::{Cause, HostRange, in_bracket};
use smallvec::SmallVec;

use crate::error::SubmitError;
use crate::object::{Handle, Pin};
use crate::pending::{Flight, Pending, Underway};
use crate::protocol::{self, Refusal, Uses};
use crate::state::Snapshot;
use crate::writes::Writes;
use crate::{Access, Device, Error, Generation, Path};

/// Objects that were all valid when it was taken. Keeps what it names alive; does not keep it valid: [`submit`](Self::submit) checks that.
pub struct Lease<D: Device> {
    held: Helds<D>,
    /// What few leases have.
    extra: Option<Box<Extra>>,
}

/// The objects of a lease. Many have one, which needs no allocation.
pub(crate) type Helds<D> = SmallVec<[Held<D>; 1]>;

/// One object of a lease. Field order: the pages are let go of before the object.
pub(crate) struct Held<D: Device> {
    pub(crate) pin: Arc<Pin<D>>,
    pub(crate) noted: Snapshot,
    pub(crate) handle: Handle<D>,
}

/// What was said of some objects of a lease, each with the object's index.
#[derive(Default)]
struct Extra {
    /// Bytes of the object that the work will write.
    written: Vec<(usize, Range<usize>)>,
    /// The device's mark of the uploads that the work has recorded.
    recorded: Vec<(usize, u64)>,
    /// Leases of several managers were merged.
    foreign: bool,
}

/// How the device sees one object of a lease. Dereferences to the device's import.
#[derive(Debug)]
pub struct View<'a, D: Device> {
    import: &'a D::Import,
    /// Moves whenever the memory has changed hands; what was derived from an older one (descriptors, addresses) is out of date.
    pub generation: Generation,
    /// The object's range.
    pub range: HostRange,
    /// How its bytes reach the device.
    pub path: Path,
}

impl<D: Device> Deref for View<'_, D> {
    type Target = D::Import;

    fn deref(&self) -> &D::Import {
        self.import
    }
}

impl<D: Device> Lease<D> {
    pub(crate) fn with_capacity(objects: usize) -> Self {
        Self { held: Helds::with_capacity(objects), extra: None }
    }

    pub(crate) fn add(&mut self, handle: Handle<D>, noted: Snapshot, pin: Arc<Pin<D>>) {
        self.held.push(Held { pin, noted, handle });
    }

    /// How many objects it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// How the device sees the object with this index, in the order of the acquire (and of the merges).
    ///
    /// # Panics
    /// If there is no such object.
    #[must_use]
    pub fn view(&self, index: usize) -> View<'_, D> {
        let held = &self.held[index];
        View {
            import: held.pin.import(),
            generation: held.noted.generation,
            range: held.handle.object.range,
            path: held.pin.path,
        }
    }

    /// Whether the object with this index has another import than the one that had generation `since`. For engines that keep descriptors.
    ///
    /// # Panics
    /// If there is no such object.
    #[must_use]
    pub fn changed_since(&self, index: usize, since: Generation) -> bool {
        self.held[index].noted.generation != since
    }

    /// Says that the work to be submitted writes these bytes of the object with this index, counted from the object's start. May be called
    /// several times for several parts.
    ///
    /// Where the device works on a copy ([`Path::Mirror`]), only what is declared here comes back into the program's memory: when the work is
    /// over, and before [`Pending`] says so. Where it works on the program's own pages, this changes nothing.
    ///
    /// # Panics
    /// If there is no such object, or it was registered for reading only, or the bytes aren't inside it.
    pub fn declare_written(&mut self, index: usize, bytes: Range<usize>) {
        let object = &self.held[index].handle.object;
        assert!(object.access == Access::ReadWrite, "an object registered for reading is not written");
        assert!(
            bytes.start <= bytes.end && bytes.end <= object.range.len(),
            "{bytes:?} is not inside {}",
            object.range
        );
        if !bytes.is_empty() {
            self.extra.get_or_insert_default().written.push((index, bytes));
        }
    }

    /// Records into `commands` what makes the device's copies of the objects current, for engines that upload with their own work. Comes before
    /// what reads them, in each submit that does. Does nothing for objects that the device reads where they are, and on devices that upload by
    /// themselves.
    ///
    /// Recorded for the one submit of this lease: other work, or the same commands once more, would bring bytes that are out of date. Where the
    /// submit fails, or never comes, the next lease records what this one did.
    ///
    /// # Safety
    /// 1. `commands` are being recorded, and may have copies recorded into them: for Vulkan, a primary command buffer of the manager's device, outside
    ///    a render pass, that only this thread uses.
    /// 2. They are submitted by [`submit`](Self::submit) of this lease (merged or not), or not at all.
    pub unsafe fn record_uploads(&mut self, commands: D::Commands) {
        let recorded = &mut self.extra.get_or_insert_default().recorded;
        recorded.clear();
        for (index, held) in self.held.iter().enumerate() {
            let device = held.handle.object.engine.device();
            // SAFETY: the contract is the same.
            recorded.push((index, unsafe { device.record_upload(held.pin.import(), commands) }));
        }
    }

    /// Puts the objects of `other` behind those of this lease, for one submit of several subsystems. A lease merged of those of several managers is
    /// refused by [`submit`](Self::submit), as [`Error::Foreign`].
    pub fn merge(&mut self, other: Self) {
        if let (Some(ours), Some(theirs)) = (self.held.first(), other.held.first())
            && !theirs.handle.object.is_of(&ours.handle.object.engine)
        {
            self.extra.get_or_insert_default().foreign = true;
        }
        if let Some(others) = other.extra {
            let (first, extra) = (self.held.len(), self.extra.get_or_insert_default());
            extra.written.extend(others.written.into_iter().map(|(index, part)| (first + index, part)));
            extra.recorded.extend(others.recorded.into_iter().map(|(index, mark)| (first + index, mark)));
            extra.foreign |= others.foreign;
        }
        self.held.extend(other.held);
    }

    /// Submits work that uses the objects: `submit` hands it to the device, and `signals` say when it is over.
    ///
    /// From the moment the objects have been checked until the signals come, a mutation of their memory is held off (up to the deadline).
    /// Waits, at most for two hold-offs, while memory in the same shards is changing hands. A submit that an earlier one waits for can't be made
    /// while that one is held off: put such submits into one, with their leases merged.
    ///
    /// A panic of the closure counts as submitted: the work is retired by its signals, and unwinding goes on. After a panic of `signals` nobody knows
    /// all of them, so the work never ends: what it uses is kept for good, and changes of that wait until the deadline.
    ///
    /// # Errors
    /// [`SubmitError::Stale`] and the others; nothing has been submitted then.
    ///
    /// # Safety
    /// 1. Each signal comes after all device accesses of the submitted work to the objects, and it comes (or the device is lost).
    /// 2. The work accesses the objects only through the views of this lease, and only for reading where the object was registered so.
    /// 3. Where the device writes, no Rust reference to the bytes exists until the returned [`Pending`] is over.
    pub unsafe fn submit<E>(
        self,
        signals: impl IntoIterator<Item: Into<D::Signal>>,
        submit: impl FnOnce() -> Result<(), E>,
    ) -> Result<Pending<D>, SubmitError<D, E>> {
        let Self { held, extra } = self;
        // Counted first: the manager's end either waits for this submit, or is seen by it.
        let Some(mut underway) = Underway::begin(held) else {
            return Self::submit_nothing(extra, submit);
        };
        underway.engine().check().map_err(SubmitError::Gone)?;
        if in_bracket() {
            return Err(SubmitError::Gone(Error::Nested));
        }
        if extra.as_ref().is_some_and(|extra| extra.foreign) {
            return Err(SubmitError::Gone(Error::Foreign));
        }
        underway.inject();
        // Before the uses begin, so that a hold-off that gives up on them knows whose they are.
        underway.held_mut().iter_mut().for_each(|held| held.handle.begin_submit());
        let uses = match underway.reserve() {
            Ok(uses) => uses,
            Err(None) => return Err(SubmitError::Again(Self { held: underway.refuse(), extra })),
            Err(Some(index)) => {
                underway.engine().counters.stale.fetch_add(1, Ordering::Relaxed);
                let range = underway.held()[index].handle.object.range;
                underway.refuse();
                return Err(SubmitError::Stale { index, range });
            }
        };
        let writes = extra.as_ref().map(|extra| Writes::expect(underway.held(), &extra.written));
        // Only now: no driver call inside the gates.
        let result = catch_unwind(AssertUnwindSafe(submit));
        let engine = underway.engine();
        if let Ok(Err(error)) = result {
            writes.inspect(|writes| writes.forget(engine));
            uses.end(&*engine.space);
            return Err(SubmitError::Rejected { error, lease: Self { held: underway.refuse(), extra } });
        }
        // After a panic nobody knows, and what is recorded once more does no harm.
        if result.is_ok()
            && let Some(extra) = &extra
        {
            for &(index, mark) in &extra.recorded {
                engine.device().uploaded(underway.held()[index].pin.import(), mark);
            }
        }
        let pending = Flight::launch(underway, uses, writes, signals);
        match result {
            Ok(_) => Ok(pending),
            Err(panic) => resume_unwind(panic),
        }
    }

    fn submit_nothing<E>(
        extra: Option<Box<Extra>>,
        submit: impl FnOnce() -> Result<(), E>,
    ) -> Result<Pending<D>, SubmitError<D, E>> {
        match submit() {
            Ok(()) => Ok(Pending::of_nothing()),
            Err(error) => Err(SubmitError::Rejected { error, lease: Self { held: Helds::new(), extra } }),
        }
    }
}

impl<D: Device> Underway<D> {
    /// Nothing is submitted after all, and no object is used.
    fn refuse(mut self) -> Helds<D> {
        self.held_mut().iter_mut().for_each(|held| held.handle.refuse_submit());
        self.call_off()
    }

    /// Invalidates one object of every so manieth submit, each in its turn, if the engine's tests ask for that.
    fn inject(&self) {
        let engine = self.engine();
        let every = u64::from(engine.inject.load(Ordering::Relaxed));
        if every == 0 {
            return;
        }
        let number = engine.counters.tries.fetch_add(1, Ordering::Relaxed) + 1;
        if number.is_multiple_of(every) {
            let object = &self.held()[(number / every) as usize % self.held().len()].handle.object;
            engine.counters.injected.fetch_add(1, Ordering::Relaxed);
            // Refused in a bracket or a forked child only, and the submit is neither.
            let _ = engine.space.invalidate(object.range, Cause::Injected);
        }
    }

    /// `Err(Some(index))`: that object is stale. `Err(None)`: a gate stayed closed.
    fn reserve(&self) -> Result<Uses, Option<usize>> {
        let (engine, mut deadline) = (self.engine(), None);
        let leases = self.held().iter().map(|held| (&held.handle.object.word, held.noted, held.handle.object.range));
        loop {
            match protocol::reserve(&*engine.space, leases.clone()) {
                Ok(uses) => return Ok(uses),
                Err(Refusal::Stale(index)) => return Err(Some(index)),
                Err(Refusal::Closed { shard, epoch }) => {
                    let deadline = *deadline.get_or_insert_with(|| Instant::now() + engine.patience());
                    if !engine.space.gate(shard).wait_epoch(epoch, Some(deadline)) {
                        return Err(None);
                    }
                }
            }
        }
    }
}

impl<D: Device> std::fmt::Debug for Lease<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.held.iter().map(|held| (held.handle.object.range, held.noted.generation))).finish()
    }
}
