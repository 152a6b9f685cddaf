//! What the models run on: gates, an object and its pages, and the steps of engines, closers and mutators.

use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::sync::Mutex;
use loom::thread;
use pinfold_core::protocol::{self, Gates, Refusal};
use pinfold_core::state::{Snapshot, Step, Word};
use pinfold_invalidate::{Gate, HostRange, Shards, page_size};

/// Runs a model through every interleaving, or every one of at most so many preemptions.
pub(crate) fn model(preemptions: impl Into<Option<usize>>, run: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(preemptions.into());
    builder.check(run);
}

/// The contents of a page, by version.
#[derive(Default)]
pub(crate) struct Page(UnsafeCell<u32>);

impl Page {
    pub(crate) fn read(&self) -> u32 {
        // SAFETY: loom fails the model if a `change` is not ordered with this read; only then would it be one of a cell being written.
        self.0.with(|version| unsafe { *version })
    }

    pub(crate) fn change(&self) {
        // SAFETY: as in `read`; nothing else refers to the cell.
        self.0.with_mut(|version| unsafe { *version += 1 });
    }
}

/// Two gates, one object, and the two pages it is of.
#[derive(Default)]
pub(crate) struct World {
    pub(crate) gates: [Gate; 2],
    pub(crate) word: Word,
    pub(crate) pages: [Page; 2],
    /// The address space's lock, and whether a mutator is in its wait: what the probe asks.
    pub(crate) kernel: Mutex<bool>,
}

// SAFETY: the pages are the only part that isn't `Sync`, and loom checks that their accesses are ordered.
unsafe impl Sync for World {}
// SAFETY: nothing in it belongs to a thread.
unsafe impl Send for World {}

impl Gates for World {
    fn gate(&self, shard: usize) -> &Gate {
        &self.gates[shard]
    }
}

/// A page of the address space. The object is over page 1.
pub(crate) fn page(at: usize) -> HostRange {
    HostRange::new(at * page_size(), page_size()).unwrap()
}

pub(crate) const FIRST: Shards = Shards(0b01);
pub(crate) const BOTH: Shards = Shards(0b11);

/// What an engine holds: the word at which the object was valid, and the pages as the device has pinned them.
#[derive(Clone, Copy)]
pub(crate) struct Lease {
    pub(crate) noted: Snapshot,
    pub(crate) pinned: [u32; 2],
}

impl World {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// With the object valid in `shards`.
    pub(crate) fn valid(shards: Shards) -> (Arc<Self>, Lease) {
        let world = Self::new();
        let claimed = world.word.step(world.word.read(), Step::Claim).unwrap();
        let noted = world.word.step_into(claimed, Step::Publish, shards).unwrap();
        (world, Lease { noted, pinned: [0, 0] })
    }

    pub(crate) fn each_gate(&self, shards: Shards, act: impl FnMut(&Gate)) {
        shards.iter().map(|shard| self.gate(shard)).for_each(act);
    }

    // ---- engines --------------------------------------------------------------------------------------------------------------------

    /// Submits until the gates let it through or the lease is stale, uses the pages and retires. Returns whether they were used.
    pub(crate) fn submit(&self, lease: Lease) -> bool {
        loop {
            match protocol::reserve(self, std::iter::once((&self.word, lease.noted, page(1)))) {
                Ok(uses) => {
                    self.use_pages(lease);
                    uses.end(self);
                    return true;
                }
                Err(Refusal::Stale(_)) => return false,
                Err(Refusal::Closed { shard, epoch }) => assert!(self.gate(shard).wait_epoch(epoch, None)),
            }
        }
    }

    pub(crate) fn use_pages(&self, lease: Lease) {
        assert_eq!(
            [self.pages[0].read(), self.pages[1].read()],
            lease.pinned,
            "the device uses what is not there any more"
        );
    }

    pub(crate) fn look(&self) -> Snapshot {
        protocol::look(self, &self.word, page(1), || None).expect("no deadline was given")
    }

    /// One attempt to take the pages for `noted`, with the checks of the worker in their order. `shards`: where its pages are watched.
    pub(crate) fn acquire(&self, noted: Snapshot, shards: Shards) -> Option<Lease> {
        self.each_gate(shards, |gate| assert!(gate.wait_open(None)));
        if self.is_busy() {
            return None;
        }
        let pinned = {
            let _shared = self.kernel.lock().unwrap();
            [self.pages[0].read(), self.pages[1].read()]
        };
        if self.is_busy() {
            return None;
        }
        let noted = protocol::publish(self, &self.word, noted, shards)?;
        Some(Lease { noted, pinned })
    }

    /// The probe.
    pub(crate) fn is_busy(&self) -> bool {
        *self.kernel.lock().unwrap()
    }

    // ---- closers --------------------------------------------------------------------------------------------------------------------

    /// The monitor's round: close all, wait for each, read, tell, open all. `read` is what sets the mutators free.
    pub(crate) fn round<R>(&self, shards: Shards, read: impl FnOnce() -> R) -> R {
        let freed = self.read(shards, read);
        self.word.take_back(Step::Invalidate);
        self.each_gate(shards, Gate::open);
        freed
    }

    /// As [`round`](Self::round), of a change over more than is told at once: opened with its bytes untold, then told.
    pub(crate) fn long_round<R>(&self, shards: Shards, range: HostRange, read: impl FnOnce() -> R) -> R {
        let freed = self.read(shards, read);
        self.each_gate(shards, |gate| gate.leave_untold(range));
        self.each_gate(shards, Gate::open);
        if range.overlaps(page(1)) {
            self.word.take_back(Step::Invalidate);
        }
        self.each_gate(shards, Gate::told);
        freed
    }

    /// The first half of both.
    pub(crate) fn read<R>(&self, shards: Shards, read: impl FnOnce() -> R) -> R {
        self.each_gate(shards, Gate::close);
        self.each_gate(shards, |gate| assert!(gate.wait_users(None) && gate.wait_quiet(None)));
        read()
    }

    /// The bracket: every gate, and what is mutated is told before.
    pub(crate) fn bracket(&self, mutate: impl FnOnce()) {
        self.each_gate(BOTH, Gate::close);
        self.each_gate(BOTH, |gate| assert!(gate.wait_users(None)));
        let affected = self.word.read().shards;
        self.each_gate(affected, |gate| assert!(gate.wait_users(None) && gate.wait_quiet(None)));
        self.word.take_back(Step::Invalidate);
        mutate();
        self.each_gate(BOTH, Gate::open);
    }

    /// An invalidation without a mutation: nobody waits for uses.
    pub(crate) fn invalidate(&self) {
        self.each_gate(BOTH, Gate::close);
        self.each_gate(BOTH, |gate| assert!(gate.wait_users(None)));
        self.word.take_back(Step::Invalidate);
        self.each_gate(BOTH, Gate::open);
    }

    // ---- mutators -------------------------------------------------------------------------------------------------------------------

    /// Changes a page, and with the same step is out of its wait.
    pub(crate) fn zap(&self, page: usize) {
        let mut waiting = self.kernel.lock().unwrap();
        self.pages[page].change();
        *waiting = false;
    }
}

pub(crate) fn spawn(world: &Arc<World>, run: impl FnOnce(&World) + Send + 'static) -> thread::JoinHandle<()> {
    let world = Arc::clone(world);
    thread::spawn(move || run(&world))
}
