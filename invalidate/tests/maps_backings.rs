//! What the list of mappings says of real mappings of each kind.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::ptr;

use pinfold_invalidate::{Backing, HostRange, Mapping, MapsError, mapping_at, mappings, page_size};

/// A mapping of this test's own, unmapped when dropped.
struct Map(HostRange);

impl Map {
    fn new(pages: usize, flags: i32, fd: i32, first_page: usize) -> io::Result<Self> {
        let len = pages * page_size();
        let offset = libc::off_t::try_from(first_page * page_size()).unwrap();
        // SAFETY: a mapping at an address of the kernel's choice disturbs nobody.
        let at = unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_READ, flags, fd, offset) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(HostRange::from_ptr(at, len).unwrap()))
    }

    fn told(&self) -> Mapping {
        let found = mappings(self.0).unwrap();
        assert_eq!(found.len(), 1, "nobody splits this mapping");
        let mapping = found[0].clone();
        assert_eq!(mapping.range, self.0);
        // Not equal: other tests' mappings beside this one may become one with it, or go, at any time.
        assert!(mapping.whole.covers(self.0));
        assert!(mapping_at(self.0.start() + 1).unwrap().is_some_and(|found| found.whole.covers(self.0)));
        mapping
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no reference to its bytes exists.
        unsafe { libc::munmap(ptr::with_exposed_provenance_mut(self.0.start()), self.0.len()) };
    }
}

fn memfd(name: &std::ffi::CStr) -> File {
    // SAFETY: the name is a terminated string.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "memfd_create: {}", io::Error::last_os_error());
    // SAFETY: the descriptor was just made and nobody else owns it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(16 * page_size() as u64).unwrap();
    file
}

/// A file of 16 pages in `folder`, which is gone when the value is dropped.
struct Scratch(File, std::path::PathBuf);

impl Scratch {
    fn new(folder: &str, name: &str) -> io::Result<Self> {
        let path = std::path::Path::new(folder).join(format!("{name}.{}", std::process::id()));
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
        let scratch = Self(file, path);
        (&scratch.0).write_all(&vec![1; 16 * page_size()])?;
        Ok(scratch)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.1); // a test may have removed it
    }
}

#[test]
fn shared_memory_is_told_whatever_its_name() {
    for name in [c"plain", c"[heap]", c"a b (deleted)", c"line\nfeed", c""] {
        let file = memfd(name);
        let told = Map::new(4, libc::MAP_SHARED, file.as_raw_fd(), 3).unwrap().told();
        assert_eq!((told.backing, told.shared), (Backing::SharedMemory, true), "{name:?}");
        assert_eq!(told.offset, 3 * page_size() as u64);
        assert_eq!(told.file.map(|file| file.inode), Some(file.metadata().unwrap().ino()));
        let private = Map::new(4, libc::MAP_PRIVATE, file.as_raw_fd(), 0).unwrap().told();
        assert_eq!((private.backing, private.shared), (Backing::SharedMemory, false));
        assert_eq!(private.file, told.file, "two mappings of one file");
    }
    let told = Map::new(4, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0).unwrap().told();
    assert_eq!((told.backing, told.shared, told.file.is_some()), (Backing::SharedMemory, true, true));
    match Scratch::new("/dev/shm", "pinfold-maps") {
        Ok(file) => {
            let told = Map::new(4, libc::MAP_SHARED, file.0.as_raw_fd(), 0).unwrap().told();
            assert_eq!(told.backing, Backing::SharedMemory);
        }
        Err(err) => eprintln!("skipped /dev/shm: {err}"),
    }
}

#[test]
fn anonymous_memory_has_no_file_and_no_offset() {
    let told = Map::new(4, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0).unwrap().told();
    assert_eq!((told.backing, told.shared, told.file, told.offset), (Backing::Anonymous, false, None, 0));
    let zero = File::open("/dev/zero").unwrap();
    let told = Map::new(4, libc::MAP_PRIVATE, zero.as_raw_fd(), 0).unwrap().told();
    assert_eq!((told.backing, told.shared), (Backing::Anonymous, false));
}

