//! Mutators and submitters at once, and the question whether the device ever reads what is gone.
//!
//! **The oracle.** Every page carries a version in its first word. A mutator takes the page away, and when the call has returned it writes the
//! next version into what is there now, and then publishes that number as the page's floor. A reader notes the floor before it acquires, and what
//! the device reads must not be older: an old version seen after its floor has moved on is a page that was no longer the program's. A zero is a
//! page that was taken between the mutation and the write.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;

use pinfold_core::{Coverage, Device, Generation, Lease, State, Userptr};
use pinfold_invalidate::page_size;
use pinfold_tests::memory::{Backing, Region};
use pinfold_tests::{PATIENCE, rounds};

use super::{Rig, filled, register};

/// One page's history, as far as everybody may rely on it.
#[derive(Default)]
struct Page {
    /// The version whose mutation has begun.
    begun: AtomicU64,
    /// The version that is surely there.
    floor: AtomicU64,
}

const PAGES: usize = 4;

/// Takes one page after the other away until told to stop, each in another way.
/// Discarding is bracketed here: bare, its end is announced to nobody, and for the 10 ms until the pages are taken a second time a device may see
/// the old ones. `hazard_stale` has the bare ones.
fn mutate<R: Rig>(
    rig: &R,
    region: &Region,
    history: &[Page; PAGES],
    mutator: usize,
    ways: usize,
    stop: &AtomicBool,
    reads: &AtomicUsize,
) -> usize {
    let mut rounds = 0;
    while !stop.load(Ordering::Relaxed) {
        // As fast as reads get through between mutations: a storm lets none through on a quiet machine.
        if rounds > 4 * reads.load(Ordering::Relaxed) + 40 {
            thread::yield_now();
            continue;
        }
        // Each mutator has pages of its own, so that the versions of a page are of one writer.
        let page = mutator * PAGES / 2 + rounds / 3 % (PAGES / 2);
        let state = &history[page];
        let version = state.floor.load(Ordering::Relaxed) + 1;
        state.begun.store(version, Ordering::SeqCst);
        match rounds % ways {
            0 if rig.keeps_pages(Backing::Anonymous) => {
                let discard = || region.advise(page..page + 1, libc::MADV_DONTNEED);
                rig.manager().mutate(&[region.part(page..page + 1)], discard).unwrap().unwrap();
            }
            0 => region.advise(page..page + 1, libc::MADV_DONTNEED).unwrap(),
            1 => region.map_over(page..page + 1).unwrap(),
            _ => {
                region.unmap(page..page + 1).unwrap();
                region.map_over(page..page + 1).unwrap();
            }
        }
        region.write(page * page_size(), &version.to_ne_bytes()).unwrap();
        state.floor.store(version, Ordering::SeqCst);
        rounds += 1;
    }
    rounds
}

fn check(seen: &[u64], floors: [u64; PAGES], begun: [u64; PAGES]) {
    for (page, &seen) in seen.iter().enumerate() {
        let fresh = seen == 0 && begun[page] != floors[page];
        let floor = floors[page];
        assert!(
            fresh || seen >= floor,
            "the device read version {seen} of page {page}, which had been at {floor} before"
        );
    }
}

