//! Taking the pages: the only place that builds.
//!
//! **Problem.** Taking pages is slow, may block, and may be overtaken by a mutation at any of its steps; and a mutation that began earlier may
//! still be zapping pages while we take them.
//!
//! **Law.** An object becomes valid only if nothing has happened to its memory since before its pages were taken, and nothing that had begun
//! earlier was still going on.
//!
//! **Protocol.** In this order, each step for a reason: *note the word* → *gates open* (no event over the range is being handled) → *probe clear* (no
//! mutator whose message has been read is still in its wait) → *prepare* (aliases, before the range is watched) → *populate* (before watching: a watched range maps page-cache pages one
//! by one) → *watch* (takes the address space's lock for writing, so a zap that had it is over) → *compare the mappings* → *import* → *probe clear
//! once more* → *publish* inside the gates, from exactly the word noted. Whatever fails, what was taken is given back, and it begins anew.
//!
//! Discarded pages have a hole left: a mutator that is preempted between leaving its wait and taking the lock passes the probe and the watch.
//! If the pages were seen absent, its zap has been there. If they were seen present, the object is taken a second time after 10 ms of quiet.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pinfold_invalidate::sync::fence_after_rmw;
use pinfold_invalidate::{
    Backing, Cause, Coverage, Handful, ManualReason, Mapping, Shards, Target, WatchError, mappings,
};

use crate::discard::are_gone;
use crate::dmabuf::Reserved;
use crate::engine::On;
use crate::notes::What;
use crate::object::{Fault, Object, Pin, Slot};
use crate::populate::{Presence, populate};
use crate::room::{Charge, Room};
use crate::state::{Snapshot, State, Step};
use crate::watch::DmaBufEvent;
use crate::{Device, Error, Preparation, Request, protocol};

/// How often a worker begins anew because the memory changed hands under it.
const ATTEMPTS: u32 = 8;
/// How often room is made for one acquisition, each time twice as much: others may take what was made.
const ROUNDS: u32 = 16;
/// After this much quiet, discarded pages that were seen present are taken a second time.
const SECOND_LOOK: Duration = Duration::from_millis(10);

/// How hard to try.
#[derive(Clone, Copy)]
pub(crate) struct Effort {
    attempts: u32,
    /// Longest wait for a gate or for the probe.
    patience: Duration,
    /// Whether room that others are about to make is waited for.
    waits_for_room: bool,
    /// What has been seen of the pages.
    pages: Presence,
}

impl Effort {
    /// On a worker. A gate is closed for one hold-off at most, and the probe busy for as long; many of them in a row end in `Again`.
    pub(crate) const WORKER: Self =
        Self { attempts: ATTEMPTS, patience: Duration::from_secs(10), waits_for_room: true, pages: Presence::Unknown };

    /// On the caller's thread: one attempt, no waiting but for room, by who waits anyway.
    fn here(pages: Presence, waits_for_room: bool) -> Self {
        Self { attempts: 1, patience: Duration::ZERO, waits_for_room, pages }
    }
}

/// How one attempt ended.
enum Attempt {
    /// The object is valid.
    Valid,
    /// The memory changed hands meanwhile.
    Moved,
    /// A gate was closed or a mutation in flight, for longer than our patience.
    Crowded,
    /// Not that. Begin anew at once with what has been learnt (shards, an alias); doesn't count.
    Anew,
}

/// What is learnt in one attempt and useful in the next.
struct Learnt<D: Device> {
    shards: Shards,
    /// Prepared while the range was unwatched, for exactly these mappings.
    prepared: Option<(D::Prepared, Handful<Mapping>)>,
    /// Counted before anything is taken, and kept while it begins anew.
    charge: Option<Charge<D>>,
    /// How often room has been made.
    rounds: u32,
    /// How many imports had been given back when the attempt began.
    returned: u64,
    /// From the first time that there was no room.
    short: Option<On<D>>,
    /// Nobody has asked for it: who is short waits until it is done, and takes its pages then.
    restore: Option<On<D>>,
    /// Whoever ends the acquisition counts this builder as loose, which takes itself out when it has given back what it had.
    is_building: bool,
}

