//! Handing work to another thread: the work queue against what else one would take, two workers each, where the scheduler puts them.
//!
//! The kernel's io-wq runs forced-async NOPs; its latency is that from submission to completion seen, as nothing can be seen of the start.

use std::collections::VecDeque;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use io_uring::{IoUring, opcode, squeue};
use pinfold_workqueue::{Job, Pool, Topology, blocking};

use crate::clock::{cpu, microseconds, nanoseconds};
use crate::groups::index::{counted, thousands};
use crate::session::{Contender, Goal, Plan, Session};
#[cfg(test)]
use crate::stats::median;

const WORKERS: usize = 2;
/// After this long, something that was handed over counts as never run.
const PATIENCE: Duration = Duration::from_millis(500);

type Work = Box<dyn FnOnce() + Send>;

/// Something that runs a function on another thread.
trait Dispatch: Send + Sync + 'static {
    fn submit(&self, work: Work);
}

/// The textbook: a queue under a lock.
struct Textbook(Arc<(Mutex<VecDeque<Work>>, Condvar)>);

impl Textbook {
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
}

impl Dispatch for Textbook {
    fn submit(&self, work: Work) {
        self.0.0.lock().expect("whole").push_back(work);
        self.0.1.notify_one();
    }
}

struct Channel(crossbeam_channel::Sender<Work>);

impl Channel {
    fn new() -> Self {
        let (send, receive) = crossbeam_channel::unbounded::<Work>();
        for _ in 0..WORKERS {
            let receive = receive.clone();
            std::thread::spawn(move || receive.iter().for_each(|work| work()));
        }
        Self(send)
    }
}

impl Dispatch for Channel {
    fn submit(&self, work: Work) {
        self.0.send(work).expect("the workers live");
    }
}

impl Dispatch for rayon::ThreadPool {
    fn submit(&self, work: Work) {
        self.spawn(work);
    }
}

impl Dispatch for tokio::runtime::Runtime {
    fn submit(&self, work: Work) {
        self.spawn_blocking(work);
    }
}

struct Threads(Mutex<threadpool::ThreadPool>);

impl Dispatch for Threads {
    fn submit(&self, work: Work) {
        self.0.lock().expect("whole").execute(work);
    }
}

impl Dispatch for Pool {
    fn submit(&self, work: Work) {
        drop(Pool::submit(self, Job::new(move |_| work())));
    }
}

fn pool() -> Result<Pool> {
    let cpus = crate::placement::allowed();
    Ok(Pool::builder("bench").bounded(WORKERS as u32).topology(Topology::from_nodes([cpus])).build()?)
}

/// Everyone who takes part, ours first.
fn everyone() -> Result<Vec<(&'static str, Arc<dyn Dispatch>)>> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    Ok(vec![
        ("pinfold-workqueue", Arc::new(pool()?)),
        ("mutex + condvar", Arc::new(Textbook::new())),
        ("crossbeam-channel + threads", Arc::new(Channel::new())),
        ("rayon spawn", Arc::new(rayon::ThreadPoolBuilder::new().num_threads(WORKERS).build()?)),
        ("tokio spawn_blocking", Arc::new(builder.worker_threads(1).max_blocking_threads(WORKERS).build()?)),
        ("threadpool", Arc::new(Threads(Mutex::new(threadpool::ThreadPool::new(WORKERS))))),
    ])
}

