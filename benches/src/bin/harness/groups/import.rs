//! Giving memory to the device: through Pinfold, by hand, and by copying it.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use pinfold_core::Device;
use pinfold_invalidate::Space;
use pinfold_vulkan::{Access, Config, Manager, page_size};

use crate::clock::{microseconds, wall};
use crate::groups::index::counted;
use crate::memory::Memory;
use crate::session::{Contender, Goal, Plan, Session};
use crate::vulkan::{Card, Staged};

/// Longer than any acquire takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) const KIB: usize = 1 << 10;
pub(crate) const MIB: usize = 1 << 20;

/// `4 KiB`, `256 MiB`, `4 GiB`
pub(crate) fn bytes(n: usize) -> String {
    let units = ["B", "KiB", "MiB", "GiB"];
    let mut value = (n, 0);
    while value.0 >= 1024 && value.0.is_multiple_of(1024) && value.1 + 1 < units.len() {
        value = (value.0 / 1024, value.1 + 1);
    }
    format!("{} {}", value.0, units[value.1])
}

/// Registers memory for the device to read.
pub(crate) fn register<D: Device>(
    manager: &pinfold_core::Manager<D>,
    memory: &Memory,
    access: Access,
) -> Result<pinfold_core::Userptr<D>> {
    // SAFETY: (1) there are no references into the harness's memory; (2) it is no allocator's; (3) each group unmaps it after the object is gone, or
    // where that is what is measured, with no work under way; (4) it is anonymous, so nobody truncates it.
    Ok(unsafe { manager.register(memory.range(), access) }?)
}

/// Waits until nothing of dropped objects is left, so that the next sample doesn't pay for them.
pub(crate) fn settle<D: Device>(manager: &pinfold_core::Manager<D>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while manager.stats().imports > 0 {
        ensure!(Instant::now() < deadline, "imports of dropped objects are still there after {PATIENCE:?}");
        std::thread::sleep(Duration::from_micros(50));
    }
    Ok(())
}

/// Microseconds to register and acquire memory that the device hasn't seen, until its buffer can be named.
pub(crate) fn cold<D: Device>(manager: &pinfold_core::Manager<D>, memory: &Memory) -> Result<f64> {
    let begun = Instant::now();
    let object = register(manager, memory, Access::Read)?;
    let lease = manager.acquire_timeout(&[&object], PATIENCE)?;
    let time = microseconds(begun.elapsed());
    drop((lease, object));
    settle(manager)?;
    Ok(time)
}

/// Microseconds to acquire an object that is valid.
pub(crate) fn warm<D: Device>(manager: &pinfold_core::Manager<D>, object: &pinfold_core::Userptr<D>) -> Result<f64> {
    let mut fine = true;
    let time = wall(256, || fine &= manager.acquire(&[object]).is_ok());
    ensure!(fine, "a valid object was not acquired");
    Ok(time / 1e3)
}

/// The same by hand: no watching, no populating, no bookkeeping.
fn by_hand(card: &Card, memory: &Memory) -> Result<f64> {
    let begun = Instant::now();
    // SAFETY: the mapping outlives the import, which is dropped here; mappings of the harness are whole pages, and the caller has compared
    // those with the alignment of imports.
    let pieces = unsafe { card.import_by_hand(memory.pointer(), memory.len()) }?;
    let time = microseconds(begun.elapsed());
    drop(pieces);
    Ok(time)
}

/// Memory, and a copy of all of it, until the device can read it.
fn staged(card: &Card, memory: &Memory) -> Result<f64> {
    let begun = Instant::now();
    let mut staged = Staged::new(card, memory.len())?;
    // SAFETY: the harness's memory is readable, and only this thread writes it.
    unsafe { staged.upload(memory.pointer()) }?;
    let time = microseconds(begun.elapsed());
    drop(staged);
    Ok(time)
}

