//! The workers, and when one more is to be woken or made.
//!
//! Problem: too few running workers leave work waiting behind one that blocks; too many make short work twenty times
//! slower. And work queued at the very moment a worker falls asleep must not be left lying.
//!
//! Law, for each node and account, whenever the lock is free: if work is ready, then
//!
//! 1. a worker is *searching* (woken, starting, or spinning: it will take the lock and look before it sleeps), or
//! 2. as many workers as there are processors are *running*, each of which looks before it sleeps, or
//! 3. no worker sleeps that may take it and none may be started: the limit is reached, or the system refused a
//!    thread and the keeper is to try again.
//!
//! Express work needs more: as many searching workers as there is express work, or (3).
//!
//! Protocol: [`Crew::summon`] makes the law true, and is called after every change that could make it false: work
//! became ready; a searching worker found something (so that it wakes the next, and no submitter ever wakes more than
//! one); a running worker blocked, left for the other account, or turned to express work; a limit was raised. A worker
//! falls asleep under the same lock, after it has looked. So between its look and its sleep nothing can be queued, and
//! whoever queues later finds it among the idle: there is no window for a lost wake-up, and the only thing outside
//! the lock is the wake itself, which [`Parker`](crate::sync::Parker) remembers if it comes before the sleep.
//!
//! Running means counted: a worker that is inside [`blocking`](crate::blocking), that the watchdog found asleep, or
//! that does express work is not.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    effects::Effects,
    entry::{Doing, Entry},
    job::Account,
    list::List,
    slab::{NIL, Slab},
    stats::Counters,
    sync,
};

/// One account of one node. What every piece of work changes is on the first lines.
#[derive(Default)]
#[repr(C, align(128))]
pub(crate) struct AccountState {
    pub(crate) ready: List,
    pub(crate) express: List,
    pub(crate) max: u32,
    pub(crate) workers: u32,
    pub(crate) running: u32,
    /// Workers that do express work.
    pub(crate) express_running: u32,
    pub(crate) searching: u32,
    idle: Option<u32>,
    pub(crate) counters: Counters,
    /// The system refused a thread; the keeper tries again at this time.
    pub(crate) retry: Option<Instant>,
    pub(crate) failures: u32,
}

impl AccountState {
    pub(crate) fn with_max(max: u32) -> Self {
        Self { max, ..Self::default() }
    }

    /// Work that needs nothing but a worker.
    pub(crate) fn waiting(&self) -> u32 {
        self.ready.len() + self.express.len()
    }

    /// The system gave a thread.
    pub(crate) fn started(&mut self) {
        self.counters.workers_made += 1;
        self.failures = 0;
        self.retry = None;
    }

    /// The system gave none: nobody asks again before a while has passed, twice as long each time.
    pub(crate) fn refused(&mut self) {
        self.counters.workers_refused += 1;
        self.retry = Some(sync::now() + Duration::from_millis(1 << self.failures.min(9)));
        self.failures += 1;
    }
}

/// One NUMA node: both accounts, and how many processors it has.
pub(crate) struct Node {
    pub(crate) accounts: [AccountState; 2],
    pub(crate) processors: u32,
}

pub(crate) struct Crew {
    pub(crate) nodes: Box<[Node]>,
    pub(crate) workers: Vec<Entry>,
    /// Threads decided on whose start has not come back yet.
    pub(crate) spawning: u32,
    /// The keeper ticks, because work waits for running workers.
    pub(crate) watching: bool,
    privileged: bool,
}

impl Crew {
    pub(crate) fn new(nodes: Box<[Node]>, privileged: bool) -> Self {
        Self { nodes, workers: Vec::new(), spawning: 0, watching: false, privileged }
    }

    pub(crate) fn account(&self, node: u32, account: Account) -> &AccountState {
        &self.nodes[node as usize].accounts[account as usize]
    }

    pub(crate) fn account_mut(&mut self, node: u32, account: Account) -> &mut AccountState {
        &mut self.nodes[node as usize].accounts[account as usize]
    }

