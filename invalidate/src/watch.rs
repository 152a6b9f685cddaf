//! Beginning and ending the watch over pages: which shard, what can be watched, and what is said when it can't.

use std::io;
use std::sync::MutexGuard;
use std::time::Duration;

use thiserror::Error;

use crate::dirty::protected;
use crate::ledger::{Ledger, Watch};
use crate::maps::{Backing, Mapping, MapsError, mappings, page_size_of};
use crate::room::max_map_count;
use crate::space::{Inner, NO_HOLD, SHARDS, Shards, Space};
use crate::span::run_around;
use crate::uffd::Uffd;
use crate::{Handful, HostRange};

/// How much of a mapping is watched for the sake of a range that lies in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum WatchSpan {
    /// The pages of the range and no others, so that mutations of their neighbours cost nothing. It makes the mapping several to the kernel, so
    /// a crowd in one mapping, or a process that has nearly as many mappings as it may, gets [`Mapping`](Self::Mapping) all the same; and so does
    /// a part of a page of the huge pool, which the kernel watches as a whole.
    #[default]
    Exact,
    /// All of the mapping, once for everybody in it: the next range in it costs a look into a map, no mapping is split, and the program can
    /// `mremap` across the borders of ranges. Its other pages are watched too: whoever unmaps or discards them waits for the monitor, and for
    /// what is under way in the shard.
    Mapping,
}

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
    /// The range is only a name: nothing is mapped there, and what it stands for (a dma-buf) doesn't change hands in this process.
    NotMapped,
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
    /// The mappings as they were when the watch had begun. What changes from then on is noticed. None if they were not asked for
    /// ([`Space::watch`]).
    pub mappings: Handful<Mapping>,
}

