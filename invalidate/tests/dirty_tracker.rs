//! The dirty tracker against a list of what was written.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pinfold_invalidate::{
    Change, Coverage, DirtyTracker, HostRange, Missing, Shards, Space, Taken, Target, any_present, is_all_there,
    missing, page_size,
};

/// Pages of this test's own.
struct Pages(HostRange);

impl Pages {
    fn new(count: usize, flags: i32, file: Option<&File>) -> Self {
        let at = Self::map(ptr::null_mut(), count, flags, file);
        Self(HostRange::from_ptr(at, count * page_size()).unwrap())
    }

    fn anonymous(count: usize) -> Self {
        Self::new(count, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)
    }

    fn map(at: *mut libc::c_void, count: usize, flags: i32, file: Option<&File>) -> *mut libc::c_void {
        let (fd, len) = (file.map_or(-1, AsRawFd::as_raw_fd), count * page_size());
        // SAFETY: the address is the kernel's choice, or with MAP_FIXED inside an area of this test's own.
        let at = unsafe { libc::mmap(at, len, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
        assert_ne!(at, libc::MAP_FAILED, "mmap: {}", io::Error::last_os_error());
        at
    }

    fn at(&self, page: usize) -> *mut u8 {
        assert!(page < self.0.pages());
        ptr::with_exposed_provenance_mut(self.0.start() + page * page_size())
    }

    fn write(&self, page: usize) {
        // SAFETY: the page is mapped, writable and only this thread's.
        unsafe { self.at(page).write_volatile(1) };
    }

    fn read(&self, page: usize) -> u8 {
        // SAFETY: the page is mapped, readable and only this thread's.
        unsafe { self.at(page).read_volatile() }
    }

    fn advise(&self, page: usize, count: usize, advice: i32) -> bool {
        // SAFETY: the pages are this test's own, and nothing relies on their content.
        unsafe { libc::madvise(self.at(page).cast(), count * page_size(), advice) == 0 }
    }

    fn part(&self, page: usize, count: usize) -> HostRange {
        HostRange::new(self.at(page).addr(), count * page_size()).unwrap()
    }

    fn numbers(&self, ranges: &[HostRange]) -> Vec<usize> {
        let first = self.0.start() / page_size();
        ranges.iter().flat_map(|r| r.start() / page_size() - first..r.end() / page_size() - first).collect()
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the pages are this test's own, and no reference to them exists.
        unsafe { libc::munmap(self.at(0).cast(), self.0.len()) };
    }
}

fn take(tracker: &mut DirtyTracker, pages: &Pages) -> (Taken, Vec<usize>) {
    let mut out = Vec::new();
    let taken = tracker.take(&mut out);
    (taken, pages.numbers(&out))
}

/// A tracker, or `None` with a message where this kernel has none.
fn tracker(range: HostRange) -> Option<DirtyTracker> {
    let tracker = DirtyTracker::new(range);
    if let Some(err) = tracker.refused() {
        // Told apart from a refusal that is this crate's fault: such a kernel doesn't know the question either.
        assert_eq!(any_present(range).ok().flatten(), None, "refused on a kernel that can scan: {err}");
        eprintln!("skipped: no dirty tracking here: {err}");
        return None;
    }
    Some(tracker)
}

fn memfd(pages: usize) -> File {
    // SAFETY: the name is a terminated string.
    let fd = unsafe { libc::memfd_create(c"dirty".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "memfd_create: {}", io::Error::last_os_error());
    // SAFETY: the descriptor was just made and nobody else owns it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len((pages * page_size()) as u64).unwrap();
    file
}

fn scratch_file(pages: usize) -> File {
    let path = std::env::temp_dir().join(format!("pinfold-dirty.{}.{pages}", std::process::id()));
    let mut file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    file.write_all(&vec![7; pages * page_size()]).unwrap();
    file
}

fn backings(pages: usize) -> Vec<(&'static str, Pages)> {
    let shared = libc::MAP_SHARED;
    vec![
        ("anonymous", Pages::anonymous(pages)),
        ("shared anonymous", Pages::new(pages, shared | libc::MAP_ANONYMOUS, None)),
        ("memfd", Pages::new(pages, shared, Some(&memfd(pages)))),
        ("private memfd", Pages::new(pages, libc::MAP_PRIVATE, Some(&memfd(pages)))),
        ("file", Pages::new(pages, shared, Some(&scratch_file(pages)))),
        ("private file", Pages::new(pages, libc::MAP_PRIVATE, Some(&scratch_file(pages)))),
    ]
}

#[test]
// rows: selftests/uffd wp-unpopulated
fn each_written_page_is_told_once_on_every_backing() {
    for (name, pages) in backings(300) {
        (0..100).for_each(|page| pages.write(page)); // touched before, the others never
        let Some(mut tracker) = tracker(pages.0) else { return };
        assert_eq!(take(&mut tracker, &pages), (Taken::Exact, vec![]), "{name}: nothing was written yet");
        for page in [0, 1, 50, 99, 100, 255, 256, 299] {
            pages.write(page);
        }
        let (taken, told) = take(&mut tracker, &pages);
        assert_eq!((taken, &*told), (Taken::Exact, &[0, 1, 50, 99, 100, 255, 256, 299][..]), "{name}");
        assert_eq!(take(&mut tracker, &pages), (Taken::Exact, vec![]), "{name}: told once");
        // Every second page: more regions than one scan tells.
        (0..300).step_by(2).for_each(|page| pages.write(page));
        assert_eq!(take(&mut tracker, &pages).1, (0..300).step_by(2).collect::<Vec<_>>(), "{name}");
    }
}

#[test]
fn reading_is_not_writing() {
    for (name, pages) in backings(64) {
        let Some(mut tracker) = tracker(pages.0) else { return };
        for page in 0..64 {
            let _ = pages.read(page);
        }
        assert_eq!(take(&mut tracker, &pages), (Taken::Exact, vec![]), "{name}");
        pages.write(9);
        assert_eq!(take(&mut tracker, &pages), (Taken::Exact, vec![9]), "{name}");
    }
}

#[test]
fn a_discarded_anonymous_page_counts_as_written() {
    let pages = Pages::anonymous(2048);
    (0..2048).for_each(|page| pages.write(page));
    let Some(mut tracker) = tracker(pages.0) else { return };
    assert!(pages.advise(3, 2, libc::MADV_DONTNEED));
    assert_eq!(take(&mut tracker, &pages), (Taken::Exact, vec![3, 4]));
    assert_eq!(take(&mut tracker, &pages), (Taken::Exact, vec![]));
    // So much that whole page tables may go with it.
    assert!(pages.advise(0, 2048, libc::MADV_DONTNEED));
    assert_eq!(take(&mut tracker, &pages).1.len(), 2048);
    assert_eq!(take(&mut tracker, &pages), (Taken::Exact, vec![]));
    pages.write(2000);
    assert_eq!(take(&mut tracker, &pages), (Taken::Exact, vec![2000]));
}

/// Memory in which the kernel puts a huge page if it has one, where that begins, and how many pages it is.
fn huge_page() -> Option<(Pages, usize, usize)> {
    let said = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size");
    let Some(huge) = said.ok().and_then(|said| said.trim().parse::<usize>().ok()) else {
        eprintln!("skipped: no transparent huge pages");
        return None;
    };
    let count = huge / page_size();
    let pages = Pages::anonymous(2 * count);
    let at = (pages.0.start().next_multiple_of(huge) - pages.0.start()) / page_size();
    if !pages.advise(at, count, libc::MADV_HUGEPAGE) {
        eprintln!("skipped: no transparent huge pages: {}", io::Error::last_os_error());
        return None;
    }
    Some((pages, at, count))
}

/// Whether the mapping has a huge page in it.
fn is_huge(page: HostRange) -> bool {
    let list = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let bounds = |line: &str| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
    };
    let others = list.lines().skip_while(|line| bounds(line).is_none_or(|bounds| !bounds.contains(&page.start())));
    let told = others.into_iter().find_map(|line| line.strip_prefix("AnonHugePages:"));
    told.is_some_and(|told| told.trim() != "0 kB")
}

#[test]
fn one_write_to_a_huge_page_is_told_as_one_page() {
    let Some((pages, at, count)) = huge_page() else { return };
    pages.write(at);
    let Some(mut tracker) = tracker(pages.part(at, count)) else { return };
    assert_eq!(take(&mut tracker, &pages), (Taken::Exact, vec![]));
    pages.write(at + 77);
    assert_eq!(take(&mut tracker, &pages), (Taken::Exact, vec![at + 77]));
    pages.write(at + 77);
    pages.write(at + count - 1);
    assert_eq!(take(&mut tracker, &pages), (Taken::Exact, vec![at + 77, at + count - 1]));
}

#[test]
fn a_huge_page_is_not_known_to_be_there_as_it_may_be_of_zeros() {
    let Some((pages, at, count)) = huge_page() else { return };
    pages.write(at);
    if any_present(pages.part(at + count - 1, 1)).unwrap() != Some(true) {
        eprintln!("skipped: the kernel had no huge page to give");
        return;
    }
    let told = is_all_there(pages.part(at, count)) || is_all_there(pages.part(at, 1));
    // It was until now, if it is one still: the kernel splits what it can't move as one.
    if !is_huge(pages.part(at, 1)) {
        eprintln!("skipped: the kernel has split its huge page");
        return;
    }
    assert!(!told);
    // Once it is split, each page is known for what it is.
    assert!(pages.advise(at + 1, 1, libc::MADV_DONTNEED));
    assert!(is_all_there(pages.part(at, 1)) && !is_all_there(pages.part(at + 1, 1)));
    assert!(is_all_there(pages.part(at + 2, count - 2)));
}

#[test]
fn a_discarded_huge_page_counts_as_written() {
    let Some((pages, at, count)) = huge_page() else { return };
    pages.write(at);
    let Some(mut tracker) = tracker(pages.part(at, count)) else { return };
    // The page goes with its entry in the directory: no page table is left that could say anything.
    assert!(pages.advise(at, count, libc::MADV_DONTNEED));
    assert_eq!(take(&mut tracker, &pages), (Taken::Exact, (at..at + count).collect()));
    assert_eq!(take(&mut tracker, &pages), (Taken::Exact, vec![]));
}

#[test]
fn a_replaced_mapping_is_told_whole_and_tracked_anew() {
    let pages = Pages::anonymous(16);
    let Some(mut tracker) = tracker(pages.0) else { return };
    pages.write(1);
    Pages::map(pages.at(4).cast(), 4, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED, None);
    assert_eq!(take(&mut tracker, &pages), (Taken::Everything, (0..16).collect()));
    assert!(tracker.refused().is_none(), "tracked anew");
    pages.write(5);
    assert_eq!(take(&mut tracker, &pages), (Taken::Exact, vec![5]));
}

#[test]
fn what_can_not_be_tracked_is_told_whole_every_time() {
    let path = std::env::temp_dir().join(format!("pinfold-dirty-ro.{}", std::process::id()));
    std::fs::write(&path, vec![1; 4 * page_size()]).unwrap();
    let file = File::open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    // SAFETY: a mapping at an address of the kernel's choice disturbs nobody.
    let at =
        unsafe { libc::mmap(ptr::null_mut(), 4 * page_size(), libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0) };
    assert_ne!(at, libc::MAP_FAILED);
    let pages = Pages(HostRange::from_ptr(at, 4 * page_size()).unwrap());
    let mut tracker = DirtyTracker::new(pages.0);
    assert!(tracker.refused().is_some(), "a shared mapping of a read-only descriptor can't be protected");
    for _ in 0..2 {
        assert_eq!(take(&mut tracker, &pages), (Taken::Everything, vec![0, 1, 2, 3]));
    }
}

#[test]
fn any_writes_agree_with_a_list() {
    let pages = Pages::anonymous(700);
    let (mut seed, mut written) = (1_u64, std::collections::BTreeSet::new());
    let mut below = |end: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % end
    };
    let Some(mut tracker) = tracker(pages.part(50, 600)) else { return };
    for _ in 0..3000 {
        match below(20) {
            0 => {
                let (taken, told) = take(&mut tracker, &pages);
                assert_eq!((taken, told), (Taken::Exact, std::mem::take(&mut written).into_iter().collect()));
            }
            1 => {
                let (first, count) = (50 + below(590), 1 + below(10));
                assert!(pages.advise(first, count, libc::MADV_DONTNEED));
                written.extend(first..first + count);
            }
            2 => {
                let _ = pages.read(below(700));
            }
            _ => {
                let page = below(700);
                pages.write(page);
                written.extend((50..650).contains(&page).then_some(page));
            }
        }
    }
}

#[derive(Default)]
struct Told(AtomicU32, AtomicU32);

impl Target for Told {
    fn invalidated(&self, _: &Change) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    fn settled(self: Arc<Self>) {}

