//! A second mapping of shared pages, owned by us: what the program does to its own mapping no longer pulls the pages from under the device.
//!
//! `mremap` with an old size of 0 makes one without the file's descriptor. Three things have to be minded. It copies a watch
//! (userfaultfd registration) too, so the caller makes sure there is none. It takes whatever is mapped at the address at that instant, so
//! the result is compared with what was wanted. And files are told apart by device and inode, which the kernel may use again for another
//! file once this one is gone; an alias keeps its file alive, so an entry of the cache can't come to mean another file.
//!
//! Aliases are counted references: objects over the same part of the same file share one, also while an invalidated object is being
//! replaced by its successor. The last one to go unmaps it, so that memory the program gave up is not kept from the system.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use nix::errno::Errno;
use nix::sys::mman::{MRemapFlags, mremap, munmap};
use pinfold_core::DeviceError;
use pinfold_invalidate::{HostRange, Protection, mappings};

use crate::path::Run;

/// A mapping of ours of the part of a file that `run` says.
///
/// # Invariants
/// `range` is mapped by us, is referred to by nobody but holders of this value, and shows exactly `run`.
pub(crate) struct Alias {
    range: HostRange,
    run: Run,
    cache: Weak<AliasCache>,
}

impl Alias {
    pub(crate) fn range(&self) -> HostRange {
        self.range
    }

    pub(crate) fn protection(&self) -> Protection {
        self.run.protection
    }
}

impl Drop for Alias {
    fn drop(&mut self) {
        if let Some(cache) = self.cache.upgrade() {
            cache.forget(self.run);
        }
        unmap(self.range);
    }
}

/// The aliases alive, by what they show.
///
/// The lock is held for a look or an insertion only, never across a system call.
#[derive(Default)]
pub(crate) struct AliasCache {
    alive: Mutex<HashMap<Run, Weak<Alias>>>,
}

/// Why there is no alias.
#[derive(Debug)]
pub(crate) enum NoAlias {
    /// The kernel can't make one of this mapping (huge pages, no room); the mapping itself can still be imported.
    Impossible(Errno),
    /// The memory isn't what it was.
    Fault(DeviceError),
}

impl AliasCache {
    /// The alias of `run`, if there is one already.
    pub(crate) fn get(&self, run: Run) -> Option<Arc<Alias>> {
        self.alive().get(&run).and_then(Weak::upgrade)
    }

    /// The alias of `run`, which is mapped at `range`: the one alive, or a new one.
    ///
    /// # Errors
    /// [`NoAlias`]
    pub(crate) fn make(self: &Arc<Self>, range: HostRange, run: Run) -> Result<Arc<Alias>, NoAlias> {
        if let Some(alias) = self.get(run) {
            return Ok(alias);
        }
        let made = map_again(range)?;
        // INVARIANT: `made` is a new mapping that nobody else knows; what it shows is checked before anyone else can see it.
        let new = Arc::new(Alias { range: made, run, cache: Arc::downgrade(self) });
        let shown = mappings(made).ok().and_then(|shown| Run::of(&shown));
        if shown != Some(run) {
            let why = "another thread mapped something else there while an alias was made; acquire again";
            return Err(NoAlias::Fault(DeviceError::Fault { range, why, errno: libc::EAGAIN }));
        }
        let mut alive = self.alive();
        let kept = match alive.entry(run) {
            Entry::Occupied(mut entry) => entry.get().upgrade().unwrap_or_else(|| {
                entry.insert(Arc::downgrade(&new));
                Arc::clone(&new)
            }),
            Entry::Vacant(entry) => {
                entry.insert(Arc::downgrade(&new));
                Arc::clone(&new)
            }
        };
        // If another thread was faster, `new` unmaps itself, and that takes the lock again.
        drop(alive);
        Ok(kept)
    }

    /// Removes the entry of an alias that is going, unless a new one has taken its place.
    fn forget(&self, run: Run) {
        if let Entry::Occupied(entry) = self.alive().entry(run)
            && entry.get().strong_count() == 0
        {
            entry.remove();
        }
    }

    fn alive(&self) -> MutexGuard<'_, HashMap<Run, Weak<Alias>>> {
        // A panic under the lock can only be a failed allocation of the map, which leaves the map as it was.
        self.alive.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.alive().len()
    }
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
    use pinfold_invalidate::page_size;

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
    fn an_alias_shows_the_same_bytes_and_outlives_the_mapping() {
        let (cache, range) = (Arc::new(AliasCache::default()), map(memfd(2), 2));
        let alias = cache.make(range, run(range)).unwrap();
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
        let first = cache.make(one, run(one)).unwrap();
        let second = cache.make(two, run(two)).unwrap();
        assert!(Arc::ptr_eq(&first, &second));
        // An earlier alias that goes only now doesn't take the entry of its successor with it.
        cache.forget(run(one));
        assert!(cache.get(run(one)).is_some());
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
                        let alias = cache.make(range, run).unwrap();
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
        let wrong = cache.make(range, run(other));
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
