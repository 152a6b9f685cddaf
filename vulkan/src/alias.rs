//! A second mapping of shared pages, owned by us: what the program does to its own mapping no longer pulls the pages from under the device.
//!
//! `mremap` with an old size of 0 makes one without the file's descriptor. Three things have to be minded. It copies a watch
//! (userfaultfd registration) too, so the caller makes sure there is none. It takes whatever is mapped at the address at that instant, so
//! the result is compared with what was wanted. And files are told apart by device and inode, which the kernel may use again for another
//! file once this one is gone; an alias keeps its file alive, so an entry of the cache can't come to mean another file.
//!
//! An alias is made of all of the mapping around an object that nobody watches, once; objects over parts of it share it, also while an
//! invalidated object is being replaced by its successor. It is kept between acquisitions, because making another one means ending the watch of
//! every object over the pages. It goes when the last user is gone and either no object is left that could want it, or the program has mapped
//! something else there, so that memory the program gave up is not kept from the system.

use std::collections::HashMap;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use nix::errno::Errno;
use nix::sys::mman::{MRemapFlags, mremap, munmap};
use pinfold_core::DeviceError;
use pinfold_invalidate::{FileId, HostRange, MapsError, Protection, Space, mappings, page_size};

use crate::path::Run;

/// A mapping of ours of the part of a file that `run` says.
///
/// # Invariants
/// `range` is mapped by us, is referred to by nobody but holders of this value, and shows exactly `run`.
pub(crate) struct Alias {
    range: HostRange,
    run: Run,
    id: u64,
    cache: Weak<AliasCache>,
}

impl Alias {
    pub(crate) fn range(&self) -> HostRange {
        self.range
    }

    pub(crate) fn protection(&self) -> Protection {
        self.run.protection
    }

    /// Where it shows a run that it covers.
    pub(crate) fn part(&self, run: Run) -> HostRange {
        let at = usize::try_from(run.offset - self.run.offset).expect("inside a mapping");
        HostRange::new(self.range.start() + at, run.len).expect("a part of a mapping")
    }
}

impl Drop for Alias {
    fn drop(&mut self) {
        if let Some(cache) = self.cache.upgrade() {
            cache.forget(self);
        }
        unmap(self.range);
    }
}

/// The aliases alive, by the file and protection they show.
///
/// The lock is held for a look or an insertion only, never across a system call.
#[derive(Default)]
pub(crate) struct AliasCache {
    alive: Mutex<Alive>,
}

#[derive(Default)]
struct Alive {
    by_file: HashMap<(FileId, Protection), Vec<Entry>>,
    next: u64,
}

struct Entry {
    run: Run,
    id: u64,
    alias: Weak<Alias>,
    /// Keeps it between acquisitions.
    kept: Option<Kept>,
}

#[derive(Clone)]
struct Kept {
    alias: Arc<Alias>,
    /// Where the program has what it shows.
    source: HostRange,
    /// Whose objects it is kept for.
    group: usize,
}

impl Kept {
    /// Whether an object of the group lies over what the alias shows. Asked of ever larger surroundings of `near`: where there are many, one is near.
    fn is_wanted(&self, space: &Space, near: HostRange) -> bool {
        let mut reach = near.len().max(1 << 20);
        loop {
            let start = self.source.start().max(near.start().saturating_sub(reach) / page_size() * page_size());
            let end = self.source.end().min(near.end().saturating_add(reach) / page_size() * page_size());
            let mut wanted = false;
            if let Some(part) = HostRange::from_bounds(start as u64, end as u64) {
                space.visit(part, |_, _, target| wanted |= target.group() == self.group);
            }
            if wanted || (start == self.source.start() && end == self.source.end()) {
                return wanted;
            }
            reach = reach.saturating_mul(4);
        }
    }
}

/// Why there is no alias.
#[derive(Debug)]
pub(crate) enum NoAlias {
    /// The kernel can't make one of this mapping (huge pages, no room), or not tell what it shows; the mapping itself can still be imported.
    Impossible(Errno),
    /// The memory isn't what it was.
    Fault(DeviceError),
}

impl AliasCache {
    /// An alias that shows `run`, if there is one already.
    pub(crate) fn get(&self, run: Run) -> Option<Arc<Alias>> {
        let alive = self.alive();
        let same_file = alive.by_file.get(&(run.file, run.protection))?;
        same_file.iter().find_map(|entry| if entry.run.covers(&run) { entry.alias.upgrade() } else { None })
    }

