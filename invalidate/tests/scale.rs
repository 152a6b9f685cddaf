//! A hundred thousand ranges, as many mappings as a process may have, and nobody refused: neither the watcher nor the program.

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pinfold_invalidate::{Coverage, Space, WatchSpan, mappings, page_size};
use support::{
    Memory, Stranger, Told, advise, all_told, is_watched, isolated, map_over, mapping_count, mapping_limit, pointer,
    protect, skip, unmap, wait_until,
};

const MANY: usize = 100_000;

/// `None`, having said so, where nothing can be watched.
fn space(test: &str) -> Option<Arc<Space>> {
    if let Err(error) = Stranger::new() {
        skip(test, format_args!("no userfaultfd here: {error}"));
        return None;
    }
    Some(Space::get(Duration::from_secs(10)).unwrap())
}

/// Many ranges over one mapping: watched without splitting it, told by one call, settled by nobody's later call, and gone without a trace.
fn many_in_one_mapping(test: &str, pages: usize, range: impl Fn(&Memory, usize) -> pinfold_invalidate::HostRange) {
    let Some(space) = space(test) else { return };
    let memory = Memory::new(pages);
    let before = mapping_count();
    let targets: Vec<_> = (0..MANY)
        .map(|n| {
            let (told, watched) = Told::over(&space, range(&memory, n), n as u64);
            assert_eq!(watched.coverage, Coverage::Watched);
            told
        })
        .collect();
    // The few before they were a crowd, and what the allocator took.
    assert!(mapping_count() < before + 150, "{} mappings, and {before} before", mapping_count());

    // One of them, and none of its neighbours.
    let one = range(&memory, MANY / 2);
    let over = |n: usize| range(&memory, n).overlaps(one);
    advise(one, libc::MADV_DONTNEED);
    all_told(&space);
    for n in [0, MANY / 2 - 40, MANY / 2 - 1, MANY / 2, MANY / 2 + 1, MANY / 2 + 40, MANY - 1] {
        assert_eq!(targets[n].times(), u64::from(over(n)), "{n}");
    }

    let told_before: u64 = targets.iter().map(|told| told.times()).sum();
    unmap(memory.0);
    all_told(&space);
    // Once for each shard that had pages of it: the call is told with all of its range.
    let told: u64 = targets.iter().map(|told| told.times()).sum::<u64>() - told_before;
    assert!(told.is_multiple_of(MANY as u64) && told > 0, "{told}");
    assert!(!space.is_watched(memory.0));
    wait_until("the settling of all", || targets.iter().all(|told| told.settled.load(Ordering::SeqCst) > 0));
    (0..MANY).for_each(|n| space.remove(range(&memory, n), n as u64));
    std::mem::forget(memory); // it is unmapped already, and its place may be another's
}

#[test]
fn a_hundred_thousand_pages_of_one_mapping_are_watched_and_told_by_one_call() {
    const TEST: &str = "a_hundred_thousand_pages_of_one_mapping_are_watched_and_told_by_one_call";
    let _ = isolated(TEST, || many_in_one_mapping(TEST, 2 * MANY, |memory, n| memory.part(2 * n, 1)));
}

#[test]
fn a_hundred_thousand_overlapping_ranges_are_watched_and_told_by_one_call() {
    const TEST: &str = "a_hundred_thousand_overlapping_ranges_are_watched_and_told_by_one_call";
    let _ = isolated(TEST, || many_in_one_mapping(TEST, MANY + 16, |memory, n| memory.part(n, 1 + n * 7 % 16)));
}

