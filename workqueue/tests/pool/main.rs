//! One-shot jobs on a pool.

mod cancel;
mod end;
mod order;
mod workers;

use std::{
    sync::mpsc,
    time::{Duration, Instant},
};

use pinfold_workqueue::{Job, Pool};

/// Far beyond anything that happens on a busy machine; only a hang gets there.
const LONG: Duration = Duration::from_secs(30);

fn pool() -> Pool {
    Pool::builder("test").build().expect("a pool")
}

fn one_worker() -> Pool {
    Pool::builder("test").bounded(1).build().expect("a pool")
}

/// Occupies a worker until the returned sender is dropped; returns once it runs.
fn occupy(pool: &Pool, job: impl FnOnce(Job) -> Job) -> mpsc::Sender<()> {
    let (release, gate) = mpsc::channel::<()>();
    let (running, started) = mpsc::channel();
    let body = Job::new(move |_| {
        running.send(()).expect("the test waits");
        let _ = gate.recv();
    });
    pool.submit(job(body)).expect("accepted");
    started.recv_timeout(LONG).expect("it starts");
    release
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
