//! Many objects over the same memory: few allocations of the device, and nobody sees what a neighbour's memory was before.

#[path = "fixture/mod.rs"]
mod fixture;
#[path = "fixture/memory.rs"]
mod memory;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use fixture::{Fixture, GENEROUS};
use memory::{Memory, memfd, pattern};
use pinfold_invalidate::{HostRange, page_size};
use pinfold_vulkan::{Access, Config, Coverage, Manager, Path, Userptr};

fn manager(fixture: &Fixture) -> Manager {
    // SAFETY: the fixture's handles belong together, and tests drop the manager and its leases first.
    unsafe { Manager::new(fixture.context(), Config::default()) }.expect("a manager")
}

fn register(manager: &Manager, memory: &Memory, first: usize, pages: usize) -> Userptr {
    let range = HostRange::new(memory.range().start() + first * page_size(), pages * page_size()).unwrap();
    // SAFETY: tests change memory that no work uses; no references to it exist.
    unsafe { manager.register(range, Access::Read) }.unwrap()
}

fn acquire_all(manager: &Manager, objects: &[Userptr]) -> pinfold_vulkan::Lease {
    manager.acquire_timeout(&objects.iter().collect::<Vec<_>>(), GENEROUS).unwrap()
}

/// One test at a time: what the process has seen is counted for all of them together.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn kinds(pages: usize) -> [(Memory, Path); 2] {
    [(Memory::anonymous(pages), Path::Import), (Memory::of_file(&memfd(pages), pages, true), Path::AliasImport)]
}

/// Whether this system watches memory, without which nothing can be shared.
fn is_watched(object: &Userptr) -> bool {
    let watched = object.coverage() == Some(Coverage::Watched);
    if !watched {
        println!("skipped: sharing, as this system can't watch the memory ({:?})", object.coverage());
    }
    watched
}

