use std::collections::BTreeSet;
use std::ptr;
use std::time::Duration;

use super::*;
use crate::pagemap::{PageRegion, WRITTEN, Wanted, scan};
use crate::uffd::Event;
use crate::{Coverage, page_size};

struct Memory(HostRange);

impl Memory {
    fn new(pages: usize) -> Self {
        let (len, flags) = (pages * page_size(), libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address that the kernel chooses.
        let at = unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        let memory = Self(HostRange::from_ptr(at, len).unwrap());
        (0..pages).for_each(|page| memory.write(page));
        memory
    }

    fn write(&self, page: usize) {
        assert!(page < self.0.pages());
        let at = ptr::with_exposed_provenance_mut::<u8>(self.0.start() + page * page_size());
        // SAFETY: inside this test's own mapping.
        unsafe { at.write_volatile(1) };
    }

    fn part(&self, page: usize, pages: usize) -> HostRange {
        HostRange::new(self.0.start() + page * page_size(), pages * page_size()).unwrap()
    }

    /// How many pages are write-protected.
    fn protected(&self) -> usize {
        let want = Wanted { inverted: WRITTEN, all: WRITTEN, ..Wanted::default() };
        let mut regions = [PageRegion::default(); 64];
        let (found, _) = scan(self.0.start() as u64, self.0.end() as u64, want, &mut regions).unwrap();
        regions[..found].iter().map(|region| usize::try_from(region.end - region.start).unwrap() / page_size()).sum()
    }

    fn take(&self, cursor: &mut DirtyCursor) -> (Taken, BTreeSet<usize>) {
        let mut out = Vec::new();
        let taken = cursor.take(&mut out);
        let first = self.0.start() / page_size();
        (
            taken,
            out.iter().flat_map(|part| part.start() / page_size() - first..part.end() / page_size() - first).collect(),
        )
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the test's own mapping, which nothing refers to.
        unsafe { libc::munmap(ptr::with_exposed_provenance_mut(self.0.start()), self.0.len()) };
    }
}

/// Watches, however often it takes while other tests map and unmap next to it.
fn watch(space: &Space, range: HostRange) -> crate::Watched {
    loop {
        match space.watch(range) {
            Err(crate::WatchError::Moving { .. }) => {}
            other => return other.unwrap(),
        }
    }
}

/// Watched memory, or `None` with a message where writes can't be tracked.
fn watched(test: &str, pages: usize) -> Option<(Arc<Space>, Memory)> {
    let (space, memory) = (Space::get(Duration::from_millis(100)).unwrap(), Memory::new(pages));
    let watched = watch(&space, memory.0);
    if watched.coverage != Coverage::Watched || DirtyTracker::of_watched(memory.0).refused().is_some() {
        println!("SKIP dirty_log::tests::{test}: this kernel can't tell which pages were written (Linux 6.7)");
        return None;
    }
    Some((space, memory))
}

#[test]
fn overlapping_cursors_are_each_told_of_every_page_once() {
    let Some((space, memory)) = watched("overlapping_cursors_are_each_told_of_every_page_once", 120) else { return };
    let parts = [(0, 120), (0, 60), (30, 60), (30, 60), (100, 20)];
    let mut cursors = parts.map(|(page, pages)| DirtyCursor::new(&space, memory.part(page, pages)));
    for cursor in &mut cursors {
        assert_eq!(memory.take(cursor).0, Taken::Everything);
    }
    // Arming one takes from the others, so each may be told everything once more.
    for cursor in &mut cursors {
        memory.take(cursor);
    }
    let mut owed = parts.map(|_| BTreeSet::new());
    let mut seed = 11_u64;
    let mut below = |end: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % end
    };
    for _ in 0..4000 {
        if below(4) == 0 {
            let which = below(parts.len());
            let told = memory.take(&mut cursors[which]);
            assert_eq!(told, (Taken::Exact, std::mem::take(&mut owed[which])), "cursor {which}");
        } else {
            let page = below(120);
            memory.write(page);
            for (owed, (first, pages)) in owed.iter_mut().zip(parts) {
                owed.extend((first..first + pages).contains(&page).then_some(page));
            }
        }
    }
}

