//! The watch queue's concurrent steps, tried by loom in every order.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p pinfold-core --lib --release watch::models`

use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

use super::bell::Bell;
use super::filter::FilterEntry;
use super::record::{Record, TYPE_WORK};
use super::ring::{Push, Ring, Slots};
use super::signal::Signal;
use super::snapshot::Snapshot;
use super::turn::Turn;
use super::{Note, Scope, WatchConfig, WatchList, WatchQueue};

fn numbered(number: u64) -> Record {
    Record::new(TYPE_WORK, 0, 0, &number.to_ne_bytes()).expect("a short record")
}

fn ring(limit: usize) -> Arc<Ring> {
    let ring = Ring::new();
    ring.set_slots(Slots::new(limit)).expect("the first slots");
    Arc::new(ring)
}

fn bounded(preemptions: usize) -> loom::model::Builder {
    let mut bounded = loom::model::Builder::new();
    bounded.preemption_bound = Some(preemptions);
    bounded
}

/// Posts as a queue does.
fn post(ring: &Ring, number: u64) -> Push {
    ring.push_plainly(&numbered(number), 0).unwrap_or_else(|| ring.push_or_mark_lost(&numbered(number), 0))
}

/// Takes what is there, as a read does: a number, or `None` for a loss.
fn take(ring: &Ring) -> Option<Option<u64>> {
    // SAFETY: one thread of each model reads.
    let (reader, mut out) = (unsafe { ring.reader() }, [0; 16]);
    let copied = reader.take(&mut out, |_| false).or_else(|| {
        let next = reader.next();
        if next.lost {
            reader.report_loss(next.position);
            return Some(Ok(0));
        }
        next.record.then(|| reader.copy(next.position, &mut out).inspect(|_| reader.advance(next.position)))
    })?;
    match copied {
        Ok(0) => Some(None),
        copied => {
            assert_eq!(copied, Ok(16), "torn");
            Some(Some(Record::from_bytes(&out).expect("torn").u64_at(8)))
        }
    }
}

#[test]
fn two_posts_take_two_places_or_one_leaves_a_mark() {
    for limit in [1, 2] {
        loom::model(move || {
            let ring = ring(limit);
            let other = {
                let ring = Arc::clone(&ring);
                thread::spawn(move || post(&ring, 1))
            };
            let mine = post(&ring, 2);
            let theirs = other.join().expect("the other post");
            let mut got = std::iter::from_fn(|| take(&ring)).collect::<Vec<_>>();
            if limit == 1 {
                assert_ne!(mine == Push::Stored, theirs == Push::Stored);
                assert!(got == [Some(1), None] || got == [Some(2), None], "{got:?}");
            } else {
                got.sort_unstable();
                assert_eq!(got, [Some(1), Some(2)]);
            }
        });
    }
}

#[test]
fn a_reader_beside_a_writer_gets_each_record_once_in_order_or_a_mark() {
    loom::model(|| {
        let ring = ring(1);
        let writer = {
            let ring = Arc::clone(&ring);
            thread::spawn(move || (0..3).filter(|&number| post(&ring, number) != Push::Stored).count())
        };
        let mut got = Vec::new();
        for _ in 0..2 {
            got.extend(take(&ring));
        }
        let lost = writer.join().expect("the writer");
        got.extend(std::iter::from_fn(|| take(&ring)));
        let numbers = got.iter().copied().flatten().collect::<Vec<_>>();
        assert_eq!(numbers.len() + lost, 3);
        assert!(numbers.is_sorted_by(|a, b| a < b), "{got:?}");
        // Wherever a number is skipped, there is a mark; and there is none elsewhere.
        let mut next = 0;
        let mut marked = false;
        for entry in got.iter().copied().chain([Some(3)]) {
            match entry {
                None => marked = true,
                Some(number) => {
                    assert_eq!(marked, number > next, "{got:?}");
                    (next, marked) = (number + 1, false);
                }
            }
        }
    });
}

