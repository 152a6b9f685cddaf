//! What the workers do, told to the watch queue: which work is queued, started and over, for which object, and how many workers there are.
//!
//! A job says so itself, from within: a worker counts from its first job of this manager until its thread ends. The counts are kept in any case; notes are
//! made only while somebody watches. None of this runs on the monitor's thread, which queues nothing.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::watch::{Record, WatchList, WorkEvent, WorkNote};

/// The counts of one manager's work. Relaxed throughout: they are told, and decide nothing.
pub(crate) struct WorkNotes {
    list: Arc<WatchList>,
    last: AtomicU64,
    pending: AtomicU32,
    running: AtomicU32,
    workers: AtomicU32,
}

/// Work that is queued. It is pending until it begins.
pub(crate) struct Noted {
    notes: Arc<WorkNotes>,
    note: WorkNote,
    since: Instant,
}

/// Work under way, until this is dropped (also by a panic).
struct Running(Noted);

/// This thread is a worker of that manager, until it ends.
struct Worker(Arc<WorkNotes>);

thread_local! {
    /// A thread works for one pool, and a pool for one manager.
    static WORKER: RefCell<Option<Worker>> = const { RefCell::new(None) };
}

impl WorkNotes {
    pub(crate) fn new(list: Arc<WatchList>) -> Arc<Self> {
        let (pending, running, workers) = Default::default();
        Arc::new(Self { list, last: AtomicU64::new(0), pending, running, workers })
    }

    /// Work for this object (0: for none) is about to be queued.
    pub(crate) fn queued(self: &Arc<Self>, object: u64) -> Noted {
        let work = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        self.pending.fetch_add(1, Ordering::Relaxed);
        let note = WorkNote { event: WorkEvent::Queued, work, object, ..WorkNote::default() };
        self.post(note);
        Noted { notes: Arc::clone(self), note, since: Instant::now() }
    }

    /// How the pool stands, for a reader that has just come.
    pub(crate) fn present(&self) -> Record {
        self.counted(WorkNote { event: WorkEvent::Present, ..WorkNote::default() }).record()
    }

    fn post(&self, note: WorkNote) {
        if self.list.is_watched() {
            self.list.post(note.object, &self.counted(note).record());
        }
    }

    fn counted(&self, note: WorkNote) -> WorkNote {
        let get = |count: &AtomicU32| count.load(Ordering::Relaxed);
        WorkNote { workers: get(&self.workers), running: get(&self.running), pending: get(&self.pending), ..note }
    }
}

impl Noted {
    /// The work begins, on the worker that does it or, if it is cancelled, wherever that is said.
    pub(crate) fn run(mut self, cancelled: bool, work: impl FnOnce(bool)) {
        self.notes.pending.fetch_sub(1, Ordering::Relaxed);
        self.note.waited_ns = nanoseconds(self.since.elapsed());
        if cancelled {
            self.notes.post(WorkNote { event: WorkEvent::Cancelled, errno: libc::ECANCELED, ..self.note });
            return work(true);
        }
        Worker::enlist(&self.notes);
        self.notes.running.fetch_add(1, Ordering::Relaxed);
        self.notes.post(WorkNote { event: WorkEvent::Started, ..self.note });
        self.since = Instant::now();
        let _running = Running(self);
        work(false);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let Noted { notes, note, since } = &self.0;
        notes.running.fetch_sub(1, Ordering::Relaxed);
        notes.post(WorkNote { event: WorkEvent::Finished, ran_ns: nanoseconds(since.elapsed()), ..*note });
    }
}

impl Worker {
    fn enlist(notes: &Arc<WorkNotes>) {
        WORKER.with_borrow_mut(|worker| {
            if worker.is_none() {
                notes.workers.fetch_add(1, Ordering::Relaxed);
                notes.post(WorkNote { event: WorkEvent::WorkerStarted, ..WorkNote::default() });
                *worker = Some(Self(Arc::clone(notes)));
            }
        });
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.0.workers.fetch_sub(1, Ordering::Relaxed);
        self.0.post(WorkNote { event: WorkEvent::WorkerStopped, ..WorkNote::default() });
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
