//! Beginning and ending the watch over pages: which shard, what can be watched, and what is said when it can't.

use std::io;
use std::time::Duration;

use thiserror::Error;

use crate::HostRange;
use crate::maps::{Backing, Mapping, MapsError, mappings};
use crate::space::{Inner, NO_HOLD, SHARDS, Shards, Space};
use crate::uffd::Uffd;

/// How well a range is watched. Whatever is less than [`Watched`](Self::Watched) has a reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Coverage {
    /// Unmapping, moving and discarding are noticed, and held until uses have ended.
    Watched,
    /// Nothing is noticed: mutations must go through [`Space::mutate`] or be told by [`Space::invalidate`].
    Manual(ManualReason),
    /// Mutations are noticed, but the mutator is let go at once: uses that are under way see them.
    NoHold(NoHoldReason),
}

/// Why a range isn't watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ManualReason {
    /// A shared mapping that can never be written (of a read-only descriptor or a write-sealed memfd): the kernel refuses with `EPERM`. Map it
    /// privately, or through a writable descriptor.
    SharedReadOnly,
    /// The pages belong to another userfaultfd, which the kernel allows once (`EBUSY`).
    Foreign,
    /// This kernel's userfaultfd can't watch this kind of mapping (`EINVAL`): shared memory needs Linux 5.19, files need 6.7.
    Unsupported,
    /// There is no userfaultfd for this process (old kernel, seccomp filter).
    NoUserfaultfd,
    /// The caller said so when it registered.
    Asked,
}

/// Why a mutator isn't held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum NoHoldReason {
    /// `[heap]`: the C library trims it while it holds the lock that the device's driver may be waiting for.
    Heap,
    /// The main thread's stack.
    Stack,
}

/// A range that is watched as well as it can be.
#[derive(Debug, Clone)]
pub struct Watched {
    /// The shards in which uses of the range must be counted. Never empty, so that brackets find the uses of unwatched ranges too.
    pub shards: Shards,
    /// How well.
    pub coverage: Coverage,
    /// The mappings as they were when the watch had begun. What changes from then on is noticed.
    pub mappings: Vec<Mapping>,
}