/// With every step of a post, or with the short way first.
fn two_writers_and_a_reader_of_one_slot(post: fn(&Ring, u64) -> Push) {
    let ring = ring(1);
    assert_eq!(post(&ring, 0), Push::Stored);
    let writers = [1, 2].map(|number| {
        let ring = Arc::clone(&ring);
        thread::spawn(move || post(&ring, number) == Push::Stored)
    });
    let mut got = Vec::new();
    got.extend(take(&ring));
    got.extend(take(&ring));
    let stored = writers.map(|writer| writer.join().expect("a writer")).into_iter().filter(|&stored| stored).count();
    got.extend(std::iter::from_fn(|| take(&ring)));
    assert_eq!(got.iter().flatten().count(), stored + 1);
    assert_eq!(got.contains(&None), stored < 2, "{got:?}");
}

#[test]
fn two_writers_and_a_reader_of_one_slot_lose_nothing_without_a_mark() {
    // Every order takes two and a half minutes, these five seconds, and they find what `scripts/mutants` breaks.
    bounded(5)
        .check(|| two_writers_and_a_reader_of_one_slot(|ring, number| ring.push_or_mark_lost(&numbered(number), 0)));
}

#[test]
fn nor_do_they_by_the_short_way() {
    // Every order would take minutes.
    bounded(4).check(|| two_writers_and_a_reader_of_one_slot(post));
}

#[test]
fn a_loss_comes_before_whichever_of_two_posts_is_next() {
    loom::model(|| {
        let ring = ring(1);
        assert_eq!(post(&ring, 0), Push::Stored);
        assert!(matches!(post(&ring, 1), Push::Full(_)));
        assert_eq!(take(&ring), Some(Some(0)));
        let other = {
            let ring = Arc::clone(&ring);
            thread::spawn(move || post(&ring, 2))
        };
        let mine = post(&ring, 3);
        let stored = if mine == Push::Stored { 3 } else { 2 };
        assert!(mine == Push::Stored || other.join().expect("the other post") == Push::Stored);
        assert_eq!([take(&ring), take(&ring)], [Some(None), Some(Some(stored))]);
    });
}

#[test]
fn a_post_after_the_end_was_seen_stores_nothing() {
    loom::model(|| {
        let ring = ring(2);
        let writer = {
            let ring = Arc::clone(&ring);
            thread::spawn(move || post(&ring, 1))
        };
        ring.close();
        let ended = ring.next().end;
        let pushed = writer.join().expect("the writer");
        assert!(!ended || pushed == Push::Defunct);
        assert_eq!(take(&ring).is_some(), pushed == Push::Stored);
        assert!(ring.next().end);
    });
}

#[test]
fn a_mark_beside_the_end_comes_before_it_or_not_at_all() {
    loom::model(|| {
        let ring = ring(1);
        assert_eq!(post(&ring, 0), Push::Stored);
        let writer = {
            let ring = Arc::clone(&ring);
            thread::spawn(move || post(&ring, 1))
        };
        ring.close();
        let mut got = std::iter::from_fn(|| take(&ring)).collect::<Vec<_>>();
        let ended = ring.next().end;
        let pushed = writer.join().expect("the writer");
        let late = std::iter::from_fn(|| take(&ring)).collect::<Vec<_>>();
        assert!(!ended || late.is_empty(), "after the end: {late:?}");
        got.extend(late);
        let expected = match pushed {
            Push::Stored => vec![Some(0), Some(1)],
            Push::Full(_) => vec![Some(0), None],
            pushed => {
                assert_eq!(pushed, Push::Defunct);
                vec![Some(0)]
            }
        };
        assert_eq!(got, expected);
        assert!(ring.next().end);
    });
}

/// Posts beside a reader that arms, and if there is something, takes it and arms again.
fn rung(posts: u64) {
    let ring = ring(2);
    let bell = Arc::new(Bell::new(Signal::new().expect("the model's signal")));
    let posts = (0..posts).map(|number| {
        let (ring, bell) = (Arc::clone(&ring), Arc::clone(&bell));
        thread::spawn(move || {
            post(&ring, number);
            bell.ring_if_armed();
        })
    });
    let posts = posts.collect::<Vec<_>>();
    if bell.arm(|| ring.next().record) {
        assert!(take(&ring).is_some());
        bell.arm(|| ring.next().record);
    }
    for post in posts {
        post.join().expect("a post");
    }
    assert!(bell.signal().is_raised() || !ring.next().record, "a record that nobody was woken for");
    // A post may have rung late, for a record that was taken already. Whoever then finds nothing has silenced the bell.
    let left = bell.arm(|| ring.next().record);
    assert_eq!(bell.signal().is_raised(), left);
}

