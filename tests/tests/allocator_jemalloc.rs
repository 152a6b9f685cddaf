//! The hazards of memory that an allocator gives back, with jemalloc, told to give pages back at once.

mod allocator;

use pinfold_tests::process::isolated;

/// Read by jemalloc when it starts: unused pages go back to the system at once, by `madvise`.
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static CONFIGURATION: &[u8; 34] = b"dirty_decay_ms:0,muzzy_decay_ms:0\0";

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

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
        allocator::a_storm_of_allocations_under_watched_blocks(|| {});
    })
    .expect_return();
}
