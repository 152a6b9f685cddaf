//! Truncation, hole punching, guard pages and the like: the kernel tells nobody of them, so a device that pins goes on with the old pages. The
//! bracket, `mutate_file` and `invalidate` put that right, in every mapping of the file; memory of a sealed `HostBuffer` can't suffer it.

#[macro_use]
mod userptr;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::{null_mut, without_provenance_mut};
use std::thread;

use pinfold_core::{Error, HostBuffer, HostBufferKind, HostRange, HugePages, Outcome, State, page_size};
use pinfold_tests::fence::Fence;
use pinfold_tests::memory::{Backing, Region};
use pinfold_tests::{PATIENCE, skip};

use userptr::{Dma, Fake, Rig, alone, assert_taken_back, device_sees, filled, register, space, wait_until};

for_devices!([fake dma] silent {
    an_operation_without_an_event_leaves_the_object_valid_and_a_device_with_pins_stale
    an_operation_without_an_event_is_right_inside_a_bracket
    an_operation_without_an_event_is_right_after_it_has_been_told
});

/// Another mapping of a file, unmapped when dropped.
struct Second(HostRange);

impl Second {
    fn new(file: BorrowedFd<'_>, pages: std::ops::Range<usize>, flags: i32) -> Self {
        let (len, offset) = (pages.len() * page_size(), i64::try_from(pages.start * page_size()).unwrap());
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: without an address nothing is replaced.
        let at = unsafe { libc::mmap(null_mut(), len, protection, flags, file.as_raw_fd(), offset) };
        assert_ne!(at, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Self(HostRange::from_ptr(at, len).unwrap())
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and no reference points into it.
        unsafe { libc::munmap(without_provenance_mut(self.0.start()), self.0.len()) };
    }
}

fn bytes_of(pages: std::ops::Range<usize>) -> std::ops::Range<u64> {
    (pages.start * page_size()) as u64..(pages.end * page_size()) as u64
}

#[test]
// rows (fake): peers/file-operations-are-missed
fn an_operation_on_a_file_takes_back_every_object_over_those_bytes_and_no_other() {
    let _alone = alone();
    let rig = Fake::new();
    for backing in [Backing::Memfd, Backing::Shm, Backing::FileShared, Backing::FilePrivate] {
        let (region, other) = (Region::new(backing, 8).unwrap(), Region::new(backing, 8).unwrap());
        let file = region.file();
        let shared = Second::new(file, 2..6, libc::MAP_SHARED);
        let private = Second::new(file, 0..8, libc::MAP_PRIVATE);
        let part = |of: HostRange, pages: std::ops::Range<usize>| {
            HostRange::new(of.start() + pages.start * page_size(), pages.len() * page_size()).unwrap()
        };
        let hit = [
            region.range(),
            region.part(3..4),
            shared.0,
            part(shared.0, 1..2), // page 3 of the file
            private.0,
            part(private.0, 3..8),
        ];
        let missed = [region.part(0..3), region.part(4..8), part(shared.0, 2..4), part(private.0, 4..8), other.range()];
        let register =
            |ranges: &[HostRange]| -> Vec<_> { ranges.iter().map(|&range| register(&rig.manager, range)).collect() };
        let (hit, missed) = (register(&hit), register(&missed));
        let generations = |objects: &[pinfold_core::Userptr<_>]| -> Vec<_> {
            objects.iter().map(|object| object.generation().unwrap()).collect()
        };
        let all: Vec<_> = hit.iter().chain(&missed).collect();
        for in_bracket in [true, false] {
            drop(rig.manager.acquire_timeout(&all, PATIENCE).unwrap());
            let before = (generations(&hit), generations(&missed));
            if in_bracket {
                rig.manager.mutate_file(file, bytes_of(3..4), || region.punch_hole(3..4).unwrap()).unwrap();
            } else {
                rig.manager.invalidate_file(file, bytes_of(3..4)).unwrap();
            }
            assert!(generations(&hit).iter().zip(before.0).all(|(after, before)| *after > before), "{backing:?}");
            assert_eq!(generations(&missed), before.1, "{backing:?}");
        }
    }
}

#[test]
fn any_descriptor_of_the_file_names_it_and_what_is_no_file_is_an_error() {
    let _alone = alone();
    let rig = Fake::new();
    let region = Region::new(Backing::Shm, 2).unwrap();
    let object = register(&rig.manager, region.range());
    let path = format!("/proc/self/fd/{}", region.file().as_raw_fd());
    let reading = File::open(&path).unwrap();
    let writing = OpenOptions::new().write(true).open(&path).unwrap();
    for file in [region.file(), reading.as_fd(), writing.as_fd()] {
        drop(rig.manager.acquire_timeout(&[&object], PATIENCE).unwrap());
        let generation = object.generation().unwrap();
        assert_eq!(rig.manager.mutate_file(file, .., || 5).unwrap(), 5);
        assert_taken_back(&object, generation);
    }
    let (pipe, _write) = nix::unistd::pipe().unwrap();
    assert!(rig.manager.mutate_file(&pipe, .., || ()).is_ok(), "nothing is mapped from a pipe");
    let nested = rig.manager.mutate_file(region.file(), .., || rig.manager.mutate_file(region.file(), .., || ()));
    assert!(matches!(nested.unwrap(), Err(Error::Nested)));
}

#[test]
fn an_operation_on_a_file_waits_for_work_over_any_of_its_mappings() {
    let _alone = alone();
    let rig = Fake::new();
    let region = Region::new(Backing::Memfd, 4).unwrap();
    let second = Second::new(region.file(), 0..4, libc::MAP_SHARED);
    let object = register(&rig.manager, second.0);
    let (lease, fence) = (rig.manager.acquire_timeout(&[&object], PATIENCE).unwrap(), Fence::new());
    // SAFETY: nothing is submitted.
    let pending = unsafe { lease.submit([fence.clone()], || Ok::<_, String>(())) }.unwrap();
    thread::scope(|scope| {
        let mutator = scope.spawn(|| {
            let cut = || {
                assert_eq!(fence.outcome(), Some(Outcome::Done), "the file is cut under running work");
                region.truncate(1).unwrap();
            };
            rig.manager.mutate_file(region.file(), page_size() as u64.., cut).unwrap();
        });
        wait_until("the bracket", || !space().gate(0).is_open());
        assert!(!mutator.is_finished());
        fence.signal(Outcome::Done);
    });
    assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
}

fn buffer(kind: HostBufferKind) -> HostBuffer {
    HostBuffer::new(4 * page_size(), kind, HugePages::No).unwrap()
}

fn punch(file: BorrowedFd<'_>) -> io::Result<()> {
    let (page, mode) = (i64::try_from(page_size()).unwrap(), libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE);
    // SAFETY: fallocate takes numbers only.
    if unsafe { libc::fallocate(file.as_raw_fd(), mode, page, page) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[test]
fn memory_of_a_sealed_buffer_can_neither_be_cut_nor_punched_and_of_an_exportable_one_not_cut() {
    let _alone = alone();
    for kind in [HostBufferKind::Sealed, HostBufferKind::Exportable] {
        let buffer = buffer(kind);
        assert_eq!(nix::unistd::ftruncate(&buffer, 0), Err(nix::Error::EPERM));
        let punched = punch(buffer.as_fd()).map_err(|e| e.raw_os_error());
        assert_eq!(punched, if kind == HostBufferKind::Sealed { Err(Some(libc::EPERM)) } else { Ok(()) });
    }
}

#[test]
fn a_hole_in_an_exportable_buffer_leaves_a_pin_stale_unless_it_is_punched_in_a_bracket() {
    let _alone = alone();
    let rig = match Dma::new() {
        Ok(rig) => rig,
        Err(e) => skip!("no io_uring here: {e}"),
    };
    let buffer = buffer(HostBufferKind::Exportable);
    buffer.write(0, &vec![7; 4 * page_size()]).unwrap();
    let object = register(&rig.manager, buffer.range());
    assert_eq!(device_sees(&rig, &object), [filled(7); 4]);
    punch(buffer.as_fd()).unwrap();
    assert_eq!((object.state().unwrap(), device_sees(&rig, &object)[1]), (State::Valid, filled(7)), "stale");
    rig.manager().mutate_file(&buffer, bytes_of(1..2), || punch(buffer.as_fd()).unwrap()).unwrap();
    assert_eq!(device_sees(&rig, &object), [filled(7), 0, filled(7), filled(7)]);
}
