//! The states of an object and the one table of what leads from which to which.
//!
//! **Problem.** Engine threads, a worker, the monitor and the last handle all move an object along, without a lock between them.
//!
//! **Law.** Nothing is used but what was valid in the same generation; a generation, once passed, never comes back.
//!
//! **Protocol.** State, generation and shards are one word. Whoever moves an object forward (claims, publishes, faults it) does so by one
//! compare-and-swap from exactly the word it noted; whoever takes it back (monitor, bracket, close) by a read-modify-write that adds one to the
//! generation and therefore makes every such compare-and-swap fail. The models in `tests/loom.rs` run on this file.

use pinfold_invalidate::Shards;
use pinfold_invalidate::sync::{AtomicU64, Ordering};

/// What an object is, as an engine sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum State {
    /// Registered, never acquired. Its pages have not been touched.
    New = 0,
    /// An acquisition waits for a worker.
    Queued = 1,
    /// An acquisition is under way.
    Acquiring = 2,
    /// The device has the pages; submits may use them.
    Valid = 3,
    /// The memory changed hands. The next acquire takes what is mapped then.
    Invalid = 4,
    /// The last acquisition failed; the next acquire says why, the one after it tries again.
    Faulted = 5,
    /// Its last handle is gone, or its manager.
    Closed = 6,
    /// The handle is one of the parent's, in a forked child. Never stored: nothing runs there that could store it.
    DeadAfterFork = 7,
}

/// What moves an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// `acquire` hands the object to a worker.
    Enqueue,
    /// `acquire` does the work itself (what is quick, or the caller would only wait for), or a worker begins anew after the generation has moved.
    Claim,
    /// A worker begins; the token is still the object's.
    Start,
    /// The pool refused, cancelled or dropped the work: waiters are woken.
    Refuse,
    /// All checks hold.
    Publish,
    /// The attempts are used up, or the acquisition was cancelled. Adds one to the generation: the builder that is cancelled may still be at it,
    /// and must not find its word again when another has claimed the object.
    Abandon,
    /// The range can't be given to the device.
    Fault,
    /// Nobody uses it, and its pages make room for others. Adds one to the generation, as another import comes next.
    Evict,
    /// The memory changed hands. Adds one to the generation.
    Invalidate,
    /// The last handle or the manager is gone. Adds one to the generation.
    Close,
}

/// Every transition there is. What is not here does not happen; [`Step::Invalidate`] of a state without a line adds to the generation only.
pub const TRANSITIONS: &[(Step, State, State)] = &[
    (Step::Enqueue, State::New, State::Queued),
    (Step::Enqueue, State::Invalid, State::Queued),
    (Step::Enqueue, State::Faulted, State::Queued),
    (Step::Claim, State::New, State::Acquiring),
    (Step::Claim, State::Invalid, State::Acquiring),
    (Step::Start, State::Queued, State::Acquiring),
    (Step::Refuse, State::Queued, State::Invalid),
    (Step::Publish, State::Acquiring, State::Valid),
    (Step::Abandon, State::Acquiring, State::Invalid),
    (Step::Fault, State::Acquiring, State::Faulted),
    (Step::Evict, State::Valid, State::Invalid),
    (Step::Invalidate, State::Acquiring, State::Invalid),
    (Step::Invalidate, State::Valid, State::Invalid),
    (Step::Close, State::New, State::Closed),
    (Step::Close, State::Queued, State::Closed),
    (Step::Close, State::Acquiring, State::Closed),
    (Step::Close, State::Valid, State::Closed),
    (Step::Close, State::Invalid, State::Closed),
    (Step::Close, State::Faulted, State::Closed),
];

impl State {
    const ALL: [Self; 8] = [
        Self::New,
        Self::Queued,
        Self::Acquiring,
        Self::Valid,
        Self::Invalid,
        Self::Faulted,
        Self::Closed,
        Self::DeadAfterFork,
    ];

    /// Where a step leads from here, by the table.
    #[must_use]
    pub fn after(self, step: Step) -> Option<Self> {
        TRANSITIONS.iter().find(|(by, from, _)| *by == step && *from == self).map(|(_, _, to)| *to)
    }
}

/// How often an object's memory has changed hands, as far as anybody noticed, or was given back. Two equal generations of one object mean the
/// same memory in the same import.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Generation(pub u64);

/// The word of an object, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Snapshot {
    /// Wraps after 2⁴⁰ changes: a million a second for twelve days while one lease is kept.
    pub generation: Generation,
    /// The state.
    pub state: State,
    /// The shards in which uses are counted; none before the first acquisition.
    pub shards: Shards,
}

impl Generation {
    pub(crate) fn next(self) -> Self {
        Self((self.0 + 1) & (u64::MAX >> GENERATION_SHIFT))
    }
}

const STATE_SHIFT: u32 = 16;
const GENERATION_SHIFT: u32 = 24;

impl Snapshot {
    fn pack(self) -> u64 {
        self.generation.0 << GENERATION_SHIFT | (self.state as u64) << STATE_SHIFT | u64::from(self.shards.0)
    }

