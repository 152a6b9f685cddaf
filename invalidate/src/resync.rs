//! The ledger, made anew from the kernel's own list, when the monitor had to drop events that were meant for it.
//!
//! **Problem.** The monitor may not wait, so the queue from it to the ledger has an end. A lost *unmap* leaves the ledger believing in a watch
//! that is over; a lost *move* hides one that exists.
//!
//! **Law.** Targets are told of every event in any case: they don't depend on the ledger. From the loss until the ledger has been compared,
//! nothing is believed to be watched, so that every watch asks the kernel.
//!
//! **Protocol.** The flag goes up → *empty the queue → walk all mappings, ask of each whether somebody watches it and which shard may register
//! it once more (the one that has it) → is the queue still empty?* → the flag goes down. Events that come meanwhile make it begin anew: played
//! upon a list that is newer than they are, they would spoil it.

use std::sync::atomic::Ordering;

use crate::ledger::Watch;
use crate::maps::{Backing, Mapping, each_mapping};
use crate::space::{Inner, SHARDS};
use crate::watch::WatchSpan;

/// How often it begins anew at once, before others are let at the ledger in between.
const ROUNDS: usize = 3;

impl Inner {
    /// Compares. Takes a microsecond for each mapping of the process. For the settle thread, and for the end.
    pub(crate) fn resync(&self) {
        let mut ledger = self.ledger();
        for _ in 0..ROUNDS {
            self.forgotten.store(false, Ordering::Relaxed);
            while self.happened.pop().is_some() {}
            let mut found = Vec::new();
            let walked = each_mapping(|mapping| {
                if let Some(shard) = self.owner(&mapping) {
                    let span = ledger.at(mapping.whole.start()).map_or(WatchSpan::Exact, |(_, watch)| watch.span);
                    found.push((mapping.whole, Watch { shard, span }));
                }
            });
            // Acquire: pairs with the Release in `Inner::happens`.
            if walked.is_ok() && self.happened.is_empty() && !self.forgotten.load(Ordering::Acquire) {
                ledger.clear();
                found.into_iter().for_each(|(range, watch)| ledger.watch(range, watch));
                ledger.unsure = false;
                return;
            }
        }
        self.forgotten.store(true, Ordering::Relaxed);
    }

    /// The shard that watches the mapping.
    fn owner(&self, mapping: &Mapping) -> Option<usize> {
        let at = mapping.whole.start();
        if mapping.backing == Backing::Special {
            return None;
        }
        // While an event of its own is in flight, a descriptor doesn't say; any other does.
        let watched = self.shards.iter().filter_map(|shard| shard.uffd.as_ref()).any(|uffd| uffd.watches(at));
        let takes_again = |shard: &usize| {
            let uffd = self.shards[*shard].uffd.as_ref();
            uffd.is_some_and(|uffd| uffd.register(mapping.whole).is_ok())
        };
        (0..SHARDS).filter(|_| watched).find(takes_again)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::ptr;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::{Duration, Instant};

    use super::*;
    use crate::{Change, Coverage, HostRange, Shards, Space, Target, WatchError, mappings, page_size};

    const PATIENCE: Duration = Duration::from_secs(60);

    struct Counts(AtomicU64);

    impl Target for Counts {
        fn invalidated(&self, _: &Change) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }

        fn settled(self: Arc<Self>) {}

        fn shards(&self) -> Shards {
            Shards::ALL
        }
    }