    /// Whether may-sleep work has no prospect of ever running: nobody of that account runs, nobody is free, the
    /// limit is reached, and the process has no right to ignore it.
    pub(crate) fn hopeless(&self, node: u32) -> bool {
        let account = self.account(node, Account::MaySleep);
        let free = Account::BOTH.iter().any(|&a| self.account(node, a).idle.is_some());
        account.running + account.express_running + account.searching == 0
            && !free
            && account.workers >= account.max
            && !self.privileged
    }

    /// Makes the law true for one account; see the head of this file.
    pub(crate) fn summon(&mut self, node: u32, account: Account, fx: &mut Effects) {
        let processors = self.nodes[node as usize].processors;
        let state = self.account(node, account);
        if state.express.len() <= state.searching {
            if state.searching > 0 || state.ready.is_empty() {
                return;
            }
            if state.running >= processors {
                // They may be blocked without having said so: have that looked at.
                if !self.watching {
                    self.watching = true;
                    fx.keeper = true;
                }
                return;
            }
        }
        let (room, retry) = (state.workers < state.max, state.retry.is_some());
        if let Some(number) = state.idle {
            self.wake(number, fx);
        } else if !room {
        } else if let Some(number) = self.account(node, account.other()).idle {
            self.move_to(number, account);
            self.wake(number, fx);
        } else if !retry {
            let Some(place) = fx.spawn.iter_mut().find(|place| place.is_none()) else {
                fx.keeper = true;
                return;
            };
            *place = Some((node, account));
            self.enlist(node, account);
        }
    }

    /// Counts a worker that is about to be started: running and searching, so that nobody starts another for the same.
    pub(crate) fn enlist(&mut self, node: u32, account: Account) {
        self.spawning += 1;
        let state = self.account_mut(node, account);
        state.workers += 1;
        state.running += 1;
        state.searching += 1;
    }

    /// Takes a worker off the idle list and has it woken; it is searching from now on.
    fn wake(&mut self, number: u32, fx: &mut Effects) {
        let Some(place) = fx.wake.iter_mut().find(|place| place.is_none()) else {
            fx.keeper = true;
            return;
        };
        *place = Some(Arc::clone(&self.workers[number as usize].worker));
        self.leave_idle(number);
        let entry = &mut self.workers[number as usize];
        entry.searching = true;
        entry.spun = false;
        let (node, account) = (entry.node, entry.account);
        let state = self.account_mut(node, account);
        state.searching += 1;
        state.counters.wake_ups += 1;
    }

    /// Changes a worker and keeps `running` of its account right.
    pub(crate) fn change(&mut self, number: u32, change: impl FnOnce(&mut Entry)) {
        let entry = &mut self.workers[number as usize];
        let (before, account_before) = (entry.counts(), entry.account);
        change(entry);
        let (after, account, node) = (entry.counts(), entry.account, entry.node);
        self.account_mut(node, account_before).running -= u32::from(before);
        self.account_mut(node, account).running += u32::from(after);
    }

    /// Moves a worker's accounting to the other account.
    pub(crate) fn move_to(&mut self, number: u32, account: Account) {
        let idle = self.workers[number as usize].doing == Doing::Idle;
        if idle {
            self.leave_idle(number);
        }
        let entry = &self.workers[number as usize];
        let (from, node) = (entry.account, entry.node);
        debug_assert!(!entry.searching);
        self.account_mut(node, from).workers -= 1;
        self.account_mut(node, account).workers += 1;
        self.change(number, |entry| entry.account = account);
        if idle {
            self.enter_idle(number);
        }
    }

    pub(crate) fn enter_idle(&mut self, number: u32) {
        self.change(number, |entry| entry.doing = Doing::Idle);
        let entry = &self.workers[number as usize];
        let (node, account) = (entry.node, entry.account);
        let next = self.account_mut(node, account).idle.replace(number).unwrap_or(NIL);
        self.workers[number as usize].idle_prev = NIL;
        self.workers[number as usize].idle_next = next;
        if next != NIL {
            self.workers[next as usize].idle_prev = number;
        }
    }

