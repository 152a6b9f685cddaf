//! Filling memory that the host doesn't see: through a staging buffer, and a queue that belongs to the engine.
//!
//! A queue may be used by one thread at a time, and on many devices the engine's is the only one there is. So the engine lends it: [`Uploads`] has
//! a closure that takes the engine's lock and submits. An upload is staged in one of a few slots and submitted. Then either the acquire waits
//! for it, so that whatever the engine submits afterwards, on any queue, finds it done; or, if uploads are *ordered*, the engine's work waits, for a
//! value of a timeline semaphore. Slots are filled under one lock, in the order in which they are submitted, so the values only grow.
//!
//! An engine that lends no queue records the copies into its own work: see `recorded.rs`.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ash::vk;
use gpu_allocator::MemoryLocation;
use pinfold_core::DeviceError;
use pinfold_invalidate::{HostRange, page_size};

use crate::SetupError;
use crate::completion::On;
use crate::copy::{self, Piece};
use crate::gpu::Gpu;
use crate::mirror::{MirrorHeap, MirrorPiece, vanished};

/// Uploads that may be under way at the same time, and the bytes that each stages.
const SLOTS: usize = 4;
const SLOT: usize = 2 << 20;
/// The longest wait for one upload. It ends before that unless the queue is held up by work that waits for the thread that acquires.
const PATIENCE: Duration = Duration::from_secs(10);