pub(crate) fn run(session: &mut Session, card: &Card) -> Result<()> {
    card.imports()?;
    let alignment = card.describe().import_alignment;
    ensure!(
        alignment <= page_size() as u64,
        "imports must be aligned to {alignment} bytes; a page has {}",
        page_size()
    );
    let manager = card.manager(Config::default())?;
    let wanted = session.mode.pick(
        vec![4 * KIB, 256 * KIB, MIB, 16 * MIB, 256 * MIB],
        vec![4 * KIB, 64 * KIB, MIB, 16 * MIB, 256 * MIB, 1024 * MIB],
        vec![4 * KIB, 64 * KIB, MIB, 16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB, 4096 * MIB],
    );
    let (sizes, too_big) = card.fitting(&wanted);
    for size in too_big {
        session.absent(
            &bytes(size),
            format!("more than {} would be taken from this machine or card", bytes(card.most_bytes() / MIB * MIB)),
        );
    }

    let memory = Memory::populated(MIB)?;
    let hand = || Contender::new("import by hand", || by_hand(card, &memory));
    session.measure(Plan::new("import by hand, 1 MiB", "µs", hand()).against(hand(), None).control())?;

    let mut curve = Vec::new();
    for &size in &sizes {
        let memory = Memory::populated(size)?;
        let rounds = match size {
            size if size > 512 * MIB => 3,
            size if size > 64 * MIB => session.mode.pick(3, 5, 9),
            _ => 41,
        };
        let plan = Plan::new(
            format!("acquire, cold, {}", bytes(size)),
            "µs",
            Contender::new("pinfold", || cold(&manager, &memory)),
        );
        let plan =
            plan.against(Contender::new("import by hand", || by_hand(card, &memory)), Goal::ratio_plus(1.10, 2.0));
        let goal = Goal::ratio(0.01).filter(|_| card.gpu.is_cpu() && size == 256 * MIB);
        let plan = plan.against(Contender::new("staged copy (gpu-allocator)", || staged(card, &memory)), goal);
        curve.push((size as f64, session.measure(plan.at_most(rounds))?));
    }
    session.curve("give memory to the device", "bytes", "µs", curve)?;

    let memory = Memory::populated(MIB)?;
    let object = register(&manager, &memory, Access::Read)?;
    drop(manager.acquire_timeout(&[&object], PATIENCE)?);
    session.fact("path of private memory", object.path().map_or("none".into(), |path| format!("{path:?}")));
    session.fact("coverage of private memory", object.coverage().map_or("none".into(), |how| format!("{how:?}")));
    let plan = Plan::new("acquire, warm, 1 MiB", "µs", Contender::new("pinfold", || warm(&manager, &object)));
    session.measure(plan.against(Contender::new("import by hand", || by_hand(card, &memory)), Goal::ratio(1.10)))?;

    let again = || {
        manager.invalidate(object.range())?;
        let begun = Instant::now();
        drop(manager.acquire_timeout(&[&object], PATIENCE)?);
        Ok(microseconds(begun.elapsed()))
    };
    let plan = Plan::new("acquire after a change, 1 MiB", "µs", Contender::new("pinfold", again));
    session.measure(plan.against(Contender::new("import by hand", || by_hand(card, &memory)), None))?;
    drop(object);
    settle(&manager)?;
    many(session, card, &manager)
}

/// Waits until the index has none of the sample before: workers take them out, and whoever registers meanwhile waits for them.
pub(crate) fn wait_for_nobody_over(memory: &Memory) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut left = 0;
        if let Some(space) = Space::current() {
            space.visit(memory.range(), |_, _, _| left += 1);
        }
        if left == 0 {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{left} dropped objects are still there after {PATIENCE:?}");
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// Registering, finding, and acquiring among ever more objects.
fn many(session: &mut Session, card: &Card, manager: &Manager) -> Result<()> {
    let counts = session.mode.pick(vec![1, 100, 2_000], vec![1, 100, 10_000], vec![1, 100, 10_000, 100_000]);
    let fits = |count: &usize| count * page_size() <= card.most_bytes();
    let (mut registered, mut acquired) = (Vec::new(), Vec::new());
    let one = Memory::populated(page_size())?;
    for count in counts.into_iter().filter(fits) {
        let others = Memory::untouched(count * page_size())?;
        let objects: Vec<_> = (0..count)
            // SAFETY: as in `register`; these are never acquired, so nothing ever looks at the memory.
            .map(|index| unsafe { manager.register(others.part(index, page_size()), Access::Read) })
            .collect::<Result<_, _>>()?;
        let ours = || {
            wait_for_nobody_over(&one)?;
            let mut kept = Vec::with_capacity(64);
            let mut failed = None;
            let time = wall(64, || match register(manager, &one, Access::Read) {
                Ok(object) => kept.push(object),
                Err(error) => failed = Some(error),
            });
            failed.map_or(Ok(time / 1e3), Err)
        };
        let map = std::sync::Mutex::new(std::collections::BTreeMap::new());
        (0..count)
            .for_each(|index| _ = map.lock().expect("whole").insert((others.part(index, page_size()), index), ()));
        let theirs = || {
            let mut at = count;
            let time = wall(64, || {
                at += 1;
                map.lock().expect("whole").insert((one.range(), at), ());
            });
            map.lock().expect("whole").retain(|(range, _), ()| *range != one.range());
            Ok(time / 1e3)
        };
        let name = format!("register, beside {}", counted(count, "object"));
        let plan = Plan::new(name, "µs", Contender::new("pinfold", ours)).goal(Goal::ours(1.0));
        let plan = plan.against(Contender::new("insert into a locked BTreeMap", theirs), None);
        registered.push((count as f64, session.measure(plan.at_most(41))?));

        let name = format!("acquire, cold, 4 KiB, beside {}", counted(count, "object"));
        let plan = Plan::new(name, "µs", Contender::new("pinfold", || cold(manager, &one)));
        let plan = plan.against(Contender::new("import by hand", || by_hand(card, &one)), None);
        acquired.push((count as f64, session.measure(plan.quiet().at_most(41))?));
        drop(objects);
        settle(manager)?;
    }
    session.curve("register", "objects", "µs", registered)?;
    session.curve("acquire one page, cold", "objects", "µs", acquired)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_people_say_them() {
        assert_eq!(
            [1, 4 * KIB, 1536, 256 * MIB, 4096 * MIB].map(bytes),
            ["1 B", "4 KiB", "1536 B", "256 MiB", "4 GiB"]
        );
    }
}
