//! Workers: how many there are, what blocks them, where they run, and that none sleeps while work waits.

use std::{
    io::Read,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    time::Duration,
};

use pinfold_workqueue::{Account, Flags, Job, Obtained, Pool, Priority, Queue, Refused, Topology, blocking};

use crate::{LONG, eventually, occupy, one_worker};

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
