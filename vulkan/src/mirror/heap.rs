//! Where mirrors get their memory: from an allocator that small ones share, one buffer on top of each block.
//!
//! Blocks may outlive the device's end for the engine: those that an upload may still be writing to stay. So the allocator, which keeps memory of the
//! device even when nobody uses any, goes with the last block after the end.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use ash::vk;
use gpu_allocator::vulkan::{Allocation, AllocationCreateDesc, AllocationScheme, Allocator, AllocatorCreateDesc};
use gpu_allocator::{AllocationError, AllocationSizes, AllocatorDebugSettings, MemoryLocation};
use pinfold_core::DeviceError;
use pinfold_invalidate::{HostRange, Space};

use crate::budget::check_heap;
use crate::gpu::{Gpu, OwnedBuffer};
use crate::{Config, MirrorPlace, SetupError, Uploads};

/// Blocks that small mirrors share start at this size and double up to [`LARGEST_BLOCK`]. A larger mirror gets memory of its own.
const FIRST_BLOCK: u64 = 4 << 20;
const LARGEST_BLOCK: u64 = 64 << 20;

/// Where mirrors get their memory from.
pub(crate) struct MirrorHeap {
    pub(super) gpu: Arc<Gpu>,
    pub(super) space: Arc<Space>,
    /// Driver calls happen under this lock, so nothing that a thread waiting for the device needs may be behind it.
    pool: Mutex<Pool>,
    pub(super) place: MirrorPlace,
    /// The engine records uploads into its own commands.
    pub(super) recorded: bool,
    pub(super) sole_writer: bool,
    /// Bytes copied so far.
    pub(super) copied: AtomicU64,
}

struct Pool {
    /// `None` from the end on: it keeps memory of the device even when nobody uses any.
    allocator: Option<Allocator>,
    /// Blocks alive.
    live: usize,
    closed: bool,
}

impl Pool {
    /// The allocator, to be dropped by the caller, if this is the end and nothing is left.
    fn ended(&mut self) -> Option<Allocator> {
        if self.closed && self.live == 0 { self.allocator.take() } else { None }
    }
}

impl MirrorHeap {
    pub(crate) fn new(gpu: &Arc<Gpu>, space: &Arc<Space>, config: &Config) -> Result<Self, SetupError> {
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
        let discrete = gpu.caps.device_type == vk::PhysicalDeviceType::DISCRETE_GPU;
        let place = match (config.mirrors, &config.uploads) {
            (MirrorPlace::DeviceLocal, None) => return Err(SetupError::NoUploads),
            (MirrorPlace::Auto, Some(_)) if discrete => MirrorPlace::DeviceLocal,
            (MirrorPlace::Auto, _) => MirrorPlace::HostVisible,
            (place, _) => place,
        };
        Ok(Self {
            gpu: Arc::clone(gpu),
            space: Arc::clone(space),
            pool: Mutex::new(Pool {
                allocator: Some(allocator.map_err(SetupError::Allocator)?),
                live: 0,
                closed: false,
            }),
            place,
            recorded: config.uploads.as_ref().is_some_and(Uploads::is_recorded),
            sole_writer: config.sole_writer,
            copied: AtomicU64::new(0),
        })
    }

    pub(crate) fn copied(&self) -> u64 {
        self.copied.load(Ordering::Relaxed)
    }

    /// No mirror is made any more. What is left goes with the last block.
    pub(crate) fn close(&self) {
        let mut pool = self.pool();
        pool.closed = true;
        let ended = pool.ended();
        drop(pool);
        drop(ended);
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().expect("the allocator for mirrors doesn't panic")
    }

