//! Work items: what queueing, cancelling and waiting mean while the function runs, and from inside it.

use std::{
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU32, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use pinfold_workqueue::{Account, Error, Flags, Job, Pool, Queue, Work};

const LONG: Duration = Duration::from_secs(30);

fn pool() -> Pool {
    Pool::builder("test").build().expect("a pool")
}

/// An item whose runs each report and then wait for a permit.
struct Stepper {
    work: Work,
    runs: mpsc::Receiver<u32>,
    permits: mpsc::Sender<()>,
}

fn stepper(pool: &Pool) -> Stepper {
    let (report, runs) = mpsc::channel();
    let (permits, permit) = mpsc::channel::<()>();
    let mut count = 0;
    let work = pool.work(move |_| {
        count += 1;
        let _ = report.send(count);
        let _ = permit.recv();
    });
    Stepper { work, runs, permits }
}

#[test]
fn queued_again_while_running_means_exactly_one_more_run() {
    let pool = pool();
    let Stepper { work, runs, permits } = stepper(&pool);
    assert!(work.queue().expect("open"));
    assert_eq!(runs.recv_timeout(LONG), Ok(1));
    assert!(!work.pending() && work.busy());
    assert!(work.queue().expect("open"));
    assert!(!work.queue().expect("open"));
    assert!(work.pending());
    permits.send(()).expect("it waits");
    assert_eq!(runs.recv_timeout(LONG), Ok(2));
    permits.send(()).expect("it waits");
    assert!(work.flush().is_ok());
    drop(permits);
    drop(pool);
    assert!(runs.try_recv().is_err(), "two runs, not three");
}

#[test]
fn a_pending_item_is_queued_once_however_often_it_is_asked_for() {
    let pool = Pool::builder("test").bounded(1).build().expect("a pool");
    let (release, gate) = mpsc::channel::<()>();
    pool.submit(Job::new(move |_| {
        let _ = gate.recv();
    }))
    .expect("accepted");
    let runs = Arc::new(AtomicU32::new(0));
    let work = pool.work({
        let runs = Arc::clone(&runs);
        move |_| {
            runs.fetch_add(1, Ordering::SeqCst);
        }
    });
    assert_eq!([(); 3].map(|()| work.queue().expect("open")), [true, false, false]);
    assert!(!work.queue_delayed(LONG).expect("open"), "it is queued already");
    drop(release);
    let _ = work.flush().expect("not from inside"); // it may have run already
    assert_eq!(runs.load(Ordering::SeqCst), 1);
    assert!(!work.flush().expect("not from inside"), "an idle item is not waited for");
}

#[test]
fn after_cancel_sync_an_item_that_queues_itself_does_not_run() {
    let pool = pool();
    let (runs, me) = (Arc::new(AtomicU32::new(0)), Arc::new(OnceLock::<Work>::new()));
    let work = pool.work({
        let (runs, me) = (Arc::clone(&runs), Arc::clone(&me));
        move |_| {
            runs.fetch_add(1, Ordering::SeqCst);
            let _ = me.get().expect("set before").queue();
        }
    });
    let _ = me.set(work.clone());
    for round in 0..200 {
        work.queue().expect("open");
        if round % 2 == 0 {
            work.queue_delayed(Duration::from_micros(50)).expect("open");
        }
        work.cancel_sync().expect("not from inside");
        let after = runs.load(Ordering::SeqCst);
        assert!(!work.busy());
        std::thread::yield_now();
        assert_eq!(runs.load(Ordering::SeqCst), after);
    }
}

#[test]
fn waiting_for_oneself_is_refused_as_a_deadlock() {
    let pool = pool();
    let (send, seen) = mpsc::channel();
    let queue = pool.queue("own", Flags::NONE, 0).expect("a queue");
    let inside = queue.clone();
    let work = queue.work(move |_| {
        let me = Work::current().expect("inside an item");
        let all = [
            me.flush(),
            me.flush_delayed(),
            me.cancel_sync(),
            me.cancel_delayed_sync(),
            inside.drain().map(|()| false),
            inside.destroy().map(|()| false),
        ];
        send.send(all.map(|result| matches!(result, Err(Error::Deadlock)))).expect("the test waits");
    });
    work.queue().expect("open");
    assert_eq!(seen.recv_timeout(LONG), Ok([true; 6]));
    assert_eq!(Error::Deadlock.errno(), 35);
    assert!(Work::current().is_none());
}

#[test]
fn the_function_may_drop_the_last_outside_handle_to_its_item() {
    let pool = pool();
    let (send, seen) = mpsc::channel();
    let slot = Arc::new(Mutex::new(None::<Work>));
    let held = Arc::new(());
    let work = pool.work({
        let (slot, held) = (Arc::clone(&slot), Arc::clone(&held));
        move |_| {
            drop(slot.lock().expect("whole").take());
            send.send(Arc::strong_count(&held)).expect("the test waits");
        }
    });
    *slot.lock().expect("whole") = Some(work.clone());
    work.queue().expect("open");
    drop(work);
    assert_eq!(seen.recv_timeout(LONG), Ok(2));
    assert!(seen.recv().is_err(), "the function is dropped when it has returned");
    // What it captured is dropped one by one, the sender first.
    let end = Instant::now() + LONG;
    while Arc::strong_count(&held) > 1 {
        assert!(Instant::now() < end);
        std::thread::yield_now();
    }
}

#[test]
fn modify_moves_a_timer_and_flush_delayed_cuts_it_short() {
    let pool = pool();
    let Stepper { work, runs, permits } = stepper(&pool);
    drop(permits);
    assert!(!work.modify_delayed(LONG).expect("open"), "it was not pending");
    assert!(!work.queue().expect("open"), "the timer runs");
    assert!(work.modify_delayed(Duration::from_millis(1)).expect("open"));
    assert_eq!(runs.recv_timeout(LONG), Ok(1));
    work.flush().expect("not from inside");
    assert!(work.queue_delayed(LONG).expect("open"));
    assert!(matches!(work.flush_timeout(Duration::from_millis(1)), Err(Error::TimedOut)));
    assert!(work.flush_delayed().expect("not from inside"));
    assert_eq!(runs.try_recv(), Ok(2));
    assert!(work.queue_delayed(LONG).expect("open"));
    assert!(work.modify_delayed(Duration::ZERO).expect("open"));
    assert_eq!(runs.recv_timeout(LONG), Ok(3));
    work.flush().expect("not from inside");
    assert!(work.queue_delayed(LONG).expect("open"));
    assert!(work.cancel_delayed());
    assert!(!work.cancel_delayed());
    assert!(!work.pending());
}

#[test]
fn flush_returns_when_the_pending_run_is_cancelled() {
    let pool = pool();
    let Stepper { work, permits, .. } = stepper(&pool);
    work.queue_delayed(LONG).expect("open");
    let flusher = std::thread::spawn({
        let work = work.clone();
        move || work.flush().expect("not from inside")
    });
    // Cancelled again and again until the flush, whenever it came, has seen one.
    let end = Instant::now() + LONG;
    while !flusher.is_finished() {
        assert!(Instant::now() < end);
        let _ = work.cancel_delayed();
        std::thread::yield_now();
    }
    drop(permits);
}

#[test]
fn cancel_delayed_takes_back_the_round_that_a_running_item_owes() {
    let pool = pool();
    let Stepper { work, runs, permits } = stepper(&pool);
    work.queue().expect("open");
    assert_eq!(runs.recv_timeout(LONG), Ok(1));
    work.queue().expect("open");
    assert!(work.cancel_delayed());
    assert!(work.busy());
    permits.send(()).expect("it waits");
    work.flush().expect("not from inside");
    drop((permits, pool));
    assert!(runs.try_recv().is_err());
}

#[test]
fn a_probe_among_items_that_queue_themselves_always_runs() {
    let pool = Pool::builder("test").bounded(2).build().expect("a pool");
    let stop = Arc::new(AtomicBool::new(false));
    let items: Vec<_> = (0..8)
        .map(|_| {
            let stop = Arc::clone(&stop);
            let work = pool.work(move |_| {
                if !stop.load(Ordering::Relaxed) {
                    Work::current().expect("inside an item").queue().expect("open");
                }
            });
            work.queue().expect("open");
            work
        })
        .collect();
    for _ in 0..500 {
        let (send, seen) = mpsc::channel();
        pool.submit(Job::new(move |_| send.send(()).expect("the test waits"))).expect("accepted");
        seen.recv_timeout(LONG).expect("it is not starved");
    }
    stop.store(true, Ordering::Relaxed);
    items.iter().for_each(|work| drop(work.flush()));
}

#[test]
fn a_draining_queue_refuses_strangers_and_takes_chained_work() {
    let pool = pool();
    let queue = pool.queue("draining", Flags::NONE, 0).expect("a queue");
    let (report, started) = mpsc::channel();
    let (release, gate) = mpsc::channel::<()>();
    let runs = Arc::new(AtomicU32::new(0));
    let chained = queue.work({
        let runs = Arc::clone(&runs);
        move |_| {
            runs.fetch_add(1, Ordering::SeqCst);
        }
    });
    let first = queue.work({
        let chained = chained.clone();
        move |_| {
            report.send(()).expect("the test waits");
            let _ = gate.recv();
            assert!(chained.queue().expect("chained work is taken"));
        }
    });
    first.queue().expect("open");
    started.recv_timeout(LONG).expect("it runs");
    let drainer = std::thread::spawn({
        let queue = queue.clone();
        move || queue.drain()
    });
    let end = Instant::now() + LONG;
    loop {
        assert!(Instant::now() < end, "never refused");
        match chained.queue() {
            Err(Error::Draining) => break,
            _ => drop(chained.cancel_sync()),
        }
    }
    runs.store(0, Ordering::SeqCst);
    drop(release);
    drainer.join().expect("no panic").expect("not from inside");
    assert_eq!(runs.load(Ordering::SeqCst), 1);
    assert!(chained.queue().expect("the drain is over"));
}

#[test]
fn max_active_holds_and_the_rest_waits_in_order() {
    let queue = Queue::new("two", Flags::UNBOUND, 2).expect("a queue");
    let (now, most) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    for _ in 0..200 {
        let (now, most) = (Arc::clone(&now), Arc::clone(&most));
        let job = Job::new(move |_| {
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            std::thread::yield_now();
            now.fetch_sub(1, Ordering::SeqCst);
        });
        queue.submit(job).expect("accepted");
    }
    queue.drain().expect("not from inside");
    assert!((1..=2).contains(&most.load(Ordering::SeqCst)));
}

/// Threads of this process that show `name`.
fn threads_called(name: &str) -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").expect("proc is mounted");
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|comm| comm.trim_end() == name).count()
}

