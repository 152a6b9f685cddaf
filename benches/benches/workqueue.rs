//! The work queue against what else one could hand work to, all with two workers, in one process.
//!
//! `cargo bench -p pinfold-benches --bench workqueue [filter]`. First come tables of latencies, because what matters
//! there is the slowest hundredth, which criterion doesn't tell; then criterion's throughput, cancel and delay.
//!
//! The kernel's io-wq runs forced-async NOPs; its latency is that of submission to completion seen.

use std::collections::VecDeque;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};
use io_uring::{IoUring, opcode, squeue};
use pinfold_workqueue::{Job, Pool, blocking};

const WORKERS: usize = 2;

/// Something that runs a function on another thread.
trait Dispatch: Send + Sync + 'static {
    const NAME: &'static str;

    fn new() -> Self;

    fn submit(&self, work: impl FnOnce() + Send + 'static);
}

type Work = Box<dyn FnOnce() + Send>;

/// The textbook: a queue under a lock.
struct Textbook(Arc<(Mutex<VecDeque<Work>>, Condvar)>);

impl Dispatch for Textbook {
    const NAME: &'static str = "mutex + condvar";

    fn new() -> Self {
        let shared = Arc::new((Mutex::new(VecDeque::<Work>::new()), Condvar::new()));
        for _ in 0..WORKERS {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || {
                loop {
                    let mut queue = shared.0.lock().expect("whole");
                    let work = loop {
                        match queue.pop_front() {
                            Some(work) => break work,
                            None => queue = shared.1.wait(queue).expect("whole"),
                        }
                    };
                    drop(queue);
                    work();
                }
            });
        }
        Self(shared)
    }

    fn submit(&self, work: impl FnOnce() + Send + 'static) {
        self.0.0.lock().expect("whole").push_back(Box::new(work));
        self.0.1.notify_one();
    }
}

struct Channel(crossbeam_channel::Sender<Work>);

impl Dispatch for Channel {
    const NAME: &'static str = "crossbeam-channel + threads";

    fn new() -> Self {
        let (send, receive) = crossbeam_channel::unbounded::<Work>();
        for _ in 0..WORKERS {
            let receive = receive.clone();
            std::thread::spawn(move || receive.iter().for_each(|work| work()));
        }
        Self(send)
    }

    fn submit(&self, work: impl FnOnce() + Send + 'static) {
        self.0.send(Box::new(work)).expect("the workers live");
    }
}

impl Dispatch for rayon::ThreadPool {
    const NAME: &'static str = "rayon spawn";

    fn new() -> Self {
        rayon::ThreadPoolBuilder::new().num_threads(WORKERS).build().expect("a pool")
    }

    fn submit(&self, work: impl FnOnce() + Send + 'static) {
        self.spawn(work);
    }
}

impl Dispatch for tokio::runtime::Runtime {
    const NAME: &'static str = "tokio spawn_blocking";

    fn new() -> Self {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(1).max_blocking_threads(WORKERS).build().expect("a runtime")
    }

    fn submit(&self, work: impl FnOnce() + Send + 'static) {
        self.spawn_blocking(work);
    }
}

struct Threads(Mutex<threadpool::ThreadPool>);

impl Dispatch for Threads {
    const NAME: &'static str = "threadpool";

    fn new() -> Self {
        Self(Mutex::new(threadpool::ThreadPool::new(WORKERS)))
    }

    fn submit(&self, work: impl FnOnce() + Send + 'static) {
        self.0.lock().expect("whole").execute(work);
    }
}

impl Dispatch for Pool {
    const NAME: &'static str = "pinfold-workqueue";

    fn new() -> Self {
        let two = pinfold_workqueue::Topology::from_nodes([[0, 1]]);
        Pool::builder("bench").bounded(WORKERS as u32).topology(two).build().expect("a pool")
    }

    fn submit(&self, work: impl FnOnce() + Send + 'static) {
        drop(Pool::submit(self, Job::new(move |_| work())));
    }
}

/// Median and 99th percentile.
fn percentiles(mut samples: Vec<Duration>) -> String {
    samples.sort_unstable();
    let at = |part: usize| samples[(samples.len() * part / 100).min(samples.len() - 1)].as_secs_f64() * 1e6;
    format!("p50 {:8.2} µs   p99 {:8.2} µs", at(50), at(99))
}

