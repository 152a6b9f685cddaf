//! Tells the object machine when work on the device is over.
//!
//! Somewhere a thread may stand still inside `munmap` until it hears so. It may hold the allocator's lock while it stands there. Hence the
//! law of this file: between the moment a semaphore reaches its value and the ticket's `retire`, nothing is allocated, nothing is freed,
//! and no lock is taken under which others allocate or free.
//!
//! Each semaphore or fence that has work pending has a *line*: a thread, and the tickets in the order of their values. The thread waits for the
//! lowest value of its own semaphore only, because a wait for any of several is a busy loop in one driver family. It waits in slices, so that
//! a lower value which arrives later, the end of the manager, and a device lost elsewhere are noticed. Engines make and destroy semaphores: one
//! is touched only while a ticket for it is pending. A line that has nothing to do takes the next semaphore that has none, and ends after a while.
//!
//! As soon as a ticket is signalled, the engine may destroy the semaphore and be given another of the same handle. So tickets that come while
//! others are being retired are never taken for some of those, whatever their values.
//!
//! A fence has no values, and the engine resets it and uses it again as soon as it hears that the work is over. So its tickets are numbered as
//! they come, and a signalled fence retires those that were there before the wait for it began; who comes later waits for the fence anew.

use std::collections::{HashMap, VecDeque};
use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ash::vk;
use pinfold_core::{Outcome, Ticket};

use crate::gpu::Gpu;

/// The longest wait for a semaphore in one piece.
const SLICE: Duration = Duration::from_millis(20);
/// The pause after a wait that failed for want of memory.
const PAUSE: Duration = Duration::from_millis(1);
/// A line without work ends after this time.
const IDLE: Duration = Duration::from_secs(2);
/// Room for this many tickets is made at once.
const ROOM: usize = 64;

/// When a submit is over: when this timeline semaphore reaches this value.
///
/// The semaphore may be the engine's or be made for this purpose. It lives at least until the submit has been retired.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Timeline {
    /// A timeline semaphore of the manager's device.
    pub semaphore: vk::Semaphore,
    /// The value that the submit signals.
    pub value: u64,
}

/// When a submit is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Signal {
    /// When a timeline semaphore reaches a value.
    Timeline(Timeline),
    /// When this fence of the manager's device is signalled: for engines without timeline semaphores. It is unsignalled when it is handed to
    /// the submit, and is neither reset nor destroyed until the [`Pending`](crate::Pending) of every submit that names it is over.
    Fence(vk::Fence),
}

impl From<Timeline> for Signal {
    fn from(timeline: Timeline) -> Self {
        Self::Timeline(timeline)
    }
}

impl From<vk::Fence> for Signal {
    fn from(fence: vk::Fence) -> Self {
        Self::Fence(fence)
    }
}

/// What a line waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum On {
    Semaphore(vk::Semaphore),
    Fence(vk::Fence),
}

/// What is told when a value is reached: a [`Ticket`], or what a test puts in its place.
pub(crate) trait Retire: Send + 'static {
    fn signal(&self, outcome: Outcome);
    fn retire(self, outcome: Outcome);
}

impl Retire for Ticket {
    fn signal(&self, outcome: Outcome) {
        Ticket::signal(self, outcome);
    }

    fn retire(self, outcome: Outcome) {
        Ticket::retire(self, outcome);
    }
}

/// The lines of one device. Dropping it [finishes](Self::finish) them.
pub(crate) struct Completion<T: Retire = Ticket>(Arc<Lines<T>>);

struct Lines<T> {
    gpu: Arc<Gpu>,
    /// Taken by those who submit and by lines that end, never by a line that has a ticket to retire.
    by_signal: Mutex<BySignal<T>>,
}

type BySignal<T> = HashMap<On, (Arc<Line<T>>, JoinHandle<()>)>;

struct Line<T> {
    /// Whether there are tickets; written under the lock of the queue, which signalling holds for as long as results take to be brought back.
    busy: AtomicBool,
    /// A leaf, under which nothing is allocated or freed.
    queue: Mutex<Queue<T>>,
    /// Rings when a ticket comes to an empty queue and when the line is to stop.
    bell: Condvar,
}

struct Queue<T> {
    /// What the tickets wait for. Changes only while there are none.
    on: On,
    /// In the order of their values.
    pending: VecDeque<Waiting<T>>,
    /// The number of the last ticket.
    last: u64,
    /// No thread serves this line any more; nothing may be queued.
    closed: bool,
    /// The thread is to end.
    stop: bool,
}

/// A ticket, the value it waits for, and its number in the line. For fences these are the same.
struct Waiting<T> {
    value: u64,
    number: u64,
    ticket: T,
}

