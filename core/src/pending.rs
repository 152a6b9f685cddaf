//! Work that has been submitted: what it keeps alive, how it ends, and who waits for it.
//!
//! **Problem.** The signals of one submit come from several queues, in any order, on threads that may not allocate: a mutator that holds the
//! allocator's lock may be waiting for them.
//!
//! **Law.** The uses end with the last signal, and what the commands name is let go of behind that.
//!
//! **Protocol.** Each signal takes itself off a count. Whoever takes the last one brings results back and ends the uses; what may free, or tell
//! somebody, is left to [`Retire::finish`], which follows when the mutators have been let go.

use std::cell::UnsafeCell;
use std::future::Future;
use std::pin::Pin as StdPin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use crate::ending::Ending;
use crate::engine::Engine;
use crate::lease::{Held, Helds};
use crate::notes::What;
use crate::object::Handle;
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
    ending: Ending,
    /// `None`: nothing is to be brought back.
    writes: Option<Box<Writes<D>>>,
    underway: UntilLast<Underway<D>>,
}

/// More than any submit has signals: none of them is the last until all are followed.
const FOLLOWING: u32 = 1 << 31;

/// What all who hold back the end of a flight may look at, and the last of them takes.
struct UntilLast<T>(UnsafeCell<T>);

// SAFETY: `get` shares the value between threads and `get_mut` hands it to another one, which is what `T` allows.
unsafe impl<T: Send + Sync> Sync for UntilLast<T> {}

impl<T> UntilLast<T> {
    /// # Safety
    /// As long as the reference lives, the caller holds back the end: he is counted in [`Flight::left`].
    unsafe fn get(&self) -> &T {
        // SAFETY: a mutable reference is only made by who has found nobody left to hold back the end.
        unsafe { &*self.0.get() }
    }

    /// # Safety
    /// The caller has taken the last one off [`Flight::left`], or has been handed the end by him, and there is no other reference made by him.
    #[expect(clippy::mut_from_ref, reason = "that there is one only is the contract")]
    unsafe fn get_mut(&self) -> &mut T {
        // SAFETY: those who had references have given them up before they took themselves off the count, and the caller has seen that (AcqRel).
        unsafe { &mut *self.0.get() }
    }
}

/// A submit that the manager's end waits for, and the objects that its commands name. Over when it is dropped, with these let go of before.
///
/// # Invariants
/// `held` is empty only when it is over.
pub(crate) struct Underway<D: Device> {
    held: Helds<D>,
    /// The device has been given the work.
    is_launched: bool,
}

impl<D: Device> Underway<D> {
    /// `None` if there are no objects.
    pub(crate) fn begin(held: Helds<D>) -> Option<Self> {
        held.first()?.handle.object.engine.flights.begin();
        Some(Self { held, is_launched: false })
    }

    /// The manager's. Kept by the objects, so that a submit counts nothing up and down for it.
    #[inline]
    pub(crate) fn engine(&self) -> &Arc<Engine<D>> {
        &self.held[0].handle.object.engine
    }

    pub(crate) fn held(&self) -> &[Held<D>] {
        &self.held
    }

    pub(crate) fn held_mut(&mut self) -> &mut [Held<D>] {
        &mut self.held
    }

    /// Nothing is submitted, and the objects go back to the lease.
    pub(crate) fn call_off(mut self) -> Helds<D> {
        self.engine().flights.refuse();
        std::mem::take(&mut self.held)
    }
}

impl<D: Device> Drop for Underway<D> {
    fn drop(&mut self) {
        if self.held.is_empty() {
            return;
        }
        let Held { pin, handle, .. } = self.held.swap_remove(0);
        let mut over = Over { handle, is_launched: self.is_launched };
        let pin = pin; // so that it goes before `over` if what follows panics: wakers and device code may
        self.held.clear();
        drop(pin);
        over.handle.let_go();
    }
}

/// The end of a submit, when all but its first object has been let go of.
struct Over<D: Device> {
    handle: Handle<D>,
    is_launched: bool,
}

impl<D: Device> Drop for Over<D> {
    fn drop(&mut self) {
        // Behind all that the device may be asked for, and before the engine itself is let go of.
        let flights = &self.handle.object.engine.flights;
        if self.is_launched { flights.end() } else { flights.refuse() }
    }
}

/// Keeps a flight for good if not all of its signals could be followed: nobody knows when the device is done with what it names.
struct KeptIfUnwound<'a, D: Device>(&'a Arc<Flight<D>>);

impl<D: Device> Drop for KeptIfUnwound<'_, D> {
    fn drop(&mut self) {
        std::mem::forget(Arc::clone(self.0));
    }
}

