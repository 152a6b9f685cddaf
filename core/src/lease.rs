//! What an engine holds: a lease of objects that were valid together, and work that uses them.

use std::future::Future;
use std::ops::{Deref, Range};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin as StdPin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use pinfold_invalidate::sync::Event;
use pinfold_invalidate::{Cause, Coverage, HostRange, in_bracket, still_watched};

use crate::engine::Engine;
use crate::error::SubmitError;
use crate::notes::What;
use crate::object::{Handle, Pin};
use crate::protocol::{self, Refusal, Uses};
use crate::state::Snapshot;
use crate::ticket::Retire;
use crate::{Access, Device, DeviceError, Error, Generation, Outcome, Path, Ticket};

/// Objects that were all valid when it was taken. Keeps what it names alive; does not keep it valid: [`submit`](Self::submit) checks that.
pub struct Lease<D: Device> {
    held: Vec<Held<D>>,
    /// What few leases have.
    extra: Option<Box<Extra>>,
}

/// One object of a lease. Field order: the pages are let go of before the object.
struct Held<D: Device> {
    pin: Arc<Pin<D>>,
    noted: Snapshot,
    handle: Handle<D>,
}

/// What was said of some objects of a lease, each with the object's index.
#[derive(Default)]
struct Extra {
    /// Bytes of the object that the work will write.
    written: Vec<(usize, Range<usize>)>,
    /// The device's mark of the uploads that the work has recorded.
    recorded: Vec<(usize, u64)>,
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
        Self { held: Vec::with_capacity(objects), extra: None }
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

    /// Puts the objects of `other` behind those of this lease, for one submit of several subsystems.
    pub fn merge(&mut self, other: Self) {
        if let Some(others) = other.extra {
            let (first, extra) = (self.held.len(), self.extra.get_or_insert_default());
            extra.written.extend(others.written.into_iter().map(|(index, part)| (first + index, part)));
            extra.recorded.extend(others.recorded.into_iter().map(|(index, mark)| (first + index, mark)));
        }
        self.held.extend(other.held);
    }

    /// Submits work that uses the objects: `submit` hands it to the device, and `signals` say when it is over.
    ///
    /// From the moment the objects have been checked until the signals come, a mutation of their memory is held off (up to the deadline).
    /// Waits, at most for two hold-offs, while memory in the same shards is changing hands. A submit that an earlier one waits for can't be made
    /// while that one is held off: put such submits into one, with their leases merged.
    ///
    /// A panic of the closure counts as submitted: the work is retired by its signals, and unwinding goes on.
    ///
    /// # Errors
    /// [`SubmitError::Stale`] and the others; nothing has been submitted then.
    ///
    /// # Safety
    /// 1. Each signal comes after all device accesses of the submitted work to the objects, and it comes (or the device is lost).
    /// 2. The work accesses the objects only through the views of this lease, and only for reading where the object was registered so.
    /// 3. Where the device writes, no Rust reference to the bytes exists until the returned [`Pending`] is over.
    pub unsafe fn submit<E>(
        mut self,
        signals: impl IntoIterator<Item: Into<D::Signal>>,
        submit: impl FnOnce() -> Result<(), E>,
    ) -> Result<Pending<D>, SubmitError<D, E>> {
        let Some(engine) = self.held.first().map(|held| Arc::clone(&held.handle.object.engine)) else {
            return self.submit_nothing(submit);
        };
        // Counted first: the manager's end either waits for this submit, or is seen by it.
        let underway = Underway::begin(engine);
        let engine = underway.engine();
        engine.check().map_err(SubmitError::Gone)?;
        if in_bracket() {
            return Err(SubmitError::Gone(Error::Nested));
        }
        self.inject(engine);
        // Before the uses begin, so that a hold-off that gives up on them knows whose they are.
        self.held.iter_mut().for_each(|held| held.handle.begin_submit());
        let uses = match self.reserve(engine) {
            Ok(uses) => uses,
            Err(None) => {
                self.refuse();
                return Err(SubmitError::Again(self));
            }
            Err(Some(index)) => {
                self.refuse();
                let object = &self.held[index].handle.object;
                engine.counters.stale.fetch_add(1, Ordering::Relaxed);
                return Err(SubmitError::Stale { index, range: object.range });
            }
        };
        let writes = self.extra.as_ref().map(|extra| Writes::expect(&self.held, &extra.written));
        // Only now: no driver call inside the gates.
        let result = catch_unwind(AssertUnwindSafe(submit));
        if let Ok(Err(error)) = result {
            writes.inspect(|writes| writes.forget(engine));
            uses.end(&*engine.space);
            self.refuse();
            return Err(SubmitError::Rejected { error, lease: self });
        }
        // After a panic nobody knows, and what is recorded once more does no harm.
        if result.is_ok()
            && let Some(extra) = &self.extra
        {
            for &(index, mark) in &extra.recorded {
                engine.device().uploaded(self.held[index].pin.import(), mark);
            }
        }
        let pending = Flight::launch(underway, self.held, uses, writes, signals);
        match result {
            Ok(_) => Ok(pending),
            Err(panic) => resume_unwind(panic),
        }
    }