impl<T: Retire> Completion<T> {
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Self {
        Self(Arc::new(Lines { gpu: Arc::clone(gpu), by_signal: Mutex::new(HashMap::new()) }))
    }

    /// Retires `ticket` when `signal` is reached, or the device lost.
    pub(crate) fn follow(&self, signal: Signal, ticket: T) {
        if self.0.gpu.is_lost() {
            return ticket.retire(Outcome::Lost);
        }
        let (on, value) = match signal {
            Signal::Timeline(timeline) => (On::Semaphore(timeline.semaphore), timeline.value),
            Signal::Fence(fence) => (On::Fence(fence), 0),
        };
        let mut waiting = Waiting { value, number: 0, ticket }; // numbered when it is queued
        loop {
            let Some(line) = self.0.line(on) else {
                return self.wait_here(on, waiting);
            };
            match line.push(on, waiting) {
                Ok(()) => return,
                Err(again) => waiting = again, // the line has just ended, or has been given to another signal
            }
        }
    }

    /// The way out when the system refuses another thread: late is better than never.
    fn wait_here(&self, on: On, waiting: Waiting<T>) {
        let line = Line::new(on);
        let queued = line.push(on, waiting);
        debug_assert!(queued.is_ok(), "a new line is open");
        while line.serve_once(&self.0.gpu) {}
    }
}

impl<T: Retire> Completion<T> {
    /// Ends every line, waits for that, and so retires every ticket: as done if its value is reached, else as lost.
    pub(crate) fn finish(&self) {
        let lines = mem::take(&mut *self.0.by_signal());
        for (line, _) in lines.values() {
            line.queue().stop = true;
            line.bell.notify_one();
        }
        for (_, thread) in lines.into_values() {
            // The last ticket's retire may be what drops the manager: then this is one of the threads, about to end.
            if thread.thread().id() != thread::current().id() {
                thread.join().expect("a line doesn't panic");
            }
        }
    }
}

impl<T: Retire> Drop for Completion<T> {
    fn drop(&mut self) {
        self.finish();
    }
}

impl<T: Retire> Lines<T> {
    /// The line of a semaphore or fence: its own, one that has nothing to do, or a new one. `None` if the system refuses a thread.
    fn line(self: &Arc<Self>, on: On) -> Option<Arc<Line<T>>> {
        let mut lines = self.by_signal();
        if let Some((line, _)) = lines.get(&on)
            && !line.queue().closed
        {
            return Some(Arc::clone(line));
        }
        let free = lines.iter().find(|(_, (line, _))| line.take_on(on)).map(|(&before, _)| before);
        if let Some(entry) = free.and_then(|before| lines.remove(&before)) {
            let line = Arc::clone(&entry.0);
            lines.insert(on, entry);
            return Some(line);
        }
        let line = Arc::new(Line::new(on));
        let (mine, owner) = (Arc::clone(&line), Arc::clone(self));
        let thread = thread::Builder::new().name("pinfold-done".to_owned()).spawn(move || mine.run(&owner)).ok()?;
        // A closed line that is replaced here ends on its own; dropping its handle detaches it.
        lines.insert(on, (Arc::clone(&line), thread));
        Some(line)
    }

    /// Removes a line that has closed, unless it has been replaced.
    fn forget(&self, line: &Arc<Line<T>>) {
        let mut lines = self.by_signal();
        let on = line.queue().on;
        if lines.get(&on).is_some_and(|(current, _)| Arc::ptr_eq(current, line)) {
            lines.remove(&on);
        }
    }

    fn by_signal(&self) -> MutexGuard<'_, BySignal<T>> {
        // A panic under the lock can only be a failed allocation of the map, which leaves the map as it was.
        self.by_signal.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Retire> Line<T> {
    fn new(on: On) -> Self {
        let queue = Queue { on, pending: VecDeque::with_capacity(ROOM), last: 0, closed: false, stop: false };
        Self { busy: AtomicBool::new(false), queue: Mutex::new(queue), bell: Condvar::new() }
    }

    /// Waits for another signal from now on, if it waits for none. Its thread may still be retiring the last ticket for the one before.
    fn take_on(&self, on: On) -> bool {
        // Relaxed: spares the lock, under which it is looked at once more.
        if self.busy.load(Ordering::Relaxed) {
            return false;
        }
        let mut queue = self.queue();
        let free = queue.pending.is_empty() && !queue.closed && !queue.stop;
        if free {
            queue.on = on;
        }
        free
    }

    fn queue(&self) -> MutexGuard<'_, Queue<T>> {
        self.queue.lock().expect("no code under this lock panics")
    }

