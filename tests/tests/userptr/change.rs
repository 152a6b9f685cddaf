//! What the program can do to memory that is registered, and what the object and the device make of it.

use std::io;
use std::ops::Range;
use std::ptr::without_provenance_mut;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use pinfold_core::{State, Userptr};
use pinfold_invalidate::{HostRange, Shards};
use pinfold_tests::PATIENCE;
use pinfold_tests::memory::{Backing, Move, Region};
use pinfold_tests::skip_part;

use super::{
    Rig, assert_faults, assert_taken_back, device_sees, filled, program_sees, regions, register, wait_for_mutator,
};

/// Since Linux 6.13; not in the libc crate.
const MADV_GUARD_INSTALL: i32 = 102;
const MADV_GUARD_REMOVE: i32 = 103;

/// The object valid, the device seeing what the program sees.
#[track_caller]
fn assert_in_step<R: Rig>(rig: &R, object: &Userptr<R::D>, region: &Region) {
    let backing = region.backing();
    assert_eq!(device_sees(rig, object), program_sees(region), "{backing:?}");
}

/// Gives pages contents they have not had before, where the program may write.
fn renew<R: Rig>(rig: &R, region: &Region, pages: Range<usize>, byte: u8) {
    if region.backing().writable() {
        region.fill(pages.clone(), byte).unwrap();
        rig.written(region.part(pages));
    }
}

// rows: igt/sd-probe; xe/basic-userptr{,-rebind}
pub fn after_munmap_an_acquire_faults_and_after_a_new_mapping_the_device_sees_the_new_contents<R: Rig>(rig: &R) {
    for (_, region) in regions(rig, 4) {
        let object = register(rig.manager(), region.range());
        assert_in_step(rig, &object, &region);
        let generation = object.generation().unwrap();
        region.unmap_all().unwrap();
        assert_taken_back(&object, generation);
        assert_faults(rig.manager(), &object);
        region.map_over(0..4).unwrap();
        renew(rig, &region, 1..3, 0x77);
        assert_in_step(rig, &object, &region);
    }
}

// rows: igt/sd-probe; igt/map-fixed-invalidate{,-overlap}{,-busy}; xe/mmap-style-bind-userptr-{…}; xe/userptr-invalidate
pub fn a_mapping_put_over_an_idle_object_takes_its_place<R: Rig>(rig: &R) {
    for (backing, region) in regions(rig, 4) {
        let object = register(rig.manager(), region.range());
        assert_in_step(rig, &object, &region);
        let generation = object.generation().unwrap();
        region.map_over(0..4).unwrap();
        assert_taken_back(&object, generation);
        renew(rig, &region, 3..4, 0x66);
        assert_in_step(rig, &object, &region);
        let generation = object.generation().unwrap();
        region.map_over(2..3).unwrap();
        assert_taken_back(&object, generation);
        assert_in_step(rig, &object, &region);
        assert_eq!(object.state().unwrap(), State::Valid, "{backing:?}");
    }
}

/// Runs `mutation` on a thread of its own while work is under way, asserts that it doesn't return before the work is over and finds the object
/// invalid then, and returns what the device saw. The work ends when the mutator waits.
fn mutate_busy<R: Rig>(rig: &R, object: &Userptr<R::D>, mutation: impl FnOnce() + Send) -> Vec<u64> {
    let late = rig.manager().stats().space.late;
    let lease = rig.manager().acquire_timeout(&[object], PATIENCE).unwrap();
    let generation = lease.view(0).generation;
    let work = rig.start(lease).unwrap();
    let over = AtomicBool::new(false);
    let seen = thread::scope(|scope| {
        let mutator = scope.spawn(|| {
            mutation();
            assert!(over.load(Ordering::SeqCst), "the mutation has returned while the device worked");
            assert_taken_back(object, generation);
        });
        let space = super::space();
        super::wait_until("the mutation", || space.is_busy(Shards::ALL) || mutator.is_finished());
        assert!(!mutator.is_finished(), "the mutator was not held");
        assert_eq!(work.pending.poll(), None);
        over.store(true, Ordering::SeqCst);
        let seen = work.finish();
        mutator.join().unwrap();
        seen
    });
    assert_eq!(rig.manager().stats().space.late, late, "nobody has been given up on");
    seen
}

// rows: igt/map-fixed-invalidate{,-overlap}{,-busy}
pub fn a_mapping_put_over_a_busy_object_waits_for_the_work<R: Rig>(rig: &R) {
    for (backing, region) in regions(rig, 4) {
        let object = register(rig.manager(), region.range());
        let before = program_sees(&region);
        let seen = mutate_busy(rig, &object, || region.map_over(1..3).unwrap());
        if rig.keeps_pages(backing) {
            assert_eq!(seen, before, "{backing:?}");
        }
        renew(rig, &region, 1..2, 0x55);
        assert_in_step(rig, &object, &region);
    }
}

