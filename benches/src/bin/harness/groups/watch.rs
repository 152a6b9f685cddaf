//! The watch queue against everything else that could carry a note of 127 bytes in 128, all with room for 512.

use std::fs::File;
use std::hint::black_box;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use crossbeam_queue::ArrayQueue;
use pinfold_core::watch::{Record, Scope, TYPE_WORK, Wake, WatchConfig, WatchList, WatchQueue};

use crate::clock::{cpu, microseconds, nanoseconds};
use crate::placement::{Pinned, allowed};
use crate::session::{Contender, Goal, Plan, Session};

const CAPACITY: usize = 512;

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
trait Carrier: Send + Sync {
    /// Puts a note in; false if it is known to have found no room.
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
    fn new(wake: Wake) -> Result<Self> {
        let queue = WatchQueue::new(WatchConfig::default().capacity(CAPACITY).wake(wake))?;
        let list = WatchList::new();
        list.add_watch(&queue, Scope::All, 0)?;
        Ok(Self { list, queue })
    }

    /// One whose descriptor is polled by somebody, so that it must be kept right.
    fn polled() -> Result<Self> {
        let ring = Self::new(Wake::Level)?;
        black_box(ring.queue.as_fd());
        Ok(ring)
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

impl Carrier for ArrayQueue<Note> {
    fn put(&self, record: &Record) -> bool {
        self.push(note_of(record)).is_ok()
    }

    fn take(&self, note: &mut Note) -> bool {
        self.pop().map(|got| *note = got).is_some()
    }
}

/// An `ArrayQueue` that writes an eventfd for every note, and reads it before every take.
struct ArrayEventFd(ArrayQueue<Note>, EventFd);

impl Carrier for ArrayEventFd {
    fn put(&self, record: &Record) -> bool {
        let stored = self.0.put(record);
        if stored {
            self.1.raise();
        }
        stored
    }

    fn take(&self, note: &mut Note) -> bool {
        self.1.lower();
        self.0.take(note)
    }
}

struct EventFd(OwnedFd);

impl EventFd {
    fn new() -> Result<Self> {
        // SAFETY: eventfd takes two integers and touches no memory.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        ensure!(fd >= 0, "no eventfd: {}", std::io::Error::last_os_error());
        // SAFETY: the kernel has just made this descriptor and nobody else knows it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    fn raise(&self) {
        let one = 1_u64;
        // SAFETY: `one` is 8 readable bytes for the length of the call.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    fn lower(&self) {
        let mut count = 0_u64;
        // SAFETY: `count` is 8 writable bytes for the length of the call.
        unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), 8) };
    }

    fn sleep(&self) {
        let mut fd = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: `fd` is one writable pollfd for the length of the call.
        unsafe { libc::poll(&raw mut fd, 1, -1) };
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
struct Std(mpsc::SyncSender<Note>, Mutex<mpsc::Receiver<Note>>);

impl Carrier for Std {
    fn put(&self, record: &Record) -> bool {
        self.0.try_send(note_of(record)).is_ok()
    }

    fn take(&self, note: &mut Note) -> bool {
        self.1.lock().expect("no panic").try_recv().map(|got| *note = got).is_ok()
    }
}

/// A pipe in packet mode: what the kernel's own notification queue is built on.
struct Pipe {
    reader: File,
    writer: File,
}

impl Pipe {
    fn new(flags: i32) -> Result<Self> {
        let mut fds = [0; 2];
        // SAFETY: `fds` has room for the two descriptors.
        let made = unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC | libc::O_DIRECT | flags) };
        ensure!(made == 0, "no pipe: {}", std::io::Error::last_os_error());
        // A packet needs a page; 256 of them are more than a pipe has by itself. Refused to a user with many pipes: then it holds fewer.
        // SAFETY: fcntl with an integer touches no memory.
        unsafe { libc::fcntl(fds[1], libc::F_SETPIPE_SZ, 1 << 20) };
        // SAFETY: the kernel has just made these descriptors and nobody else knows them.
        let [reader, writer] = fds.map(|fd| unsafe { File::from_raw_fd(fd) });
        Ok(Self { reader, writer })
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

/// Everyone who takes part, ours first.
fn carriers() -> Result<Vec<(&'static str, Box<dyn Carrier>)>> {
    let (flume, kanal, std) = (flume::bounded(CAPACITY), kanal::bounded(CAPACITY), mpsc::sync_channel(CAPACITY));
    Ok(vec![
        ("watch queue", Box::new(Ring::new(Wake::OnDemand)?)),
        ("ArrayQueue", Box::new(ArrayQueue::new(CAPACITY))),
        ("ArrayQueue + eventfd", Box::new(ArrayEventFd(ArrayQueue::new(CAPACITY), EventFd::new()?))),
        ("flume", Box::new(Flume(flume.0, flume.1))),
        ("kanal", Box::new(Kanal(kanal.0, kanal.1))),
        ("std mpsc", Box::new(Std(std.0, std.1.into()))),
        ("packet pipe", Box::new(Pipe::new(libc::O_NONBLOCK)?)),
    ])
}

fn record() -> Record {
    Record::new(TYPE_WORK, 0, 0, &[7; 119]).expect("127 bytes")
}

/// One sample of notes put in and taken out by one thread. Sixteen laps: the first finds the slots wherever the contenders before have left them, and
/// the clock at both ends is a system call.
fn one_thread<'a>(name: &str, carrier: &'a dyn Carrier, record: &'a Record) -> Contender<'a> {
    let mut note = [0; 128];
    Contender::new(name, move || {
        let mut whole = true;
        let time = cpu(16 * CAPACITY, || whole &= carrier.put(black_box(record)) && carrier.take(black_box(&mut note)));
        ensure!(whole, "a note was lost");
        Ok(time)
    })
}

/// One sample of notes put where there is room. They are taken out again behind the clock.
fn post<'a>(name: &str, carrier: &'a dyn Carrier, record: &'a Record) -> Contender<'a> {
    // A pipe of a mebibyte holds 256 packets.
    const NOTES: usize = 256;
    const LAPS: usize = 32;
    let mut note = [0; 128];
    Contender::new(name, move || {
        let (mut whole, mut time) = (true, 0.0);
        for _ in 0..LAPS {
            time += cpu(NOTES, || whole &= carrier.put(black_box(record)));
            (0..NOTES).for_each(|_| whole &= carrier.take(black_box(&mut note)));
        }
        ensure!(whole, "a note was lost");
        Ok(time / LAPS as f64)
    })
}

pub(crate) fn run(session: &mut Session) -> Result<()> {
    let (all, record) = (carriers()?, record());
    let ours = || one_thread("watch queue", &*all[0].1, &record);
    session.measure(Plan::new("post and read", "ns", ours()).against(ours(), None).control().clock("cpu"))?;

    // `ArrayQueue` by itself: next to contenders that live in the kernel ours is slower for a while after their turns, and `ArrayQueue` isn't.
    for peers in [&all[1..2], &all[2..]] {
        let mut plan = Plan::new("post and read", "ns", ours()).clock("cpu");
        for (name, carrier) in peers {
            let goal = Goal::ratio(1.2).filter(|_| *name == "ArrayQueue");
            plan = plan.against(one_thread(name, &**carrier, &record), goal);
        }
        session.measure(plan)?;
    }
    let mut plan = Plan::new("post", "ns", post("watch queue", &*all[0].1, &record)).clock("cpu");
    for (name, carrier) in &all[1..] {
        plan = plan.against(post(name, &**carrier, &record), None);
    }
    session.measure(plan)?;
    let polled = Ring::polled()?;
    let plan =
        Plan::new("post and read, descriptor polled", "ns", one_thread("watch queue", &polled, &record)).clock("cpu");
    session.measure(plan.against(one_thread("ArrayQueue + eventfd", &*all[2].1, &record), None))?;

    let list = WatchList::new();
    let unwatched = || Ok(cpu(4096, || black_box(&list).post(0, black_box(&record))));
    let cell = AtomicU64::new(0);
    let load = || Ok(cpu(4096, || _ = black_box(cell.load(Ordering::SeqCst))));
    let plan = Plan::new("post that nobody watches", "ns", Contender::new("watch list", unwatched)).clock("cpu");
    session.measure(plan.against(Contender::new("one atomic load", load), None).goal(Goal::ours(5.0)))?;

    refused(session, &record)?;
    for writers in [1, 2] {
        let notes = session.mode.pick(4_000, 20_000, 40_000);
        let sample = |index: usize| {
            let carrier = &*all[index].1;
            Contender::new(all[index].0, move || stream(carrier, writers, notes))
        };
        let name = format!("stream from {writers} writer{}", if writers == 1 { "" } else { "s" });
        let mut plan =
            Plan::new(name, "ns", sample(0)).placement("reader and writers wherever the scheduler puts them");
        for (index, (name, _)) in all.iter().enumerate().skip(1) {
            plan = plan.against(sample(index), Goal::ratio(0.25).filter(|_| *name == "packet pipe"));
        }
        session.measure(plan)?;
    }
    wake(session, &record)
}

/// A post that finds no room. As many a sample as in [`one_thread`]: the clock alone would be 1.6 ns of each of 512.
fn refused(session: &mut Session, record: &Record) -> Result<()> {
    let full = carriers()?;
    for (_, carrier) in &full {
        (0..=CAPACITY).for_each(|_| _ = carrier.put(record));
    }
    let sample = |index: usize| {
        let carrier = &*full[index].1;
        Contender::new(full[index].0, move || Ok(cpu(16 * CAPACITY, || _ = black_box(carrier.put(black_box(record))))))
    };
    let mut plan = Plan::new("post refused, no room", "ns", sample(0)).clock("cpu").goal(Goal::ours(20.0));
    for index in 1..full.len() {
        plan = plan.against(sample(index), None);
    }
    session.measure(plan)?;
    Ok(())
}

/// Nanoseconds a note that a spinning reader takes from writers, `notes` of them, a multiple of [`STRIDE`]. None is lost, as writers wait while the reader is
/// far behind; they look how far it is, and it says so, once in a stride, so that it is the carrier that is measured.
fn stream(carrier: &dyn Carrier, writers: u64, notes: u64) -> Result<f64> {
    let (sent, taken) = (Line(AtomicU64::new(0)), Line(AtomicU64::new(0)));
    let record = record();
    std::thread::scope(|scope| {
        for _ in 0..writers {
            scope.spawn(|| {
                let mut seen = 0;
                loop {
                    let first = sent.0.fetch_add(STRIDE, Ordering::Relaxed);
                    if first >= notes {
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
        while got < notes {
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
        Ok(nanoseconds(begun.elapsed()) / notes as f64)
    })
}

/// Microseconds from before `put` until a reader that slept has the note. The reader is on processor `reader`, the writer on the first.
fn woken(rounds: usize, reader: usize, put: &dyn Fn(), sleep_and_take: &(dyn Fn() + Sync)) -> Result<Vec<f64>> {
    let (sleeping, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    let (times, woke) = mpsc::channel();
    let _pinned = Pinned::to(0);
    std::thread::scope(|scope| {
        let (sleeping, stop) = (&sleeping, &stop);
        scope.spawn(move || {
            let _pinned = Pinned::to(reader);
            while !stop.load(Ordering::Acquire) {
                sleeping.store(true, Ordering::Release);
                sleep_and_take();
                let _ = times.send(Instant::now());
            }
        });
        let mut waits = Vec::with_capacity(rounds);
        for round in 0..rounds {
            while !sleeping.swap(false, Ordering::AcqRel) {
                std::thread::yield_now();
            }
            // Long enough for the reader to be off its processor.
            std::thread::sleep(Duration::from_micros(200));
            stop.store(round + 1 == rounds, Ordering::Release);
            let begun = Instant::now();
            put();
            waits.push(microseconds(woke.recv()?.saturating_duration_since(begun)));
        }
        Ok(waits)
    })
}

fn wake(session: &mut Session, record: &Record) -> Result<()> {
    let (ring, fd, pipe) = (Ring::new(Wake::OnDemand)?, EventFd::new()?, Pipe::new(0)?);
    let (flume, kanal) = (flume::bounded::<Note>(CAPACITY), kanal::bounded::<Note>(CAPACITY));
    let (std, std_reader) = mpsc::sync_channel::<Note>(CAPACITY);
    let std_reader = Mutex::new(std_reader);
    let array = ArrayEventFd(ArrayQueue::new(CAPACITY), EventFd::new()?);
    let rounds = session.mode.pick(16, 40, 60);
    for (reader, where_to) in [(0, "the same processor"), (1, "another processor")] {
        if reader >= allowed().len() {
            session.absent("wake-up on another processor", "this process may use one processor only");
            continue;
        }
        let take = || _ = ring.queue.read_timeout(&mut [0; 128], None);
        let ours = Contender::many("watch queue", || woken(rounds, reader, &|| ring.list.post(0, record), &take));
        let take = || {
            fd.sleep();
            fd.lower();
        };
        let bare = Contender::many("bare eventfd, poll and read", || woken(rounds, reader, &|| fd.raise(), &take));
        let take = || _ = pipe.take(&mut [0; 128]);
        let piped = Contender::many("packet pipe", || woken(rounds, reader, &|| _ = pipe.put(record), &take));
        let take = || {
            array.1.sleep();
            array.take(&mut [0; 128]);
        };
        let array = Contender::many("ArrayQueue + eventfd", || woken(rounds, reader, &|| _ = array.put(record), &take));
        let take = || _ = flume.1.recv();
        let put = || _ = flume.0.send(note_of(record));
        let flume = Contender::many("flume", || woken(rounds, reader, &put, &take));
        let take = || _ = kanal.1.recv();
        let put = || _ = kanal.0.send(note_of(record));
        let kanal = Contender::many("kanal", || woken(rounds, reader, &put, &take));
        let take = || _ = std_reader.lock().expect("no panic").recv();
        let put = || _ = std.send(note_of(record));
        let std = Contender::many("std mpsc", || woken(rounds, reader, &put, &take));
        let plan = Plan::new(format!("wake a sleeping reader on {where_to}"), "µs", ours);
        let plan = plan.against(bare, Goal::ratio(1.1)).against(piped, None).against(array, None);
        let plan = plan.against(flume, None).against(kanal, None).against(std, None);
        session.measure(plan.placement(format!("writer on processor {}, reader on {where_to}", allowed()[0])))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_carrier_brings_the_whole_note() {
        let record = record();
        for (name, carrier) in carriers().unwrap() {
            let mut note = [0; 128];
            assert!(carrier.put(&record) && carrier.take(&mut note), "{name}");
            assert_eq!(note[..127], *record.bytes(), "{name}");
            assert!(stream(&*carrier, 2, 10 * STRIDE).unwrap() > 0.0, "{name}");
        }
    }
}
