//! What the GPU gets: a kernel that reads a buffer and one that writes it, over memory of every kind. Times are the queue's own timestamps, or, where it has
//! none, from the submit to its end.

use std::ffi::CStr;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use ash::vk;
use pinfold_vulkan::{Access, Config, Lease, page_size};

use crate::groups::import::{PATIENCE, bytes, register, settle};
use crate::memory::Memory;
use crate::session::{Contender, Plan, Session};
use crate::vulkan::{Card, Commands, Owned, Staged, flags};

/// Threads of a work group, as in the shader.
const WIDTH: u32 = 64;
/// Work groups: enough to fill a large card, few enough for a CPU driver.
const GROUPS: u32 = 1024;

/// The two kernels, with what they need around them.
struct Kernels<'c> {
    card: &'c Card,
    set_layout: vk::DescriptorSetLayout,
    layout: vk::PipelineLayout,
    module: vk::ShaderModule,
    pipelines: Vec<vk::Pipeline>,
    descriptors: vk::DescriptorPool,
    queries: Option<vk::QueryPool>,
    sums: Owned<'c>,
}

impl<'c> Kernels<'c> {
    fn new(card: &'c Card, most_buffers: u32) -> Result<Self> {
        let device = card.device();
        let words =
            ash::util::read_spv(&mut std::io::Cursor::new(include_bytes!(concat!(env!("OUT_DIR"), "/touch.spv"))))?;
        let info = vk::ShaderModuleCreateInfo::default().code(&words);
        // SAFETY: the device is alive, here and below; the code is what the translator made and checked.
        let module = unsafe { device.create_shader_module(&info, None) }?;
        let binding = |number| {
            vk::DescriptorSetLayoutBinding::default()
                .binding(number)
                .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                .descriptor_count(1)
                .stage_flags(vk::ShaderStageFlags::COMPUTE)
        };
        let bindings = [binding(0), binding(1)];
        let info = vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings);
        // SAFETY: a valid create info.
        let set_layout = unsafe { device.create_descriptor_set_layout(&info, None) }?;
        let layouts = [set_layout];
        let info = vk::PipelineLayoutCreateInfo::default().set_layouts(&layouts);
        // SAFETY: a valid create info with a layout that was just made.
        let layout = unsafe { device.create_pipeline_layout(&info, None) }?;
        let stage = |entry: &'static CStr| {
            vk::PipelineShaderStageCreateInfo::default().stage(vk::ShaderStageFlags::COMPUTE).module(module).name(entry)
        };
        let infos = [c"read", c"write"]
            .map(|entry| vk::ComputePipelineCreateInfo::default().stage(stage(entry)).layout(layout));
        // SAFETY: module and layout were just made, and the module has both entry points.
        let pipelines = unsafe { device.create_compute_pipelines(vk::PipelineCache::null(), &infos, None) }
            .map_err(|(_, code)| code)?;
        let sizes =
            [vk::DescriptorPoolSize { ty: vk::DescriptorType::STORAGE_BUFFER, descriptor_count: 2 * most_buffers }];
        let info = vk::DescriptorPoolCreateInfo::default().max_sets(most_buffers).pool_sizes(&sizes);
        // SAFETY: a valid create info.
        let descriptors = unsafe { device.create_descriptor_pool(&info, None) }?;
        let queries = match card.tick() {
            None => None,
            Some(_) => {
                let info = vk::QueryPoolCreateInfo::default().query_type(vk::QueryType::TIMESTAMP).query_count(2);
                // SAFETY: a valid create info; the queue has timestamps.
                Some(unsafe { device.create_query_pool(&info, None) }?)
            }
        };
        let sums = card.allocate((GROUPS * WIDTH * 4) as usize, gpu_allocator::MemoryLocation::GpuOnly)?;
        Ok(Self { card, set_layout, layout, module, pipelines, descriptors, queries, sums })
    }

    /// Commands that run one kernel over a part of a buffer, after a copy into it from `staging` if there is one.
    fn record(
        &self,
        kernel: usize,
        buffer: vk::Buffer,
        offset: u64,
        size: usize,
        staging: Option<vk::Buffer>,
    ) -> Result<Commands<'c>> {
        let device = self.card.device();
        let layouts = [self.set_layout];
        let info = vk::DescriptorSetAllocateInfo::default().descriptor_pool(self.descriptors).set_layouts(&layouts);
        // SAFETY: the pool has room for as many sets as were asked for.
        let set = unsafe { device.allocate_descriptor_sets(&info) }?[0];
        let data = [vk::DescriptorBufferInfo { buffer, offset, range: size as u64 }];
        let sums = [vk::DescriptorBufferInfo { buffer: self.sums.buffer, offset: 0, range: vk::WHOLE_SIZE }];
        let write = |number, info| {
            vk::WriteDescriptorSet::default()
                .dst_set(set)
                .dst_binding(number)
                .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                .buffer_info(info)
        };
        // SAFETY: the buffers are alive and have the usage; nobody uses the new set yet.
        unsafe { device.update_descriptor_sets(&[write(0, &data), write(1, &sums)], &[]) };
        self.card.record(|commands| {
            if let Some(queries) = self.queries {
                // SAFETY: being recorded, here and below, outside any pass; the pool has two queries.
                unsafe { device.cmd_reset_query_pool(commands, queries, 0, 2) };
                // SAFETY: as above.
                unsafe { device.cmd_write_timestamp(commands, vk::PipelineStageFlags::TOP_OF_PIPE, queries, 0) };
            }
            if let Some(from) = staging {
                let region = [vk::BufferCopy { src_offset: 0, dst_offset: offset, size: size as u64 }];
                // SAFETY: both buffers have the usages and at least this size.
                unsafe { device.cmd_copy_buffer(commands, from, buffer, &region) };
                let barrier = [vk::MemoryBarrier::default()
                    .src_access_mask(vk::AccessFlags::TRANSFER_WRITE)
                    .dst_access_mask(vk::AccessFlags::SHADER_READ)];
                let (from, to) = (vk::PipelineStageFlags::TRANSFER, vk::PipelineStageFlags::COMPUTE_SHADER);
                // SAFETY: outside any pass, with stages that the queue has.
                unsafe {
                    device.cmd_pipeline_barrier(commands, from, to, vk::DependencyFlags::empty(), &barrier, &[], &[])
                };
            }
            let point = vk::PipelineBindPoint::COMPUTE;
            // SAFETY: the pipeline is alive and fits the bind point.
            unsafe { device.cmd_bind_pipeline(commands, point, self.pipelines[kernel]) };
            // SAFETY: the set was made for this layout.
            unsafe { device.cmd_bind_descriptor_sets(commands, point, self.layout, 0, &[set], &[]) };
            // SAFETY: all that the pipeline needs is bound.
            unsafe { device.cmd_dispatch(commands, GROUPS, 1, 1) };
            if let Some(queries) = self.queries {
                // SAFETY: as for the first timestamp.
                unsafe { device.cmd_write_timestamp(commands, vk::PipelineStageFlags::BOTTOM_OF_PIPE, queries, 1) };
            }
            Ok(())
        })
    }

    /// Gigabytes a second of one run.
    ///
    /// # Safety
    /// The buffers that the commands name are alive.
    unsafe fn run(&self, commands: &Commands<'_>, size: usize) -> Result<f64> {
        let begun = Instant::now();
        // SAFETY: the contract of this function.
        unsafe { self.card.run(commands) }?;
        let mut time = begun.elapsed().as_secs_f64() * 1e9;
        if let (Some(queries), Some(tick)) = (self.queries, self.card.tick()) {
            let mut ticks = [0_u64; 2];
            let how = vk::QueryResultFlags::TYPE_64 | vk::QueryResultFlags::WAIT;
            // SAFETY: the pool has two queries, both written by the commands that are over.
            unsafe { self.card.device().get_query_pool_results(queries, 0, &mut ticks, how) }?;
            time = ticks[1].wrapping_sub(ticks[0]) as f64 * tick;
        }
        ensure!(time > 0.0, "the timestamps of the queue stand still");
        Ok(size as f64 / time)
    }
}

