//! The monitor: one thread that stands between a mutator and its freedom.
//!
//! **Problem.** `poll` says that a mutator waits, not what it does; the message that says so is also what sets it free. So the monitor must
//! assume the worst of a shard before it reads, and must be done with what it read before anybody can look at the result.
//!
//! **Law.** A message is read only while the shard's gate is closed, nobody is inside and nothing is under way, or after the deadline when the
//! shard's uses have been moved to *late*. A gate opens only after every target over the message's range has been told, or with the range left
//! *untold*, which is as good as closed for whoever looks at these targets, and for nobody else.
//!
//! **Protocol.** Three passes over the shards that have something: close all their gates (so that their uses drain side by side); for each,
//! wait, read until empty, tell; then open all. One read may free many mutators: the whole shard is quiet. Everything is preallocated, see
//! `event_path.rs`. The shard without hold-off is read first and told afterwards, its gate closed all the while.
//! One message may be over a hundred thousand targets. A round tells the first of them and puts the rest on the *backlog*, which is told in
//! batches between rounds: so neither the next mutator nor a user of other memory waits for more than a batch.
//!
//! **If it fails.** A target that panics is counted and the others are told. If a round panics, or the thread is gone (the watchdog notices and
//! becomes the monitor), nobody knows what had been read and not told: then every target is told of everything, the ledger is compared with the
//! kernel's list, and the gates that the lost round had closed are opened.

use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::event_path::EventPath;
use crate::fault::{self, Call};
use crate::index::Key;
use crate::space::{Cause, Change, Inner, NO_HOLD, SHARDS, Shard, Shards, SpaceError};
use crate::uffd::{Event, Message, close_once};
use crate::watchdog::Phase;
use crate::{Entry, HostRange, Target};

const KICK: u64 = SHARDS as u64;

/// Targets told at a time. Waiting for all of 100,000 took 26 ms at best, so a batch is well below 100 µs.
const BATCH: usize = 256;

/// A change that not everybody has been told of.
#[derive(Clone, Copy)]
struct Rest {
    shard: usize,
    change: Change,
    /// The target told last.
    after: Key,
}

/// What is left of the last rounds. Where it is full, a round tells everybody itself.
type Backlog = [Option<Rest>; 16];

/// What other threads need of the monitor: a way to wake it.
#[derive(Debug)]
pub(crate) struct Shared {
    epoll: AtomicI32,
    kick: AtomicI32,
    /// Rounds begun; the watchdog watches it move.
    pub(crate) beat: AtomicU64,
    /// The thread that is the monitor; 0 before there is one.
    pub(crate) thread: AtomicI32,
    /// The shards whose gates this round has closed. Written by the monitor, and read by whoever takes over from it.
    closed: AtomicU32,
}

impl Shared {
    pub(crate) fn new(shards: &[Shard; SHARDS]) -> Result<Self, SpaceError> {
        let refused =
            |source| SpaceError::Setup { what: "the monitor's epoll", limit: "open files (ulimit -n)", source };
        let setup = |errno: nix::Error| refused(io::Error::from(errno));
        fault::at(Call::Epoll).map_err(refused)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(setup)?;
        fault::at(Call::EventFd).map_err(refused)?;
        let kick = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(setup)?;
        epoll.add(&kick, EpollEvent::new(EpollFlags::EPOLLIN, KICK)).map_err(setup)?;
        for (number, shard) in shards.iter().enumerate() {
            if let Some(uffd) = &shard.uffd {
                // SAFETY: the shard's userfaultfd is open: nobody but the fork handlers and the end of the space closes it.
                let fd = unsafe { BorrowedFd::borrow_raw(uffd.raw()) };
                epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, number as u64)).map_err(setup)?;
            }
        }
        let own = |fd: std::os::fd::OwnedFd| AtomicI32::new(std::os::fd::IntoRawFd::into_raw_fd(fd));
        Ok(Self {
            epoll: own(epoll.0),
            kick: own(kick.into()),
            beat: AtomicU64::new(0),
            thread: AtomicI32::new(0),
            closed: AtomicU32::new(0),
        })
    }

    /// Makes the monitor take a round. Neither allocates nor blocks.
    pub(crate) fn kick(&self) {
        let one = 1_u64.to_ne_bytes();
        // SAFETY: eight bytes of this frame; the descriptor is our eventfd, or −1 in a forked child.
        unsafe { libc::write(self.kick.load(Ordering::Relaxed), one.as_ptr().cast(), one.len()) };
    }

    fn unkick(&self) {
        let mut count = [0_u8; 8];
        // SAFETY: eight writable bytes of this frame; the descriptor is our non-blocking eventfd.
        unsafe { libc::read(self.kick.load(Ordering::Relaxed), count.as_mut_ptr().cast(), count.len()) };
    }

    /// As a round that closed these gates and came to no end.
    #[cfg(all(test, not(loom)))]
    pub(crate) fn leave_closed(&self, shards: Shards) {
        self.closed.store(shards.0.into(), Ordering::Relaxed);
    }

    /// What there is to do; nothing, if `timeout` has passed or a signal came.
    pub(crate) fn ready(&self, timeout: EpollTimeout) -> Ready {
        let mut events = [EpollEvent::empty(); SHARDS + 1];
        let timeout = i32::from(timeout);
        let room = i32::try_from(events.len()).expect("seventeen fits");
        let epoll: RawFd = self.epoll.load(Ordering::Relaxed);
        // SAFETY: `EpollEvent` is a transparent `epoll_event`; the array is writable and `room` long; the descriptor is our epoll or −1.
        let count = unsafe { libc::epoll_wait(epoll, events.as_mut_ptr().cast(), room, timeout) };
        let mut ready = Ready { readable: Shards::NONE, kicked: false };
        for event in events.iter().take(usize::try_from(count).unwrap_or(0)) {
            match event.data() {
                KICK => ready.kicked = true,
                shard => ready.readable = ready.readable.union(Shards::one(shard as usize)),
            }
        }
        ready
    }

    /// Async-signal-safe.
    pub(crate) fn close(&self) {
        close_once(&self.epoll);
        close_once(&self.kick);
    }
}

