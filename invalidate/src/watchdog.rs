//! The watchdog: lets mutators go when the monitor itself is stuck in one.
//!
//! **Problem.** If the monitor unmaps watched memory (a bug, or a handler of the user's that frees), it waits for itself. Closing the
//! userfaultfd would not help: whoever waits there is freed by a *read* alone if a forked child holds a copy.
//!
//! **Law.** The watchdog only ever closes gates and reads; it tells nobody and opens nothing, as both belong behind what it read.
//!
//! **Protocol.** Every tick it compares the monitor's beat. Stuck means: working on the same beat for a whole tick (longer than any hold-off
//! may take), or idle with something to read for two ticks. Then, per shard that has something: *close, wait (bounded) until nobody is inside,
//! give up what is under way, read into a preallocated log, add one to `handed`, kick*. The monitor, once it runs again, drains the log, takes
//! `handed` and opens as many times. Until then those gates stay closed, and who meets one gets `Again`.
//!
//! A monitor whose thread is gone never runs again. Then this thread is the monitor from there on, and nobody watches over it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crossbeam_queue::ArrayQueue;
use nix::sys::epoll::EpollTimeout;

use crate::monitor;
use crate::space::{Inner, Shards};
use crate::sync::Futex;
use crate::uffd::Message;

/// What the monitor is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Waiting for events.
    Idle = 0,
    /// In a round.
    Working = 1,
}

#[derive(Debug)]
pub(crate) struct Shared {
    phase: AtomicU32,
    /// What was read in the monitor's place, oldest first.
    pub(crate) log: ArrayQueue<Message>,
    stop: Futex,
}

/// The log's room. When it is full the watchdog stops reading, and mutators wait for the monitor.
const LOG: usize = 4096;
/// Between two looks, at the least.
const TICK: Duration = Duration::from_millis(250);

impl Shared {
    pub(crate) fn new() -> Self {
        Self { phase: AtomicU32::new(Phase::Idle as u32), log: ArrayQueue::new(LOG), stop: Futex::new() }
    }

    /// The monitor says what it does.
    pub(crate) fn enter(&self, phase: Phase) {
        self.phase.store(phase as u32, Ordering::Relaxed);
    }

    /// Ends the watchdog's sleep; `Inner::stop` says why.
    pub(crate) fn kick(&self) {
        self.stop.bump();
    }

    fn is_working(&self) -> bool {
        self.phase.load(Ordering::Relaxed) == Phase::Working as u32
    }
}

pub(crate) fn run(inner: &Arc<Inner>) {
    let mut last = None;
    loop {
        let end = Instant::now() + TICK.max(2 * inner.deadline());
        // A whole tick, however many signals interrupt it: a shorter one would take a hold-off for a monitor that is stuck.
        loop {
            let turn = inner.watchdog.stop.value();
            if inner.stop.load(Ordering::SeqCst) {
                return;
            }
            if !inner.watchdog.stop.wait(turn, Some(end)) {
                break;
            }
        }
        if is_gone(inner.monitor.thread.load(Ordering::Relaxed)) {
            // On this thread: making another allocates, and a mutator that nobody sets free may hold the allocator's lock.
            inner.counters.takeovers.fetch_add(1, Ordering::Relaxed);
            monitor::recover(inner);
            monitor::run(inner);
            return;
        }
        let beat = inner.monitor.beat.load(Ordering::Relaxed);
        let waiting = inner.monitor.ready(EpollTimeout::ZERO).readable;
        let seen = (beat, inner.watchdog.is_working(), !waiting.is_empty());
        let suspicious = seen.1 || seen.2;
        if suspicious && last == Some(seen) {
            rescue(inner, waiting);
        }
        last = Some(seen);
    }
}

/// Whether the thread has ended, without a word: `exit` as a system call, or a cancellation that some library sent it.
fn is_gone(thread: i32) -> bool {
    let process = std::process::id();
    // SAFETY: numbers only; the signal 0 asks and does nothing.
    let asked = thread != 0 && unsafe { libc::syscall(libc::SYS_tgkill, process, thread, 0) } != 0;
    asked && nix::errno::Errno::last() == nix::errno::Errno::ESRCH
}

fn rescue(inner: &Inner, waiting: Shards) {
    let mut messages = [Message::default(); 16];
    for number in waiting.iter() {
        let shard = &inner.shards[number];
        let Some(uffd) = &shard.uffd else { continue };
        inner.close(Shards::one(number));
        shard.gate.wait_users(Some(Instant::now() + inner.deadline()));
        shard.gate.give_up();
        // Only as much is read as the log has room for: nothing that was read is ever lost.
        loop {
            let room = (inner.watchdog.log.capacity() - inner.watchdog.log.len()).min(messages.len());
            let got = if room == 0 { 0 } else { uffd.read(&mut messages[..room]) };
            for message in &messages[..got] {
                inner.watchdog.log.push(*message).expect("the watchdog is the log's only writer");
            }
            if got == 0 {
                break;
            }
        }
        inner.counters.rescues.fetch_add(1, Ordering::Relaxed);
        // Release: pairs with the Acquire in the monitor's round; who takes the hand-over sees the log.
        shard.handed.fetch_add(1, Ordering::Release);
    }
    inner.monitor.kick();
}