/// Acquires, submits and checks until enough reads have been checked.
fn read<R: Rig>(rig: &R, object: &Userptr<R::D>, history: &[Page; PAGES], reads: &AtomicUsize) {
    let load = |which: fn(&Page) -> &AtomicU64| history.each_ref().map(|page| which(page).load(Ordering::SeqCst));
    let wanted = rounds(READS);
    while reads.load(Ordering::Relaxed) < wanted {
        // What has returned before the acquire must not be seen again.
        let floors = load(|page| &page.floor);
        let Ok(lease) = rig.manager().acquire_timeout(&[object], PATIENCE) else { continue };
        match rig.start(lease) {
            Ok(work) => {
                check(&work.finish(), floors, load(|page| &page.begun));
                reads.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => assert!(error.is_stale(), "{error}"),
        }
    }
}

/// Reads to check.
const READS: usize = 2_000;

pub fn a_device_never_reads_what_a_mutation_that_has_returned_took_away<R: Rig>(rig: &R) {
    let region = Region::new(Backing::Anonymous, PAGES).unwrap();
    (0..PAGES).for_each(|page| region.write(page * page_size(), &1_u64.to_ne_bytes()).unwrap());
    let history: [Page; PAGES] = Default::default();
    for page in &history {
        page.begun.store(1, Ordering::SeqCst);
        page.floor.store(1, Ordering::SeqCst);
    }
    // Two objects over the same pages, so that one's acquisition meets the other's watch.
    let objects = [register(rig.manager(), region.range()), register(rig.manager(), region.range())];
    let (stop, reads) = (AtomicBool::new(false), AtomicUsize::new(0));
    // A hole under running work crashes a device that goes through the page table: the kernel tells of munmap when the mapping is gone.
    let ways = if rig.keeps_pages(Backing::Anonymous) { 3 } else { 2 };
    let (region, history, stop, reads) = (&region, &history, &stop, &reads);
    thread::scope(|scope| {
        let mutators =
            [0, 1].map(|mutator| scope.spawn(move || mutate(rig, region, history, mutator, ways, stop, reads)));
        let readers = objects.each_ref().map(|object| scope.spawn(move || read(rig, object, history, reads)));
        let answers = readers.map(thread::ScopedJoinHandle::join);
        stop.store(true, Ordering::Relaxed);
        let rounds = mutators.map(|mutator| mutator.join().unwrap());
        answers.into_iter().for_each(|answer| answer.unwrap());
        println!("{rounds:?} mutations, {:?}", rig.manager().stats());
        assert!(rounds.iter().all(|&rounds| rounds > 10), "the mutators had their turns: {rounds:?}");
    });
    let stats = rig.manager().stats();
    assert!(stats.invalidated > 0 && stats.space.late == 0, "{stats:?}");
}

/// Holds leases while the object becomes invalid and valid again, over and over: none of an earlier generation gets through.
pub fn an_old_lease_never_gets_through_however_often_the_object_becomes_valid_again<R: Rig>(rig: &R) {
    let region = Region::new(Backing::Anonymous, 1).unwrap();
    let object = register(rig.manager(), region.range());
    let mut old: Vec<Lease<R::D>> = Vec::new();
    for round in 1..=50_u8 {
        region.map_over(0..1).unwrap();
        region.fill(0..1, round).unwrap();
        let now = rig.manager().acquire_timeout(&[&object], PATIENCE).unwrap();
        assert_eq!(object.state().unwrap(), State::Valid);
        for lease in old.drain(..) {
            assert!(lease.changed_since(0, now.view(0).generation));
            assert!(
                rig.start(lease).err().is_some_and(|error| error.is_stale()),
                "a lease of an earlier generation got through"
            );
        }
        for _ in 0..3 {
            old.push(rig.manager().acquire_timeout(&[&object], PATIENCE).unwrap());
        }
        assert_eq!(rig.start(now).unwrap().finish(), [filled(round)]);
    }
}

/// Objects over each mapping that goes: one call takes the memory of all away, and each is looked at.
const OBJECTS: usize = 50;

/// A hole that comes and goes while the range is being watched: registering passes over it, and what fills it is not watched by that.
pub fn a_page_that_comes_and_goes_is_never_valid_without_being_watched<R: Rig>(rig: &R) {
    let backing = if rig.keeps_pages(Backing::Anonymous) { Backing::Anonymous } else { Backing::Memfd };
    let region = Region::new(backing, 1).unwrap();
    let objects = [(); 16].map(|()| register(rig.manager(), region.range()));
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let acquirers = [0, 8].map(|first| {
            let (objects, stop) = (&objects, &stop);
            scope.spawn(move || {
                for object in objects.iter().cycle().skip(first) {
                    if rig.manager().acquire(&[object]).is_ok() {
                        assert_eq!(object.coverage(), Some(Coverage::Watched));
                    }
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
            })
        });
        let mutator = scope.spawn(|| {
            // Where every acquisition of shared memory makes its alias anew, and so invalidates the other fifteen, a round takes long.
            let tries = if backing == Backing::Anonymous { R::TRIES / 5 } else { R::TRIES / 50 };
            for _ in 0..rounds(tries) {
                region.unmap(0..1).unwrap();
                for object in &objects {
                    assert_ne!(object.state().unwrap(), State::Valid, "valid after munmap");
                }
                region.map_over(0..1).unwrap();
                region.fill(0..1, 1).unwrap();
            }
        });
        let answer = mutator.join();
        stop.store(true, Ordering::Relaxed);
        acquirers.into_iter().for_each(|acquirer| acquirer.join().unwrap());
        answer.unwrap();
    });
}