    fn refuse(&mut self) {
        self.held.iter_mut().for_each(|held| held.handle.refuse_submit());
    }

    /// Invalidates one object of every so manieth submit, each in its turn, if the engine's tests ask for that.
    fn inject(&self, engine: &Engine<D>) {
        let every = u64::from(engine.inject.load(Ordering::Relaxed));
        if every == 0 {
            return;
        }
        let number = engine.counters.tries.fetch_add(1, Ordering::Relaxed) + 1;
        if number.is_multiple_of(every) {
            let object = &self.held[(number / every) as usize % self.held.len()].handle.object;
            engine.counters.injected.fetch_add(1, Ordering::Relaxed);
            // Refused in a bracket or a forked child only, and the submit is neither.
            let _ = engine.space.invalidate(object.range, Cause::Injected);
        }
    }

    /// `Err(Some(index))`: that object is stale. `Err(None)`: a gate stayed closed.
    fn reserve(&self, engine: &Engine<D>) -> Result<Uses, Option<usize>> {
        let mut deadline = None;
        let leases = self.held.iter().map(|held| (&held.handle.object.word, held.noted, held.handle.object.range));
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

    fn submit_nothing<E>(self, submit: impl FnOnce() -> Result<(), E>) -> Result<Pending<D>, SubmitError<D, E>> {
        match submit() {
            Ok(()) => Ok(Pending { flight: None }),
            Err(error) => Err(SubmitError::Rejected { error, lease: self }),
        }
    }
}

impl<D: Device> std::fmt::Debug for Lease<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.held.iter().map(|held| (held.handle.object.range, held.noted.generation))).finish()
    }
}

/// What the work of one submit writes to mirrors, to be brought back when it is over.
struct Writes<D: Device>(Vec<Write<D>>);

struct Write<D: Device> {
    pin: Arc<Pin<D>>,
    noted: Snapshot,
    handle: Handle<D>,
    written: Vec<Range<usize>>,
    /// A mapping that takes the place of this one is not watched, and can be told by that.
    watched: bool,
}

impl<D: Device> Writes<D> {
    fn expect(held: &[Held<D>], written: &[(usize, Range<usize>)]) -> Self {
        let mut written = written.to_vec();
        written.sort_by_key(|&(index, _)| index);
        let of_one = written.chunk_by(|(index, _), (next, _)| index == next);
        let of_one = of_one.map(|parts| (&held[parts[0].0], parts.iter().map(|(_, part)| part.clone()).collect()));
        let to_mirrors = of_one.filter(|(held, _)| matches!(held.pin.path, Path::Mirror(_)));
        let writes: Vec<_> = to_mirrors.map(|(held, written)| Write::of(held, written)).collect();
        for write in &writes {
            write.handle.object.engine.device().expect_writes(write.pin.import(), &write.written);
        }
        Self(writes)
    }

    fn forget(&self, engine: &Engine<D>) {
        self.0.iter().for_each(|write| engine.device().forget_writes(write.pin.import(), &write.written));
    }

    /// While the uses still count, so that a mutator that waits for them can't go on before the results are where they belong.
    fn bring_back(&self, engine: &Engine<D>) -> Result<(), DeviceError> {
        let mut all = Ok(());
        for write in &self.0 {
            all = all.and(write.bring_back(engine)); // every one, and the first error
        }
        all
    }
}