pub fn munmap_of_a_busy_object_waits_for_the_work<R: Rig>(rig: &R) {
    for (backing, region) in regions(rig, 4).filter(|(backing, _)| rig.keeps_pages(*backing)) {
        let object = register(rig.manager(), region.range());
        let before = program_sees(&region);
        let seen = mutate_busy(rig, &object, || region.unmap_all().unwrap());
        assert_eq!(seen, before, "{backing:?}");
        assert_faults(rig.manager(), &object);
    }
}

pub fn discarding_the_pages_of_a_busy_object_waits_for_the_work<R: Rig>(rig: &R) {
    for (backing, region) in regions(rig, 4) {
        let advice = if backing.shared() { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
        renew(rig, &region, 0..4, 0x44);
        let object = register(rig.manager(), region.range());
        let before = program_sees(&region);
        let seen = mutate_busy(rig, &object, || region.advise(0..4, advice).unwrap());
        if !backing.shared() && rig.keeps_pages(backing) {
            assert_eq!(seen, before, "{backing:?}");
        }
        assert_in_step(rig, &object, &region);
    }
}

pub fn mappings_put_over_a_busy_object_by_several_threads_at_once_all_wait<R: Rig>(rig: &R) {
    for (backing, region) in regions(rig, 8) {
        let object = register(rig.manager(), region.range());
        for round in 0..5 {
            renew(rig, &region, 0..8, 0x10 + round);
            let before = program_sees(&region);
            let lease = rig.manager().acquire_timeout(&[&object], PATIENCE).unwrap();
            let generation = lease.view(0).generation;
            let work = rig.start(lease).unwrap();
            let over = AtomicBool::new(false);
            thread::scope(|scope| {
                for thread in 0..4 {
                    let (region, object, over) = (&region, &object, &over);
                    scope.spawn(move || {
                        region.map_over(2 * thread..2 * thread + 2).unwrap();
                        assert!(over.load(Ordering::SeqCst), "a mapping was replaced while the device worked");
                        assert!(object.generation().unwrap() > generation);
                    });
                }
                wait_for_mutator();
                over.store(true, Ordering::SeqCst);
                let seen = work.finish();
                // Each piece of anonymous shared memory is a file of its own, and of several files no device has a mapping of its own.
                let one_file = round == 0 || backing != Backing::AnonymousShared || rig.keeps_pages(Backing::Anonymous);
                if rig.keeps_pages(backing) && one_file {
                    assert_eq!(seen, before, "{backing:?}");
                }
            });
            assert_in_step(rig, &object, &region);
        }
        assert_eq!(rig.manager().stats().space.late, 0);
    }
}

/// Whoever replaces a mapping that somebody else has just put there and not yet returned with, replaces what is not watched yet: only the first
/// of them is held. When the last has returned, everything is as it should be.
pub fn threads_that_replace_each_others_mappings_end_with_an_object_in_step<R: Rig>(rig: &R) {
    for (backing, region) in regions(rig, 8) {
        let object = register(rig.manager(), region.range());
        assert_in_step(rig, &object, &region);
        for round in 0..10 {
            let generation = object.generation().unwrap();
            thread::scope(|scope| {
                for first in 0..4 {
                    let region = &region;
                    scope.spawn(move || (0..5).for_each(|_| region.map_over(first..first + 4).unwrap()));
                }
                scope.spawn(|| (0..5).for_each(|_| drop(rig.manager().acquire_timeout(&[&object], PATIENCE).unwrap())));
            });
            assert!(object.generation().unwrap() > generation, "{backing:?}");
            renew(rig, &region, 0..8, 0x60 + round);
            assert_in_step(rig, &object, &region);
        }
    }
}

// rows: xe/munmap-style-unbind-userptr-{all,one-partial,either-side,end,front,many,inval}
// rows: xe/system-allocator-partial-{,middle-,atomic-}{munmap,remap}-{cpu,no-cpu}-fault
pub fn a_hole_anywhere_invalidates_the_whole_object_and_a_refill_makes_it_whole<R: Rig>(rig: &R) {
    for (backing, region) in regions(rig, 6) {
        let object = register(rig.manager(), region.range());
        for (round, hole) in [0..1, 2..4, 5..6, 0..6].into_iter().enumerate() {
            assert_in_step(rig, &object, &region);
            let generation = object.generation().unwrap();
            region.unmap(hole.clone()).unwrap();
            assert_taken_back(&object, generation);
            match rig.manager().acquire_timeout(&[&object], PATIENCE) {
                Err(pinfold_core::Error::Fault { range, errno: libc::EFAULT, .. }) => {
                    assert!(range.overlaps(region.part(hole.clone())), "{backing:?}: {range} is told, not {hole:?}");
                }
                other => panic!("{backing:?}, {hole:?}: {other:?}"),
            }
            assert_faults(rig.manager(), &object);
            // A refill of one page is not yet a refill of two.
            region.map_over(hole.start..hole.start + 1).unwrap();
            if hole.len() > 1 {
                assert_faults(rig.manager(), &object);
                region.map_over(hole.start + 1..hole.end).unwrap();
            }
            renew(rig, &region, hole, 0x30 + u8::try_from(round).unwrap());
        }
        assert_in_step(rig, &object, &region);
    }
}

pub fn a_mapping_that_moves_away_leaves_an_invalid_object_and_works_where_it_is<R: Rig>(rig: &R) {
    for (_, region) in regions(rig, 4) {
        let object = register(rig.manager(), region.range());
        assert_in_step(rig, &object, &region);
        let (generation, before) = (object.generation().unwrap(), program_sees(&region));
        let moved = region.relocate(0..4, Move::Away).unwrap();
        assert_taken_back(&object, generation);
        assert_faults(rig.manager(), &object);
        let there = register(rig.manager(), moved.range());
        assert_eq!(device_sees(rig, &there), before);
        // The watch that moved along and the new one are one: who unmaps the new place is noticed once, and held once.
        let generation = there.generation().unwrap();
        moved.unmap_all().unwrap();
        assert_taken_back(&there, generation);
        region.map_over(0..4).unwrap();
        assert_in_step(rig, &object, &region);
    }
}

// rows: xe/system-allocator-partial-{,middle-,atomic-}{munmap,remap}-{cpu,no-cpu}-fault
pub fn a_part_that_moves_away_is_a_hole<R: Rig>(rig: &R) {
    for (_, region) in regions(rig, 4) {
        let object = register(rig.manager(), region.range());
        assert_in_step(rig, &object, &region);
        let generation = object.generation().unwrap();
        let moved = region.relocate(1..3, Move::Away).unwrap();
        assert_taken_back(&object, generation);
        assert_faults(rig.manager(), &object);
        drop(moved);
        region.map_over(1..3).unwrap();
        assert_in_step(rig, &object, &region);
    }
}

pub fn pages_that_move_and_leave_the_mapping_leave_an_object_of_fresh_pages<R: Rig>(rig: &R) {
    for (backing, region) in regions(rig, 4) {
        let object = register(rig.manager(), region.range());
        assert_in_step(rig, &object, &region);
        let (generation, before) = (object.generation().unwrap(), program_sees(&region));
        let moved = match region.relocate(0..4, Move::DontUnmap) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                skip_part!("{backing:?}: this kernel can't move its pages and leave the mapping");
                continue;
            }
            moved => moved.unwrap(),
        };
        assert_taken_back(&object, generation);
        assert_eq!(program_sees(&moved), before);
        assert_in_step(rig, &object, &region);
        if backing == Backing::Anonymous {
            assert_eq!(program_sees(&region), [0; 4]);
        }
        let generation = object.generation().unwrap();
        drop(moved); // the other place is no concern of the object's
        assert_eq!(object.generation().unwrap(), generation);
        region.map_over(0..4).unwrap();
        assert_taken_back(&object, generation);
    }
}