impl<D: Device> Learnt<D> {
    /// Gives back what an attempt that failed has left for the next, and waits for room no more.
    fn let_go(&mut self) {
        self.prepared = None;
        self.charge = None;
        self.short = None;
    }
}

impl<D: Device> Object<D> {
    /// What a worker does with a queued object. `token` tells whether it is still *the* work of the object.
    pub(crate) fn work(self: &Arc<Self>, token: u64, cancelled: bool) {
        let cancelled = cancelled || self.engine.flights.is_closing();
        let Some(noted) = self.begin(token, if cancelled { Step::Refuse } else { Step::Start }) else { return };
        if cancelled {
            self.fail(&mut self.slot(), Error::Cancelled, token);
            self.wake();
        } else if !self.build(noted, token, Effort::WORKER) {
            self.not_restored(token);
        }
    }

    /// `None`: superseded, and whoever did so has told the waiters.
    fn begin(&self, token: u64, step: Step) -> Option<Snapshot> {
        let mut slot = self.slot();
        loop {
            let seen = self.word.read();
            if slot.token != token || seen.state != State::Queued {
                return None;
            }
            if let Ok(noted) = self.word.step(seen, step) {
                slot.is_built = step == Step::Start;
                return Some(noted); // else: the generation of a queued object may move at any time
            }
        }
    }

    /// Takes the pages of an object that this thread has claimed. Returns whether it is valid now; waiters have been told in any case.
    pub(crate) fn build(self: &Arc<Self>, mut noted: Snapshot, token: u64, effort: Effort) -> bool {
        // Here and not by a worker: what it was counted with may be just what is needed, here or by others, who wait for it. The first acquisition
        // finds none.
        if token > 1 {
            self.engine.loose.add(0);
            self.take_stale_pin().and_then(Arc::into_inner).map(Pin::release);
            self.engine.loose.sub(0);
        }
        let mut learnt = Learnt {
            shards: noted.shards,
            prepared: None,
            charge: None,
            rounds: 0,
            returned: 0,
            short: None,
            restore: self.is_restore(token).then(|| On::loose(&self.engine)),
            is_building: true,
        };
        let (mut moved, mut anew) = (0, 0);
        loop {
            learnt.returned = self.engine.returned.load(Ordering::Relaxed);
            match self.attempt(noted, token, &mut learnt, effort) {
                Ok(Attempt::Valid) => {
                    self.wake();
                    return true;
                }
                Ok(Attempt::Moved) => moved += 1,
                Ok(Attempt::Crowded) => moved = effort.attempts,
                Ok(Attempt::Anew) => anew += 1,
                Err(error) => match self.find_room(&error, token, &mut learnt, effort) {
                    Room::Made => anew = 0,
                    Room::Coming if !effort.waits_for_room => moved = effort.attempts, // a worker waits
                    Room::Coming | Room::Nowhere => {
                        learnt.let_go(); // first: who is told finds the room that this would have taken, and nothing left open
                        if self.fault(noted, token, error) {
                            self.wake();
                            return false;
                        }
                        moved += 1; // what failed was not what is mapped now
                    }
                },
            }
            self.engine.counters.retries.fetch_add(1, Ordering::Relaxed);
            let spent = moved >= effort.attempts || anew > ATTEMPTS;
            if spent {
                learnt.let_go();
            }
            let Some(again) = self.reclaim(noted, token, spent) else {
                learnt.let_go(); // before anybody is told
                self.stop_building(token, &mut learnt);
                self.wake();
                return false;
            };
            noted = again;
            learnt.is_building = true;
        }
    }

    /// Notes the word anew, or abandons the object if the attempts are `spent`. `None`: the object is not this builder's any more (cancelled,
    /// closed, or begun by somebody else meanwhile).
    fn reclaim(&self, noted: Snapshot, token: u64, spent: bool) -> Option<Snapshot> {
        let mut slot = self.slot();
        // The word alone doesn't tell: after a cancel, the next builder's looks the same.
        if slot.token != token {
            return None;
        }
        if spent {
            let _ = self.word.step(noted, Step::Abandon); // or it is Invalid already
            return None;
        }
        let seen = self.word.read();
        let again = match seen.state {
            State::Acquiring if seen == noted => Some(seen),
            State::Invalid => self.word.step(seen, Step::Claim).ok(),
            _ => None,
        };
        slot.is_built |= again.is_some();
        again
    }

