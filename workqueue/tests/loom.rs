//! Models of the pool, explored by loom: every order in which the threads can take the lock, park and wake.
//!
//! `RUSTFLAGS="--cfg loom" LOOM_MAX_PREEMPTIONS=2 cargo test -p pinfold-workqueue --test loom --release`
//!
//! What callers may do to one item at the same time is in `src/table_models.rs`.
//!
//! A lost wake-up shows as a deadlock, which loom reports: the end of a pool waits until all its work has run.

#![cfg(loom)]

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use loom::thread;
use pinfold_workqueue::{Cancelled, Job, Pool, Topology, Work, blocking};

/// Enough workers for work to meet itself on two of them.
fn pool(workers: u32, processors: &[usize]) -> Pool {
    Pool::builder("model")
        .bounded(workers)
        .may_sleep(0)
        .topology(Topology::from_nodes([processors]))
        .spin(Duration::ZERO)
        .build()
        .expect("a pool")
}

/// What no run of an item may break, checked from inside its function.
#[derive(Default)]
struct Law {
    inside: AtomicBool,
    runs: AtomicU32,
}

impl Law {
    fn item(self: &Arc<Self>, pool: &Pool) -> Work {
        let law = Arc::clone(self);
        pool.work(move |_| {
            assert!(!law.inside.swap(true, Ordering::Relaxed), "two runs at a time");
            thread::yield_now();
            law.runs.fetch_add(1, Ordering::Relaxed);
            law.inside.store(false, Ordering::Relaxed);
        })
    }

    fn runs(&self) -> u32 {
        self.runs.load(Ordering::Relaxed)
    }
}

#[test]
fn no_wake_up_is_lost_between_a_submitter_and_a_worker_that_falls_asleep() {
    loom::model(|| {
        let pool = pool(1, &[0]);
        let runs = Arc::new(AtomicU32::new(0));
        let submit = |pool: &Pool| {
            let runs = Arc::clone(&runs);
            let job = Job::new(move |_| {
                runs.fetch_add(1, Ordering::Relaxed);
            });
            pool.submit(job).expect("accepted");
        };
        submit(&pool);
        submit(&pool);
        drop(pool);
        assert_eq!(runs.load(Ordering::Relaxed), 2);
    });
}

#[test]
fn no_wake_up_is_lost_with_two_workers_of_which_the_first_wakes_the_second() {
    loom::model(|| {
        let pool = pool(2, &[0, 1]);
        let runs = Arc::new(AtomicU32::new(0));
        for _ in 0..2 {
            let runs = Arc::clone(&runs);
            let job = Job::new(move |_| {
                runs.fetch_add(1, Ordering::Relaxed);
            });
            pool.submit(job).expect("accepted");
        }
        drop(pool);
        assert_eq!(runs.load(Ordering::Relaxed), 2);
    });
}

/// No watchdog helps here: it needs a clock.
#[test]
fn what_waits_behind_declared_blocking_gets_a_worker_at_once() {
    loom::model(|| {
        let pool = pool(2, &[0]);
        let gate = Arc::new((loom::sync::Mutex::new(false), loom::sync::Condvar::new()));
        let waiting = Arc::clone(&gate);
        let sleeper = Job::new(move |_| {
            blocking(|| {
                let mut open = waiting.0.lock().expect("whole");
                while !*open {
                    open = waiting.1.wait(open).expect("whole");
                }
            });
        });
        pool.submit(sleeper).expect("accepted");
        let opener = Job::new(move |_| {
            *gate.0.lock().expect("whole") = true;
            gate.1.notify_all();
        });
        pool.submit(opener).expect("accepted");
        drop(pool);
    });
}

#[test]
fn a_job_is_called_once_whether_the_cancel_or_the_worker_wins() {
    loom::model(|| {
        let pool = pool(1, &[0]);
        let calls = Arc::new(Mutex::new(Vec::new()));
        let job = Job::new({
            let calls = Arc::clone(&calls);
            move |context| calls.lock().expect("whole").push(context.cancelled())
        });
        let found = pool.submit(job).expect("accepted").cancel();
        drop(pool);
        let calls = calls.lock().expect("whole");
        match found {
            Cancelled::Ok => assert_eq!(*calls, [true]),
            Cancelled::Running => assert_eq!(calls.len(), 1),
            Cancelled::NotFound => assert_eq!(*calls, [false]),
        }
    });
}

#[test]
fn two_jobs_of_one_key_never_meet() {
    loom::model(|| {
        let pool = pool(2, &[0, 1]);
        let law = Arc::new((AtomicBool::new(false), Mutex::new(Vec::new())));
        for n in 0..2 {
            let law = Arc::clone(&law);
            let job = Job::new(move |_| {
                assert!(!law.0.swap(true, Ordering::Relaxed));
                thread::yield_now();
                law.1.lock().expect("whole").push(n);
                law.0.store(false, Ordering::Relaxed);
            });
            pool.submit(job.key(5)).expect("accepted");
        }
        drop(pool);
        assert_eq!(*law.1.lock().expect("whole"), [0, 1]);
    });
}

#[test]
fn every_accepted_queueing_is_exactly_one_run() {
    loom::model(|| {
        let pool = pool(1, &[0]);
        let law = Arc::new(Law::default());
        let work = law.item(&pool);
        let other = thread::spawn({
            let work = work.clone();
            move || u32::from(work.queue().expect("open"))
        });
        let accepted = u32::from(work.queue().expect("open")) + other.join().expect("no panic");
        drop((pool, work));
        assert_eq!(law.runs(), accepted);
    });
}

#[test]
fn after_cancel_sync_the_item_does_not_run() {
    loom::model(|| {
        let pool = pool(1, &[0]);
        let law = Arc::new(Law::default());
        let work = law.item(&pool);
        work.queue().expect("open");
        let other = thread::spawn({
            let work = work.clone();
            move || work.cancel_sync().expect("not from inside")
        });
        let mine = work.cancel_sync().expect("not from inside");
        assert!(!law.inside.load(Ordering::Relaxed), "it runs after the cancel");
        let before = law.runs();
        let theirs = other.join().expect("no panic");
        drop((pool, work));
        assert_eq!(law.runs(), before);
        assert_eq!(law.runs() + u32::from(mine) + u32::from(theirs), 1, "it ran or it was taken back");
    });
}

#[test]
fn a_flush_that_returns_has_seen_the_run_it_waited_for() {
    loom::model(|| {
        let pool = pool(1, &[0]);
        let law = Arc::new(Law::default());
        let work = law.item(&pool);
        assert!(work.queue().expect("open"));
        work.flush().expect("not from inside");
        assert_eq!(law.runs(), 1);
        drop((pool, work));
    });
}
