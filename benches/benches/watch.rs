//! The watch queue against everything else that could carry a note: a packet-mode pipe (what the kernel's own queue is built on), and the channels people
//! would reach for. Every note is a record of 127 bytes in 128.
//!
//! - `post and read`: one thread posts a note and takes it.
//! - `stream`: one or two threads post as fast as a spinning reader takes, with a buffer of 4 KiB. None is lost: writers wait, the same way for all, until the
//!   reader is near; they look, and it tells them, once in 32 notes.
//! - `refused`: a post that finds no room.
//! - `wake`: from before the post until a reader that slept has the note.
//! - `unwatched`: a post that nobody watches.

use std::hint::black_box;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use crossbeam_queue::ArrayQueue;
use pinfold_core::watch::{Record, Scope, TYPE_WORK, Wake, WatchConfig, WatchList, WatchQueue};

const CAPACITY: usize = 512;
/// Notes of one stream.
const STREAM: u64 = 625 * STRIDE;

type Note = [u8; 128];
/// What a reader of a stream hands to each read.
type Buffer = [u8; 4096];

/// Bytes of a note that count.
const NOTE_LEN: u64 = 127;
/// Notes that a writer of a stream claims at once, and that the reader takes before it says how far it is.
const STRIDE: u64 = 32;

/// Keeps what different threads write on different cache lines (two, as processors fetch them in pairs).
#[repr(align(128))]
struct Line<T>(T);

/// Something that carries notes from writers to one reader.
trait Carrier: Sync {
    /// Puts a note in; answers whether it found room, if that is known.
    fn put(&self, record: &Record) -> bool;
    /// Takes a note, if there is one.
    fn take(&self, note: &mut Note) -> bool;
    /// Takes as many notes as one call gives; answers how many. One, but where a call gives more.
    fn take_some(&self, buffer: &mut Buffer) -> u64 {
        u64::from(self.take(buffer.first_chunk_mut().expect("room for a note")))
    }
}

struct Ring {
    list: WatchList,
    queue: WatchQueue,
}

impl Ring {
    fn new(wake: Wake) -> Self {
        let queue = WatchQueue::new(WatchConfig::default().capacity(CAPACITY).wake(wake)).expect("an eventfd");
        let list = WatchList::new();
        list.add_watch(&queue, Scope::All, 0).expect("a watch");
        Self { list, queue }
    }

    /// One whose descriptor is polled by somebody, so that it must be kept right.
    fn polled() -> Self {
        let ring = Self::new(Wake::Level);
        black_box(ring.queue.as_fd());
        ring
    }
}

impl Carrier for Ring {
    fn put(&self, record: &Record) -> bool {
        self.list.post(0, record);
        true
    }

    fn take(&self, note: &mut Note) -> bool {
        self.queue.read(note).is_ok()
    }

    fn take_some(&self, buffer: &mut Buffer) -> u64 {
        self.queue.read(buffer).map_or(0, |bytes| bytes as u64 / NOTE_LEN)
    }
}

fn note_of(record: &Record) -> Note {
    let mut note = [0; 128];
    note[..127].copy_from_slice(record.bytes());
    note
}

struct Array(ArrayQueue<Note>);

impl Carrier for Array {
    fn put(&self, record: &Record) -> bool {
        self.0.push(note_of(record)).is_ok()
    }

    fn take(&self, note: &mut Note) -> bool {
        self.0.pop().map(|got| *note = got).is_some()
    }
}

/// An `ArrayQueue` that writes an eventfd for every note, and reads it before every take.
struct ArrayEventFd(ArrayQueue<Note>, OwnedFd);

fn eventfd() -> OwnedFd {
    // SAFETY: eventfd takes two integers and touches no memory.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    assert!(fd >= 0, "no eventfd");
    // SAFETY: the kernel has just made this descriptor and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn raise(fd: &OwnedFd) {
    let one = 1_u64;
    // SAFETY: `one` is 8 readable bytes for the length of the call.
    unsafe { libc::write(fd.as_raw_fd(), (&raw const one).cast(), 8) };
}

fn lower(fd: &OwnedFd) {
    let mut count = 0_u64;
    // SAFETY: `count` is 8 writable bytes for the length of the call.
    unsafe { libc::read(fd.as_raw_fd(), (&raw mut count).cast(), 8) };
}

impl Carrier for ArrayEventFd {
    fn put(&self, record: &Record) -> bool {
        let stored = self.0.push(note_of(record)).is_ok();
        if stored {
            raise(&self.1);
        }
        stored
    }