    pub(crate) fn leave_idle(&mut self, number: u32) {
        let entry = &self.workers[number as usize];
        let (node, account, prev, next) = (entry.node, entry.account, entry.idle_prev, entry.idle_next);
        if prev == NIL {
            self.account_mut(node, account).idle = (next != NIL).then_some(next);
        } else {
            self.workers[prev as usize].idle_next = next;
        }
        if next != NIL {
            self.workers[next as usize].idle_prev = prev;
        }
        self.change(number, |entry| entry.doing = Doing::Looking);
    }

    /// The worker looked, under this hold of the lock.
    pub(crate) fn stop_searching(&mut self, number: u32) -> bool {
        let entry = &mut self.workers[number as usize];
        let was = std::mem::take(&mut entry.searching);
        let (node, account) = (entry.node, entry.account);
        self.account_mut(node, account).searching -= u32::from(was);
        was
    }

    pub(crate) fn start_searching(&mut self, number: u32) {
        let entry = &mut self.workers[number as usize];
        entry.searching = true;
        entry.spun = true;
        let (node, account) = (entry.node, entry.account);
        self.account_mut(node, account).searching += 1;
    }

    pub(crate) fn any_idle(&self) -> Option<u32> {
        self.nodes.iter().flat_map(|node| &node.accounts).find_map(|account| account.idle)
    }

    /// Wakes every idle worker it has room for; call again while it says so.
    pub(crate) fn wake_idle(&mut self, fx: &mut Effects) -> bool {
        while let Some(number) = self.any_idle() {
            if fx.is_full() {
                return true;
            }
            self.wake(number, fx);
        }
        false
    }

    /// What the worker is to take next, off its list already; its accounting has been moved if need be.
    pub(crate) fn pick(&mut self, number: u32, searched: bool, slab: &mut Slab, fx: &mut Effects) -> Option<u32> {
        let entry = &self.workers[number as usize];
        let (node, own) = (entry.node, entry.account);
        let processors = self.nodes[node as usize].processors;
        let state = self.account(node, own);
        // Beyond the number of processors, because others were blocked for a while: leave the work to them.
        let surplus = !searched && state.running > processors;
        let other = self.account(node, own.other());
        let foreign = other.workers < other.max;
        let mut heads = [None; 4];
        heads[0] = state.express.head();
        if !(surplus || searched && heads[0].is_some()) {
            heads[1] = state.ready.head();
            if foreign {
                heads[2] = other.express.head();
                heads[3] = if other.running < processors { other.ready.head() } else { None };
            }
        }
        let slot = heads.into_iter().flatten().min_by_key(|&slot| slab[slot].sequence)?;
        let account = slab[slot].attributes.account;
        if account != own {
            self.move_to(number, account);
            self.summon(node, own, fx);
        }
        let state = self.account_mut(node, account);
        if slab[slot].attributes.concurrent {
            state.express.remove(slab, slot);
        } else {
            state.ready.remove(slab, slot);
        }
        Some(slot)
    }

    pub(crate) fn processors(&self, node: u32) -> u32 {
        self.nodes[node as usize].processors
    }

    pub(crate) fn nothing_ready(&self, node: u32) -> bool {
        self.nodes[node as usize].accounts.iter().all(|account| account.ready.is_empty() && account.express.is_empty())
    }

    /// Whether the node would be without a worker if this one left. Each node keeps one for good.
    pub(crate) fn is_last(&self, number: u32) -> bool {
        let node = self.workers[number as usize].node;
        Account::BOTH.iter().map(|&account| self.account(node, account).workers).sum::<u32>() == 1
    }

    /// Sees to it that a looking worker counts in `account`; false if that has no room for it.
    pub(crate) fn moves_to(&mut self, number: u32, account: Account, fx: &mut Effects) -> bool {
        let (node, own) = (self.workers[number as usize].node, self.workers[number as usize].account);
        if account == own {
            return true;
        }
        let state = self.account(node, account);
        if state.workers >= state.max {
            return false;
        }
        self.move_to(number, account);
        self.summon(node, own, fx);
        true
    }

    /// The worker's thread is about to end.
    pub(crate) fn leave(&mut self, number: u32) {
        self.change(number, |me| me.doing = Doing::Gone);
        let (node, account) = (self.workers[number as usize].node, self.workers[number as usize].account);
        let state = self.account_mut(node, account);
        state.workers -= 1;
        state.counters.workers_gone += 1;
    }
}
