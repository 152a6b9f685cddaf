//! Objects that an engine wants kept ready: taken again in the background, so that the next acquire finds them valid.
//!
//! **Problem.** After an invalidation or an eviction the next acquire pays for taking the pages, in the middle of a frame. Whoever takes them
//! at once instead pays for each of a thousand invalidations in a row, and takes room from those who ask.
//!
//! **Law.** A restore is an acquisition like any other, that nobody has asked for: it evicts nobody, takes no room while somebody is short, its failure is told to nobody, and it comes
//! after a pause that doubles while the memory doesn't come to rest. An engine that acquires meanwhile adopts it, and then it is its own.
//!
//! **Protocol.** Whoever ends a generation (settle thread, eviction) or a restore that failed asks for the next one; a flag under the object lock
//! keeps it at one. A range that can't be given to the device is left alone until its memory changes or somebody acquires it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::notes::What;
use crate::object::Object;
use crate::state::{State, Step};
use crate::{Device, Error};

/// The first pause: as the kernel's driver for compute on AMD GPUs waits before it restores user pointers.
const SHORTEST: Duration = Duration::from_millis(1);
const LONGEST: Duration = Duration::from_secs(1);
/// After so many pauses of quiet, it begins with the shortest again.
const CALM: u32 = 4;

/// What an object needs to be kept ready. Under the object lock.
pub(crate) struct Hot {
    pause: Duration,
    /// When the last restore was asked for.
    asked: Option<Instant>,
    /// One is waiting for its time.
    waiting: bool,
    /// The acquisition that is a restore, until somebody adopts it; 0 for none.
    pub(crate) token: u64,
}

impl Hot {
    fn next_pause(&mut self, now: Instant) -> Duration {
        let calm = self.asked.is_none_or(|asked| now.duration_since(asked) > CALM * self.pause);
        self.pause = if calm { SHORTEST } else { (2 * self.pause).min(LONGEST) };
        self.asked = Some(now);
        self.pause
    }
}

impl<D: Device> Object<D> {
    /// From now on it is kept ready.
    pub(crate) fn heat(self: &Arc<Self>) {
        let mut slot = self.slot();
        slot.hot.get_or_insert_with(|| Box::new(Hot { pause: Duration::ZERO, asked: None, waiting: false, token: 0 }));
        self.hot.store(true, Ordering::Relaxed);
        drop(slot);
        self.restore();
    }

    /// From now on it isn't.
    pub(crate) fn cool(&self) {
        let mut slot = self.slot();
        slot.hot = None;
        self.hot.store(false, Ordering::Relaxed);
    }

    /// Asks for it to be taken again after a while, if it is one to be kept ready.
    pub(crate) fn restore_later(self: &Arc<Self>) {
        let pause = {
            let mut slot = self.slot();
            let can_be = matches!(self.word.read().state, State::New | State::Invalid | State::Faulted);
            let Some(hot) = slot.hot.as_mut().filter(|hot| can_be && !hot.waiting) else { return };
            hot.waiting = true;
            hot.next_pause(Instant::now())
        };
        let object = Arc::downgrade(self);
        self.engine.spawn_after(pause, move |cancelled| {
            if let Some(object) = object.upgrade().filter(|object| !cancelled && !object.engine.flights.is_closing()) {
                object.restore();
            }
        });
    }

    fn restore(self: &Arc<Self>) {
        if self.engine.check().is_err() {
            return;
        }
        let token = {
            let mut slot = self.slot();
            let Some(hot) = slot.hot.as_mut() else { return };
            hot.waiting = false;
            let seen = self.word.read();
            // Refused if it is valid or being acquired already. If it has just changed hands, the settle thread asks once more.
            if self.word.step(seen, Step::Enqueue).is_err() {
                return;
            }
            let token = slot.next_acquisition(&self.engine);
            slot.hot.as_mut().expect("looked at above").token = token;
            token
        };
        self.engine.note(self, What::Queued);
        let object = Arc::clone(self);
        self.engine.spawn(self.id, move |cancelled| object.work(token, cancelled));
    }

    /// Somebody waits for the acquisition that is under way: if it is a restore, it is one no more.
    pub(crate) fn adopt(&self) {
        if self.hot.load(Ordering::Relaxed)
            && let Some(hot) = &mut self.slot().hot
        {
            hot.token = 0;
        }
    }

    /// Whether this acquisition is one that nobody has asked for.
    pub(crate) fn is_restore(&self, token: u64) -> bool {
        self.hot.load(Ordering::Relaxed) && self.slot().hot.as_ref().is_some_and(|hot| hot.token == token)
    }

    /// A worker is done with this acquisition, and the object is not valid.
    pub(crate) fn not_restored(self: &Arc<Self>, token: u64) {
        if !self.is_restore(token) {
            return;
        }
        let again = {
            let slot = self.slot();
            match self.word.read().state {
                // What is short now may not be so later; what is mapped there changes with an event.
                State::Faulted => matches!(
                    slot.fault.as_ref().map(|fault| &fault.error),
                    Some(Error::Budget { .. } | Error::Watch(_) | Error::Pool(_))
                ),
                State::Invalid => true,
                _ => return,
            }
        };
        self.engine.counters.restore_failures.fetch_add(1, Ordering::Relaxed);
        if again {
            self.restore_later();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_pause_doubles_up_to_a_second_and_begins_anew_after_four_times_its_length_of_quiet() {
        let mut hot = Hot { pause: Duration::ZERO, asked: None, waiting: false, token: 0 };
        let mut now = Instant::now();
        let mut pauses = Vec::new();
        for _ in 0..13 {
            pauses.push(hot.next_pause(now).as_millis());
            now += hot.pause;
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 1000, 1000]);
        now += LONGEST * (CALM - 1);
        assert_eq!(hot.next_pause(now), LONGEST);
        now += LONGEST * CALM + SHORTEST;
        assert_eq!(hot.next_pause(now), SHORTEST);
    }
}