    /// Adds a ticket, or gives it back if the line has closed or waits for another signal. Room is made outside the lock.
    fn push(&self, on: On, mut waiting: Waiting<T>) -> Result<(), Waiting<T>> {
        let mut room = VecDeque::new();
        loop {
            let mut queue = self.queue();
            if queue.closed || queue.on != on {
                return Err(waiting);
            }
            if queue.pending.len() == queue.pending.capacity() {
                let wanted = 2 * queue.pending.len();
                if room.capacity() < wanted {
                    drop(queue);
                    room = VecDeque::with_capacity(wanted);
                    continue;
                }
                room.extend(queue.pending.drain(..));
                mem::swap(&mut room, &mut queue.pending);
            }
            queue.last += 1;
            waiting.number = queue.last;
            if matches!(on, On::Fence(_)) {
                waiting.value = queue.last;
            }
            let at = queue.pending.partition_point(|other| other.value <= waiting.value);
            queue.pending.insert(at, waiting);
            self.busy.store(true, Ordering::Relaxed);
            drop(queue); // before `room`, which is freed at the end
            self.bell.notify_one();
            return Ok(());
        }
    }

    /// What the line's thread does.
    fn run(self: &Arc<Self>, lines: &Lines<T>) {
        loop {
            if self.serve_once(&lines.gpu) {
                continue;
            }
            let queue = self.queue();
            let idle = |queue: &mut Queue<T>| queue.pending.is_empty() && !queue.stop;
            let (mut queue, _) =
                self.bell.wait_timeout_while(queue, IDLE, idle).expect("no code under this lock panics");
            if queue.pending.is_empty() {
                queue.closed = true;
                let stopped = queue.stop;
                drop(queue);
                if !stopped {
                    lines.forget(self);
                }
                return;
            }
        }
    }

    /// Waits for the lowest value, at most a slice, and retires what is over. Returns whether more is pending.
    fn serve_once(&self, gpu: &Gpu) -> bool {
        let queue = self.queue();
        let Some(first) = queue.pending.front() else { return false };
        let on = queue.on;
        let value = if matches!(on, On::Fence(_)) { queue.last } else { first.value };
        let limit = if queue.stop { Duration::ZERO } else { SLICE };
        drop(queue);
        if gpu.is_lost() {
            self.retire(u64::MAX, Outcome::Lost);
            return true;
        }
        // SAFETY: a ticket for this semaphore or fence is pending, and until it is retired the engine keeps it alive (the contract of
        // `VulkanDevice::new`).
        match unsafe { gpu.wait(on, value, limit) } {
            Ok(true) => self.retire(self.reached(gpu, on, value), Outcome::Done),
            // The end: what isn't reached now never will be.
            Ok(false) if limit.is_zero() => self.retire(u64::MAX, Outcome::Lost),
            Ok(false) => {}
            Err(vk::Result::ERROR_DEVICE_LOST | vk::Result::ERROR_FEATURE_NOT_PRESENT) => {
                self.retire(u64::MAX, Outcome::Lost);
            }
            Err(_) => thread::sleep(PAUSE),
        }
        true
    }

    /// The highest value with a ticket that is reached, where `value` is.
    fn reached(&self, gpu: &Gpu, on: On, mut value: u64) -> u64 {
        if matches!(on, On::Fence(_)) {
            return value;
        }
        loop {
            let next = self.queue().pending.iter().map(|waiting| waiting.value).find(|&next| next > value);
            // SAFETY: as in `serve_once`.
            match next.filter(|&next| unsafe { gpu.wait(on, next, Duration::ZERO) } == Ok(true)) {
                Some(next) => value = next,
                None => return value,
            }
        }
    }

    /// Retires every ticket that is there and whose value is at most `reached`: signals all of them, and only then does what may allocate or free.
    fn retire(&self, reached: u64, outcome: Outcome) {
        let over = |waiting: &&Waiting<T>| waiting.value <= reached;
        let queue = self.queue();
        let last = queue.last;
        queue.pending.iter().take_while(over).for_each(|waiting| waiting.ticket.signal(outcome));
        drop(queue);
        loop {
            let mut queue = self.queue();
            // One that has come since may wait for another semaphore of the same handle.
            let Some(next) = queue.pending.iter().take_while(over).position(|waiting| waiting.number <= last) else {
                return;
            };
            let waiting = queue.pending.remove(next);
            self.busy.store(!queue.pending.is_empty(), Ordering::Relaxed);
            drop(queue);
            if let Some(Waiting { ticket, .. }) = waiting {
                ticket.retire(outcome);
            }
        }
    }
}

#[cfg(test)]
mod tests;
