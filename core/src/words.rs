//! Copies between private memory and memory that others write, by relaxed atomic words.
//!
//! Bytes that a device or another process may write meanwhile must never be behind a reference: what the compiler assumes of references is
//! not true of them. So whole words of 8 bytes are loaded and stored, all of one size, and what races is a mixture of old and new words.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of one access.
pub(crate) const WORD: usize = size_of::<AtomicU64>();

/// Memory that is accessed by words.
#[derive(Clone, Copy)]
pub(crate) struct Words<'a>(&'a [AtomicU64]);

impl<'a> Words<'a> {
    /// The words of `len` bytes at `start`; what doesn't fill a word at the end is left out.
    ///
    /// # Safety
    /// 1. The bytes are mapped for `'a`, and `start` is aligned to 8.
    /// 2. They are only accessed by words in this process, as long as this value is used; others may access them as they like.
    /// 3. If they are mapped read-only, only [`read`](Self::read) is called.
    pub(crate) unsafe fn new(start: NonNull<u8>, len: usize) -> Self {
        let words = NonNull::slice_from_raw_parts(start.cast(), len / WORD);
        // SAFETY: mapped, aligned and alive (1); every bit pattern is an `AtomicU64`, and others may write; read-only memory is only loaded from (3).
        Self(unsafe { words.as_ref() })
    }

    /// How many bytes they are.
    pub(crate) fn len(self) -> usize {
        self.0.len() * WORD
    }

    /// Whether the bytes are inside.
    pub(crate) fn holds(self, offset: usize, len: usize) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.len())
    }

    /// Copies the bytes from `offset` on, which are inside.
    pub(crate) fn read(self, offset: usize, into: &mut [u8]) {
        let (mut first, within) = (offset / WORD, offset % WORD);
        let (head, rest) = into.split_at_mut(head(within, into.len()));
        if !head.is_empty() {
            head.copy_from_slice(&load(&self.0[first])[within..within + head.len()]);
            first += 1;
        }
        let (body, tail) = rest.as_chunks_mut::<WORD>();
        let last = first + body.len();
        body.iter_mut().zip(&self.0[first..last]).for_each(|(to, word)| *to = load(word));
        if !tail.is_empty() {
            tail.copy_from_slice(&load(&self.0[last])[..tail.len()]);
        }
    }

    /// Copies `from` to `offset`; all of it fits. What others write beside it meanwhile, into the same word, stays.
    pub(crate) fn write(self, offset: usize, from: &[u8]) {
        let (mut first, within) = (offset / WORD, offset % WORD);
        let (head, rest) = from.split_at(head(within, from.len()));
        if !head.is_empty() {
            merge(&self.0[first], within, head);
            first += 1;
        }
        let (body, tail) = rest.as_chunks::<WORD>();
        let last = first + body.len();
        // Relaxed: what orders the bytes for a reader is what tells it that they are there.
        let store = |(from, word): (&[u8; WORD], &AtomicU64)| word.store(u64::from_ne_bytes(*from), Ordering::Relaxed);
        body.iter().zip(&self.0[first..last]).for_each(store);
        if !tail.is_empty() {
            merge(&self.0[last], 0, tail);
        }
    }
}

/// How many of `len` bytes, the first of which is `within` a word, belong to that word; none if it can be accessed as a whole.
fn head(within: usize, len: usize) -> usize {
    if within == 0 { 0 } else { len.min(WORD - within) }
}

#[inline]
fn load(word: &AtomicU64) -> [u8; WORD] {
    // Relaxed: as in `write`.
    word.load(Ordering::Relaxed).to_ne_bytes()
}

/// Replaces the bytes of a word from `at` on.
fn merge(word: &AtomicU64, at: usize, bytes: &[u8]) {
    let merged = |old: u64| {
        let mut new = old.to_ne_bytes();
        new[at..at + bytes.len()].copy_from_slice(bytes);
        Some(u64::from_ne_bytes(new))
    };
    // Relaxed: as in `write`. The closure never answers None.
    let _ = word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, merged);
}
