//! Parts of objects, which are objects of their own over some of the pages.

#[macro_use]
mod userptr;

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;

use pinfold_core::{Access, Coverage, Error, ManualReason, Policy, State};
use pinfold_invalidate::{HostRange, page_size};
use pinfold_tests::leaks::pinned;
use pinfold_tests::memory::{Backing, HugePages, Region};
use pinfold_tests::process::isolated;
use pinfold_tests::{PATIENCE, skip};

use userptr::{Dma, Fake, alone, assert_taken_back, device_sees, program_sees, register, space};

for_devices!([fake dma] part {
    a_part_is_populated_watched_and_taken_and_nothing_around_it
    a_part_and_its_whole_see_the_same_memory_of_every_kind
    only_what_happens_to_its_own_pages_makes_a_part_stale
    work_on_a_part_does_not_hold_who_unmaps_the_rest
    a_part_is_prefetched_like_an_object
});

#[test]
fn the_kernel_counts_the_pages_of_the_part_as_pinned() {
    // The count is the process's.
    let ending = isolated(|| match Dma::new() {
        Ok(rig) => {
            let region = Region::new(Backing::Anonymous, 64).unwrap();
            let whole = register(&rig.manager, region.range());
            let (part, before) = (whole.part(page_size()..9 * page_size()).unwrap(), pinned());
            let lease = rig.manager.acquire_timeout(&[&part], PATIENCE).unwrap();
            assert_eq!(pinned(), before + 8 * page_size() as u64);
            drop(lease);
        }
        Err(e) => skip!("no io_uring here: {e}"),
    });
    ending.expect_return();
}

#[test]
fn bytes_are_rounded_out_to_pages_and_what_is_no_part_is_told_with_the_numbers() {
    let _alone = alone();
    let rig = Fake::new();
    let (region, page) = (Region::new(Backing::Anonymous, 4).unwrap(), page_size());
    let whole = register(&rig.manager, region.range());
    let cases: [(Range<usize>, Range<usize>); 5] = [
        (0..4 * page, 0..4),
        (0..1, 0..1),
        (page - 1..page + 1, 0..2),
        (page..2 * page, 1..2),
        (4 * page - 1..4 * page, 3..4),
    ];
    for (bytes, pages) in cases {
        assert_eq!(whole.part(bytes.clone()).unwrap().range(), region.part(pages), "{bytes:?}");
    }
    let (first, reversed) = (4 * page - 1, Range { start: 2 * page, end: page });
    for bytes in [0..0, page..page, reversed, first..4 * page + 1, 4 * page..5 * page, 0..usize::MAX] {
        let error = whole.part(bytes.clone()).unwrap_err();
        let Error::Part { start, end, size, range } = error else { panic!("{error}") };
        assert_eq!((start..end, size, range), (bytes, 4 * page, region.range()));
        assert_eq!(error.errno(), libc::EINVAL);
    }
}

#[test]
fn a_part_of_a_part_is_counted_from_the_parts_start() {
    let _alone = alone();
    let rig = Fake::new();
    let (region, page) = (Region::new(Backing::Memfd, 8).unwrap(), page_size());
    let part = register(&rig.manager, region.range()).part(2 * page..6 * page).unwrap();
    let inner = part.part(page..2 * page).unwrap();
    assert_eq!(inner.range(), region.part(3..4));
    assert!(part.part(3 * page..5 * page).is_err());
    assert_eq!(device_sees(&rig, &inner), program_sees(&region)[3..4]);
}

#[test]
fn a_part_has_what_its_whole_was_registered_with_and_needs_it_no_longer() {
    let _alone = alone();
    let rig = Fake::new();
    let (region, page) = (Region::new(Backing::Anonymous, 4).unwrap(), page_size());
    // SAFETY: no reference points into a region, and nothing happens to it.
    let whole = unsafe { rig.manager.register_unwatched(region.range(), Access::ReadWrite) }.unwrap();
    whole.set_policy(Policy::Import).unwrap();
    let part = whole.part(page..3 * page).unwrap();
    assert_ne!(part.id(), whole.id());
    assert_eq!(part.policy(), Policy::Import);
    let lease = rig.manager.acquire_timeout(&[&whole, &part], PATIENCE).unwrap();
    assert_eq!(part.coverage(), Some(Coverage::Manual(ManualReason::Asked)));
    drop((lease, whole));
    assert_eq!(part.state().unwrap(), State::Valid, "its pages are its own");
    assert_eq!(device_sees(&rig, &part), program_sees(&region)[1..3]);
    assert_eq!(rig.manager.stats().objects, 1);
}

#[test]
fn who_is_gone_has_no_parts() {
    let _alone = alone();
    let rig = Fake::new();
    let region = Region::new(Backing::Anonymous, 2).unwrap();
    let whole = register(&rig.manager, region.range());
    drop(rig);
    let error = whole.part(0..page_size()).unwrap_err();
    assert!(matches!(error, Error::Closed), "{error}");
}