#[test]
fn a_reader_that_has_armed_and_found_nothing_is_rung_for() {
    loom::model(|| rung(1));
}

#[test]
fn of_two_posts_one_rings() {
    // Every order of three threads is too many; two preemptions find all that a removed barrier or a reordered step breaks.
    bounded(2).check(|| rung(2));
}

/// Dropping it is a write, so that loom reports a reader that isn't over yet.
struct Tracked(UnsafeCell<u32>);

impl Drop for Tracked {
    fn drop(&mut self) {
        self.0.with_mut(|value| {
            // SAFETY: loom checks that no other access is under way or unordered.
            unsafe { *value = 0 }
        });
    }
}

// SAFETY: loom reports every access to the cell that isn't ordered.
unsafe impl Sync for Tracked {}

/// Values replaced beside this many readers. The models' threads have two seats between them, so with more than one reader somebody may have to count.
fn replaced_beside(readers: usize) {
    let value = |number| Some(Box::new(Tracked(UnsafeCell::new(number))));
    let snapshot = Arc::new(Snapshot::empty());
    drop(snapshot.replace(value(1)));
    let reader = |_| {
        let snapshot = Arc::clone(&snapshot);
        thread::spawn(move || {
            // SAFETY: loom checks that no write is under way or unordered.
            snapshot.read(|value: &Tracked| value.0.with(|value| unsafe { *value }))
        })
    };
    let readers = (0..readers).map(reader).collect::<Vec<_>>();
    drop(snapshot.replace(value(2)));
    drop(snapshot.replace(None));
    for reader in readers {
        let seen = reader.join().expect("a reader");
        assert!(matches!(seen, None | Some(1 | 2)), "{seen:?}");
    }
}

#[test]
fn a_replaced_value_is_freed_after_its_last_reader() {
    loom::model(|| replaced_beside(1));
}

#[test]
fn nor_before_the_end_of_a_look_of_its_own() {
    loom::model(|| {
        let value = |number| Some(Box::new(Tracked(UnsafeCell::new(number))));
        let snapshot = Arc::new(Snapshot::empty());
        drop(snapshot.replace(value(1)));
        let reader = {
            let snapshot = Arc::clone(&snapshot);
            thread::spawn(move || {
                seated();
                let look = snapshot.look().expect("a thread with a seat that looks at nothing");
                // SAFETY: loom checks that no write is under way or unordered.
                look.value().map(|value: &Tracked| value.0.with(|value| unsafe { *value }))
            })
        };
        drop(snapshot.replace(value(2)));
        drop(snapshot.replace(None));
        let seen = reader.join().expect("the reader");
        assert!(matches!(seen, None | Some(1 | 2)), "{seen:?}");
    });
}

#[test]
fn readers_without_a_seat_are_waited_for_too() {
    bounded(2).check(|| {
        // Somebody sits on one of the two seats already.
        let other = Snapshot::empty();
        drop(other.replace(Some(Box::new(0))));
        other.read(|_| replaced_beside(2));
    });
}

#[test]
fn it_is_one_readers_turn_at_a_time_and_who_waits_gets_it() {
    loom::model(|| {
        let shared = Arc::new((Turn::new(), Tracked(UnsafeCell::new(0))));
        let count = |shared: &(Turn, Tracked)| {
            let _taken = shared.0.take();
            shared.1.0.with_mut(|value| {
                // SAFETY: loom checks that no other access is under way or unordered.
                unsafe { *value += 1 }
            });
        };
        let other = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || count(&shared))
        };
        count(&shared);
        other.join().expect("the other reader");
        // SAFETY: loom checks that no write is under way or unordered.
        assert_eq!(shared.1.0.with(|value| unsafe { *value }), 2);
    });
}

