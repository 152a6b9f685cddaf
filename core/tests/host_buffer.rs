//! Host buffers: what the seals refuse, what the accessors copy, and that the mapping goes when it should.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::uio::{pread, pwrite};
use nix::unistd::ftruncate;
use pinfold_core::{HostBuffer, HostBufferError, HostBufferKind, HugePages, page_size};
use pinfold_invalidate::{Change, Shards, Space, Target, mapping_at};

const KINDS: [HostBufferKind; 2] = [HostBufferKind::Exportable, HostBufferKind::Sealed];

fn buffer(pages: usize, kind: HostBufferKind) -> HostBuffer {
    HostBuffer::new(pages * page_size(), kind, HugePages::No).unwrap()
}

fn errno<T: std::fmt::Debug>(result: nix::Result<T>) -> i32 {
    result.unwrap_err() as i32
}

fn punch(buffer: &HostBuffer) -> nix::Result<()> {
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(buffer.as_fd(), hole, 0, i64::try_from(page_size()).unwrap())
}

#[test]
fn nobody_can_change_the_size_or_the_seals_of_either_kind() {
    for kind in KINDS {
        let buffer = buffer(3, kind);
        assert_eq!(errno(ftruncate(buffer.as_fd(), 0)), libc::EPERM);
        assert_eq!(errno(ftruncate(buffer.as_fd(), 1 << 20)), libc::EPERM);
        assert_eq!(errno(fcntl(buffer.as_fd(), FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE))), libc::EPERM);
    }
}

#[test]
fn a_sealed_buffer_is_written_by_its_own_mapping_only() {
    let sealed = buffer(1, HostBufferKind::Sealed);
    sealed.write(0, b"ours").unwrap();
    assert_eq!(errno(pwrite(sealed.as_fd(), b"theirs", 0)), libc::EPERM);
    assert_eq!(errno(punch(&sealed)), libc::EPERM);
    // SAFETY: a new mapping at an address of the kernel's choice; it is refused.
    let at = unsafe {
        let both = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(ptr::null_mut(), page_size(), both, libc::MAP_SHARED, sealed.as_fd().as_raw_fd(), 0)
    };
    assert_eq!((at, io::Error::last_os_error().raw_os_error()), (libc::MAP_FAILED, Some(libc::EPERM)));
    let mut seen = [0; 4];
    pread(sealed.as_fd(), &mut seen, 0).unwrap();
    assert_eq!(&seen, b"ours");

    let open = buffer(1, HostBufferKind::Exportable);
    open.write(0, b"ours").unwrap();
    pwrite(open.as_fd(), b"theirs", 0).unwrap();
    punch(&open).unwrap();
    open.read(0, &mut seen).unwrap();
    assert_eq!(seen, [0; 4], "a hole reads as zeros");
}

#[test]
fn every_offset_and_length_copies_exactly_its_bytes() {
    let buffer = buffer(1, HostBufferKind::Exportable);
    let mut naive = vec![0_u8; buffer.size()];
    let ends = [0, 1, 7, 8, 9, 15, 16, 17, 24, 31];
    for (round, (&at, &len)) in ends.iter().flat_map(|at| ends.iter().map(move |len| (at, len))).enumerate() {
        for at in [at, buffer.size() - len - at] {
            let bytes: Vec<u8> = (0..len).map(|n| (round * 31 + n * 7 + at) as u8).collect();
            buffer.write(at, &bytes).unwrap();
            naive[at..at + len].copy_from_slice(&bytes);
            let mut seen = vec![0; len];
            buffer.read(at, &mut seen).unwrap();
            assert_eq!(seen, bytes, "{len} bytes at {at}");
        }
        let mut whole = vec![0; buffer.size()];
        buffer.read(0, &mut whole).unwrap();
        assert!(whole == naive, "what is beside {len} bytes at {at} is untouched");
    }
}

#[test]
fn access_beyond_the_end_is_an_error_and_copies_nothing() {
    let buffer = buffer(1, HostBufferKind::Sealed);
    let size = buffer.size();
    for (offset, len) in [(size, 1), (size - 1, 2), (usize::MAX, 1), (0, size + 1), (1, size)] {
        let mut into = vec![7; len];
        let error = buffer.read(offset, &mut into).unwrap_err();
        assert!(matches!(error, HostBufferError::Outside { .. }) && error.errno() == libc::EFAULT, "{error}");
        assert!(into.iter().all(|&byte| byte == 7));
        assert!(buffer.write(offset, &into).is_err());
    }
    buffer.read(size, &mut []).unwrap();
}