    #[inline]
    fn unpack(word: u64) -> Self {
        let state = State::ALL[(word >> STATE_SHIFT & 7) as usize];
        Self { generation: Generation(word >> GENERATION_SHIFT), state, shards: Shards(word as u16) }
    }
}

/// State, generation and shards of one object.
#[derive(Debug)]
pub struct Word(AtomicU64);

impl Default for Word {
    fn default() -> Self {
        let new = Snapshot { generation: Generation(0), state: State::New, shards: Shards::NONE };
        Self(AtomicU64::new(new.pack()))
    }
}

impl Word {
    /// The word as it is. Acquire: pairs with the Release of whoever wrote it, so what was done before (a pin put in place) is seen.
    #[inline]
    pub fn read(&self) -> Snapshot {
        Snapshot::unpack(self.0.load(Ordering::Acquire))
    }

    /// Takes a step forward from exactly `noted`. `Err` has the word that was found instead, or the noted one if the table has no such step.
    pub fn step(&self, noted: Snapshot, step: Step) -> Result<Snapshot, Snapshot> {
        self.step_into(noted, step, noted.shards)
    }

    /// As [`step`](Self::step), and from now on uses are counted in `shards`.
    pub fn step_into(&self, noted: Snapshot, step: Step, shards: Shards) -> Result<Snapshot, Snapshot> {
        let Some(state) = noted.state.after(step) else { return Err(noted) };
        let moves = matches!(step, Step::Abandon | Step::Evict);
        let generation = if moves { noted.generation.next() } else { noted.generation };
        let next = Snapshot { generation, state, shards };
        // AcqRel: Release for what the step publishes, Acquire for what the step before it did.
        let swapped = self.0.compare_exchange(noted.pack(), next.pack(), Ordering::AcqRel, Ordering::Acquire);
        swapped.map(|_| next).map_err(Snapshot::unpack)
    }

    /// Takes the object back ([`Step::Invalidate`], [`Step::Close`]), whatever it is: the generation moves in any case. Returns the word before.
    pub fn take_back(&self, step: Step) -> Snapshot {
        let mut now = self.0.load(Ordering::Relaxed);
        loop {
            let before = Snapshot::unpack(now);
            let state = before.state.after(step).unwrap_or(before.state);
            let next = Snapshot { generation: before.generation.next(), state, ..before };
            // A read-modify-write: a publisher's compare-and-swap is ordered before or after it, never lost.
            match self.0.compare_exchange_weak(now, next.pack(), Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return before,
                Err(seen) => now = seen,
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const STEPS: [Step; 10] = [
        Step::Enqueue,
        Step::Claim,
        Step::Start,
        Step::Refuse,
        Step::Publish,
        Step::Abandon,
        Step::Fault,
        Step::Evict,
        Step::Invalidate,
        Step::Close,
    ];

    #[test]
    fn the_word_keeps_all_three_parts() {
        for state in State::ALL {
            for (generation, shards) in [(0, 0), (1, 0x8001), ((1 << 40) - 1, u16::MAX)] {
                let snapshot = Snapshot { generation: Generation(generation), state, shards: Shards(shards) };
                assert_eq!(Snapshot::unpack(snapshot.pack()), snapshot);
            }
        }
    }

    #[test]
    fn each_state_and_step_has_at_most_one_line_and_closed_is_final() {
        for state in State::ALL {
            for step in STEPS {
                let lines = TRANSITIONS.iter().filter(|line| (line.0, line.1) == (step, state)).count();
                assert!(lines <= 1, "{state:?} by {step:?}");
                assert!(lines == 0 || !matches!(state, State::Closed | State::DeadAfterFork));
            }
        }
    }

    #[test]
    fn the_word_does_what_the_table_says_in_every_cell() {
        for state in State::ALL {
            for step in STEPS {
                let start = Snapshot { generation: Generation(7), state, shards: Shards(3) };
                let word = Word(AtomicU64::new(start.pack()));
                if matches!(step, Step::Invalidate | Step::Close) {
                    assert_eq!(word.take_back(step), start);
                    let after = word.read();
                    assert_eq!(after.generation, Generation(8));
                    assert_eq!(after.state, state.after(step).unwrap_or(state));
                } else {
                    let result = word.step(start, step);
                    assert_eq!(result.is_ok(), state.after(step).is_some(), "{state:?} by {step:?}");
                    assert_eq!(word.read().state, state.after(step).unwrap_or(state));
                    let moved = matches!(step, Step::Abandon | Step::Evict) && result.is_ok();
                    assert_eq!(word.read().generation, Generation(if moved { 8 } else { 7 }));
                }
            }
        }
    }

    #[test]
    fn a_step_from_an_older_generation_is_refused() {
        let word = Word::default();
        let noted = word.read();
        word.take_back(Step::Invalidate);
        assert_eq!(word.step(noted, Step::Claim), Err(word.read()));
    }
}