    /// The builder has nothing that others lack. Whoever ends the acquisition from now on doesn't count it as loose; who has done so finds it gone.
    /// Returns whether the object is still this builder's.
    fn stop_building(&self, token: u64, learnt: &mut Learnt<D>) -> bool {
        let mut slot = self.slot();
        let was_building = std::mem::take(&mut learnt.is_building);
        let is_ours = slot.token == token;
        if is_ours {
            slot.is_built = false;
        } else if was_building {
            drop(slot);
            self.engine.loose.sub(0);
        }
        is_ours
    }

    /// Ends the acquisition by an error. False: the object has changed hands meanwhile, or is not this builder's any more.
    fn fault(&self, noted: Snapshot, token: u64, error: Error) -> bool {
        let mut slot = self.slot();
        let ours = slot.token == token && self.word.step(noted, Step::Fault).is_ok();
        if ours {
            slot.is_built = false;
            self.fail(&mut slot, error, token);
        }
        ours
    }

    fn attempt(
        self: &Arc<Self>,
        noted: Snapshot,
        token: u64,
        learnt: &mut Learnt<D>,
        effort: Effort,
    ) -> Result<Attempt, Error> {
        let space = &self.engine.space;
        let shards = if learnt.shards.is_empty() { Shards::ALL } else { learnt.shards };
        if !space.is_clear(self.range, shards) {
            let patience = Instant::now() + effort.patience;
            if !space.wait_open_for(self.range, shards, patience) || !space.wait_settled(shards, patience) {
                return Ok(Attempt::Crowded);
            }
        }
        if let Some(reserved) = &self.dmabuf {
            return self.take_dmabuf(reserved, noted, token, learnt);
        }
        let discarded = self.discarded.since_taken(self.range);
        // Asked before anything is populated: absent pages prove that the zap is over.
        let unproven = discarded.is_some_and(|part| !are_gone(part));

        let before = mappings(self.range)?;
        refuse_special(&before)?;
        let Some(prepared) = self.prepare(&before, learnt)? else { return Ok(Attempt::Anew) };
        if learnt.charge.is_none() {
            match self.engine.charge(self.range, self.is_restore(token)) {
                Ok(charge) => learnt.charge = Some(charge),
                Err(error) => {
                    learnt.prepared = Some((prepared, before));
                    return Err(error);
                }
            }
        }
        if discarded.is_none() {
            populate(self.range, self.access, &before, effort.pages)?;
        }
        let Some((watched, coverage, after)) = self.watch(&before)? else { return Ok(Attempt::Moved) };
        if !shards.covers(watched) {
            // Pages of a shard whose gate and probe were not looked at above.
            learnt.shards = shards.union(watched);
            learnt.prepared = Some((prepared, before));
            return Ok(Attempt::Anew);
        }
        if !same_memory(&before, &after) {
            return Ok(Attempt::Moved);
        }
        learnt.shards = watched;
        if discarded.is_some() {
            populate(self.range, self.access, &after, Presence::Unknown)?; // what the mutator has dropped meanwhile, too
        }
        let request =
            Request { coverage: Some(coverage), discarded: discarded.is_some(), ..self.request(&after, true) };
        let import = self.engine.device().import(&request, prepared)?;
        let charge = learnt.charge.take().expect("an attempt that got this far has been counted");
        learnt.short = None; // it has its room, and whoever sees it valid sees nobody short any more
        let pin = Pin::new(import, noted.generation, charge);
        let published =
            if space.is_busy(watched) { Err(pin) } else { self.publish(noted, token, watched, coverage, pin) };
        if let Err(pin) = published {
            pin.release();
            return Ok(Attempt::Moved);
        }
        fence_after_rmw(); // between our change of the word and our look at `lost`; partner: `Engine::lose`
        if self.engine.is_lost() {
            self.give_up();
        }
        self.discarded.take(noted.generation);
        if unproven {
            self.look_again(noted);
        }
        Ok(Attempt::Valid)
    }

