//! The hazards of memory that an allocator gives back, with the C library's allocator.

mod allocator;

use pinfold_tests::process::isolated;

#[global_allocator]
static ALLOCATOR: std::alloc::System = std::alloc::System;

/// Blocks of any size lie in heaps of the library's own, and the free end of one is given back, under its lock. By itself the library may keep all:
/// each large block that is freed raises the size from which on blocks are mapped alone, and the free end that is kept.
fn give_back_what_is_free() {
    for (parameter, bytes) in [(libc::M_MMAP_THRESHOLD, 32 << 20), (libc::M_TRIM_THRESHOLD, 64 << 10)] {
        // SAFETY: has no preconditions.
        assert_eq!(unsafe { libc::mallopt(parameter, bytes) }, 1, "parameter {parameter}");
    }
}

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
        give_back_what_is_free();
        allocator::a_storm_of_allocations_under_watched_blocks(|| {
            // What is free between blocks; the library does this by itself with what is free behind the last one.
            // SAFETY: has no preconditions.
            unsafe { libc::malloc_trim(0) };
        });
    })
    .expect_return();
}