    /// An alias of `run`, which is mapped at `range`: the one alive, or a new one. One that is made for a `group` of objects is kept for it.
    ///
    /// # Errors
    /// [`NoAlias`]
    pub(crate) fn make(self: &Arc<Self>, range: HostRange, run: Run, group: usize) -> Result<Arc<Alias>, NoAlias> {
        if let Some(alias) = self.get(run) {
            return Ok(alias);
        }
        let made = map_again(range)?;
        let id = {
            let mut alive = self.alive();
            alive.next += 1;
            alive.next
        };
        // INVARIANT: `made` is a new mapping that nobody else knows; what it shows is checked before anyone else can see it.
        let new = Arc::new(Alias { range: made, run, id, cache: Arc::downgrade(self) });
        let shown = match mappings(made) {
            Ok(shown) => Run::of(&shown),
            Err(MapsError::Unreadable(error)) => {
                return Err(NoAlias::Impossible(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))));
            }
            Err(_) => None,
        };
        if shown != Some(run) {
            let why = "another thread mapped something else there while an alias was made; acquire again";
            return Err(NoAlias::Fault(DeviceError::Fault { range, why, errno: libc::EAGAIN }));
        }
        let kept = (group != 0).then(|| Kept { alias: Arc::clone(&new), source: range, group });
        let mut alive = self.alive();
        let same_file = alive.by_file.entry((run.file, run.protection)).or_default();
        let faster = same_file.iter().find(|entry| entry.run == run).and_then(|entry| entry.alias.upgrade());
        if faster.is_none() {
            same_file.push(Entry { run, id, alias: Arc::downgrade(&new), kept });
        }
        // If another thread was faster, `new` unmaps itself, and that takes the lock again.
        drop(alive);
        Ok(faster.unwrap_or(new))
    }

    /// Gives up aliases that are kept and out of use, if the program has something else mapped at `range`, where an object used them.
    pub(crate) fn give_up_moved(&self, range: HostRange) {
        for (run, id, kept) in self.idle(range) {
            if !kept.source.intersection(range).is_some_and(|part| shows(part, kept.source, run)) {
                drop(self.let_go(run, id));
            }
        }
    }

    /// Gives up aliases that are kept and out of use, if no object is left that could want them. One over `range` has just gone.
    pub(crate) fn give_up_unwanted(&self, space: &Space, range: HostRange) {
        for (run, id, kept) in self.idle(range) {
            if !kept.is_wanted(space, range) {
                drop(self.let_go(run, id));
            }
        }
    }

    /// Aliases that show what is at `range` and that nothing but keeping them keeps.
    fn idle(&self, range: HostRange) -> Vec<(Run, u64, Kept)> {
        let alive = self.alive();
        let kept = alive.by_file.values().flatten().filter_map(|entry| Some((entry, entry.kept.as_ref()?)));
        let idle = kept.filter(|(_, kept)| kept.source.overlaps(range) && Arc::strong_count(&kept.alias) == 1);
        idle.map(|(entry, kept)| (entry.run, entry.id, kept.clone())).collect()
    }

    /// Gives up every alias that is kept.
    pub(crate) fn clear(&self) {
        let kept: Vec<_> = self.alive().by_file.values_mut().flatten().filter_map(|entry| entry.kept.take()).collect();
        drop(kept); // outside the lock, as unmapping takes it
    }

    /// Takes what keeps an alias, to be dropped outside the lock.
    fn let_go(&self, run: Run, id: u64) -> Option<Kept> {
        let mut alive = self.alive();
        let same_file = alive.by_file.get_mut(&(run.file, run.protection))?;
        same_file.iter_mut().find(|entry| entry.id == id)?.kept.take()
    }

    /// Removes the entry of an alias that is going.
    fn forget(&self, alias: &Alias) {
        let key = (alias.run.file, alias.run.protection);
        let mut alive = self.alive();
        let Some(same_file) = alive.by_file.get_mut(&key) else { return };
        same_file.retain(|entry| entry.id != alias.id);
        if same_file.is_empty() {
            alive.by_file.remove(&key);
        }
    }

    fn alive(&self) -> MutexGuard<'_, Alive> {
        // A panic under the lock can only be a failed allocation of the map, which leaves the map as it was.
        self.alive.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.alive().by_file.values().map(Vec::len).sum()
    }
}

/// Whether the program has at `part` still what it had there when `source` showed `run`.
fn shows(part: HostRange, source: HostRange, run: Run) -> bool {
    let offset = run.offset + (part.start() - source.start()) as u64;
    let there = mappings(part).ok().and_then(|there| Run::of(&there));
    there.is_some_and(|there| there.file == run.file && there.offset == offset && there.len == part.len())
}

