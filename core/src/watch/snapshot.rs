//! A value that posting reads while others replace it.
//!
//! Posting may neither wait, nor allocate, nor free. So it reads through a pointer, having said that it looks, and never owns anything; whoever
//! replaces the value keeps the old one until it has seen a moment when nobody looks. The order that makes this right is the usual pair of "store
//! mine, then look at yours": a reader says that it looks, then loads the pointer; a writer swaps the pointer, then looks who looks. With a barrier
//! between the two steps on both sides, either the reader sees the new value or the writer sees the reader.

use std::marker::PhantomData;
use std::ptr;

use super::barrier;
use super::seat::{self, Looking};
use super::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use super::sync::{Mutex, lock};

/// A replaceable value, or none.
pub(super) struct Snapshot<T> {
    /// Null or from `Box::into_raw`. Written by whoever holds `replaced`.
    current: AtomicPtr<T>,
    /// Threads inside [`read`](Self::read) that have no seat to say so.
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
        barrier::prepare();
        seat::prepare();
        Self {
            current: AtomicPtr::new(ptr::null_mut()),
            readers: AtomicUsize::new(0),
            replaced: Mutex::new(Vec::new()),
        }
    }

    /// Looks at the value, where that is said in a few steps: otherwise `None`, and [`read`](Self::read) finds a way.
    #[inline]
    pub(super) fn look(&self) -> Option<Look<'_, T>> {
        let looking = Looking::just_at(ptr::from_ref(self).cast())?;
        barrier::passed_free().then(|| {
            // Acquire: as in `look_said`.
            let value = self.current.load(Ordering::Acquire);
            Look { value, _looking: looking, _snapshot: PhantomData }
        })
    }

    /// Looks at the value, if there is one; [`is_some`](Self::is_some) says so for less. Never waits, allocates or frees.
    #[inline]
    pub(super) fn read<R>(&self, look: impl FnOnce(&T) -> R) -> Option<R> {
        match Looking::at(ptr::from_ref(self).cast()) {
            Some(_looking) => self.look_said(look),
            None => self.read_counted(look),
        }
    }

    /// The same without a seat.
    #[cold]
    fn read_counted<R>(&self, look: impl FnOnce(&T) -> R) -> Option<R> {
        let _counted = Counted::enter(&self.readers);
        self.look_said(look)
    }

    /// The caller has said that it looks, and does until this is over.
    #[inline]
    fn look_said<R>(&self, look: impl FnOnce(&T) -> R) -> Option<R> {
        barrier::light();
        // Acquire: pairs with the swap in `replace`; who sees the pointer sees the value.
        let current = self.current.load(Ordering::Acquire);
        // SAFETY: the pointer is null or from `Box::into_raw`. A value that was current after this thread had said that it looks, and passed the
        // barrier, is freed only after a look around that follows its replacement and a barrier, and finds nobody: not before the caller takes back its word.
        let value = unsafe { current.as_ref() };
        value.map(look)
    }

    /// Whether there is a value.
    #[inline]
    pub(super) fn is_some(&self) -> bool {
        // Relaxed: nothing is read through this pointer. A value set concurrently counts as set after this call.
        !self.current.load(Ordering::Relaxed).is_null()
    }

    /// Replaces the value. The caller drops what comes back when it holds no lock.
    pub(super) fn replace(&self, value: Option<Box<T>>) -> Garbage<T> {
        let new = value.map_or(ptr::null_mut(), Box::into_raw);
        let mut replaced = lock(&self.replaced);
        // AcqRel: publishes the value, and takes over the old one from whoever published that.
        let old = self.current.swap(new, Ordering::AcqRel);
        if !old.is_null() {
            replaced.push(Retired::new(old));
        }
        // Nothing to free: nobody needs to be asked.
        if replaced.is_empty() {
            return Garbage(Vec::new());
        }
        barrier::heavy();
        // Acquire: pairs with the Release of the readers' last step.
        let counted = self.readers.load(Ordering::Acquire) > 0;
        if counted || seat::is_looked_at(ptr::from_ref(self).cast()) {
            Garbage(Vec::new())
        } else {
            Garbage(std::mem::take(&mut *replaced))
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

/// A thread looks at a snapshot's value, until this is dropped.
pub(super) struct Look<'a, T> {
    /// Null, or what was current after this thread had said that it looks, and had passed the barrier. A pointer, as the value may be freed as soon as the
    /// word is taken back, and a function that takes a reference keeps it to its end.
    value: *const T,
    _looking: Looking,
    _snapshot: PhantomData<&'a Snapshot<T>>,
}

impl<T> Look<'_, T> {
    #[inline]
    pub(super) fn value(&self) -> Option<&T> {
        // SAFETY: the pointer is null or from `Box::into_raw`. As in `look_said`, the value isn't freed before the word is taken back, and that ends the borrow; nor
        // with the snapshot, which is borrowed.
        unsafe { self.value.as_ref() }
    }
}

/// One reader without a seat, counted until it is dropped (also by a panic).
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn enter(readers: &'a AtomicUsize) -> Self {
        // Relaxed: the barrier that follows orders it before the look.
        readers.fetch_add(1, Ordering::Relaxed);
        Self(readers)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        // Release: what was read is read before a writer sees the count fall.
        self.0.fetch_sub(1, Ordering::Release);
    }
}
