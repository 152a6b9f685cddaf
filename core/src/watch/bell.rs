//! The file descriptor that wakes readers, and when it is worth a system call.
//!
//! A post must not pay 300 ns for a reader that is awake, and a foreign `poll` must see a readable descriptor as long as there is something to
//! read. So the reader *arms* the bell when it has found nothing; only a post that finds the bell armed rings it (writes the eventfd), once.
//!
//! ```text
//! IDLE ──arm──▶ ARMED ──post──▶ RINGING ──written──▶ RUNG ──arm──▶ (drain) ARMED
//! ```
//!
//! **Law**: the eventfd is non-zero in `RUNG`, zero in `IDLE` and `ARMED`. **No wake-up is lost**: a post publishes, then looks at the state; the reader
//! sets `ARMED`, then looks for records; with a barrier between the two steps on both sides, one of them sees the other. The reader is about to sleep and pays
//! for both barriers; once it arms after every read it pays for its own only, and posts, which see that, for theirs. (A post that looks late may ring for a record that was taken
//! meanwhile: one wake-up for nothing, and the read that finds nothing silences it.) A reader that meets `RINGING` waits for the
//! two instructions and one non-blocking write that the other thread has left, because a drain in between would leave the late write behind.

use super::barrier;
use super::signal::Signal;
use super::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
use super::sync::pause;

const IDLE: u32 = 0;
const ARMED: u32 = 1;
const RINGING: u32 = 2;
const RUNG: u32 = 3;

#[derive(Debug)]
pub(super) struct Bell {
    /// Posts move it from `ARMED` to `RUNG`, the reader (under the reader's lock) back.
    state: AtomicU32,
    /// Whether every read that empties the queue arms the bell again, so that the descriptor's readiness is the queue's. Only ever set.
    level: AtomicBool,
    signal: Signal,
}

impl Bell {
    pub(super) fn new(signal: Signal) -> Self {
        barrier::prepare();
        Self { state: AtomicU32::new(IDLE), level: AtomicBool::new(false), signal }
    }

    pub(super) fn signal(&self) -> &Signal {
        &self.signal
    }

    /// Rings if the bell is armed. The caller has just published something.
    #[inline]
    pub(super) fn ring_if_armed(&self) {
        barrier::light();
        // Who doesn't see the bit has published before `keep_level`'s barrier, and with it before every arming after that.
        if self.is_level() {
            fence(Ordering::SeqCst);
        }
        // Relaxed: the barrier is the post's half of the pair in the module's head.
        if self.state.load(Ordering::Relaxed) == ARMED {
            self.ring();
        }
    }

    #[cold]
    fn ring(&self) {
        // Acquire: whoever drains after us drains before our write. Only one of many posts gets through.
        if self.state.compare_exchange(ARMED, RINGING, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            self.signal.raise();
            // Release: the write above is before it for the reader that meets `RUNG` and drains.
            self.state.store(RUNG, Ordering::Release);
        }
    }

    /// Arms the bell, unless something is `readable` already; then it is rung, so that the descriptor says so too. Answers whether it is.
    ///
    /// The caller holds the reader's lock.
    pub(super) fn arm(&self, readable: impl Fn() -> bool) -> bool {
        let mut round = 0;
        loop {
            // Acquire: pairs with the Release in `ring`.
            match self.state.load(Ordering::Acquire) {
                ARMED => return readable(),
                RINGING => {
                    pause(round);
                    round += 1;
                    continue;
                }
                RUNG => self.signal.drain(),
                _ => {}
            }
            break;
        }
        // Relaxed: the barrier is the reader's half of the pair in the module's head.
        self.state.store(ARMED, Ordering::Relaxed);
        if self.is_level() {
            fence(Ordering::SeqCst);
        } else {
            barrier::heavy();
        }
        if !readable() {
            return false;
        }
        self.ring();
        true
    }

    /// Arms after every read from now on. The caller holds the reader's lock.
    #[cfg(not(loom))]
    pub(super) fn keep_level(&self) {
        // Relaxed: the barrier orders it for posts; everybody else reads it under the reader's lock, but for a first look that may lag.
        self.level.store(true, Ordering::Relaxed);
        barrier::heavy();
    }

    #[inline]
    pub(super) fn is_level(&self) -> bool {
        self.level.load(Ordering::Relaxed)
    }
}