#[test]
fn delayed_items_each_run_once_after_their_time_unless_taken_back() {
    // A million in a soak: without optimisation that takes too long for every day.
    let count = std::env::var("PINFOLD_SOAK_ITEMS").map_or(20_000, |count| count.parse::<usize>().expect("a number"));
    let pool = Pool::builder("delayed").bounded(2).build().expect("a pool");
    let early = Arc::new(AtomicU32::new(0));
    let runs: Arc<Box<[AtomicU32]>> = Arc::new((0..count).map(|_| AtomicU32::new(0)).collect());
    let start = Instant::now();
    // When the item may run, in microseconds from the start; set when its time is known.
    let due: Arc<Box<[AtomicU32]>> = Arc::new((0..count).map(|_| AtomicU32::new(u32::MAX)).collect());
    let items: Vec<_> = (0..count)
        .map(|n| {
            let (early, runs, due) = (Arc::clone(&early), Arc::clone(&runs), Arc::clone(&due));
            let work = pool.work(move |_| {
                runs[n].fetch_add(1, Ordering::Relaxed);
                let too_early = start.elapsed().as_micros() < due[n].load(Ordering::Relaxed).into();
                early.fetch_add(u32::from(too_early), Ordering::Relaxed);
            });
            assert!(work.queue_delayed(LONG * 20 + Duration::from_micros(n as u64 * 7919 % 1_000_000)).expect("open"));
            work
        })
        .collect();
    assert!(items.iter().all(Work::pending), "all at a time");
    // A thread has its name only once it runs.
    let workers = || (pool.workers(Account::Bounded) + pool.workers(Account::MaySleep)) as usize;
    while threads_called("delayed") != workers() + 1 {
        assert!(start.elapsed() < LONG * 10, "not one thread for all timers");
        std::thread::yield_now();
    }
    // Every third is taken back, from the middle of the heap; the others come soon, in another order.
    for (n, work) in items.iter().enumerate() {
        if n % 3 == 0 {
            assert!(work.cancel_delayed());
        } else {
            let delay = Duration::from_micros(n as u64 * 6007 % 200_000 + 1);
            due[n].store((start.elapsed() + delay).as_micros() as u32, Ordering::Relaxed);
            assert!(work.modify_delayed(delay).expect("open"));
        }
    }
    for work in &items {
        work.flush().expect("not from inside");
    }
    assert!((0..).zip(runs.iter()).all(|(n, runs)| runs.load(Ordering::Relaxed) == u32::from(n % 3 != 0)));
    assert_eq!(early.load(Ordering::Relaxed), 0);
    let counters = pool.counters(Account::Bounded);
    let left = (count - count.div_ceil(3)) as u64;
    assert_eq!((counters.queued, counters.started), (left, left));
}