/// The range can't be watched now.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WatchError {
    /// There is a hole, or the list of mappings can't be read.
    #[error(transparent)]
    Maps(#[from] MapsError),
    /// The process has as many mappings as it may, and not even all of the mapping can be watched (which splits nothing): or the kernel has no
    /// memory left.
    #[error("can't watch {range}: out of memory, or the process has used up vm.max_map_count (now {limit}); raise it")]
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
    /// Put a target over the range before ([`insert`](Self::insert)): what nobody is over may stop being watched at any time.
    ///
    /// Populate the pages before: in a watched range the kernel maps untouched page-cache and shared pages one by one. When this returns, every
    /// discard of the range that had been told is over (registration takes the address space's lock for writing), but for the case that the
    /// head of this crate's `settle.rs` names.
    ///
    /// # Errors
    /// [`WatchError`]; pages watched before remain so.
    pub fn watch(&self, range: HostRange) -> Result<Watched, WatchError> {
        let covered = self.covered(&self.inner.ledger(), range);
        let Some(shards) = covered.filter(|&shards| self.is_in_force(range, shards)) else {
            let known = mappings(range)?;
            let watched = self.watch_with(self.inner.ledger(), range, &known, WatchSpan::Exact)?;
            return Ok(Watched { mappings: Handful::new(), ..watched });
        };
        Ok(Watched { shards, coverage: Coverage::Watched, mappings: Handful::new() })
    }

    /// As [`watch`](Self::watch), for a caller who has just asked for the [`mappings`] of the range and will compare them with
    /// [`Watched::mappings`]: what has changed in between may be watched otherwise than it should.
    ///
    /// # Errors
    /// As [`watch`](Self::watch).
    pub fn watch_as(&self, range: HostRange, known: &[Mapping]) -> Result<Watched, WatchError> {
        self.watch_spanning(range, known, WatchSpan::Exact)
    }

    /// As [`watch_as`](Self::watch_as), and as much of each mapping as `span` says.
    ///
    /// # Errors
    /// As [`watch`](Self::watch).
    pub fn watch_spanning(&self, range: HostRange, known: &[Mapping], span: WatchSpan) -> Result<Watched, WatchError> {
        let mut ledger = self.inner.ledger();
        if let Some(shards) = self.covered(&ledger, range) {
            drop(ledger);
            let mappings = mappings(range)?;
            if self.are_in_force(&mappings, shards) {
                return Ok(Watched { shards, coverage: Coverage::Watched, mappings });
            }
            ledger = self.inner.ledger();
        }
        self.watch_with(ledger, range, known, span)
    }

    /// The shards that watch all of the range, as far as the ledger knows, if nothing of it may still be going on.
    fn covered(&self, ledger: &Ledger, range: HostRange) -> Option<Shards> {
        let shards = ledger.covered(range).filter(|shards| !shards.has(NO_HOLD))?;
        // A discard that has been told may still be under way. Taking the address space's lock waits for it; somebody must have done so since.
        let is_fenced = |shard: usize| ledger.fenced[shard] == self.inner.shards[shard].removes();
        shards.iter().all(is_fenced).then_some(shards)
    }

    /// Whether the kernel watches what the ledger says it does. Asked behind the ledger: an event that ended the watch and isn't in the ledger yet
    /// has not been told either, so the range's targets will be, and begin anew.
    ///
    /// The ledger's word alone is not enough. `shmdt`, `shmat` with `SHM_REMAP` and `remap_file_pages` end a watch without an event, and where a
    /// mapping is watched as a whole they may do so to pages that nobody is over, so that nobody had to tell of it. One question is the least
    /// there is: of a page, which is in one mapping, whether that is watched. It is asked by registering the page once more, which is the
    /// cheapest way (`benches/README.md`), and watches what has come in silence. A longer range may have got a hole, which only the list of
    /// mappings shows.
    fn is_in_force(&self, range: HostRange, shards: Shards) -> bool {
        match range.pages() {
            1 => self.uffd_of(shards).is_some_and(|uffd| uffd.register(range).is_ok()),
            _ => mappings(range).is_ok_and(|mappings| self.are_in_force(&mappings, shards)),
        }
    }

    fn are_in_force(&self, mappings: &[Mapping], shards: Shards) -> bool {
        let is_watched = |uffd: &Uffd| mappings.iter().all(|mapping| uffd.watches(mapping.range.start()));
        self.uffd_of(shards).is_some_and(is_watched)
    }

    fn uffd_of(&self, shards: Shards) -> Option<&Uffd> {
        shards.iter().next().and_then(|shard| self.inner.shards[shard].uffd.as_ref())
    }

    fn watch_with(
        &self,
        mut ledger: MutexGuard<'_, Ledger>,
        range: HostRange,
        known: &[Mapping],
        span: WatchSpan,
    ) -> Result<Watched, WatchError> {
        let inner = &*self.inner;
        let (mut shards, mut coverage) = (Shards::NONE, Coverage::Watched);
        // What was registered with more than itself.
        let mut wide = Vec::new();
        for mapping in known {
            match inner.begin(&mut ledger, mapping, span) {
                Ok((shard, all)) => {
                    if all != mapping.range {
                        wide.push((mapping.range.start(), shard));
                    }
                    shards = shards.union(Shards::one(shard));
                    // By the shard and not by the name alone: what a watch splits off the stack's mapping has lost the name.
                    if shard == NO_HOLD && coverage == Coverage::Watched {
                        coverage = Coverage::NoHold(no_hold(mapping.backing).unwrap_or(NoHoldReason::Stack));
                    }
                }
                Err(Refusal::Can(error)) => return Err(error),
                Err(Refusal::Never(reason)) => {
                    shards = shards.union(Shards::one(first_shard(&ledger, mapping)));
                    coverage = Coverage::Manual(reason); // the least there is, so it stands for the whole range
                }
            }
        }
        // Registering passes over holes in silence, and what somebody puts into a hole later is not watched. But it fails where nothing at all is
        // mapped, so some of each piece was watched when it was registered. In the list, which has no hole, each mapping must begin where a piece
        // does. So there is one that has that part of the piece in it: it is what was watched there, as a mapping is watched as a whole or not at
        // all, and the kernel joins none that is with one that isn't; or it has taken the place of that, which an event tells.
        // Where more was registered than the piece, that may have been elsewhere, and it is asked whether a watched mapping is there.
        let is_watched =
            |&(at, shard): &(usize, usize)| inner.shards[shard].uffd.as_ref().is_none_or(|uffd| uffd.watches(at));
        let all = wide.iter().all(is_watched);
        let mappings = mappings(range)?;
        let was_asked =
            |seen: &Mapping| known.binary_search_by_key(&seen.range.start(), |asked| asked.range.start()).is_ok();
        if all && mappings.iter().all(was_asked) {
            Ok(Watched { shards, coverage, mappings })
        } else {
            Err(WatchError::Moving { range })
        }
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
    ///
    /// The ledger says whose the pages are. It may miss a watch: the event of what was unmapped there before, taken in late, cuts it out. Then the
    /// page tables say what is protected, and whoever can takes it back.
    pub(crate) fn unprotect(&self, range: HostRange) -> io::Result<()> {
        let (pieces, all) = {
            let ledger = self.inner.ledger();
            let pieces: Vec<_> = ledger.watched(range).map(|(piece, watch)| (piece, watch.shard)).collect();
            (pieces, ledger.covered(range).is_some())
        };
        for (piece, shard) in pieces {
            // One call stops at the first hole, so each mapping has its own.
            let whole = |there: Handful<Mapping>| there.iter().map(|mapping| mapping.range).collect();
            let there: Vec<_> = mappings(piece).map_or_else(|_| piece.pages_of().collect(), whole);
            there.into_iter().try_for_each(|part| self.unprotect_of(shard, part))?;
        }
        let mut left = Vec::new();
        // A kernel that can't be asked is one that nothing was protected through.
        if !all && protected(range, &mut left).is_ok() {
            for part in left {
                (0..SHARDS).try_for_each(|shard| self.unprotect_of(shard, part))?;
            }
        }
        Ok(())
    }

    fn unprotect_of(&self, shard: usize, part: HostRange) -> io::Result<()> {
        /// How often a mutation in flight may be in the way, and the pause after it. A hold-off lasts 100 ms at most by default.
        const TRIES: u32 = 1000;
        const PAUSE: Duration = Duration::from_micros(200);
        let Some(uffd) = &self.inner.shards[shard].uffd else { return Ok(()) };
        for tries in 0.. {
            match uffd.unprotect(part) {
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                    if tries == TRIES {
                        return Err(error);
                    }
                    std::thread::sleep(PAUSE);
                }
                _ => break, // done, or nothing of this shard's is mapped there any more
            }
        }
        Ok(())
    }
}

