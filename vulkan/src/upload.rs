//! Filling memory that the host doesn't see: through a staging buffer, and a queue that belongs to the engine.
//!
//! A queue may be used by one thread at a time, and on many devices the engine's is the only one there is. So the engine lends it: [`Uploads`] has
//! a closure that takes the engine's lock and submits. An upload is staged, submitted and waited for before the acquire that wanted it returns;
//! so whatever the engine submits afterwards, on any queue, finds it done. There is one staging buffer, and one upload at a time.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ash::vk;
use gpu_allocator::MemoryLocation;
use pinfold_core::DeviceError;
use pinfold_invalidate::{HostRange, page_size};

use crate::completion::On;
use crate::copy::{self, Piece};
use crate::gpu::Gpu;
use crate::mirror::{MirrorHeap, MirrorPiece, vanished};

/// Bytes that are staged at a time.
const STAGE: usize = 8 << 20;
/// The longest wait for one upload. It ends before that unless the queue is held up by work that waits for the thread that acquires.
const PATIENCE: Duration = Duration::from_secs(10);

type Submit = dyn Fn(&[vk::SubmitInfo<'_>], vk::Fence) -> Result<(), vk::Result> + Send + Sync;

/// A queue that the engine lends for uploads to mirrors.
#[derive(Clone)]
pub struct Uploads {
    families: Vec<u32>,
    submit: Arc<Submit>,
}

impl Uploads {
    /// Uploads go through `submit`, which does what `vkQueueSubmit` does with a queue of the first of `families`. The others are the families
    /// of all other queues that use mirrors.
    ///
    /// ```no_run
    /// # fn f(device: ash::Device, queue: std::sync::Arc<std::sync::Mutex<ash::vk::Queue>>, config: &mut pinfold_vulkan::Config) {
    /// // SAFETY: `queue` is one of family 0, and everybody submits to it under its lock.
    /// config.uploads = Some(unsafe {
    ///     pinfold_vulkan::Uploads::new([0], move |work, fence| {
    ///         let queue = queue.lock().expect("nobody panics while submitting");
    ///         device.queue_submit(*queue, work, fence)
    ///     })
    /// });
    /// # }
    /// ```
    ///
    /// # Panics
    /// If there is no family.
    ///
    /// # Safety
    /// 1. `submit` submits exactly what it is given, to a queue of the first family of the manager's device, which can copy (every queue for
    ///    graphics, compute or transfer can), and synchronises access to that queue.
    /// 2. It may be called on any thread until the manager and its leases are gone, and calls nothing of the manager. Threads that acquire must not
    ///    hold what it waits for.
    pub unsafe fn new(
        families: impl IntoIterator<Item = u32>,
        submit: impl Fn(&[vk::SubmitInfo<'_>], vk::Fence) -> Result<(), vk::Result> + Send + Sync + 'static,
    ) -> Self {
        let mut unique: Vec<u32> = Vec::new();
        for family in families {
            if !unique.contains(&family) {
                unique.push(family);
            }
        }
        assert!(!unique.is_empty(), "uploads need the family of their queue");
        Self { families: unique, submit: Arc::new(submit) }
    }

    pub(crate) fn families(&self) -> &[u32] {
        &self.families
    }
}

impl fmt::Debug for Uploads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uploads").field("families", &self.families).finish_non_exhaustive()
    }
}

/// The staging buffer of a device, and what it takes to copy from it.
pub(crate) struct Uploader {
    gpu: Arc<Gpu>,
    uploads: Uploads,
    pool: vk::CommandPool,
    fence: vk::Fence,
    commands: vk::CommandBuffer,
    stage: Mutex<Stage>,
}

struct Stage {
    /// Made by the first upload.
    piece: Option<MirrorPiece>,
    heap: Arc<MirrorHeap>,
    /// An upload has been submitted and not been seen to end.
    busy: bool,
}

impl Uploader {
    /// # Errors
    /// What Vulkan answers.
    pub(crate) fn new(gpu: &Arc<Gpu>, heap: &Arc<MirrorHeap>, uploads: Uploads) -> Result<Self, vk::Result> {
        let device = gpu.device();
        let info = vk::CommandPoolCreateInfo::default()
            .flags(vk::CommandPoolCreateFlags::RESET_COMMAND_BUFFER)
            .queue_family_index(uploads.families[0]);
        // SAFETY: the device is live, and has that family (contract of `Uploads::new`).
        let pool = unsafe { device.create_command_pool(&info, None) }?;
        let stage = Mutex::new(Stage { piece: None, heap: Arc::clone(heap), busy: false });
        let (fence, commands) = (vk::Fence::null(), vk::CommandBuffer::null());
        // From here on dropping `this` destroys what has been made; null is ignored.
        let mut this = Self { gpu: Arc::clone(gpu), uploads, pool, fence, commands, stage };
        // SAFETY: the device is live.
        this.fence = unsafe { device.create_fence(&vk::FenceCreateInfo::default(), None) }?;
        let info = vk::CommandBufferAllocateInfo::default().command_pool(pool).command_buffer_count(1);
        // SAFETY: the pool is ours, and nobody else knows it yet.
        this.commands = unsafe { device.allocate_command_buffers(&info) }?[0];
        Ok(this)
    }

    /// Copies pieces of the program's memory, which are parts of `range`, to their places in a buffer of the device, and waits for that.
    pub(crate) fn upload(&self, range: HostRange, to: vk::Buffer, pieces: &[Piece]) -> Result<(), DeviceError> {
        let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        let mut batch = Vec::new();
        let mut filled = 0;
        for piece in pieces {
            let mut done = 0;
            while done < piece.len {
                let len = (piece.len - done).min(STAGE - filled);
                batch.push((filled, Piece { from: piece.from + done, at: piece.at + done, len }));
                (filled, done) = (filled + len, done + len);
                if filled == STAGE {
                    self.send(&mut stage, range, to, &batch)?;
                    (filled, batch) = (0, Vec::new());
                }
            }
        }
        if batch.is_empty() { Ok(()) } else { self.send(&mut stage, range, to, &batch) }
    }

    /// Stages what fits at once, each piece at the place given with it.
    fn send(
        &self,
        stage: &mut MutexGuard<'_, Stage>,
        range: HostRange,
        to: vk::Buffer,
        batch: &[(usize, Piece)],
    ) -> Result<(), DeviceError> {
        self.wait(stage, range)?; // for one that took too long
        if stage.piece.is_none() {
            let whole = HostRange::new(page_size(), STAGE).expect("whole pages");
            let usage = vk::BufferUsageFlags::TRANSFER_SRC;
            let made = stage.heap.block(whole, STAGE as u64, usage, MemoryLocation::CpuToGpu, "pinfold staging")?;
            stage.piece = Some(made);
        }
        let piece = stage.piece.as_ref().expect("made above");
        let mapped = piece.mapped().expect("CpuToGpu memory is mapped");
        let staged: Vec<_> = batch.iter().map(|&(at, piece)| Piece { at, ..piece }).collect();
        // SAFETY: the stage has room for a batch, and is used by no work, which was waited for.
        unsafe { copy::read_pieces(mapped, &staged) }.map_err(|errno| vanished(range, errno))?;
        let regions: Vec<_> = batch
            .iter()
            .map(|&(at, piece)| vk::BufferCopy {
                src_offset: at as u64,
                dst_offset: piece.at as u64,
                size: piece.len as u64,
            })
            .collect();
        let submitted = self.record(piece.raw(), to, &regions).and_then(|()| {
            let commands = [self.commands];
            (self.uploads.submit)(&[vk::SubmitInfo::default().command_buffers(&commands)], self.fence)
        });
        submitted.map_err(|code| self.gpu.failed("vkQueueSubmit (upload to a mirror)", range, code))?;
        stage.busy = true;
        self.wait(stage, range)
    }

    fn record(&self, from: vk::Buffer, to: vk::Buffer, regions: &[vk::BufferCopy]) -> Result<(), vk::Result> {
        let (device, commands) = (self.gpu.device(), self.commands);
        let begin = vk::CommandBufferBeginInfo::default().flags(vk::CommandBufferUsageFlags::ONE_TIME_SUBMIT);
        // SAFETY: the commands are ours, under the stage's lock, and not in use: the upload before was waited for.
        unsafe { device.begin_command_buffer(commands, &begin) }?;
        // SAFETY: being recorded; both buffers are live until the upload has been waited for, and have room for the regions.
        unsafe { device.cmd_copy_buffer(commands, from, to, regions) };
        let visible = [vk::MemoryBarrier::default()
            .src_access_mask(vk::AccessFlags::TRANSFER_WRITE)
            .dst_access_mask(vk::AccessFlags::MEMORY_READ)];
        let (copied, all) = (vk::PipelineStageFlags::TRANSFER, vk::PipelineStageFlags::ALL_COMMANDS);
        let none = vk::DependencyFlags::empty();
        // SAFETY: being recorded, outside a render pass.
        unsafe { device.cmd_pipeline_barrier(commands, copied, all, none, &visible, &[], &[]) };
        // SAFETY: being recorded.
        unsafe { device.end_command_buffer(commands) }
    }

    /// Whether the upload before has ended; waits for that.
    pub(crate) fn is_idle(&self) -> bool {
        let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        let nowhere = HostRange::new(page_size(), page_size()).expect("a page");
        matches!(self.wait(&mut stage, nowhere), Ok(()) | Err(DeviceError::Lost))
    }

    /// Waits for the upload under way, if there is one.
    fn wait(&self, stage: &mut Stage, range: HostRange) -> Result<(), DeviceError> {
        if !stage.busy {
            return Ok(());
        }
        // SAFETY: the fence is ours, and lives as long as `self`.
        match unsafe { self.gpu.wait(On::Fence(self.fence), 0, PATIENCE) } {
            Ok(true) => {
                stage.busy = false;
                // SAFETY: the fence is signalled, so no submit uses it.
                let reset = unsafe { self.gpu.device().reset_fences(&[self.fence]) };
                reset.map_err(|code| self.gpu.failed("vkResetFences", range, code))
            }
            Ok(false) => Err(DeviceError::StillBusy(PATIENCE)),
            Err(code) => Err(self.gpu.failed("vkWaitForFences", range, code)),
        }
    }
}

impl Drop for Uploader {
    fn drop(&mut self) {
        let stage = self.stage.get_mut().unwrap_or_else(PoisonError::into_inner);
        if stage.busy {
            // SAFETY: as in `wait`. A device that is still busy now stays so, or is lost.
            let _ = unsafe { self.gpu.wait(On::Fence(self.fence), 0, PATIENCE) };
        }
        let device = self.gpu.device();
        // SAFETY: the fence is ours, and its work has been waited for.
        unsafe { device.destroy_fence(self.fence, None) };
        // SAFETY: the pool is ours, and its commands are not in use.
        unsafe { device.destroy_command_pool(self.pool, None) };
    }
}
