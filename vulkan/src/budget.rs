//! How much memory imports and mirrors may take: asked before the device is, because a driver may accept too much and lose the device at
//! the next submit.
//!
//! Three limits hold together: the number of allocations (`maxMemoryAllocationCount`; going over it is undefined), the program's own limit
//! in bytes, and what the driver says is left in the heap. What is taken is a [`Share`], given back when it is dropped.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use pinfold_core::DeviceError;
use pinfold_invalidate::HostRange;

use crate::gpu::Gpu;

/// What one manager has taken. The counters are bounds, not messages: no memory is published through them, so Relaxed is enough.
pub(crate) struct Budget {
    limit: u64,
    bytes: AtomicU64,
    max_allocations: u32,
    allocations: AtomicU32,
}

impl Budget {
    pub(crate) fn new(limit: Option<u64>, max_allocations: u32) -> Self {
        Self {
            limit: limit.unwrap_or(u64::MAX),
            bytes: AtomicU64::new(0),
            max_allocations,
            allocations: AtomicU32::new(0),
        }
    }
}

/// Some bytes, and zero or one allocation, taken from the budget.
pub(crate) struct Share {
    gpu: Arc<Gpu>,
    bytes: u64,
    allocations: u32,
}

impl Share {
    /// Takes one allocation of `bytes` of `heap`, for `range`.
    pub(crate) fn of_allocation(gpu: &Arc<Gpu>, range: HostRange, heap: u32, bytes: u64) -> Result<Self, DeviceError> {
        let budget = &gpu.budget;
        let taken = budget.allocations.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| {
            (taken < budget.max_allocations).then_some(taken + 1)
        });
        if let Err(taken) = taken {
            let (what, available) =
                ("memory allocations (maxMemoryAllocationCount), 1 each", u64::from(budget.max_allocations - taken));
            return Err(DeviceError::Budget { range, what, needed: 1, available });
        }
        // From here on the allocation is given back by `drop`, also if the bytes are refused.
        let mut share = Self { gpu: Arc::clone(gpu), bytes: 0, allocations: 1 };
        share.take_bytes(range, heap, bytes)?;
        Ok(share)
    }

    /// Takes `bytes` of `heap`, for `range`, inside an allocation that somebody else counts.
    pub(crate) fn of_bytes(gpu: &Arc<Gpu>, range: HostRange, heap: u32, bytes: u64) -> Result<Self, DeviceError> {
        let mut share = Self { gpu: Arc::clone(gpu), bytes: 0, allocations: 0 };
        share.take_bytes(range, heap, bytes)?;
        Ok(share)
    }

    fn take_bytes(&mut self, range: HostRange, heap: u32, bytes: u64) -> Result<(), DeviceError> {
        let budget = &self.gpu.budget;
        let taken = budget.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| {
            taken.checked_add(bytes).filter(|&sum| sum <= budget.limit)
        });
        if let Err(taken) = taken {
            let (what, available) = ("the budget in the manager's configuration", budget.limit - taken);
            return Err(DeviceError::Budget { range, what, needed: bytes, available });
        }
        self.bytes = bytes;
        match self.gpu.heap_left(heap) {
            Some(available) if available < bytes => {
                let what = "device memory (VK_EXT_memory_budget)";
                Err(DeviceError::Budget { range, what, needed: bytes, available })
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.gpu.budget.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        self.gpu.budget.allocations.fetch_sub(self.allocations, Ordering::Relaxed);
    }
}
