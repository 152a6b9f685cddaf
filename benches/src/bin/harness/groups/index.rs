//! The index of ranges against what else one could use. All hold the same ranges, 1 to 16 pages with gaps of 0 to 16 pages, every tenth longer by
//! 16 to 63, and are asked for the same random places. Times are the thread's own processor time, as everything happens on one thread but for
//! the last rows.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use iset::IntervalMap;
use pinfold_invalidate::index::{Index, warm_up_thread};
use pinfold_invalidate::{HostRange, page_size};
use rust_lapper::{Interval, Lapper};

use crate::clock::{cpu, microseconds, nanoseconds, thread_time};
use crate::session::{Contender, Goal, Plan, Session};
use crate::stats::{Random, percentile};

type Value = Arc<u64>;

/// What is registered and what is asked.
struct Load {
    ranges: Vec<HostRange>,
    end: usize,
}

impl Load {
    fn new(count: usize) -> Self {
        let (mut random, mut at) = (Random::new(1), 1 << 20);
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

    /// The same, and one range over all of it.
    fn with_giant(count: usize) -> Self {
        let mut load = Self::new(count);
        let start = page_size() << 20;
        load.ranges.push(HostRange::new(start, load.end - start).expect("whole pages"));
        load
    }

    fn addresses(&self) -> Vec<usize> {
        let start = page_size() << 20;
        let mut random = Random::new(2);
        (0..1 << 14).map(|_| start + random.below((self.end - start) / page_size()) * page_size() + 8).collect()
    }
}

/// What every contender can do: a sum over the ids it finds, so that nothing is left out.
trait Ask {
    const NAME: &'static str;
    fn build(load: &Load) -> Self;
    fn overlap(&self, low: usize, high: usize) -> u64;

    fn find(&self, addr: usize) -> u64 {
        self.overlap(addr, addr + 1)
    }
}

trait Change: Ask {
    fn insert(&mut self, range: HostRange, id: u64);
    fn remove(&mut self, range: HostRange, id: u64);
}

struct Ours(Index<u64>);

impl Ask for Ours {
    const NAME: &'static str = "index";

    fn build(load: &Load) -> Self {
        warm_up_thread();
        let mut index = Self(Index::new());
        (0..).zip(&load.ranges).for_each(|(id, &range)| index.insert(range, id));
        index
    }

    fn overlap(&self, low: usize, high: usize) -> u64 {
        let mut sum = 0;
        let asked = HostRange::new(low, high - low).expect("whole pages");
        self.0.visit_overlapping(asked, |entry| sum += entry.id + 1);
        sum
    }

    fn find(&self, addr: usize) -> u64 {
        let mut sum = 0;
        self.0.find(addr, |entry| sum += entry.id + 1);
        sum
    }
}

impl Change for Ours {
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

impl Ask for Longest {
    const NAME: &'static str = "BTreeMap + longest length";

    fn build(load: &Load) -> Self {
        let mut made = Self { map: BTreeMap::new(), longest: 0 };
        (0..).zip(&load.ranges).for_each(|(id, &range)| made.insert(range, id));
        made
    }

    fn overlap(&self, low: usize, high: usize) -> u64 {
        let from = (low.saturating_sub(self.longest), 0);
        let near = self.map.range(from..(high, 0));
        near.filter(|(_, (end, _))| *end > low).map(|((_, id), _)| id + 1).sum()
    }
}

impl Change for Longest {
    fn insert(&mut self, range: HostRange, id: u64) {
        self.longest = self.longest.max(range.len());
        self.map.insert((range.start(), id), (range.end(), Arc::new(id)));
    }

    fn remove(&mut self, range: HostRange, id: u64) {
        self.map.remove(&(range.start(), id));
    }
}

impl Ask for Lapper<usize, (u64, Value)> {
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

impl Ask for IntervalMap<usize, (u64, Value)> {
    const NAME: &'static str = "iset";

    fn build(load: &Load) -> Self {
        let mut made = Self::new();
        (0..).zip(&load.ranges).for_each(|(id, &range)| Change::insert(&mut made, range, id));
        made
    }

    fn overlap(&self, low: usize, high: usize) -> u64 {
        self.values(low..high).map(|found| found.0 + 1).sum()
    }
}

impl Change for IntervalMap<usize, (u64, Value)> {
    fn insert(&mut self, range: HostRange, id: u64) {
        self.force_insert(range.start()..range.end(), (id, Arc::new(id)));
    }