    fn shards(&self) -> Shards {
        Shards(self.1.load(Ordering::SeqCst) as u16)
    }
}

#[test]
fn a_watched_range_is_tracked_too_and_stays_watched_when_the_tracker_goes() {
    let pages = Pages::anonymous(8);
    if tracker(pages.0).is_none() {
        return;
    }
    let space = Space::get(Duration::from_millis(100)).unwrap();
    let told = Arc::new(Told::default());
    let range = pages.0;
    space.insert(range, 1, told.clone());
    let watched = space.watch(pages.0).unwrap();
    if watched.coverage != Coverage::Watched {
        eprintln!("skipped: can't watch here: {:?}", watched.coverage);
        return;
    }
    told.1.store(watched.shards.0.into(), Ordering::SeqCst);
    let mut both = DirtyTracker::new(pages.0);
    assert!(both.refused().is_none(), "{:?}", both.refused());
    pages.write(3);
    assert_eq!(take(&mut both, &pages), (Taken::Exact, vec![3]));
    drop(both);
    assert_eq!(told.0.load(Ordering::SeqCst), 0, "tracking is no change");
    drop(pages);
    assert!(space.wait_open(watched.shards, Instant::now() + Duration::from_secs(10)));
    assert_eq!(told.0.load(Ordering::SeqCst), 1, "the unmapping is still heard of");
    space.remove(range, 1);
}

/// Runs `body` in a forked child and returns whether it said yes.
fn in_child(body: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child runs `body`, which allocates as the C library allows after fork, and leaves by _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let yes = body();
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(i32::from(!yes)) };
    }
    assert!(child > 0, "fork: {}", io::Error::last_os_error());
    let mut status = 0;
    // SAFETY: `status` is a live integer that the call writes.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    status == 0
}

