//! Work that has been submitted: what it keeps alive, how it ends, and who waits for it.
//!
//! **Problem.** The signals of one submit come from several queues, in any order, on threads that may not allocate: a mutator that holds the
//! allocator's lock may be waiting for them.
//!
//! **Law.** The uses end with the last signal, and what the commands name is let go of behind that.
//!
//! **Protocol.** Each signal takes itself off a count. Whoever takes the last one brings results back and ends the uses; what may free, or tell
//! somebody, is left to [`Retire::finish`], which follows when the mutators have been let go.

use std::future::Future;
use std::pin::Pin as StdPin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use pinfold_invalidate::sync::Event;

use crate::engine::Engine;
use crate::lease::Held;
use crate::notes::What;
use crate::protocol::Uses;
use crate::ticket::Retire;
use crate::writes::Writes;
use crate::{Device, DeviceError, Outcome, Ticket};

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
pub(crate) struct Underway<D: Device> {
    engine: Arc<Engine<D>>,
    is_over: AtomicBool,
}

impl<D: Device> Underway<D> {
    pub(crate) fn begin(engine: Arc<Engine<D>>) -> Self {
        engine.flights.begin();
        Self { engine, is_over: AtomicBool::new(false) }
    }

    pub(crate) fn engine(&self) -> &Arc<Engine<D>> {
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
    pub(crate) fn launch(
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
            writes: writes.filter(|writes| !writes.is_empty()).map(Mutex::new),
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
        let writes = self.writes().map(|mut writes| writes.take());
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
    /// Work that uses nothing, and is over.
    pub(crate) fn of_nothing() -> Self {
        Self { flight: None }
    }

    /// How the work ended; `None` while it runs.
    #[must_use]
    pub fn poll(&self) -> Option<Outcome> {
        self.flight.as_ref().map_or(Some(Outcome::Done), |flight| flight.outcome())
    }

    /// Why not all that was [declared](crate::Lease::declare_written) is in the program's memory, although the work is over: the memory changed hands
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
