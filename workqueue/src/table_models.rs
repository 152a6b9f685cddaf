//! Every pair of operations in every state of the table, at the same time, on real items with a real worker, explored by
//! loom. What may come of it is computed from the table: each operation, and each step of the worker, happens at one
//! moment, in any order. An execution whose outcome no order explains is a failure.
//!
//! The way into the state and the way out of it are not explored, and time is an operation like the others: the keeper
//! is ended first, and a thread of the model fires the timer.

use std::{
    mem,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use loom::thread;

use crate::{
    Job, Pool, Topology, Work,
    effects::Effects,
    slab::{NIL, On},
    sync,
    table::{Act, Answer, Cell, Next, Operation, Word, cell},
};

const LONG: Duration = Duration::from_secs(600);

/// The states there are, with the running bit.
const STATES: [(Word, bool); 6] = [
    (Word::Idle, false),
    (Word::Timer, false),
    (Word::Task, false),
    (Word::Exec, true),
    (Word::Timer, true),
    (Word::Task, true),
];

/// What one thread does, one after the other.
type Program = Vec<Operation>;

/// What every call of every thread was told, with the runs that had begun when it returned; whether the timer runs at
/// last; all runs.
type Outcome = (Vec<Vec<(bool, u32)>>, bool, u32);

/// Whether it may make the item pending, so that it runs after a cancel.
fn queues(operation: Operation) -> bool {
    use Operation::{ModifyDelayed, ModifyNow, Queue, QueueDelayed};
    matches!(operation, Queue | QueueDelayed | ModifyDelayed | ModifyNow)
}

fn flushes(operation: Operation) -> bool {
    matches!(operation, Operation::Flush | Operation::FlushDelayed)
}

/// The item, its worker and its callers at one moment, by the table.
#[derive(Clone, PartialEq)]
struct Moment {
    word: Word,
    worker: Step,
    tickets: u32,
    pending: u32,
    going: u32,
    cancelling: u32,
    runs: u32,
    callers: Vec<Caller>,
}

#[derive(Clone, Copy, PartialEq)]
enum Step {
    /// The worker does not hold the item.
    Away,
    Begun,
    Over,
}

#[derive(Clone, PartialEq)]
struct Caller {
    wait: Wait,
    told: Vec<(bool, u32)>,
}

#[derive(Clone, Copy, PartialEq)]
enum Wait {
    Nothing,
    /// Until no worker holds the item.
    Stopped(bool),
    /// Until this ticket is neither pending nor going on.
    Ticket(bool, u32),
    /// Until it has returned.
    Returned(bool),
}

impl Moment {
    fn new(word: Word, running: bool, callers: usize) -> Self {
        let worker = if running { Step::Begun } else { Step::Away };
        let pending = if matches!(word, Word::Timer | Word::Task) { 2 } else { 0 };
        let callers = vec![Caller { wait: Wait::Nothing, told: Vec::new() }; callers];
        Self { word, worker, tickets: 2, pending, going: u32::from(running), cancelling: 0, runs: 0, callers }
    }

    /// As the table says.
    fn does(&mut self, operation: Operation) -> bool {
        let running = self.worker != Step::Away;
        let Cell { next, act, answer } = cell(operation, self.word);
        self.word = match next {
            Next::To(word) => word,
            Next::Rest if running => Word::Exec,
            Next::Rest => Word::Idle,
        };
        let pending = mem::take(&mut self.pending);
        if act == Act::Run {
            self.going = pending;
        } else if matches!(self.word, Word::Timer | Word::Task) {
            self.tickets += u32::from(pending == 0);
            self.pending = if pending == 0 { self.tickets } else { pending };
        }
        if act == Act::LetGo {
            self.going = 0;
        }
        match answer {
            Answer::Yes => true,
            Answer::No => false,
            Answer::Running => running,
        }
    }

    /// A caller's next step, if it need not wait.
    fn call(mut self, n: usize, program: &Program) -> Option<Self> {
        let wait = match self.callers[n].wait {
            Wait::Nothing => {
                let operation = *program.get(self.callers[n].told.len())?;
                let refused = (queues(operation) && self.cancelling > 0)
                    || (operation == Operation::TimerFires && self.word != Word::Timer);
                self.cancelling += u32::from(operation == Operation::CancelSync);
                let answer = !refused && self.does(operation);
                let seen = if self.pending != 0 { self.pending } else { self.going };
                match operation {
                    Operation::CancelSync => Wait::Stopped(answer),
                    _ if flushes(operation) && seen != 0 => Wait::Ticket(answer, seen),
                    Operation::TimerFires => Wait::Returned(!refused),
                    _ => Wait::Returned(answer),
                }
            }
            Wait::Stopped(answer) if self.worker == Step::Away => {
                self.cancelling -= 1;
                Wait::Returned(answer)
            }
            Wait::Ticket(answer, seen) if self.pending != seen && self.going != seen => Wait::Returned(answer),
            Wait::Stopped(_) | Wait::Ticket(..) => return None,
            Wait::Returned(answer) => {
                let runs = self.runs;
                self.callers[n].told.push((answer, runs));
                Wait::Nothing
            }
        };
        self.callers[n].wait = wait;
        Some(self)
    }

    /// The worker's next step, if it has one.
    fn work(mut self) -> Option<Self> {
        self.worker = match self.worker {
            Step::Away if self.word == Word::Task => {
                self.does(Operation::Taken);
                Step::Begun
            }
            Step::Away => return None,
            Step::Begun => {
                self.runs += 1;
                Step::Over
            }
            Step::Over => {
                if self.does(Operation::Returns) {
                    Step::Begun
                } else {
                    Step::Away
                }
            }
        };
        Some(self)
    }
}

/// All that may come of it when `programs` run at the same time.
fn possible(word: Word, running: bool, programs: &[Program]) -> Vec<Outcome> {
    let mut moments = vec![Moment::new(word, running, programs.len())];
    let mut outcomes = Vec::new();
    let mut next = 0;
    while let Some(now) = moments.get(next).cloned() {
        next += 1;
        let calls = (0..).zip(programs).filter_map(|(n, program)| now.clone().call(n, program));
        let after: Vec<_> = calls.chain(now.clone().work()).collect();
        if after.is_empty() {
            let told: Vec<_> = now.callers.into_iter().map(|caller| caller.told).collect();
            assert!(
                told.iter().zip(programs).all(|(told, program)| told.len() == program.len()),
                "somebody waits for ever"
            );
            let outcome = (told, now.word == Word::Timer, now.runs);
            if !outcomes.contains(&outcome) {
                outcomes.push(outcome);
            }
        }
        for moment in after {
            if !moments.contains(&moment) {
                moments.push(moment);
            }
        }
    }
    outcomes
}

/// Holds the worker until the race begins.
#[derive(Default)]
struct Gate {
    /// Whether the worker has come, and whether it may pass.
    state: loom::sync::Mutex<(bool, bool)>,
    changed: loom::sync::Condvar,
}

impl Gate {
    fn pass(&self) {
        let mut state = sync::lock(&self.state);
        state.0 = true;
        self.changed.notify_all();
        while !state.1 {
            state = self.changed.wait(state).expect("whole");
        }
    }

    fn wait_until_reached(&self) {
        let mut state = sync::lock(&self.state);
        while !state.0 {
            state = self.changed.wait(state).expect("whole");
        }
    }

    fn open(&self) {
        sync::lock(&self.state).1 = true;
        self.changed.notify_all();
    }
}

/// One item in a wanted state, and its only worker held.
struct Bench {
    pool: Pool,
    work: Work,
    gate: Arc<Gate>,
    runs: Arc<AtomicU32>,
}

impl Bench {
    fn new(word: Word, running: bool) -> Self {
        let pool = Pool::builder("model")
            .bounded(1)
            .may_sleep(0)
            .topology(Topology::from_nodes([[0]]))
            .spin(Duration::ZERO)
            .build()
            .expect("a pool");
        let shared = pool.shared();
        shared.lock().keeper_over = true;
        shared.keeper.wake();
        let keeper = sync::lock(&shared.keeper_join).take();
        keeper.expect("it was started").join().expect("no panic");

        let (gate, runs) = (Arc::new(Gate::default()), Arc::new(AtomicU32::new(0)));
        let work = pool.work({
            let (gate, runs, mut held) = (Arc::clone(&gate), Arc::clone(&runs), running);
            move |_| {
                if mem::take(&mut held) {
                    gate.pass();
                }
                runs.fetch_add(1, Ordering::Relaxed);
            }
        });
        if running {
            work.queue().expect("open");
        } else {
            let gate = Arc::clone(&gate);
            pool.submit(Job::new(move |_| gate.pass())).expect("accepted");
        }
        gate.wait_until_reached();
        match word {
            Word::Timer => assert!(work.queue_delayed(LONG).expect("open")),
            Word::Task => assert!(work.queue().expect("open")),
            _ => {}
        }
        let bench = Self { pool, work, gate, runs };
        assert_eq!(
            (bench.look(), bench.work.item().shared().lock().slab[bench.work.item().slot()].worker != NIL),
            (word, running)
        );
        bench
    }

    /// The state, which never is without its list entry or timer.
    fn look(&self) -> Word {
        let state = self.work.item().shared().lock();
        let entry = &state.slab[self.work.item().slot()];
        let (word, running) = (entry.item.word, entry.worker != NIL);
        assert_eq!(
            (word == Word::Task && !running, word == Word::Timer),
            (entry.on != On::Nothing, entry.timer != NIL)
        );
        word
    }
}

fn perform(work: &Work, operation: Operation) -> bool {
    match operation {
        Operation::Queue => work.queue().expect("open"),
        Operation::QueueDelayed => work.queue_delayed(LONG).expect("open"),
        Operation::ModifyDelayed => work.modify_delayed(LONG * 2).expect("open"),
        Operation::ModifyNow => work.modify_delayed(Duration::ZERO).expect("open"),
        Operation::Cancel => work.cancel_delayed(),
        Operation::CancelSync => work.cancel_sync().expect("not from inside"),
        Operation::Flush => work.flush().expect("not from inside"),
        Operation::FlushDelayed => work.flush_delayed().expect("not from inside"),
        Operation::TimerFires => {
            let shared = work.item().shared();
            let mut fx = Effects::default();
            let mut state = shared.lock();
            let fires = state.stop_timer(work.item().slot());
            if fires {
                state.fired(work.item().slot(), &mut fx);
            }
            drop(state);
            shared.apply(fx);
            fires
        }
        Operation::Taken | Operation::Returns => unreachable!("the worker's own"),
    }
}

fn perform_all(work: &Work, runs: &AtomicU32, program: &Program) -> Vec<(bool, u32)> {
    let told = |&operation| (perform(work, operation), runs.load(Ordering::Relaxed));
    program.iter().map(told).collect()
}

/// Explores `programs`, the first on the thread that has made the state.
fn explore(word: Word, running: bool, programs: Vec<Program>) {
    let case = format!("{programs:?} in {word:?}, running: {running}");
    let possible = Arc::new(possible(word, running, &programs));
    let seen = Arc::new(Mutex::new(vec![false; possible.len()]));
    let mut model = loom::model::Builder::new();
    model.expect_explicit_explore = true;
    model.check({
        let (case, possible, seen) = (case.clone(), Arc::clone(&possible), Arc::clone(&seen));
        move || {
            let bench = Bench::new(word, running);
            loom::explore();
            bench.gate.open();
            let mut others = Vec::new();
            for program in &programs[1..] {
                let (work, runs, program) = (bench.work.clone(), Arc::clone(&bench.runs), program.clone());
                others.push(thread::spawn(move || perform_all(&work, &runs, &program)));
            }
            let mut told = vec![perform_all(&bench.work, &bench.runs, &programs[0])];
            told.extend(others.into_iter().map(|other| other.join().expect("no panic")));
            loom::stop_exploring();

            let timer = bench.look() == Word::Timer;
            let Bench { pool, work, runs, .. } = bench;
            drop((work, pool));
            let outcome = (told, timer, runs.load(Ordering::Relaxed));
            let place = possible.iter().position(|possible| *possible == outcome);
            let place = place.unwrap_or_else(|| panic!("{case}: {outcome:?} is not among {possible:?}"));
            seen.lock().expect("whole")[place] = true;
            if !programs.iter().flatten().copied().any(queues) {
                for (told, program) in outcome.0.iter().zip(&programs) {
                    let cancelled = program.iter().zip(told).find(|&(&call, _)| call == Operation::CancelSync);
                    assert!(cancelled.is_none_or(|(_, told)| told.1 == outcome.2), "{case}: it runs after the cancel");
                }
            }
        }
    });
    let seen = seen.lock().expect("whole");
    let seen = seen.iter().filter(|&&seen| seen).count();
    assert!(seen > 1 || possible.len() == 1, "{case}: nothing raced, {seen} of {} outcomes", possible.len());
}

#[test]
fn every_pair_of_operations_in_every_state_comes_out_as_in_some_order_of_the_table() {
    let its_own = |operation| matches!(operation, Operation::Taken | Operation::Returns);
    let callers: Vec<_> = Operation::ALL.into_iter().filter(|&operation| !its_own(operation)).collect();
    for (n, &first) in callers.iter().enumerate() {
        for &second in &callers[n..] {
            for (word, running) in STATES {
                // A flush may wait for the timer, which fires at last.
                let programs = match (first, second) {
                    (Operation::Flush, Operation::Flush) => {
                        vec![vec![Operation::TimerFires], vec![first], vec![second]]
                    }
                    _ if flushes(second) && !flushes(first) => vec![vec![first, Operation::TimerFires], vec![second]],
                    _ => vec![vec![first], vec![second]],
                };
                explore(word, running, programs);
            }
        }
    }
}

#[test]
fn queued_by_two_while_it_runs_is_exactly_one_more_run() {
    let programs = vec![vec![Operation::Queue], vec![Operation::Queue]];
    for (told, timer, runs) in possible(Word::Exec, true, &programs) {
        let accepted = told.iter().flatten().map(|told| u32::from(told.0)).sum::<u32>();
        assert!(!timer && runs == 1 + accepted && accepted > 0, "{told:?}, {runs} runs");
    }
    explore(Word::Exec, true, programs);
}
