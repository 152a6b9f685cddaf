//! The three places where an object's word and its shards' gates meet: looking, publishing, reserving. Their order of steps is the protocol.
//!
//! *Look*: wait for the gates, then read the word; a look through a closed gate would see an object valid whose memory is going away.
//! *Publish*: inside the gates, one compare-and-swap from the word that was noted before the pages were taken.
//! *Reserve*: inside the gates, compare every word with its lease, and count the use before leaving.
//!
//! Nothing here allocates, blocks on anything but a gate, or calls a device; a visit lasts some dozen instructions.

use std::time::Instant;

use pinfold_invalidate::{Era, Gate, HostRange, SHARDS, Shards, Visit};

use crate::state::{Snapshot, Step, Word};

/// Where the gates are found; a seam for the models.
pub trait Gates {
    /// The gate of a shard.
    fn gate(&self, shard: usize) -> &Gate;
}

impl Gates for pinfold_invalidate::Space {
    fn gate(&self, shard: usize) -> &Gate {
        Self::gate(self, shard)
    }
}

/// The word of what lies over `range`, as it may be believed: seen with the gates of its shards open and the range told. `None` if that was not so
/// until the deadline, which is asked for only where somebody has to wait.
///
/// The shards are part of the word, so it is read once to know the gates and once more to be believed.
pub fn look<G: Gates + ?Sized>(
    gates: &G,
    word: &Word,
    range: HostRange,
    mut deadline: impl FnMut() -> Option<Instant>,
) -> Option<Snapshot> {
    loop {
        let shards = word.read().shards;
        for shard in shards.iter() {
            let gate = gates.gate(shard);
            if !gate.is_open_for(range) && !gate.wait_open_for(range, deadline()) {
                return None;
            }
        }
        let seen = word.read();
        if seen.shards == shards {
            return Some(seen);
        }
    }
}

/// Publishes an acquisition: valid, if no gate of `shards` is closed and the word is still the one noted. `shards` must not be empty.
///
/// Inside the gates, so that a closer either keeps us out or waits until the word is written and then takes it back. Also if the bytes are untold:
/// whoever looks at them waits, and then the word is taken back.
pub fn publish<G: Gates + ?Sized>(gates: &G, word: &Word, noted: Snapshot, shards: Shards) -> Option<Snapshot> {
    let _inside = enter(gates, shards).ok()?;
    word.step_into(noted, Step::Publish, shards).ok()
}

/// What the reservation found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// This gate is closed, or bytes of a lease are untold, and so they were at this epoch: sleep on it and try again.
    Closed {
        /// The shard.
        shard: usize,
        /// Its epoch, read before the gate.
        epoch: u32,
    },
    /// The word of the lease with this index has changed.
    Stale(usize),
}

/// The uses of one submit: which shards, and the era in which each began.
#[derive(Debug, Clone)]
pub struct Uses {
    shards: Shards,
    /// Of those shards; the others' mean nothing.
    eras: [Era; SHARDS],
}

/// Begins one use in every shard of the leases if all gates are open, all bytes told, and every word is the one its lease was taken at.
pub fn reserve<'a, G: Gates + ?Sized>(
    gates: &G,
    leases: impl Iterator<Item = (&'a Word, Snapshot, HostRange)> + Clone,
) -> Result<Uses, Refusal> {
    let shards = leases.clone().fold(Shards::NONE, |all, (_, noted, _)| all.union(noted.shards));
    let inside = enter(gates, shards)?;
    // Nothing is added while we are inside; once for all leases, as it is rare.
    let behind = shards.iter().filter(|&shard| gates.gate(shard).has_untold()).fold(0, |all, shard| all | 1 << shard);
    for (index, (word, noted, range)) in leases.enumerate() {
        for shard in Shards(noted.shards.0 & behind).iter() {
            let epoch = gates.gate(shard).epoch(); // as in `enter`
            if gates.gate(shard).is_untold(range) {
                return Err(Refusal::Closed { shard, epoch });
            }
        }
        if word.read() != noted {
            return Err(Refusal::Stale(index));
        }
    }
    // Counted as the visits end: a closer that waits for us to leave finds the use.
    let mut uses = Uses { shards, eras: [Era::default(); SHARDS] };
    inside.begin(&mut uses.eras);
    Ok(uses)
}

impl Uses {
    /// Ends the uses. Called once. Returns whether a hold-off had given up on one of them.
    #[allow(clippy::must_use_candidate)]
    pub fn end<G: Gates + ?Sized>(&self, gates: &G) -> bool {
        self.shards.iter().fold(false, |late, shard| gates.gate(shard).end(self.eras[shard]) | late)
    }
}

/// Visits of the gates of several shards; they end when it is dropped. Nearly always it is one, so there is no list of them.
struct Inside<'a, G: Gates + ?Sized> {
    gates: &'a G,
    entered: Shards,
}

/// Enters in ascending order of shards, also where something is untold. All or none.
#[inline]
fn enter<G: Gates + ?Sized>(gates: &G, shards: Shards) -> Result<Inside<'_, G>, Refusal> {
    let mut inside = Inside { gates, entered: Shards::NONE };
    for shard in shards.iter() {
        let gate = gates.gate(shard);
        let epoch = gate.epoch(); // before the gate, or the opening we would wait for may have been
        let Some(visit) = gate.try_enter_beside() else { return Err(Refusal::Closed { shard, epoch }) };
        visit.pause();
        inside.entered = inside.entered.union(Shards::one(shard));
    }
    Ok(inside)
}

impl<G: Gates + ?Sized> Inside<'_, G> {
    /// Ends each visit with the beginning of a use.
    #[inline]
    fn begin(mut self, eras: &mut [Era; SHARDS]) {
        for shard in std::mem::replace(&mut self.entered, Shards::NONE).iter() {
            eras[shard] = Visit::resume(self.gates.gate(shard)).begin();
        }
    }
}

impl<G: Gates + ?Sized> Drop for Inside<'_, G> {
    #[inline]
    fn drop(&mut self) {
        self.entered.iter().for_each(|shard| drop(Visit::resume(self.gates.gate(shard))));
    }
}