/// The range can't be watched now.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WatchError {
    /// There is a hole, or the list of mappings can't be read.
    #[error(transparent)]
    Maps(#[from] MapsError),
    /// A watch over part of a mapping splits it, and the process has as many mappings as it may.
    #[error(
        "can't watch {range}: the process has used up vm.max_map_count (now {limit}); raise it, or watch larger ranges"
    )]
    TooManyMappings {
        /// The range.
        range: HostRange,
        /// The system's limit on mappings per process; 0 if it can't be read.
        limit: usize,
    },
    /// The mappings change just now, so nobody can say what is watched. Try again.
    #[error("the mappings of {range} change while it is being watched; try again")]
    Moving {
        /// The range.
        range: HostRange,
    },
    /// The kernel refused for a reason that is not known to occur.
    #[error("can't watch {range}: {source}")]
    Refused {
        /// The range.
        range: HostRange,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Space {
    /// Watches the pages of a range and says how well. Idempotent; needed again after each mutation, as new mappings aren't watched.
    ///
    /// Populate the pages before: in a watched range the kernel maps untouched page-cache and shared pages one by one. When this returns, every
    /// mutation of the range that had been in flight is over or its event has been queued (registration takes the address space's lock for
    /// writing).
    ///
    /// # Errors
    /// [`WatchError`]; pages watched before remain so.
    pub fn watch(&self, range: HostRange) -> Result<Watched, WatchError> {
        self.watch_as(range, &mappings(range)?)
    }

    /// As [`watch`](Self::watch), for a caller who has just asked for the [`mappings`] of the range and will compare them with
    /// [`Watched::mappings`]: what has changed in between may be watched otherwise than it should.
    ///
    /// # Errors
    /// As [`watch`](Self::watch).
    pub fn watch_as(&self, range: HostRange, known: &[Mapping]) -> Result<Watched, WatchError> {
        let inner = &*self.inner;
        let mut watched = Watched { shards: Shards::NONE, coverage: Coverage::Watched, mappings: Vec::new() };
        let mut ledger = inner.ledger();
        let mut registered = Vec::with_capacity(known.len());
        for mapping in known {
            let piece = mapping.range;
            let owner = ledger.watched(piece).next().map(|(_, shard)| shard);
            let (reason, first) = match mapping.backing {
                Backing::Heap => (Some(NoHoldReason::Heap), NO_HOLD),
                Backing::Stack => (Some(NoHoldReason::Stack), NO_HOLD),
                _ => (None, owner.unwrap_or(Inner::home(piece))),
            };
            match inner.register(piece, mapping.backing, first) {
                Ok(shard) => {
                    ledger.watch(piece, shard);
                    registered.push((piece, shard));
                    watched.shards = watched.shards.union(Shards::one(shard));
                    // Once a part of the stack is watched, the kernel doesn't call it so any more; the shard tells.
                    let reason = reason.or((shard == NO_HOLD).then_some(NoHoldReason::Stack));
                    // By the shard and not by the name alone: what a watch splits off the stack's mapping has lost the name.
                    if shard == NO_HOLD && watched.coverage == Coverage::Watched {
                        watched.coverage = Coverage::NoHold(reason.unwrap_or(NoHoldReason::Stack));
                    }
                }
                Err(Refusal::Can(error)) => return Err(error),
                Err(Refusal::Never(reason)) => {
                    watched.shards = watched.shards.union(Shards::one(first));
                    watched.coverage = Coverage::Manual(reason); // the least there is, so it stands for the whole range
                }
            }
        }
        // Registering passes over holes in silence, and what somebody puts into a hole later is not watched. So each mapping is asked whether it
        // is watched, and must be there still after that: if it was and is not any more, an event tells.
        let seen = mappings(range)?;
        let shard_of = |at| registered.iter().find(|(piece, _)| piece.contains(at)).map(|&(_, shard)| shard);
        let is_watched = |mapping: &Mapping| {
            let at = mapping.range.start();
            let uffd = shard_of(at).and_then(|shard| inner.shards[shard].uffd.as_ref());
            uffd.is_none_or(|uffd| uffd.watches(at))
        };
        let all = seen.iter().all(is_watched);
        watched.mappings = mappings(range)?;
        if all && watched.mappings == seen { Ok(watched) } else { Err(WatchError::Moving { range }) }
    }

    /// Runs `f` while no page of the range is watched, for mappings that must not inherit a watch. Every target over the range is invalidated,
    /// as mutations in between go unnoticed.
    ///
    /// # Errors
    /// As [`mutate`](Self::mutate).
    pub fn unwatched<R>(&self, range: HostRange, f: impl FnOnce() -> R) -> Result<R, crate::MutateError> {
        self.mutate(&[range], f)
    }

    /// Takes back the write protection of what is watched in the range, which trackers of writes put there. What isn't mapped is passed over.
    pub(crate) fn unprotect(&self, range: HostRange) -> io::Result<()> {
        /// How often a mutation in flight may be in the way, and the pause after it. A hold-off lasts 100 ms at most by default.
        const TRIES: u32 = 1000;
        const PAUSE: Duration = Duration::from_micros(200);
        let inner = &*self.inner;
        let pieces: Vec<_> = inner.ledger().watched(range).collect();
        for (piece, shard) in pieces {
            let Some(uffd) = &inner.shards[shard].uffd else { continue };
            // One call stops at the first hole, so each mapping has its own.
            let whole = |there: Vec<Mapping>| there.into_iter().map(|mapping| mapping.range).collect();
            let there: Vec<_> = mappings(piece).map_or_else(|_| piece.pages_of().collect(), whole);
            for part in there {
                let mut tries = 0;
                loop {
                    match uffd.unprotect(part) {
                        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && tries < TRIES => {
                            tries += 1;
                            std::thread::sleep(PAUSE);
                        }
                        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => return Err(error),
                        _ => break, // done, or nothing of ours is mapped there any more
                    }
                }
            }
        }
        Ok(())
    }

    /// Ends the watch over what no target but `id` covers.
    pub(crate) fn unwatch_rest(&self, range: HostRange, id: u64) {
        let inner = &*self.inner;
        let mut ledger = inner.ledger();
        let mut others = Vec::new();
        inner.index.visit_overlapping(range, |entry| {
            if entry.id != id {
                others.extend(entry.range.intersection(range));
            }
        });
        others.sort_unstable();
        let mut at = range.start();
        let mut alone = Vec::new();
        for other in others {
            if other.start() > at {
                alone.extend(HostRange::new(at, other.start() - at));
            }
            at = at.max(other.end());
        }
        alone.extend(range.starting_at(at));
        for part in alone {
            inner.unregister_recorded(&mut ledger, part);
        }
    }
}

enum Refusal {
    /// It may work another time.
    Can(WatchError),
    /// Not with this mapping.
    Never(ManualReason),
}

impl Inner {
    /// Registers with the shard that already has the pages, or with `first` if nobody has.
    fn register(&self, piece: HostRange, backing: Backing, first: usize) -> Result<usize, Refusal> {
        for shard in std::iter::once(first).chain((0..SHARDS).filter(|&shard| shard != first)) {
            let Some(uffd) = &self.shards[shard].uffd else { return Err(Refusal::Never(ManualReason::NoUserfaultfd)) };
            let Err(source) = uffd.register(piece) else { return Ok(shard) };
            match source.raw_os_error() {
                Some(libc::EBUSY) => {} // a page of it is another shard's, or a stranger's
                Some(libc::EPERM) => return Err(Refusal::Never(ManualReason::SharedReadOnly)),
                // What can be watched is refused so only if nothing is mapped there at this moment.
                Some(libc::EINVAL) if uffd.can_watch(backing) => {
                    return Err(Refusal::Can(WatchError::Moving { range: piece }));
                }
                Some(libc::EINVAL) => return Err(Refusal::Never(ManualReason::Unsupported)),
                Some(libc::ENOMEM) => {
                    return Err(Refusal::Can(WatchError::TooManyMappings { range: piece, limit: max_map_count() }));
                }
                _ => return Err(Refusal::Can(WatchError::Refused { range: piece, source })),
            }
        }
        Err(Refusal::Never(ManualReason::Foreign))
    }

    /// Ends the watch over the range, whoever else covers it.
    pub(crate) fn unregister(&self, range: HostRange) {
        self.unregister_recorded(&mut self.ledger(), range);
    }

    fn unregister_recorded(&self, ledger: &mut crate::ledger::Ledger, range: HostRange) {
        let pieces: Vec<_> = ledger.watched(range).collect();
        for (piece, shard) in pieces {
            let ended = self.shards[shard].uffd.as_ref().is_none_or(|uffd| is_over(uffd, piece));
            if ended {
                ledger.cut(piece);
            }
        }
    }
}

/// Unregisters; false if the pages are still watched (the split it needs was refused).
fn is_over(uffd: &Uffd, piece: HostRange) -> bool {
    !uffd.unregister(piece).is_err_and(|error| error.raw_os_error() == Some(libc::ENOMEM))
}

fn max_map_count() -> usize {
    std::fs::read_to_string("/proc/sys/vm/max_map_count").ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}
