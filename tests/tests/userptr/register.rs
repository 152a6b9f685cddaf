//! What memory a device may be given, asked when it is acquired.

use std::ptr::without_provenance_mut;

use pinfold_core::{Access, Device, Error, HostRange, Manager, State, Userptr};
use pinfold_invalidate::page_size;
use pinfold_tests::PATIENCE;
use pinfold_tests::memory::{Backing, Region, find_mapping, poke};
use pinfold_tests::{skip, skip_part};

use super::{Rig, assert_faults, device_sees, filled, program_sees, register};

/// Registers memory that may be nobody's; to be refused at acquire.
fn register_anything<D: Device>(manager: &Manager<D>, range: HostRange, access: Access) -> Userptr<D> {
    // SAFETY: nothing is written, and no reference of this program points there; the kernel's own pages never change hands.
    unsafe { manager.register(range, access) }.unwrap()
}

// rows: igt/invalid-null-pointer; xe/userptr-invalid
pub fn null_registers_and_faults_when_it_is_acquired<R: Rig>(rig: &R) {
    let null = HostRange::from_ptr(std::ptr::null::<u8>(), page_size()).unwrap();
    let object = register(rig.manager(), null);
    assert_eq!(object.state().unwrap(), State::New);
    assert_faults(rig.manager(), &object);
}

/// Three pages, each mapped, a hole, or without permission: only the range of which every page can be read is taken.
pub fn every_layout_of_holes_and_forbidden_pages_is_refused_until_it_is_whole<R: Rig>(rig: &R) {
    let region = Region::new(Backing::Anonymous, 3).unwrap();
    for layout in 0..27 {
        let kinds = [layout % 3, layout / 3 % 3, layout / 9];
        let object = register(rig.manager(), region.range());
        for (page, kind) in kinds.into_iter().enumerate() {
            match kind {
                0 => {}
                1 => region.unmap(page..page + 1).unwrap(),
                _ => region.protect(page..page + 1, libc::PROT_NONE).unwrap(),
            }
        }
        if layout > 0 {
            assert_faults(rig.manager(), &object);
        }
        for page in 0..3 {
            region.map_over(page..page + 1).unwrap();
        }
        region.fill(0..3, 0x61).unwrap();
        rig.written(region.range());
        assert_eq!(device_sees(rig, &object), program_sees(&region), "{kinds:?}");
    }
}

// rows: selftests/hmm anon_{read,write}{,_prot,_huge}, file_{read,write}
pub fn memory_without_permission_is_a_fault<R: Rig>(rig: &R) {
    let region = Region::new(Backing::Anonymous, 4).unwrap();
    let object = register(rig.manager(), region.range());
    region.protect(2..3, libc::PROT_NONE).unwrap();
    assert_faults(rig.manager(), &object);
    region.protect(2..3, libc::PROT_READ | libc::PROT_WRITE).unwrap();
    assert_eq!(device_sees(rig, &object), program_sees(&region));
}

// rows: igt/readonly-unsync; selftests/hmm anon_{read,write}{,_prot,_huge}, file_{read,write}
pub fn a_device_does_not_get_to_write_where_the_program_may_not<R: Rig>(rig: &R) {
    let region = Region::new(Backing::Anonymous, 2).unwrap();
    region.protect(1..2, libc::PROT_READ).unwrap();
    let object = register_anything(rig.manager(), region.range(), Access::ReadWrite);
    match rig.manager().acquire_timeout(&[&object], PATIENCE) {
        Err(Error::Fault { errno: libc::EFAULT | libc::EPERM, .. }) => {}
        other => panic!("{other:?}"),
    }
}

/// The kernel's own pages and device mappings, alone and with a page of ordinary memory at an edge.
// rows: igt/invalid-mmap-offset-unsync
pub fn device_mappings_are_a_fault<R: Rig>(rig: &R) {
    let first_page = |range: HostRange| HostRange::new(range.start(), page_size()).unwrap();
    if let Some(vvar) = find_mapping("[vvar]") {
        assert_faults(rig.manager(), &register_anything(rig.manager(), first_page(vvar), Access::Read));
    } else {
        skip_part!("no [vvar] here");
    }
    let Ok(_ring) = io_uring::IoUring::new(4) else { skip!("no io_uring to map") };
    let ring = find_mapping("anon_inode:[io_uring]").expect("a ring is mapped");
    assert_faults(rig.manager(), &register_anything(rig.manager(), first_page(ring), Access::Read));
    let Some(before) = page_before(ring) else { skip!("no room before the ring's mapping") };
    let both = HostRange::new(before.start(), 2 * page_size()).unwrap();
    assert_faults(rig.manager(), &register_anything(rig.manager(), both, Access::Read));
    assert_eq!(device_sees(rig, &register_anything(rig.manager(), before, Access::Read)), [filled(0x5a)]);
}

/// A page of anonymous memory that ends where the range begins. It stays until the process ends.
fn page_before(range: HostRange) -> Option<HostRange> {
    let page = HostRange::new(range.start() - page_size(), page_size()).unwrap();
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: nothing is replaced.
    let at = unsafe { libc::mmap(without_provenance_mut(page.start()), page.len(), protection, flags, -1, 0) };
    (at != libc::MAP_FAILED).then(|| poke(page.start(), &vec![0x5a; page.len()]).unwrap())?;
    Some(page)
}
