//! How a queue and a pool end.

use std::sync::mpsc;

use pinfold_workqueue::{Flags, Job, Pool, Refused};

use crate::{LONG, occupy, pool};

#[test]
fn the_last_handle_may_be_dropped_by_the_pools_own_worker() {
    // Also where there can be no other worker.
    let alone = Pool::builder("test").bounded(1).build().expect("a pool");
    for pool in [pool(), alone] {
        let (send, seen) = mpsc::channel();
        let inside = pool.clone();
        let (give, take) = mpsc::channel::<()>();
        let other = send.clone();
        pool.submit(Job::new(move |_| {
            let _ = take.recv();
            drop(inside);
            send.send(1).expect("the test waits");
        }))
        .expect("accepted");
        pool.submit(Job::new(move |_| other.send(2).expect("the test waits"))).expect("accepted");
        drop(pool);
        drop(give);
        let mut both = [(); 2].map(|()| seen.recv_timeout(LONG).expect("what is queued is run"));
        both.sort_unstable();
        assert_eq!(both, [1, 2]);
    }
}

#[test]
fn dropping_the_pool_runs_or_cancels_what_is_queued_and_cancels_what_is_delayed() {
    for cancel in [false, true] {
        let builder = Pool::builder("test").bounded(1);
        let pool = if cancel { builder.cancel_at_end() } else { builder }.build().expect("a pool");
        let gate = occupy(&pool, |job| job);
        let (send, seen) = mpsc::channel();
        let late = send.clone();
        pool.submit(Job::new(move |cx| late.send(("late", cx.cancelled())).expect("the test waits")).after(LONG))
            .expect("accepted");
        pool.submit(Job::new(move |cx| send.send(("queued", cx.cancelled())).expect("the test waits")))
            .expect("accepted");
        let ender = std::thread::spawn(move || drop(pool));
        assert_eq!(seen.recv_timeout(LONG), Ok(("late", true)));
        if cancel {
            assert_eq!(seen.recv_timeout(LONG), Ok(("queued", true)));
        }
        drop(gate);
        ender.join().expect("it ends");
        if !cancel {
            assert_eq!(seen.recv_timeout(LONG), Ok(("queued", false)));
        }
        assert!(seen.try_recv().is_err());
    }
}

#[test]
fn a_destroyed_queue_refuses_and_its_pool_goes_on() {
    let pool = pool();
    let queue = pool.queue("short-lived", Flags::NONE, 1).expect("a queue");
    let (send, seen) = mpsc::channel();
    let late = send.clone();
    queue.submit(Job::new(move |cx| late.send(cx.cancelled()).expect("the test waits")).after(LONG)).expect("accepted");
    queue.destroy().expect("not from inside");
    assert_eq!(seen.try_recv(), Ok(true));
    let again = send.clone();
    let refused = queue.submit(Job::new(move |cx| again.send(cx.cancelled()).expect("the test waits")));
    assert_eq!(refused.map(drop), Err(Refused::Draining));
    assert_eq!(seen.try_recv(), Ok(true));
    pool.submit(Job::new(move |cx| send.send(cx.cancelled()).expect("the test waits"))).expect("accepted");
    assert_eq!(seen.recv_timeout(LONG), Ok(false));
}
