use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::HashSet;
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::ThreadId;

use super::*;
use crate::fixture::{Fixture, GENEROUS};
use crate::gpu::Gpu;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// Counts allocations and frees of each thread.
struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

fn count() {
    ALLOCATIONS.set(ALLOCATIONS.get() + 1);
}

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's contract is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count();
        // SAFETY: the caller's contract is the same.
        unsafe { System.dealloc(at, layout) }
    }
}

/// What a ticket tells when it is retired.
#[derive(Debug)]
struct Told {
    tag: u64,
    outcome: Outcome,
    thread: ThreadId,
    allocations: u64,
    /// How many tickets of the setup had been signalled by then.
    signalled: usize,
}

struct Probe {
    tag: u64,
    tell: SyncSender<Told>,
    signalled: Arc<AtomicUsize>,
}

impl Retire for Probe {
    fn signal(&self, _: Outcome) {
        self.signalled.fetch_add(1, Ordering::SeqCst);
    }

    fn retire(self, outcome: Outcome) {
        let (thread, allocations) = (thread::current().id(), ALLOCATIONS.get());
        let signalled = self.signalled.load(Ordering::SeqCst);
        self.tell.send(Told { tag: self.tag, outcome, thread, allocations, signalled }).unwrap();
    }
}

struct Setup {
    completion: Completion<Probe>,
    tell: SyncSender<Told>,
    told: Receiver<Told>,
    signalled: Arc<AtomicUsize>,
    // Dropped last.
    fixture: Fixture,
}

impl Setup {
    fn new() -> Option<Self> {
        let fixture = Fixture::new()?;
        // SAFETY: the fixture outlives it, and its handles belong together.
        let gpu = Arc::new(unsafe { Gpu::new(fixture.context()) }.unwrap());
        let (tell, told) = sync_channel(1000);
        let signalled = Arc::default();
        Some(Self { completion: Completion::new(&gpu), tell, told, signalled, fixture })
    }

    fn follow(&self, semaphore: vk::Semaphore, value: u64, tag: u64) {
        self.completion.follow(
            Signal::Timeline(Timeline { semaphore, value }),
            Probe { tag, tell: self.tell.clone(), signalled: Arc::clone(&self.signalled) },
        );
    }

    fn next(&self) -> Told {
        self.told.recv_timeout(GENEROUS).expect("a ticket is retired")
    }
}

#[test]
fn tickets_are_retired_in_the_order_of_their_values_each_when_its_own_is_reached() {
    let Some(setup) = Setup::new() else { return };
    let semaphore = setup.fixture.timeline();
    // More tickets than there is room for at first, the later values first.
    let count = 3 * ROOM as u64;
    for value in (1..=count).rev() {
        setup.follow(semaphore, 2 * value, value);
    }
    for value in 1..=count {
        setup.fixture.signal(semaphore, 2 * value - 1);
        assert!(setup.told.try_recv().is_err(), "value {} is not reached", 2 * value);
        setup.fixture.signal(semaphore, 2 * value);
        let told = setup.next();
        assert_eq!((told.tag, told.outcome), (value, Outcome::Done));
    }
    setup.fixture.destroy_semaphore(semaphore);
}

#[test]
fn all_that_is_over_is_signalled_before_the_first_is_retired() {
    let Some(setup) = Setup::new() else { return };
    let semaphore = setup.fixture.timeline();
    for value in 1..=3 {
        setup.follow(semaphore, value, value);
    }
    // Retiring may wait for the allocator's lock, whose holder may wait for the last of the three.
    setup.fixture.signal(semaphore, 3);
    for value in 1..=3 {
        let told = setup.next();
        assert_eq!((told.tag, told.signalled >= 3), (value, true));
    }
    setup.fixture.destroy_semaphore(semaphore);
}

#[test]
fn a_lower_value_that_comes_later_does_not_wait_for_the_higher_one() {
    let Some(setup) = Setup::new() else { return };
    let semaphore = setup.fixture.timeline();
    setup.follow(semaphore, 10, 10);
    // The line is now in, or about to enter, a wait for 10; it must come out for 1.
    setup.follow(semaphore, 1, 1);
    setup.fixture.signal(semaphore, 1);
    assert_eq!(setup.next().tag, 1);
    setup.fixture.signal(semaphore, 10);
    assert_eq!(setup.next().tag, 10);
    setup.fixture.destroy_semaphore(semaphore);
}