fn no_hold(backing: Backing) -> Option<NoHoldReason> {
    match backing {
        Backing::Heap => Some(NoHoldReason::Heap),
        Backing::Stack => Some(NoHoldReason::Stack),
        _ => None,
    }
}

/// The shard to try first: the one that has pages of it already, or that of its place.
fn first_shard(ledger: &Ledger, mapping: &Mapping) -> usize {
    if no_hold(mapping.backing).is_some() {
        return NO_HOLD;
    }
    let home = Inner::home(mapping.range);
    if ledger.is_free(mapping.range) {
        return home;
    }
    ledger.watched(mapping.range).next().map_or(home, |(_, watch)| watch.shard)
}

enum Refusal {
    /// It may work another time.
    Can(WatchError),
    /// Not with this mapping.
    Never(ManualReason),
}

impl Inner {
    /// Watches the part of a mapping that was asked for, or as much more of it as is better, and returns the shard and what was registered there.
    fn begin(&self, ledger: &mut Ledger, mapping: &Mapping, asked: WatchSpan) -> Result<(usize, HostRange), Refusal> {
        let (piece, first) = (mapping.range, first_shard(ledger, mapping));
        let exact = |ledger: &mut Ledger| {
            let shard = self.register(ledger, piece, mapping.backing, first)?;
            ledger.watch_more(piece, Watch { shard, span: WatchSpan::Exact });
            Ok((shard, piece))
        };
        // Refused for a part of a huge page. Of a file's pages the size isn't known where the pool is one that was mounted, or isn't the default one.
        let is_possible = (piece.start() | piece.len()).is_multiple_of(page_size_of(mapping.file));
        // Once more, to wait for a discard and to arm what the ledger may not know to be new: nothing is split.
        let is_there = ledger.covered(piece).is_some();
        if is_possible && (is_there || (asked == WatchSpan::Exact && Self::is_better_exact(ledger, mapping))) {
            match exact(ledger) {
                Err(Refusal::Can(WatchError::TooManyMappings { .. })) => {}
                Err(Refusal::Can(WatchError::Moving { .. }) | Refusal::Never(ManualReason::Unsupported))
                    if mapping.file.is_some() => {}
                other => return other,
            }
        }
        let (run, first) = run_around(ledger, mapping, first);
        for all in [run, mapping.whole] {
            match self.register(ledger, all, mapping.backing, first) {
                Ok(shard) => {
                    ledger.watch(all, Watch { shard, span: WatchSpan::Mapping });
                    return Ok((shard, all));
                }
                // Some of it is another's.
                Err(Refusal::Never(_) | Refusal::Can(WatchError::Moving { .. })) => {}
                Err(other) => return Err(other),
            }
        }
        exact(ledger)
    }

    /// Registers with the shard that already has the pages, or with `first` if nobody has.
    fn register(
        &self,
        ledger: &mut Ledger,
        piece: HostRange,
        backing: Backing,
        first: usize,
    ) -> Result<usize, Refusal> {
        for shard in std::iter::once(first).chain((0..SHARDS).filter(|&shard| shard != first)) {
            let this = &self.shards[shard];
            let Some(uffd) = &this.uffd else { return Err(Refusal::Never(ManualReason::NoUserfaultfd)) };
            // In this order: discards told by now, none of them still in its wait, the lock.
            let (removes, settled) = (this.removes(), uffd.is_settled());
            let Err(source) = uffd.register(piece) else {
                if settled {
                    ledger.fenced[shard] = ledger.fenced[shard].max(removes);
                }
                return Ok(shard);
            };
            match source.raw_os_error() {
                Some(libc::EBUSY) => {} // a page of it is another shard's, or a stranger's
                Some(libc::EPERM) => return Err(Refusal::Never(ManualReason::SharedReadOnly)),
                // What can be watched is refused so only if nothing is mapped there at this moment.
                Some(libc::EINVAL) if uffd.can_watch(backing) => {
                    return Err(Refusal::Can(WatchError::Moving { range: piece }));
                }
                Some(libc::EINVAL) => return Err(Refusal::Never(ManualReason::Unsupported)),
                Some(libc::ENOMEM) => {
                    let limit = max_map_count().unwrap_or(0);
                    return Err(Refusal::Can(WatchError::TooManyMappings { range: piece, limit }));
                }
                _ => return Err(Refusal::Can(WatchError::Refused { range: piece, source })),
            }
        }
        Err(Refusal::Never(ManualReason::Foreign))
    }
}