#[test]
fn a_whole_mapping_is_nobodys_when_the_last_range_in_it_is_gone() {
    const TEST: &str = "a_whole_mapping_is_nobodys_when_the_last_range_in_it_is_gone";
    isolated(TEST, || {
        let Some(space) = space(TEST) else { return };
        let memory = Memory::new(1000);
        // So that it has no neighbour to become one with.
        protect(memory.part(0, 1), libc::PROT_NONE).unwrap();
        protect(memory.part(999, 1), libc::PROT_NONE).unwrap();
        let all = memory.part(1, 998);
        let parts: Vec<_> = (0..100).map(|n| memory.part(5 + 9 * n, 3)).collect();
        let targets: Vec<_> = (0..).zip(&parts).map(|(id, &part)| Told::over(&space, part, id).0).collect();
        assert!(space.is_watched(memory.part(990, 5)), "a page of nobody's, as they crowd");
        assert_eq!(mappings(all).unwrap().len(), 1, "what few had split is one again");

        // A bracket cuts out its range and nothing else, and the next watch closes the gap.
        space.mutate(&[parts[50]], || map_over(parts[50])).unwrap();
        assert!(!is_watched(parts[50]) && is_watched(parts[49]) && is_watched(parts[51]));
        targets[50].watch(&space, parts[50]);
        assert_eq!(mappings(all).unwrap().len(), 1);
        advise(parts[50], libc::MADV_DONTNEED);
        all_told(&space);
        assert_eq!((targets[50].times(), targets[49].times()), (2, 0));

        // What unmapping leaves behind with nobody in it is let go of.
        (0..10).for_each(|id| space.remove(parts[id as usize], id));
        assert!(is_watched(parts[0]), "others are in the same mapping");
        unmap(parts[9]);
        let left = memory.part(1, 80);
        wait_until("the end of the watch over what is left", || !is_watched(left));
        assert!(is_watched(parts[10]));
        for (id, &part) in (10..).zip(&parts[10..]) {
            assert!(is_watched(parts[99]), "{id}");
            space.remove(part, id);
        }
        assert!(!is_watched(memory.part(90, 900)) && !space.is_watched(memory.0));
    });
}

