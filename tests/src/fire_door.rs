//! The allocator that ends a test program when the event path allocates or frees.
//!
//! A test program opts in with
//!
//! ```
//! #[global_allocator]
//! static ALLOCATOR: pinfold_tests::fire_door::FireDoorAllocator = pinfold_tests::fire_door::FireDoorAllocator;
//! ```
//!
//! The breach is reported by one `write` and ended by `abort`: nothing on the way may allocate, as that is what is forbidden.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use pinfold_invalidate::on_event_path;

thread_local! {
    // `const`: reading them allocates nothing and needs no destructor, so the allocator may.
    static CALLS: Cell<u64> = const { Cell::new(0) };
    static REHEARSAL: Cell<bool> = const { Cell::new(false) };
}

/// The system's allocator behind a check.
#[derive(Debug, Clone, Copy, Default)]
pub struct FireDoorAllocator;

impl FireDoorAllocator {
    fn check(message: &'static str) {
        // A thread whose locals are gone already is not the monitor.
        let _ = CALLS.try_with(|calls| calls.set(calls.get() + 1));
        if on_event_path() || REHEARSAL.try_with(Cell::get).unwrap_or(false) {
            // SAFETY: the buffer is `message`, and its length is its length.
            unsafe { libc::write(libc::STDERR_FILENO, message.as_ptr().cast(), message.len()) };
            std::process::abort();
        }
    }
}

// SAFETY: every call is passed on to the system's allocator with its own arguments; the check before it touches no memory of either.
unsafe impl GlobalAlloc for FireDoorAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::check("fire door: something allocates on the event path\n");
        // SAFETY: the caller keeps the contract of `GlobalAlloc::alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::check("fire door: something allocates on the event path\n");
        // SAFETY: as in `alloc`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Self::check("fire door: something reallocates on the event path\n");
        // SAFETY: as in `alloc`; the block came from here, so from the system's allocator.
        unsafe { System.realloc(block, layout, size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        Self::check("fire door: something frees on the event path\n");
        // SAFETY: as in `realloc`.
        unsafe { System.dealloc(block, layout) }
    }
}

/// How often the calling thread has allocated, reallocated or freed. 0 for ever if the program doesn't use [`FireDoorAllocator`].
#[must_use]
pub fn calls_of_this_thread() -> u64 {
    CALLS.get()
}

/// Runs `body` as if it were the event path. If it returns, it neither allocated nor freed, or the program uses another allocator.
pub fn rehearse<T>(body: impl FnOnce() -> T) -> T {
    struct Over;
    impl Drop for Over {
        fn drop(&mut self) {
            REHEARSAL.set(false);
        }
    }
    REHEARSAL.set(true);
    let _over = Over;
    body()
}
