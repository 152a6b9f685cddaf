//! Shorthands of the tests that tell the scripted device what to answer.

use std::convert::Infallible;

use pinfold_core::{Lease, Pending, SubmitError, Userptr};
use pinfold_tests::PATIENCE;
use pinfold_tests::fake::FakeDevice;
use pinfold_tests::fence::Fence;
use pinfold_tests::memory::{Backing, Region};

use super::{Fake, patient};

/// No acquisition on the calling thread.
pub fn by_workers() -> Fake {
    let mut config = patient();
    config.inline_limit = 0;
    Fake::with(config)
}

pub fn anonymous(pages: usize) -> Region {
    Region::new(Backing::Anonymous, pages).unwrap()
}

pub fn lease(rig: &Fake, object: &Userptr<FakeDevice>) -> Lease<FakeDevice> {
    rig.manager.acquire_timeout(&[object], PATIENCE).unwrap()
}

/// Submits nothing that would be over before the fence is signalled.
pub fn submit(
    lease: Lease<FakeDevice>,
    fences: &[Fence],
) -> Result<Pending<FakeDevice>, SubmitError<FakeDevice, Infallible>> {
    // SAFETY: nothing is submitted, so nothing accesses the objects.
    unsafe { lease.submit(fences.iter().cloned(), || Ok(())) }
}
