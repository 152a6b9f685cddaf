//! One call over thousands of targets: who has nothing to do with it doesn't wait until all of them have been told.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pinfold_invalidate::{Change, HostRange, Shards, Space, Target};
use support::{Memory, PATIENCE, Stranger, advise, all_told, isolated, skip, unmap, wait_until};

/// Far more than are told at a time.
const MANY: usize = 4096;

/// Who is told when, and one in the middle who is not done before somebody says so.
#[derive(Default)]
struct Line {
    told: AtomicU64,
    /// The one in the middle has been reached.
    reached: AtomicBool,
    /// It may go on.
    released: AtomicBool,
}

struct Member {
    line: Arc<Line>,
    /// When it was told: after so many others; 0 if not yet.
    place: AtomicU64,
    shards: Shards,
    waits: bool,
}

impl Target for Member {
    fn invalidated(&self, _: &Change) {
        if self.waits {
            self.line.reached.store(true, Ordering::SeqCst);
            wait_until("the release of the one in the middle", || self.line.released.load(Ordering::SeqCst));
        }
        self.place.store(self.line.told.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
    }

    fn settled(self: Arc<Self>) {}

    fn shards(&self) -> Shards {
        self.shards
    }
}

impl Member {
    fn over(space: &Space, line: &Arc<Line>, range: HostRange, id: u64, shards: Shards, waits: bool) -> Arc<Self> {
        let member = Arc::new(Self { line: Arc::clone(line), place: AtomicU64::new(0), shards, waits });
        space.insert(range, id, Arc::<Self>::clone(&member));
        member
    }

    fn place(&self) -> u64 {
        self.place.load(Ordering::SeqCst)
    }
}

/// Many targets over one mapping, one of them slow to be told, and one target beside them in the same shard. Tried again as long as `then` says that
/// it came too late to see anything.
fn beside_many(test: &str, then: impl Fn(&Space, Shards, HostRange, &Line, &[Arc<Member>], &Member) -> bool) {
    isolated(test, || {
        if let Err(error) = Stranger::new() {
            return skip(test, format_args!("no userfaultfd here: {error}"));
        }
        let space = Space::get(Duration::from_secs(10)).unwrap();
        assert!((0..5).any(|_| one_beside_many(&space, &then)), "each of five times only when all had been told");
    });
}

fn one_beside_many(
    space: &Space,
    then: impl Fn(&Space, Shards, HostRange, &Line, &[Arc<Member>], &Member) -> bool,
) -> bool {
    // The other one is a part of the same mapping, and so in the same shard; a page between them is nobody's.
    let memory = Memory::new(MANY + 2);
    let (many, other) = (memory.part(0, MANY), memory.part(MANY + 1, 1));
    let line = Arc::new(Line::default());
    let _held = Member::over(space, &line, memory.0, 0, Shards::NONE, false);
    let shards = space.watch(memory.0).unwrap().shards;
    assert_eq!(shards.iter().count(), 1);
    let beside = Member::over(space, &line, other, 1, shards, false);
    let targets: Vec<_> = (0..MANY)
        .map(|at| Member::over(space, &line, memory.part(at, 1), 2 + at as u64, shards, at == MANY / 2))
        .collect();
    space.remove(memory.0, 0);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| unmap(many));
        wait_until("the one in the middle", || line.reached.load(Ordering::SeqCst));
        first.join().unwrap(); // it has been let go: whoever waits from here on is another
    });
    let seen = then(space, shards, other, &line, &targets, &beside);
    all_told(space);
    assert!(targets.iter().all(|target| target.place() > 0), "everybody has been told in the end");
    for at in 0..MANY {
        space.remove(memory.part(at, 1), 2 + at as u64);
    }
    space.remove(other, 1);
    unmap(memory.part(MANY, 2));
    std::mem::forget(memory); // all of it is unmapped
    seen
}

#[test]
fn who_looks_at_other_memory_of_the_shard_does_not_wait_until_all_have_been_told() {
    let test = "who_looks_at_other_memory_of_the_shard_does_not_wait_until_all_have_been_told";
    beside_many(test, |space, shards, other, line, targets, _| {
        // Nothing here goes on by itself: were the gate closed until all are told, this would wait for the one in the middle, and it for us.
        let open = space.wait_open_for(other, shards, Instant::now() + PATIENCE / 4);
        let soon = || Instant::now() + Duration::from_millis(1);
        let gate = space.gate(shards.iter().next().unwrap());
        let told = HostRange::new(other.start() - 100 * pinfold_invalidate::page_size(), 8192).unwrap();
        let closed = !space.wait_open_for(told, shards, soon()) && !space.wait_open(shards, soon());
        let (unnamed, beside) = (gate.try_enter().is_some(), gate.try_enter_beside().is_some());
        let last = targets[MANY - 1].place();
        line.released.store(true, Ordering::SeqCst);
        assert!(open, "other memory of the shard");
        assert!(closed && !unnamed && beside, "what has not been told is not to be seen");
        assert_eq!(last, 0);
        true
    });
}

#[test]
fn the_next_mutator_of_the_shard_does_not_wait_until_all_have_been_told() {
    let test = "the_next_mutator_of_the_shard_does_not_wait_until_all_have_been_told";
    beside_many(test, |space, shards, other, line, targets, beside| {
        std::thread::scope(|scope| {
            scope.spawn(|| advise(other, libc::MADV_DONTNEED));
            wait_until("the second mutator", || space.is_busy(shards));
            line.released.store(true, Ordering::SeqCst);
        });
        all_told(space);
        let (second, last) = (beside.place(), targets[MANY - 1].place());
        assert!(second > 0 && last > 0, "{second}, {last}");
        // A mutator counts as waiting a moment before its message is there, and on a busy machine all may have been told by then.
        second < last
    });
}
