//! One munmap over many objects: what its caller pays, and who comes next.

use std::sync::Arc;
use std::sync::atomic::AtomicU16;
use std::time::Instant;

use anyhow::{Result, ensure};
use pinfold_invalidate::{DEFAULT_DEADLINE, HostRange, Shards, Space, page_size};

use super::{By, Told, watch};
use crate::clock::{microseconds, nanoseconds};
use crate::groups::index::counted;
use crate::machine::memory_available;
use crate::memory::Memory;
use crate::session::{Contender, Goal, Medians, Plan, Session};

/// What a mapping has when it is unmapped.
#[derive(Clone, Copy)]
enum Pages {
    There,
    Untouched,
}

impl Pages {
    fn words(self) -> &'static str {
        match self {
            Self::There => "",
            Self::Untouched => ", no page there",
        }
    }
}

/// One munmap over many objects of a page each. What of it is the kernel's, which frees the pages, shows beside it: the same without objects. What is
/// the library's shows by itself where no page is there, so that the kernel has nothing to free.
pub(super) fn run(session: &mut Session) -> Result<()> {
    let space = Space::get(DEFAULT_DEADLINE)?;
    let counts: Vec<usize> =
        session.mode.pick(vec![1, 100, 5_000], vec![1, 100, 10_000, 100_000], vec![1, 100, 10_000, 100_000]);
    // One call for the kernel; an object for each page all the same.
    let cover = |memory: &Memory| -> Result<Vec<HostRange>> {
        let ranges: Vec<_> = (0..memory.len() / page_size()).map(|at| memory.part(at, page_size())).collect();
        let watched = space.watch(memory.range())?;
        for (id, &range) in ranges.iter().enumerate() {
            let told = Told { shards: AtomicU16::new(watched.shards.0) };
            space.insert(range, id as u64, Arc::new(told));
        }
        Ok(ranges)
    };
    let unmap = |count: usize, by: By<'_>, pages: Pages| -> Result<f64> {
        let memory = match pages {
            Pages::There => Memory::populated(count * page_size())?,
            Pages::Untouched => Memory::untouched(count * page_size())?,
        };
        let ranges = if let By::Ours(_) = by { cover(&memory)? } else { Vec::new() };
        let begun = Instant::now();
        memory.unmap();
        let time = microseconds(begun.elapsed());
        ranges.iter().enumerate().for_each(|(id, range)| by.end(*range, id));
        Ok(time)
    };
    let mut curve: Vec<(f64, Medians)> = Vec::new();
    for count in counts {
        if (count * page_size()) as u64 > memory_available() / 4 {
            session.absent(&counted(count, "object"), "too little memory is free");
            continue;
        }
        let mut measure = |pages: Pages, goal: Option<Goal>| {
            let name = format!("one munmap over {}{}", counted(count, "object"), pages.words());
            let plan =
                Plan::new(name, "µs", Contender::new("pinfold", || unmap(count, By::Ours(&space), pages))).goal(goal);
            let plan = plan.against(Contender::new("raw munmap", || unmap(count, By::Nobody, pages)), None);
            session.measure(if count >= 100_000 { plan.exactly(9) } else { plan.at_most(41) })
        };
        let whole = measure(Pages::There, Goal::ours(30_000.0).filter(|_| count == 100_000))?;
        if count >= 5_000 {
            let untouched = measure(Pages::Untouched, None)?;
            if let ([_, (_, raw)], [(_, ours), (_, least)]) = (&whole[..], &untouched[..]) {
                session.fact(
                    format!("of one munmap over {}, ours", counted(count, "object")),
                    format!("{:.0} µs; a plain one of as many pages takes {:.1} ms", ours - least, raw / 1e3),
                );
            }
        }
        curve.push((count as f64, whole));
        if count >= 5_000 {
            // Whoever looks at these objects waits for it.
            let told = || -> Result<f64> {
                let memory = Memory::untouched(count * page_size())?;
                let ranges = cover(&memory)?;
                let begun = Instant::now();
                memory.unmap();
                ensure!(space.wait_open(Shards::ALL, begun + DEFAULT_DEADLINE), "all are told");
                let time = microseconds(begun.elapsed());
                ranges.iter().enumerate().for_each(|(id, range)| space.remove(*range, id as u64));
                Ok(time)
            };
            let name = format!("until {} are told of a munmap", counted(count, "object"));
            session.measure(Plan::new(name, "µs", Contender::new("pinfold", told)).at_most(11))?;
        }
    }
    session.curve("one munmap over all objects", "objects", "µs", curve)?;

    // Whoever comes next, in the same shard: a discard of other watched memory, which waits for the reader of events.
    let count = session.mode.pick(5_000, 100_000, 100_000);
    if (count * page_size()) as u64 <= memory_available() / 4 {
        let next = |before: usize| -> Result<f64> {
            let all = Memory::populated((count + 2) * page_size())?;
            let watched = space.watch(all.range())?;
            let ranges: Vec<_> = (0..count + 2).map(|at| all.part(at, page_size())).collect();
            let over = |id: usize| {
                let told = Told { shards: AtomicU16::new(watched.shards.0) };
                space.insert(ranges[id], id as u64, Arc::new(told));
            };
            (0..before).for_each(over);
            (count..count + 2).for_each(over);
            let others = all.without_head(count);
            let begun = Instant::now();
            others.discard();
            let time = microseconds(begun.elapsed());
            (0..before).chain(count..count + 2).for_each(|id| space.remove(ranges[id], id as u64));
            Ok(time)
        };
        let name = format!("the next madvise, of other memory, after one munmap over {}", counted(count, "object"));
        let plan = Plan::new(name, "µs", Contender::new("pinfold", || next(count)));
        session.measure(plan.against(Contender::new("after one over none", || next(0)), None).at_most(11))?;
    }

    // The look-up that follows pays nothing for them: it is the same one as before.
    let memory = Memory::populated(page_size())?;
    watch(&space, memory.range(), 0)?;
    let look = || {
        let begun = Instant::now();
        let mut found = 0;
        for _ in 0..256 {
            space.visit(memory.range(), |_, _, _| found += 1);
        }
        ensure!(found == 256, "the object is found");
        Ok(nanoseconds(begun.elapsed()) / 256.0)
    };
    let after = || {
        unmap(1000, By::Ours(&space), Pages::There)?;
        look()
    };
    let plan = Plan::new("look-up after a munmap over 1,000 objects", "ns", Contender::new("after", after));
    session.measure(plan.against(Contender::new("before", look), None).at_most(41))?;
    space.remove(memory.range(), 0);
    Ok(())
}
