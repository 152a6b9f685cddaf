//! The one place where a work item's state, list and timer move: as the [`table`](crate::table) says, under the lock.

use std::time::Instant;

use crate::{
    effects::Effects,
    slab::{Body, NIL, On},
    state::State,
    table::{Act, Answer, Cell, Next, Operation, Word, cell},
};

impl State {
    /// Takes a slot for an item, for as long as the item lives; there is room.
    pub(crate) fn new_item(&mut self, queue: u32) -> u32 {
        let slot = self.new_slot(queue, 0, Default::default());
        self.slab[slot].is_item = true;
        slot
    }

    /// Does `operation`, and returns what the caller is told. An operation that may make the item pending brings the
    /// item itself in `fx.item`, for the list to keep; what is not needed any more goes the same way back, to be
    /// dropped after the lock.
    pub(crate) fn transit(&mut self, slot: u32, operation: Operation, due: Option<Instant>, fx: &mut Effects) -> bool {
        let entry = &self.slab[slot];
        let running = entry.worker != NIL;
        let Cell { next, act, answer } = cell(operation, entry.item.word);
        match act {
            Act::Nothing | Act::Run | Act::LetGo => {}
            Act::Enqueue => self.enqueue(slot, running, fx),
            Act::StartTimer => self.delay(slot, due.expect("a timer has a time"), fx),
            Act::StopTimer => drop(self.stop_timer(slot)),
            Act::RestartTimer => {
                self.stop_timer(slot);
                self.delay(slot, due.expect("a timer has a time"), fx);
            }
            Act::TakeOff => self.take_off(slot, fx),
            Act::TakeOffAndStartTimer => {
                self.take_off(slot, fx);
                self.delay(slot, due.expect("a timer has a time"), fx);
            }
            Act::StopTimerAndEnqueue => {
                self.stop_timer(slot);
                self.enqueue(slot, running, fx);
            }
        }
        let word = match next {
            Next::To(word) => word,
            Next::Rest if running => Word::Exec,
            Next::Rest => Word::Idle,
        };
        self.settle(slot, word, act, fx);
        match answer {
            Answer::Yes => true,
            Answer::No => false,
            Answer::Running => running,
        }
    }

    /// Sets the word and all that follows from it: the tickets, who holds the item, who is to be told.
    fn settle(&mut self, slot: u32, word: Word, act: Act, fx: &mut Effects) {
        let is_pending = matches!(word, Word::Timer | Word::Task);
        let was_pending = self.slab[slot].item.pending != 0;
        let ticket = if is_pending && !was_pending { self.ticket() } else { 0 };
        let entry = &mut self.slab[slot];
        entry.item.word = word;
        let before = (entry.item.pending, entry.item.running);
        if ticket != 0 {
            entry.item.pending = ticket;
        }
        if act == Act::Run {
            entry.item.running = std::mem::take(&mut entry.item.pending);
        } else if !is_pending {
            entry.item.pending = 0;
        }
        if act == Act::LetGo {
            entry.item.running = 0;
            entry.worker = NIL;
        }
        let changed = before != (entry.item.pending, entry.item.running) || act == Act::LetGo;
        if changed && entry.item.waiters > 0 {
            fx.settle(slot);
        }
        // While it is pending the slot holds the item, so that it lives until it has run.
        if is_pending && matches!(entry.body, Body::Empty) {
            entry.body = Body::Item(fx.item.take().expect("what queues an item brings it"));
        } else if !is_pending
            && act != Act::Run
            && let Body::Item(item) = std::mem::replace(&mut entry.body, Body::Empty)
        {
            debug_assert!(fx.item.is_none());
            fx.item = Some(item);
        }
    }

    /// Onto its way to a worker, or, if a worker has it, a round owed by that one.
    fn enqueue(&mut self, slot: u32, running: bool, fx: &mut Effects) {
        if running {
            let entry = &self.slab[slot];
            let (node, account) = (entry.node, entry.attributes.account);
            self.crew.account_mut(node, account).counters.queued += 1;
        } else {
            self.admit(slot, fx);
        }
    }

    /// Off its way to a worker; a round owed was never on it.
    fn take_off(&mut self, slot: u32, fx: &mut Effects) {
        let entry = &self.slab[slot];
        let (node, account) = (entry.node, entry.attributes.account);
        if entry.worker == NIL {
            debug_assert_ne!(entry.on, On::Nothing);
            self.unlink(slot);
            self.release(slot, false, fx);
        }
        self.crew.account_mut(node, account).counters.cancelled += 1;
    }

    /// The item's function has returned to the worker. True if that worker is to run it again at once; otherwise it has
    /// let go of it.
    ///
    /// A round that is owed is run at once if nothing else waits; else the item takes its place at the end of the line,
    /// so that items that queue themselves hold up nobody.
    pub(crate) fn item_returned(&mut self, slot: u32, fx: &mut Effects) -> bool {
        let entry = &self.slab[slot];
        let (node, queue, owes) = (entry.node, entry.queue as usize, entry.item.word == Word::Task);
        if owes && self.crew.nothing_ready(node) && self.queues[queue].inactive.is_empty() {
            return true;
        }
        if owes {
            let entry = &mut self.slab[slot];
            entry.worker = NIL;
            entry.item.running = 0;
            if entry.item.waiters > 0 {
                fx.settle(slot);
            }
            self.release(slot, false, fx);
            self.admit(slot, fx);
        } else {
            self.transit(slot, Operation::Returns, None, fx);
            self.release(slot, false, fx);
        }
        false
    }
}