#[test]
fn sizes_are_rounded_up_to_pages_and_impossible_ones_refused() {
    let size = |size| HostBuffer::new(size, HostBufferKind::Exportable, HugePages::Try).map(|buffer| buffer.size());
    assert_eq!(size(1).unwrap(), page_size());
    assert_eq!(size(page_size() + 1).unwrap(), 2 * page_size());
    assert_eq!(size(0).unwrap_err().errno(), libc::EINVAL);
    assert_eq!(size(usize::MAX).unwrap_err().errno(), libc::E2BIG);
    assert_eq!(size(1 << 50).unwrap_err().errno(), libc::E2BIG);
    assert_eq!(size(pinfold_invalidate::MAX_PAGES * page_size()).map_err(|error| error.errno()).err(), None);
}

#[test]
fn huge_pages_that_are_not_there_are_an_error_that_says_what_to_do() {
    match HostBuffer::new(1, HostBufferKind::Exportable, HugePages::Require) {
        Ok(buffer) => assert!(buffer.size() > page_size(), "made of huge pages"),
        Err(error) => assert!(error.to_string().contains("vm.nr_hugepages"), "{error}"),
    }
}

#[test]
fn the_last_clone_unmaps_and_closes() {
    let buffer = buffer(2, HostBufferKind::Sealed);
    let (start, file) = (buffer.range().start(), File::from(buffer.as_fd().try_clone_to_owned().unwrap()));
    let inode = |start| mapping_at(start).unwrap().and_then(|mapping| mapping.file).map(|file| file.inode);
    let ours = inode(start);
    assert!(ours.is_some());
    let clone = buffer.clone();
    drop(buffer);
    assert_eq!(inode(start), ours);
    drop(clone);
    // Another test may have mapped something of its own there by now.
    assert_ne!(inode(start), ours);
    drop(file);
}

struct Told(AtomicU32, Shards);

impl Target for Told {
    fn invalidated(&self, _: &Change) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
    fn settled(self: Arc<Self>) {}
    fn shards(&self) -> Shards {
        self.1
    }
}

#[test]
fn whoever_is_over_the_buffer_is_told_before_it_goes() {
    let space = Space::get(Duration::from_millis(100)).unwrap();
    let buffer = buffer(4, HostBufferKind::Exportable);
    let range = buffer.range();
    let watched = space.watch(range).unwrap();
    let told = Arc::new(Told(AtomicU32::new(0), watched.shards));
    space.insert(range, 7, told.clone());
    let before = space.stats().brackets;
    drop(buffer);
    // Once, or more often if another test's buffer has come and gone there since.
    assert!(told.0.load(Ordering::SeqCst) >= 1);
    assert!(space.stats().brackets > before, "by a bracket, which has no open end");
    space.remove(range, 7);
}

#[test]
fn a_buffer_that_the_address_space_has_no_room_for_says_so_and_leaves_nothing() {
    let open_descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    // In a process of its own, which the limit is for.
    // SAFETY: the child only makes calls that allocate at worst, which the C library makes legal after a fork, and leaves by _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let before = open_descriptors();
        let limit = |rlim_cur| {
            let limit = libc::rlimit { rlim_cur, rlim_max: libc::RLIM_INFINITY };
            // SAFETY: the call reads `limit`.
            unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) };
        };
        let make = || HostBuffer::new(16 * page_size(), HostBufferKind::Exportable, HugePages::No);
        limit(1); // all that is there stays
        let refused = make().map(drop);
        limit(libc::RLIM_INFINITY);
        let said = matches!(&refused, Err(error @ HostBufferError::System { step: "map", .. }) if error.errno() == libc::ENOMEM);
        let code = match () {
            () if !said => 1,
            () if open_descriptors() != before => 2,
            () => i32::from(make().is_err()) * 3,
        };
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: `status` is a live integer that the call writes.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0, "exit code 1: not refused as it should be, 2: a descriptor is left, 3: refused with room");
}
