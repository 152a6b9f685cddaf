//! How much memory imports and mirrors may take: asked before the device is, because a driver may accept too much and lose the device at
//! the next submit.
//!
//! Two limits: the number of memory allocations alive (`maxMemoryAllocationCount`; going over it is undefined), and what the driver says is
//! left in the heap. The program's own limit in bytes is the manager's affair.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use ash::vk;
use pinfold_core::DeviceError;
use pinfold_invalidate::HostRange;

use crate::gpu::Gpu;

/// The allocations that imports have, of one device. A bound, not a message: no memory is published through the count, so Relaxed is enough.
///
/// The program's own allocations count against the same limit of the device and are unknown here, as are the few blocks of mirrors.
pub(crate) struct Allocations {
    most: u32,
    alive: AtomicU32,
    /// Bytes of them in each heap.
    pub(crate) bytes: [AtomicU64; vk::MAX_MEMORY_HEAPS],
}

impl Allocations {
    pub(crate) fn new(most: u32) -> Self {
        Self { most, alive: AtomicU32::new(0), bytes: [const { AtomicU64::new(0) }; vk::MAX_MEMORY_HEAPS] }
    }
}

impl Allocations {
    pub(crate) fn alive(&self) -> u32 {
        self.alive.load(Ordering::Relaxed)
    }
}

/// One allocation, given back when dropped.
pub(crate) struct Share {
    gpu: Arc<Gpu>,
    heap: u32,
    bytes: u64,
}

impl Share {
    /// Takes one allocation of `bytes` of `heap`, for `range`.
    pub(crate) fn take(gpu: &Arc<Gpu>, range: HostRange, heap: u32, bytes: u64) -> Result<Self, DeviceError> {
        check_heap(gpu, range, heap, bytes)?;
        let Allocations { most, ref alive, .. } = gpu.allocations;
        let taken =
            alive.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |alive| (alive < most).then_some(alive + 1));
        match taken {
            Ok(_) => {
                gpu.allocations.bytes[heap as usize].fetch_add(bytes, Ordering::Relaxed);
                Ok(Self { gpu: Arc::clone(gpu), heap, bytes })
            }
            Err(_) => {
                let what = "device memory in an allocation of their own (maxMemoryAllocationCount is reached)";
                Err(DeviceError::Budget { range, what, needed: bytes, available: 0 })
            }
        }
    }

    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let Allocations { alive, bytes, .. } = &self.gpu.allocations;
        bytes[self.heap as usize].fetch_sub(self.bytes, Ordering::Relaxed);
        alive.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether the driver thinks that `heap` has `bytes` left.
pub(crate) fn check_heap(gpu: &Gpu, range: HostRange, heap: u32, bytes: u64) -> Result<(), DeviceError> {
    match gpu.heap_left(heap) {
        Some(available) if available < bytes => {
            Err(DeviceError::Budget { range, what: "device memory (VK_EXT_memory_budget)", needed: bytes, available })
        }
        _ => Ok(()),
    }
}
