//! The index of ranges against what else one could use: who is asked "which ranges touch these bytes?", and who changes.
//!
//! `cargo bench -p pinfold-benches --bench index [filter]`. Ranges are 1 to 16 pages long with gaps of 0 to 16 pages;
//! every tenth is longer by 16 to 63 pages, so that ranges overlap. All contenders hold the same, in one process.
//! Only the index can be read while it is changed; the others would need a lock around them, which isn't counted.
//!
//! Times are the thread's own processor time, so that a busy machine disturbs caches only.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{BenchmarkId, Criterion, Throughput};
use iset::IntervalMap;
use pinfold_invalidate::index::{Index, warm_up_thread};
use pinfold_invalidate::{HostRange, page_size};
use rust_lapper::{Interval, Lapper};

type Value = Arc<u64>;

/// The same numbers in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for at in (1..items.len()).rev() {
            items.swap(at, self.below(at + 1));
        }
    }
}

/// Processor time of the calling thread.
struct CpuTime;

impl CpuTime {
    fn now() -> Duration {
        // SAFETY: a timespec is two integers, for which zero is a value.
        let mut now: libc::timespec = unsafe { std::mem::zeroed() };
        // SAFETY: `now` is a live timespec that the call writes.
        let answer = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut now) };
        assert_eq!(answer, 0, "every thread has a clock");
        Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).expect("less than a second"))
    }
}

impl Measurement for CpuTime {
    type Intermediate = Duration;
    type Value = Duration;

    fn start(&self) -> Duration {
        Self::now()
    }

    fn end(&self, start: Duration) -> Duration {
        Self::now() - start
    }

    fn add(&self, a: &Duration, b: &Duration) -> Duration {
        *a + *b
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        WallTime.to_f64(value)
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        WallTime.formatter()
    }
}

/// What is registered and what is asked.
struct Load {
    ranges: Vec<HostRange>,
    end: usize,
}

impl Load {
    fn new(count: usize) -> Self {
        let (mut random, mut at) = (Random(1), 1 << 20);
        let ranges = (0..count).map(|n| {
            let pages = 1 + random.below(16) + if n % 10 == 0 { 16 + random.below(48) } else { 0 };
            let range = HostRange::new(at * page_size(), pages * page_size()).expect("below the end of user space");
            at += pages.min(16) + random.below(17);
            range
        });
        let mut ranges: Vec<_> = ranges.collect();
        let end = ranges.last().map_or(0, |range| range.end());
        random.shuffle(&mut ranges);
        Self { ranges, end }
    }

    fn addresses(&self) -> Vec<usize> {
        let start = page_size() << 20;
        let mut random = Random(2);
        (0..1 << 14).map(|_| start + random.below((self.end - start) / page_size()) * page_size() + 8).collect()
    }
}

/// What every contender can do. `find` and `overlap` return a sum over what they found, so that nothing is left out.
trait Contender {
    const NAME: &'static str;
    fn build(load: &Load) -> Self;
    fn overlap(&self, low: usize, high: usize) -> u64;

    fn find(&self, addr: usize) -> u64 {
        self.overlap(addr, addr + 1)
    }
}

trait Changing: Contender {
    fn insert(&mut self, range: HostRange, id: u64);
    fn remove(&mut self, range: HostRange, id: u64);
}

struct Ours(Index<u64>);

impl Contender for Ours {
    const NAME: &'static str = "index";

    fn build(load: &Load) -> Self {
        warm_up_thread();
        let mut index = Self(Index::new());
        for (id, &range) in (0..).zip(&load.ranges) {
            index.insert(range, id);
        }
        index
    }

    fn overlap(&self, low: usize, high: usize) -> u64 {
        let mut sum = 0;
        let asked = HostRange::new(low, high - low).expect("page-aligned");
        self.0.visit_overlapping(asked, |entry| sum += entry.id + 1);
        sum
    }

    fn find(&self, addr: usize) -> u64 {
        let mut sum = 0;
        self.0.find(addr, |entry| sum += entry.id + 1);
        sum
    }
}