pub fn a_mapping_that_shrinks_leaves_a_hole<R: Rig>(rig: &R) {
    for (_, region) in regions(rig, 4) {
        let object = register(rig.manager(), region.range());
        assert_in_step(rig, &object, &region);
        let generation = object.generation().unwrap();
        region.shrink(3).unwrap();
        assert_taken_back(&object, generation);
        assert_faults(rig.manager(), &object);
        region.map_over(3..4).unwrap();
        assert_in_step(rig, &object, &region);
    }
}

// rows: peers/mremap-target-is-missed
pub fn a_mapping_moved_onto_an_object_takes_its_place_idle_or_busy<R: Rig>(rig: &R) {
    for (backing, region) in regions(rig, 4) {
        if !rig.spans_files() && !matches!(backing, Backing::Anonymous | Backing::AnonymousHuge) {
            continue; // between pages of a file, these are of none
        }
        let object = register(rig.manager(), region.range());
        assert_in_step(rig, &object, &region);
        let generation = object.generation().unwrap();
        move_onto(region.part(1..3), 0x99).unwrap();
        assert_taken_back(&object, generation);
        assert_in_step(rig, &object, &region);
        assert_eq!(program_sees(&region)[1..3], [filled(0x99); 2]);
        let before = program_sees(&region);
        let seen = mutate_busy(rig, &object, || move_onto(region.range(), 0x9a).unwrap());
        // The pages are anonymous ones by now, in part, so only a device with pins of its own keeps them.
        if rig.keeps_pages(Backing::Anonymous) && rig.keeps_pages(backing) {
            assert_eq!(seen, before, "{backing:?}");
        }
        assert_eq!(device_sees(rig, &object), [filled(0x9a); 4]);
    }
}