    fn remove(&mut self, range: HostRange, id: u64) {
        self.remove_where(range.start()..range.end(), |found| found.0 == id);
    }
}

/// Takes 32-bit places, so page numbers; its ends are included.
struct Super(superintervals::IntervalMap<(u64, Value)>);

fn page_number(addr: usize) -> i32 {
    i32::try_from(addr / page_size()).expect("few pages")
}

impl Ask for Super {
    const NAME: &'static str = "superintervals (static, 32-bit)";

    fn build(load: &Load) -> Self {
        let mut map = superintervals::IntervalMap::new();
        for (id, range) in (0..).zip(&load.ranges) {
            map.add(page_number(range.start()), page_number(range.end()) - 1, (id, Arc::new(id)));
        }
        map.build();
        Self(map)
    }

    fn overlap(&self, low: usize, high: usize) -> u64 {
        self.0.search_values_iter(page_number(low), page_number(high - 1)).map(|found| found.0 + 1).sum()
    }
}

/// Questions a sample.
const ASKED: usize = 2048;

fn finding<'a, A: Ask + 'a>(contender: &'a RefCell<A>, load: &Load, pages: usize) -> Contender<'a> {
    let (addresses, mut next) = (load.addresses(), 0);
    Contender::new(A::NAME, move || {
        let contender = contender.borrow();
        Ok(cpu(ASKED, || {
            next = (next + 1) & (addresses.len() - 1);
            black_box(match pages {
                0 => contender.find(addresses[next]),
                _ => {
                    let low = addresses[next] & !(page_size() - 1);
                    contender.overlap(low, low + pages * page_size())
                }
            });
        }))
    })
}

fn changing<'a, C: Change + 'a>(contender: &'a RefCell<C>, load: &'a Load) -> Contender<'a> {
    let mut random = Random::new(3);
    Contender::new(C::NAME, move || {
        let mut contender = contender.borrow_mut();
        Ok(cpu(256, || {
            let at = random.below(load.ranges.len());
            contender.remove(load.ranges[at], at as u64);
            contender.insert(load.ranges[at], at as u64);
        }))
    })
}

/// One of each, with the same in it.
struct All {
    ours: RefCell<Ours>,
    longest: RefCell<Longest>,
    lapper: RefCell<Lapper<usize, (u64, Value)>>,
    iset: RefCell<IntervalMap<usize, (u64, Value)>>,
    sup: RefCell<Super>,
}

impl All {
    fn build(load: &Load) -> Self {
        Self {
            ours: RefCell::new(Ours::build(load)),
            longest: RefCell::new(Longest::build(load)),
            lapper: RefCell::new(Lapper::build(load)),
            iset: RefCell::new(IntervalMap::build(load)),
            sup: RefCell::new(Super::build(load)),
        }
    }
}

pub(crate) fn run(session: &mut Session) -> Result<()> {
    let small = Load::new(1_000);
    let ours = RefCell::new(Ours::build(&small));
    let plan = Plan::new("find among 1,000", "ns", finding(&ours, &small, 0)).clock("cpu");
    session.measure(plan.against(finding(&ours, &small, 0), None).control())?;

    for (count, find, stab) in [(1_000, 50.0, None), (100_000, 400.0, Goal::ratio(0.6))] {
        let load = Load::new(count);
        let all = All::build(&load);
        let plan =
            Plan::new(format!("find among {}", thousands(count)), "ns", finding(&all.ours, &load, 0)).clock("cpu");
        let plan = plan.against(finding(&all.lapper, &load, 0), None).goal(Goal::ours(find));
        let plan = plan.against(finding(&all.longest, &load, 0), stab);
        let plan = plan.against(finding(&all.iset, &load, 0), None);
        session.measure(plan.against(finding(&all.sup, &load, 0), None))?;

        let name = format!("overlap of 512 pages among {}", thousands(count));
        let plan = Plan::new(name, "ns", finding(&all.ours, &load, 512)).clock("cpu");
        let plan = plan.against(finding(&all.lapper, &load, 512), None);
        let plan = plan.against(finding(&all.longest, &load, 512), None);
        session.measure(plan.against(finding(&all.sup, &load, 512), None))?;

        let name = format!("remove and insert among {}", thousands(count));
        let plan = Plan::new(name, "ns", changing(&all.ours, &load)).clock("cpu");
        let plan = plan.against(changing(&all.longest, &load), None);
        session.measure(plan.against(changing(&all.iset, &load), None))?;
    }

    // With against without, both ours: one object over a whole heap must not make every question dear.
    let (plain, giant) = (Load::new(100_000), Load::with_giant(100_000));
    let (ours, all) = (RefCell::new(Ours::build(&plain)), All::build(&giant));
    let mut without = finding(&ours, &plain, 0);
    without.rename("index without it");
    let plan = Plan::new("find beside one giant range", "ns", finding(&all.ours, &giant, 0)).clock("cpu");
    let plan = plan.against(without, Goal::ratio(2.0));
    let plan = plan.against(finding(&all.lapper, &giant, 0), None);
    let plan = plan.against(finding(&all.sup, &giant, 0), None);
    session.measure(plan)?;
    // By itself, as each of its answers takes as long as a thousand of ours.
    let plan =
        Plan::new("find beside one giant range, by a longest length", "ns", finding(&all.ours, &giant, 0)).clock("cpu");
    let (addresses, mut next) = (giant.addresses(), 0);
    let few = Contender::new(Longest::NAME, || {
        let longest = all.longest.borrow();
        Ok(cpu(16, || {
            next = (next + 1) & (addresses.len() - 1);
            black_box(longest.find(addresses[next]));
        }))
    });
    session.measure(plan.against(few, None).at_most(15))?;
    drop(all);

    let counts = session.mode.pick(
        vec![1, 100, 10_000],
        vec![1, 10, 100, 1_000, 10_000, 100_000],
        vec![1, 10, 100, 1_000, 10_000, 100_000],
    );
    let (mut asked, mut changed) = (Vec::new(), Vec::new());
    for count in counts {
        let load = Load::new(count);
        let all = All::build(&load);
        let plan = Plan::new(format!("find, {count} objects"), "ns", finding(&all.ours, &load, 0)).quiet();
        let plan = plan.against(finding(&all.longest, &load, 0), None).against(finding(&all.lapper, &load, 0), None);
        asked.push((count as f64, session.measure(plan.at_most(15))?));
        let plan = Plan::new(format!("change, {count} objects"), "ns", changing(&all.ours, &load)).quiet();
        changed.push((count as f64, session.measure(plan.against(changing(&all.longest, &load), None).at_most(15))?));
    }
    session.curve("find", "objects", "ns", asked)?;
    session.curve("remove and insert", "objects", "ns", changed)?;

    // Last, as a change looks at a record of every thread that has ever read.
    together(session, &plain)?;
    readers(session, &plain)
}

/// How long a change takes beside two readers that never rest.
fn together(session: &mut Session, load: &Load) -> Result<()> {
    let ours = Ours::build(load);
    let locked = std::sync::RwLock::new(Longest::build(load));
    let (stop, whose) = (AtomicBool::new(false), AtomicBool::new(false));
    let addresses = load.addresses();
    std::thread::scope(|scope| {
        let reader = || {
            let mut next = 0;
            while !stop.load(Ordering::Relaxed) {
                for _ in 0..256 {
                    next = (next + 1) & (addresses.len() - 1);
                    match whose.load(Ordering::Relaxed) {
                        false => black_box(ours.find(addresses[next])),
                        true => black_box(locked.read().expect("whole").find(addresses[next])),
                    };
                }
            }
        };
        (0..2).for_each(|_| drop(scope.spawn(reader)));
        let changes = |is_locked: bool, change: &dyn Fn(usize)| {
            whose.store(is_locked, Ordering::Relaxed);
            let mut random = Random::new(4);
            let values = (0..64).map(|_| {
                std::thread::sleep(Duration::from_micros(100));
                let (at, begun) = (random.below(load.ranges.len()), Instant::now());
                change(at);
                microseconds(begun.elapsed()) / 2.0
            });
            Ok(values.collect::<Vec<_>>())
        };
        let own = |at: usize| {
            ours.0.remove(load.ranges[at], at as u64);
            ours.0.insert(load.ranges[at], at as u64, Arc::new(0));
        };
        let theirs = |at: usize| {
            locked.write().expect("whole").remove(load.ranges[at], at as u64);
            locked.write().expect("whole").insert(load.ranges[at], at as u64);
        };
        let mut measure = |name: &str, p99: bool| {
            let plan = Plan::new(name, "µs", Contender::many("index", || changes(false, &own)));
            let plan = plan.against(Contender::many("RwLock of BTreeMap", || changes(true, &theirs)), None);
            let plan = plan.placement("two readers and the writer wherever the scheduler puts them");
            session.measure(if p99 { plan.p99().goal(Goal::ours(50.0)) } else { plan })
        };
        let result =
            measure("change beside two readers", false).and_then(|_| measure("change beside two readers, p99", true));
        stop.store(true, Ordering::Relaxed);
        result
    })?;
    Ok(())
}

/// What a reader does while others read: a line that stays flat is the goal. Each reader's own processor time.
fn readers(session: &mut Session, load: &Load) -> Result<()> {
    let (ours, locked) = (Ours::build(load), std::sync::RwLock::new(Longest::build(load)));
    let addresses = load.addresses();
    let each = |threads: usize, find: &(dyn Fn(usize) -> u64 + Sync)| {
        let reader = |first: usize| {
            warm_up_thread();
            let begun = thread_time();
            for next in 0..4 * ASKED {
                black_box(find(addresses[(first + next) & (addresses.len() - 1)]));
            }
            nanoseconds(thread_time().saturating_sub(begun)) / (4 * ASKED) as f64
        };
        let mut times: Vec<f64> = std::thread::scope(|scope| {
            let started: Vec<_> = (0..threads).map(|n| scope.spawn(move || reader(n * 999))).collect();
            started.into_iter().map(|thread| thread.join().expect("a reader doesn't panic")).collect()
        });
        times.sort_unstable_by(f64::total_cmp);
        Ok(percentile(&times, 0.5))
    };
    let mut points = Vec::new();
    let most = crate::placement::allowed().len();
    let mut threads = 1;
    while threads <= most {
        let plan = Plan::new(
            format!("find, {threads} readers"),
            "ns",
            Contender::new("index", || each(threads, &|at| ours.find(at))),
        );
        let peer = Contender::new("RwLock of BTreeMap", || each(threads, &|at| locked.read().expect("whole").find(at)));
        points.push((threads as f64, session.measure(plan.against(peer, None).quiet().at_most(15))?));
        threads = if threads == most { most + 1 } else { (threads * 2).min(most) };
    }
    session.curve("find, by each of several readers", "threads", "ns", points)
}

/// `1 object`, `10,000 objects`
pub(crate) fn counted(n: usize, what: &str) -> String {
    format!("{} {what}{}", thousands(n), if n == 1 { "" } else { "s" })
}

/// `100,000`
pub(crate) fn thousands(n: usize) -> String {
    let digits = n.to_string();
    let grouped = digits.as_bytes().rchunks(3).rev().map(|part| String::from_utf8_lossy(part).into_owned());
    grouped.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A comparison of things that answer differently would be worthless.
    #[test]
    fn all_contenders_find_the_same() {
        for load in [Load::new(300), Load::with_giant(300)] {
            let (ours, map) = (Ours::build(&load), Longest::build(&load));
            let (lapper, set) = (Lapper::build(&load), IntervalMap::<usize, (u64, Value)>::build(&load));
            let sup = Super::build(&load);
            for &at in load.addresses().iter().take(500) {
                let low = at & !(page_size() - 1);
                let naive = |high: usize| -> u64 {
                    let hit =
                        (0_u64..).zip(&load.ranges).filter(|(_, range)| range.start() < high && range.end() > low);
                    hit.map(|(id, _)| id + 1).sum()
                };
                assert_eq!(
                    [ours.find(at), map.find(at), lapper.find(at, at + 1).map(|f| f.val.0 + 1).sum()],
                    [naive(low + 9); 3]
                );
                let high = low + 512 * page_size();
                let all = [
                    ours.overlap(low, high),
                    map.overlap(low, high),
                    lapper.overlap(low, high),
                    Ask::overlap(&set, low, high),
                    sup.overlap(low, high),
                ];
                assert_eq!(all, [naive(high); 5]);
            }
        }
    }

    #[test]
    fn digits_come_in_threes() {
        assert_eq!([0, 999, 1_000, 1_234_567].map(thousands), ["0", "999", "1,000", "1,234,567"]);
    }
}