/// What the monitor has been woken for.
pub(crate) struct Ready {
    /// Shards in which a mutator waits.
    pub(crate) readable: Shards,
    kicked: bool,
}

pub(crate) fn run(inner: &Arc<Inner>) {
    crate::index::warm_up_thread();
    // SAFETY: has no preconditions.
    inner.monitor.thread.store(unsafe { libc::gettid() }, Ordering::Relaxed);
    let mut messages = [Message::default(); 64];
    let mut backlog: Backlog = [None; 16];
    while !inner.stop.load(Ordering::SeqCst) {
        inner.watchdog.enter(Phase::Idle);
        let behind = backlog.iter().any(Option::is_some);
        let ready = inner.monitor.ready(if behind { EpollTimeout::ZERO } else { EpollTimeout::NONE });
        inner.watchdog.enter(Phase::Working);
        inner.monitor.beat.fetch_add(1, Ordering::Relaxed);
        let _mark = EventPath::enter();
        if ready.kicked {
            inner.monitor.unkick();
        }
        let work = || {
            round(inner, ready.readable, &mut messages, &mut backlog);
            catch_up(inner, &mut backlog)
        };
        match catch_unwind(AssertUnwindSafe(work)) {
            Ok(false) => inner.owes.settling(),
            Ok(true) => {} // the settle thread would look through all of it, several times
            Err(panic) => {
                std::mem::forget(panic); // frees nothing here
                backlog = [None; 16];
                recover(inner);
            }
        }
    }
}

/// Goes on after a round that did not come to its end: nobody knows what it had read and not told, so everybody is told of everything.
pub(crate) fn recover(inner: &Inner) {
    let _mark = EventPath::enter();
    let deadline = Instant::now() + inner.deadline();
    inner.close(Shards::ALL);
    let late = !Shards::ALL.iter().all(|shard| inner.shards[shard].gate.wait_users(Some(deadline)));
    drain_log(inner);
    inner.shards.iter().for_each(Shard::removed);
    inner.forgotten.store(true, Ordering::Release); // the ledger, too, may have missed something
    let change =
        Change { range: HostRange::everything(), cause: Cause::Lost, held: Duration::ZERO, late, no_hold: false };
    announce(inner, &change);
    // Behind closed gates still, as all that is counted: who finds them open finds it.
    inner.counters.recoveries.fetch_add(1, Ordering::Relaxed);
    inner.shards.iter().for_each(|shard| {
        shard.gate.told();
        shard.gate.open();
    });
    let closed = Shards(inner.monitor.closed.swap(0, Ordering::Relaxed) as u16);
    closed.iter().for_each(|shard| inner.shards[shard].gate.open());
    inner.owes.settling();
}

fn round(inner: &Inner, readable: Shards, messages: &mut [Message], backlog: &mut Backlog) {
    let begun = Instant::now();
    let deadline = begun + inner.deadline();
    inner.close(readable);
    inner.monitor.closed.store(readable.0.into(), Ordering::Relaxed);
    // What the watchdog read in our place, with gates it closed for us.
    drain_log(inner);
    for number in readable.iter() {
        let shard = &inner.shards[number];
        let no_hold = number == NO_HOLD;
        let late = !no_hold && !quiesce(inner, shard, deadline);
        let held = begun.elapsed();
        let mut any = false;
        while let Some(uffd) = &shard.uffd {
            let got = uffd.read(messages);
            if no_hold {
                shard.gate.wait_users(Some(deadline));
            }
            any |= got > 0;
            for message in &messages[..got] {
                let Some(change) = take_in(inner, Shards::one(number), message, held, late, no_hold) else { continue };
                tell_some(inner, number, change, backlog);
            }
            if got < messages.len() {
                break;
            }
        }
        if any {
            inner.counters.holds.fetch_add(1, Ordering::Relaxed);
            inner.counters.held_ns.fetch_add(nanos(held), Ordering::Relaxed);
        }
    }
    inner.monitor.closed.store(0, Ordering::Relaxed);
    for shard in readable.iter() {
        inner.shards[shard].gate.open();
    }
    for shard in &inner.shards {
        // After the log has been drained: the watchdog hands a gate over behind its last entry.
        for _ in 0..shard.handed.swap(0, Ordering::Acquire) {
            drain_log(inner);
            shard.gate.open();
        }
    }
}