/// Microseconds from submission to the first instruction, `samples` times, `pause` apart. Empty if something never ran.
fn start_latency(pool: &dyn Dispatch, samples: usize, pause: Duration) -> Vec<f64> {
    let base = Instant::now();
    let started = Arc::new(AtomicU64::new(0));
    let mut latencies = Vec::with_capacity(samples);
    for _ in 0..samples {
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
        started.store(0, Ordering::Relaxed);
        let (at, seen) = (Instant::now(), Arc::clone(&started));
        pool.submit(Box::new(move || seen.store(base.elapsed().as_nanos() as u64, Ordering::Release)));
        let patience = at + PATIENCE;
        while started.load(Ordering::Acquire) == 0 {
            if Instant::now() > patience {
                return Vec::new();
            }
            // On two processors a submitter that only spun would stand in the way of the second worker.
            if pause.is_zero() { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        let started = Duration::from_nanos(started.load(Ordering::Relaxed));
        latencies.push(microseconds(started.saturating_sub(at.duration_since(base))));
    }
    latencies
}

fn latency<'a>(name: &str, pool: Arc<dyn Dispatch>, samples: usize, pause: Duration) -> Contender<'a> {
    let name = name.to_owned();
    Contender::many(&name.clone(), move || match start_latency(&*pool, samples, pause) {
        latencies if latencies.is_empty() => bail!("{name} didn't run what it was given in {PATIENCE:?}"),
        latencies => Ok(latencies),
    })
}

/// Eight pieces of work of 2 µs that submit themselves again until told to stop.
fn keep_busy(pool: &Arc<dyn Dispatch>, stop: &Arc<AtomicBool>) {
    let (again, stopping) = (Arc::clone(pool), Arc::clone(stop));
    pool.submit(Box::new(move || {
        let end = Instant::now() + Duration::from_micros(2);
        while Instant::now() < end {
            std::hint::spin_loop();
        }
        if !stopping.load(Ordering::Relaxed) {
            keep_busy(&again, &stopping);
        }
    }));
}

/// The latencies of probes among such work. Empty if one never ran.
fn loaded_latency(pool: &Arc<dyn Dispatch>, samples: usize) -> Vec<f64> {
    let stop = Arc::new(AtomicBool::new(false));
    (0..8).for_each(|_| keep_busy(pool, &stop));
    let latencies = start_latency(&**pool, samples, Duration::from_micros(100));
    stop.store(true, Ordering::Relaxed);
    // Whatever is still queued has run once this has.
    drop(start_latency(&**pool, 1, Duration::from_millis(1)));
    latencies
}

fn loaded<'a>(name: &str, pool: Arc<dyn Dispatch>, samples: usize) -> Contender<'a> {
    let name = name.to_owned();
    Contender::many(&name.clone(), move || match loaded_latency(&pool, samples) {
        latencies if latencies.is_empty() => bail!("{name} didn't run the probe in {PATIENCE:?}"),
        latencies => Ok(latencies),
    })
}

/// Nanoseconds an item, of `batch` empty items from some producers until the last has run.
fn throughput(pool: &dyn Dispatch, producers: usize, batch: usize) -> f64 {
    let (left, done) = (Arc::new(AtomicUsize::new(batch)), mpsc::channel());
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..producers {
            scope.spawn(|| {
                for _ in 0..batch / producers {
                    let (left, done) = (Arc::clone(&left), done.0.clone());
                    pool.submit(Box::new(move || {
                        if left.fetch_sub(1, Ordering::AcqRel) == 1 {
                            let _ = done.send(());
                        }
                    }));
                }
            });
        }
    });
    let _ = done.1.recv();
    nanoseconds(begun.elapsed()) / batch as f64
}

pub(crate) fn run(session: &mut Session) -> Result<()> {
    let everyone = everyone()?;
    let placement = format!("submitter and {WORKERS} workers wherever the scheduler puts them");
    let own = |samples, pause| latency("pinfold-workqueue", Arc::clone(&everyone[0].1), samples, pause);

    let plan = Plan::new("start, back to back", "µs", own(500, Duration::ZERO)).placement(&placement);
    session.measure(plan.against(own(500, Duration::ZERO), None).control())?;

    let mut ring = io_wq();
    let asleep = Duration::from_micros(300);
    let few = session.mode.pick(24, 60, 100);
    let mut plan = Plan::new("start, workers asleep", "µs", own(few, asleep)).placement(&placement);
    for (name, pool) in &everyone[1..] {
        let goal = (*name == "mutex + condvar").then(|| Goal::ratio(1.1)).flatten();
        plan = plan.against(latency(name, Arc::clone(pool), few, asleep), goal);
    }
    if let Ok(ring) = &mut ring {
        plan = plan.against(io_wq_latency(ring, few, asleep), None);
    }
    session.measure(plan)?;

    let mut plan = Plan::new("start, back to back", "µs", own(500, Duration::ZERO)).placement(&placement);
    plan = plan.goal(Goal::ours(1.0));
    for (name, pool) in &everyone[1..] {
        plan = plan.against(latency(name, Arc::clone(pool), 500, Duration::ZERO), None);
    }
    if let Ok(ring) = &mut ring {
        plan = plan.against(io_wq_latency(ring, 200, Duration::ZERO), None);
    }
    session.measure(plan)?;

    // Some never let a stranger in: they are found out first, and said.
    let mut fair = Vec::new();
    for (name, pool) in &everyone {
        match loaded_latency(pool, 2).is_empty() {
            true => {
                session.fact(format!("{name}: a probe among items that queue themselves again"), "never ran in 500 ms")
            }
            false => fair.push((*name, Arc::clone(pool))),
        }
    }
    if fair.first().is_some_and(|(name, _)| *name == "pinfold-workqueue") {
        for p99 in [false, true] {
            let name = format!("start among busy items{}", if p99 { ", p99" } else { "" });
            let probes = session.mode.pick(30, 100, 100);
            let mut plan = Plan::new(name, "µs", loaded("pinfold-workqueue", Arc::clone(&fair[0].1), probes));
            for (name, pool) in &fair[1..] {
                let goal = (p99 && name.starts_with("crossbeam")).then(|| Goal::ratio(2.0)).flatten();
                plan = plan.against(loaded(name, Arc::clone(pool), probes), goal);
            }
            plan = plan.placement(&placement);
            session.measure(if p99 { plan.p99() } else { plan })?;
        }
    } else {
        session.absent("start among busy items", "our own probe never ran");
    }

    let batch = session.mode.pick(2_000, 10_000, 20_000);
    let mut points = Vec::new();
    for producers in [1, 2, 4] {
        let sample = |pool: &Arc<dyn Dispatch>| {
            let pool = Arc::clone(pool);
            move || Ok(throughput(&*pool, producers, batch))
        };
        let name = format!("empty items, {}", counted(producers, "producer"));
        let mut plan = Plan::new(name, "ns", Contender::new("pinfold-workqueue", sample(&everyone[0].1)));
        for (name, pool) in &everyone[1..] {
            let goal = match (name.starts_with("crossbeam"), producers) {
                (true, 1) => Goal::ratio(1.0),
                (true, 2) => Goal::ratio(1.5),
                _ => None,
            };
            plan = plan.against(Contender::new(name, sample(pool)), goal);
        }
        if let (Ok(ring), 1) = (&mut ring, producers) {
            plan = plan.against(Contender::new("io-wq (256 under way)", || io_wq_throughput(ring, batch)), None);
        }
        points.push((producers as f64, session.measure(plan.placement(&placement))?));
    }
    session.curve("empty items", "producers", "ns", points)?;
    if let Err(why) = ring {
        session.absent("io-wq", why);
    }
    // Some of them cannot be dropped by their own last piece of work.
    std::mem::forget(everyone);

    behind_blocked_workers(session)?;
    cancel(session)?;
    delay(session)
}