fn watched(released: &Arc<AtomicUsize>) -> (Arc<WatchList>, WatchQueue) {
    let released = Arc::clone(released);
    let list = WatchList::with_release(move |_| {
        released.fetch_add(1, Ordering::Relaxed);
    });
    let queue = WatchQueue::new(WatchConfig::default().capacity(1)).expect("the model's signal");
    list.add_watch(&queue, Scope::All, 0).expect("the first watch");
    (Arc::new(list), queue)
}

#[test]
fn a_post_beside_a_filter_change_sees_one_of_the_two() {
    loom::model(|| {
        let (list, queue) = watched(&Arc::new(AtomicUsize::new(0)));
        queue.set_filter(Some(&[FilterEntry::all_of(1)])).expect("a sound filter");
        let poster = {
            let list = Arc::clone(&list);
            thread::spawn(move || list.post(0, &numbered(1)))
        };
        queue.set_filter(Some(&[FilterEntry::all_of(TYPE_WORK)])).expect("a sound filter");
        poster.join().expect("the post");
        let counters = queue.counters();
        assert_eq!(counters.posted + counters.filtered, 1);
        assert_eq!(queue.records().count() as u64, counters.posted);
    });
}

/// Sees to it that this thread has a seat: the short way of a post is for those that have.
fn seated() {
    Snapshot::<()>::empty().read(|()| ());
}

#[test]
fn a_post_of_a_seated_thread_beside_a_first_filter_is_stored_or_filtered_and_beside_a_sleeper_heard() {
    loom::model(|| {
        let (list, queue) = watched(&Arc::new(AtomicUsize::new(0)));
        let poster = {
            let list = Arc::clone(&list);
            thread::spawn(move || {
                seated();
                list.post(0, &numbered(1));
            })
        };
        queue.set_filter(Some(&[FilterEntry::all_of(1)])).expect("a sound filter");
        let there = queue.arm();
        poster.join().expect("the post");
        let counters = queue.counters();
        assert_eq!(counters.posted + counters.filtered, 1);
        assert!(!there || counters.posted == 1);
        assert_eq!(queue.inner.signal_is_raised(), counters.posted == 1);
        // A post after the call sees the filter.
        list.post(0, &numbered(2));
        assert_eq!(queue.counters().filtered, counters.filtered + 1);
        assert_eq!(queue.records().count() as u64, counters.posted);
    });
}

#[test]
fn a_post_beside_a_clear_is_whole_or_nothing_and_the_watch_is_released_once() {
    loom::model(|| {
        let released = Arc::new(AtomicUsize::new(0));
        let (list, queue) = watched(&released);
        let poster = {
            let list = Arc::clone(&list);
            thread::spawn(move || {
                seated();
                list.post(0, &numbered(1));
            })
        };
        queue.clear();
        list.post(0, &numbered(2));
        poster.join().expect("the post");
        assert_eq!(released.load(Ordering::Relaxed), 1);
        assert!(list.is_empty());
        let got = queue.records().map(|record| record.u64_at(8)).collect::<Vec<_>>();
        assert!(got.is_empty() || got == [1], "{got:?}");
        assert_eq!(queue.read(&mut [0; 64]), Ok(0));
    });
}

#[test]
fn a_watch_that_is_removed_and_cleared_at_once_is_released_once() {
    loom::model(|| {
        let released = Arc::new(AtomicUsize::new(0));
        let (list, queue) = watched(&released);
        let queue = Arc::new(queue);
        let remover = {
            let (list, queue) = (Arc::clone(&list), Arc::clone(&queue));
            thread::spawn(move || list.remove_watch(&queue, Scope::All).is_ok())
        };
        queue.clear();
        let removed = remover.join().expect("the remover");
        assert_eq!(released.load(Ordering::Relaxed), 1);
        assert!(list.is_empty());
        let notes = queue.notes().collect::<Vec<_>>();
        assert!(notes.is_empty() || removed && notes == [Note::Removed(None)], "{notes:?}");
    });
}
