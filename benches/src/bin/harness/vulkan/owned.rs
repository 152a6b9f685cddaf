//! What programs have on a card without Pinfold: commands, buffers, and copies of host memory.

use anyhow::{Context, Result, ensure};
use ash::vk;
use gpu_allocator::MemoryLocation;
use gpu_allocator::vulkan::Allocation;

use super::{Card, PIECE};

/// Recorded commands.
pub(crate) struct Commands<'c> {
    pub(super) card: &'c Card,
    pub(crate) buffer: vk::CommandBuffer,
}

impl Drop for Commands<'_> {
    fn drop(&mut self) {
        // SAFETY: whoever submitted them has waited.
        unsafe { self.card.device().free_command_buffers(self.card.pool, &[self.buffer]) };
    }
}

/// A buffer and the memory under it, both its own.
pub(crate) struct Plain<'c> {
    pub(super) card: &'c Card,
    pub(crate) buffer: vk::Buffer,
    pub(super) memory: vk::DeviceMemory,
}

impl Drop for Plain<'_> {
    fn drop(&mut self) {
        // SAFETY: no work that names it is under way (whoever submits waits), and it is destroyed once.
        unsafe { self.card.device().destroy_buffer(self.buffer, None) };
        // SAFETY: as above; it may be null.
        unsafe { self.card.device().free_memory(self.memory, None) };
    }
}

/// A buffer in memory of gpu-allocator.
pub(crate) struct Owned<'c> {
    pub(super) card: &'c Card,
    pub(crate) buffer: vk::Buffer,
    pub(super) allocation: Option<Allocation>,
    pub(super) size: usize,
}

impl Owned<'_> {
    /// Copies `len` bytes of host memory into it.
    ///
    /// # Safety
    /// `from` is readable for `len` bytes, and nobody writes them meanwhile.
    pub(crate) unsafe fn fill_from(&mut self, from: *const u8, len: usize) -> Result<()> {
        ensure!(len <= self.size, "{len} bytes don't fit into {}", self.size);
        let to = self
            .allocation
            .as_ref()
            .and_then(Allocation::mapped_ptr)
            .context("the memory can't be seen by the host")?;
        // SAFETY: both are valid for `len` bytes (contract, and the check above), and are different memory.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_ptr().cast(), len) };
        Ok(())
    }
}

impl Drop for Owned<'_> {
    fn drop(&mut self) {
        // SAFETY: no work that names it is under way, and it is destroyed once.
        unsafe { self.card.device().destroy_buffer(self.buffer, None) };
        if let (Some(allocation), Some(allocator)) = (self.allocation.take(), self.card.allocator.borrow_mut().as_mut())
        {
            let _ = allocator.free(allocation); // fails only for an allocation that isn't its own
        }
    }
}

/// What a program does that can't or won't import: memory from gpu-allocator, a copy into it, and on a card with memory of its own a second copy
/// on the queue. In pieces, as drivers limit one allocation.
pub(crate) struct Staged<'c> {
    card: &'c Card,
    pieces: Vec<(Owned<'c>, Option<Owned<'c>>)>,
}

impl<'c> Staged<'c> {
    pub(crate) fn new(card: &'c Card, size: usize) -> Result<Self> {
        let mut pieces = Vec::with_capacity(1);
        for at in (0..size).step_by(PIECE) {
            let size = PIECE.min(size - at);
            let staging = card.allocate(size, MemoryLocation::CpuToGpu)?;
            let local = match card.shares_memory() {
                true => None,
                false => Some(card.allocate(size, MemoryLocation::GpuOnly)?),
            };
            pieces.push((staging, local));
        }
        Ok(Self { card, pieces })
    }

    /// Brings all of it up to date, and waits until the device has it.
    ///
    /// # Safety
    /// `from` is readable for as many bytes as this was made for, and nobody writes them meanwhile.
    pub(crate) unsafe fn upload(&mut self, mut from: *const u8) -> Result<()> {
        for (staging, local) in &mut self.pieces {
            let size = staging.size;
            // SAFETY: the pieces together are as long as the caller's memory, and `from` is where this one starts.
            unsafe { staging.fill_from(from, size) }?;
            if let Some(local) = local {
                self.card.copy(staging.buffer, local.buffer, size)?;
            }
            // SAFETY: at most the end of the caller's memory.
            from = unsafe { from.add(size) };
        }
        Ok(())
    }

    /// The buffer that the device reads; the first of them, if there are several.
    pub(crate) fn buffer(&self) -> vk::Buffer {
        let (staging, local) = &self.pieces[0];
        local.as_ref().unwrap_or(staging).buffer
    }
}
