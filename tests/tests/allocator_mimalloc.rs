//! The hazards of memory that an allocator gives back, with mimalloc, which gives back late, unless it is asked.

mod allocator;

use pinfold_tests::process::isolated;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

unsafe extern "C" {
    /// Gives what is unused back to the system, now.
    fn mi_collect(force: bool);
}

fn give_back() {
    // SAFETY: mimalloc's own function, which any thread may call at any time.
    unsafe { mi_collect(true) };
}

#[test]
// rows (fake): peers/allocator-advises-under-its-lock
fn a_block_in_use_is_freed_while_completion_allocates() {
    isolated(|| {
        allocator::a_block_in_use_is_freed_while_completion_allocates(give_back);
    })
    .expect_return();
}

#[test]
// rows (fake): peers/flush-in-the-hook-under-the-heap-lock
fn a_storm_of_allocations_under_watched_blocks() {
    isolated(|| {
        allocator::a_storm_of_allocations_under_watched_blocks(give_back);
    })
    .expect_return();
}
