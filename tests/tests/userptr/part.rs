//! Parts of objects: what is taken for them, and what makes them stale.

use std::ops::Range;

use pinfold_core::{Coverage, State};
use pinfold_invalidate::page_size;
use pinfold_tests::PATIENCE;
use pinfold_tests::memory::{Backing, Region};

use super::{Rig, assert_taken_back, device_sees, filled, program_sees, regions, register, space, wait_until};

/// Pages of the whole, and of the part.
const PAGES: usize = 64;
const PART: Range<usize> = 24..32;

fn bytes(pages: Range<usize>) -> Range<usize> {
    pages.start * page_size()..pages.end * page_size()
}

pub fn a_part_is_populated_watched_and_taken_and_nothing_around_it<R: Rig>(rig: &R) {
    let region = Region::untouched(Backing::Anonymous, PAGES).unwrap();
    let whole = register(rig.manager(), region.range());
    let part = whole.part(bytes(PART)).unwrap();
    assert_eq!((part.range(), part.state().unwrap()), (region.part(PART), State::New));
    let lease = rig.manager().acquire_timeout(&[&part], PATIENCE).unwrap();
    assert_eq!(lease.view(0).range, region.part(PART));
    assert_eq!((region.present(), part.coverage()), (PART.len(), Some(Coverage::Watched)));
    for around in [0..PART.start, PART.end..PAGES] {
        assert!(!space().is_watched(region.part(around)));
    }
    let stats = rig.manager().stats();
    assert_eq!((stats.imports, stats.pinned_bytes), (1, bytes(PART).len() as u64));
    assert_eq!((whole.state().unwrap(), whole.coverage()), (State::New, None));
    assert_eq!(rig.start(lease).unwrap().finish(), [0; PART.end - PART.start]);
}

pub fn a_part_and_its_whole_see_the_same_memory_of_every_kind<R: Rig>(rig: &R) {
    for (backing, region) in regions(rig, PAGES) {
        let whole = register(rig.manager(), region.range());
        let part = whole.part(bytes(PART)).unwrap();
        for first in [&part, &whole] {
            assert!(rig.manager().acquire_timeout(&[first], PATIENCE).is_ok());
            assert_eq!(device_sees(rig, &part), program_sees(&region)[PART], "{backing:?}");
            assert_eq!(device_sees(rig, &whole), program_sees(&region), "{backing:?}");
            region.map_over(0..PAGES).unwrap();
        }
    }
}

pub fn only_what_happens_to_its_own_pages_makes_a_part_stale<R: Rig>(rig: &R) {
    let region = Region::new(Backing::Anonymous, PAGES).unwrap();
    let whole = register(rig.manager(), region.range());
    let part = whole.part(bytes(PART)).unwrap();
    for (page, hit) in
        [(0, false), (PART.start - 1, false), (PART.start, true), (PART.end - 1, true), (PART.end, false)]
    {
        let lease = rig.manager().acquire_timeout(&[&whole, &part], PATIENCE).unwrap();
        let generations = [0, 1].map(|index| lease.view(index).generation);
        drop(lease);
        region.map_over(page..page + 1).unwrap();
        assert_taken_back(&whole, generations[0]);
        if hit {
            assert_taken_back(&part, generations[1]);
        } else {
            assert_eq!((part.state().unwrap(), part.generation().unwrap()), (State::Valid, generations[1]));
        }
        region.fill(page..page + 1, 0x77).unwrap();
        rig.written(region.part(page..page + 1));
        assert_eq!(device_sees(rig, &part), program_sees(&region)[PART], "page {page}");
    }
}

pub fn work_on_a_part_does_not_hold_who_unmaps_the_rest<R: Rig>(rig: &R) {
    let region = Region::new(Backing::Anonymous, PAGES).unwrap();
    let whole = register(rig.manager(), region.range());
    let part = whole.part(bytes(PART)).unwrap();
    let work = rig.start(rig.manager().acquire_timeout(&[&part], PATIENCE).unwrap()).unwrap();
    let holds = rig.manager().stats().space.holds;
    region.unmap(0..PART.start).unwrap();
    region.unmap(PART.end..PAGES).unwrap();
    assert_eq!((rig.manager().stats().space.holds, work.pending.poll()), (holds, None), "nobody watches the rest");
    assert_eq!(work.finish(), PART.map(|page| filled(u8::try_from(page + 1).unwrap())).collect::<Vec<_>>());
    assert_eq!(part.state().unwrap(), State::Valid, "the part is still mapped");
    super::assert_faults(rig.manager(), &whole);
}

pub fn a_part_is_prefetched_like_an_object<R: Rig>(rig: &R) {
    let region = Region::untouched(Backing::Anonymous, PAGES).unwrap();
    let whole = register(rig.manager(), region.range());
    let part = whole.part(bytes(PART)).unwrap();
    rig.manager().prefetch(&[&part]).unwrap();
    wait_until("the pages", || part.state().unwrap() == State::Valid);
    assert_eq!(region.present(), PART.len());
    let lease = rig.manager().acquire(&[&part]).expect("nothing is left to wait for");
    let stats = rig.manager().stats();
    assert_eq!((stats.acquired_inline, stats.acquired_by_worker, stats.imports_made), (0, 1, 1));
    drop(lease);
}
