//! What the workers do can be watched: each acquisition that is given to one is told from its queueing to its end, with the counts of the pool.

use std::sync::Arc;

use pinfold_core::watch::{Note, WatchConfig, WatchQueue, WorkEvent, WorkNote};
use pinfold_core::{Access, Config, Manager};
use pinfold_tests::PATIENCE;
use pinfold_tests::fake::{Answer, Call, FakeDevice};
use pinfold_tests::memory::{Backing, Region};

/// The next note about work.
fn next(queue: &WatchQueue) -> WorkNote {
    loop {
        let mut bytes = [0; 128];
        let len = queue.read_timeout(&mut bytes, Some(PATIENCE)).expect("a note in time");
        let record = pinfold_core::watch::Record::from_bytes(&bytes[..len]).expect("one record");
        if let Note::Work(note) = record.note() {
            return note;
        }
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
    let region = Arc::new(Region::new(Backing::Anonymous, 2).unwrap());
    // SAFETY: the device only copies, and the region outlives the manager.
    let object = unsafe { manager.register(region.part(0..2), Access::Read) }.unwrap();

    assert!(manager.acquire(&[&object]).unwrap_err().is_again());
    device.wait_held(1);
    let queued = next(&queue);
    assert_eq!((queued.event, queued.object, queued.pending, queued.running), (WorkEvent::Queued, object.id(), 1, 0));
    let came = next(&queue);
    assert_eq!((came.event, came.workers), (WorkEvent::WorkerStarted, 1));
    let started = next(&queue);
    assert_eq!((started.event, started.work, started.object), (WorkEvent::Started, queued.work, object.id()));
    assert_eq!((started.workers, started.running, started.pending), (1, 1, 0));
    assert!(started.waited_ns > 0 && started.ran_ns == 0);

    device.let_go();
    let finished = next(&queue);
    assert_eq!((finished.event, finished.work, finished.object), (WorkEvent::Finished, queued.work, object.id()));
    assert_eq!((finished.running, finished.errno), (0, 0));
    assert!(finished.ran_ns > 0 && finished.waited_ns == started.waited_ns);

    drop(manager.acquire_timeout(&[&object], PATIENCE).unwrap());
    drop(object); // closed by a worker
    drop(manager);
    let rest = queue.notes().filter_map(|note| match note {
        Note::Work(note) => Some(note),
        _ => None,
    });
    let rest = rest.collect::<Vec<_>>();
    let count = |event| rest.iter().filter(|note| note.event == event).count();
    assert!(count(WorkEvent::Finished) >= 1 && count(WorkEvent::Finished) == count(WorkEvent::Started), "{rest:?}");
    let stopped = rest.last().expect("workers have ended");
    assert_eq!((stopped.event, stopped.workers, stopped.running), (WorkEvent::WorkerStopped, 0, 0), "{rest:?}");
    assert_eq!(count(WorkEvent::WorkerStopped), 1 + count(WorkEvent::WorkerStarted), "{rest:?}");
}
