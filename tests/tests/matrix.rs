//! Every kind of memory by every mutation, idle, busy and while being acquired, on the devices in software. The table is in the library; see there.

mod userptr;

use pinfold_tests::matrix::Situation;
use pinfold_tests::process::{Ending, isolated_case};
use pinfold_tests::{PATIENCE, skip};

use userptr::{Dma, Fake, matrix};

/// Passes on what was counted.
fn tell(ending: &Ending) {
    ending.output.lines().filter(|line| line.starts_with("verdicts")).for_each(|line| println!("{line}"));
    ending.expect_return();
}

#[test]
// rows (fake): xe/system-allocator-{malloc,mmap,new,…}-{race,fork-read,mlock,remap,remap-dontunmap,remap-ro,huge,shared,file}; selftests/uffd register-ioctls
fn each_cell_comes_to_what_the_table_says_on_the_scripted_device() {
    let _pool = matrix::huge_pages();
    let case = || {
        let verdicts = matrix::run(&Fake::new(), &Situation::ALL);
        assert_eq!((verdicts.not_pinnable, verdicts.crashes), (0, 0), "it takes everything and survives everything");
    };
    tell(&isolated_case("", 5 * PATIENCE, case));
}

#[test]
// rows (dma): xe/system-allocator-{malloc,mmap,new,…}-{race,fork-read,mlock,remap,remap-dontunmap,remap-ro,huge,shared,file}; selftests/uffd register-ioctls
// rows (dma): selftests/uffd wp-fork{,-with-event}, wp-fork-pin{,-with-event}; selftests/hmm anon_write_child{,_shared}, hmm_cow_in_device
// rows (dma): selftests/hmm anon_{read,write}{,_prot,_huge}, file_{read,write}
fn each_cell_comes_to_what_the_table_says_on_the_device_that_pins() {
    let _pool = matrix::huge_pages();
    let case = || match Dma::new() {
        Ok(rig) => {
            let verdicts = matrix::run(&rig, &Situation::ALL);
            assert!(verdicts.not_pinnable > 0 && verdicts.crashes == 0, "{verdicts:?}");
        }
        Err(e) => skip!("no io_uring here: {e}"),
    };
    tell(&isolated_case("", 5 * PATIENCE, case));
}
