//! What memory a device may be given, asked when it is acquired.

use std::ptr::without_provenance_mut;

use pinfold_core::{Access, Device, Error, HostRange, Manager, State, Userptr};
use pinfold_invalidate::page_size;
use pinfold_tests::PATIENCE;
use pinfold_tests::memory::{Backing, Region, find_mapping};

use super::{Rig, assert_faults, device_sees, filled, program_sees, register};

/// Registers memory that may be nobody's; to be refused at acquire.
fn register_anything<D: Device>(manager: &Manager<D>, range: HostRange, access: Access) -> Userptr<D> {
    // SAFETY: nothing is written, and no reference of this program points there; the kernel's own pages never change hands.
    unsafe { manager.register(range, access) }.unwrap()
}

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

pub fn memory_without_permission_is_a_fault<R: Rig>(rig: &R) {
    let region = Region::new(Backing::Anonymous, 4).unwrap();
    let object = register(rig.manager(), region.range());
    region.protect(2..3, libc::PROT_NONE).unwrap();
    assert_faults(rig.manager(), &object);
    region.protect(2..3, libc::PROT_READ | libc::PROT_WRITE).unwrap();
    assert_eq!(device_sees(rig, &object), program_sees(&region));
}

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
pub fn device_mappings_are_a_fault<R: Rig>(rig: &R) {
    let page = page_size();
    let ring = DeviceMapping::new();
    let vvar = find_mapping("[vvar]");
    for mapping in [ring.as_ref().map(|ring| ring.device), vvar].into_iter().flatten() {
        let object = register_anything(rig.manager(), HostRange::new(mapping.start(), page).unwrap(), Access::Read);
        assert_faults(rig.manager(), &object);
    }
    let Some(ring) = ring else { pinfold_tests::skip!("no io_uring to map") };
    let edge = register_anything(rig.manager(), ring.with_neighbours, Access::Read);
    assert_faults(rig.manager(), &edge);
    let before = register_anything(rig.manager(), HostRange::new(ring.device.start() - page, page).unwrap(), Access::Read);
    assert_eq!(device_sees(rig, &before), [filled(0x5a)]);
}

/// A page of a ring of io_uring, which is memory of the kernel's, with a page of anonymous memory on either side.
struct DeviceMapping {
    device: HostRange,
    with_neighbours: HostRange,
}

impl DeviceMapping {
    fn new() -> Option<Self> {
        use std::os::fd::AsRawFd;
        let ring = io_uring::IoUring::new(4).ok()?;
        let region = Region::new(Backing::Anonymous, 3).ok()?;
        region.fill(0..1, 0x5a).ok()?;
        let device = region.part(1..2);
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        // SAFETY: the page belongs to a region, into which no reference points. Offset 0 is the submission ring.
        let at = unsafe {
            libc::mmap(without_provenance_mut(device.start()), device.len(), libc::PROT_READ, flags, ring.as_raw_fd(), 0)
        };
        let with_neighbours = region.range();
        std::mem::forget(region); // as long as the process
        (at != libc::MAP_FAILED).then_some(Self { device, with_neighbours })
    }
}
