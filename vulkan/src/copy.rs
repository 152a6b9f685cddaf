//! Copies between the program's memory and ours that can't crash.
//!
//! The program's memory may vanish while it is read or written (another thread unmaps it, another process truncates the file), and then a plain
//! copy would kill the process. So the kernel copies: `process_vm_readv` and `process_vm_writev` on ourselves answer `EFAULT` where a load or a
//! store would raise a signal. Where a sandbox forbids reading so, `/proc/self/mem` does the same; it is not used for writing, as it would write
//! to what the program itself may not.
//!
//! The device may use our side meanwhile, exactly as it may use an import while the program does; so there is never a Rust reference to these
//! bytes, only raw pointers.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::OnceLock;

use nix::errno::Errno;

use crate::share::share;

/// One piece to copy: `len` bytes at address `from`, to `at` bytes behind a base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) from: usize,
    pub(crate) at: usize,
    pub(crate) len: usize,
}

/// A copy of this many bytes or more is shared with rayon's global pool. On two cores 32 MiB took 0.58 and 0.65 of the time of one thread.
const SPLIT: usize = 32 << 20;
/// So is a copy of this many pieces: with 327 scattered pages a mirror took 0.68 and 0.73 of the time of one thread, as the caller begins at once.
const MANY: usize = 256;
/// The parts it is split into.
const PART: usize = 1 << 20;
/// Pieces that one system call copies. The kernel takes 1024 at most (`UIO_MAXIOV`).
const BATCH: usize = 256;
/// Fewer where the copy is split, so that the threads end together: with 777 pieces it took 0.57 of the time of one thread, with batches of 256 0.7.
const SPLIT_BATCH: usize = 64;

/// Where a split copy goes.
struct Target(NonNull<u8>);

// SAFETY: an address; each thread writes its own pieces behind it, through raw pointers (contract of `read_pieces`).
unsafe impl Sync for Target {}

/// Copies pieces of the program's memory to where they belong behind `base`, by several threads where that is faster.
///
/// # Errors
/// `EFAULT` where the source can't be read.
///
/// # Safety
/// `base` has room for every piece at its place, which no Rust reference covers, and the places don't overlap.
pub(crate) unsafe fn read_pieces(base: NonNull<u8>, pieces: &[Piece]) -> Result<(), Errno> {
    let total: usize = pieces.iter().map(|piece| piece.len).sum();
    if total < SPLIT && pieces.len() < MANY {
        // SAFETY: the contract is the same for every batch.
        return pieces.chunks(BATCH).try_for_each(|batch| unsafe { read_batch(base, batch) });
    }
    let parts: Vec<_> = pieces.iter().flat_map(|piece| piece.parts()).collect();
    let mut batches: Vec<&[Piece]> = Vec::with_capacity(total / PART + pieces.len() / SPLIT_BATCH + 1);
    let mut rest = &parts[..];
    while !rest.is_empty() {
        let mut bytes = 0;
        let fits = |piece: &&Piece| {
            bytes += piece.len;
            bytes <= PART
        };
        let count = rest.iter().take(SPLIT_BATCH).take_while(fits).count().max(1);
        let (batch, left) = rest.split_at(count);
        batches.push(batch);
        rest = left;
    }
    let target = &Target(base);
    let failed = OnceLock::new();
    share(batches.len(), &|number| {
        if failed.get().is_none() {
            // SAFETY: the contract is the same, and every piece is in one batch.
            let copied = unsafe { read_batch(target.0, batches[number]) };
            _ = copied.map_err(|errno| failed.set(errno));
        }
    });
    failed.get().map_or(Ok(()), |&errno| Err(errno))
}

impl Piece {
    fn parts(self) -> impl Iterator<Item = Self> {
        let part = move |start| Self { from: self.from + start, at: self.at + start, len: PART.min(self.len - start) };
        (0..self.len).step_by(PART).map(part)
    }
}

