//! Making room: objects that nobody uses give their pages back to those that are asked for.
//!
//! **Problem.** What may be pinned is limited: by the program's own budget, by `RLIMIT_MEMLOCK` where the device locks memory, by the device.
//! An engine that registers more than that uses little of it at a time.
//!
//! **Law.** An object is evicted only while no lease and no work names its pages, and only for somebody who was asked for after it was last
//! used. So what is acquired together never evicts its own, and a set that doesn't fit is an error and not a dance.
//!
//! **Protocol.** Each acquire stamps its objects with its own number. Whoever is short lets go of what is dead already, then takes the oldest
//! stamps: under the object lock, if the slot's is the only reference to the pages, the word goes from exactly *valid* to *invalid, next
//! generation* and the pages leave the slot. Leases take their reference under the same lock. An object that is kept ready wants its pages back at once: until
//! whoever was short has his, it gets none, and what it had begun to take is waited for and taken. So is what somebody takes whose acquisition has
//! been cancelled, closed or begun anew meanwhile: he gives it back as soon as he finds out. Finding the oldest is one walk over all objects
//! for the next [`VICTIMS`] evictions, so the threads that acquire and submit pay a store each and keep no list.

use std::collections::BinaryHeap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use pinfold_invalidate::{HostRange, Target};

use crate::engine::Engine;
use crate::notes::What;
use crate::object::{Object, Taken};
use crate::state::{State, Step};
use crate::{Device, Error};

/// Candidates that one walk finds.
const VICTIMS: usize = 256;

/// The next to be evicted, oldest last, each with the stamp it was found with.
pub(crate) type Victims<D> = Mutex<Vec<(Age, Weak<Object<D>>)>>;

/// Who goes first: what the engine wants kept ready goes last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Age {
    hot: bool,
    last_used: u64,
}

/// Bytes counted against the limits until dropped.
pub(crate) struct Charge<D: Device> {
    pub(crate) engine: Arc<Engine<D>>,
    pub(crate) bytes: u64,
    locked: u64,
}

/// What came of a search for room.
pub(crate) enum Room {
    /// Something has been given back since there was none, by whomever.
    Made,
    /// Nothing yet. Somebody may be about to.
    Coming,
    Nowhere,
}

impl<D: Device> Drop for Charge<D> {
    fn drop(&mut self) {
        if self.locked > 0 {
            self.engine.locked.sub(self.locked);
        }
        self.engine.pins.sub(self.bytes);
        self.engine.returned.fetch_add(1, Ordering::Relaxed);
    }
}

impl<D: Device> Engine<D> {
    /// Counts an import of the range before it is made, so that acquisitions side by side don't exceed a limit together. A restore finds no room
    /// while somebody else is short.
    pub(crate) fn charge(self: &Arc<Self>, range: HostRange, restore: bool) -> Result<Charge<D>, Error> {
        let (bytes, locked) = (range.len() as u64, self.device().locked_bytes(range));
        let over = |what, needed, available| Error::Budget { range, what, needed, available };
        let budget = |left| over("the configured budget for imported memory", bytes, left);
        if restore && self.short.count() > 0 {
            return Err(budget(0));
        }
        self.pins.try_add(bytes, self.config.budget).map_err(budget)?;
        if locked > 0
            && let Err(left) = self.locked.try_add(locked, crate::limits::lockable())
        {
            self.pins.sub(bytes);
            return Err(over("memory that may be locked (RLIMIT_MEMLOCK)", locked, left));
        }
        Ok(Charge { engine: Arc::clone(self), bytes, locked })
    }

    /// Whether an import of the range can be made at all, whoever is evicted for it.
    pub(crate) fn can_fit(&self, range: HostRange) -> bool {
        let locked = self.device().locked_bytes(range);
        range.len() as u64 <= self.config.budget && (locked == 0 || locked <= crate::limits::lockable())
    }

    /// Gives `bytes` back to the device, of objects last used before the acquire with this number. `seen` is how many charges had been returned
    /// when it was found that there is no room. What others are about to give back is waited for, for as long as `patience`.
    pub(crate) fn make_room(self: &Arc<Self>, bytes: u64, before: u64, seen: u64, patience: Duration) -> Room {
        let evicted = |object: &Object<D>, bytes| {
            self.counters.evicted.fetch_add(1, Ordering::Relaxed);
            self.counters.evicted_bytes.fetch_add(bytes, Ordering::Relaxed);
            self.note(object, What::Evicted);
        };
        let freed = self.reap(usize::MAX);
        if freed >= bytes || freed + self.evict(bytes - freed, before, evicted) > 0 {
            return Room::Made;
        }
        // What others are just letting go of is room, too, and so is what is just being restored, or taken for an acquisition that is over. Pages that
        // nobody uses go from their object into somebody's hands, from there to the graveyard, from there into somebody's hands again, and then are
        // given back. They are looked for in this order, so they can't slip by.
        let deadline = Instant::now() + patience;
        if self.loose.wait_none(deadline) && self.reap(usize::MAX) > 0 {
            return Room::Made;
        }
        let quiet = self.loose.wait_none(deadline);
        if self.returned.load(Ordering::Relaxed) != seen || self.evict(bytes, before, evicted) > 0 {
            return Room::Made;
        }
        if quiet { Room::Nowhere } else { Room::Coming }
    }

