//! What the workers do can be watched: each acquisition that is given to one is told from its queueing to its end, with the counts of the pool.

use std::collections::VecDeque;
use std::sync::Arc;

use pinfold_core::watch::{Note, WatchConfig, WatchQueue, WorkEvent, WorkNote, records};
use pinfold_core::{Access, Config, Manager};
use pinfold_tests::PATIENCE;
use pinfold_tests::fake::{Answer, Call, FakeDevice};
use pinfold_tests::memory::{Backing, Region};

/// The notes about work, one after the other.
struct Notes<'a> {
    queue: &'a WatchQueue,
    read: VecDeque<WorkNote>,
}

impl Notes<'_> {
    fn next(&mut self) -> WorkNote {
        while self.read.is_empty() {
            let mut bytes = [0; 4096];
            let len = self.queue.read_timeout(&mut bytes, Some(PATIENCE)).expect("a note in time");
            self.read.extend(records(&bytes[..len]).filter_map(
                |record| match record.expect("a sound record").note() {
                    Note::Work(note) => Some(note),
                    _ => None,
                },
            ));
        }
        self.read.pop_front().expect("just looked")
    }
}

#[test]
fn an_acquisition_by_a_worker_is_told_from_its_queueing_to_its_end() {
    let device = FakeDevice::new();
    device.script(Call::Import, &[Answer::Hold]);
    let mut config = Config::default();
    config.inline_limit = 0;
    let manager = Manager::new(device.clone(), config).unwrap();
    let queue = manager.watch(WatchConfig::default()).unwrap();
    let mut notes = Notes { queue: &queue, read: VecDeque::new() };
    let region = Arc::new(Region::new(Backing::Anonymous, 2).unwrap());
    // SAFETY: the device only copies, and the region outlives the manager.
    let object = unsafe { manager.register(region.part(0..2), Access::Read) }.unwrap();

    assert!(manager.acquire(&[&object]).unwrap_err().is_again());
    device.wait_held(1);
    let before = [notes.next(), notes.next(), notes.next()];
    // Whatever is wrong with them, the manager's end waits for what is held.
    device.let_go();
    let [queued, came, started] = before;
    assert_eq!((queued.event, queued.object, queued.pending, queued.running), (WorkEvent::Queued, object.id(), 1, 0));
    assert_eq!((came.event, came.workers), (WorkEvent::WorkerStarted, 1));
    assert_eq!((started.event, started.work, started.object), (WorkEvent::Started, queued.work, object.id()));
    assert_eq!((started.workers, started.running, started.pending), (1, 1, 0));
    assert!(started.waited_ns > 0 && started.ran_ns == 0);

    let finished = notes.next();
    assert_eq!((finished.event, finished.work, finished.object), (WorkEvent::Finished, queued.work, object.id()));
    assert_eq!((finished.running, finished.errno), (0, 0));
    assert!(finished.ran_ns > 0 && finished.waited_ns == started.waited_ns);

    drop(manager.acquire_timeout(&[&object], PATIENCE).unwrap());
    drop(object); // closed by a worker
    drop(manager);
    let unread = queue.notes().filter_map(|note| match note {
        Note::Work(note) => Some(note),
        _ => None,
    });
    let rest = notes.read.into_iter().chain(unread).collect::<Vec<_>>();
    let count = |event| rest.iter().filter(|note| note.event == event).count();
    assert!(count(WorkEvent::Finished) >= 1 && count(WorkEvent::Finished) == count(WorkEvent::Started), "{rest:?}");
    let stopped = rest.last().expect("workers have ended");
    assert_eq!((stopped.event, stopped.workers, stopped.running), (WorkEvent::WorkerStopped, 0, 0), "{rest:?}");
    assert_eq!(count(WorkEvent::WorkerStopped), 1 + count(WorkEvent::WorkerStarted), "{rest:?}");
}