    fn take(&self, note: &mut Note) -> bool {
        lower(&self.1);
        self.0.pop().map(|got| *note = got).is_some()
    }
}

struct Flume(flume::Sender<Note>, flume::Receiver<Note>);

impl Carrier for Flume {
    fn put(&self, record: &Record) -> bool {
        self.0.try_send(note_of(record)).is_ok()
    }

    fn take(&self, note: &mut Note) -> bool {
        self.1.try_recv().map(|got| *note = got).is_ok()
    }
}

struct Kanal(kanal::Sender<Note>, kanal::Receiver<Note>);

impl Carrier for Kanal {
    fn put(&self, record: &Record) -> bool {
        self.0.try_send(note_of(record)).is_ok_and(|stored| stored)
    }

    fn take(&self, note: &mut Note) -> bool {
        self.1.try_recv().is_ok_and(|got| got.map(|got| *note = got).is_some())
    }
}

/// Std's channel. The mutex stands for nothing but `Sync`: there is one reader.
struct Mpsc(mpsc::SyncSender<Note>, std::sync::Mutex<mpsc::Receiver<Note>>);

impl Carrier for Mpsc {
    fn put(&self, record: &Record) -> bool {
        self.0.try_send(note_of(record)).is_ok()
    }

    fn take(&self, note: &mut Note) -> bool {
        self.1.lock().expect("no panic").try_recv().map(|got| *note = got).is_ok()
    }
}

struct Pipe {
    reader: std::fs::File,
    writer: std::fs::File,
}

impl Pipe {
    fn new(flags: i32) -> Self {
        let mut fds = [0; 2];
        // SAFETY: `fds` has room for the two descriptors.
        let made = unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC | libc::O_DIRECT | flags) };
        assert_eq!(made, 0, "no pipe");
        // A packet needs a page; 512 of them are more than a pipe has by itself.
        // SAFETY: fcntl with an integer touches no memory.
        unsafe { libc::fcntl(fds[1], libc::F_SETPIPE_SZ, 1 << 20) };
        // SAFETY: the kernel has just made these descriptors and nobody else knows them.
        let [reader, writer] = fds.map(|fd| unsafe { std::fs::File::from_raw_fd(fd) });
        Self { reader, writer }
    }
}

impl Carrier for Pipe {
    fn put(&self, record: &Record) -> bool {
        (&self.writer).write(&note_of(record)).is_ok()
    }

    fn take(&self, note: &mut Note) -> bool {
        (&self.reader).read(note).is_ok()
    }
}

fn record() -> Record {
    Record::new(TYPE_WORK, 0, 0, &[7; 119]).expect("127 bytes")
}

fn carriers() -> Vec<(&'static str, Box<dyn Carrier>)> {
    let flume = flume::bounded(CAPACITY);
    let kanal = kanal::bounded(CAPACITY);
    let std = mpsc::sync_channel(CAPACITY);
    vec![
        ("pinfold", Box::new(Ring::new(Wake::OnDemand))),
        ("pinfold, polled", Box::new(Ring::polled())),
        ("ArrayQueue", Box::new(Array(ArrayQueue::new(CAPACITY)))),
        ("ArrayQueue + eventfd", Box::new(ArrayEventFd(ArrayQueue::new(CAPACITY), eventfd()))),
        ("flume", Box::new(Flume(flume.0, flume.1))),
        ("kanal", Box::new(Kanal(kanal.0, kanal.1))),
        ("std mpsc", Box::new(Mpsc(std.0, std.1.into()))),
        ("packet pipe", Box::new(Pipe::new(libc::O_NONBLOCK))),
    ]
}

fn one_thread(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("post and read");
    let (record, mut note) = (record(), [0; 128]);
    for (name, carrier) in carriers() {
        group.bench_function(name, |bench| {
            bench.iter(|| {
                assert!(carrier.put(black_box(&record)));
                assert!(carrier.take(black_box(&mut note)));
            });
        });
    }
    group.finish();
}