impl<D: Device> Write<D> {
    fn of(held: &Held<D>, written: Vec<Range<usize>>) -> Self {
        let (pin, handle) = (Arc::clone(&held.pin), held.handle.clone());
        let watched = handle.object.slot().coverage == Some(Coverage::Watched);
        Self { pin, noted: held.noted, handle, written, watched }
    }

    fn bring_back(&self, engine: &Engine<D>) -> Result<(), DeviceError> {
        let object = &self.handle.object;
        let is_current = |part: HostRange| {
            object.word.read().generation == self.noted.generation
                && !(self.watched && still_watched(part) == Some(false))
        };
        engine.device().write_back(self.pin.import(), object.range, &self.written, &is_current)
    }
}

/// Work under way.
pub(crate) struct Flight<D: Device> {
    uses: Uses,
    /// Signals that have not come yet, and [`FOLLOWING`] while they are not yet counted.
    left: AtomicU32,
    lost: AtomicBool,
    /// A hold-off has given up on it.
    late: AtomicBool,
    over: Event,
    /// Taken by the last signal, and emptied by retirement. Nothing else happens under the lock. `None`: nothing is to be brought back.
    writes: Option<Mutex<Writes<D>>>,
    /// Why results are not in the program's memory.
    fault: OnceLock<DeviceError>,
    rest: Mutex<Rest<D>>,
    underway: Underway<D>,
}

/// More than any submit has signals: none of them is the last until all are followed.
const FOLLOWING: u32 = 1 << 31;

/// A submit that the manager's end waits for, until it is [over](Self::over), or this is dropped.
struct Underway<D: Device> {
    engine: Arc<Engine<D>>,
    is_over: AtomicBool,
}

impl<D: Device> Underway<D> {
    fn begin(engine: Arc<Engine<D>>) -> Self {
        engine.flights.begin();
        Self { engine, is_over: AtomicBool::new(false) }
    }

    fn engine(&self) -> &Arc<Engine<D>> {
        &self.engine
    }

    /// Called once. Whoever keeps this keeps the engine, and waits for nothing.
    fn over(&self) {
        self.is_over.store(true, Ordering::Relaxed); // read by drop, which has it alone
        self.engine.flights.end();
    }
}

impl<D: Device> Drop for Underway<D> {
    fn drop(&mut self) {
        if !*self.is_over.get_mut() {
            self.over();
        }
    }
}

struct Rest<D: Device> {
    /// What the commands name. Emptied by retirement.
    held: Vec<Held<D>>,
    outcome: Option<Outcome>,
    wakers: Vec<Waker>,
}

impl<D: Device> Flight<D> {
    fn launch(
        underway: Underway<D>,
        held: Vec<Held<D>>,
        uses: Uses,
        writes: Option<Writes<D>>,
        signals: impl IntoIterator<Item: Into<D::Signal>>,
    ) -> Pending<D> {
        let engine = underway.engine();
        if engine.notes.is_watched() {
            held.iter().for_each(|held| engine.note(&held.handle.object, What::Submitted));
        }
        engine.counters.submits.fetch_add(1, Ordering::Relaxed);
        let rest = Rest { held, outcome: None, wakers: Vec::new() };
        let flight = Arc::new(Self {
            uses,
            left: AtomicU32::new(FOLLOWING),
            lost: AtomicBool::new(false),
            late: AtomicBool::new(false),
            over: Event::new(),
            writes: writes.filter(|writes| !writes.0.is_empty()).map(Mutex::new),
            fault: OnceLock::new(),
            rest: Mutex::new(rest),
            underway,
        });
        let mut count = 0;
        for signal in signals {
            count += 1;
            flight.engine().device().follow(signal.into(), Ticket::new(Arc::clone(&flight) as Arc<dyn Retire>));
        }
        if flight.signal(FOLLOWING - count) {
            flight.finish();
        }
        Pending { flight: Some(flight) }
    }

    fn engine(&self) -> &Arc<Engine<D>> {
        self.underway.engine()
    }

