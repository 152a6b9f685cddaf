//! One-shot jobs: order, keys, links, cancel, blocking, limits, and how a pool ends.

use std::{
    io::{Read, Write},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use pinfold_workqueue::{Account, Cancelled, Flags, Job, Obtained, Pool, Priority, Queue, Refused, Topology, blocking};

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

#[test]
fn new_work_runs_while_every_worker_sleeps_in_declared_blocking() {
    let pool = Pool::builder("test").bounded(9).build().expect("a pool");
    let gates: Vec<_> = (0..8)
        .map(|_| {
            let (release, gate) = mpsc::channel::<()>();
            pool.submit(Job::new(move |_| {
                let _ = blocking(|| blocking(|| gate.recv()));
            }))
            .expect("accepted");
            release
        })
        .collect();
    let (send, seen) = mpsc::channel();
    pool.submit(Job::new(move |_| send.send(()).expect("the test waits"))).expect("accepted");
    seen.recv_timeout(LONG).expect("a ninth worker runs it");
    assert!(pool.workers(Account::Bounded) <= 9);
    drop(gates);
}

#[test]
fn new_work_runs_while_every_worker_sleeps_in_a_read_nobody_declared() {
    let pool = Pool::builder("test").bounded(9).build().expect("a pool");
    let (reader, writer) = std::io::pipe().expect("a pipe");
    for _ in 0..8 {
        let mut reader = reader.try_clone().expect("a descriptor");
        pool.submit(Job::new(move |_| {
            let _ = reader.read(&mut [0]);
        }))
        .expect("accepted");
    }
    let (send, seen) = mpsc::channel();
    pool.submit(Job::new(move |_| send.send(()).expect("the test waits"))).expect("accepted");
    seen.recv_timeout(LONG).expect("the watchdog finds a worker for it");
    assert!(pool.counters(Account::Bounded).stalls > 0);
    drop(writer);
}

#[test]
fn concurrent_work_starts_beyond_the_number_of_processors() {
    let pool = Pool::builder("test").bounded(8).topology(Topology::from_nodes([[0]])).build().expect("a pool");
    let _gates: Vec<_> = (0..8).map(|_| occupy(&pool, Job::concurrent)).collect();
    assert_eq!(pool.workers(Account::Bounded), 8);
}

#[test]
fn short_work_never_grows_the_pool_beyond_the_processors() {
    let pool = Pool::builder("test").bounded(64).topology(Topology::from_nodes([[0, 1]])).build().expect("a pool");
    let done = Arc::new(AtomicU32::new(0));
    for _ in 0..20_000 {
        let done = Arc::clone(&done);
        pool.submit(Job::new(move |_| {
            done.fetch_add(1, Ordering::Relaxed);
        }))
        .expect("accepted");
    }
    eventually("all have run", || done.load(Ordering::Relaxed) == 20_000);
    let counters = pool.counters(Account::Bounded);
    assert!(counters.workers_made <= 2 + counters.stalls, "{counters:?}");
}

#[test]
fn may_sleep_work_without_any_worker_for_it_is_refused_and_called_as_cancelled() {
    let pool = Pool::builder("test").may_sleep(0).build().expect("a pool");
    let gate = occupy(&pool, |job| job);
    let (send, seen) = mpsc::channel();
    let result =
        pool.submit(Job::new(move |context| send.send(context.cancelled()).expect("the test waits")).may_sleep());
    match result {
        Err(refused) => {
            assert_eq!(refused, Refused::Limit);
            assert_eq!(seen.try_recv(), Ok(true));
        }
        Ok(handle) => {
            // With the privilege to ignore limits it waits; the limit can be raised.
            assert!(handle.is_live());
            pool.set_max_workers(Account::MaySleep, 1).expect("valid");
            assert_eq!(seen.recv_timeout(LONG), Ok(false));
        }
    }
    drop(gate);
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
fn idle_workers_go_and_one_stays() {
    let pool = Pool::builder("test").bounded(8).idle_exit(Duration::from_millis(20)).build().expect("a pool");
    let workers = || Account::BOTH.map(|account| pool.workers(account)).iter().sum::<u32>();
    let mut gates: Vec<_> = (0..4).map(|_| occupy(&pool, Job::concurrent)).collect();
    gates.extend((0..4).map(|_| occupy(&pool, |job| job.concurrent().may_sleep())));
    assert_eq!(workers(), 8);
    drop(gates);
    eventually("all but one have gone", || workers() == 1);
    let _gate = occupy(&pool, |job| job);
}

#[test]
fn a_refused_thread_leaves_the_work_to_those_there_are_and_is_asked_for_again() {
    let pool = Pool::builder("test").bounded(4).build().expect("a pool");
    let gate = occupy(&pool, |job| job);
    pool.refuse_threads(2);
    let (send, seen) = mpsc::channel();
    pool.submit(Job::new(move |_| send.send(()).expect("the test waits")).concurrent()).expect("accepted");
    seen.recv_timeout(LONG).expect("the keeper gets a thread at last");
    let counters = pool.counters(Account::Bounded);
    assert_eq!(counters.workers_refused, 2);
    drop(gate);
}

#[test]
fn a_pool_that_gets_no_thread_at_all_is_not_made() {
    match Pool::builder("test").refuse_threads(1).build() {
        Err(error) => assert_eq!(error.errno(), 11, "{error}"),
        Ok(pool) => panic!("made without threads: {pool:?}"),
    }
}

#[test]
fn a_lower_limit_takes_effect_as_workers_finish() {
    let pool = Pool::builder("test").bounded(8).build().expect("a pool");
    let gates: Vec<_> = (0..6).map(|_| occupy(&pool, Job::concurrent)).collect();
    pool.set_max_workers(Account::Bounded, 2).expect("valid");
    assert_eq!(pool.max_workers(Account::Bounded), 2);
    drop(gates);
    eventually("two are left", || pool.workers(Account::Bounded) == 2);
    let made = pool.counters(Account::Bounded);
    assert_eq!(made.workers_made - made.workers_gone, 2);
    assert!(pool.set_max_workers(Account::Bounded, 0).is_err());
}

#[test]
fn work_runs_on_a_processor_of_the_node_that_submits_it() {
    use rustix::thread::{CpuSet, sched_getcpu, sched_setaffinity};
    let pool = Pool::builder("test").topology(Topology::from_nodes([[0], [1]])).build().expect("a pool");
    let mut tried = 0;
    for processor in [0, 1, 0, 1] {
        let mut only = CpuSet::new();
        only.set(processor);
        if sched_setaffinity(None, &only).is_err() {
            eprintln!(
                "SKIPPED PART OF work_runs_on_a_processor_of_the_node_that_submits_it: processor {processor} may not be used"
            );
            continue;
        }
        tried += 1;
        let (job, ran_on) = Job::tracked(|_| Ok(sched_getcpu()));
        pool.submit(job).expect("accepted");
        assert_eq!(ran_on.wait().expect("it runs"), processor);
    }
    assert!(tried > 0, "one of two processors can be used");
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
fn the_last_handle_may_be_dropped_by_the_pools_own_worker() {
    let (send, seen) = mpsc::channel();
    let pool = pool();
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
    let mut both: Vec<_> = seen.iter().collect();
    both.sort_unstable();
    assert_eq!(both, [1, 2]);
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

#[test]
fn a_high_priority_queue_has_named_workers_and_says_what_it_obtained() {
    let queue = Queue::new("userptr-acquire", Flags::HIGHPRI | Flags::UNBOUND, 0).expect("a queue");
    let (send, seen) = mpsc::channel();
    queue
        .submit(Job::new(move |_| {
            send.send(std::thread::current().name().map(str::to_owned)).expect("the test waits");
        }))
        .expect("accepted");
    assert_eq!(seen.recv_timeout(LONG).expect("it runs").as_deref(), Some("userptr-acquire"));
    let obtained = queue.pool().obtained();
    assert!(matches!(obtained, Some(Obtained::Nice(-20..=0))), "{obtained:?}");
}

#[test]
fn real_time_is_had_where_it_is_permitted_and_is_never_an_error() {
    use thread_priority::{RealtimeThreadSchedulePolicy::RoundRobin, ThreadSchedulePolicy::Realtime};
    let pool = Pool::builder("test").priority(Priority::RealTime).build().expect("a pool");
    let (job, policy) = Job::tracked(|_| Ok(thread_priority::thread_schedule_policy().expect("it can be read")));
    pool.submit(job).expect("accepted");
    let really = policy.wait().expect("it runs") == Realtime(RoundRobin);
    match pool.obtained() {
        Some(Obtained::RoundRobin) => assert!(really),
        Some(Obtained::Nice(nice)) => assert!(!really && (-20..=0).contains(&nice), "{nice}"),
        None => panic!("what it has can be read"),
    }
    assert!(pool.queue("urgent", Flags::HIGHPRI, 0).is_ok());
    assert!(one_worker().queue("urgent", Flags::HIGHPRI, 0).is_err(), "a pool of normal priority");
}

#[test]
fn pinned_workers_stay_on_the_processors_they_were_given() {
    use rustix::thread::sched_getaffinity;
    let allowed = sched_getaffinity(None).expect("it can be read");
    let last = (0..1024).rev().find(|&processor| allowed.is_set(processor)).expect("this thread runs somewhere");
    let pool = Pool::builder("test").topology(Topology::from_nodes([[last]])).pin().build().expect("a pool");
    let (job, mask) = Job::tracked(|_| Ok(sched_getaffinity(None).expect("it can be read")));
    pool.submit(job).expect("accepted");
    let mask = mask.wait().expect("it runs");
    assert!(mask.is_set(last) && mask.count() == 1, "{mask:?}");
}

#[test]
fn the_dump_says_what_every_worker_does_and_what_waits() {
    let pool = Pool::builder("test").bounded(1).build().expect("a pool");
    let gate = occupy(&pool, |job| job.tag(77).key(5));
    pool.submit(Job::new(|_| {})).expect("accepted");
    let dump = format!("{pool:?}");
    for part in ["1 of 1 workers", "1 running", "1 waiting", "worker 0", "tag: 77", "key: Some(5)", "queued: 2"] {
        assert!(dump.contains(part), "no `{part}` in {dump}");
    }
    drop(gate);
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

#[test]
fn no_wake_up_is_lost_in_random_cycles_of_work_and_rest() {
    let cycles: u32 = std::env::var("PINFOLD_SOAK_CYCLES").ok().and_then(|n| n.parse().ok()).unwrap_or(100_000);
    let pool = Pool::builder("test").spin(Duration::from_micros(2)).build().expect("a pool");
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let done = Arc::new(AtomicU32::new(0));
    let (send, seen) = mpsc::channel();
    for cycle in 0..cycles {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let burst = random % 3 + 1;
        for n in 0..burst {
            let (done, send) = (Arc::clone(&done), send.clone());
            let mut job = Job::new(move |_| {
                if done.fetch_add(1, Ordering::AcqRel) + 1 == burst as u32 {
                    send.send(()).expect("the test waits");
                }
            });
            if random & 0x100 << n != 0 {
                job = job.concurrent();
            }
            if random & 0x1000 << n != 0 {
                job = job.may_sleep();
            }
            pool.submit(job).expect("accepted");
        }
        seen.recv_timeout(LONG).unwrap_or_else(|_| panic!("cycle {cycle}: work is left lying\n{pool:?}"));
        done.store(0, Ordering::Release);
        for _ in 0..random >> 16 & 0xff {
            std::hint::spin_loop();
        }
    }
}
