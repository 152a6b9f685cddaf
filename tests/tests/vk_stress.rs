//! The same stress as on the other devices, on a real driver with the validation layer watching.

mod userptr;

use pinfold_tests::process::isolated_case;
use pinfold_tests::vulkan::Gpu;
use pinfold_tests::{PATIENCE, gpu};

use userptr::oracle;
use userptr::vulkan::Vulkan;

#[test]
// rows: selftests/uffd-stress; peers/corruption-without-a-trace; xe/userptr-invalidate-race
// rows: xe/threads-{userptr-invalidate,userptr-invalidate-race,rebind-err}
fn no_driver_reads_what_a_mutation_that_has_returned_took_away() {
    let time = oracle::time(500);
    let pool = oracle::huge_pages();
    for backing in oracle::backings(pool.as_ref()) {
        let case = move || {
            drop(gpu!());
            oracle::life(|| Vulkan::new(Gpu::new().unwrap()), backing, time);
        };
        oracle::tell(&isolated_case(&format!("{backing:?}"), time + 2 * PATIENCE, case));
    }
}