impl Drop for Kernels<'_> {
    fn drop(&mut self) {
        let device = self.card.device();
        // SAFETY: whoever submitted has waited, so nothing runs; each was made from this device and is destroyed once, here and below.
        unsafe { device.destroy_descriptor_pool(self.descriptors, None) };
        for &pipeline in &self.pipelines {
            // SAFETY: as above.
            unsafe { device.destroy_pipeline(pipeline, None) };
        }
        // SAFETY: as above.
        unsafe { device.destroy_pipeline_layout(self.layout, None) };
        // SAFETY: as above.
        unsafe { device.destroy_descriptor_set_layout(self.set_layout, None) };
        // SAFETY: as above.
        unsafe { device.destroy_shader_module(self.module, None) };
        if let Some(queries) = self.queries {
            // SAFETY: as above.
            unsafe { device.destroy_query_pool(queries, None) };
        }
    }
}

pub(crate) fn run(session: &mut Session, card: &Card) -> Result<()> {
    let clock = if card.tick().is_some() { "gpu" } else { "wall" };
    if card.tick().is_none() {
        session.absent("GPU timestamps", "the queue has none; times are from submit to end");
    }
    let limit = card.gpu.properties.limits.max_storage_buffer_range as usize;
    let wanted = session.mode.pick(
        vec![8 << 20],
        vec![64 << 10, 1 << 20, 16 << 20, 64 << 20],
        vec![64 << 10, 1 << 20, 16 << 20, 64 << 20, 256 << 20],
    );
    let (sizes, too_big) = card.fitting(&wanted);
    for size in too_big {
        session.absent(&bytes(size), "more than fits this machine or card");
    }
    let mut curves = [Vec::new(), Vec::new()];
    let largest = sizes.iter().copied().filter(|&size| size <= limit).max();
    for &size in sizes.iter().filter(|&&size| size <= limit) {
        let quiet = Some(size) != largest;
        for (curve, medians) in curves.iter_mut().zip(one_size(session, card, size, quiet, clock)?) {
            curve.push((size as f64, medians));
        }
    }
    for (curve, name) in curves.into_iter().zip(["GPU reads", "GPU writes"]) {
        session.curve(name, "bytes", "GB/s", curve)?;
    }
    Ok(())
}