impl<D: Device> Flight<D> {
    pub(crate) fn launch(
        mut underway: Underway<D>,
        uses: Uses,
        writes: Option<Writes<D>>,
        signals: impl IntoIterator<Item: Into<D::Signal>>,
    ) -> Pending<D> {
        underway.is_launched = true;
        let engine = underway.engine();
        if engine.notes.is_watched() {
            underway.held.iter().for_each(|held| engine.note(&held.handle.object, What::Submitted));
        }
        let flight = Arc::new(Self {
            uses,
            left: AtomicU32::new(FOLLOWING),
            lost: AtomicBool::new(false),
            late: AtomicBool::new(false),
            ending: Ending::default(),
            writes: writes.filter(|writes| !writes.is_empty()).map(Box::new),
            underway: UntilLast(UnsafeCell::new(underway)),
        });
        let mut count = 0;
        let kept = KeptIfUnwound(&flight);
        for signal in signals {
            count += 1;
            let ticket = Ticket::new(Arc::clone(&flight) as Arc<dyn Retire>);
            // SAFETY: `FOLLOWING` is taken off behind this loop.
            unsafe { flight.underway.get() }.engine().device().follow(signal.into(), ticket);
        }
        std::mem::forget(kept);
        if flight.signal(FOLLOWING - count) {
            flight.finish();
        }
        Pending { flight: Some(flight) }
    }

    /// So many signals have come; true if the last was among them, and then the caller owes the flight its [`finish`](Retire::finish). Ends the
    /// uses then.
    fn signal(&self, count: u32) -> bool {
        // AcqRel: the last signal sees what the others left.
        if self.left.fetch_sub(count, Ordering::AcqRel) != count {
            return false;
        }
        // SAFETY: we have taken off the last, and nobody else has been handed the end yet.
        let engine = unsafe { self.underway.get_mut() }.engine();
        if !self.lost.load(Ordering::Relaxed)
            && let Some(writes) = &self.writes
        {
            writes.bring_back(engine);
        }
        self.late.store(self.uses.end(&*engine.space), Ordering::Relaxed);
        true
    }
}

/// Tells those who wait how it has ended, when it is dropped.
struct Told<'a>(&'a Ending, Outcome);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        self.0.end(self.1);
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
        let told = Told(&self.ending, outcome); // also if what follows panics, which may be wakers and device code
        let over = Underway { held: Helds::new(), is_launched: true };
        // SAFETY: whoever took off the last has handed us the end, once.
        let underway = std::mem::replace(unsafe { self.underway.get_mut() }, over);
        let engine = underway.engine();
        if let Some(writes) = &self.writes {
            writes.forget(engine);
        }
        let (late, now) = (self.late.load(Ordering::Relaxed), engine.counters.acquires.load(Ordering::Relaxed));
        for held in underway.held() {
            let object = &held.handle.object;
            if late {
                // The monitor may be about to say so, and must not find the object idle instead.
                object.holds.end_late(held.noted.generation);
            }
            // Mostly nobody has acquired anything since, and a look is cheaper.
            if object.last_used.load(Ordering::Relaxed) < now {
                object.last_used.fetch_max(now, Ordering::Relaxed);
            }
        }
        if outcome == Outcome::Lost && engine.device().is_lost() {
            engine.lose(); // first: who is told that the work was lost with the device gets no lease of it any more
        }
        drop(underway);
        drop(told);
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
        self.flight.as_ref().map_or(Some(Outcome::Done), |flight| flight.ending.get())
    }

    /// Why not all that was [declared](crate::Lease::declare_written) is in the program's memory, although the work is over: the memory changed hands
    /// meanwhile. `None` while the work runs, and if all is well.
    #[must_use]
    pub fn fault(&self) -> Option<&DeviceError> {
        self.flight.as_ref()?.writes.as_ref()?.fault()
    }

    /// Waits until the work is over. `None`: not within `limit`.
    ///
    /// What the device wrote is visible to the program if the work ended with a barrier to the host (`VK_ACCESS_HOST_READ_BIT`).
    #[must_use]
    pub fn wait(&self, limit: Duration) -> Option<Outcome> {
        let Some(flight) = &self.flight else { return Some(Outcome::Done) };
        flight.ending.wait(Some(Instant::now() + limit))
    }
}

impl<D: Device> Future for Pending<D> {
    type Output = Outcome;

    fn poll(self: StdPin<&mut Self>, context: &mut Context<'_>) -> Poll<Outcome> {
        self.flight.as_ref().map_or(Poll::Ready(Outcome::Done), |flight| flight.ending.poll(context))
    }
}

impl<D: Device> std::fmt::Debug for Pending<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pending").field("outcome", &Self::poll(self)).finish()
    }
}
