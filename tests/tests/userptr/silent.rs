//! Operations of which the kernel sends no event: what the device goes on seeing, and what puts it right.

use std::io;
use std::os::fd::AsRawFd;

use pinfold_core::{Path, State};
use pinfold_tests::memory::{Backing, Region};

use super::{Rig, assert_faults, assert_taken_back, device_sees, first_words, register};

// linux/mman.h; not in the libc crate for every target.
const MADV_PAGEOUT: i32 = 21;
const MADV_COLLAPSE: i32 = 25;
const MADV_GUARD_INSTALL: i32 = 102;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Silent {
    /// `ftruncate` to one page, and back to the old length.
    Cut,
    /// `FALLOC_FL_PUNCH_HOLE`.
    Punch,
    /// `FALLOC_FL_ZERO_RANGE`.
    Zero,
    /// `MADV_GUARD_INSTALL`.
    Guard,
    /// `MADV_COLLAPSE`: the same bytes in one huge page.
    Collapse,
    /// `MADV_PAGEOUT`.
    PageOut,
    /// `mprotect`, which takes no page away.
    Protect,
}

impl Silent {
    const ALL: [Self; 7] =
        [Self::Cut, Self::Punch, Self::Zero, Self::Guard, Self::Collapse, Self::PageOut, Self::Protect];

    fn is_of_a_file(self) -> bool {
        matches!(self, Self::Cut | Self::Punch | Self::Zero)
    }

    /// Does it to page 1 (and what follows, for those that are of all that follows). `Unsupported`: not with this memory, or this kernel.
    fn run(self, region: &Region) -> io::Result<()> {
        let pages = region.range().pages();
        match self {
            _ if self.is_of_a_file() && !has_writable_file(region.backing()) => Err(unsupported()),
            Self::Cut => region.truncate(1).and_then(|()| region.truncate(pages)),
            Self::Punch => region.punch_hole(1..2),
            Self::Zero => zero_page(region, 1),
            Self::Guard => region.advise(1..2, MADV_GUARD_INSTALL),
            Self::Collapse if region.backing() != Backing::AnonymousHuge => Err(unsupported()),
            // Refused while anybody holds the pages, as it would have to move them; Linux 6.1 calls that invalid.
            Self::Collapse => region.advise(0..pages, MADV_COLLAPSE).or_else(|e| match e.raw_os_error() {
                Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM | libc::EINVAL) => Ok(()),
                _ => Err(e),
            }),
            Self::PageOut => region.advise(0..pages, MADV_PAGEOUT),
            Self::Protect => region.protect(1..2, libc::PROT_READ),
        }
    }

    /// Whether who keeps the pages goes on seeing what the program has lost.
    fn leaves_stale(self, backing: Backing, copies: bool) -> bool {
        match self {
            Self::Cut => true, // private copies go, too
            // A copy is made by reading, which leaves the file's own pages in a private mapping.
            Self::Punch | Self::Zero => backing.shared() || (copies && backing == Backing::FilePrivate),
            Self::Guard => true, // the program sees nothing at all
            Self::Collapse | Self::PageOut | Self::Protect => false,
        }
    }
}

fn has_writable_file(backing: Backing) -> bool {
    use Backing::{FilePrivate, FileShared, Memfd, MemfdPrivate, Shm};
    matches!(backing, Memfd | MemfdPrivate | Shm | FileShared | FilePrivate)
}

fn unsupported() -> io::Error {
    io::ErrorKind::Unsupported.into()
}

