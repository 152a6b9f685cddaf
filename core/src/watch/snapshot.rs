//! A value that posting reads while others replace it.
//!
//! Posting may neither wait, nor allocate, nor free. So it reads through a pointer, counted while it does, and never owns anything; whoever replaces
//! the value keeps the old one until it has seen a moment without readers. The order that makes this right is the usual pair of "store mine, then
//! look at yours": a reader counts itself, then loads the pointer; a writer swaps the pointer, then loads the count. Both being `SeqCst`, either
//! the reader sees the new value or the writer sees the reader.

use std::ptr;

use super::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use super::sync::{Mutex, lock, store_load_barrier};

/// A replaceable value, or none.
pub(super) struct Snapshot<T> {
    /// Null or from `Box::into_raw`. Written by whoever holds `replaced`.
    current: AtomicPtr<T>,
    /// Threads inside [`read`](Self::read).
    readers: AtomicUsize,
    /// Values that were current and that a reader may still look at. Also serialises the writers.
    /// Kept as pointers, as a `Box` would claim to be the only way to its value.
    replaced: Mutex<Vec<Retired<T>>>,
}

/// A value from `Box::into_raw` that isn't current any more. The atomic is only a pointer that is `Send`.
type Retired<T> = std::sync::atomic::AtomicPtr<T>;

/// Values nobody looks at any more. Freed where this is dropped: not under a lock.
#[must_use = "drop it after every lock is released"]
pub(super) struct Garbage<T>(Vec<Retired<T>>);

impl<T> Drop for Garbage<T> {
    fn drop(&mut self) {
        for value in self.0.drain(..) {
            // SAFETY: it is from `Box::into_raw`, was swapped out of `current` by one `replace`, and no reader can see it: whoever made this
            // garbage had seen that, or had exclusive access.
            drop(unsafe { Box::from_raw(value.into_inner()) });
        }
    }
}

impl<T: Send + Sync> Snapshot<T> {
    pub(super) fn empty() -> Self {
        Self {
            current: AtomicPtr::new(ptr::null_mut()),
            readers: AtomicUsize::new(0),
            replaced: Mutex::new(Vec::new()),
        }
    }

    /// Looks at the value, if there is one. Never waits, allocates or frees; a few nanoseconds where there is none.
    #[inline]
    pub(super) fn read<R>(&self, look: impl FnOnce(&T) -> R) -> Option<R> {
        // Relaxed: nothing is read through this pointer. A value set concurrently counts as set after this call.
        if self.current.load(Ordering::Relaxed).is_null() {
            return None;
        }
        let _reading = Reading::enter(&self.readers);
        let current = self.current.load(Ordering::SeqCst);
        // SAFETY: the pointer is null or from `Box::into_raw`. A value that was current after this thread had counted itself is freed only after a
        // load of `readers` that follows its replacement in the SeqCst order and answers 0, so not before `_reading` is dropped.
        let value = unsafe { current.as_ref() };
        value.map(look)
    }

    /// Whether there is a value.
    #[inline]
    pub(super) fn is_some(&self) -> bool {
        !self.current.load(Ordering::Relaxed).is_null()
    }

    /// Replaces the value. The caller drops what comes back when it holds no lock.
    pub(super) fn replace(&self, value: Option<Box<T>>) -> Garbage<T> {
        let new = value.map_or(ptr::null_mut(), Box::into_raw);
        let mut replaced = lock(&self.replaced);
        let old = self.current.swap(new, Ordering::SeqCst);
        if !old.is_null() {
            replaced.push(Retired::new(old));
        }
        store_load_barrier();
        // SeqCst: the writer's half of the pair in the module's head. It also acquires the readers' Release decrements.
        if self.readers.load(Ordering::SeqCst) == 0 {
            Garbage(std::mem::take(&mut *replaced))
        } else {
            Garbage(Vec::new())
        }
    }
}

impl<T> Drop for Snapshot<T> {
    fn drop(&mut self) {
        // `&mut self`: the last reader has left, and whatever handed over the exclusive access ordered it before us.
        let current = self.current.load(Ordering::Relaxed);
        if !current.is_null() {
            // SAFETY: a non-null `current` is from `Box::into_raw`, and nobody else can reach it through an exclusive borrow.
            drop(unsafe { Box::from_raw(current) });
        }
        drop(Garbage(std::mem::take(&mut *lock(&self.replaced))));
    }
}

/// One reader, counted until it is dropped (also by a panic).
struct Reading<'a>(&'a AtomicUsize);

impl<'a> Reading<'a> {
    fn enter(readers: &'a AtomicUsize) -> Self {
        // SeqCst: the reader's half of the pair in the module's head.
        readers.fetch_add(1, Ordering::SeqCst);
        store_load_barrier();
        Self(readers)
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        // Release: what was read is read before a writer sees the count fall.
        self.0.fetch_sub(1, Ordering::Release);
    }
}