    /// A buffer on memory at `location`, for `range`.
    pub(crate) fn block(
        self: &Arc<Self>,
        range: HostRange,
        size: u64,
        usage: vk::BufferUsageFlags,
        location: MemoryLocation,
        label: &str,
    ) -> Result<MirrorPiece, DeviceError> {
        let gpu = &self.gpu;
        let info = gpu.shared(vk::BufferCreateInfo::default().size(size).usage(usage));
        let buffer = OwnedBuffer::new(gpu, &info, label).map_err(|code| gpu.failed("vkCreateBuffer", range, code))?;
        let requirements = buffer.requirements();
        check_heap(gpu, range, heap_of(&gpu.memory, location), requirements.size)?;
        let mut pool = self.pool();
        let Some(allocator) = pool.allocator.as_mut() else { return Err(DeviceError::Lost) };
        let allocation = allocator.allocate(&AllocationCreateDesc {
            name: label,
            requirements,
            location,
            linear: true,
            allocation_scheme: AllocationScheme::GpuAllocatorManaged,
        });
        let allocation = allocation.map_err(|error| not_allocated(gpu, range, requirements.size, &error))?;
        pool.live += 1;
        drop(pool);
        let mapped = allocation.mapped_ptr().map(NonNull::cast);
        // SAFETY: the allocation lives as long as `block`, which keeps its memory where it is.
        let (memory, offset) = (unsafe { allocation.memory() }, allocation.offset());
        let block = Block { heap: Arc::clone(self), allocation: Some(allocation), mapped };
        // SAFETY: the buffer is new and unbound, the allocation was made for its requirements, and `block` is dropped after the buffer.
        unsafe { buffer.bind(memory, offset) }.map_err(|code| gpu.failed("vkBindBufferMemory", range, code))?;
        Ok(MirrorPiece { buffer, block, size })
    }
}

/// A chunk of a mirror: the buffer and the memory under it.
pub(crate) struct MirrorPiece {
    // Dropped in this order.
    buffer: OwnedBuffer,
    block: Block,
    size: u64,
}

impl MirrorPiece {
    pub(crate) fn raw(&self) -> vk::Buffer {
        self.buffer.raw
    }

    /// Where the host sees the bytes; `None` in memory that it doesn't see.
    pub(crate) fn mapped(&self) -> Option<NonNull<u8>> {
        self.block.mapped
    }

    pub(super) fn heap(&self) -> &MirrorHeap {
        &self.block.heap
    }

    pub(crate) fn len(&self) -> usize {
        usize::try_from(self.size).expect("a piece is a part of a range")
    }
}

struct Block {
    heap: Arc<MirrorHeap>,
    /// `None` only while it is dropped.
    allocation: Option<Allocation>,
    mapped: Option<NonNull<u8>>,
}

// SAFETY: `mapped` points to memory that `allocation` owns and that any thread may write through the kernel; nobody makes references to it.
unsafe impl Send for Block {}
// SAFETY: as above; concurrent refreshes are concurrent copies by the kernel, which are no data races of this process's own making.
unsafe impl Sync for Block {}

impl Drop for Block {
    fn drop(&mut self) {
        let Some(allocation) = self.allocation.take() else { return };
        let mut pool = self.heap.pool();
        let allocator = pool.allocator.as_mut().expect("the allocator is there as long as a block is");
        let freed = allocator.free(allocation);
        debug_assert!(freed.is_ok(), "an allocation is freed once, where it came from: {freed:?}");
        pool.live -= 1;
        let ended = pool.ended();
        drop(pool);
        drop(ended);
    }
}

/// The heap that memory at a location comes from, for the budget: the one of the first type that the allocator prefers for it.
fn heap_of(memory: &vk::PhysicalDeviceMemoryProperties, location: MemoryLocation) -> u32 {
    use vk::MemoryPropertyFlags as F;
    let coherent = F::HOST_VISIBLE | F::HOST_COHERENT;
    let wishes = match location {
        MemoryLocation::GpuOnly => [F::DEVICE_LOCAL, F::empty()],
        MemoryLocation::GpuToCpu => [coherent | F::HOST_CACHED, coherent],
        _ => [coherent | F::DEVICE_LOCAL, coherent],
    };
    let types = memory.memory_types_as_slice();
    let with = |flags: F| types.iter().find(|kind| kind.property_flags.contains(flags));
    let best = wishes.into_iter().find_map(with);
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