#[test]
fn a_file_stays_a_file_when_it_is_deleted_or_named_like_something_else() {
    let folder = std::env::temp_dir();
    for name in ["plain", "memfd:x", "[stack]", "ends in (deleted)"] {
        let file = Scratch::new(folder.to_str().unwrap(), name).unwrap();
        let map = Map::new(4, libc::MAP_PRIVATE, file.0.as_raw_fd(), 1).unwrap();
        let before = map.told();
        assert_eq!(
            (before.backing, before.shared, before.offset),
            (Backing::File, false, page_size() as u64),
            "{name}"
        );
        fs::remove_file(&file.1).unwrap();
        assert_eq!(map.told(), before, "deleting {name} changes nothing");
    }
}

#[test]
fn the_main_stack_the_heap_and_the_kernels_pages_are_told_apart() {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    for (name, backing) in [("[stack]", Backing::Stack), ("[heap]", Backing::Heap), ("[vdso]", Backing::Special)] {
        let Some(line) = maps.lines().find(|line| line.ends_with(name)) else {
            eprintln!("skipped: this process has no {name}");
            continue;
        };
        let start = usize::from_str_radix(line.split('-').next().unwrap(), 16).unwrap();
        // The stack grows downwards, so its end is asked for.
        let found = mapping_at(start).unwrap().map(|mapping| mapping.backing);
        assert_eq!(found, Some(backing), "{name}");
    }
}

#[test]
fn the_rings_of_io_uring_and_of_devices_are_special() {
    let mut params = [0_u64; 15]; // `struct io_uring_params`, all zero: a plain ring
    // SAFETY: `params` has the size of `io_uring_params` and outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, params.as_mut_ptr()) };
    let Ok(fd @ 0..) = i32::try_from(fd) else {
        eprintln!("skipped: io_uring_setup: {}", io::Error::last_os_error());
        return;
    };
    // SAFETY: the descriptor was just made and nobody else owns it.
    let ring = unsafe { OwnedFd::from_raw_fd(fd) };
    let told = Map::new(1, libc::MAP_SHARED, ring.as_raw_fd(), 0).unwrap().told();
    assert_eq!(told.backing, Backing::Special);
}

#[test]
fn asking_leaves_no_descriptor_behind() {
    let map = Map::new(4, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0).unwrap();
    let lists = || {
        let open = fs::read_dir("/proc/self/fd").unwrap();
        open.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok()).filter(|path| path.ends_with("maps")).count()
    };
    for _ in 0..100 {
        mappings(map.0).unwrap();
        mapping_at(map.0.start()).unwrap();
    }
    // Another test's question may be under way; a leak would show as hundreds.
    assert!(lists() < 50, "{} descriptors of the list are open", lists());
}

#[test]
fn a_forked_child_is_told_its_own_mappings() {
    let map = Map::new(4, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0).unwrap();
    assert_eq!(map.told().backing, Backing::Anonymous);
    // SAFETY: the child only unmaps, asks and leaves by _exit. It allocates, which the C library makes legal after fork.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: the mapping is this process's own copy and no reference to its bytes exists.
        unsafe { libc::munmap(ptr::with_exposed_provenance_mut(map.0.start()), map.0.len()) };
        let hole = matches!(mappings(map.0), Err(MapsError::Hole { .. }));
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(i32::from(!hole)) };
    }
    assert!(child > 0, "fork: {}", io::Error::last_os_error());
    let mut status = 0;
    // SAFETY: `status` is a live integer that the call writes.
    let waited = unsafe { libc::waitpid(child, &mut status, 0) };
    assert_eq!((waited, status), (child, 0), "the child saw its own hole");
    assert_eq!(map.told().backing, Backing::Anonymous, "the parent still has it");
}

#[test]
fn a_mapping_larger_than_a_range_may_be_is_cut_around_the_question() {
    let page = page_size();
    let pages = pinfold_invalidate::MAX_PAGES + 1024;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a reservation at an address of the kernel's choice disturbs nobody.
    let at = unsafe { libc::mmap(ptr::null_mut(), pages * page, libc::PROT_NONE, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        eprintln!("skipped: can't reserve {pages} pages: {}", io::Error::last_os_error());
        return;
    }
    let end = at.addr() + pages * page;
    let tail = HostRange::new(end - page, page).unwrap();
    let told = mappings(tail).unwrap().last().unwrap().clone();
    assert_eq!(told.range, tail);
    assert!(told.whole.covers(tail));
    assert!(mapping_at(at.addr()).unwrap().unwrap().whole.contains(at.addr()));
    // SAFETY: the reservation is ours and holds nothing.
    unsafe { libc::munmap(at, pages * page) };
}
