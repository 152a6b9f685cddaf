//! The way out for memory that a device can't import: a copy in memory of the device, refreshed at every acquire.
//!
//! The program's memory may vanish while it is read (another thread unmaps it, another process truncates the file), and then a plain copy
//! would kill the process. So the kernel copies: `process_vm_readv` on ourselves answers `EFAULT` where a load would raise a signal. Where
//! a sandbox forbids that call, `/proc/self/mem` does the same.
//!
//! The device may read the copy while it is refreshed, exactly as it may read an import while the program writes; so there is never a
//! Rust reference to these bytes, only raw pointers.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, MutexGuard};

use ash::vk;
use gpu_allocator::vulkan::{Allocation, AllocationCreateDesc, AllocationScheme, Allocator, AllocatorCreateDesc};
use gpu_allocator::{AllocationError, AllocationSizes, AllocatorDebugSettings, MemoryLocation};
use nix::errno::Errno;
use pinfold_core::{DeviceError, Path, Request};
use pinfold_invalidate::HostRange;
use rayon::iter::{IntoParallelIterator, ParallelIterator};

use crate::SetupError;
use crate::budget::check_heap;
use crate::gpu::{Gpu, OwnedBuffer};
use crate::import::{Import, Store};

/// Blocks that small mirrors share start at this size and double up to [`LARGEST_BLOCK`]. A larger mirror gets memory of its own.
const FIRST_BLOCK: u64 = 4 << 20;
const LARGEST_BLOCK: u64 = 64 << 20;

/// Where mirrors get their memory from.
pub(crate) struct MirrorHeap {
    gpu: Arc<Gpu>,
    /// Driver calls happen under this lock, so nothing that a thread waiting for the device needs may be behind it.
    allocator: Mutex<Allocator>,
}

impl MirrorHeap {
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Result<Self, SetupError> {
        let context = &gpu.context;
        let allocator = Allocator::new(&AllocatorCreateDesc {
            instance: context.instance.clone(),
            device: context.device.clone(),
            physical_device: context.physical,
            debug_settings: AllocatorDebugSettings::default(),
            buffer_device_address: context.buffer_device_address,
            allocation_sizes: AllocationSizes::new(FIRST_BLOCK, FIRST_BLOCK)
                .with_max_device_memblock_size(LARGEST_BLOCK)
                .with_max_host_memblock_size(LARGEST_BLOCK),
        });
        Ok(Self { gpu: Arc::clone(gpu), allocator: Mutex::new(allocator.map_err(SetupError::Allocator)?) })
    }

    fn allocator(&self) -> MutexGuard<'_, Allocator> {
        self.allocator.lock().expect("the allocator for mirrors doesn't panic")
    }
}

/// A chunk of a mirror: the buffer and the mapped memory under it.
pub(crate) struct MirrorPiece {
    // Dropped in this order.
    buffer: OwnedBuffer,
    block: Block,
    size: u64,
}

struct Block {
    heap: Arc<MirrorHeap>,
    /// `None` only while it is dropped.
    allocation: Option<Allocation>,
    mapped: NonNull<u8>,
}

// SAFETY: `mapped` points to memory that `allocation` owns and that any thread may write through the kernel; nobody makes references to it.
unsafe impl Send for Block {}
// SAFETY: as above; concurrent refreshes are concurrent copies by the kernel, which are no data races of this process's own making.
unsafe impl Sync for Block {}

impl Drop for Block {
    fn drop(&mut self) {
        let Some(allocation) = self.allocation.take() else { return };
        let freed = self.heap.allocator().free(allocation);
        debug_assert!(freed.is_ok(), "an allocation is freed once, where it came from: {freed:?}");
    }
}

/// A copy of the request's range as it is now.
///
/// # Errors
/// [`DeviceError::Budget`] if there is no room, [`DeviceError::Fault`] if the memory vanished, [`DeviceError::Failed`], [`DeviceError::Lost`].
pub(crate) fn mirror(
    heap: &Arc<MirrorHeap>,
    request: &Request<'_>,
    path: Path,
    usage: vk::BufferUsageFlags,
) -> Result<Import, DeviceError> {
    let (gpu, mut rest) = (&heap.gpu, request.range.len() as u64);
    let mut pieces = Vec::new();
    while rest > 0 {
        let size = rest.min(gpu.caps.chunk_size);
        pieces.push(piece(heap, request, size, usage)?);
        rest -= size;
    }
    refresh(&pieces, request.range)?;
    let chunks: Vec<_> = pieces.iter().map(|piece| (piece.buffer.raw, piece.size)).collect();
    Ok(Import::new(path, chunks.into_iter(), Store::Mirrored(pieces.into()), None))
}

fn piece(
    heap: &Arc<MirrorHeap>,
    request: &Request<'_>,
    size: u64,
    usage: vk::BufferUsageFlags,
) -> Result<MirrorPiece, DeviceError> {
    let (gpu, range) = (&heap.gpu, request.range);
    let info = vk::BufferCreateInfo::default().size(size).usage(usage);
    let buffer =
        OwnedBuffer::new(gpu, &info, request.label).map_err(|code| gpu.failed("vkCreateBuffer", range, code))?;
    let requirements = buffer.requirements();
    check_heap(gpu, range, host_heap(&gpu.memory), requirements.size)?;
    let allocation = heap.allocator().allocate(&AllocationCreateDesc {
        name: request.label,
        requirements,
        location: MemoryLocation::CpuToGpu,
        linear: true,
        allocation_scheme: AllocationScheme::GpuAllocatorManaged,
    });
    let allocation = allocation.map_err(|error| not_allocated(gpu, range, requirements.size, &error))?;
    let mapped = allocation.mapped_ptr().expect("CpuToGpu memory is mapped").cast();
    // SAFETY: the allocation lives as long as `block`, which keeps its memory where it is.
    let (memory, offset) = (unsafe { allocation.memory() }, allocation.offset());
    let block = Block { heap: Arc::clone(heap), allocation: Some(allocation), mapped };
    // SAFETY: the buffer is new and unbound, the allocation was made for its requirements, and `block` is dropped after the buffer.
    unsafe { buffer.bind(memory, offset) }.map_err(|code| gpu.failed("vkBindBufferMemory", range, code))?;
    Ok(MirrorPiece { buffer, block, size })
}

