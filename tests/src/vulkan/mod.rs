//! A real Vulkan device of the driver under test, on which every message of the validation layer is a failure.
//!
//! `PINFOLD_TEST_DRIVER` names the driver, `lavapipe` (the default), `lavapipe25` or `swiftshader`; `scripts/test` runs each test program once with each.
//! Jobs are what an engine submits: copies, fills, and a scan of any length, each with a timeline semaphore of its own. A job may hold: it is
//! submitted, and waits for the test.

mod driver;
mod gpu;
mod job;
mod scan;
mod scratch;

pub use driver::Driver;
pub use gpu::Gpu;
pub use job::Job;
pub use scratch::Scratch;

/// A [`Gpu`](crate::vulkan::Gpu) with the driver under test; where there is none, the calling test is skipped.
#[macro_export]
macro_rules! gpu {
    () => {
        match $crate::vulkan::Gpu::new() {
            Ok(gpu) => gpu,
            Err(why) => $crate::skip!("{why}"),
        }
    };
}
