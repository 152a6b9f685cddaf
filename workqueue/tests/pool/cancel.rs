//! Jobs that come to no good end: cancelled, or lost to a panic.

use std::{
    io::{Read, Write},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
};

use pinfold_workqueue::{Account, Cancelled, Job};

use crate::{LONG, occupy, one_worker, pool};

#[test]
fn a_pending_job_that_is_cancelled_is_called_once_as_cancelled_and_never_runs() {
    let pool = one_worker();
    let gate = occupy(&pool, |job| job);
    let calls = Arc::new(Mutex::new(Vec::new()));
    let here = std::thread::current().id();
    let handle = pool
        .submit(Job::new({
            let calls = Arc::clone(&calls);
            move |context| calls.lock().unwrap().push((context.cancelled(), std::thread::current().id() == here))
        }))
        .expect("accepted");
    assert_eq!(handle.cancel(), Cancelled::Ok);
    assert_eq!(*calls.lock().unwrap(), [(true, true)]);
    assert_eq!(Arc::strong_count(&calls), 1, "what it captured is gone");
    assert_eq!(handle.cancel(), Cancelled::NotFound);
    drop(gate);
    drop(pool);
    assert_eq!(calls.lock().unwrap().len(), 1);
}

#[test]
fn a_running_job_is_told_and_its_hook_called_unless_it_is_not_to_be_disturbed() {
    let pool = pool();
    let (mut reader, mut writer) = std::io::pipe().expect("a pipe");
    let (send, seen) = mpsc::channel();
    let started = send.clone();
    let job = Job::new(move |context| {
        started.send(context.cancelled()).expect("the test waits");
        let mut byte = [0];
        reader.read_exact(&mut byte).expect("the hook wakes it");
        send.send(context.cancelled()).expect("the test waits");
    });
    let writer_of_hook = writer.try_clone().expect("a descriptor");
    let handle = pool.submit(job.may_sleep().on_cancel(move || {
        (&writer_of_hook).write_all(&[1]).expect("the pipe is open");
    }));
    assert_eq!(seen.recv_timeout(LONG), Ok(false));
    assert_eq!(handle.expect("accepted").cancel(), Cancelled::Running);
    assert_eq!(seen.recv_timeout(LONG), Ok(true));

    let (send, seen) = mpsc::channel();
    let (release, gate) = mpsc::channel::<()>();
    let handle = pool
        .submit(
            Job::new(move |context| {
                send.send(false).expect("the test waits");
                let _ = gate.recv();
                send.send(context.cancelled()).expect("the test waits");
            })
            .no_cancel(),
        )
        .expect("accepted");
    seen.recv_timeout(LONG).expect("it runs");
    assert_eq!(handle.cancel(), Cancelled::Running);
    drop(release);
    assert_eq!(seen.recv_timeout(LONG), Ok(false), "it was not disturbed");
    writer.flush().expect("open");
}

#[test]
fn a_cancel_in_the_middle_of_a_chain_leaves_the_rest_in_order() {
    let pool = pool();
    let gate = occupy(&pool, |job| job.key(1));
    let (send, seen) = mpsc::channel();
    let handles: Vec<_> = (0..5)
        .map(|n| {
            let send = send.clone();
            let job = Job::new(move |context| send.send((n, context.cancelled())).expect("the test waits"));
            pool.submit(job.key(1)).expect("accepted")
        })
        .collect();
    assert_eq!(handles[2].cancel(), Cancelled::Ok);
    assert_eq!(handles[0].cancel(), Cancelled::Ok);
    drop((gate, send));
    let order: Vec<_> = seen.iter().collect();
    assert_eq!(order, [(2, true), (0, true), (1, false), (3, false), (4, false)]);
}

#[test]
fn cancel_by_predicate_takes_pending_work_first_and_all_goes_on_to_what_runs() {
    let pool = one_worker();
    let gate = occupy(&pool, |job| job.tag(5));
    let cancelled = Arc::new(AtomicU32::new(0));
    for n in 0..10 {
        let cancelled = Arc::clone(&cancelled);
        let job = Job::new(move |context| {
            cancelled.fetch_add(u32::from(context.cancelled()), Ordering::SeqCst);
        });
        pool.submit(job.tag(n)).expect("accepted");
    }
    assert_eq!(pool.cancel(|job| job.tag == 99, true), Cancelled::NotFound);
    assert_eq!(pool.cancel(|job| job.tag == 5, false), Cancelled::Ok);
    assert_eq!(pool.cancel(|job| job.tag >= 8, true), Cancelled::Ok);
    assert_eq!(cancelled.load(Ordering::SeqCst), 3);
    assert_eq!(pool.cancel(|job| job.tag == 5 || job.tag == 7, true), Cancelled::Running);
    assert_eq!(cancelled.load(Ordering::SeqCst), 4);
    drop(gate);
    drop(pool);
    assert_eq!(cancelled.load(Ordering::SeqCst), 4);
}

#[test]
fn cancel_all_tells_what_runs_and_what_is_started_later() {
    let pool = one_worker();
    let (send, seen) = mpsc::channel();
    let (release, gate) = mpsc::channel::<()>();
    let first = send.clone();
    pool.submit(Job::new(move |context| {
        first.send(false).expect("the test waits");
        let _ = gate.recv();
        first.send(context.cancelled()).expect("the test waits");
    }))
    .expect("accepted");
    seen.recv_timeout(LONG).expect("it runs");
    pool.submit(Job::new(move |context| send.send(context.cancelled()).expect("the test waits"))).expect("accepted");
    pool.cancel_all();
    drop(release);
    assert_eq!(seen.iter().collect::<Vec<_>>(), [true, true]);
}

#[test]
fn a_follow_up_runs_on_the_same_worker_and_that_of_a_cancelled_job_is_cancelled() {
    let pool = pool();
    let (send, seen) = mpsc::channel();
    let job = |send: mpsc::Sender<_>| {
        Job::linked(move |context| {
            send.send((context.cancelled(), std::thread::current().id())).expect("the test waits");
            Some(Job::new(move |context| {
                send.send((context.cancelled(), std::thread::current().id())).expect("the test waits");
            }))
        })
    };
    pool.submit(job(send.clone())).expect("accepted");
    let first = seen.recv_timeout(LONG).expect("it runs");
    assert_eq!(seen.recv_timeout(LONG), Ok(first));
    let handle = pool.submit(job(send).after(LONG)).expect("accepted");
    assert_eq!(handle.cancel(), Cancelled::Ok);
    let here = std::thread::current().id();
    assert_eq!(seen.iter().collect::<Vec<_>>(), [(true, here), (true, here)]);
}

#[test]
fn a_panic_is_contained_counted_and_drops_what_the_job_held() {
    let pool = one_worker();
    let held = Arc::new(());
    let in_job = Arc::clone(&held);
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    pool.submit(Job::new(move |_| {
        let _in_job = in_job;
        panic!("contained");
    }))
    .expect("accepted");
    let (send, seen) = mpsc::channel();
    pool.submit(Job::new(move |_| send.send(()).expect("the test waits"))).expect("accepted");
    seen.recv_timeout(LONG).expect("the worker lives on");
    std::panic::set_hook(quiet);
    assert_eq!(pool.counters(Account::Bounded).panicked, 1);
    assert_eq!(Arc::strong_count(&held), 1);
}
