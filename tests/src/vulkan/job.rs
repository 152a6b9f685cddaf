//! One submit: its commands, its results, and the semaphore that says it is over.

use ash::prelude::VkResult;
use ash::vk;
use pinfold_vulkan::Timeline;

use super::{Gpu, Scratch};
use crate::PATIENCE;

/// Work for the queue: made, started (in the closure of a submit), and finished.
///
/// A job that is [`hold`](Self::hold)ing waits on the queue until [`open`](Self::open). So a test decides how long the device works, and needs
/// no clock. Dropping a job waits for its end.
#[derive(Debug)]
pub struct Job {
    gpu: Gpu,
    commands: vk::CommandBuffer,
    /// The last one holds the results.
    buffers: Vec<Scratch>,
    descriptors: vk::DescriptorPool,
    gate: Option<Timeline>,
    done: Timeline,
    started: std::sync::atomic::AtomicBool,
}

impl Job {
    pub(super) fn copy(gpu: &Gpu, buffer: vk::Buffer, offset: u64, size: u64, rounds: u32) -> Self {
        let to = gpu.scratch(&vec![0; usize::try_from(size).expect("64 bits")]);
        let commands = gpu.record(|commands| {
            for _ in 0..rounds {
                copy(gpu, commands, (buffer, offset), to.buffer, size);
                gpu.barrier(commands, vk::PipelineStageFlags::TRANSFER, vk::AccessFlags::TRANSFER_WRITE);
            }
        });
        Self::new(gpu, commands, vec![to], vk::DescriptorPool::null())
    }

    pub(super) fn scan(gpu: &Gpu, buffer: vk::Buffer, offset: u64, size: u64, expected: u32, rounds: u32) -> Self {
        // Copied first: a buffer over memory that the device only reads need not be a storage buffer.
        let data = gpu.scratch(&vec![0; usize::try_from(size).expect("64 bits")]);
        let words = u32::try_from(size / 4).expect("a scan is of less than 16 GiB");
        let count = gpu.scratch([words, expected, 0].map(u32::to_ne_bytes).as_flattened());
        let (pool, set) = gpu.scan().bind(gpu.device(), data.buffer, count.buffer);
        let commands = gpu.record(|commands| {
            for _ in 0..rounds {
                copy(gpu, commands, (buffer, offset), data.buffer, size);
                gpu.barrier(commands, vk::PipelineStageFlags::COMPUTE_SHADER, vk::AccessFlags::SHADER_READ);
                gpu.scan().dispatch(gpu.device(), commands, set);
                gpu.barrier(commands, vk::PipelineStageFlags::TRANSFER, vk::AccessFlags::TRANSFER_WRITE);
            }
        });
        Self::new(gpu, commands, vec![data, count], pool)
    }

    pub(super) fn fill(gpu: &Gpu, buffer: vk::Buffer, offset: u64, size: u64, word: u32) -> Self {
        let commands = gpu.record(|commands| {
            // SAFETY: the commands are being recorded; that the bytes are the buffer's is for the caller, and the layer watches.
            unsafe { gpu.device().cmd_fill_buffer(commands, buffer, offset, size, word) };
        });
        Self::new(gpu, commands, Vec::new(), vk::DescriptorPool::null())
    }

    fn new(gpu: &Gpu, commands: vk::CommandBuffer, buffers: Vec<Scratch>, descriptors: vk::DescriptorPool) -> Self {
        let (gpu, done) = (gpu.clone(), gpu.timeline());
        Self { gpu, commands, buffers, descriptors, gate: None, done, started: false.into() }
    }

    /// Lets the job wait for [`open`](Self::open).
    #[must_use]
    pub fn hold(mut self) -> Self {
        self.gate = Some(self.gpu.timeline());
        self
    }

    /// What is signalled when the job is over: the signal to give to a submit.
    #[must_use]
    pub fn signal(&self) -> Timeline {
        self.done
    }