#[test]
fn each_semaphore_has_its_own_thread_and_none_waits_for_another() {
    let Some(setup) = Setup::new() else { return };
    let semaphores: Vec<_> = (0..8).map(|_| setup.fixture.timeline()).collect();
    for (tag, &semaphore) in semaphores.iter().enumerate() {
        setup.follow(semaphore, 1, tag as u64);
    }
    let mut threads = Vec::new();
    for (tag, &semaphore) in semaphores.iter().enumerate().rev() {
        setup.fixture.signal(semaphore, 1);
        let told = setup.next();
        assert_eq!(told.tag, tag as u64);
        assert!(!threads.contains(&told.thread));
        threads.push(told.thread);
    }
    for semaphore in semaphores {
        setup.fixture.destroy_semaphore(semaphore);
    }
}

#[test]
fn a_line_that_ended_is_replaced_when_its_semaphore_is_used_again() {
    let Some(setup) = Setup::new() else { return };
    let semaphore = setup.fixture.timeline();
    setup.follow(semaphore, 1, 1);
    setup.fixture.signal(semaphore, 1);
    let first = setup.next().thread;
    // It ends after a while without work; nothing else removes it.
    let deadline = std::time::Instant::now() + GENEROUS;
    while !setup.completion.0.by_signal().is_empty() {
        assert!(std::time::Instant::now() < deadline, "an idle line ends");
        thread::yield_now();
    }
    setup.follow(semaphore, 2, 2);
    setup.fixture.signal(semaphore, 2);
    let told = setup.next();
    assert_eq!((told.tag, told.outcome), (2, Outcome::Done));
    assert_ne!(told.thread, first);
    setup.fixture.destroy_semaphore(semaphore);
}

#[test]
fn tickets_that_are_pending_at_the_end_are_retired_as_lost() {
    let Some(setup) = Setup::new() else { return };
    let semaphore = setup.fixture.timeline();
    setup.follow(semaphore, 1, 1);
    setup.follow(semaphore, 2, 2);
    let Setup { completion, told, fixture, .. } = setup;
    drop(completion);
    // The threads are joined: what they had to say is said.
    let outcomes: Vec<_> = told.try_iter().map(|told| (told.tag, told.outcome)).collect();
    assert_eq!(outcomes, [(1, Outcome::Lost), (2, Outcome::Lost)]);
    fixture.destroy_semaphore(semaphore);
}

#[test]
fn nothing_is_allocated_or_freed_on_the_way_to_retire() {
    let Some(setup) = Setup::new() else { return };
    let semaphore = setup.fixture.timeline();
    let count = 60;
    let mut allocations = None;
    for value in 1..=count {
        if value == count / 2 {
            // More than there is room for, while the line works.
            (0..3 * ROOM as u64).for_each(|more| setup.follow(semaphore, count + 1, count + more));
        }
        setup.follow(semaphore, value, value);
        setup.fixture.signal(semaphore, value);
        let told = setup.next();
        assert_eq!(told.tag, value);
        // The first retire warms up the channel of the test itself.
        let before = allocations.replace(told.allocations).filter(|_| value > 2);
        assert!(
            before.is_none_or(|before| before == told.allocations),
            "at value {value}: {before:?} -> {}",
            told.allocations
        );
    }
    setup.fixture.signal(semaphore, count + 1);
    while !matches!(setup.completion.0.by_signal().get(&On::Semaphore(semaphore)), Some((line, _)) if line.queue().pending.is_empty())
    {
        setup.next();
    }
    setup.fixture.destroy_semaphore(semaphore);
}

#[test]
fn the_way_out_without_a_thread_waits_in_place() {
    let Some(setup) = Setup::new() else { return };
    let semaphore = setup.fixture.timeline();
    let waiting =
        Waiting { value: 1, number: 0, ticket: Probe { tag: 1, tell: setup.tell.clone(), signalled: Arc::default() } };
    thread::scope(|scope| {
        let here = scope.spawn(|| setup.completion.wait_here(On::Semaphore(semaphore), waiting));
        assert!(!here.is_finished());
        setup.fixture.signal(semaphore, 1);
        here.join().unwrap();
    });
    assert_eq!(setup.next().outcome, Outcome::Done);
    setup.fixture.destroy_semaphore(semaphore);
}