#[test]
fn a_whole_mapping_is_watched_for_one_range_on_request_and_let_go_of_with_the_space() {
    const TEST: &str = "a_whole_mapping_is_watched_for_one_range_on_request_and_let_go_of_with_the_space";
    isolated(TEST, || {
        let Some(space) = space(TEST) else { return };
        let memory = Memory::with(64, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        let (told, part) = (Arc::new(Told::default()), memory.part(10, 2));
        space.insert(part, 1, Arc::<Told>::clone(&told));
        let watched = space.watch_spanning(part, &mappings(part).unwrap(), WatchSpan::Mapping).unwrap();
        told.shards.store(watched.shards.0, Ordering::SeqCst);
        assert_eq!(watched.coverage, Coverage::Watched);
        assert_eq!(mappings(memory.0).unwrap().len(), 1, "not split");
        let events = space.stats().events;
        advise(memory.part(40, 1), libc::MADV_DONTNEED);
        all_told(&space);
        assert_eq!((space.stats().events, told.times()), (events + 1, 0), "noticed, and none of the range's business");

        // It grows in place, if there is room, and moves: what it has become is watched, and the ledger need not know all of it.
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let place = Memory::new(128);
        // SAFETY: moves memory of the test to a place of its own.
        let moved =
            unsafe { libc::mremap(pointer(memory.0), memory.0.len(), 64 * page_size(), flags, pointer(place.0)) };
        assert_ne!(moved, libc::MAP_FAILED);
        all_told(&space);
        assert_eq!(told.times(), 2, "it moved away, and its place is empty");
        wait_until("the end of the watch, as nobody is over it", || !is_watched(place.part(0, 64)));
        std::mem::forget(memory);

        let memory = Memory::new(64);
        space.insert(memory.part(3, 1), 2, Arc::new(Told::default()));
        let known = mappings(memory.part(3, 1)).unwrap();
        space.watch_spanning(memory.part(3, 1), &known, WatchSpan::Mapping).unwrap();
        assert!(is_watched(memory.part(60, 1)));
        drop(space);
        assert!(!is_watched(memory.0));
    });
}

/// Makes as many mappings of the memory's pages as `count`, by turns of protection. Returns how many it has made.
fn split(memory: &Memory, count: usize) -> usize {
    let wanted = count.min(memory.0.pages()) / 2;
    (0..wanted).take_while(|n| protect(memory.part(2 * n, 1), libc::PROT_READ).is_ok()).count() * 2
}

#[test]
fn every_mapping_of_a_process_that_is_full_of_them_can_be_watched() {
    const TEST: &str = "every_mapping_of_a_process_that_is_full_of_them_can_be_watched";
    isolated(TEST, || {
        let Some(space) = space(TEST) else { return };
        let limit = mapping_limit();
        if limit > 200_000 {
            return skip(TEST, format_args!("vm.max_map_count is {limit}, which takes too long to fill"));
        }
        let memory = Memory::new(limit);
        let full = split(&memory, limit - mapping_count() - 50);
        let count = mapping_count();
        assert!(count + 200 > limit, "{count} of {limit}");
        for page in (0..full).step_by(2) {
            let watched = space.watch(memory.part(page, 1)).unwrap();
            assert_eq!(watched.coverage, Coverage::Watched);
        }
        // The last few are not for us to split off: all of the mapping is watched instead.
        let (told, watched) = Told::over(&space, memory.part(full + 10, 1), 7);
        assert_eq!(watched.coverage, Coverage::Watched);
        assert!(mapping_count() < count + 20, "{} and {count} before", mapping_count());
        drop(memory);
        all_told(&space);
        assert!(told.times() > 0);
    });
}

#[test]
fn scattered_ranges_take_no_more_than_their_part_of_the_mappings() {
    const TEST: &str = "scattered_ranges_take_no_more_than_their_part_of_the_mappings";
    isolated(TEST, || {
        let Some(space) = space(TEST) else { return };
        let limit = mapping_limit();
        if limit > 200_000 {
            return skip(TEST, format_args!("vm.max_map_count is {limit}: more address space than there is"));
        }
        // Too far apart to be a crowd, each in a mapping of its own: one that is watched whole is not watched for the next.
        let (part, block) = (limit / 8, (128 << 20) / page_size());
        let before = mapping_count();
        let memory: Vec<_> = (0..part)
            .map(|n| {
                // By turns of protection, as neighbours that are alike are one mapping.
                let protection = libc::PROT_READ | if n % 2 == 0 { libc::PROT_WRITE } else { 0 };
                let memory = Memory::with(block, protection, libc::MAP_PRIVATE);
                let (_, watched) = Told::over(&space, memory.part(block / 2, 1), n as u64);
                assert_eq!(watched.coverage, Coverage::Watched, "{n}");
                memory
            })
            .collect();
        let now = mapping_count();
        assert!(now - before > part, "the first are watched exactly: {now}, and {before} before");
        assert!(now - before <= 2 * part + 100, "{part} mappings, each watched in part, became {}", now - before);
        drop(memory);
    });
}

#[test]
fn nothing_is_split_while_the_program_has_nearly_all_the_mappings_it_may_have() {
    const TEST: &str = "nothing_is_split_while_the_program_has_nearly_all_the_mappings_it_may_have";
    isolated(TEST, || {
        let Some(space) = space(TEST) else { return };
        let limit = mapping_limit();
        if limit > 200_000 {
            return skip(TEST, format_args!("vm.max_map_count is {limit}, which takes too long to fill"));
        }
        let filler = Memory::new(limit);
        split(&filler, limit - mapping_count() - limit / 16);
        let before = mapping_count();
        assert!(before > limit - limit / 8, "{before} of {limit}");
        let block = (128 << 20) / page_size();
        let memory = Memory::new(40 * block);
        let watched: Vec<_> =
            (0..40).map(|n| Told::over(&space, memory.part(n * block + block / 2, 1), n as u64).0).collect();
        assert!(mapping_count() <= before + 5, "{} and {before} before", mapping_count());
        drop(memory);
        all_told(&space);
        assert!(watched.iter().all(|told| told.times() > 0));
    });
}

#[test]
fn a_place_that_was_left_without_an_event_is_watched_anew() {
    const TEST: &str = "a_place_that_was_left_without_an_event_is_watched_anew";
    isolated(TEST, || {
        let Some(space) = space(TEST) else { return };
        // Of one page the kernel is asked otherwise than of several.
        for pages in [1, 4] {
            if let Err(error) = leave_without_an_event(&space, pages) {
                return skip(TEST, format_args!("no System V memory here: {error}"));
            }
        }
    });
}

fn leave_without_an_event(space: &Space, pages: usize) -> std::io::Result<()> {
    // SAFETY: makes a segment, and marks it to end with its last attachment.
    let segment = unsafe { libc::shmget(libc::IPC_PRIVATE, pages * page_size(), libc::IPC_CREAT | 0o600) };
    if segment < 0 {
        return Err(std::io::Error::last_os_error());
    }
    let place = Memory::new(pages);
    // SAFETY: attaches in the place of memory of the test's own.
    let at = unsafe { libc::shmat(segment, pointer(place.0), libc::SHM_REMAP) };
    // SAFETY: numbers only.
    unsafe { libc::shmctl(segment, libc::IPC_RMID, std::ptr::null_mut()) };
    assert_eq!(at, pointer(place.0));
    let (told, watched) = Told::over(space, place.0, 1);
    assert_eq!(watched.coverage, Coverage::Watched);
    // SAFETY: what was attached above; no reference points into it.
    assert_eq!(unsafe { libc::shmdt(at) }, 0);
    all_told(space);
    let events = space.stats().events;
    map_over(place.0);
    assert_eq!((told.times(), space.stats().events), (0, events), "shmdt sends no event");
    told.watch(space, place.0);
    unmap(place.0);
    all_told(space);
    assert_eq!(told.times(), 1);
    std::mem::forget(place);
    Ok(())
}
