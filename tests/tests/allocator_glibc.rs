//! The hazards of memory that an allocator gives back, with the C library's allocator.

mod allocator;

use pinfold_tests::process::isolated;

#[global_allocator]
static ALLOCATOR: std::alloc::System = std::alloc::System;

#[test]
// rows (fake): peers/allocator-advises-under-its-lock
fn a_block_in_use_is_freed_while_completion_allocates() {
    isolated(|| {
        allocator::a_block_in_use_is_freed_while_completion_allocates(|| {});
    })
    .expect_return();
}

#[test]
// rows (fake): peers/flush-in-the-hook-under-the-heap-lock
fn a_storm_of_allocations_under_watched_blocks() {
    isolated(|| {
        allocator::a_storm_of_allocations_under_watched_blocks(|| {
            // By itself it may keep all: the first large block that a thread frees raises the size from which on blocks are mapped alone.
            // SAFETY: has no preconditions.
            unsafe { libc::malloc_trim(0) };
        });
    })
    .expect_return();
}