#[test]
fn a_forked_child_is_told_everything_and_disturbs_nothing() {
    let pages = Pages::anonymous(8);
    let Some(mut tracker) = tracker(pages.0) else { return };
    pages.write(2);
    assert!(in_child(|| {
        let all = take(&mut tracker, &pages) == (Taken::Everything, (0..8).collect());
        let mut own = DirtyTracker::new(pages.0);
        pages.write(7);
        all && own.refused().is_none() && take(&mut own, &pages) == (Taken::Exact, vec![7])
    }));
    let (taken, told) = take(&mut tracker, &pages);
    assert_eq!(taken, Taken::Exact);
    assert!(told.contains(&2) && !told.contains(&7), "{told:?}");
}

#[test]
fn tracking_needs_no_privilege() {
    let pages = Pages::anonymous(8);
    if tracker(pages.0).is_none() {
        return;
    }
    assert!(in_child(|| {
        // SAFETY: changes the identity of this child only, which has one thread.
        let _ = unsafe { libc::setuid(65534) }; // refused: unprivileged already
        // A process that has given up privileges can't open its own pagemap until it says that it has no secrets.
        // SAFETY: sets a flag of this child.
        let _ = unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1) };
        let mut own = DirtyTracker::new(pages.0);
        pages.write(3);
        own.refused().is_none() && take(&mut own, &pages) == (Taken::Exact, vec![3])
    }));
}