/// `PINFOLD_SOAK_OBJECTS` says how many; 50,000 take a minute.
#[test]
fn thousands_of_neighbours_need_a_few_allocations() {
    let _alone = alone();
    let Some(fixture) = Fixture::new() else { return };
    let asked = std::env::var("PINFOLD_SOAK_OBJECTS").ok();
    let count = asked.map_or(2000, |count| count.parse().expect("PINFOLD_SOAK_OBJECTS is a number"));
    for (memory, path) in kinds(count) {
        let manager = manager(&fixture);
        let objects: Vec<_> = (0..count).map(|page| register(&manager, &memory, page, 1)).collect();
        let lease = acquire_all(&manager, &objects);
        for page in [0, 1, 511, 512, count / 2, count - 1] {
            memory.write(page * page_size() + 3, pattern(page));
            let view = lease.view(page);
            assert_eq!((view.path, view.size), (path, page_size() as u64));
            assert_eq!(fixture.read(&view, 0, 8)[3], pattern(page));
        }
        if is_watched(&objects[0]) {
            let windows = memory.range().len().div_ceil(2 << 20) + 1;
            let allocations = manager.device().allocations() as usize;
            assert!(allocations <= 2 * windows, "{allocations} allocations in {windows} windows");
        }
        drop((lease, objects));
        let deadline = Instant::now() + GENEROUS;
        while manager.device().allocations() > 0 {
            assert!(Instant::now() < deadline, "memory is given back after its last use");
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_part_has_memory_of_its_own_size_unless_its_whole_has_been_imported() {
    let _alone = alone();
    let Some(fixture) = Fixture::new() else { return };
    for (memory, path) in kinds(64) {
        memory.fill();
        let manager = manager(&fixture);
        let whole = register(&manager, &memory, 0, 64);
        let parts =
            [8..16, 40..41].map(|pages| whole.part(pages.start * page_size()..pages.end * page_size()).unwrap());
        let check = |lease: &pinfold_vulkan::Lease, index: usize, part: &Userptr| {
            let (view, first) = (lease.view(index), part.range().start() - memory.range().start());
            assert_eq!((view.path, view.size), (path, part.range().len() as u64));
            assert!(fixture.read(&view, 0, view.size) == memory.bytes()[first..][..part.range().len()]);
        };
        let alone = acquire_all(&manager, &parts[..1]);
        check(&alone, 0, &parts[0]);
        if !is_watched(&parts[0]) {
            continue;
        }
        assert_eq!((manager.device().allocations(), manager.stats().pinned_bytes), (1, 8 * page_size() as u64));
        // The whole takes all of it; what was registered before that finds its pages there.
        let lease = acquire_all(&manager, &[whole]);
        let other = acquire_all(&manager, &parts[1..]);
        check(&other, 0, &parts[1]);
        assert_eq!(manager.device().allocations(), 2);
        drop((lease, other));
    }
}

#[test]
fn overlapping_objects_share_and_a_change_of_one_leaves_the_others_alone() {
    let _alone = alone();
    let Some(fixture) = Fixture::new() else { return };
    for (memory, _) in kinds(64) {
        memory.fill();
        let manager = manager(&fixture);
        let objects: Vec<_> = [(0, 64), (0, 16), (16, 16), (16, 16), (8, 4), (40, 24)]
            .into_iter()
            .map(|(first, pages)| register(&manager, &memory, first, pages))
            .collect();
        let lease = acquire_all(&manager, &objects);
        if !is_watched(&objects[0]) {
            continue;
        }
        // One, unless a mutation of another test came between and sent one of them to a worker.
        assert!(manager.device().allocations() <= 3, "{} allocations", manager.device().allocations());
        let before: Vec<_> = (0..objects.len()).map(|at| lease.view(at).generation).collect();
        drop(lease);
        // The last 24 pages: objects 0 and 5 are over them.
        manager.invalidate(objects[5].range()).unwrap();
        let lease = acquire_all(&manager, &objects);
        for (at, &before) in before.iter().enumerate() {
            assert_eq!(lease.changed_since(at, before), [0, 5].contains(&at), "object {at}");
            let first = objects[at].range().start() - memory.range().start();
            let expected = &memory.bytes()[first..][..objects[at].range().len()];
            assert!(fixture.read(&lease.view(at), 0, expected.len() as u64) == expected);
        }
        // The old block for those who were not hit, and a new one for the two.
        assert!(manager.device().allocations() >= 2, "nobody is put on pages that were invalidated");
        let deadline = Instant::now() + GENEROUS;
        while manager.device().allocations() > 5 {
            assert!(Instant::now() < deadline, "{} allocations", manager.device().allocations());
            std::thread::yield_now();
        }
        drop(lease);
    }
}

#[test]
fn objects_over_the_same_shared_pages_are_taken_again_without_disturbing_each_other() {
    let _alone = alone();
    let Some(fixture) = Fixture::new() else { return };
    let manager = manager(&fixture);
    let memory = Memory::of_file(&memfd(8), 8, true);
    let objects: Vec<_> = (0..32).map(|at| register(&manager, &memory, at % 8, 1)).collect();
    drop(acquire_all(&manager, &objects));
    let brackets = manager.stats().space.brackets;
    for object in &objects[..20] {
        manager.invalidate(object.range()).unwrap();
        let lease = manager.acquire_timeout(&[object], GENEROUS).unwrap();
        assert_eq!(lease.view(0).path, Path::AliasImport);
    }
    // Each object was hit by what was said of its own page, and by nothing else; no watch had to be ended for an alias.
    let stats = manager.stats();
    assert_eq!((stats.space.brackets, stats.invalidated), (brackets, 20 * 4));
}

#[test]
fn whatever_is_mapped_there_now_is_what_every_object_shows() {
    let _alone = alone();
    let Some(fixture) = Fixture::new() else { return };
    let manager = manager(&fixture);
    let pages = 24;
    let memory = Memory::of_file(&memfd(pages), pages, true);
    let mut seed = 4_u64;
    let mut below = |end: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % end
    };
    let objects: Vec<_> = (0..14)
        .map(|_| {
            let first = below(pages);
            register(&manager, &memory, first, 1 + below(pages - first))
        })
        .collect();
    for round in 0..60 {
        match below(4) {
            0 => memory.replace_tail(&memfd(pages), 1 + below(pages)),
            1 => manager.mutate(&[memory.range()], || memory.replace_tail(&memfd(pages), 1 + below(pages))).unwrap(),
            2 => manager.invalidate(objects[below(14)].range()).unwrap(),
            _ => {}
        }
        (0..pages).for_each(|page| memory.write(page * page_size(), (round + page) as u8));
        let lease = acquire_all(&manager, &objects);
        let bytes = memory.bytes();
        for (at, object) in objects.iter().enumerate() {
            let first = object.range().start() - memory.range().start();
            let seen = fixture.read(&lease.view(at), 0, object.range().len() as u64);
            let wrong =
                (0..object.range().pages()).find(|page| seen[page * page_size()] != bytes[first + page * page_size()]);
            assert_eq!(wrong, None, "round {round}, object {at} {object:?}: {:?}", lease.view(at).path);
        }
    }
}

#[test]
fn one_of_two_devices_over_the_same_memory_goes_and_the_other_goes_on() {
    let _alone = alone();
    let (Some(one), Some(two)) = (Fixture::new(), Fixture::new()) else { return };
    for (memory, path) in kinds(32) {
        memory.fill();
        let staying = manager(&two);
        let stays = [register(&staying, &memory, 0, 32), register(&staying, &memory, 4, 4)];
        {
            let going = manager(&one);
            let goes = [register(&going, &memory, 0, 32), register(&going, &memory, 2, 8)];
            let (first, second) = (acquire_all(&going, &goes), acquire_all(&staying, &stays));
            for (fixture, lease) in [(&one, &first), (&two, &second)] {
                assert_eq!(lease.view(0).path, path);
                assert!(fixture.read(&lease.view(0), 0, lease.view(0).size) == memory.bytes());
            }
        }
        memory.write(5 * page_size(), 99);
        let lease = acquire_all(&staying, &stays);
        assert!(two.read(&lease.view(0), 0, lease.view(0).size) == memory.bytes());
        assert_eq!(two.read(&lease.view(1), page_size() as u64, 4)[0], 99);
        drop((lease, stays));
    }
}

#[test]
fn nobody_is_put_on_pages_that_were_imported_before_they_were_discarded_or_before_it_was_registered() {
    let Some(fixture) = Fixture::new() else { return };
    let manager = manager(&fixture);
    // All in one window: a block takes in no neighbour beyond its end.
    let window = 2 << 20;
    let memory = Memory::anonymous(4 + window / page_size());
    memory.fill();
    let first = (memory.range().start().next_multiple_of(window) - memory.range().start()) / page_size();
    let objects: Vec<_> = (first..first + 4).map(|page| register(&manager, &memory, page, 1)).collect();
    drop(acquire_all(&manager, &objects));
    if !is_watched(&objects[0]) {
        return;
    }
    // How many allocations there are when what was replaced has been given back.
    let allocations = |imports| {
        let deadline = Instant::now() + GENEROUS;
        while manager.stats().imports != imports {
            assert!(Instant::now() < deadline, "{} imports, and not {imports}", manager.stats().imports);
            std::thread::yield_now();
        }
        manager.device().allocations()
    };
    let before = allocations(4);
    memory.discard(first + 2);
    // A neighbour's new block takes in the page, whichever it is at that moment.
    manager.invalidate(objects[0].range()).unwrap();
    let replaced = acquire_all(&manager, &objects[..1]);
    let lease = acquire_all(&manager, &objects);
    assert!(allocations(4) > before + 1, "object 2 is on a block that was made after its page had gone");
    drop(replaced);
    let (late, now) = (register(&manager, &memory, first, 1), allocations(4));
    let own = manager.acquire_timeout(&[&late], GENEROUS).unwrap();
    assert_eq!(allocations(5), now + 1);
    drop((own, lease));
}