impl Changing for Ours {
    fn insert(&mut self, range: HostRange, id: u64) {
        self.0.insert(range, id, Arc::new(id));
    }

    fn remove(&mut self, range: HostRange, id: u64) {
        self.0.remove(range, id);
    }
}

/// The usual shortcut: a sorted map, and the longest length to know how far back a question must look.
struct Longest {
    map: BTreeMap<(usize, u64), (usize, Value)>,
    longest: usize,
}

impl Contender for Longest {
    const NAME: &'static str = "BTreeMap + longest length";

    fn build(load: &Load) -> Self {
        let mut made = Self { map: BTreeMap::new(), longest: 0 };
        for (id, &range) in (0..).zip(&load.ranges) {
            made.insert(range, id);
        }
        made
    }

    fn overlap(&self, low: usize, high: usize) -> u64 {
        let from = (low.saturating_sub(self.longest), 0);
        let near = self.map.range(from..(high, 0));
        near.filter(|(_, (end, _))| *end > low).map(|((_, id), _)| id + 1).sum()
    }
}

impl Changing for Longest {
    fn insert(&mut self, range: HostRange, id: u64) {
        self.longest = self.longest.max(range.len());
        self.map.insert((range.start(), id), (range.end(), Arc::new(id)));
    }

    fn remove(&mut self, range: HostRange, id: u64) {
        self.map.remove(&(range.start(), id));
    }
}

impl Contender for Lapper<usize, (u64, Value)> {
    const NAME: &'static str = "rust-lapper (static)";

    fn build(load: &Load) -> Self {
        let interval = |(id, range): (u64, &HostRange)| Interval {
            start: range.start(),
            stop: range.end(),
            val: (id, Arc::new(id)),
        };
        Self::new((0..).zip(&load.ranges).map(interval).collect())
    }

    fn overlap(&self, low: usize, high: usize) -> u64 {
        Lapper::find(self, low, high).map(|found| found.val.0 + 1).sum()
    }
}

impl Contender for IntervalMap<usize, (u64, Value)> {
    const NAME: &'static str = "iset";

    fn build(load: &Load) -> Self {
        let mut made = Self::new();
        for (id, &range) in (0..).zip(&load.ranges) {
            Changing::insert(&mut made, range, id);
        }
        made
    }

    fn overlap(&self, low: usize, high: usize) -> u64 {
        self.values(low..high).map(|found| found.0 + 1).sum()
    }
}

impl Changing for IntervalMap<usize, (u64, Value)> {
    fn insert(&mut self, range: HostRange, id: u64) {
        self.force_insert(range.start()..range.end(), (id, Arc::new(id)));
    }

    fn remove(&mut self, range: HostRange, id: u64) {
        self.remove_where(range.start()..range.end(), |found| found.0 == id);
    }
}

/// Takes 32-bit places, so page numbers; its ends are included.
struct Super(superintervals::IntervalMap<(u64, Value)>);

impl Contender for Super {
    const NAME: &'static str = "superintervals (static, 32-bit)";

    fn build(load: &Load) -> Self {
        let mut map = superintervals::IntervalMap::new();
        let page = |addr: usize| i32::try_from(addr / page_size()).expect("few pages");
        for (id, range) in (0..).zip(&load.ranges) {
            map.add(page(range.start()), page(range.end()) - 1, (id, Arc::new(id)));
        }
        map.build();
        Self(map)
    }

    fn overlap(&self, low: usize, high: usize) -> u64 {
        let page = |addr: usize| i32::try_from(addr / page_size()).expect("few pages");
        self.0.search_values_iter(page(low), page(high - 1)).map(|found| found.0 + 1).sum()
    }
}

