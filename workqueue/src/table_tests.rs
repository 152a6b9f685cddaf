//! Every row and column of the state table, on real items with real workers. What is expected is read from the table;
//! the table itself is checked by the laws in its own file.

use std::{
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use crate::{
    Job, Pool, Work,
    effects::Effects,
    slab::{NIL, On},
    table::{Act, Answer, Next, Operation, Word, cell},
};

const LONG: Duration = Duration::from_secs(600);

/// One item in a wanted state, everything it could run on held by the test.
struct Bench {
    pool: Pool,
    work: Work,
    /// Dropping it lets the function, and the job that occupies the worker, return.
    gate: mpsc::Sender<()>,
    runs: mpsc::Receiver<()>,
    running: bool,
}

/// What can be seen of an item: word, on a list, timer running, held by a worker.
fn look(work: &Work) -> (Word, bool, bool, bool) {
    let state = work.item().shared().lock();
    let entry = &state.slab[work.item().slot()];
    (entry.item.word, entry.on != On::Nothing, entry.timer != NIL, entry.worker != NIL)
}

impl Bench {
    fn new(word: Word, running: bool) -> Self {
        let pool = Pool::builder("table").bounded(1).may_sleep(0).build().expect("a pool");
        let (gate, wait) = mpsc::channel::<()>();
        let wait = Arc::new(std::sync::Mutex::new(wait));
        let (report, runs) = mpsc::channel();
        let held = Arc::clone(&wait);
        let work = pool.work(move |_| {
            report.send(()).expect("the test waits");
            let _ = held.lock().expect("whole").recv();
        });
        if running {
            work.queue().expect("open");
            runs.recv().expect("it runs");
        } else {
            let (report, occupied) = mpsc::channel();
            let job = Job::new(move |_| {
                report.send(()).expect("the test waits");
                let _ = wait.lock().expect("whole").recv();
            });
            pool.submit(job).expect("accepted");
            occupied.recv().expect("it runs");
        }
        match word {
            Word::Timer => assert!(work.queue_delayed(LONG).expect("open")),
            Word::Task => assert!(work.queue().expect("open")),
            _ => {}
        }
        let expected = (word, word == Word::Task && !running, word == Word::Timer, running);
        assert_eq!(look(&work), expected, "the bench itself");
        Self { pool, work, gate, runs, running }
    }

    /// Does the operation as a caller would, with what would wait on a thread of its own; waits until it has had its
    /// effect on the state.
    fn perform(&self, operation: Operation) -> Waiting {
        let work = self.work.clone();
        let waiting = |call: fn(&Work) -> Result<bool, crate::Error>| {
            Waiting::Later(thread::spawn(move || call(&work).expect("not from inside")))
        };
        match operation {
            Operation::Queue => Waiting::Done(self.work.queue().expect("open")),
            Operation::QueueDelayed => Waiting::Done(self.work.queue_delayed(LONG).expect("open")),
            Operation::ModifyDelayed => Waiting::Done(self.work.modify_delayed(LONG * 2).expect("open")),
            Operation::ModifyNow => Waiting::Done(self.work.modify_delayed(Duration::ZERO).expect("open")),
            Operation::Cancel => Waiting::Done(self.work.cancel_delayed()),
            Operation::CancelSync => waiting(Work::cancel_sync),
            Operation::Flush => waiting(Work::flush),
            Operation::FlushDelayed => waiting(Work::flush_delayed),
            Operation::TimerFires => {
                let shared = self.work.item().shared();
                let mut fx = Effects::default();
                let mut state = shared.lock();
                let fired = state.stop_timer(self.work.item().slot());
                assert!(fired);
                state.fired(self.work.item().slot(), &mut fx);
                drop(state);
                shared.apply(fx);
                Waiting::Done(true)
            }
            Operation::Taken | Operation::Returns => unreachable!("the worker's own"),
        }
    }
}

enum Waiting {
    Done(bool),
    Later(thread::JoinHandle<bool>),
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < end, "never: {what}");
        thread::yield_now();
    }
}

#[test]
fn every_operation_in_every_state_does_what_the_table_says() {
    for operation in Operation::ALL {
        for (word, running) in [
            (Word::Idle, false),
            (Word::Timer, false),
            (Word::Timer, true),
            (Word::Task, false),
            (Word::Task, true),
            (Word::Exec, true),
        ] {
            let its_own = matches!(operation, Operation::Taken | Operation::Returns);
            if its_own || (operation == Operation::TimerFires && word != Word::Timer) {
                continue;
            }
            let case = format!("{operation:?} in {word:?}, running: {running}");
            let expected = cell(operation, word);
            let bench = Bench::new(word, running);
            let waiting = bench.perform(operation);

            let next = match expected.next {
                Next::To(word) => word,
                Next::Rest if running => Word::Exec,
                Next::Rest => Word::Idle,
            };
            let seen = (next, next == Word::Task && !running, next == Word::Timer, running);
            until(&format!("{case} → {seen:?}, but {:?}", look(&bench.work)), || look(&bench.work) == seen);
            let answer = match expected.answer {
                Answer::Yes => true,
                Answer::No => false,
                Answer::Running => running,
            };
            let Bench { pool, work, gate, runs, running } = bench;
            let waits = match operation {
                Operation::Flush | Operation::FlushDelayed => word != Word::Idle,
                Operation::CancelSync => running,
                _ => false,
            };
            if waits {
                until(&case, || work.item().shared().lock().slab[work.item().slot()].item.waiters > 0);
            }
            drop(gate);
            if operation == Operation::Flush && word == Word::Timer {
                assert!(work.cancel_delayed(), "{case}: or it would wait for the timer");
            }
            let answered = match waiting {
                Waiting::Done(answered) => answered,
                Waiting::Later(thread) => thread.join().expect("it returns"),
            };
            assert_eq!(answered, answer, "{case}");

            // A run for each round that was queued, and no other.
            until(&case, || matches!(look(&work), (Word::Idle | Word::Timer, false, _, false)));
            let _ = work.cancel_delayed();
            let expected_runs = u32::from(next == Word::Task);
            drop((work, pool));
            assert_eq!(
                runs.iter().count() as u32,
                expected_runs,
                "{case}; the first of a running one was counted: {running}"
            );
            assert!(expected.act != Act::Run, "{case}");
        }
    }
}

#[test]
fn nothing_is_accepted_while_a_cancel_waits_and_everything_afterwards() {
    let Bench { pool, work, gate, runs, .. } = Bench::new(Word::Task, true);
    let canceller = thread::spawn({
        let work = work.clone();
        move || work.cancel_sync().expect("not from inside")
    });
    until("the cancel waits", || look(&work) == (Word::Idle, false, false, true));
    assert!(!work.queue().expect("open"));
    assert!(!work.queue_delayed(LONG).expect("open"));
    assert!(!work.modify_delayed(LONG).expect("open"));
    assert!(!work.cancel_delayed());
    assert_eq!(look(&work), (Word::Idle, false, false, true));
    drop(gate);
    assert!(canceller.join().expect("it returns"), "a round was owed");
    assert_eq!(look(&work), (Word::Idle, false, false, false));
    assert!(work.queue().expect("open"));
    drop((work, pool));
    assert_eq!(runs.iter().count(), 1);
}