/// How long the reader takes to get a stream from this many writers.
fn stream(carrier: &dyn Carrier, writers: u64) -> Duration {
    let (sent, taken) = (Line(AtomicU64::new(0)), Line(AtomicU64::new(0)));
    let record = record();
    std::thread::scope(|scope| {
        for _ in 0..writers {
            scope.spawn(|| {
                let mut seen = 0;
                loop {
                    let first = sent.0.fetch_add(STRIDE, Ordering::Relaxed);
                    if first >= STREAM {
                        break;
                    }
                    // A pipe of a mebibyte holds 256 packets.
                    while first + STRIDE > seen + 200 {
                        std::thread::yield_now();
                        seen = taken.0.load(Ordering::Relaxed);
                    }
                    for _ in 0..STRIDE {
                        while !carrier.put(&record) {
                            std::thread::yield_now();
                        }
                    }
                }
            });
        }
        let mut buffer = [0; 4096];
        let (begun, mut got, mut told) = (Instant::now(), 0, 0);
        while got < STREAM {
            let some = carrier.take_some(&mut buffer);
            got += some;
            if got - told >= STRIDE || (some == 0 && got > told) {
                told = got;
                taken.0.store(told, Ordering::Relaxed);
            }
            if some == 0 {
                std::hint::spin_loop();
            }
        }
        begun.elapsed()
    })
}

fn streams(criterion: &mut Criterion) {
    for writers in [1, 2] {
        let mut group = criterion.benchmark_group(format!("stream, {writers} writers, per {STREAM}"));
        group.sample_size(10);
        for (name, carrier) in carriers() {
            group.bench_function(name, |bench| {
                bench.iter_custom(|rounds| (0..rounds).map(|_| stream(&*carrier, writers)).sum());
            });
        }
        group.finish();
    }
}

fn refused(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("refused");
    let record = record();
    for (name, carrier) in carriers() {
        for _ in 0..=CAPACITY {
            carrier.put(&record);
        }
        group.bench_function(name, |bench| bench.iter(|| carrier.put(black_box(&record))));
    }
    group.finish();
}

/// How long a sleeping reader takes to get a note: `sleep_and_take` waits for one, `put` sends one.
fn woken(rounds: u64, put: impl Fn(), sleep_and_take: impl Fn() + Send) -> Duration {
    let (sleeping, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    let (times, woke) = mpsc::channel();
    std::thread::scope(|scope| {
        let (sleeping, stop) = (&sleeping, &stop);
        scope.spawn(move || {
            while !stop.load(Ordering::Acquire) {
                sleeping.store(true, Ordering::Release);
                sleep_and_take();
                times.send(Instant::now()).expect("the writer waits");
            }
        });
        let mut total = Duration::ZERO;
        for round in 0..rounds {
            while !sleeping.swap(false, Ordering::AcqRel) {
                std::thread::yield_now();
            }
            // Long enough for the reader to be off its processor.
            std::thread::sleep(Duration::from_micros(200));
            stop.store(round + 1 == rounds, Ordering::Release);
            let start = Instant::now();
            put();
            total += woke.recv().expect("the reader").saturating_duration_since(start);
        }
        total
    })
}

fn poll_one(fd: i32) {
    let mut fd = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: `fd` is one writable pollfd for the length of the call.
    unsafe { libc::poll(&raw mut fd, 1, -1) };
}

fn wake(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("wake");
    let record = record();
    let ring = Ring::new(Wake::OnDemand);
    group.bench_function("pinfold", |bench| {
        bench.iter_custom(|rounds| {
            let take = || assert_eq!(ring.queue.read_timeout(&mut [0; 128], None), Ok(127));
            woken(rounds, || ring.list.post(0, &record), take)
        });
    });
    let fd = eventfd();
    group.bench_function("bare eventfd, poll and read", |bench| {
        bench.iter_custom(|rounds| {
            let take = || {
                poll_one(fd.as_raw_fd());
                lower(&fd);
            };
            woken(rounds, || raise(&fd), take)
        });
    });
    let pipe = Pipe::new(0);
    group.bench_function("packet pipe, blocking read", |bench| {
        bench.iter_custom(|rounds| {
            let take = || assert!(pipe.take(&mut [0; 128]));
            woken(rounds, || assert!(pipe.put(&record)), take)
        });
    });
    let (sender, receiver) = flume::bounded::<Note>(CAPACITY);
    group.bench_function("flume, recv", |bench| {
        bench.iter_custom(|rounds| {
            let take = || assert!(receiver.recv().is_ok());
            woken(rounds, || sender.send(note_of(&record)).expect("a receiver"), take)
        });
    });
    group.finish();
}

fn unwatched(criterion: &mut Criterion) {
    let list = WatchList::new();
    let record = record();
    criterion.bench_function("unwatched", |bench| bench.iter(|| black_box(&list).post(0, black_box(&record))));
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = unwatched, one_thread, refused, streams, wake
}
criterion_main!(benches);