/// Maps the pages at `range`, which are shared, a second time.
fn map_again(range: HostRange) -> Result<HostRange, NoAlias> {
    let start = NonNull::new(ptr::with_exposed_provenance_mut(range.start()));
    let Some(start) = start else { return Err(NoAlias::Impossible(Errno::EFAULT)) };
    // SAFETY: with an old size of 0 and no fixed address, nothing that exists is moved, changed or replaced.
    let made = unsafe { mremap(start, 0, range.len(), MRemapFlags::MREMAP_MAYMOVE, None) };
    match made {
        Ok(made) => {
            Ok(HostRange::from_ptr(made.as_ptr(), range.len()).expect("the kernel maps whole pages of user space"))
        }
        Err(Errno::EFAULT) => {
            let why = "nothing is mapped there any more";
            Err(NoAlias::Fault(DeviceError::Fault { range, why, errno: libc::EFAULT }))
        }
        Err(errno) => Err(NoAlias::Impossible(errno)),
    }
}

/// Unmaps a mapping of ours.
fn unmap(range: HostRange) {
    let start = NonNull::new(ptr::with_exposed_provenance_mut(range.start())).expect("the kernel never chooses page 0");
    // SAFETY: `range` is a mapping made by `map_again`; the value that owned it is gone, and with it every import of these pages.
    let unmapped = unsafe { munmap(start, range.len()) };
    // Only a wrong range, or one more mapping than the system allows (where a hole splits one), can fail; this is a whole mapping.
    debug_assert_eq!(unmapped, Ok(()), "unmapping an alias");
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::sys::mman::{MapFlags, ProtFlags, mmap};
    use nix::unistd::ftruncate;

    use super::*;

    fn memfd(pages: usize) -> OwnedFd {
        let fd = memfd_create(c"alias", MFdFlags::MFD_CLOEXEC).unwrap();
        ftruncate(&fd, i64::try_from(pages * page_size()).unwrap()).unwrap();
        fd
    }

    fn map(fd: impl AsFd, pages: usize) -> HostRange {
        let len = pages * page_size();
        let (protection, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED);
        // SAFETY: a new mapping at an address that the kernel chooses.
        let at = unsafe { mmap(None, len.try_into().unwrap(), protection, flags, fd, 0) }.unwrap();
        HostRange::from_ptr(at.as_ptr(), len).unwrap()
    }

    fn run(range: HostRange) -> Run {
        Run::of(&mappings(range).unwrap()).unwrap()
    }

    fn byte(range: HostRange) -> *mut u8 {
        ptr::with_exposed_provenance_mut(range.start())
    }

    #[test]
    fn an_alias_that_the_address_space_has_no_room_for_is_impossible_and_leaves_nothing() {
        let (cache, range) = (Arc::new(AliasCache::default()), map(memfd(64), 64));
        let run = run(range);
        // In a process of its own, which the limit is for.
        // SAFETY: the child only makes calls that allocate at worst, which the C library makes legal after a fork, and leaves by _exit.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let limit = |rlim_cur| {
                let limit = libc::rlimit { rlim_cur, rlim_max: libc::RLIM_INFINITY };
                // SAFETY: the call reads `limit`.
                unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) };
            };
            limit(1); // all that is there stays
            let refused = cache.make(range, run, 1);
            limit(libc::RLIM_INFINITY);
            let code = match () {
                () if !matches!(refused, Err(NoAlias::Impossible(Errno::ENOMEM))) => 1,
                () if cache.len() != 0 => 2,
                () => i32::from(!cache.make(range, run, 1).is_ok_and(|alias| !alias.range().overlaps(range))) * 3,
            };
            // SAFETY: ends the child without running anything of the parent's.
            unsafe { libc::_exit(code) };
        }
        let mut status = 0;
        // SAFETY: `status` is a live integer that the call writes.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0, "exit code 1: not refused as it should be, 2: it is in the cache, 3: refused with room");
        unmap(range);
    }

    #[test]
    fn an_alias_shows_the_same_bytes_and_outlives_the_mapping() {
        let (cache, range) = (Arc::new(AliasCache::default()), map(memfd(2), 2));
        let alias = cache.make(range, run(range), 0).unwrap();
        assert!(!alias.range().overlaps(range));
        // SAFETY: `range` is mapped, writable, and only this test knows it.
        unsafe { byte(range).write_volatile(42) };
        unmap(range);
        // SAFETY: the alias is mapped as long as `alias` lives.
        assert_eq!(unsafe { byte(alias.range()).read_volatile() }, 42);
    }

    #[test]
    fn equal_parts_share_one_alias_and_the_last_holder_unmaps_it() {
        let (cache, fd) = (Arc::new(AliasCache::default()), memfd(2));
        let (one, two) = (map(&fd, 2), map(&fd, 2));
        let first = cache.make(one, run(one), 0).unwrap();
        let second = cache.make(two, run(two), 0).unwrap();
        assert!(Arc::ptr_eq(&first, &second));
        // A part of it is shown by the same alias, at its place.
        let page = page_size();
        let part = HostRange::new(two.start() + page, page).unwrap();
        let tail = cache.make(part, run(part), 0).unwrap();
        assert!(Arc::ptr_eq(&first, &tail) && tail.part(run(part)).start() == first.range().start() + page);
        drop(tail);
        let at = first.range();
        drop(first);
        assert!(mappings(at).is_ok());
        drop(second);
        assert_eq!(cache.len(), 0);
        assert!(!mappings(at).is_ok_and(|there| Run::of(&there) == Some(run(one))));
        unmap(one);
        unmap(two);
    }

    #[test]
    fn a_kept_alias_goes_when_the_program_maps_something_else_there_or_nobody_is_left() {
        let (space, cache) =
            (Space::get(std::time::Duration::from_millis(100)).unwrap(), Arc::new(AliasCache::default()));
        let (fd, group) = (memfd(2), 77);
        for unmapped in [true, false] {
            let range = map(&fd, 2);
            let target: Arc<dyn pinfold_invalidate::Target> = Arc::new(Member(group));
            space.insert(range, 1 << 62, target);
            drop(cache.make(range, run(range), group).unwrap());
            let last = HostRange::new(range.start() + page_size(), page_size()).unwrap();
            for part in [range, last] {
                cache.give_up_moved(part);
                cache.give_up_unwanted(&space, part);
            }
            assert_eq!(cache.len(), 1, "kept while there is somebody to want it");
            if unmapped {
                unmap(range);
                cache.give_up_moved(last);
                assert_eq!(cache.len(), 0);
            }
            space.remove(range, 1 << 62);
            if !unmapped {
                cache.give_up_unwanted(&space, last);
                unmap(range);
            }
            assert_eq!(cache.len(), 0);
        }
        let range = map(&fd, 2);
        drop(cache.make(range, run(range), group).unwrap());
        cache.clear();
        assert_eq!(cache.len(), 0);
        unmap(range);
    }

    struct Member(usize);

    impl pinfold_invalidate::Target for Member {
        fn invalidated(&self, _: &pinfold_invalidate::Change) {}

        fn settled(self: Arc<Self>) {}

        fn shards(&self) -> pinfold_invalidate::Shards {
            pinfold_invalidate::Shards::NONE
        }

        fn group(&self) -> usize {
            self.0
        }
    }

    #[test]
    fn threads_that_make_and_drop_aliases_of_the_same_part_never_see_anything_else() {
        let (cache, fd) = (Arc::new(AliasCache::default()), memfd(2));
        let range = map(&fd, 2);
        let run = run(range);
        // SAFETY: `range` is mapped, writable, and no other thread knows it yet.
        unsafe { byte(range).write_volatile(7) };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let alias = cache.make(range, run, 0).unwrap();
                        // SAFETY: the alias is mapped as long as `alias` lives.
                        assert_eq!(unsafe { byte(alias.range()).read_volatile() }, 7);
                    }
                });
            }
        });
        assert_eq!(cache.len(), 0);
        unmap(range);
    }

    #[test]
    fn an_alias_of_memory_that_changed_hands_is_refused() {
        let (cache, range, other) = (Arc::new(AliasCache::default()), map(memfd(1), 1), map(memfd(1), 1));
        let wrong = cache.make(range, run(other), 0);
        assert!(matches!(wrong, Err(NoAlias::Fault(DeviceError::Fault { errno: libc::EAGAIN, .. }))));
        assert_eq!(cache.len(), 0);
        unmap(range);
        unmap(other);
    }

    #[test]
    fn private_memory_has_no_alias() {
        let len = page_size();
        let (protection, flags) = (ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE | MapFlags::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address that the kernel chooses.
        let at = unsafe { nix::sys::mman::mmap_anonymous(None, len.try_into().unwrap(), protection, flags) }.unwrap();
        let range = HostRange::from_ptr(at.as_ptr(), len).unwrap();
        assert!(matches!(map_again(range), Err(NoAlias::Impossible(Errno::EINVAL))));
        unmap(range);
    }
}