#[test]
fn a_cursor_that_goes_leaves_nothing_protected_and_loses_nothing_of_the_others() {
    let name = "a_cursor_that_goes_leaves_nothing_protected_and_loses_nothing_of_the_others";
    let Some((space, memory)) = watched(name, 40) else { return };
    let (mut one, mut two) = (DirtyCursor::new(&space, memory.0), DirtyCursor::new(&space, memory.part(0, 20)));
    for cursor in [&mut one, &mut two] {
        memory.take(cursor);
    }
    memory.take(&mut one);
    assert_eq!(memory.protected(), 40);
    memory.write(7);
    memory.write(30);
    drop(two);
    let (_, told) = memory.take(&mut one);
    assert!(told.contains(&7) && told.contains(&30) && !told.contains(&31), "{told:?}");
    drop(one);
    assert_eq!(memory.protected(), 0);
}

#[test]
fn protection_is_taken_back_also_where_a_late_event_has_cut_the_watch_out_of_the_ledger() {
    let name = "protection_is_taken_back_also_where_a_late_event_has_cut_the_watch_out_of_the_ledger";
    let Some((space, memory)) = watched(name, 40) else { return };
    let mut cursor = DirtyCursor::new(&space, memory.0);
    memory.take(&mut cursor);
    assert_eq!(memory.protected(), 40);
    // As when the monitor has set who unmapped something there free, and only now gets to say so.
    space.inner.happens(Event::Unmap(memory.part(8, 12)));
    assert!(space.inner.ledger().covered(memory.0).is_none());
    let import = Untracked::new(&space, memory.part(10, 5)).unwrap();
    assert_eq!(memory.protected(), 35);
    drop(import);
    memory.take(&mut cursor);
    drop(cursor);
    assert_eq!(memory.protected(), 0);
}

#[test]
fn nothing_under_an_import_is_protected_and_its_mirrors_are_told_everything() {
    let name = "nothing_under_an_import_is_protected_and_its_mirrors_are_told_everything";
    let Some((space, memory)) = watched(name, 40) else { return };
    let mut cursor = DirtyCursor::new(&space, memory.0);
    memory.take(&mut cursor);
    assert_eq!((memory.take(&mut cursor).0, memory.protected()), (Taken::Exact, 40));
    let import = Untracked::new(&space, memory.part(10, 5)).unwrap();
    assert_eq!(memory.protected(), 35);
    for _ in 0..2 {
        assert_eq!(memory.take(&mut cursor), (Taken::Everything, (0..40).collect()));
        assert!(memory.protected() <= 35);
    }
    drop(import);
    assert_eq!(memory.take(&mut cursor).0, Taken::Everything, "tracked anew");
    memory.write(12);
    assert_eq!(memory.take(&mut cursor), (Taken::Exact, [12].into()));
}

#[test]
fn a_cursor_is_told_of_single_pages_that_were_discarded() {
    let Some((space, memory)) = watched("a_cursor_is_told_of_single_pages_that_were_discarded", 40) else { return };
    let mut cursor = DirtyCursor::new(&space, memory.0);
    memory.take(&mut cursor);
    let part = memory.part(7, 2);
    // SAFETY: inside this test's own mapping, whose bytes nobody relies upon.
    let done =
        unsafe { libc::madvise(ptr::with_exposed_provenance_mut(part.start()), part.len(), libc::MADV_DONTNEED) };
    assert_eq!(done, 0);
    memory.write(20);
    assert_eq!(memory.take(&mut cursor), (Taken::Exact, [7, 8, 20].into()));
    assert_eq!(memory.take(&mut cursor), (Taken::Exact, BTreeSet::new()));
}

#[test]
fn over_memory_that_nobody_watches_everything_is_told_and_watching_it_later_works() {
    let space = Space::get(Duration::from_millis(100)).unwrap();
    let memory = Memory::new(8);
    let mut cursor = DirtyCursor::new(&space, memory.0);
    for _ in 0..3 {
        assert_eq!(memory.take(&mut cursor), (Taken::Everything, (0..8).collect()));
    }
    let coverage = watch(&space, memory.0).coverage;
    assert!(!matches!(coverage, Coverage::Manual(crate::ManualReason::Foreign)), "{coverage:?}");
}