fn ask<C: Contender>(c: &mut Criterion<CpuTime>, load: &Load) {
    let contender = C::build(load);
    let (addresses, mut next) = (load.addresses(), 0);
    let mut address = || {
        next = (next + 1) & (addresses.len() - 1);
        addresses[next]
    };
    let n = load.ranges.len();
    c.benchmark_group(format!("find/{n}")).bench_function(C::NAME, |b| b.iter(|| black_box(contender.find(address()))));
    c.benchmark_group(format!("overlap of 512 pages/{n}")).bench_function(C::NAME, |b| {
        b.iter(|| {
            let low = address() & !(page_size() - 1);
            black_box(contender.overlap(low, low + 512 * page_size()))
        });
    });
}

fn change<C: Changing>(c: &mut Criterion<CpuTime>, load: &Load) {
    let mut contender = C::build(load);
    let (mut random, n) = (Random(3), load.ranges.len());
    let mut group = c.benchmark_group(format!("remove and insert/{n}"));
    group.throughput(Throughput::Elements(2)).bench_function(C::NAME, |b| {
        b.iter(|| {
            let at = random.below(n);
            contender.remove(load.ranges[at], at as u64);
            contender.insert(load.ranges[at], at as u64);
        });
    });
}

fn giant<C: Contender>(c: &mut Criterion<CpuTime>, load: &Load) {
    let contender = C::build(load);
    let (addresses, mut next) = (load.addresses(), 0);
    c.benchmark_group(format!("find beside one giant range/{}", load.ranges.len())).bench_function(C::NAME, |b| {
        b.iter(|| {
            next = (next + 1) & (addresses.len() - 1);
            black_box(contender.find(addresses[next]))
        });
    });
}

/// Bytes that the C library has handed out.
fn allocated() -> usize {
    // SAFETY: mallinfo2 only reads the allocator's own counters.
    let info = unsafe { libc::mallinfo2() };
    info.uordblks + info.hblkhd
}

fn bytes<C: Contender>(load: &Load) {
    let values: Vec<Value> = (0..load.ranges.len() as u64).map(Arc::new).collect();
    let before = allocated();
    let copies: Vec<Value> = (0..load.ranges.len() as u64).map(Arc::new).collect();
    let of_values = allocated() - before - copies.capacity() * size_of::<Value>();
    drop((values, copies));
    let before = allocated();
    let contender = C::build(load);
    let used = allocated().saturating_sub(before).saturating_sub(of_values);
    println!(
        "bytes per entry, the value's own allocation left out: {:34} {:5.1}",
        C::NAME,
        used as f64 / load.ranges.len() as f64
    );
    drop(contender);
}

/// Reads and writes at once: what readers lose to each other and to a writer, and how long a change takes meanwhile.
fn together(load: &Load) {
    let ours = Ours::build(load);
    let addresses = load.addresses();
    for (readers, pause) in [(1_u32, None), (2, None), (2, Some(Duration::from_micros(100)))] {
        let stop = AtomicBool::new(false);
        let (mut reads, mut writes) = (0.0, Vec::new());
        std::thread::scope(|scope| {
            let reader = |first: usize| {
                let (ours, stop, addresses) = (&ours, &stop, &addresses);
                move || {
                    let (mut done, begun) = (first, CpuTime::now());
                    while !stop.load(Ordering::Relaxed) {
                        for _ in 0..256 {
                            black_box(ours.find(addresses[done % addresses.len()]));
                            done += 1;
                        }
                    }
                    (done - first) as f64 / (CpuTime::now() - begun).as_secs_f64()
                }
            };
            let started: Vec<_> = (0..readers).map(|n| scope.spawn(reader(n as usize * 5000))).collect();
            let (begun, mut random) = (Instant::now(), Random(4));
            while begun.elapsed() < Duration::from_millis(1000) {
                std::thread::sleep(pause.unwrap_or(Duration::from_millis(100)));
                if pause.is_some() {
                    let at = random.below(load.ranges.len());
                    let change = Instant::now();
                    drop(ours.0.remove(load.ranges[at], at as u64));
                    ours.0.insert(load.ranges[at], at as u64, Arc::new(0));
                    writes.push(change.elapsed() / 2);
                }
            }
            stop.store(true, Ordering::Relaxed);
            reads = started.into_iter().map(|reader| reader.join().expect("no reader panics")).sum::<f64>()
                / f64::from(readers);
        });
        writes.sort_unstable();
        let percentile = |p: usize| writes.get(writes.len() * p / 100).copied().unwrap_or_default();
        println!(
            "{readers} readers, a writer {}: {:.1} M finds per second of a reader's processor time; a change p50 {:?} p99 {:?}",
            if pause.is_some() { "every 100 us" } else { "never" },
            reads / 1e6,
            percentile(50),
            percentile(99),
        );
    }
}