/// As [`read_pieces`], for at most [`BATCH`] of them, in one system call if all goes well.
///
/// # Safety
/// As [`read_pieces`].
unsafe fn read_batch(base: NonNull<u8>, batch: &[Piece]) -> Result<(), Errno> {
    const NOTHING: libc::iovec = libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 };
    let (mut ours, mut theirs) = ([NOTHING; BATCH], [NOTHING; BATCH]);
    for (at, piece) in batch.iter().enumerate() {
        // SAFETY: `base` has room for the piece there (contract).
        let to = unsafe { base.as_ptr().add(piece.at) };
        ours[at] = libc::iovec { iov_base: to.cast(), iov_len: piece.len };
        theirs[at] = libc::iovec { iov_base: ptr::without_provenance_mut(piece.from), iov_len: piece.len };
    }
    let (process, count) = (nix::unistd::getpid().as_raw(), batch.len());
    // SAFETY: the kernel checks both sides and writes only to `ours`, where there is room (contract).
    let copied =
        unsafe { libc::process_vm_readv(process, ours.as_ptr(), count as u64, theirs.as_ptr(), count as u64, 0) };
    let total: usize = batch.iter().map(|piece| piece.len).sum();
    if usize::try_from(copied) == Ok(total) {
        return Ok(());
    }
    // Something is in the way: once more, one by one, which says what.
    batch.iter().try_for_each(|piece| {
        // SAFETY: `base` has room for the piece there (contract).
        let to = unsafe { base.add(piece.at) };
        // SAFETY: as above.
        unsafe { read(to, piece.from, piece.len) }
    })
}

/// Copies `len` bytes at address `from` to `to`; answers `EFAULT` where the source can't be read.
///
/// # Safety
/// `to` has room for `len` bytes, which no Rust reference covers.
pub(crate) unsafe fn read(to: NonNull<u8>, from: usize, len: usize) -> Result<(), Errno> {
    // SAFETY: the contract is the same.
    match unsafe { copy_by(read_self, to, from, len) } {
        // A sandbox without this call; the file needs none.
        Err(Errno::EPERM | Errno::ENOSYS) => {
            let memory = File::open("/proc/self/mem").map_err(errno)?;
            // SAFETY: the contract is the same.
            unsafe { copy_by(|to, from, len| read_file(&memory, to, from, len), to, from, len) }
        }
        done => done,
    }
}

/// Copies `len` bytes of ours at `from` to address `to`; answers `EFAULT` where the program couldn't write. Allocates nothing.
///
/// # Safety
/// `len` bytes can be read at `from`, and no Rust reference covers the bytes at `to`.
pub(crate) unsafe fn write(to: usize, from: NonNull<u8>, len: usize) -> Result<(), Errno> {
    // SAFETY: `write_self` reads `len` bytes at `from` (contract), and is told of no more.
    unsafe { copy_by(write_self, from, to, len) }
}

