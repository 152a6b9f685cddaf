//! A forked child has the pool's memory and none of its threads.

use std::time::{Duration, Instant};

use pinfold_workqueue::{Flags, Job, Pool};

#[test]
fn a_forked_child_drops_every_handle_without_waiting_for_threads_it_does_not_have() {
    let pool = Pool::builder("parent").build().expect("a pool");
    let queue = pool.queue("queue", Flags::NONE, 0).expect("a queue");
    let work = queue.work(|_| {});
    work.queue_delayed(Duration::from_secs(3600)).expect("open");
    let handle = pool.submit(Job::new(|_| {}).after(Duration::from_secs(3600))).expect("accepted");
    // SAFETY: the child calls only what this test is about, drops of plain memory, and `_exit`.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        drop((work, queue, handle, pool));
        // SAFETY: it ends the child at once, without running what the parent has registered for its exit.
        unsafe { libc::_exit(7) };
    }
    let end = Instant::now() + Duration::from_secs(30);
    let mut status = 0;
    // SAFETY: `child` is a child of this process, and `status` is a live integer.
    while unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) } == 0 {
        if Instant::now() > end {
            // SAFETY: `child` has not been waited for, so the number is still its own.
            unsafe { libc::kill(child, libc::SIGKILL) };
            panic!("the child hangs");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 7, "{status:#x}");
    // The parent's pool goes on.
    let (job, done) = Job::tracked(|_| Ok(()));
    pool.submit(job).expect("accepted");
    done.wait().expect("it runs");
    drop((work, queue, handle));
}