#[test]
fn a_fence_is_used_again_as_soon_as_its_work_is_over_and_never_retires_later_work() {
    let Some(setup) = Setup::new() else { return };
    let device = &setup.fixture.device;
    // SAFETY: the device is live.
    let fence = unsafe { device.create_fence(&vk::FenceCreateInfo::default(), None) }.unwrap();
    for tag in 0..200 {
        let go = setup.fixture.timeline();
        setup.fixture.submit_fenced(&[], Some((go, 1)), fence);
        let follow = |tag| {
            let probe = Probe { tag, tell: setup.tell.clone(), signalled: Arc::clone(&setup.signalled) };
            setup.completion.follow(Signal::Fence(fence), probe);
        };
        // Two submits may end with one fence.
        follow(2 * tag);
        follow(2 * tag + 1);
        assert!(setup.told.try_recv().is_err(), "the work waits for us");
        setup.fixture.signal(go, 1);
        let told = [setup.next(), setup.next()];
        assert_eq!(told.each_ref().map(|told| (told.tag, told.outcome)), [0, 1].map(|n| (2 * tag + n, Outcome::Done)));
        // SAFETY: both submits are over.
        unsafe { device.reset_fences(&[fence]) }.unwrap();
        setup.fixture.destroy_semaphore(go);
    }
    let Setup { completion, fixture, .. } = setup;
    drop(completion);
    // SAFETY: nobody waits for it any more.
    unsafe { fixture.device.destroy_fence(fence, None) };
}

#[test]
fn semaphores_that_are_used_once_share_a_thread() {
    let Some(setup) = Setup::new() else { return };
    let mut threads = HashSet::new();
    for tag in 0..100 {
        let semaphore = setup.fixture.timeline();
        setup.follow(semaphore, 1, tag);
        setup.fixture.signal(semaphore, 1);
        let told = setup.next();
        assert_eq!((told.tag, told.outcome), (tag, Outcome::Done));
        assert!(setup.completion.0.by_signal().contains_key(&On::Semaphore(semaphore)));
        threads.insert(told.thread);
        setup.fixture.destroy_semaphore(semaphore);
    }
    // One, but that a line ends if a busy machine leaves it without work for two seconds.
    assert!(threads.len() < 50, "{} threads", threads.len());
}

/// What an engine does that has only been waiting for the end: the next semaphore has the handle of the one before, and begins with the value 1.
struct Next(Arc<Line<Self>>, Arc<AtomicUsize>);

impl Retire for Next {
    fn signal(&self, _: Outcome) {}

    fn retire(self, _: Outcome) {
        if self.1.fetch_add(1, Ordering::SeqCst) == 0 {
            let waiting = Waiting { value: 1, number: 0, ticket: Self(Arc::clone(&self.0), self.1) };
            assert!(self.0.push(On::Semaphore(vk::Semaphore::null()), waiting).is_ok());
        }
    }
}

#[test]
fn a_ticket_that_comes_while_others_are_retired_is_not_one_of_them() {
    let on = On::Semaphore(vk::Semaphore::null());
    let (line, retired) = (Arc::new(Line::new(on)), Arc::new(AtomicUsize::new(0)));
    let waiting = Waiting { value: 5, number: 0, ticket: Next(Arc::clone(&line), Arc::clone(&retired)) };
    assert!(line.push(on, waiting).is_ok());
    line.retire(5, Outcome::Done);
    assert_eq!((retired.load(Ordering::SeqCst), line.queue().pending.len()), (1, 1));
    let other = On::Fence(vk::Fence::null());
    assert!(!line.take_on(other), "it waits for a semaphore");
    line.retire(1, Outcome::Done);
    assert_eq!((retired.load(Ordering::SeqCst), line.queue().pending.len()), (2, 0));
    // Who has looked the line up before it was given to another signal has to look once more.
    assert!(line.take_on(other));
    let late = Waiting { value: 2, number: 0, ticket: Next(Arc::clone(&line), retired) };
    assert!(line.push(on, late).is_err());
}

/// Signalled for as long as the test wants, as where results are brought back.
struct Slow(SyncSender<()>, Receiver<()>);

impl Retire for Slow {
    fn signal(&self, _: Outcome) {
        self.0.send(()).unwrap();
        let _ = self.1.recv();
    }

    fn retire(self, _: Outcome) {}
}

#[test]
fn who_looks_for_a_line_waits_for_none_that_is_signalling() {
    let on = On::Semaphore(vk::Semaphore::null());
    let line = Line::new(on);
    let ((came, has_come), (go, waits), (tell, told)) = (sync_channel(1), sync_channel(1), sync_channel(1));
    assert!(line.push(on, Waiting { value: 1, number: 0, ticket: Slow(came, waits) }).is_ok());
    thread::scope(|scope| {
        let (line, go) = (&line, go);
        scope.spawn(move || line.retire(1, Outcome::Done));
        has_come.recv_timeout(GENEROUS).unwrap();
        scope.spawn(move || tell.send(line.take_on(On::Fence(vk::Fence::null()))));
        assert_eq!(told.recv_timeout(GENEROUS), Ok(false));
        drop(go);
    });
}