    /// Between two pages that may not be touched, so that no other test's memory becomes one mapping with it.
    fn map(pages: usize) -> HostRange {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let len = pages * page_size();
        // SAFETY: a new mapping anywhere; nothing is replaced.
        let at = unsafe { libc::mmap(ptr::null_mut(), len + 2 * page_size(), libc::PROT_NONE, flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        let range = HostRange::new(at.expose_provenance() + page_size(), len).unwrap();
        // SAFETY: inside the mapping just made, which no reference points into.
        assert_eq!(unsafe { libc::mprotect(pointer(range), len, libc::PROT_READ | libc::PROT_WRITE) }, 0);
        range
    }

    fn pointer(range: HostRange) -> *mut libc::c_void {
        ptr::with_exposed_provenance_mut(range.start())
    }

    fn part(of: HostRange, first: usize, pages: usize) -> HostRange {
        HostRange::new(of.start() + first * page_size(), pages * page_size()).unwrap()
    }

    fn unmap(range: HostRange) {
        // SAFETY: memory of the test, which no reference points into.
        assert_eq!(unsafe { libc::munmap(pointer(range), range.len()) }, 0);
    }

    /// Puts a target over all of it and watches it, as one.
    fn watched(space: &Space, range: HostRange, id: u64) -> Option<Arc<Counts>> {
        let counts = Arc::new(Counts(AtomicU64::new(0)));
        space.insert(range, id, Arc::<Counts>::clone(&counts));
        let end = Instant::now() + PATIENCE;
        let watched = loop {
            match space.watch_spanning(range, &mappings(range).unwrap(), WatchSpan::Mapping) {
                Ok(watched) => break watched,
                // An event of another test's is in flight.
                Err(WatchError::Moving { .. }) if Instant::now() < end => std::thread::yield_now(),
                Err(error) => panic!("{error}"),
            }
        };
        if watched.coverage != Coverage::Watched {
            println!("SKIP {}: {:?}", std::thread::current().name().unwrap_or("?"), watched.coverage);
            return None;
        }
        Some(counts)
    }

    #[test]
    fn events_that_the_ledger_had_no_room_for_are_told_and_found_out() {
        const EVENTS: usize = 9000;
        let space = Space::get(Duration::from_secs(10)).unwrap();
        let (range, from, place) = (map(2 * EVENTS), map(4), map(4));
        let Some(counts) = watched(&space, range, 1) else { return };
        let Some(moved) = watched(&space, from, 2) else { return };
        {
            let _nobody_takes_them_in = space.inner.ledger();
            (0..EVENTS).for_each(|n| unmap(part(range, 2 * n, 1)));
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            // SAFETY: moves memory of the test over other memory of the test.
            let at = unsafe { libc::mremap(pointer(from), from.len(), from.len(), flags, pointer(place)) };
            assert_eq!(at, pointer(place));
            assert!(space.wait_open(Shards::ALL, Instant::now() + PATIENCE));
            assert!(space.inner.forgotten.load(Ordering::Relaxed), "more than the queue takes");
            assert_eq!(counts.0.load(Ordering::SeqCst), EVENTS as u64);
            assert!(moved.0.load(Ordering::SeqCst) >= 1);
        }
        // Nothing is believed, and what is asked of the kernel is right.
        let left = part(range, 101, 1);
        assert!(space.inner.ledger().covered(left).is_none() || !space.inner.ledger().unsure);
        drop(watched(&space, left, 4).unwrap());
        space.remove(left, 4);
        let end = Instant::now() + PATIENCE;
        while space.inner.ledger().unsure {
            assert!(Instant::now() < end, "nobody compares");
            space.inner.owes.settling();
            std::thread::yield_now();
        }
        let ledger = space.inner.ledger();
        for n in 0..EVENTS {
            assert!(ledger.at(part(range, 2 * n, 1).start()).is_none(), "{n}");
            assert!(ledger.covered(part(range, 2 * n + 1, 1)).is_some(), "{n}");
        }
        assert!(ledger.covered(place).is_some() && ledger.at(from.start()).is_none());
        drop(ledger);
        space.remove(range, 1);
        space.remove(from, 2);
        (0..EVENTS).for_each(|n| unmap(part(range, 2 * n + 1, 1)));
        unmap(place);
    }

    #[test]
    fn after_a_discard_the_next_watch_takes_the_lock_and_the_one_after_it_does_not() {
        let space = Space::get(Duration::from_secs(10)).unwrap();
        let range = map(4);
        let Some(_counts) = watched(&space, range, 3) else { return };
        let shard = space.inner.ledger().at(range.start()).unwrap().1.shard;
        let fenced = || space.inner.ledger().fenced[shard] == space.inner.shards[shard].removes();
        assert!(fenced());
        // SAFETY: memory of the test, which no reference points into.
        assert_eq!(unsafe { libc::madvise(pointer(range), page_size(), libc::MADV_DONTNEED) }, 0);
        assert!(space.wait_open(Shards::ALL, Instant::now() + PATIENCE));
        assert!(!fenced());
        // Not if an event of another test's is in flight just then.
        let end = Instant::now() + PATIENCE;
        while !fenced() {
            assert!(Instant::now() < end, "no watch takes the lock");
            let _ = space.watch(range); // refused while such an event is
        }
        space.remove(range, 3);
        unmap(range);
    }
}