/// The generation in which the object is valid.
fn valid_in<D: Device>(object: &Userptr<D>) -> Option<Generation> {
    let before = object.generation().unwrap();
    let valid = object.state().unwrap() == State::Valid;
    (valid && object.generation().unwrap() == before).then_some(before)
}

/// While other threads acquire and submit, whoever returns from `munmap` finds no object over it valid, and whoever returns from `madvise` finds
/// each valid in a later generation, if at all.
// rows: peers/dead-entry-after-the-call-returned
pub fn whoever_has_returned_from_a_mutation_never_finds_the_object_as_valid_as_before<R: Rig>(rig: &R) {
    // Memory that may be unmapped under running work.
    let backing = if rig.keeps_pages(Backing::Anonymous) { Backing::Anonymous } else { Backing::Memfd };
    let regions = [(); 2].map(|()| Region::new(backing, 1).unwrap());
    let objects = regions.each_ref().map(|region| [(); OBJECTS].map(|()| register(rig.manager(), region.range())));
    let (stop, submits, tries) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for submitter in 0..2 {
            let (objects, stop, submits) = (&objects, &stop, &submits);
            scope.spawn(move || {
                let mut turn = submitter * 5;
                while !stop.load(Ordering::Relaxed) {
                    turn += 1;
                    let object = &objects[turn % objects.len()][turn / 2 % OBJECTS];
                    if let Ok(lease) = rig.manager().acquire(&[object])
                        && let Ok(work) = rig.start(lease)
                    {
                        work.finish();
                        submits.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        let mutators = [0, 1].map(|mutator| {
            let (region, objects, tries) = (&regions[mutator], &objects[mutator], &tries);
            scope.spawn(move || {
                for round in 0.. {
                    // So that there is something to lose.
                    let _ = rig.manager().acquire_timeout(&objects.each_ref(), PATIENCE);
                    let before = objects.each_ref().map(valid_in);
                    // A hole that comes and goes is no reason to watch this kind of memory less than it can be.
                    let coverage = |object: &Userptr<R::D>| object.coverage().is_none_or(|it| it == Coverage::Watched);
                    assert!(objects.iter().all(coverage), "some object is not watched");
                    if round % 2 == 0 {
                        region.advise(0..1, libc::MADV_DONTNEED).unwrap();
                        for (object, before) in objects.iter().zip(before) {
                            let now = valid_in(object);
                            assert!(before.is_none() || now != before, "valid in {before:?} before and after madvise");
                        }
                    } else {
                        region.unmap(0..1).unwrap();
                        for object in objects {
                            assert_ne!(object.state().unwrap(), State::Valid, "valid after munmap");
                        }
                        region.map_over(0..1).unwrap();
                    }
                    region.fill(0..1, 1).unwrap();
                    let valid = before.iter().flatten().count();
                    if tries.fetch_add(valid, Ordering::Relaxed) + valid >= rounds(R::TRIES) {
                        break;
                    }
                }
            })
        });
        let answers = mutators.map(thread::ScopedJoinHandle::join);
        stop.store(true, Ordering::Relaxed);
        answers.into_iter().for_each(|answer| answer.unwrap());
    });
    println!("{tries:?} tries, {submits:?} submits, {:?}", rig.manager().stats());
    assert!(submits.into_inner() > 0);
    assert_eq!(rig.manager().stats().space.late, 0);
}
