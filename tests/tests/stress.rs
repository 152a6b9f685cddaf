//! Every kind of memory under four mutators and four submitters: no stale read, no hang, nothing left behind. `PINFOLD_STRESS_MS` says how long each.

mod userptr;

use pinfold_tests::memory::Backing;
use pinfold_tests::process::isolated_case;
use pinfold_tests::{PATIENCE, skip};

use userptr::{Dma, Fake, Rig, oracle};

#[test]
// rows (dma): selftests/uffd-stress; peers/corruption-without-a-trace; xe/userptr-invalidate-race
// rows (dma): xe/threads-{userptr-invalidate,userptr-invalidate-race,rebind-err}
fn no_device_that_pins_reads_what_a_mutation_that_has_returned_took_away() {
    let time = oracle::time(2_000);
    let pool = oracle::huge_pages();
    for backing in oracle::backings(pool.as_ref()) {
        let case = move || match Dma::new() {
            Ok(rig) if matches!(backing, Backing::AnonymousShared | Backing::HugeTlb) && !rig.spans_files() => {
                println!("{backing:?} is of several files after a mutation, which can't be pinned");
            }
            Ok(rig) if rig.takes(backing) => {
                drop(rig);
                oracle::life(|| Dma::new().unwrap(), backing, time);
            }
            Ok(_) => println!("{backing:?} can't be pinned"),
            Err(e) => skip!("no io_uring here: {e}"),
        };
        oracle::tell(&isolated_case(&format!("{backing:?}"), time + 2 * PATIENCE, case));
    }
}

#[test]
// rows (fake): selftests/uffd-stress; xe/threads-{userptr-invalidate,userptr-invalidate-race,rebind-err}
fn no_device_that_copies_keeps_what_a_mutation_that_has_returned_took_away() {
    let time = oracle::time(500);
    let pool = oracle::huge_pages();
    for backing in oracle::backings(pool.as_ref()) {
        let case = move || oracle::life(Fake::new, backing, time);
        oracle::tell(&isolated_case(&format!("{backing:?}"), time + 2 * PATIENCE, case));
    }
}
