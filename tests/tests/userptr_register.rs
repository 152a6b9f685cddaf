//! Registering is an entry in a list: it touches nothing and asks for nothing. What can't be given to a device is found out when it is acquired.

#[macro_use]
mod userptr;

use pinfold_core::{Access, HostRange, RangeError, State};
use pinfold_invalidate::{MAX_PAGES, USER_SPACE_END, page_size};
use pinfold_tests::memory::{Backing, Region, cached_pages};

use userptr::{Fake, alone, assert_faults, register, space};

for_devices!([fake dma] overlap {
    overlapping_objects_see_the_same_memory_and_each_is_invalidated_by_its_own_pages_only
});

mod asked_at_acquire {
    // The scripted device takes what it can read; what only a device can judge is asked of one.
    use super::userptr;
    for_devices!([fake dma] register {
        null_registers_and_faults_when_it_is_acquired
        every_layout_of_holes_and_forbidden_pages_is_refused_until_it_is_whole
        memory_without_permission_is_a_fault
    });
}

mod judged_by_the_device {
    use super::userptr;
    for_devices!([dma] register {
        a_device_does_not_get_to_write_where_the_program_may_not
        device_mappings_are_a_fault
    });
}

#[test]
fn registering_touches_nothing() {
    let _alone = alone();
    let rig = Fake::new();
    for backing in Backing::ALL {
        let region = Region::untouched(backing, 64).unwrap();
        if backing.on_disk() {
            // Out of the page cache, as far as the file system lets go of it.
            nix::unistd::fsync(region.file()).unwrap();
            nix::fcntl::posix_fadvise(region.file(), 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED)
                .unwrap();
        }
        assert_eq!(region.present(), 0);
        let (cached, events) = (cached_pages(region.range()).unwrap(), rig.manager.stats().space.events);
        let objects = [Access::Read, Access::ReadWrite].map(|access| {
            // SAFETY: no reference points into a region.
            unsafe { rig.manager.register(region.range(), access) }.unwrap()
        });
        assert_eq!(region.present(), 0, "{backing:?}");
        assert_eq!(cached_pages(region.range()).unwrap(), cached, "{backing:?}");
        assert!(!space().is_watched(region.range()), "{backing:?}");
        for object in &objects {
            assert_eq!((object.state().unwrap(), object.generation().unwrap().0), (State::New, 0));
            assert_eq!((object.coverage(), object.path(), object.in_flight()), (None, None, 0));
        }
        // So a munmap of what was only registered pays nothing either.
        region.unmap_all().unwrap();
        assert_eq!(rig.manager.stats().space.events, events, "{backing:?}");
    }
    let counts = rig.device.counts();
    assert_eq!((counts.prepared, counts.imported), (0, 0));
}

#[test]
// rows: igt/input-checking; igt/usage-restrictions; amdgpu/amd_fuzzing userptr-fuzzing
fn what_is_no_range_is_told_in_the_kernels_order_with_the_kernels_errno() {
    let page = page_size();
    let cases = [
        // Start, length, errno. More than one thing is wrong with most of them; the first check counts.
        (page, usize::MAX, libc::E2BIG),
        (1, (MAX_PAGES + 1) * page, libc::E2BIG),
        (0, 0, libc::EINVAL),
        (1, 0, libc::EINVAL),
        (page + 1, page, libc::EINVAL),
        (page, page + 1, libc::EINVAL),
        (page + 1, page - 1, libc::EINVAL),
        (0xffff_ffff_ffff_0000, 2 << 30, libc::EFAULT),
        (usize::MAX & !(page - 1), page, libc::EFAULT),
        (USER_SPACE_END, page, libc::EFAULT),
        (USER_SPACE_END - page, 2 * page, libc::EFAULT),
    ];
    for (start, len, errno) in cases {
        let error = HostRange::new(start, len).unwrap_err();
        assert_eq!(error.errno(), errno, "{error}");
        assert_eq!(pinfold_core::Error::from(error).errno(), errno);
    }
    assert!(matches!(HostRange::new(1, 0), Err(RangeError::Empty { .. })));
    assert!(HostRange::new(USER_SPACE_END - page, page).is_ok());
}

#[test]
// rows: igt/input-checking
fn an_unknown_flag_is_refused_and_a_known_one_is_the_kernels() {
    assert_eq!(Access::from_flags(0).unwrap(), Access::ReadWrite);
    assert_eq!(Access::from_flags(1).unwrap(), Access::Read);
    // Bit 31 is UNSYNCHRONIZED in the kernel: here that is a function of its own.
    for flags in [2, 3, 1 << 31, u32::MAX] {
        let error = Access::from_flags(flags).unwrap_err();
        assert!(matches!(error, pinfold_core::Error::UnknownFlag(said) if said & !1 == flags & !1), "{error}");
        assert_eq!(error.errno(), libc::EINVAL);
    }
}

#[test]
fn the_largest_range_there_is_can_be_registered_and_faults_when_it_is_acquired() {
    let _alone = alone();
    let rig = Fake::new();
    let all = HostRange::new(0, MAX_PAGES * page_size()).unwrap();
    let object = register(&rig.manager, all);
    assert_faults(&rig.manager, &object);
    assert_eq!(rig.device.counts().prepared, 0);
}