/// How long an item waits that is queued behind workers which all sleep. io-wq: 66 to 246 µs.
fn behind_blocked_workers(session: &mut Session) -> Result<()> {
    let sample = |blocked: u32, declared: bool| -> Result<f64> {
        let pool = Pool::builder("bench").bounded(blocked + 1).build()?;
        let (report, asleep) = mpsc::channel();
        let mut gates = Vec::new();
        for _ in 0..blocked {
            let (release, gate) = mpsc::channel::<()>();
            let report = report.clone();
            let job = Job::new(move |_| {
                let _ = report.send(());
                let _ = if declared { blocking(|| gate.recv()) } else { gate.recv() };
            });
            drop(Pool::submit(&pool, job));
            asleep.recv()?;
            gates.push(release);
        }
        std::thread::sleep(Duration::from_millis(1));
        let waited = start_latency(&pool, 1, Duration::from_micros(50));
        drop(gates);
        waited.first().copied().ok_or_else(|| anyhow::anyhow!("an item behind sleeping workers never ran"))
    };
    for blocked in [1, 2, 7] {
        let workers = counted(blocked as usize, "sleeping worker");
        let spawn = || {
            let begun = Instant::now();
            let started = std::thread::spawn(Instant::now).join().expect("it only looks at the clock");
            Ok(microseconds(started.duration_since(begun)))
        };
        let peer = || Contender::new("std::thread::spawn", spawn);
        let name = format!("start behind {workers}, declared");
        let plan = Plan::new(name, "µs", Contender::new("pinfold-workqueue", || sample(blocked, true)));
        session.measure(plan.against(peer(), None).goal(Goal::ours(100.0)))?;
        let name = format!("start behind {workers}, undeclared");
        let plan = Plan::new(name, "µs", Contender::new("pinfold-workqueue", || sample(blocked, false)));
        session.measure(plan.against(peer(), None).goal(Goal::ours(400.0)))?;
    }
    Ok(())
}

