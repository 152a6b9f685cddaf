//! The three ways to wait for a job, and the system queues.

use std::{
    sync::{Arc, mpsc},
    task::{Context, Poll, Wake, Waker},
    thread,
    time::Duration,
};

use pinfold_workqueue::{
    Completion, Ended, Flags, Job, Pool, Queue, system, system_highpri, system_long, system_unbound,
};
use rustix::event::{PollFd, PollFlags, poll};

const LONG: Duration = Duration::from_secs(30);

fn pool() -> Pool {
    Pool::builder("test").bounded(1).build().expect("a pool")
}

/// A job that returns 7 once the sender is dropped.
fn gated() -> (Job, Completion<u32>, mpsc::Sender<()>) {
    let (release, gate) = mpsc::channel::<()>();
    let (job, completion) = Job::tracked(move |_| {
        let _ = gate.recv();
        Ok(7)
    });
    (job, completion, release)
}

/// Drives a future with nothing but the standard library.
fn block_on<F: Future + Unpin>(mut future: F) -> F::Output {
    struct Unpark(thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    loop {
        match std::pin::Pin::new(&mut future).poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}

#[test]
fn a_result_is_waited_for_with_a_limit_and_taken_once() {
    let pool = pool();
    let (job, mut completion, release) = gated();
    pool.submit(job).expect("accepted");
    assert!(completion.wait_timeout(Duration::from_millis(1)).is_none());
    drop(release);
    assert!(matches!(completion.wait_timeout(LONG), Some(Ok(7))));
    assert!(completion.try_take().is_none());
}

#[test]
fn a_result_is_a_future_for_any_executor() {
    let pool = pool();
    let (job, completion, release) = gated();
    pool.submit(job).expect("accepted");
    let opener = thread::spawn(move || drop(release));
    assert!(matches!(block_on(completion), Ok(7)));
    opener.join().expect("no panic");
}

#[test]
fn a_result_makes_its_eventfd_readable_whether_asked_for_before_or_after() {
    let pool = pool();
    let (job, mut completion, release) = gated();
    let readable = |completion: &Completion<u32>, wait: bool| {
        let descriptor = completion.eventfd().expect("a descriptor");
        let mut fds = [PollFd::new(&descriptor, PollFlags::IN)];
        let none = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, if wait { None } else { Some(&none) }).expect("it can be polled") == 1
    };
    pool.submit(job).expect("accepted");
    assert!(!readable(&completion, false));
    drop(release);
    assert!(readable(&completion, true));
    assert!(matches!(completion.try_take(), Some(Ok(7))));

    let (job, completion) = Job::tracked(|_| Ok(7_u32));
    let handle = pool.submit(job).expect("accepted");
    let (job, barrier) = Job::tracked(|_| Ok(()));
    pool.submit(job).expect("accepted");
    barrier.wait().expect("it runs");
    assert!(!handle.is_live());
    assert!(readable(&completion, false));
}

#[test]
fn a_tracked_job_that_was_cancelled_told_or_panicked_says_so() {
    let pool = pool();
    let (report, started) = mpsc::channel();
    let (release, gate) = mpsc::channel::<()>();
    let (job, told) = Job::tracked(move |context| {
        report.send(()).expect("the test waits");
        let _ = gate.recv();
        context.check()
    });
    let told_handle = pool.submit(job).expect("accepted");
    started.recv_timeout(LONG).expect("it runs");
    let (job, cancelled) = Job::tracked(|_| Ok(()));
    pool.submit(job).expect("accepted").cancel();
    let ended = cancelled.wait().expect_err("it did not run");
    assert_eq!(ended.errno(), Some(125));
    told_handle.cancel();
    drop(release);
    let ended = told.wait().expect_err("it was told");
    assert!(matches!(ended, Ended::Interrupted) && ended.errno() == Some(4));

    let (job, panicked) = Job::tracked::<()>(|_| std::panic::resume_unwind(Box::new("quietly")));
    pool.submit(job).expect("accepted");
    match panicked.wait() {
        Err(Ended::Panicked(payload)) => assert_eq!(payload.downcast_ref(), Some(&"quietly")),
        other => panic!("{other:?}"),
    }
    // Never submitted at all is a way to be cancelled too.
    let (job, dropped) = Job::tracked(|_| Ok(()));
    drop(job);
    assert!(matches!(dropped.wait(), Err(Ended::Cancelled)));
}

#[test]
fn every_system_queue_runs_work() {
    let queues = [system(), system_long(), system_unbound(), system_highpri()];
    for queue in queues {
        let queue: &Queue = queue.expect("a queue");
        let (job, completion) = Job::tracked(|_| Ok(1));
        queue.submit(job).expect("accepted");
        assert_eq!(completion.wait().expect("it runs"), 1);
    }
    assert!(system_long().expect("a queue").flags().contains(Flags::MAY_SLEEP));
}