/// Waits until nothing is under way in the shard. False: the deadline has passed, and what is left counts as late.
pub(crate) fn quiesce(inner: &Inner, shard: &Shard, deadline: Instant) -> bool {
    let quiet = shard.gate.wait_users(Some(deadline)) && shard.gate.wait_quiet(Some(deadline));
    if !quiet {
        shard.gate.give_up();
        inner.counters.late.fetch_add(1, Ordering::Relaxed);
    }
    quiet
}

fn drain_log(inner: &Inner) {
    while let Some(message) = inner.watchdog.log.pop() {
        // The log doesn't say whose it was.
        if let Some(change) = take_in(inner, Shards::ALL, &message, Duration::ZERO, true, false) {
            announce(inner, &change);
        }
    }
}

/// Tells the first of those over the range, with the gate closed, and leaves the others to [`catch_up`].
fn tell_some(inner: &Inner, shard: usize, change: Change, backlog: &mut Backlog) {
    let Some(place) = backlog.iter_mut().find(|place| place.is_none()) else { return announce(inner, &change) };
    let tell_and_queue = |entry: Entry<'_, Arc<dyn Target>>| {
        tell(inner, &entry, &change);
        queue(inner, &entry, &change);
    };
    if let Some(after) = inner.index.visit_some(change.range, None, BATCH, tell_and_queue) {
        inner.shards[shard].gate.leave_untold(change.range);
        *place = Some(Rest { shard, change, after });
    }
}

/// Tells one more batch of the backlog, through an open gate: whoever looks at these targets waits until it says that everything is told.
/// Returns whether something is left.
fn catch_up(inner: &Inner, backlog: &mut Backlog) -> bool {
    let Some(place) = backlog.iter_mut().find(|place| place.is_some()) else { return false };
    let rest = place.as_mut().expect("the place was just found taken");
    let change = rest.change;
    match inner.index.visit_some(change.range, Some(rest.after), BATCH, |entry| tell(inner, &entry, &change)) {
        Some(after) => rest.after = after,
        None => {
            let shard = rest.shard;
            *place = None;
            // All at once: they are far more than the queue has room for.
            inner.unsettled.add(change.range);
            if !backlog.iter().flatten().any(|rest| rest.shard == shard) {
                inner.shards[shard].gate.told();
            }
        }
    }
    backlog.iter().any(Option::is_some)
}

/// Writes down what the message says has happened.
fn take_in(
    inner: &Inner,
    from: Shards,
    message: &Message,
    held: Duration,
    late: bool,
    no_hold: bool,
) -> Option<Change> {
    let event = message.decode()?;
    inner.counters.events.fetch_add(1, Ordering::Relaxed);
    inner.happens(event);
    let (range, cause) = match event {
        Event::Unmap(range) => (range, Cause::Unmap),
        Event::Remove(range) => {
            from.iter().for_each(|shard| inner.shards[shard].removed());
            (range, Cause::Remove)
        }
        Event::Remap { from, .. } => (from, Cause::Remap),
    };
    Some(Change { range, cause, held, late, no_hold })
}

/// Tells every target over the range and puts it on the list of those to be settled. Called with the gates closed and the event path marked.
pub(crate) fn announce(inner: &Inner, change: &Change) {
    inner.index.visit_overlapping(change.range, |entry| {
        tell(inner, &entry, change);
        queue(inner, &entry, change);
    });
}

fn tell(inner: &Inner, entry: &Entry<'_, Arc<dyn Target>>, change: &Change) {
    // One that panics counts as told: the others must be, and the gates must open.
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| entry.value.invalidated(change))) {
        std::mem::forget(panic);
        inner.counters.panics.fetch_add(1, Ordering::Relaxed);
    }
}

/// Puts a target that was told on the list of those to be settled.
fn queue(inner: &Inner, entry: &Entry<'_, Arc<dyn Target>>, change: &Change) {
    // The clone goes to the queue or, if that is full, is dropped here while the index still holds the target: never the last one.
    if inner.settling.push(Arc::clone(&**entry.value)).is_err() {
        inner.unsettled.add(change.range);
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
