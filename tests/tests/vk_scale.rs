//! Ten thousand objects on a real driver, or as many as the driver allows, and the clear error behind the last one.

use pinfold_invalidate::page_size;
use pinfold_tests::memory::{Backing, Region};
use pinfold_tests::process::isolated;
use pinfold_tests::{PATIENCE, gpu, skip_part};
use pinfold_vulkan::{Access, Config, Error, Manager, State};

const OBJECTS: usize = 10_000;

#[test]
// rows: igt/sync-unmap
fn ten_thousand_objects_are_imported_and_invalidated_by_one_munmap() {
    isolated(|| {
        let gpu = gpu!();
        // SAFETY: the handles belong together, and the manager goes before the device.
        let manager = unsafe { Manager::new(gpu.context(), Config::default()) }.unwrap();
        let allowed = manager.capabilities().max_allocations as usize;
        let region = Region::new(Backing::Anonymous, OBJECTS).unwrap();
        let mut objects = Vec::new();
        for page in 0..OBJECTS {
            // SAFETY: no reference points into a region, and no work is submitted.
            let object = unsafe { manager.register(region.part(page..page + 1), Access::Read) }.unwrap();
            match manager.acquire_timeout(&[&object], PATIENCE) {
                Ok(lease) => assert_eq!(lease.view(0).size, page_size() as u64),
                Err(Error::Budget { available, .. }) if objects.len() + 64 >= allowed => {
                    skip_part!("the driver allows {allowed} allocations: {} objects, {available} left", objects.len());
                    break;
                }
                Err(other) => panic!("object {page}: {other}"),
            }
            objects.push(object);
        }
        assert!(objects.len() == OBJECTS || objects.len() + 64 >= allowed, "{} objects", objects.len());
        region.unmap_all().unwrap();
        for object in &objects {
            assert_eq!(object.state().unwrap(), State::Invalid);
        }
        let stats = manager.stats();
        assert_eq!((stats.invalidated as usize >= objects.len(), stats.late), (true, 0));
        drop(objects);
        drop(manager);
    })
    .expect_return();
}
