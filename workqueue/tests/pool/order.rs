//! In which order jobs run: by line, by key, by queue, by time.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use pinfold_workqueue::{Flags, Job, Pool, Queue, Topology};

use crate::{LONG, occupy, one_worker, pool};

#[test]
fn one_worker_runs_jobs_in_the_order_they_were_queued() {
    let pool = one_worker();
    let gate = occupy(&pool, |job| job);
    let (send, seen) = mpsc::channel();
    for n in 0..100 {
        let send = send.clone();
        pool.submit(Job::new(move |_| send.send(n).expect("the test waits"))).expect("accepted");
    }
    drop((gate, send));
    assert_eq!(seen.iter().collect::<Vec<_>>(), (0..100).collect::<Vec<_>>());
}

#[test]
fn jobs_of_one_key_run_one_at_a_time_in_order_while_others_overtake() {
    let pool = pool();
    let orders = Arc::new([const { Mutex::new(Vec::new()) }; 3]);
    let busy = Arc::new([const { AtomicBool::new(false) }; 3]);
    for n in 0..3000_usize {
        let (orders, busy) = (Arc::clone(&orders), Arc::clone(&busy));
        let job = Job::new(move |_| {
            assert!(!busy[n % 3].swap(true, Ordering::SeqCst), "two at a time");
            orders[n % 3].lock().unwrap().push(n);
            busy[n % 3].store(false, Ordering::SeqCst);
        });
        pool.submit(job.key((n % 3) as u64)).expect("accepted");
    }
    // A job that blocks its key holds up nobody else.
    let gate = occupy(&pool, |job| job.key(7));
    let (send, seen) = mpsc::channel();
    pool.submit(
        Job::new({
            let send = send.clone();
            move |_| send.send("same key").expect("the test waits")
        })
        .key(7),
    )
    .expect("accepted");
    pool.submit(Job::new(move |_| send.send("another").expect("the test waits")).key(8)).expect("accepted");
    assert_eq!(seen.recv_timeout(LONG), Ok("another"));
    drop(gate);
    assert_eq!(seen.recv_timeout(LONG), Ok("same key"));
    drop(pool);
    for (n, order) in orders.iter().enumerate() {
        assert_eq!(*order.lock().unwrap(), (n..3000).step_by(3).collect::<Vec<_>>());
    }
}

#[test]
fn a_delayed_job_runs_after_its_time_and_earlier_ones_first() {
    let pool = one_worker();
    let (send, seen) = mpsc::channel();
    let start = Instant::now();
    for n in [30, 10, 20] {
        let send = send.clone();
        let delay = Duration::from_millis(n);
        let job = Job::new(move |_| send.send((n, start.elapsed() >= delay)).expect("the test waits"));
        pool.submit(job.after(delay)).expect("accepted");
    }
    drop(send);
    assert_eq!(seen.iter().collect::<Vec<_>>(), [(10, true), (20, true), (30, true)]);
}

#[test]
fn keys_hold_across_nodes() {
    let pool = Pool::builder("test").topology(Topology::from_nodes([[0], [1]])).build().expect("a pool");
    let busy = Arc::new(AtomicBool::new(false));
    let order = Arc::new(Mutex::new(Vec::new()));
    for n in 0..500 {
        let (busy, order) = (Arc::clone(&busy), Arc::clone(&order));
        let job = Job::new(move |_| {
            assert!(!busy.swap(true, Ordering::SeqCst));
            order.lock().unwrap().push(n);
            busy.store(false, Ordering::SeqCst);
        });
        pool.submit(job.key(1)).expect("accepted");
    }
    drop(pool);
    assert_eq!(*order.lock().unwrap(), (0..500).collect::<Vec<_>>());
}

#[test]
fn an_ordered_queue_runs_one_at_a_time_in_order() {
    let queue = Queue::new("ordered", Flags::ORDERED | Flags::UNBOUND, 0).expect("a queue");
    let (busy, order) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
    for n in 0..1000 {
        let (busy, order) = (Arc::clone(&busy), Arc::clone(&order));
        queue
            .submit(Job::new(move |_| {
                assert!(!busy.swap(true, Ordering::SeqCst));
                order.lock().unwrap().push(n);
                busy.store(false, Ordering::SeqCst);
            }))
            .expect("accepted");
    }
    queue.drain().expect("not from inside");
    assert_eq!(*order.lock().unwrap(), (0..1000).collect::<Vec<_>>());
}
