//! Objects that share a limited budget.

use pinfold_core::{Device, Error, Lease, Manager, State, Userptr, page_size};
use pinfold_tests::PATIENCE;
use pinfold_tests::fake::FakeDevice;
use pinfold_tests::memory::{Backing, Region};

use super::{Fake, patient, register};

/// A budget of so many pages, and one-page objects over a region of so many.
pub fn with_budget(budget: usize, objects: usize) -> (Fake, Region, Vec<Userptr<FakeDevice>>) {
    let mut config = patient();
    config.budget = (budget * page_size()) as u64;
    config.close_limit = 4 * PATIENCE; // so that who forgets to say that it has let go is found out
    let rig = Fake::with(config);
    let region = Region::new(Backing::Anonymous, objects).unwrap();
    let objects = (0..objects).map(|page| register(&rig.manager, region.part(page..page + 1))).collect();
    (rig, region, objects)
}

pub fn lease<D: Device>(manager: &Manager<D>, object: &Userptr<D>) -> Lease<D> {
    manager.acquire_timeout(&[object], PATIENCE).unwrap()
}

/// Which objects are valid, one letter each.
pub fn valid(objects: &[Userptr<FakeDevice>]) -> String {
    objects.iter().map(|object| if object.state().unwrap() == State::Valid { 'V' } else { '-' }).collect()
}

pub fn is_budget<T>(result: Result<T, Error>, needed: usize, left: usize) {
    match result.map(drop).expect_err("no room") {
        Error::Budget { needed: said, available, .. } => {
            assert_eq!((said, available), ((needed * page_size()) as u64, (left * page_size()) as u64));
        }
        error => panic!("{error}"),
    }
}
