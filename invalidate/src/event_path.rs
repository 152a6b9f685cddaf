//! The fire door: a mark on the thread that stands between a held mutator and its freedom.
//!
//! **Problem.** While an event is being handled, some thread of the program sleeps inside `munmap` or `madvise`. It may hold the allocator's
//! lock. If the handler allocates, it waits for that lock; if it frees, the allocator may unmap, and that waits for the handler itself.
//!
//! **Law.** Behind the door nothing allocates, frees, logs, takes a lock that is ever held across one of these, or calls a driver.
//!
//! **Protocol.** The handler marks itself. A global allocator (a test's, or an engine's own in debug builds) asks [`on_event_path`] and
//! aborts when the law is broken; so the law is enforced by running, not by reading.

use std::cell::Cell;

thread_local! {
    // `const`: neither the first access nor the thread's end allocates or runs a destructor.
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// Whether the calling thread is handling an event, so that it must not allocate or free. For use in a `#[global_allocator]`.
#[must_use]
pub fn on_event_path() -> bool {
    DEPTH.get() != 0
}

/// Marks the thread until dropped.
#[derive(Debug)]
pub(crate) struct EventPath(());

impl EventPath {
    pub(crate) fn enter() -> Self {
        DEPTH.set(DEPTH.get() + 1);
        Self(())
    }
}

impl Drop for EventPath {
    fn drop(&mut self) {
        DEPTH.set(DEPTH.get() - 1);
    }
}