    fn writes(&self) -> Option<MutexGuard<'_, Writes<D>>> {
        self.writes.as_ref().map(|writes| writes.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn outcome(&self) -> Option<Outcome> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner).outcome
    }

    /// So many signals have come; true if the last was among them. Ends the uses then.
    fn signal(&self, count: u32) -> bool {
        // AcqRel: the last signal sees what the others left.
        if self.left.fetch_sub(count, Ordering::AcqRel) != count {
            return false;
        }
        if !self.lost.load(Ordering::Relaxed)
            && let Some(writes) = self.writes()
            && let Err(fault) = writes.bring_back(self.engine())
        {
            let _ = self.fault.set(fault); // nobody else sets it
        }
        self.late.store(self.uses.end(&*self.engine().space), Ordering::Relaxed);
        true
    }
}

impl<D: Device> Retire for Flight<D> {
    fn signal_one(&self, outcome: Outcome) -> bool {
        if outcome == Outcome::Lost {
            self.lost.store(true, Ordering::Relaxed);
        }
        self.signal(1)
    }

    fn finish(&self) {
        let outcome = if self.lost.load(Ordering::Relaxed) { Outcome::Lost } else { Outcome::Done };
        let (held, wakers) = {
            let mut rest = self.rest.lock().unwrap_or_else(PoisonError::into_inner);
            rest.outcome = Some(outcome);
            (std::mem::take(&mut rest.held), std::mem::take(&mut rest.wakers))
        };
        let writes = self.writes().map(|mut writes| Writes(std::mem::take(&mut writes.0)));
        if let Some(writes) = writes {
            writes.forget(self.engine());
        }
        let (late, now) = (self.late.load(Ordering::Relaxed), self.engine().counters.acquires.load(Ordering::Relaxed));
        for held in held {
            let object = &held.handle.object;
            if late {
                // The monitor may be about to say so, and must not find the object idle instead.
                object.holds.end_late(held.noted.generation);
            }
            // Mostly nobody has acquired anything since, and a look is cheaper.
            if object.last_used.load(Ordering::Relaxed) < now {
                object.last_used.fetch_max(now, Ordering::Relaxed);
            }
            drop(held); // the handle counts the submit until then
        }
        self.underway.over();
        self.over.bump();
        wakers.into_iter().for_each(Waker::wake);
        if outcome == Outcome::Lost && self.engine().device().is_lost() {
            self.engine().lose();
        }
    }
}

/// Work that has been submitted. Dropping it waits for nothing; the objects are kept until the work is over in any case.
pub struct Pending<D: Device> {
    flight: Option<Arc<Flight<D>>>,
}

impl<D: Device> Pending<D> {
    /// How the work ended; `None` while it runs.
    #[must_use]
    pub fn poll(&self) -> Option<Outcome> {
        self.flight.as_ref().map_or(Some(Outcome::Done), |flight| flight.outcome())
    }

    /// Why not all that was [declared](Lease::declare_written) is in the program's memory, although the work is over: the memory changed hands
    /// meanwhile. `None` while the work runs, and if all is well.
    #[must_use]
    pub fn fault(&self) -> Option<&DeviceError> {
        self.flight.as_ref()?.fault.get()
    }

    /// Waits until the work is over. `None`: not within `limit`.
    ///
    /// What the device wrote is visible to the program if the work ended with a barrier to the host (`VK_ACCESS_HOST_READ_BIT`).
    #[must_use]
    pub fn wait(&self, limit: Duration) -> Option<Outcome> {
        let deadline = Instant::now() + limit;
        let Some(flight) = &self.flight else { return Some(Outcome::Done) };
        loop {
            let seen = flight.over.value();
            if let Some(outcome) = flight.outcome() {
                return Some(outcome);
            }
            if !flight.over.wait(seen, Some(deadline)) {
                return flight.outcome();
            }
        }
    }
}

impl<D: Device> Future for Pending<D> {
    type Output = Outcome;

    fn poll(self: StdPin<&mut Self>, context: &mut Context<'_>) -> Poll<Outcome> {
        let Some(flight) = &self.flight else { return Poll::Ready(Outcome::Done) };
        let mut rest = flight.rest.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(outcome) = rest.outcome {
            return Poll::Ready(outcome);
        }
        if !rest.wakers.iter().any(|waker| waker.will_wake(context.waker())) {
            rest.wakers.push(context.waker().clone());
        }
        Poll::Pending
    }
}

impl<D: Device> std::fmt::Debug for Pending<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pending").field("outcome", &Self::poll(self)).finish()
    }
}
