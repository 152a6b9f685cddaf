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
use super::sync::atomic::{AtomicU32, Ordering, fence};
use super::sync::pause;

const IDLE: u32 = 0;
const ARMED: u32 = 1;
const RINGING: u32 = 2;
const RUNG: u32 = 4;
/// Beside the state: every read that empties the queue arms the bell again, so that the descriptor's readiness is the queue's. Only ever set.
const LEVEL: u32 = 8;

#[derive(Debug)]
pub(super) struct Bell {
    /// Posts move it from `ARMED` to `RUNG`; the reader, under the reader's lock, moves it back and sets `LEVEL`.
    state: AtomicU32,
    signal: Signal,
}

impl Bell {
    pub(super) fn new(signal: Signal) -> Self {
        barrier::prepare();
        Self { state: AtomicU32::new(IDLE), signal }
    }

    pub(super) fn signal(&self) -> &Signal {
        &self.signal
    }

    /// Whether there is more to do for the reader than to have published something, as the caller just has: then it [rings](Self::ring_if_armed).
    #[inline]
    pub(super) fn may_be_armed(&self) -> bool {
        // Relaxed: the barrier is the post's half of the pair in the module's head.
        !barrier::passed_free() || self.state.load(Ordering::Relaxed) & (ARMED | LEVEL) != 0
    }

    /// Rings if the bell is armed. The caller has just published something.
    #[inline]
    pub(super) fn ring_if_armed(&self) {
        if self.may_be_armed() {
            self.ring_if_still_armed();
        }
    }

    /// The same for a bell that [may be armed](Self::may_be_armed).
    #[inline(never)]
    fn ring_if_still_armed(&self) {
        // Who doesn't come here, as he hasn't seen `LEVEL`, has published before `keep_level`'s barrier, and with it before every arming after that.
        fence(Ordering::SeqCst);
        // Relaxed: as above.
        let mut word = self.state.load(Ordering::Relaxed);
        while word & !LEVEL == ARMED {
            // Acquire: whoever drains after us drains before our write. Only one of many posts gets through.
            let ringing = word - ARMED + RINGING;
            match self.state.compare_exchange_weak(word, ringing, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => {
                    self.signal.raise();
                    // Release: the write above is before it for the reader that meets `RUNG` and drains.
                    self.state.fetch_add(RUNG - RINGING, Ordering::Release);
                    return;
                }
                Err(now) => word = now,
            }
        }
    }

    /// Arms the bell, unless something is `readable` already; then it is rung, so that the descriptor says so too. Answers whether it is.
    ///
    /// The caller holds the reader's lock.
    pub(super) fn arm(&self, readable: impl Fn() -> bool) -> bool {
        let (mut round, level) = (0, self.state.load(Ordering::Relaxed) & LEVEL);
        loop {
            // Acquire: pairs with the Release of who has rung.
            match self.state.load(Ordering::Acquire) & !LEVEL {
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
        self.state.store(ARMED | level, Ordering::Relaxed);
        if level != 0 {
            fence(Ordering::SeqCst);
        } else {
            barrier::heavy();
        }
        if !readable() {
            return false;
        }
        self.ring_if_still_armed();
        true
    }

    /// Arms after every read from now on. The caller holds the reader's lock.
    #[cfg(not(loom))]
    pub(super) fn keep_level(&self) {
        // Relaxed: the barrier orders it for posts; everybody else reads it under the reader's lock, but for a first look that may lag.
        self.state.fetch_or(LEVEL, Ordering::Relaxed);
        barrier::heavy();
    }

    #[inline]
    pub(super) fn is_level(&self) -> bool {
        self.state.load(Ordering::Relaxed) & LEVEL != 0
    }
}