    /// Gives idle objects' pages back, the least recently used first, until it is `bytes` or nothing is left. Returns how many it was.
    pub(crate) fn shrink(self: &Arc<Self>, bytes: u64) -> u64 {
        let evicted = |object: &Object<D>, bytes| {
            self.counters.shrunk_bytes.fetch_add(bytes, Ordering::Relaxed);
            self.note(object, What::Evicted);
        };
        let mut freed = self.reap(usize::MAX);
        if freed < bytes {
            freed += self.evict(bytes - freed, u64::MAX, evicted);
        }
        freed
    }

    fn evict(self: &Arc<Self>, bytes: u64, before: u64, evicted: impl Fn(&Object<D>, u64)) -> u64 {
        let mut freed = 0;
        while freed < bytes {
            let Some((age, object)) = self.next_victim(before) else { break };
            // Used since it was found: somebody else's turn.
            if object.age() != age {
                continue;
            }
            // Counted, so that who is short meanwhile waits for what is in our hands.
            self.loose.add(0);
            let given = object.evict(&evicted).map(Taken::give_back);
            self.loose.sub(0);
            if let Some(given) = given {
                freed += given;
                object.restore_later();
            }
        }
        freed
    }

    fn next_victim(self: &Arc<Self>, before: u64) -> Option<(Age, Arc<Object<D>>)> {
        let mut victims = self.victims.lock().unwrap_or_else(PoisonError::into_inner);
        for walked in [false, true] {
            while let Some((age, object)) = victims.pop() {
                if let Some(object) = object.upgrade().filter(|_| age.last_used < before) {
                    return Some((age, object));
                }
            }
            if !walked {
                *victims = self.find_victims(before);
            }
        }
        None
    }

    fn find_victims(self: &Arc<Self>, before: u64) -> Vec<(Age, Weak<Object<D>>)> {
        let mut oldest: BinaryHeap<(Age, u64)> = BinaryHeap::new();
        let mut found = std::collections::HashMap::new();
        self.each_object(|object, target| {
            let (age, id) = (object.age(), object.id);
            let late = oldest.len() == VICTIMS && oldest.peek().is_some_and(|youngest| *youngest <= (age, id));
            if late || age.last_used >= before || !object.is_idle() {
                return;
            }
            if oldest.len() == VICTIMS
                && let Some((_, id)) = oldest.pop()
            {
                found.remove(&id);
            }
            oldest.push((age, id));
            found.insert(id, Arc::clone(target));
        });
        let oldest_last = oldest.into_sorted_vec().into_iter().rev();
        let weak = |target: Arc<dyn Target>| Some(Arc::downgrade(&Object::of(target)?));
        oldest_last.filter_map(|(age, id)| Some((age, weak(found.remove(&id)?)?))).collect()
    }

    /// Bytes that [`shrink`](Self::shrink) could give back.
    pub(crate) fn idle_bytes(self: &Arc<Self>) -> u64 {
        let mut bytes = 0;
        self.each_object(|object, _| bytes += if object.is_idle() { object.range.len() as u64 } else { 0 });
        bytes
    }
}

impl<D: Device> Object<D> {
    fn age(&self) -> Age {
        if self.word.read().state != State::Valid {
            return Age { hot: false, last_used: 0 }; // what is left of its pages is nobody's
        }
        Age { hot: self.hot.load(Ordering::Relaxed), last_used: self.last_used.load(Ordering::Relaxed) }
    }

    /// Whether it has pages that nobody uses.
    fn is_idle(&self) -> bool {
        self.slot().pin.as_ref().is_some_and(|pin| Arc::strong_count(pin) == 1)
    }

    /// Takes the pages of an idle object, which is then invalid. The caller lets go of them. Where it was valid, `evicted` is called with their
    /// bytes: before the room is there, and before anybody acquires it anew.
    fn evict(&self, evicted: impl Fn(&Self, u64)) -> Option<Taken<D>> {
        let mut slot = self.slot();
        let pin = slot.pin.as_ref().filter(|pin| Arc::strong_count(pin) == 1)?;
        let seen = self.word.read();
        // Pages of an earlier generation are nobody's already, and are only waiting to be collected.
        let was_valid = seen.state == State::Valid && seen.generation == pin.generation;
        if was_valid {
            self.word.step(seen, Step::Evict).ok()?;
            evicted(self, self.range.len() as u64);
        }
        Arc::into_inner(slot.pin.take()?)?.into_taken()
    }
}
