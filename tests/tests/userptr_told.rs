//! What the watch queue tells of an object, from its registration to its end.

mod userptr;

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use pinfold_core::watch::{
    FilterEntry, Note, NoteCause, NotePath, NoteState, Record, TYPE_USERPTR, UserptrEvent, UserptrNote, WatchConfig,
    WatchQueue,
};
use pinfold_core::{Access, Outcome, page_size};
use pinfold_tests::PATIENCE;
use pinfold_tests::fence::Fence;
use pinfold_tests::memory::Move;

use userptr::budget::with_budget;
use userptr::scripted::{anonymous, by_workers, lease, submit};
use userptr::{alone, register, wait_for_mutator, wait_until};

fn next(queue: &WatchQueue) -> UserptrNote {
    let mut next = None;
    wait_until("a note", || {
        next = next.take().or_else(|| queue.notes().next());
        next.is_some()
    });
    match next {
        Some(Note::Userptr(note)) => note,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_end_of_work_is_told_when_the_last_that_names_the_object_is_over() {
    let _alone = alone();
    let rig = by_workers();
    let queue = rig.manager.watch(WatchConfig::default()).unwrap();
    let region = anonymous(1);
    let object = register(&rig.manager, region.range());
    let fences = [Fence::new(), Fence::new()];
    let work = fences.each_ref().map(|fence| submit(lease(&rig, &object), std::slice::from_ref(fence)).unwrap());
    let told = || {
        let of_this = |note| matches!(note, Note::Userptr(note) if note.event == UserptrEvent::Retired);
        queue.notes().filter(|note| of_this(*note)).count()
    };
    for (nth, (fence, pending)) in fences.iter().zip(work).enumerate() {
        assert_eq!((object.in_flight() as usize, told()), (2 - nth, 0));
        fence.signal(Outcome::Done);
        assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
        wait_until("the work's end", || object.in_flight() as usize == 1 - nth);
    }
    wait_until("a note", || told() == 1);
}

#[test]
fn the_watch_queue_tells_a_whole_life() {
    let _alone = alone();
    let rig = by_workers();
    let queue = rig.manager.watch(WatchConfig::default()).unwrap();
    queue.set_filter(Some(&[FilterEntry::all_of(TYPE_USERPTR)])).unwrap();
    let region = anonymous(4);
    // SAFETY: no reference points into a region, and every mutation is held off or bracketed.
    let object = unsafe { rig.manager.register_labelled(region.range(), Access::ReadWrite, "weights") }.unwrap();
    let (id, range) = (object.id(), region.range());
    // The end of work and the change that waited for it are told by two threads, in either order.
    let (submitted, retired) = (Cell::new(0), Cell::new(0));
    let expect = |event, state, generation| {
        let note = loop {
            let note = next(&queue);
            match note.event {
                UserptrEvent::Submitted => submitted.set(submitted.get() + 1),
                UserptrEvent::Retired => retired.set(retired.get() + 1),
                _ => break note,
            }
        };
        assert_eq!((note.event, note.state, note.generation), (event, state, generation), "{note:?}");
        assert_eq!((note.object, note.label.as_str(), note.writes), (id, "weights", true));
        note
    };
    let bounds = |note: &UserptrNote| (note.start, note.end);
    let all = (range.start() as u64, range.end() as u64);

    let note = expect(UserptrEvent::Registered, NoteState::New, 0);
    assert_eq!((bounds(&note), note.path, note.cause), (all, NotePath::None, NoteCause::None));

    let acquire = |generation| {
        let held = lease(&rig, &object);
        expect(UserptrEvent::Queued, NoteState::Queued, generation);
        assert_eq!(expect(UserptrEvent::Acquired, NoteState::Valid, generation).path, NotePath::Import);
        held
    };
    // Held: for as long as the work takes, and told so.
    let fence = Fence::new();
    let pending = submit(acquire(0), std::slice::from_ref(&fence)).unwrap();
    thread::scope(|scope| {
        let mutator = scope.spawn(|| region.unmap(1..2).unwrap());
        wait_for_mutator();
        assert!(!mutator.is_finished());
        fence.signal(Outcome::Done);
    });
    assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
    let note = expect(UserptrEvent::Invalidated, NoteState::Invalid, 1);
    let hole = region.part(1..2);
    assert_eq!((bounds(&note), note.cause), ((hole.start() as u64, hole.end() as u64), NoteCause::Unmap));
    assert!(note.hold_off_ns > 0 && !note.late && !note.no_hold);

    assert_eq!(rig.manager.acquire_timeout(&[&object], PATIENCE).unwrap_err().errno(), libc::EFAULT);
    expect(UserptrEvent::Queued, NoteState::Queued, 1);
    assert_eq!(expect(UserptrEvent::Faulted, NoteState::Faulted, 1).errno, libc::EFAULT);

    region.map_over(1..2).unwrap();
    drop(acquire(1));
    rig.manager.mutate(&[region.part(0..1)], || ()).unwrap();
    let note = expect(UserptrEvent::Invalidated, NoteState::Invalid, 2);
    assert_eq!((note.cause, note.start, note.end), (NoteCause::Bracket, all.0, region.part(0..1).end() as u64));

    drop(acquire(2));
    rig.manager.invalidate(range).unwrap();
    assert_eq!(expect(UserptrEvent::Invalidated, NoteState::Invalid, 3).cause, NoteCause::Manual);

    drop(acquire(3));
    let moved = region.relocate(0..1, Move::Away).unwrap();
    assert_eq!(expect(UserptrEvent::Invalidated, NoteState::Invalid, 4).cause, NoteCause::Remap);
    drop(moved);
    let mut last = 4;
    region.map_over(0..1).unwrap();
    // A mapping that moves away is reported as moved, and then as unmapped where it was.
    let generation = object.generation().unwrap().0;
    while last < generation {
        let note = next(&queue);
        assert_eq!((note.event, note.cause), (UserptrEvent::Invalidated, NoteCause::Unmap), "{note:?}");
        last = note.generation;
    }

    drop(acquire(last));
    region.advise(0..1, libc::MADV_DONTNEED).unwrap();
    assert_eq!(expect(UserptrEvent::Invalidated, NoteState::Invalid, last + 1).cause, NoteCause::Remove);
    drop(object);
    expect(UserptrEvent::Closed, NoteState::Closed, last + 2);
    rig.device.wait_no_imports();
    assert!(queue.notes().next().is_none());
    assert_eq!((submitted.get(), retired.get()), (1, 1));
}

/// What happened, if the note is one of an object.
fn event(note: Note) -> Option<(UserptrEvent, NoteCause)> {
    match note {
        Note::Userptr(note) => Some((note.event, note.cause)),
        _ => None,
    }
}

#[test]
fn what_becomes_of_a_lease_is_told_behind_the_acquisition_that_it_is_of() {
    let _alone = alone();
    let rig = by_workers();
    let region = anonymous(1);
    let object = register(&rig.manager, region.range());
    // Keeps the worker in the middle of telling, for as many turns as another thread needs that finds the object valid.
    let (telling, submitted) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let policy = {
        let (telling, submitted) = (Arc::clone(&telling), Arc::clone(&submitted));
        move |_, record: &Record| {
            if event(record.note()).is_some_and(|(event, _)| event == UserptrEvent::Acquired) {
                telling.store(true, Ordering::SeqCst);
                (0..1000).take_while(|_| !submitted.load(Ordering::SeqCst)).for_each(|_| thread::yield_now());
            }
            true
        }
    };
    let queue = rig.manager.watch(WatchConfig::default().policy(policy)).unwrap();
    rig.manager.prefetch(&[&object]).unwrap();
    wait_until("the end of the acquisition", || telling.load(Ordering::SeqCst));
    let fence = Fence::new();
    let pending = submit(lease(&rig, &object), std::slice::from_ref(&fence)).unwrap();
    submitted.store(true, Ordering::SeqCst);
    fence.signal(Outcome::Done);
    assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
    let mut events = Vec::new();
    wait_until("all notes", || {
        events.extend(queue.notes().filter_map(|note| Some(event(note)?.0)));
        events.len() >= 4
    });
    use UserptrEvent::{Acquired, Queued, Retired, Submitted};
    assert_eq!(events, [Queued, Acquired, Submitted, Retired]);
}

#[test]
fn an_eviction_is_told_before_the_room_is_there() {
    let _alone = alone();
    let (rig, _region, objects) = with_budget(1, 2);
    drop(lease(&rig, &objects[0]));
    let seen = Arc::new(AtomicUsize::new(usize::MAX));
    let policy = {
        let (device, seen) = (rig.device.clone(), Arc::clone(&seen));
        move |_, record: &Record| {
            if event(record.note()) == Some((UserptrEvent::Invalidated, NoteCause::Evicted)) {
                seen.store(device.live_imports(), Ordering::SeqCst);
            }
            true
        }
    };
    let _queue = rig.manager.watch(WatchConfig::default().policy(policy)).unwrap();
    drop(lease(&rig, &objects[1]));
    assert_eq!(seen.load(Ordering::SeqCst), 1, "the device has given the pages back already");
    let stats = rig.manager.stats();
    assert_eq!((stats.evicted, stats.evicted_bytes), (1, page_size() as u64));
}
