//! How many, how big, until which error. Each search ends at a bound that keeps a machine usable, and says which of the two it met.

use std::sync::Arc;

use anyhow::Result;
use pinfold_invalidate::{Change, Coverage, DEFAULT_DEADLINE, Shards, Space, Target, page_size};
use pinfold_vulkan::{Access, Config};

use crate::groups::import::{PATIENCE, bytes, register, settle};
use crate::groups::index::thousands;
use crate::machine::{memory_available, sysctl};
use crate::memory::Memory;
use crate::session::Session;
use crate::vulkan::Card;

pub(crate) fn run(session: &mut Session, card: Option<&Card>) -> Result<()> {
    for name in ["vm/max_map_count", "vm/unprivileged_userfaultfd"] {
        session.fact(name.replace('/', "."), sysctl(name).map_or("not known".into(), |value| value.to_string()));
    }
    session.fact("RLIMIT_MEMLOCK", memlock());
    watched(session)?;
    let Some(card) = card else {
        session.absent("imports", "there is no Vulkan device");
        return Ok(());
    };
    let limits = &card.gpu.properties.limits;
    session.fact("maxMemoryAllocationCount", limits.max_memory_allocation_count);
    if card.imports().is_err() {
        session.absent("imports", "the device has no VK_EXT_external_memory_host");
        return Ok(());
    }
    objects(session, card)?;
    by_hand(session, card)?;
    largest(session, card)
}

pub(crate) fn memlock() -> String {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a live structure that the call fills.
    let answer = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) };
    match (answer, limit.rlim_cur) {
        (0, libc::RLIM_INFINITY) => "unlimited".into(),
        (0, limit) => bytes(usize::try_from(limit).unwrap_or(usize::MAX)),
        _ => "not known".into(),
    }
}

struct Told(Shards);

impl Target for Told {
    fn invalidated(&self, _: &Change) {}

    fn settled(self: Arc<Self>) {}

    fn shards(&self) -> Shards {
        self.0
    }
}

/// Pages that are no neighbours of each other: each wants a mapping of its own from the kernel, of which a process has 65,530.
fn watched(session: &mut Session) -> Result<()> {
    let most = session.mode.pick(2_000, 40_000, 100_000);
    let space = Space::get(DEFAULT_DEADLINE)?;
    let memory = Memory::untouched(2 * most * page_size())?;
    let (mut fine, mut end) = (0, None);
    for index in 0..most {
        let range = memory.part(2 * index, page_size());
        match space.watch(range) {
            Ok(watched) => {
                space.insert(range, index as u64, Arc::new(Told(watched.shards)));
                if watched.coverage != Coverage::Watched {
                    end = Some(format!("{:?}", watched.coverage));
                    break;
                }
            }
            Err(error) => {
                end = Some(error.to_string());
                break;
            }
        }
        fine = index + 1;
    }
    let end = end.map_or("and no limit met: the search ends there".into(), |why| format!("then: {why}"));
    session.fact("pages watched, every second one of a mapping", format!("{}, {end}", thousands(fine)));
    // All at once, as a program's own munmap would; then each object is taken out.
    let ranges: Vec<_> = (0..fine).map(|index| memory.part(2 * index, page_size())).collect();
    drop(memory);
    ranges.iter().enumerate().for_each(|(index, range)| space.remove(*range, index as u64));
    Ok(())
}

/// Objects of a page, all acquired and alive at a time.
fn objects(session: &mut Session, card: &Card) -> Result<()> {
    let wanted: usize = session.mode.pick(2_000, 20_000, 50_000);
    let most = wanted.min(usize::try_from(memory_available() / 16).unwrap_or(usize::MAX) / page_size());
    let manager = card.manager(Config::default())?;
    let memory = Memory::populated(most * page_size())?;
    let (mut alive, mut end) = (Vec::with_capacity(most), None);
    for index in 0..most {
        // SAFETY: as in `import::register`.
        let object = unsafe { manager.register(memory.part(index, page_size()), Access::Read) }?;
        match manager.acquire_timeout(&[&object], PATIENCE) {
            Ok(lease) => alive.push((lease, object)),
            Err(error) => {
                end = Some(error.to_string());
                break;
            }
        }
    }
    let end = end.map_or("and no limit met: the search ends there".into(), |why| format!("then: {why}"));
    session.fact("objects of one page, imported and alive", format!("{}, {end}", thousands(alive.len())));
    let pinned = manager.stats().imports;
    session.fact("imports of those", thousands(usize::try_from(pinned)?));
    drop(alive);
    settle(&manager)
}

/// The same without a library.
fn by_hand(session: &mut Session, card: &Card) -> Result<()> {
    let most =
        session.mode.pick(2_000, 20_000, 50_000).min(card.gpu.properties.limits.max_memory_allocation_count as usize);
    let memory = Memory::populated(page_size())?;
    let (mut alive, mut end) = (Vec::with_capacity(most), None);
    for _ in 0..most {
        // SAFETY: the mapping outlives the imports, which are dropped before it; a page is as large as the alignment, or the driver refuses.
        match unsafe { card.import_by_hand(memory.pointer(), memory.len()) } {
            Ok(import) => alive.push(import),
            Err(error) => {
                end = Some(format!("{error:#}"));
                break;
            }
        }
    }
    let end = end.map_or("and no limit met: the search ends there".into(), |why| format!("then: {why}"));
    session.fact("imports of the same page by hand, alive", format!("{}, {end}", thousands(alive.len())));
    drop(alive);
    Ok(())
}

/// The largest object, doubling. A device that pins takes the pages into account, so this stops at what the machine and the card can spare.
fn largest(session: &mut Session, card: &Card) -> Result<()> {
    let manager = card.manager(Config::default())?;
    let most = card.most_bytes().min(session.mode.pick(256 << 20, 2 << 30, 8 << 30));
    let (mut size, mut fine, mut end) = (1 << 20, 0, None);
    while size <= most {
        let memory = Memory::untouched(size)?;
        let object = register(&manager, &memory, Access::Read)?;
        match manager.acquire_timeout(&[&object], PATIENCE) {
            Ok(lease) => {
                let path = format!("{:?}", lease.view(0).path);
                let chunks = lease.view(0).chunks().len();
                fine = size;
                if !path.contains("Import") {
                    end = Some(format!("by {path}"));
                } else if chunks > 1 {
                    session.fact(format!("chunks of {}", bytes(size)), chunks);
                }
            }
            Err(error) => end = Some(format!("then: {error}")),
        }
        drop(object);
        settle(&manager)?;
        if end.is_some() {
            break;
        }
        size *= 2;
    }
    let end =
        end.unwrap_or_else(|| format!("and no limit met: the search ends at {}", bytes(most / (1 << 20) * (1 << 20))));
    session.fact("largest object", format!("{}, {end}", bytes(fine)));
    Ok(())
}
