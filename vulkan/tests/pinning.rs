//! A device that pins: what it has imported stays the pages that were there, whatever the program maps over them. So whoever is put on an import
//! of somebody else's must be sure that those pages are still the program's.

#[path = "fixture/mod.rs"]
mod fixture;
#[path = "fixture/memory.rs"]
mod memory;
#[path = "fixture/script.rs"]
mod script;

use std::sync::atomic::Ordering::SeqCst;

use fixture::GENEROUS;
use memory::{Memory, memfd};
use pinfold_invalidate::{HostRange, page_size};
use pinfold_vulkan::{Access, Config, Coverage, Lease, Manager, Path, Policy, Userptr};
use script::Scripted;

/// A manager of a device that pins.
fn pinning(scripted: &Scripted) -> Manager {
    scripted.script().pins.store(1, SeqCst);
    // SAFETY: the fixture's handles belong together, and tests drop the manager and its leases first.
    unsafe { Manager::new(scripted.context(), Config::default()) }.expect("a manager")
}

fn register(manager: &Manager, memory: &Memory, first: usize, pages: usize) -> Userptr {
    let range = HostRange::new(memory.range().start() + first * page_size(), pages * page_size()).unwrap();
    // SAFETY: tests change memory that no work uses; no references to it exist.
    let object = unsafe { manager.register(range, Access::Read) }.unwrap();
    // The script's copies take longer than a device's pins, and mirrors would be found cheaper.
    object.set_policy(Policy::Import).unwrap();
    object
}

fn acquire_all(manager: &Manager, objects: &[Userptr]) -> Lease {
    manager.acquire_timeout(&objects.iter().collect::<Vec<_>>(), GENEROUS).unwrap()
}

#[test]
fn neighbours_share_what_a_device_has_pinned() {
    let Some(scripted) = Scripted::new() else { return };
    let asked = std::env::var("PINFOLD_SOAK_OBJECTS").ok();
    let count = asked.map_or(1000, |count| count.parse().expect("PINFOLD_SOAK_OBJECTS is a number"));
    let manager = pinning(&scripted);
    for memory in [Memory::anonymous(count), Memory::of_file(&memfd(count), count, true)] {
        (0..count).for_each(|page| memory.write(page * page_size(), (page % 250) as u8));
        let objects: Vec<_> = (0..count).map(|page| register(&manager, &memory, page, 1)).collect();
        let lease = acquire_all(&manager, &objects);
        let windows = memory.range().len().div_ceil(2 << 20) + 1;
        if objects[0].coverage() == Some(Coverage::Watched) {
            let allocations = manager.device().allocations() as usize;
            assert!(allocations <= 2 * windows, "{allocations} allocations in {windows} windows");
        } else {
            println!("SKIPPED PART OF neighbours_share_what_a_device_has_pinned: {:?}", objects[0].coverage());
        }
        for page in [0, 1, 511, 512, count - 1] {
            assert_eq!(scripted.fixture.read(&lease.view(page), 0, 4)[0], (page % 250) as u8);
            // It is a device that pins: it doesn't see what comes later.
            memory.write(page * page_size(), 251);
            assert_eq!(scripted.fixture.read(&lease.view(page), 0, 4)[0], (page % 250) as u8);
        }
    }
}

#[test]
fn nobody_is_put_on_pages_that_are_not_the_programs_any_more() {
    let Some(scripted) = Scripted::new() else { return };
    let manager = pinning(&scripted);
    let pages = 24;
    let mut seed = 9_u64;
    let mut below = |end: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % end
    };
    for shared in [false, true] {
        let memory = if shared { Memory::of_file(&memfd(pages), pages, true) } else { Memory::anonymous(pages) };
        // New bytes come only with new pages.
        let renew = |first: usize, count: usize, round: usize| {
            (first..first + count).for_each(|page| memory.write(page * page_size() + page, (round + page) as u8));
        };
        renew(0, pages, 0);
        let mut objects: Vec<_> = (0..14)
            .map(|_| {
                let first = below(pages);
                register(&manager, &memory, first, 1 + below(pages - first))
            })
            .collect();
        for round in 1..80 {
            let first = below(pages);
            let count = 1 + below(pages - first);
            match below(4) {
                0 if !shared => {
                    (first..first + count).for_each(|page| memory.discard(page));
                    renew(first, count, round);
                }
                1 if !shared => {
                    memory.replace(first, count);
                    renew(first, count, round);
                }
                0 | 1 => {
                    memory.replace_tail(&memfd(pages), pages - first);
                    renew(first, pages - first, round);
                }
                // Somebody who wasn't there when the blocks were made.
                2 => objects[below(14)] = register(&manager, &memory, first, count),
                _ => manager.invalidate(objects[below(14)].range()).unwrap(),
            }
            let lease = acquire_all(&manager, &objects);
            let bytes = memory.bytes();
            for (at, object) in objects.iter().enumerate() {
                let view = lease.view(at);
                assert!(!matches!(view.path, Path::Mirror(_)), "{:?}", view.path);
                let first = object.range().start() - memory.range().start();
                let seen = scripted.fixture.read(&view, 0, view.size);
                assert!(
                    seen == bytes[first..first + seen.len()],
                    "shared {shared}, round {round}, object {at} {object:?}"
                );
            }
        }
    }
}