    /// What has come of it, where an acquisition ended by this error and that is for want of room.
    fn find_room(&self, error: &Error, token: u64, learnt: &mut Learnt<D>, effort: Effort) -> Room {
        let &Error::Budget { needed, available, .. } = error else { return Room::Nowhere };
        if learnt.rounds == ROUNDS || !self.engine.can_fit(self.range) || self.is_restore(token) {
            return Room::Nowhere;
        }
        learnt.restore = None; // somebody has asked meanwhile, and it waits for others now
        // Who waits has nothing that is waited for, least of all by itself.
        if learnt.charge.take().is_some() {
            learnt.returned += 1; // its own, which isn't the room it looks for
        }
        if !self.stop_building(token, learnt) {
            return Room::Nowhere; // for nobody
        }
        learnt.short.get_or_insert_with(|| On::short(&self.engine));
        let short = needed.saturating_sub(available).max(1).saturating_mul(1 << learnt.rounds);
        learnt.rounds += 1;
        let patience = if effort.waits_for_room { self.engine.patience() } else { Duration::ZERO };
        self.engine.make_room(short, self.last_used.load(Ordering::Relaxed), learnt.returned, patience)
    }

    /// Takes a dma-buf. There is nothing to populate and nothing to watch: its pages stay until everybody has closed it.
    fn take_dmabuf(
        self: &Arc<Self>,
        reserved: &Reserved,
        noted: Snapshot,
        token: u64,
        learnt: &mut Learnt<D>,
    ) -> Result<Attempt, Error> {
        let charge = match learnt.charge.take() {
            Some(charge) => charge,
            None => self.engine.charge(self.range, self.is_restore(token))?,
        };
        let part = &reserved.part;
        let import = self.engine.device().import_dmabuf(&self.request(&[], false), part)?;
        learnt.short = None; // as for mapped memory
        let pin = Pin::new(import, noted.generation, charge);
        let home = self.engine.space.home(self.range);
        if let Err(pin) = self.publish(noted, token, home, Coverage::Manual(ManualReason::NotMapped), pin) {
            pin.release();
            return Ok(Attempt::Moved);
        }
        fence_after_rmw(); // as for mapped memory
        if self.engine.is_lost() {
            self.give_up();
        }
        Ok(Attempt::Valid)
    }

    /// What must be done before the range is watched. `None`: done, but it moved the generation.
    fn prepare(&self, before: &Handful<Mapping>, learnt: &mut Learnt<D>) -> Result<Option<D::Prepared>, Error> {
        if let Some((prepared, mappings)) = learnt.prepared.take()
            && same_memory(&mappings, before)
        {
            return Ok(Some(prepared));
        }
        let space = &self.engine.space;
        // Private memory has no alias.
        let watched = before.iter().any(|mapping| mapping.shared) && space.is_watched(self.range);
        match self.engine.device().prepare(&self.request(before, watched))? {
            Preparation::Ready(prepared) => Ok(Some(prepared)),
            Preparation::NeedsUnwatched => {
                let request = self.request(before, false);
                if let Preparation::Ready(prepared) =
                    space.unwatched(self.range, || self.engine.device().prepare(&request))??
                {
                    learnt.prepared = Some((prepared, before.clone()));
                }
                Ok(None)
            }
        }
    }