/// One leaf's content: what the index copies at a change and looks into at a question, as plain arrays and as rust-lapper.
fn leaf(c: &mut Criterion<CpuTime>) {
    let load = Load::new(48);
    let lapper = Lapper::<usize, (u64, Value)>::build(&load);
    let ours = Ours::build(&load);
    let addresses = load.addresses();
    let mut group = c.benchmark_group("one node of 48");
    let (mut next, extra) = (0, HostRange::new(page_size() << 19, page_size()).expect("aligned"));
    group.bench_function(BenchmarkId::new("find", "index"), |b| {
        b.iter(|| {
            next = (next + 1) & (addresses.len() - 1);
            black_box(ours.find(addresses[next]))
        });
    });
    group.bench_function(BenchmarkId::new("find", "arc-swap of rust-lapper"), |b| {
        let swap = arc_swap::ArcSwap::from_pointee(lapper.clone());
        b.iter(|| {
            next = (next + 1) & (addresses.len() - 1);
            black_box(Contender::find(&**swap.load(), addresses[next]))
        });
    });
    let value = Arc::new(0);
    group.bench_function(BenchmarkId::new("change", "index"), |b| {
        b.iter(|| {
            ours.0.insert(extra, 99, value.clone());
            ours.0.remove(extra, 99);
        });
    });
    group.bench_function(BenchmarkId::new("change", "arc-swap of rust-lapper"), |b| {
        let swap = arc_swap::ArcSwap::from_pointee(lapper.clone());
        b.iter(|| {
            let mut more = Lapper::clone(&swap.load());
            more.insert(Interval { start: extra.start(), stop: extra.end(), val: (99, value.clone()) });
            swap.store(Arc::new(more));
            let less = swap.load().iter().filter(|entry| entry.val.0 != 99).cloned().collect();
            swap.store(Arc::new(Lapper::new(less)));
        });
    });
}

fn main() {
    let mut c = Criterion::default()
        .with_measurement(CpuTime)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800))
        .sample_size(30)
        .configure_from_args();
    for count in [1_000, 100_000] {
        let load = Load::new(count);
        ask::<Ours>(&mut c, &load);
        ask::<Longest>(&mut c, &load);
        ask::<Lapper<usize, (u64, Value)>>(&mut c, &load);
        ask::<IntervalMap<usize, (u64, Value)>>(&mut c, &load);
        ask::<Super>(&mut c, &load);
        change::<Ours>(&mut c, &load);
        change::<Longest>(&mut c, &load);
        change::<IntervalMap<usize, (u64, Value)>>(&mut c, &load);
    }
    let mut load = Load::new(100_000);
    let plain = Load::new(100_000);
    bytes::<Ours>(&plain);
    bytes::<Longest>(&plain);
    bytes::<Lapper<usize, (u64, Value)>>(&plain);
    bytes::<IntervalMap<usize, (u64, Value)>>(&plain);
    let all = HostRange::new(page_size() << 20, plain.end - (page_size() << 20)).expect("aligned");
    load.ranges.push(all);
    giant::<Ours>(&mut c, &load);
    giant::<Lapper<usize, (u64, Value)>>(&mut c, &load);
    giant::<IntervalMap<usize, (u64, Value)>>(&mut c, &load);
    giant::<Super>(&mut c, &load);
    giant::<Longest>(&mut c, &load);
    leaf(&mut c);
    c.final_summary();
    // Last, as a change looks at a record of every thread that has ever read.
    together(&plain);
}