/// A lease of memory that is registered for it.
fn leased(manager: &pinfold_vulkan::Manager, memory: &Memory, access: Access) -> Result<Lease> {
    let object = register(manager, memory, access)?;
    Ok(manager.acquire_timeout(&[&object], PATIENCE)?)
}

fn one_size(
    session: &mut Session,
    card: &Card,
    size: usize,
    quiet: bool,
    clock: &'static str,
) -> Result<[crate::session::Medians; 2]> {
    let size = size.next_multiple_of(page_size());
    let kernels = Kernels::new(card, 64)?;
    let in_place = card.manager(Config::default())?;
    let mirrors = card.manager(card.mirrors())?;
    let memory = Memory::populated(size)?;
    // A device that can't import has nothing to write in place.
    let ours = leased(&in_place, &memory, Access::ReadWrite).or_else(|_| leased(&in_place, &memory, Access::Read))?;
    let mirror = leased(&mirrors, &memory, Access::Read)?;
    // The commands name the chunk that holds all of it.
    ensure!(ours.view(0).size >= size as u64, "the object is in several chunks");
    let path = format!("{:?}", ours.view(0).path);
    let writable = !path.starts_with("Mirror");
    if !quiet {
        session.fact("in place means", &path);
    }
    let mut staged = Staged::new(card, size)?;
    // SAFETY: the harness's memory is readable, and only this thread writes it.
    unsafe { staged.upload(memory.pointer()) }?;
    let local = card.allocate(size, gpu_allocator::MemoryLocation::GpuOnly)?;
    let staging = card.allocate(size, gpu_allocator::MemoryLocation::CpuToGpu)?;
    // Memory of every host-visible type that buffers may be in, and whose heap has room: some cards have a small one for this.
    let types = card.gpu.memory.memory_types_as_slice().iter().enumerate();
    let visible = types.filter(|(_, kind)| kind.property_flags.contains(vk::MemoryPropertyFlags::HOST_VISIBLE));
    let typed: Vec<_> = visible
        .filter(|(_, kind)| card.heap_left(kind.heap_index as usize) / 4 >= size as u64)
        .filter_map(|(index, kind)| {
            let plain = card.allocate_of_type(size, u32::try_from(index).ok()?).ok()?;
            Some((format!("type {index}: {}", flags(kind.property_flags)), plain))
        })
        .collect();

    let mut all = Vec::new();
    for (kernel, name) in [(0, "GPU reads"), (1, "GPU writes")] {
        let ours_chunk = ours.view(0);
        if kernel == 1 && !writable {
            session.absent(name, format!("in place: the device's path is {path}, which it can't write"));
            all.push(Vec::new());
            continue;
        }
        let sample = |title: &str, buffer, offset, staging| {
            let commands = kernels.record(kernel, buffer, offset, size, staging)?;
            let kernels = &kernels;
            // SAFETY: every buffer is held by this function until the plan is over.
            anyhow::Ok(Contender::new(title, move || unsafe { kernels.run(&commands, size) }))
        };
        let ours = sample("in place", ours_chunk.buffer, ours_chunk.offset, None)?;
        let mut plan = Plan::new(format!("{name}, {}", bytes(size)), "GB/s", ours).higher_is_better().clock(clock);
        plan = plan.against(sample("device-local", local.buffer, 0, None)?, None);
        if kernel == 0 {
            let view = mirror.view(0);
            plan = plan.against(sample("mirror", view.buffer, view.offset, None)?, None);
            plan = plan
                .against(sample("staged: copied by the GPU, then read", local.buffer, 0, Some(staging.buffer))?, None);
        }
        for (title, plain) in &typed {
            plan = plan.against(sample(title, plain.buffer, 0, None)?, None);
        }
        if quiet {
            plan = plan.quiet().at_most(session.mode.pick(5, 9, 21));
        } else {
            let control = |title: &str| sample(title, ours_chunk.buffer, ours_chunk.offset, None);
            if kernel == 0 {
                let twin =
                    Plan::new("GPU reads, in place", "GB/s", control("in place")?).higher_is_better().clock(clock);
                session.measure(twin.against(control("in place")?, None).control())?;
            }
        }
        all.push(session.measure(plan)?);
    }
    drop((ours, mirror));
    settle(&in_place)?;
    settle(&mirrors)?;
    drop(staged);
    all.try_into().ok().context("two kernels")
}
