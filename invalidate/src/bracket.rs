//! The bracket: a mutation done through us has an exact beginning and an exact end.
//!
//! **Problem.** An event has a beginning (the mutator waits) but no end: after the read the mutator zaps pages at its leisure. And truncation,
//! hole punching and guard pages send no event at all.
//!
//! **Law.** While the mutation runs, nothing uses the ranges and nothing over them can become valid.
//!
//! **Protocol.** *Close every gate → wait until nobody is inside → wait until the affected shards are quiet, or the deadline → tell the targets
//! → unregister the ranges → mutate → open every gate*, the opening in a guard so that a panic opens too. Every gate, because pages nobody
//! watches yet belong to no shard: an acquisition that is under way over them must be met as well, and it meets whichever gate it looks at.

use std::cell::Cell;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::HostRange;
use crate::event_path::EventPath;
use crate::monitor::{announce, quiesce};
use crate::space::{Cause, Change, Inner, Shards};

/// The bracket was not opened, and the mutation has not run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum MutateError {
    /// This thread is inside a bracket already, where every gate is closed: it would wait for itself.
    #[error("already inside a bracket on this thread; do the whole mutation in one bracket, naming all its ranges")]
    Nested,
    /// This process is a forked child of the one the handle belongs to.
    #[error("this handle belongs to the parent process; a forked child has to make its own")]
    Forked,
}

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Whether the calling thread is inside a bracket, where waiting for a gate would be waiting for itself.
#[must_use]
#[inline]
pub fn in_bracket() -> bool {
    INSIDE.get()
}

pub(crate) fn mutate<R>(inner: &Inner, ranges: &[HostRange], f: impl FnOnce() -> R) -> Result<R, MutateError> {
    check(inner)?;
    let closed = Closed::all(inner);
    let begun = Instant::now();
    let deadline = begun + inner.deadline();
    {
        let _mark = EventPath::enter();
        let mut late = false;
        for number in Shards::ALL.iter() {
            late |= !inner.shards[number].gate.wait_users(Some(deadline));
        }
        // With nobody inside, the targets' shards can't change to ones we don't see.
        let mut affected = Shards::NONE;
        for &range in ranges {
            inner.index.visit_overlapping(range, |entry| affected = affected.union(entry.value.shards()));
        }
        for number in affected.iter() {
            late |= !quiesce(inner, &inner.shards[number], deadline);
        }
        for &range in ranges {
            announce(inner, &change(range, Cause::Bracket, begun.elapsed(), late));
        }
    }
    for &range in ranges {
        inner.unregister(range);
    }
    inner.counters.brackets.fetch_add(1, Ordering::Relaxed);
    let result = f();
    drop(closed);
    Ok(result)
}

pub(crate) fn invalidate(inner: &Inner, range: HostRange, cause: Cause) -> Result<(), MutateError> {
    check(inner)?;
    let _closed = Closed::all(inner);
    let _mark = EventPath::enter();
    let deadline = Instant::now() + inner.deadline();
    // Whoever is inside may have looked already: it must have left, or the use it is about to begin would be one of the old contents.
    let late = !Shards::ALL.iter().all(|number| inner.shards[number].gate.wait_users(Some(deadline)));
    announce(inner, &change(range, cause, Duration::ZERO, late));
    Ok(())
}

fn check(inner: &Inner) -> Result<(), MutateError> {
    if inner.fork.is_child() {
        return Err(MutateError::Forked);
    }
    if in_bracket() {
        return Err(MutateError::Nested);
    }
    Ok(())
}

fn change(range: HostRange, cause: Cause, held: Duration, late: bool) -> Change {
    Change { range, cause, held, late, no_hold: false }
}

/// Every gate, closed until dropped.
struct Closed<'a>(&'a Inner);

impl<'a> Closed<'a> {
    fn all(inner: &'a Inner) -> Self {
        INSIDE.set(true);
        inner.close(Shards::ALL);
        Self(inner)
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        for shard in &self.0.shards {
            shard.gate.open();
        }
        self.0.owes.settling();
        INSIDE.set(false);
    }
}