/// From submission to the first instruction, `pause` apart.
fn start_latency<D: Dispatch>(pool: &D, samples: usize, pause: Duration) -> Vec<Duration> {
    let base = Instant::now();
    let started = Arc::new(AtomicU64::new(0));
    let mut latencies = Vec::with_capacity(samples);
    for _ in 0..samples {
        std::thread::sleep(pause);
        started.store(0, Ordering::Relaxed);
        let at = Instant::now();
        let seen = Arc::clone(&started);
        pool.submit(move || seen.store(base.elapsed().as_nanos() as u64, Ordering::Release));
        let patience = Instant::now() + Duration::from_millis(500);
        while started.load(Ordering::Acquire) == 0 {
            if Instant::now() > patience {
                return Vec::new();
            }
            // Two processors: a submitter that only spun would stand in the way of the second worker.
            if pause.is_zero() { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        latencies.push(Duration::from_nanos(started.load(Ordering::Relaxed)).saturating_sub(at.duration_since(base)));
    }
    latencies
}

/// Eight pieces of work of 2 µs that submit themselves again until told to stop.
fn keep_busy<D: Dispatch>(pool: &Arc<D>, stop: &Arc<AtomicBool>) {
    let (again, stopping) = (Arc::clone(pool), Arc::clone(stop));
    pool.submit(move || {
        let end = Instant::now() + Duration::from_micros(2);
        while Instant::now() < end {
            std::hint::spin_loop();
        }
        if !stopping.load(Ordering::Relaxed) {
            keep_busy(&again, &stopping);
        }
    });
}

/// One contender in the tables of latencies. All take turns, so that a busy minute of the machine meets all alike.
struct Contender<D> {
    pool: Arc<D>,
    idle: Vec<Duration>,
    close: Vec<Duration>,
    loaded: Option<Vec<Duration>>,
}

trait Round {
    fn round(&mut self);

    fn print(&self);
}

fn contender<D: Dispatch>() -> Box<dyn Round> {
    let pool = Arc::new(D::new());
    drop(start_latency(&*pool, 100, Duration::ZERO));
    Box::new(Contender { pool, idle: Vec::new(), close: Vec::new(), loaded: Some(Vec::new()) })
}

impl<D: Dispatch> Round for Contender<D> {
    fn round(&mut self) {
        self.idle.extend(start_latency(&*self.pool, 200, Duration::from_micros(300)));
        self.close.extend(start_latency(&*self.pool, 2000, Duration::ZERO));
        if let Some(samples) = &mut self.loaded {
            let stop = Arc::new(AtomicBool::new(false));
            (0..8).for_each(|_| keep_busy(&self.pool, &stop));
            let loaded = start_latency(&*self.pool, 200, Duration::from_micros(100));
            stop.store(true, Ordering::Relaxed);
            samples.extend(&loaded);
            if loaded.is_empty() {
                self.loaded = None;
            }
            // Whatever is still queued has run once this has.
            drop(start_latency(&*self.pool, 1, Duration::from_millis(5)));
        }
    }

    fn print(&self) {
        let [idle, close] = [&self.idle, &self.close].map(|samples| percentiles(samples.clone()));
        let loaded = self.loaded.clone().map_or("never ran in 500 ms".to_owned(), percentiles);
        println!("{:28} idle {idle}   back to back {close}   among busy items {loaded}", D::NAME);
    }
}

fn latencies() {
    let mut contenders = [
        contender::<Textbook>(),
        contender::<Channel>(),
        contender::<rayon::ThreadPool>(),
        contender::<tokio::runtime::Runtime>(),
        contender::<Threads>(),
        contender::<Pool>(),
    ];
    for _ in 0..10 {
        contenders.iter_mut().for_each(|contender| contender.round());
    }
    contenders.iter().for_each(|contender| contender.print());
    // Some of them cannot be dropped by their own last piece of work.
    std::mem::forget(contenders);
}

/// How long an item waits that is queued behind `blocked` workers which all sleep.
fn behind_blocked_workers(declared: bool) {
    for blocked in [1, 2, 7] {
        let samples = (0..60).map(|_| {
            let pool = Pool::builder("bench").bounded(blocked + 1).build().expect("a pool");
            let (report, asleep) = mpsc::channel();
            let gates: Vec<_> = (0..blocked)
                .map(|_| {
                    let (release, gate) = mpsc::channel::<()>();
                    let report = report.clone();
                    let job = Job::new(move |_| {
                        report.send(()).expect("the bench waits");
                        let _ = if declared { blocking(|| gate.recv()) } else { gate.recv() };
                    });
                    drop(Pool::submit(&pool, job));
                    asleep.recv().expect("it runs");
                    release
                })
                .collect();
            std::thread::sleep(Duration::from_millis(1));
            let waited = start_latency(&pool, 1, Duration::from_micros(50))[0];
            drop(gates);
            waited
        });
        let how = if declared { "blocking()" } else { "undeclared" };
        println!("behind {blocked} blocked workers, {how:10}  {}", percentiles(samples.collect()));
    }
}

/// The kernel's pool, if there is one to be had.
fn io_wq() -> Option<IoUring> {
    let ring = IoUring::new(512).inspect_err(|error| println!("io-wq: none here, {error}")).ok()?;
    ring.submitter().register_iowq_max_workers(&mut [WORKERS as u32, WORKERS as u32]).ok()?;
    Some(ring)
}

fn push_nop(ring: &mut IoUring, id: u64) {
    let nop = opcode::Nop::new().build().flags(squeue::Flags::ASYNC).user_data(id);
    // SAFETY: a NOP names no memory.
    unsafe { ring.submission().push(&nop) }.expect("the queue has room");
}

fn io_wq_latencies() {
    let Some(mut ring) = io_wq() else { return };
    let mut round = |pause: Duration| {
        std::thread::sleep(pause);
        let at = Instant::now();
        push_nop(&mut ring, 1);
        ring.submit_and_wait(1).expect("a completion");
        let waited = at.elapsed();
        ring.completion().for_each(drop);
        waited
    };
    let idle = percentiles((0..1500).map(|_| round(Duration::from_micros(300))).collect());
    let close = percentiles((0..20_000).map(|_| round(Duration::ZERO)).collect());
    println!("{:28} idle {idle}   back to back {close}", "io-wq (to completion)");
}

const BATCH: usize = 20_000;

fn throughput<D: Dispatch>(criterion: &mut Criterion) {
    for producers in [1, 2, 4] {
        let mut group = criterion.benchmark_group(format!("throughput, {producers} producers"));
        group.throughput(Throughput::Elements(BATCH as u64));
        let pool = Arc::new(D::new());
        group.bench_function(D::NAME, |bencher| {
            bencher.iter(|| {
                let (left, done) = (Arc::new(AtomicUsize::new(BATCH)), mpsc::channel());
                std::thread::scope(|scope| {
                    for _ in 0..producers {
                        scope.spawn(|| {
                            for _ in 0..BATCH / producers {
                                let (left, done) = (Arc::clone(&left), done.0.clone());
                                pool.submit(move || {
                                    if left.fetch_sub(1, Ordering::AcqRel) == 1 {
                                        let _ = done.send(());
                                    }
                                });
                            }
                        });
                    }
                });
                done.1.recv().expect("all run");
            });
        });
        group.finish();
        std::mem::forget(pool);
    }
}

fn io_wq_throughput(criterion: &mut Criterion) {
    let Some(mut ring) = io_wq() else { return };
    let mut group = criterion.benchmark_group("throughput, 1 producers");
    group.throughput(Throughput::Elements(BATCH as u64));
    group.bench_function("io-wq (256 under way)", |bencher| {
        bencher.iter(|| {
            let (mut pushed, mut done) = (0, 0);
            while done < BATCH {
                while pushed < BATCH && pushed - done < 256 {
                    push_nop(&mut ring, 1);
                    ring.submit().expect("submitted");
                    pushed += 1;
                }
                ring.submit_and_wait(1).expect("a completion");
                done += ring.completion().count();
            }
        });
    });
    group.finish();
}

/// Cancelling the last of many, and starting and stopping a timer among many.
fn cancel_and_delay(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("cancel the last of");
    for depth in [1, 100, 10_000, 100_000] {
        let pool = Pool::builder("bench").bounded(1).cancel_at_end().build().expect("a pool");
        let (release, gate) = mpsc::channel::<()>();
        let submit = |job| Pool::submit(&pool, job).expect("accepted");
        submit(Job::new(move |_| {
            let _ = gate.recv();
        }));
        (1..depth).for_each(|_| drop(submit(Job::new(|_| {}))));
        // A hundred at a time, so that the clock is not what is measured.
        group.bench_function(format!("{depth} queued"), |bencher| {
            bencher.iter_custom(|iterations| {
                let mut spent = Duration::ZERO;
                for _ in 0..iterations.div_ceil(100) {
                    let handles: Vec<_> = (0..100).map(|_| submit(Job::new(|_| {}))).collect();
                    let start = Instant::now();
                    handles.iter().rev().for_each(|handle| _ = black_box(handle.cancel()));
                    spent += start.elapsed();
                }
                spent.mul_f64(iterations as f64 / (iterations.div_ceil(100) * 100) as f64)
            });
        });
        drop(release);
    }
    group.finish();
    let mut group = criterion.benchmark_group("delay and take back, among");
    for depth in [1, 1000, 100_000, 1_000_000] {
        let pool = Pool::builder("bench").bounded(1).build().expect("a pool");
        let hour = |n: u64| Duration::from_secs(3600) + Duration::from_micros(n * 7919 % 1_000_000);
        let items: Vec<_> = (0..depth).map(|_| pool.work(|_| {})).collect();
        (0..).zip(&items).for_each(|(n, item)| drop(item.queue_delayed(hour(n))));
        let (item, mut n) = (pool.work(|_| {}), 0);
        group.bench_function(format!("{depth} timers"), |bencher| {
            bencher.iter(|| {
                n += 1;
                drop(item.queue_delayed(hour(n)));
                black_box(item.cancel_delayed())
            });
        });
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2))
        .sample_size(10)
        .configure_from_args();
    let asked = std::env::args().skip(1).find(|argument| !argument.starts_with('-')).unwrap_or_default();
    if "latency".contains(&asked) {
        latencies();
        io_wq_latencies();
        behind_blocked_workers(true);
        behind_blocked_workers(false);
    }
    throughput::<Textbook>(&mut criterion);
    throughput::<Channel>(&mut criterion);
    throughput::<rayon::ThreadPool>(&mut criterion);
    throughput::<tokio::runtime::Runtime>(&mut criterion);
    throughput::<Threads>(&mut criterion);
    throughput::<Pool>(&mut criterion);
    io_wq_throughput(&mut criterion);
    cancel_and_delay(&mut criterion);
    criterion.final_summary();
}
