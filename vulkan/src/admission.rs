//! Which memory a device may be given at all.
//!
//! A CPU driver imports anything: null, holes, memory without permission. The process dies later, in a thread of the driver. So the
//! driver's word counts only for memory that passed here first.

use pinfold_core::{Access, DeviceError};
use pinfold_invalidate::{Backing, Mapping};

/// Whether a device may access `mappings` in this way.
///
/// # Errors
/// [`DeviceError::Fault`] about the first mapping that it may not, with `EFAULT` for memory without readable pages and `EPERM` for writes
/// to what the program itself may not write.
pub(crate) fn admit(mappings: &[Mapping], access: Access) -> Result<(), DeviceError> {
    mappings.iter().try_for_each(|mapping| {
        let refuse = |why, errno| Err(DeviceError::Fault { range: mapping.range, why, errno });
        let may = mapping.protection;
        if mapping.backing == Backing::Special {
            refuse(
                "it is device memory or a page of the kernel's own; a device can only be given ordinary memory",
                libc::EFAULT,
            )
        } else if !(may.read || may.write || may.exec) {
            refuse("it is mapped without any permission (PROT_NONE)", libc::EFAULT)
        } else if !may.read {
            refuse("it is mapped without PROT_READ", libc::EFAULT)
        } else if access == Access::ReadWrite && !may.write {
            refuse("the device is to write, and it is mapped without PROT_WRITE; use Access::Read", libc::EPERM)
        } else {
            Ok(())
        }
    })
}

#[cfg(test)]
mod tests {
    use pinfold_invalidate::{HostRange, Protection, page_size};

    use super::*;

    fn mapping(page: usize, backing: Backing, rwx: [bool; 3]) -> Mapping {
        let range = HostRange::new(page * page_size(), page_size()).unwrap();
        let protection = Protection { read: rwx[0], write: rwx[1], exec: rwx[2] };
        Mapping { range, whole: range, protection, shared: false, backing, file: None, offset: 0 }
    }

    fn errno(mappings: &[Mapping], access: Access) -> Option<i32> {
        admit(mappings, access).err().map(|error| error.errno())
    }

    #[test]
    fn permissions_decide_who_may_do_what() {
        let cases = [
            ([true, true, false], None, None),
            ([true, false, false], None, Some(libc::EPERM)),
            ([false, true, false], Some(libc::EFAULT), Some(libc::EFAULT)),
            ([false, false, true], Some(libc::EFAULT), Some(libc::EFAULT)),
            ([false, false, false], Some(libc::EFAULT), Some(libc::EFAULT)),
        ];
        for (rwx, read, write) in cases {
            for backing in [Backing::Anonymous, Backing::Heap, Backing::Stack, Backing::SharedMemory, Backing::File] {
                assert_eq!(errno(&[mapping(1, backing, rwx)], Access::Read), read, "{rwx:?} {backing:?}");
                assert_eq!(errno(&[mapping(1, backing, rwx)], Access::ReadWrite), write, "{rwx:?} {backing:?}");
            }
            assert_eq!(errno(&[mapping(1, Backing::Special, rwx)], Access::Read), Some(libc::EFAULT), "{rwx:?}");
        }
    }

    #[test]
    fn the_fault_names_the_first_mapping_that_is_wrong() {
        let mappings = [
            mapping(1, Backing::Anonymous, [true, true, false]),
            mapping(2, Backing::Anonymous, [true, false, false]),
            mapping(3, Backing::Anonymous, [false, false, false]),
        ];
        match admit(&mappings, Access::ReadWrite) {
            Err(DeviceError::Fault { range, errno: libc::EPERM, .. }) => assert_eq!(range, mappings[1].range),
            other => panic!("{other:?}"),
        }
        match admit(&mappings, Access::Read) {
            Err(DeviceError::Fault { range, errno: libc::EFAULT, .. }) => assert_eq!(range, mappings[2].range),
            other => panic!("{other:?}"),
        }
    }
}