/// Copies by a call that copies as much as it can, and at least a byte unless it fails.
///
/// # Safety
/// `call` with a pointer into the `len` bytes at `ours`, an address, and what is left, is sound.
unsafe fn copy_by(
    call: impl Fn(*mut u8, usize, usize) -> Result<usize, Errno>,
    ours: NonNull<u8>,
    theirs: usize,
    len: usize,
) -> Result<(), Errno> {
    let mut done = 0;
    while done < len {
        // SAFETY: `done < len`, and there are `len` bytes at `ours` (contract).
        let next = unsafe { ours.as_ptr().add(done) };
        match call(next, theirs + done, len - done) {
            Ok(0) => return Err(Errno::EFAULT),
            Ok(copied) => done += copied,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// `process_vm_readv` on ourselves. Stops at the first page that can't be read, and fails with `EFAULT` if that is the very first.
fn read_self(to: *mut u8, from: usize, len: usize) -> Result<usize, Errno> {
    let local = libc::iovec { iov_base: to.cast(), iov_len: len };
    let remote = libc::iovec { iov_base: ptr::without_provenance_mut(from), iov_len: len };
    let process = nix::unistd::getpid().as_raw();
    // SAFETY: the kernel checks both sides and writes at most `len` bytes at `to`, which the caller has room for; the call goes through
    // libc because its safe wrapper wants a `&mut [u8]` over memory that a device may read meanwhile.
    let copied = unsafe { libc::process_vm_readv(process, &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(copied).map_err(|_| Errno::last())
}

/// `process_vm_writev` on ourselves, the other way round.
fn write_self(from: *mut u8, to: usize, len: usize) -> Result<usize, Errno> {
    let local = libc::iovec { iov_base: from.cast(), iov_len: len };
    let remote = libc::iovec { iov_base: ptr::without_provenance_mut(to), iov_len: len };
    let process = nix::unistd::getpid().as_raw();
    // SAFETY: the kernel checks both sides and reads at most `len` bytes at `from`, which the caller has there; what it writes is the
    // caller's to answer for.
    let copied = unsafe { libc::process_vm_writev(process, &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(copied).map_err(|_| Errno::last())
}

/// `/proc/self/mem` at the offset that is the address. It answers `EIO` where a page can't be read.
fn read_file(memory: &File, to: *mut u8, from: usize, len: usize) -> Result<usize, Errno> {
    let offset = libc::off_t::try_from(from).map_err(|_| Errno::EFAULT)?;
    // SAFETY: the descriptor is open, and at most `len` bytes are written at `to`, which the caller has room for.
    let copied = unsafe { libc::pread(memory.as_raw_fd(), to.cast(), len, offset) };
    usize::try_from(copied).map_err(|_| match Errno::last() {
        Errno::EIO => Errno::EFAULT,
        other => other,
    })
}

fn errno(error: io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

#[cfg(test)]
mod tests {
    use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
    use pinfold_invalidate::page_size;

    use super::*;

    type Read = fn(*mut u8, usize, usize) -> Result<usize, Errno>;

    fn both_ways(test: impl Fn(Read)) {
        test(read_self);
        test(|to, from, len| read_file(&File::open("/proc/self/mem").unwrap(), to, from, len));
    }

    #[test]
    fn the_kernel_copies_exactly_what_is_there() {
        both_ways(|read| {
            let from: Vec<u8> = (0..10 * page_size()).map(|n| (n % 251) as u8).collect();
            let mut to = vec![0_u8; from.len() + 1];
            let start = NonNull::new(to.as_mut_ptr()).unwrap();
            // SAFETY: `to` has room, and no reference to it is used meanwhile.
            unsafe { copy_by(read, start, from.as_ptr().addr(), from.len()) }.unwrap();
            assert_eq!(to[..from.len()], from);
            assert_eq!(to[from.len()], 0);
        });
    }

    #[test]
    fn pieces_go_where_they_belong_one_by_one_and_split_over_threads() {
        let from: Vec<u8> = (0..SPLIT + 9 * PART).map(|n| (n / 4093 % 251) as u8).collect();
        let start = from.as_ptr().addr();
        let few = [Piece { from: start + 5, at: 0, len: 3 }, Piece { from: start, at: 7, len: 5000 }];
        // Many small ones and some large ones, in an order that is not that of the source; then as many small ones as are split.
        let mut at = 0;
        let many: Vec<_> = (0..1500_usize)
            .map(|n| {
                let len = if n % 100 == 7 { 5 * PART + n } else { 1 + n % 700 };
                at += len + 3;
                Piece { from: start + n * 4099 % (from.len() - len), at: at - len, len }
            })
            .collect();
        let small: Vec<_> =
            (0..MANY).map(|n| Piece { from: start + n * 4099, at: n * 101, len: 1 + n % 100 }).collect();
        for pieces in [&few[..], &many[..], &small[..]] {
            let end = pieces.iter().map(|piece| piece.at + piece.len).max().unwrap();
            let mut to = vec![255_u8; end + 1];
            // SAFETY: `to` has room, and no reference to it is used meanwhile.
            unsafe { read_pieces(NonNull::new(to.as_mut_ptr()).unwrap(), pieces) }.unwrap();
            let mut expected = vec![255_u8; end + 1];
            for Piece { from: first, at, len } in pieces {
                expected[*at..at + len].copy_from_slice(&from[first - start..][..*len]);
            }
            assert!(to == expected);
        }
        assert!(many.iter().map(|piece| piece.len).sum::<usize>() >= SPLIT, "split, too");
        let mut to = vec![0_u8; 2 * SPLIT];
        for (before, len) in [(0, 100), (0, SPLIT + 1), (MANY, 100)] {
            // Nothing is mapped at the first page of the address space.
            let mut pieces = small[..before].to_vec();
            pieces.extend([Piece { from: start, at: PART, len: 50 }, Piece { from: 0, at: PART + 50, len }]);
            // SAFETY: `to` has room, and no reference to it is used meanwhile.
            let hole = unsafe { read_pieces(NonNull::new(to.as_mut_ptr()).unwrap(), &pieces) };
            assert_eq!(hole, Err(Errno::EFAULT));
        }
    }

    #[test]
    fn results_are_written_exactly_and_a_read_only_page_is_an_error() {
        let (len, flags) = (2 * page_size(), MapFlags::MAP_PRIVATE);
        let rw = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let at = unsafe { mmap_anonymous(None, len.try_into().unwrap(), rw, flags) }.unwrap();
        let ours: Vec<u8> = (0..len).map(|n| (n % 251) as u8).collect();
        let start = NonNull::new(ours.as_ptr().cast_mut()).unwrap();
        // SAFETY: `ours` has that many bytes, and no reference covers the mapping.
        unsafe { write(at.addr().get() + 3, start, 100) }.unwrap();
        let byte = |n: usize| {
            // SAFETY: inside the mapping.
            unsafe { at.as_ptr().cast::<u8>().wrapping_add(n).read_volatile() }
        };
        assert!((0..100).all(|n| byte(3 + n) == ours[n]) && byte(2) == 0 && byte(103) == 0);
        let second = NonNull::new(at.as_ptr().wrapping_byte_add(page_size())).unwrap();
        // SAFETY: the second page of the mapping, which only this test knows.
        unsafe { nix::sys::mman::mprotect(second, page_size(), ProtFlags::PROT_READ) }.unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { write(at.addr().get(), start, len) }, Err(Errno::EFAULT));
        // SAFETY: the mapping above.
        unsafe { munmap(at, len) }.unwrap();
    }

    #[test]
    fn a_copy_that_makes_no_progress_ends_with_an_error() {
        let mut to = [0_u8; 3];
        let start = NonNull::new(to.as_mut_ptr()).unwrap();
        // SAFETY: `to` has room, and nothing is written.
        assert_eq!(unsafe { copy_by(|_, _, left| Ok(usize::from(left > 1)), start, 0, 3) }, Err(Errno::EFAULT));
    }

    #[test]
    fn a_hole_in_the_source_is_an_error_and_no_signal() {
        both_ways(|read| {
            let len = 4 * page_size();
            let (protection, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE);
            // SAFETY: a new mapping at an address that the kernel chooses.
            let from = unsafe { mmap_anonymous(None, len.try_into().unwrap(), protection, flags) }.unwrap();
            let hole = NonNull::new(from.as_ptr().wrapping_byte_add(2 * page_size())).unwrap();
            // SAFETY: a part of the mapping above, which only this test knows.
            unsafe { munmap(hole, page_size()) }.unwrap();
            let mut to = vec![0_u8; len];
            let start = NonNull::new(to.as_mut_ptr()).unwrap();
            // SAFETY: `to` has room, and no reference to it is used meanwhile.
            assert_eq!(unsafe { copy_by(read, start, from.as_ptr().addr(), len) }, Err(Errno::EFAULT));
            // The hole may be another thread's memory by now.
            let behind = NonNull::new(from.as_ptr().wrapping_byte_add(3 * page_size())).unwrap();
            for (part, pages) in [(from, 2), (behind, 1)] {
                // SAFETY: what is left of the mapping above.
                unsafe { munmap(part, pages * page_size()) }.unwrap();
            }
        });
    }
}