#[test]
fn presence_is_told_of_touched_pages_only() {
    let pages = Pages::anonymous(64);
    let Some(present) = any_present(pages.0).unwrap() else {
        eprintln!("skipped: this kernel has no PAGEMAP_SCAN (Linux 6.7)");
        return;
    };
    assert!(!present);
    pages.write(40);
    assert_eq!(any_present(pages.0).unwrap(), Some(true));
    assert_eq!(any_present(pages.part(0, 40)).unwrap(), Some(false));
    assert_eq!(any_present(pages.part(40, 1)).unwrap(), Some(true));
    assert!(pages.advise(0, 64, libc::MADV_DONTNEED));
    assert_eq!(any_present(pages.0).unwrap(), Some(false));
}

#[test]
fn what_is_missing_is_found_with_few_others_whatever_the_pattern() {
    if any_present(Pages::anonymous(1).0).unwrap().is_none() {
        eprintln!(
            "SKIP what_is_missing_is_found_with_few_others_whatever_the_pattern: this kernel has no PAGEMAP_SCAN (Linux 6.7)"
        );
        return;
    }
    let mut seed = 5_u64;
    let mut below = |end: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % end
    };
    for round in 0..200 {
        let pages = Pages::anonymous(600);
        assert!(pages.advise(0, 600, libc::MADV_NOHUGEPAGE));
        // Runs of one sort; long ones, and in every other round many short ones.
        let (mut sorts, longest) = (Vec::new(), if round % 2 == 0 { 120 } else { 3 });
        while sorts.len() < 600 {
            let (sort, len) = (below(3), 1 + below(longest));
            (0..len).for_each(|_| sorts.push(sort));
        }
        sorts.truncate(600);
        for (page, sort) in sorts.iter().enumerate() {
            match sort {
                0 => {}
                1 => _ = pages.read(page), // of zeros
                _ => pages.write(page),
            }
        }
        for _ in 0..20 {
            let first = usize::try_from(below(600)).unwrap();
            let count = 1 + usize::try_from(below(8)).unwrap().min(599 - first);
            let all = sorts[first..first + count].iter().all(|sort| *sort == 2);
            assert_eq!(is_all_there(pages.part(first, count)), all, "{count} from {first}, {round}");
        }
        for (what, least) in [(Missing::Absent, 1), (Missing::Zero, 2)] {
            let mut shown = Vec::new();
            missing(pages.0, what, |part| {
                shown.push(part);
                Ok::<_, ()>(())
            })
            .unwrap();
            assert!(shown.windows(2).all(|pair| pair[0].end() <= pair[1].start()), "{shown:?}");
            let is_missing = |page: &usize| sorts[*page] < least;
            let numbers = pages.numbers(&shown);
            assert!((0..600).filter(is_missing).all(|page| numbers.binary_search(&page).is_ok()), "{what:?} {round}");
            for part in &shown {
                let inside = pages.numbers(&[*part]);
                assert!(is_missing(&inside[0]) && is_missing(inside.last().unwrap()), "{what:?} {round}");
                let others = inside.split(is_missing).map(<[usize]>::len).max();
                assert!(others <= Some(16), "{what:?} {round}: {others:?}");
            }
        }
    }
    let stopped = missing(Pages::anonymous(3).0, Missing::Absent, |part| Err(part.pages()));
    assert_eq!(stopped, Err(3));

    let pages = Pages::anonymous(3);
    (0..3).for_each(|page| pages.write(page));
    assert!(is_all_there(pages.0));
}
