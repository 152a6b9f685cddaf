//! Four writers against a slow reader: nothing is torn, repeated, reordered, or missing without a mark.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pinfold_core::watch::{
    FilterEntry, MAX_RECORD_LEN, META_LOSS, ReadError, Record, Scope, TYPE_META, TYPE_WORK, WatchConfig, WatchList,
    WatchQueue, records,
};

const WRITERS: usize = 4;
const EACH: u64 = 100_000;

/// A record of changing length whose every byte follows from its writer and number.
fn record(writer: usize, number: u64) -> Record {
    let mut payload = [0; MAX_RECORD_LEN - 8];
    payload[..8].copy_from_slice(&number.to_ne_bytes());
    for (at, byte) in payload.iter_mut().enumerate().skip(8) {
        *byte = filler(writer, number, at);
    }
    let len = 8 + (number % 112) as usize;
    Record::new(TYPE_WORK, writer as u8, 0, &payload[..len]).expect("at most 119 bytes")
}

fn filler(writer: usize, number: u64, at: usize) -> u8 {
    (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u8 ^ (at + 31 * writer) as u8
}

/// What a reader has seen of the writers so far.
#[derive(Default)]
struct Seen {
    next: [u64; WRITERS],
    /// Whether a loss was reported since the writer's last record.
    loss: [bool; WRITERS],
    received: u64,
    losses: u64,
}

impl Seen {
    fn take(&mut self, got: &Record) {
        if got.kind() == TYPE_META {
            assert_eq!(got.subtype(), META_LOSS);
            self.losses += 1;
            self.loss = [true; WRITERS];
            return;
        }
        let writer = usize::from(got.subtype());
        let number = u64::from_ne_bytes(*got.payload().first_chunk().expect("a number"));
        assert_eq!(*got, record(writer, number).with_tag(9), "torn");
        assert!(number >= self.next[writer], "writer {writer}: {number} repeated or out of order");
        assert!(number == self.next[writer] || self.loss[writer], "writer {writer}: {number} after an unmarked gap");
        self.next[writer] = number + 1;
        self.loss[writer] = false;
        self.received += 1;
    }
}

fn write_all(list: &WatchList) {
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            scope.spawn(move || {
                for number in 0..EACH {
                    list.post(0, &record(writer, number));
                }
            });
        }
    });
}

fn stress(capacity: usize, sleeping: bool) {
    let list = WatchList::new();
    let queue = WatchQueue::new(WatchConfig::default().capacity(capacity)).expect("an eventfd");
    list.add_watch(&queue, Scope::All, 9).expect("a watch");
    let done = AtomicBool::new(false);
    let seen = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut seen = Seen::default();
            let mut buffer = [0; 1000];
            loop {
                // The end is looked for before the read that must find nothing.
                let last = done.load(Ordering::Acquire);
                let limit = if sleeping && !last { Duration::from_millis(1) } else { Duration::ZERO };
                match queue.read_timeout(&mut buffer, Some(limit)) {
                    Ok(len) => records(&buffer[..len]).for_each(|got| seen.take(&got.expect("whole records"))),
                    Err(ReadError::Empty) if last => return seen,
                    Err(ReadError::Empty) => std::thread::yield_now(),
                    Err(error) => panic!("{error}"),
                }
            }
        });
        write_all(&list);
        done.store(true, Ordering::Release);
        reader.join().expect("the reader")
    });
    let counters = queue.counters();
    assert_eq!(counters.posted, WRITERS as u64 * EACH);
    assert_eq!(seen.received + counters.lost, counters.posted);
    assert!(counters.lost == 0 || seen.losses > 0);
    assert!(seen.losses <= counters.lost);
    assert!(counters.high_water <= capacity as u64 && counters.pending == 0);
}

#[test]
fn a_slow_reader_gets_each_record_once_or_a_mark() {
    stress(32, false);
}

#[test]
fn a_reader_that_sleeps_between_records_misses_no_wake_up() {
    stress(512, true);
}

#[test]
fn a_reader_that_waits_for_good_is_woken_for_every_record() {
    let (ping, pong) = (WatchList::new(), WatchList::new());
    let open = || WatchQueue::new(WatchConfig::default()).expect("an eventfd");
    let (to, fro) = (open(), open());
    ping.add_watch(&to, Scope::All, 9).expect("a watch");
    pong.add_watch(&fro, Scope::All, 9).expect("a watch");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..5_000 {
                assert_eq!(to.read_timeout(&mut [0; 128], None), Ok(record(0, number).bytes().len()));
                pong.post(0, &record(0, number));
            }
        });
        for number in 0..5_000 {
            ping.post(0, &record(0, number));
            assert_eq!(fro.read_timeout(&mut [0; 128], None), Ok(record(0, number).bytes().len()));
        }
    });
}

#[test]
fn posts_go_on_while_watches_and_filters_come_and_go() {
    let list = WatchList::new();
    let queue = WatchQueue::new(WatchConfig::default()).expect("an eventfd");
    list.add_watch(&queue, Scope::All, 9).expect("a watch");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                let other = WatchQueue::new(WatchConfig::default().capacity(32)).expect("an eventfd");
                list.add_watch(&other, Scope::Object(0), 9).expect("a watch");
                queue.set_filter(Some(&[FilterEntry::some_of(TYPE_WORK, &[0, 1])])).expect("a sound filter");
                list.add_watch(&other, Scope::Object(1), 9).expect("a watch");
                queue.set_filter(None).expect("no filter");
                list.remove_object(0);
            }
        });
        write_all(&list);
        done.store(true, Ordering::Release);
    });
    let mut seen = Seen::default();
    // With a filter coming and going, gaps are expected; torn or repeated records are not.
    for got in queue.records() {
        seen.loss = [true; WRITERS];
        seen.take(&got);
    }
    let counters = queue.counters();
    assert_eq!(counters.posted + counters.filtered, WRITERS as u64 * EACH);
    assert_eq!(seen.received + counters.lost, counters.posted);
}