    /// `None`: the mappings have changed meanwhile.
    fn watch(&self, before: &Handful<Mapping>) -> Result<Option<(Shards, Coverage, Handful<Mapping>)>, Error> {
        // Acquire: pairs with the export that clears it.
        if self.unwatched.load(Ordering::Acquire) {
            let home = self.engine.space.home(self.range);
            return Ok(Some((home, Coverage::Manual(ManualReason::Asked), before.clone())));
        }
        match self.engine.space.watch_as(self.range, before) {
            Ok(watched) => Ok(Some((watched.shards, watched.coverage, watched.mappings))),
            Err(WatchError::Moving { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    pub(crate) fn request<'a>(&'a self, mappings: &'a [Mapping], watched: bool) -> Request<'a> {
        Request {
            watched,
            policy: self.policy(),
            used: self.used(),
            group: self.group(),
            part: self.part,
            id: self.id,
            label: &self.label,
            ..Request::new(self.range, self.access, mappings)
        }
    }

    /// Makes the object valid with this pin, or hands the pin back. Under the object lock, and only if the acquisition is still *the* one of the
    /// object: one that was cancelled or overtaken touches neither the word nor the pin of its successor.
    fn publish(
        &self,
        noted: Snapshot,
        token: u64,
        shards: Shards,
        coverage: Coverage,
        pin: Pin<D>,
    ) -> Result<(), Pin<D>> {
        let mut slot = self.slot();
        if slot.token != token || protocol::publish(&*self.engine.space, &self.word, noted, shards).is_none() {
            return Err(pin);
        }
        slot.coverage = Some(coverage);
        slot.fault = None;
        slot.is_built = false;
        // Counted and told here: it may be taken back at once, and a lease of it is taken under the same lock, so that what its work tells comes later.
        self.imports.fetch_add(1, Ordering::Relaxed);
        if slot.hot.as_ref().is_some_and(|hot| hot.token == token) {
            self.engine.counters.restored.fetch_add(1, Ordering::Relaxed);
        }
        if let Some(reserved) = &self.dmabuf {
            self.engine.counters.dmabufs_imported.fetch_add(1, Ordering::Relaxed);
            self.engine.note_dmabuf(self, DmaBufEvent::Imported, &reserved.part);
        }
        self.engine.note(self, What::Acquired(pin.path, noted.generation));
        let stale = slot.pin.replace(Arc::new(pin));
        drop(slot); // dropping a pin asks for a worker
        drop(stale);
        Ok(())
    }

    /// Stores the error of an acquisition, under the object lock and together with the step of the word. The caller then wakes who waits.
    pub(crate) fn fail(&self, slot: &mut Slot<D>, error: Error, token: u64) {
        if error.is_lost() {
            self.engine.lose();
        }
        self.engine.counters.faults.fetch_add(1, Ordering::Relaxed);
        self.engine.note(self, What::Faulted(error.errno()));
        let told = slot.hot.as_ref().is_some_and(|hot| hot.token == token); // nobody has asked
        slot.fault = Some(Fault { error, token, told });
    }

    /// Takes the pages once more after a while, unless something else happens to the object first.
    fn look_again(self: &Arc<Self>, noted: Snapshot) {
        let object = Arc::downgrade(self);
        self.engine.spawn_after(SECOND_LOOK, move |cancelled| {
            let Some(object) = object.upgrade().filter(|object| !cancelled && !object.engine.flights.is_closing())
            else {
                return;
            };
            let now = object.word.read();
            if now.state == State::Valid && now.generation == noted.generation {
                object.engine.counters.second_looks.fetch_add(1, Ordering::Relaxed);
                let _ = object.engine.space.invalidate(object.range, Cause::Unproven);
            }
        });
    }

    /// How the pages are taken at once, where a worker isn't worth its wake-up: up to `limit` bytes that are in memory.
    pub(crate) fn quick(&self, limit: usize, waits_for_room: bool) -> Option<Effort> {
        if self.range.len() > limit || self.dmabuf.is_some() {
            return None;
        }
        let pages = Presence::of(self.range);
        (pages != Presence::Unknown).then(|| Effort::here(pages, waits_for_room))
    }
}

/// Nobody is given the kernel's own pages and mappings of devices: some can be pinned and read, but neither watched nor relied upon.
fn refuse_special(mappings: &[Mapping]) -> Result<(), Error> {
    let Some(special) = mappings.iter().find(|mapping| mapping.backing == Backing::Special) else { return Ok(()) };
    let why = "it is device memory or a page of the kernel's own; a device can only be given ordinary memory";
    Err(Error::Fault { range: special.range, why, errno: libc::EFAULT })
}

/// Whether the range shows the same memory in both lists. How far the mappings reach beyond the range doesn't matter: watching splits them.
fn same_memory(a: &[Mapping], b: &[Mapping]) -> bool {
    let parts = |mapping: &Mapping| {
        let Mapping { range, whole: _, protection, shared, backing, file, offset } = *mapping;
        (range, protection, shared, backing, file, offset)
    };
    a.iter().map(parts).eq(b.iter().map(parts))
}