type Submit = dyn Fn(&[vk::SubmitInfo<'_>], vk::Fence) -> Result<(), vk::Result> + Send + Sync;

/// How mirrors in device memory are filled.
#[derive(Clone)]
pub struct Uploads {
    families: Vec<u32>,
    /// `None`: the engine records them.
    submit: Option<Arc<Submit>>,
    ordered: bool,
}

impl Uploads {
    /// Uploads go through `submit`, to one queue that the engine lends for it: the closure does what `vkQueueSubmit` does with a queue of the first of `families`. The others are the families
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
    /// 1. `submit` submits exactly what it is given, always to the same queue, of the first family of the manager's device, which can copy (every queue
    ///    for graphics, compute or transfer can), and synchronises access to that queue. All families are the device's.
    /// 2. It may be called on any thread until the manager and its leases are gone, and calls nothing of the manager. Threads that acquire must not
    ///    hold what it waits for.
    pub unsafe fn new(
        families: impl IntoIterator<Item = u32>,
        submit: impl Fn(&[vk::SubmitInfo<'_>], vk::Fence) -> Result<(), vk::Result> + Send + Sync + 'static,
    ) -> Self {
        Self { families: at_least_one(families), submit: Some(Arc::new(submit)), ordered: false }
    }

    /// The engine records uploads into its own commands, with [`record_uploads`](pinfold_core::Lease::record_uploads) of each lease before what reads
    /// its objects. For devices with a single queue, and engines that don't want to lend theirs. `families` are those of the queues that use mirrors.
    ///
    /// All work that reads mirrors goes to one queue. A mirror then takes as much memory again where the program sees it, which is what the
    /// copies are made from.
    ///
    /// # Panics
    /// If there is no family.
    ///
    /// # Safety
    /// The families are the device's.
    #[must_use]
    pub unsafe fn recorded(families: impl IntoIterator<Item = u32>) -> Self {
        Self { families: at_least_one(families), submit: None, ordered: false }
    }

    /// Acquires don't wait for uploads: the engine's work does, for the value in [`Import::uploaded`](crate::Import::uploaded) of each of its views.
    /// Needs timeline semaphores. Changes nothing where uploads are [recorded](Self::recorded).
    #[must_use]
    pub fn ordered(self) -> Self {
        Self { ordered: true, ..self }
    }

    pub(crate) fn is_recorded(&self) -> bool {
        self.submit.is_none()
    }

    pub(crate) fn families(&self) -> &[u32] {
        &self.families
    }
}

fn at_least_one(families: impl IntoIterator<Item = u32>) -> Vec<u32> {
    let families: Vec<u32> = families.into_iter().collect();
    assert!(!families.is_empty(), "uploads need the family of their queue");
    families
}

impl fmt::Debug for Uploads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uploads")
            .field("families", &self.families)
            .field("recorded", &self.is_recorded())
            .field("ordered", &self.ordered)
            .finish_non_exhaustive()
    }
}

/// The staging buffer of a device, and what it takes to copy from it.
pub(crate) struct Uploader {
    gpu: Arc<Gpu>,
    submit: Arc<Submit>,
    pool: vk::CommandPool,
    /// Reaches the value of each upload, where the engine's work waits for them.
    timeline: Option<vk::Semaphore>,
    stage: Mutex<Stage>,
}

struct Stage {
    /// Made by the first upload.
    piece: Option<MirrorPiece>,
    heap: Arc<MirrorHeap>,
    slots: Vec<Slot>,
    /// The slot that is filled next.
    next: usize,
    /// Uploads submitted so far.
    value: u64,
}

struct Slot {
    commands: vk::CommandBuffer,
    fence: vk::Fence,
    /// An upload has been submitted and not been seen to end.
    busy: bool,
}

impl Uploader {
    /// `None` where the engine records uploads itself.
    ///
    /// # Errors
    /// [`SetupError::Vulkan`], and [`SetupError::NotEnabled`] for ordered uploads without timeline semaphores.
    pub(crate) fn new(gpu: &Arc<Gpu>, heap: &Arc<MirrorHeap>, uploads: &Uploads) -> Result<Option<Self>, SetupError> {
        let Some(submit) = &uploads.submit else { return Ok(None) };
        if uploads.ordered && !gpu.has_timelines() {
            let needed = "Vulkan 1.2 or VK_KHR_timeline_semaphore, for ordered uploads";
            return Err(SetupError::NotEnabled { command: "vkWaitSemaphores", needed });
        }
        let device = gpu.device();
        let failed = |call| move |code| SetupError::Vulkan { call, code };
        let info = vk::CommandPoolCreateInfo::default()
            .flags(vk::CommandPoolCreateFlags::RESET_COMMAND_BUFFER)
            .queue_family_index(uploads.families[0]);
        // SAFETY: the device is live, and has that family (contract of `Uploads::new`).
        let pool = unsafe { device.create_command_pool(&info, None) }.map_err(failed("vkCreateCommandPool"))?;
        let stage = Stage { piece: None, heap: Arc::clone(heap), slots: Vec::new(), next: 0, value: 0 };
        let (gpu, submit) = (Arc::clone(gpu), Arc::clone(submit));
        // From here on dropping `this` destroys what has been made.
        let mut this = Self { gpu, submit, pool, timeline: None, stage: Mutex::new(stage) };
        let device = this.gpu.device();
        if uploads.ordered {
            let mut kind = vk::SemaphoreTypeCreateInfo::default().semaphore_type(vk::SemaphoreType::TIMELINE);
            let info = vk::SemaphoreCreateInfo::default().push_next(&mut kind);
            // SAFETY: the device is live, and was made with timeline semaphores (checked above).
            let made = unsafe { device.create_semaphore(&info, None) };
            this.timeline = Some(made.map_err(failed("vkCreateSemaphore"))?);
        }
        let slots = &mut this.stage.get_mut().unwrap_or_else(PoisonError::into_inner).slots;
        let count = u32::try_from(SLOTS).expect("a few");
        let info = vk::CommandBufferAllocateInfo::default().command_pool(pool).command_buffer_count(count);
        // SAFETY: the pool is ours, and nobody else knows it yet.
        let commands = unsafe { device.allocate_command_buffers(&info) }.map_err(failed("vkAllocateCommandBuffers"))?;
        for commands in commands {
            // SAFETY: the device is live.
            let fence = unsafe { device.create_fence(&vk::FenceCreateInfo::default(), None) };
            slots.push(Slot { commands, fence: fence.map_err(failed("vkCreateFence"))?, busy: false });
        }
        Ok(Some(this))
    }

    /// The semaphore that tells how far uploads are, where nobody has waited for them.
    pub(crate) fn timeline(&self) -> Option<vk::Semaphore> {
        self.timeline
    }

    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies pieces of the program's memory, which are parts of `range`, to their places in a buffer of the device. Waits for that, unless
    /// uploads are ordered, and tells the value of the last upload.
    pub(crate) fn upload(&self, range: HostRange, to: vk::Buffer, pieces: &[Piece]) -> Result<u64, DeviceError> {
        let stage = &mut *self.stage();
        let mut batch = Vec::new();
        let mut filled = 0;
        for piece in pieces {
            let mut done = 0;
            while done < piece.len {
                let len = (piece.len - done).min(SLOT - filled);
                batch.push((filled, Piece { from: piece.from + done, at: piece.at + done, len }));
                (filled, done) = (filled + len, done + len);
                if filled == SLOT {
                    self.send(stage, range, to, &batch)?;
                    (filled, batch) = (0, Vec::new());
                }
            }
        }
        if !batch.is_empty() {
            self.send(stage, range, to, &batch)?;
        }
        if self.timeline.is_none() {
            stage.slots.iter_mut().try_for_each(|slot| self.wait(slot, range))?;
        }
        Ok(stage.value)
    }

    /// Stages what fits in a slot, each piece at the place given with it.
    fn send(
        &self,
        stage: &mut Stage,
        range: HostRange,
        to: vk::Buffer,
        batch: &[(usize, Piece)],
    ) -> Result<(), DeviceError> {
        let number = stage.next;
        self.wait(&mut stage.slots[number], range)?;
        if stage.piece.is_none() {
            let whole = HostRange::new(page_size(), SLOTS * SLOT).expect("whole pages");
            let (size, usage) = (whole.len() as u64, vk::BufferUsageFlags::TRANSFER_SRC);
            stage.piece = Some(stage.heap.block(whole, size, usage, MemoryLocation::CpuToGpu, "pinfold staging")?);
        }
        let piece = stage.piece.as_ref().expect("made above");
        let mapped = piece.mapped().expect("CpuToGpu memory is mapped");
        let first = number * SLOT;
        let staged: Vec<_> = batch.iter().map(|&(at, piece)| Piece { at: first + at, ..piece }).collect();
        // SAFETY: the slot has room for a batch, and is used by no work, which was waited for.
        unsafe { copy::read_pieces(mapped, &staged) }.map_err(|errno| vanished(range, errno))?;
        let regions: Vec<_> = batch
            .iter()
            .map(|&(at, piece)| vk::BufferCopy {
                src_offset: (first + at) as u64,
                dst_offset: piece.at as u64,
                size: piece.len as u64,
            })
            .collect();
        let slot = &mut stage.slots[number];
        let submitted = self.record(slot.commands, piece.raw(), to, &regions).and_then(|()| {
            let (commands, semaphores, values) = ([slot.commands], self.timeline.as_slice(), [stage.value + 1]);
            let mut timeline = vk::TimelineSemaphoreSubmitInfo::default().signal_semaphore_values(&values);
            let mut work = vk::SubmitInfo::default().command_buffers(&commands);
            if self.timeline.is_some() {
                work = work.signal_semaphores(semaphores).push_next(&mut timeline);
            }
            (self.submit)(&[work], slot.fence)
        });
        submitted.map_err(|code| self.gpu.failed("vkQueueSubmit (upload to a mirror)", range, code))?;
        slot.busy = true;
        (stage.next, stage.value) = ((number + 1) % SLOTS, stage.value + 1);
        Ok(())
    }

    fn record(
        &self,
        commands: vk::CommandBuffer,
        from: vk::Buffer,
        to: vk::Buffer,
        regions: &[vk::BufferCopy],
    ) -> Result<(), vk::Result> {
        let device = self.gpu.device();
        let begin = vk::CommandBufferBeginInfo::default().flags(vk::CommandBufferUsageFlags::ONE_TIME_SUBMIT);
        // SAFETY: the commands are ours, under the stage's lock, and not in use: the upload before was waited for.
        unsafe { device.begin_command_buffer(commands, &begin) }?;
        let (transfer, all) = (vk::PipelineStageFlags::TRANSFER, vk::PipelineStageFlags::ALL_COMMANDS);
        let none = vk::DependencyFlags::empty();
        let barrier = |from, to| [vk::MemoryBarrier::default().src_access_mask(from).dst_access_mask(to)];
        // An upload before, of the same bytes, may be under way.
        let before = barrier(vk::AccessFlags::TRANSFER_WRITE, vk::AccessFlags::TRANSFER_WRITE);
        // SAFETY: being recorded, outside a render pass.
        unsafe { device.cmd_pipeline_barrier(commands, transfer, transfer, none, &before, &[], &[]) };
        // SAFETY: being recorded; both buffers are live until the upload has been waited for, and have room for the regions.
        unsafe { device.cmd_copy_buffer(commands, from, to, regions) };
        let after = barrier(vk::AccessFlags::TRANSFER_WRITE, vk::AccessFlags::MEMORY_READ);
        // SAFETY: being recorded, outside a render pass.
        unsafe { device.cmd_pipeline_barrier(commands, transfer, all, none, &after, &[], &[]) };
        // SAFETY: being recorded.
        unsafe { device.end_command_buffer(commands) }
    }

    /// Whether all uploads have ended; waits for that.
    pub(crate) fn is_idle(&self) -> bool {
        let nowhere = HostRange::new(page_size(), page_size()).expect("a page");
        let over = |slot| matches!(self.wait(slot, nowhere), Ok(()) | Err(DeviceError::Lost));
        self.stage().slots.iter_mut().all(over)
    }

    /// Waits for the upload under way in a slot, if there is one.
    fn wait(&self, slot: &mut Slot, range: HostRange) -> Result<(), DeviceError> {
        if !slot.busy {
            return Ok(());
        }
        // SAFETY: the fence is ours, and lives as long as `self`.
        match unsafe { self.gpu.wait(On::Fence(slot.fence), 0, PATIENCE) } {
            Ok(true) => {
                slot.busy = false;
                // SAFETY: the fence is signalled, so no submit uses it.
                let reset = unsafe { self.gpu.device().reset_fences(&[slot.fence]) };
                reset.map_err(|code| self.gpu.failed("vkResetFences", range, code))
            }
            Ok(false) => Err(DeviceError::StillBusy(PATIENCE)),
            Err(code) => Err(self.gpu.failed("vkWaitForFences", range, code)),
        }
    }
}

impl Drop for Uploader {
    fn drop(&mut self) {
        let device = self.gpu.device();
        for slot in &self.stage.get_mut().unwrap_or_else(PoisonError::into_inner).slots {
            if slot.busy {
                // SAFETY: as in `wait`. A device that is still busy now stays so, or is lost.
                let _ = unsafe { self.gpu.wait(On::Fence(slot.fence), 0, PATIENCE) };
            }
            // SAFETY: the fence is ours, and its work has been waited for.
            unsafe { device.destroy_fence(slot.fence, None) };
        }
        if let Some(timeline) = self.timeline {
            // SAFETY: the semaphore is ours, our work has been waited for, and the engine's that names it keeps the mirror, which keeps `self`.
            unsafe { device.destroy_semaphore(timeline, None) };
        }
        // SAFETY: the pool is ours, and its commands are not in use.
        unsafe { device.destroy_command_pool(self.pool, None) };
    }
}