/// `mremap` of a new private mapping onto a region's pages.
pub fn move_onto(target: HostRange, byte: u8) -> io::Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: without an address this replaces nothing.
    let from = unsafe { libc::mmap(without_provenance_mut(0), target.len(), 3, flags, -1, 0) };
    assert_ne!(from, libc::MAP_FAILED);
    pinfold_tests::memory::poke(from.addr(), &vec![byte; target.len()])?;
    let (flags, to) = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, without_provenance_mut::<u8>(target.start()));
    // SAFETY: the target belongs to a region, into which no reference points; the source is the mapping above, which nobody else knows.
    let at = unsafe { libc::mremap(from, target.len(), target.len(), flags, to) };
    if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

pub fn discarded_pages_are_taken_anew<R: Rig>(rig: &R) {
    for (backing, region) in regions(rig, 4) {
        let advices: &[i32] = match backing {
            Backing::Anonymous | Backing::AnonymousHuge => &[libc::MADV_DONTNEED, libc::MADV_FREE],
            Backing::AnonymousShared | Backing::Memfd | Backing::Shm | Backing::FileShared => {
                &[libc::MADV_DONTNEED, libc::MADV_REMOVE]
            }
            _ => &[libc::MADV_DONTNEED],
        };
        let object = register(rig.manager(), region.range());
        for &advice in advices {
            for part in [0..4, 1..2] {
                renew(rig, &region, 0..4, 0x22);
                assert_in_step(rig, &object, &region);
                let generation = object.generation().unwrap();
                region.advise(part.clone(), advice).unwrap();
                assert!(object.generation().unwrap() > generation, "{backing:?} {advice}");
                renew(rig, &region, part, 0x23);
                assert_in_step(rig, &object, &region);
            }
        }
    }
}

// rows: igt/vma-merge; peers/watches-more-than-it-was-asked
pub fn neighbours_may_change_page_by_page_without_any_effect<R: Rig>(rig: &R) {
    for (backing, region) in regions(rig, 12) {
        let object = register(rig.manager(), region.part(4..8));
        let expected = program_sees(&region)[4..8].to_vec();
        assert_eq!(device_sees(rig, &object), expected);
        let lease = rig.manager().acquire_timeout(&[&object], PATIENCE).unwrap();
        let generation = lease.view(0).generation;
        // Under way all the time: if a neighbour's mutation were held, this thread would wait for itself and be late.
        let work = rig.start(rig.manager().acquire_timeout(&[&object], PATIENCE).unwrap()).unwrap();
        for neighbour in (0..4).chain(8..12) {
            region.map_over(neighbour..neighbour + 1).unwrap();
            region.advise(neighbour..neighbour + 1, libc::MADV_DONTNEED).unwrap();
            region.protect(neighbour..neighbour + 1, libc::PROT_NONE).unwrap();
            region.unmap(neighbour..neighbour + 1).unwrap();
        }
        // Page by page the neighbours come back and merge with ours, as far as the kernel merges.
        for neighbour in (0..4).rev().chain(8..12) {
            region.map_over(neighbour..neighbour + 1).unwrap();
            renew(rig, &region, neighbour..neighbour + 1, 0x12);
        }
        assert_eq!(object.generation().unwrap(), generation, "{backing:?}");
        assert_eq!(work.finish(), expected, "{backing:?}");
        assert_eq!(rig.start(lease).expect("the lease is still good").finish(), expected);
        // Ours has not merged away: it is noticed as before.
        let seen = mutate_busy(rig, &object, || region.map_over(3..5).unwrap());
        if rig.keeps_pages(backing) {
            assert_eq!(seen, expected, "{backing:?}");
        }
        assert_eq!(rig.manager().stats().space.late, 0);
    }
}