    /// Submits the job to the queue.
    ///
    /// # Errors
    /// Those of `vkQueueSubmit`; nothing has been submitted then.
    ///
    /// # Panics
    /// If it has been started before.
    pub fn start(&self) -> VkResult<()> {
        // SeqCst for want of a reason for less: one thread starts a job.
        assert!(!self.started.swap(true, std::sync::atomic::Ordering::SeqCst), "a job runs once");
        let (commands, signals) = ([self.commands], [self.done.semaphore]);
        let gates = Vec::from_iter(self.gate.map(|gate| gate.semaphore));
        let open_at = Vec::from_iter(self.gate.map(|gate| gate.value));
        let (stages, over_at) = ([vk::PipelineStageFlags::ALL_COMMANDS], [self.done.value]);
        let mut values = vk::TimelineSemaphoreSubmitInfo::default()
            .wait_semaphore_values(&open_at)
            .signal_semaphore_values(&over_at);
        let work = [vk::SubmitInfo::default()
            .command_buffers(&commands)
            .wait_semaphores(&gates)
            .wait_dst_stage_mask(&stages[..gates.len()])
            .signal_semaphores(&signals)
            .push_next(&mut values)];
        let queue = self.gpu.queue();
        // SAFETY: the queue is this thread's while it holds the lock; what the commands name of ours lives until the job is over.
        unsafe { self.gpu.device().queue_submit(*queue, &work, vk::Fence::null()) }
    }

    /// Lets a holding job go on. Does nothing the second time.
    pub fn open(&self) {
        let Some(gate) = self.gate else { return };
        if !self.is_at(gate) {
            let info = vk::SemaphoreSignalInfo::default().semaphore(gate.semaphore).value(gate.value);
            // SAFETY: a timeline semaphore that nobody else signals.
            unsafe { self.gpu.device().signal_semaphore(&info) }.expect("signalled");
        }
    }

    /// Whether it is over.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.is_at(self.done)
    }

    /// Waits for the end of a job that has been started, and gives its results: the bytes that a copy job saw.
    ///
    /// # Panics
    /// If it doesn't end.
    #[must_use]
    pub fn finish(&self) -> Vec<u8> {
        self.wait().expect("the job ends");
        self.buffers.last().map(Scratch::bytes).unwrap_or_default()
    }

    /// As [`finish`](Self::finish) of a scan job: how many words were not as expected, over all rounds.
    #[must_use]
    pub fn others(&self) -> u32 {
        let count = self.finish();
        u32::from_ne_bytes(count[8..12].try_into().expect("the third word of the count"))
    }

    fn wait(&self) -> VkResult<()> {
        self.open();
        let (semaphores, values) = ([self.done.semaphore], [self.done.value]);
        let info = vk::SemaphoreWaitInfo::default().semaphores(&semaphores).values(&values);
        let limit = u64::try_from(PATIENCE.as_nanos()).expect("a minute");
        // SAFETY: a timeline semaphore of a device that is alive.
        unsafe { self.gpu.device().wait_semaphores(&info, limit) }
    }

    fn is_at(&self, Timeline { semaphore, value }: Timeline) -> bool {
        // SAFETY: a timeline semaphore of a device that is alive.
        unsafe { self.gpu.device().get_semaphore_counter_value(semaphore) }.expect("a value") >= value
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if *self.started.get_mut() {
            let ended = self.wait();
            assert!(ended.is_ok() || std::thread::panicking(), "a job that was started doesn't end: {ended:?}");
            if ended.is_ok() {
                self.gpu.reuse(self.commands, [Some(self.done), self.gate].into_iter().flatten());
            }
        }
        if self.descriptors != vk::DescriptorPool::null() {
            // SAFETY: the job is over, or was never started.
            unsafe { self.gpu.device().destroy_descriptor_pool(self.descriptors, None) };
        }
    }
}

fn copy(gpu: &Gpu, commands: vk::CommandBuffer, from: (vk::Buffer, u64), to: vk::Buffer, size: u64) {
    let regions = [vk::BufferCopy { src_offset: from.1, dst_offset: 0, size }];
    // SAFETY: the commands are being recorded; that the bytes are the buffer's is for the caller, and the layer watches.
    unsafe { gpu.device().cmd_copy_buffer(commands, from.0, to, &regions) };
}