/// The heap that mirrors come from, for the budget: the one of the first host-coherent type, as the allocator prefers it.
fn host_heap(memory: &vk::PhysicalDeviceMemoryProperties) -> u32 {
    let coherent = vk::MemoryPropertyFlags::HOST_VISIBLE | vk::MemoryPropertyFlags::HOST_COHERENT;
    let types = memory.memory_types_as_slice();
    let with = |flags| types.iter().find(|kind| kind.property_flags.contains(flags));
    let best = with(coherent | vk::MemoryPropertyFlags::DEVICE_LOCAL).or_else(|| with(coherent));
    best.expect("every device has a host-coherent memory type").heap_index
}

fn not_allocated(gpu: &Gpu, range: HostRange, needed: u64, error: &AllocationError) -> DeviceError {
    match error {
        // The allocator answers the same for a lost device.
        _ if gpu.is_lost() => DeviceError::Lost,
        AllocationError::OutOfMemory => {
            DeviceError::Budget { range, what: "device memory for a mirror", needed, available: 0 }
        }
        other => {
            let raw = vk::Result::ERROR_UNKNOWN.as_raw();
            DeviceError::Failed { call: "allocating a mirror", range, code: other.to_string(), raw }
        }
    }
}

/// Copies the program's bytes at `range` to their mirror.
///
/// # Errors
/// [`DeviceError::Fault`] if some of them vanished.
pub(crate) fn refresh(pieces: &[MirrorPiece], range: HostRange) -> Result<(), DeviceError> {
    let mut at = range.start();
    for piece in pieces {
        let len = usize::try_from(piece.size).expect("a piece is a part of a range");
        debug_assert!(at + len <= range.end(), "a mirror is refreshed from the range it was made for");
        // SAFETY: the block has room for the piece's size, is mapped, and is written by nobody but such copies.
        unsafe { copy_split(piece.block.mapped, at, len) }.map_err(|errno| {
            let why = "the memory vanished while it was copied (unmapped, or its file truncated)";
            DeviceError::Fault { range, why, errno: errno as i32 }
        })?;
        at += len;
    }
    Ok(())
}

/// A copy of this many bytes or more is split over the threads of rayon's global pool. On two cores that took 0.54 and 0.71 of the time of one
/// thread at 64 and 256 MiB, and gained nothing at 16 MiB and below (medians of nine, both in turns).
const SPLIT: usize = 64 << 20;
/// The pieces it is split into.
const SPLIT_PIECE: usize = 1 << 20;

/// Where a split copy goes.
struct Target(NonNull<u8>);

// SAFETY: an address; each thread writes its own piece behind it, through raw pointers (contract of `copy_split`).
unsafe impl Sync for Target {}

/// As [`copy`], by several threads where that is faster.
///
/// # Safety
/// As [`copy`].
unsafe fn copy_split(to: NonNull<u8>, from: usize, len: usize) -> Result<(), Errno> {
    if len < SPLIT {
        // SAFETY: the contract is the same.
        return unsafe { copy(to, from, len) };
    }
    let target = &Target(to);
    (0..len.div_ceil(SPLIT_PIECE)).into_par_iter().try_for_each(|piece| {
        let start = piece * SPLIT_PIECE;
        // SAFETY: `start < len`, and `to` has room for `len` bytes (contract).
        let to = unsafe { target.0.add(start) };
        // SAFETY: the pieces lie side by side within `len`, so each has room and is written by one thread.
        unsafe { copy(to, from + start, SPLIT_PIECE.min(len - start)) }
    })
}

/// Copies `len` bytes at address `from` to `to`; answers `EFAULT` where the source can't be read.
///
/// # Safety
/// `to` has room for `len` bytes, which no Rust reference covers.
pub(crate) unsafe fn copy(to: NonNull<u8>, from: usize, len: usize) -> Result<(), Errno> {
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

/// As [`copy`], by a `read` that copies as much as it can, and at least a byte unless it fails.
///
/// # Safety
/// As [`copy`]; `read` writes at most as many bytes as it is told.
unsafe fn copy_by(
    read: impl Fn(*mut u8, usize, usize) -> Result<usize, Errno>,
    to: NonNull<u8>,
    from: usize,
    len: usize,
) -> Result<(), Errno> {
    let mut done = 0;
    while done < len {
        // SAFETY: `done < len`, and `to` has room for `len` bytes (contract).
        let next = unsafe { to.as_ptr().add(done) };
        match read(next, from + done, len - done) {
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
    fn a_split_copy_is_whole_and_tells_of_a_hole() {
        let len = SPLIT + SPLIT_PIECE + 5;
        let from: Vec<u8> = (0..len).map(|n| (n / 4093 % 251) as u8).collect();
        let mut to = vec![0_u8; len + 1];
        let start = NonNull::new(to.as_mut_ptr()).unwrap();
        // SAFETY: `to` has room, and no reference to it is used meanwhile.
        unsafe { copy_split(start, from.as_ptr().addr(), len) }.unwrap();
        assert!(to[..len] == from[..] && to[len] == 0);
        // Nothing is mapped at the first page of the address space.
        // SAFETY: as above.
        assert_eq!(unsafe { copy_split(start, 0, len) }, Err(Errno::EFAULT));
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