#[test]
fn an_export_of_a_part_has_its_unwatched_whole_and_its_sisters_watched_too() {
    let _alone = alone();
    let rig = Fake::new();
    let (region, page) = (Region::new(Backing::Memfd, 8).unwrap(), page_size());
    // SAFETY: no reference points into a region, and nothing happens to it.
    let whole = unsafe { rig.manager.register_unwatched(region.range(), Access::Read) }.unwrap();
    let [part, sister, apart] =
        [0..4, 2..6, 6..8].map(|pages| whole.part(pages.start * page..pages.end * page).unwrap());
    let objects = [&whole, &part, &sister, &apart];
    let coverage = || {
        drop(rig.manager.acquire_timeout(&objects, PATIENCE).unwrap());
        objects.map(|object| object.coverage().unwrap())
    };
    let asked = Coverage::Manual(ManualReason::Asked);
    assert_eq!(coverage(), [asked; 4]);
    // Whether the kernel then makes a dma-buf is another matter.
    let _ = rig.manager.export_dmabuf(&part, 0..page as u64);
    assert_eq!(coverage(), [Coverage::Watched, Coverage::Watched, Coverage::Watched, asked]);
}

#[test]
fn a_part_of_a_page_of_the_huge_pool_is_watched_with_all_of_its_mapping() {
    let _alone = alone();
    let _pool = match HugePages::add(4) {
        Ok(pool) => pool,
        Err(why) => skip!("{why}"),
    };
    let rig = Fake::new();
    let (region, page) = (Region::new(Backing::HugeTlb, 2 * 512).unwrap(), page_size());
    let whole = register(&rig.manager, region.range());
    let [part, half] = [page..9 * page, 0..512 * page].map(|bytes| whole.part(bytes).unwrap());
    assert_eq!(device_sees(&rig, &half), program_sees(&region)[..512]);
    assert!(!space().is_watched(region.part(512..1024)), "whole pages are watched exactly");
    assert_eq!(device_sees(&rig, &part), program_sees(&region)[1..9]);
    // The other way round there is no watch yet that the part could be under.
    let (other, bytes) = (Region::new(Backing::HugeTlb, 2 * 512).unwrap(), page..9 * page);
    let part_first = register(&rig.manager, other.range()).part(bytes).unwrap();
    assert_eq!(device_sees(&rig, &part_first), program_sees(&other)[1..9]);
    assert!(space().is_watched(other.range()), "with all of its mapping");
    assert_eq!(rig.manager.stats().retries, 0, "nothing is tried that the kernel refuses");
    let generation = part.generation().unwrap();
    region.unmap(0..512).unwrap();
    assert_taken_back(&part, generation);
}

/// A new file on a pool of huge pages that is mounted for it, in the calling thread's own view of the file system.
fn file_on_a_mounted_pool() -> io::Result<File> {
    let done = |result: libc::c_int| if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    let place = std::env::temp_dir().join(format!("pinfold-huge-{}", std::process::id()));
    let path = CString::new(place.as_os_str().as_bytes())?;
    // SAFETY: flags only.
    done(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
    let (none, root) = (c"none".as_ptr(), c"/".as_ptr());
    // SAFETY: terminated strings, and no data.
    done(unsafe { libc::mount(none, root, std::ptr::null(), libc::MS_REC | libc::MS_PRIVATE, std::ptr::null()) })?;
    std::fs::create_dir(&place)?;
    // SAFETY: as above.
    let mounted = done(unsafe { libc::mount(none, path.as_ptr(), c"hugetlbfs".as_ptr(), 0, std::ptr::null()) });
    let file = mounted.and_then(|()| {
        let file = File::options().read(true).write(true).create_new(true).open(place.join("file"));
        // SAFETY: a terminated string; the file keeps what was mounted there.
        done(unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) })?;
        file
    });
    std::fs::remove_dir(&place)?;
    file
}

#[test]
fn a_part_of_a_huge_page_of_a_file_is_watched_with_all_of_its_mapping() {
    let _pool = match HugePages::add(4) {
        Ok(pool) => pool,
        Err(why) => skip!("{why}"),
    };
    let ending = isolated(|| {
        let file = match file_on_a_mounted_pool() {
            Ok(file) => file,
            Err(e) => skip!("no pool of huge pages can be mounted here: {e}"),
        };
        let (page, len) = (page_size(), 2 * 512 * page_size());
        file.set_len(len as u64).unwrap();
        let (rights, shared, fd) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, file.as_raw_fd());
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, rights, shared, fd, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        // SAFETY: just mapped, and nobody else's.
        let region = unsafe { Region::adopt(HostRange::from_ptr(at, len).unwrap()) };
        (0..1024).for_each(|page| region.fill(page..page + 1, (page % 251) as u8).unwrap());
        let rig = Fake::new();
        let part = register(&rig.manager, region.range()).part(page..9 * page).unwrap();
        assert_eq!(device_sees(&rig, &part), program_sees(&region)[1..9]);
        assert_eq!(part.coverage(), Some(Coverage::Watched));
        assert!(space().is_watched(region.range()), "with all of its mapping");

        assert_eq!(rig.manager.stats().retries, 0, "what the kernel refuses is not tried twice");
        let hole = || {
            let flags = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            // SAFETY: numbers only, and no reference points into the mapping whose contents change.
            assert_eq!(unsafe { libc::fallocate(fd, flags, 0, 2 << 20) }, 0);
        };
        rig.manager.mutate(&[region.range()], hole).unwrap();
        assert_eq!(device_sees(&rig, &part), [0; 8]);
        let generation = part.generation().unwrap();
        region.unmap(0..512).unwrap();
        assert_taken_back(&part, generation);
    });
    ending.expect_return();
}
