//! What a change under the lock leaves to be done after it.

use std::{sync::Arc, time::Instant};

use crate::{
    entry::Worker,
    item::Item,
    job::{Account, Hook},
    sync,
};

/// Condition variables for those who wait for items, shared out by slot.
pub(crate) const SETTLED: u32 = 16;

/// What is to be done once the lock is released. It has room for all that one change can cause; should it ever not,
/// the keeper looks at everything.
#[derive(Default)]
pub(crate) struct Effects {
    pub(crate) wake: [Option<Arc<Worker>>; 6],
    pub(crate) spawn: [Option<(u32, Account)>; 4],
    pub(crate) keeper: bool,
    /// Something became ready.
    pub(crate) arrived: bool,
    /// A queue or the pool became empty.
    pub(crate) drained: bool,
    /// Which `settled` condition variables to notify, one bit each.
    pub(crate) settled: u32,
    /// An item on its way into its slot, or out of it to be dropped.
    pub(crate) item: Option<Arc<Item>>,
    /// The item that a worker has run, to be let go of.
    pub(crate) last: Option<Arc<Item>>,
    /// What a finished job leaves to be dropped.
    pub(crate) hook: Option<Hook>,
    now: Option<Instant>,
}

impl Effects {
    pub(crate) fn is_full(&self) -> bool {
        self.wake[3..].iter().any(Option::is_some) || self.spawn[2..].iter().any(Option::is_some)
    }

    /// What was to be woken and started has been; drops what is left to be dropped.
    pub(crate) fn forget(&mut self) {
        (self.keeper, self.arrived, self.drained, self.now) = (false, false, false, None);
        (self.item, self.last, self.hook) = (None, None, None);
    }

    /// Whether somebody is to be woken or started.
    pub(crate) fn any(&self) -> bool {
        self.wake.iter().any(Option::is_some) || self.spawn.iter().any(Option::is_some)
    }

    /// Somebody who waits for the item in `slot` is to look again.
    pub(crate) fn settle(&mut self, slot: u32) {
        self.settled |= 1 << (slot % SETTLED);
    }

    /// The time of this change. Asked for before the lock is taken, so that nobody waits for the clock.
    pub(crate) fn now(&mut self) -> Option<Instant> {
        if self.now.is_none() {
            self.now = Some(sync::now());
        }
        self.now
    }
}