pub fn what_the_kernel_does_not_report_changes_nothing_by_itself_and_is_right_in_a_bracket<R: Rig>(rig: &R) {
    let manager = rig.manager();
    for (backing, region) in regions(rig, 4) {
        let object = register(manager, region.range());
        assert_in_step(rig, &object, &region);
        let generation = object.generation().unwrap();
        region.protect(0..1, libc::PROT_READ).unwrap();
        assert_eq!(object.generation().unwrap(), generation, "{backing:?}: mprotect is no change of hands");
        if backing.writable() {
            region.protect(0..1, libc::PROT_READ | libc::PROT_WRITE).unwrap();
        }
        manager.mutate(&[region.part(1..2)], || region.protect(1..2, libc::PROT_NONE).unwrap()).unwrap();
        assert_taken_back(&object, generation);
        assert_faults(manager, &object);
        let protection = libc::PROT_READ | if backing.writable() { libc::PROT_WRITE } else { 0 };
        region.protect(1..2, protection).unwrap();
        assert_in_step(rig, &object, &region);
    }
}

pub fn guard_pages_are_announced_by_invalidate_or_put_in_by_a_bracket<R: Rig>(rig: &R) {
    let manager = rig.manager();
    for (backing, region) in regions(rig, 4) {
        let object = register(manager, region.range());
        assert_in_step(rig, &object, &region);
        let generation = object.generation().unwrap();
        if let Err(e) = region.advise(2..3, MADV_GUARD_INSTALL) {
            skip_part!("{backing:?}: this kernel has no guard pages for it: {e}");
            continue;
        }
        assert_eq!(object.generation().unwrap(), generation, "no event tells of guard pages");
        manager.invalidate(region.part(2..3)).unwrap();
        assert_taken_back(&object, generation);
        assert_faults(manager, &object);
        let remove = || region.advise(2..3, MADV_GUARD_REMOVE).unwrap();
        manager.mutate(&[region.part(2..3)], remove).unwrap();
        assert_in_step(rig, &object, &region);
    }
}

// rows: peers/file-operations-are-missed
pub fn a_file_that_is_cut_or_punched_in_a_bracket_is_seen_as_it_then_is<R: Rig>(rig: &R) {
    let manager = rig.manager();
    for (backing, region) in regions(rig, 4).filter(|(backing, _)| backing.shared() && backing.writable()) {
        if backing == Backing::AnonymousShared {
            continue; // has no descriptor
        }
        let object = register(manager, region.range());
        assert_in_step(rig, &object, &region);
        let generation = object.generation().unwrap();
        manager.mutate(&[region.range()], || region.punch_hole(1..2).unwrap()).unwrap();
        assert_taken_back(&object, generation);
        assert_in_step(rig, &object, &region);
        assert_eq!(program_sees(&region)[1], 0);
        let generation = object.generation().unwrap();
        manager.mutate(&[region.range()], || region.truncate(2).unwrap()).unwrap();
        assert_taken_back(&object, generation);
        assert_faults(manager, &object);
        manager.mutate(&[region.range()], || region.truncate(4).unwrap()).unwrap();
        assert_in_step(rig, &object, &region);
        assert_eq!(program_sees(&region)[2..], [0; 2], "{backing:?}");
    }
}

pub fn a_bracket_waits_for_the_work_and_nothing_becomes_valid_inside<R: Rig>(rig: &R) {
    for (backing, region) in regions(rig, 4) {
        let object = register(rig.manager(), region.range());
        let before = program_sees(&region);
        let lease = rig.manager().acquire_timeout(&[&object], PATIENCE).unwrap();
        let work = rig.start(lease).unwrap();
        let (over, inside) = (AtomicBool::new(false), AtomicBool::new(false));
        let seen = thread::scope(|scope| {
            scope.spawn(|| {
                let change = || {
                    assert!(over.load(Ordering::SeqCst), "the bracket was entered while the device worked");
                    inside.store(true, Ordering::SeqCst);
                    region.map_over(0..4).unwrap();
                    inside.store(false, Ordering::SeqCst);
                };
                rig.manager().mutate(&[region.range()], change).unwrap();
            });
            // The bracket has begun when its gates are closed.
            let space = super::space();
            super::wait_until("a closed gate", || !space.gate(0).is_open());
            over.store(true, Ordering::SeqCst);
            let seen = work.finish();
            let lease = rig.manager().acquire_timeout(&[&object], PATIENCE).unwrap();
            assert!(!inside.load(Ordering::SeqCst), "an acquisition ended inside the bracket");
            drop(lease);
            seen
        });
        assert_eq!(seen, before, "{backing:?}");
        assert_in_step(rig, &object, &region);
    }
}
