//! Keeping a copy fresh: a mirror's refresh against a full copy, for several shares of pages that the program has written since.

use std::time::Instant;

use anyhow::Result;
use pinfold_vulkan::{Access, page_size};

use crate::clock::microseconds;
use crate::groups::import::{PATIENCE, bytes, register, settle};
use crate::memory::Memory;
use crate::session::{Contender, Goal, Plan, Session};
use crate::stats::Random;
use crate::vulkan::{Card, Staged};

pub(crate) fn run(session: &mut Session, card: &Card) -> Result<()> {
    let manager = card.manager(card.mirrors())?;
    let wanted = session.mode.pick(32 << 20, 128 << 20, 256 << 20);
    let size = wanted.min(card.most_bytes()) / page_size() * page_size();
    let memory = Memory::populated(size)?;
    let object = register(&manager, &memory, Access::Read)?;
    drop(manager.acquire_timeout(&[&object], PATIENCE)?);
    session.fact("path", object.path().map_or("none".into(), |path| format!("{path:?}")));
    let mut copy = Staged::new(card, size)?;
    let full = |copy: &mut Staged<'_>| {
        let begun = Instant::now();
        // SAFETY: the harness's memory is readable, and only this thread writes it.
        unsafe { copy.upload(memory.pointer()) }?;
        Ok(microseconds(begun.elapsed()))
    };
    full(&mut copy)?;
    let mut other = Staged::new(card, size)?;
    let plan = Plan::new(format!("full copy of {}", bytes(size)), "µs", Contender::new("memcpy", || full(&mut copy)));
    session.measure(plan.against(Contender::new("memcpy", || full(&mut other)), None).control().at_most(15))?;
    drop(other);

    let pages = size / page_size();
    let mut random = Random::new(5);
    let mut curve = Vec::new();
    for (part, goal) in [
        (0.0, None),
        (0.001, Goal::ratio(0.01)),
        (0.01, Goal::ratio(0.05)),
        (0.1, Goal::ratio(0.3)),
        (1.0, Goal::ratio(1.05)),
    ] {
        let dirty = crate::stats::floor(pages as f64 * part).max(usize::from(part > 0.0));
        let mut refresh = || {
            if dirty == pages {
                (0..pages).for_each(|page| memory.touch(page));
            } else {
                (0..dirty).for_each(|_| memory.touch(random.below(pages)));
            }
            let begun = Instant::now();
            drop(manager.acquire_timeout(&[&object], PATIENCE)?);
            Ok(microseconds(begun.elapsed()))
        };
        let name = format!("refresh {}, {} % of the pages written", bytes(size), part * 100.0);
        let plan = Plan::new(name, "µs", Contender::new("mirror", &mut refresh));
        let plan = plan.against(Contender::new("full memcpy", || full(&mut copy)), goal);
        let medians = session.measure(plan.at_most(session.mode.pick(7, 15, 31)))?;
        if part > 0.0 {
            curve.push((part * 100.0, medians));
        }
    }
    session.curve(&format!("refresh of {}", bytes(size)), "% of pages written", "µs", curve)?;
    drop(object);
    settle(&manager)
}