fn zero_page(region: &Region, page: usize) -> io::Result<()> {
    let page = i64::try_from(page * pinfold_core::page_size()).expect("an offset is a positive i64");
    let (fd, size) = (region.file().as_raw_fd(), i64::try_from(pinfold_core::page_size()).expect("small"));
    let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: fallocate takes numbers only, and no reference points into the mapping whose contents change.
    if unsafe { libc::fallocate(fd, mode, page, size) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What the program sees; `None` if a part of it can't be read.
fn program(region: &Region) -> Option<Vec<u64>> {
    region.read(0, region.range().len()).ok().map(|bytes| first_words(&bytes))
}

/// Every kind of memory that the device takes, and every operation there is for it.
fn each<R: Rig>(rig: &R, mut case: impl FnMut(Silent, Region)) {
    for operation in Silent::ALL {
        for backing in Backing::ALL.into_iter().filter(|&backing| backing.watchable() && rig.takes(backing)) {
            let pages = if operation == Silent::Collapse { 512 } else { 4 };
            let region = || {
                if operation == Silent::Collapse && backing == Backing::AnonymousHuge {
                    let region = Region::untouched(backing, pages).unwrap();
                    region.advise(0..pages, libc::MADV_NOHUGEPAGE).unwrap();
                    region.write(0, &region.original(0..pages)).unwrap();
                    region.advise(0..pages, libc::MADV_HUGEPAGE).unwrap();
                    region
                } else {
                    Region::new(backing, pages).unwrap()
                }
            };
            match operation.run(&region()) {
                Ok(()) => case(operation, region()),
                Err(e) if matches!(e.raw_os_error(), None | Some(libc::EINVAL | libc::EOPNOTSUPP)) => {}
                Err(e) => panic!("{operation:?} {backing:?}: {e}"),
            }
        }
    }
}

pub fn an_operation_without_an_event_leaves_the_object_valid_and_a_device_with_pins_stale<R: Rig>(rig: &R) {
    let mut stale = 0;
    each(rig, |operation, region| {
        let (backing, object) = (region.backing(), register(rig.manager(), region.range()));
        assert_eq!(Some(device_sees(rig, &object)), program(&region), "{operation:?} {backing:?}");
        let (generation, path) = (object.generation().unwrap(), object.path());
        operation.run(&region).unwrap();
        let same = (object.state().unwrap(), object.generation().unwrap());
        assert_eq!(same, (State::Valid, generation), "{operation:?} {backing:?}: nobody tells");
        if !rig.pins() && (operation == Silent::Guard || matches!(path, Some(Path::Mirror(_)))) {
            return; // a CPU driver would crash in the guard; a mirror has been made anew by the acquire
        }
        let in_step = Some(device_sees(rig, &object)) == program(&region);
        assert_eq!(
            in_step,
            !(rig.pins() && operation.leaves_stale(backing, rig.copies())),
            "{operation:?} {backing:?}"
        );
        stale += usize::from(!in_step);
    });
    assert_eq!(stale > 0, rig.pins(), "a device that pins must be able to show it");
}

pub fn an_operation_without_an_event_is_right_inside_a_bracket<R: Rig>(rig: &R) {
    each(rig, |operation, region| {
        let object = register(rig.manager(), region.range());
        assert_eq!(Some(device_sees(rig, &object)), program(&region));
        let generation = object.generation().unwrap();
        let run = || {
            // Refused inside, where it would wait for itself: nothing is looked at while it is going on.
            assert!(object.state().is_err());
            operation.run(&region).unwrap();
        };
        if operation.is_of_a_file() {
            rig.manager().mutate_file(region.file(), pinfold_core::page_size() as u64.., run).unwrap();
        } else {
            rig.manager().mutate(&[region.range()], run).unwrap();
        }
        assert_taken_back(&object, generation);
        sees_what_the_program_sees(rig, &object, &region, operation);
    });
}

pub fn an_operation_without_an_event_is_right_after_it_has_been_told<R: Rig>(rig: &R) {
    each(rig, |operation, region| {
        let object = register(rig.manager(), region.range());
        assert_eq!(Some(device_sees(rig, &object)), program(&region));
        let generation = object.generation().unwrap();
        operation.run(&region).unwrap();
        if operation.is_of_a_file() {
            rig.manager().invalidate_file(region.file(), pinfold_core::page_size() as u64..).unwrap();
        } else {
            rig.manager().invalidate(region.range()).unwrap();
        }
        assert_taken_back(&object, generation);
        sees_what_the_program_sees(rig, &object, &region, operation);
    });
}

#[track_caller]
fn sees_what_the_program_sees<R: Rig>(
    rig: &R,
    object: &pinfold_core::Userptr<R::D>,
    region: &Region,
    operation: Silent,
) {
    let backing = region.backing();
    if operation == Silent::Protect && rig.pins() && !rig.copies() {
        // Pinned for writing, which is not allowed any more.
        assert_eq!(
            rig.manager().acquire_timeout(&[object], pinfold_tests::PATIENCE).unwrap_err().errno(),
            libc::EFAULT
        );
        return;
    }
    match program(region) {
        Some(words) => assert_eq!(device_sees(rig, object), words, "{operation:?} {backing:?}"),
        None => assert_faults(rig.manager(), object),
    }
}