/// Taking back the last of many. io-wq walks its list: 1 to 33 µs for 100 to 4000.
fn cancel(session: &mut Session) -> Result<()> {
    let mut points = Vec::new();
    for depth in
        session.mode.pick(vec![1, 1_000, 100_000], vec![1, 100, 10_000, 100_000], vec![1, 100, 10_000, 100_000])
    {
        let pool = Pool::builder("bench").bounded(1).cancel_at_end().build()?;
        let (release, gate) = mpsc::channel::<()>();
        let submit = |job| Pool::submit(&pool, job).expect("the pool takes work");
        submit(Job::new(move |_| {
            let _ = gate.recv();
        }));
        (1..depth).for_each(|_| drop(submit(Job::new(|_| {}))));
        let ours = || {
            let handles: Vec<_> = (0..100).map(|_| submit(Job::new(|_| {}))).collect();
            let mut left = handles.iter().rev();
            Ok(cpu(100, || _ = black_box(left.next().map(pinfold_workqueue::JobHandle::cancel))))
        };
        // What a list under a lock costs, from its end, which is where the last one is.
        let list: Mutex<VecDeque<u64>> = Mutex::new((0..depth as u64).collect());
        let theirs = || {
            (0..100).for_each(|n| list.lock().expect("whole").push_back(n));
            Ok(cpu(100, || _ = black_box(list.lock().expect("whole").pop_back())))
        };
        let name = format!("cancel the last of {}", thousands(depth));
        let plan = Plan::new(name, "ns", Contender::new("pinfold-workqueue", ours)).clock("cpu");
        let plan = plan.against(Contender::new("pop_back of a locked VecDeque", theirs), None).goal(Goal::ours(200.0));
        points.push((depth as f64, session.measure(plan)?));
        drop(release);
    }
    session.curve("cancel the last", "queued", "ns", points)
}

/// Starting a timer and taking it back among others.
fn delay(session: &mut Session) -> Result<()> {
    let mut points = Vec::new();
    let counts = session.mode.pick(vec![1, 1_000, 50_000], vec![1, 1_000, 100_000], vec![1, 1_000, 100_000, 1_000_000]);
    for depth in counts {
        let pool = Pool::builder("bench").bounded(1).build()?;
        let hour = |n: u64| Duration::from_secs(3600) + Duration::from_micros(n * 7919 % 1_000_000);
        let items: Vec<_> = (0..depth).map(|_| pool.work(|_| {})).collect();
        (0..).zip(&items).for_each(|(n, item)| drop(item.queue_delayed(hour(n))));
        let (item, mut n) = (pool.work(|_| {}), 0);
        let ours = || {
            Ok(cpu(200, || {
                n += 1;
                drop(item.queue_delayed(hour(n)));
                black_box(item.cancel_delayed());
            }))
        };
        let mut map: std::collections::BTreeMap<(Duration, u64), u64> =
            (0..depth as u64).map(|n| ((hour(n), n), n)).collect();
        let mut m = 0;
        let theirs = || {
            Ok(cpu(200, || {
                m += 1;
                map.insert((hour(m), u64::MAX), m);
                black_box(map.remove(&(hour(m), u64::MAX)));
            }))
        };
        let name = format!("start and stop a timer among {}", thousands(depth));
        let plan = Plan::new(name, "ns", Contender::new("pinfold-workqueue", ours)).clock("cpu");
        points.push((depth as f64, session.measure(plan.against(Contender::new("BTreeMap, no lock", theirs), None))?));
    }
    session.curve("start and stop a timer", "timers", "ns", points)
}

/// The kernel's pool, if there is one to be had.
fn io_wq() -> Result<IoUring> {
    let ring = IoUring::new(512).map_err(|error| anyhow::anyhow!("no io_uring here: {error}"))?;
    ring.submitter().register_iowq_max_workers(&mut [WORKERS as u32, WORKERS as u32])?;
    Ok(ring)
}

fn push_nop(ring: &mut IoUring) -> Result<()> {
    let nop = opcode::Nop::new().build().flags(squeue::Flags::ASYNC);
    // SAFETY: a NOP names no memory.
    unsafe { ring.submission().push(&nop) }?;
    Ok(())
}

fn io_wq_latency<'a>(ring: &'a mut IoUring, samples: usize, pause: Duration) -> Contender<'a> {
    Contender::many("io-wq (to completion)", move || {
        (0..samples)
            .map(|_| {
                if !pause.is_zero() {
                    std::thread::sleep(pause);
                }
                let at = Instant::now();
                push_nop(ring)?;
                ring.submit_and_wait(1)?;
                let waited = microseconds(at.elapsed());
                ring.completion().for_each(drop);
                Ok(waited)
            })
            .collect()
    })
}

fn io_wq_throughput(ring: &mut IoUring, batch: usize) -> Result<f64> {
    let begun = Instant::now();
    let (mut pushed, mut done) = (0, 0);
    while done < batch {
        while pushed < batch && pushed - done < 256 {
            push_nop(ring)?;
            ring.submit()?;
            pushed += 1;
        }
        ring.submit_and_wait(1)?;
        done += ring.completion().count();
    }
    Ok(nanoseconds(begun.elapsed()) / batch as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everyone_runs_what_it_is_given() {
        for (name, pool) in everyone().unwrap() {
            let latencies = start_latency(&*pool, 3, Duration::from_micros(10));
            assert!(latencies.len() == 3 && median(&latencies) >= 0.0, "{name}: {latencies:?}");
            assert!(throughput(&*pool, 2, 100) > 0.0, "{name}");
            std::mem::forget(pool);
        }
    }
}
