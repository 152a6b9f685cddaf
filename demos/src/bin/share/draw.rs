//! Draws a picture from a frame that lies in a buffer, pixel by pixel, and brings what it drew to the host.

use anyhow::Result;
use ash::vk;
use pinfold_demos::device::Gpu;
use pinfold_demos::resource::{Buffer, Image};
use pinfold_vulkan::{Path, View, dmabuf};

const FORMAT: vk::Format = vk::Format::R8G8B8A8_UNORM;

/// An image, a pipeline and commands for pictures of one size. One picture at a time is in flight.
pub(crate) struct Screen<'g> {
    gpu: &'g Gpu,
    size: vk::Extent2D,
    pass: vk::RenderPass,
    layout: vk::PipelineLayout,
    bindings: Bindings,
    module: vk::ShaderModule,
    pipeline: vk::Pipeline,
    framebuffer: vk::Framebuffer,
    pool: vk::CommandPool,
    commands: vk::CommandBuffer,
    /// Signalled with the number of each picture.
    pub(crate) timeline: vk::Semaphore,
    target: Image<'g>,
    readback: Buffer<'g>,
}

impl<'g> Screen<'g> {
    pub(crate) fn new(gpu: &'g Gpu, width: u32, height: u32) -> Result<Self> {
        let (device, size) = (&gpu.device, vk::Extent2D { width, height });
        let usage = vk::ImageUsageFlags::COLOR_ATTACHMENT | vk::ImageUsageFlags::TRANSFER_SRC;
        let one = vk::SampleCountFlags::TYPE_1;
        let target = Image::new(gpu, size, FORMAT, one, usage, vk::ImageAspectFlags::COLOR)?;
        let host = vk::MemoryPropertyFlags::HOST_VISIBLE | vk::MemoryPropertyFlags::HOST_COHERENT;
        let wishes = [host | vk::MemoryPropertyFlags::HOST_CACHED, host];
        let bytes = u64::from(width) * u64::from(height) * 4;
        let readback = Buffer::new(gpu, bytes, vk::BufferUsageFlags::TRANSFER_DST, &wishes)?;
        let pass = pass(gpu)?;
        let views = [target.view];
        let info = vk::FramebufferCreateInfo::default().render_pass(pass).attachments(&views);
        let info = info.width(width).height(height).layers(1);
        // SAFETY: the view fits the pass, here and below every create info is valid and of this device.
        let framebuffer = unsafe { device.create_framebuffer(&info, None) }?;
        let bindings = Bindings::new(gpu)?;
        let ranges = [vk::PushConstantRange { stage_flags: vk::ShaderStageFlags::FRAGMENT, offset: 0, size: 4 }];
        let sets = [bindings.layout];
        let info = vk::PipelineLayoutCreateInfo::default().push_constant_ranges(&ranges).set_layouts(&sets);
        // SAFETY: as above.
        let layout = unsafe { device.create_pipeline_layout(&info, None) }?;
        let code: Vec<u32> = include_bytes!(concat!(env!("OUT_DIR"), "/frame.spv"))
            .chunks_exact(4)
            .map(|word| u32::from_ne_bytes(word.try_into().expect("four bytes")))
            .collect();
        // SAFETY: naga has validated the module that these words were made from.
        let module = unsafe { device.create_shader_module(&vk::ShaderModuleCreateInfo::default().code(&code), None) }?;
        let pipeline = pipeline(gpu, module, layout, pass, size)?;
        let info = vk::CommandPoolCreateInfo::default()
            .queue_family_index(gpu.family)
            .flags(vk::CommandPoolCreateFlags::RESET_COMMAND_BUFFER);
        // SAFETY: as above.
        let pool = unsafe { device.create_command_pool(&info, None) }?;
        let info = vk::CommandBufferAllocateInfo::default().command_pool(pool).command_buffer_count(1);
        // SAFETY: as above.
        let commands = unsafe { device.allocate_command_buffers(&info) }?[0];
        let mut kind = vk::SemaphoreTypeCreateInfo::default().semaphore_type(vk::SemaphoreType::TIMELINE);
        // SAFETY: as above; Pinfold has asked for timeline semaphores.
        let timeline =
            unsafe { device.create_semaphore(&vk::SemaphoreCreateInfo::default().push_next(&mut kind), None) }?;
        Ok(Self {
            gpu,
            size,
            pass,
            layout,
            bindings,
            module,
            pipeline,
            framebuffer,
            pool,
            commands,
            timeline,
            target,
            readback,
        })
    }

    /// Records a picture of the frame in `view`, whose rows are `stride` pixels apart. The picture before it must be over.
    ///
    /// Whoever fills the frame is outside this device, so it is taken over before and given back afterwards. What the device writes is for the host to
    /// read, which takes the barrier at the end.
    pub(crate) fn record(&self, view: &View<'_>, stride: u32) -> Result<()> {
        let (device, commands) = (&self.gpu.device, self.commands);
        let begin = vk::CommandBufferBeginInfo::default().flags(vk::CommandBufferUsageFlags::ONE_TIME_SUBMIT);
        // SAFETY: the frame before is over, so the buffer isn't pending; the pool allows the reset.
        unsafe { device.begin_command_buffer(commands, &begin) }?;
        let (foreign, ours) = (dmabuf::foreign_family(&self.gpu.extensions), self.gpu.family);
        let (all, shader) = (vk::PipelineStageFlags::ALL_COMMANDS, vk::AccessFlags::SHADER_READ);
        let is_shared = view.path == Path::DmaBuf;
        if is_shared {
            let take = [dmabuf::from_foreign(view, foreign, ours, shader)];
            // SAFETY: recording has begun, here and below; the caller keeps the buffer alive.
            unsafe { device.cmd_pipeline_barrier(commands, all, all, vk::DependencyFlags::empty(), &[], &take, &[]) };
        }
        self.bindings.show(self.gpu, view);
        let clear = [vk::ClearValue::default()];
        let info = vk::RenderPassBeginInfo::default()
            .render_pass(self.pass)
            .framebuffer(self.framebuffer)
            .render_area(self.size.into())
            .clear_values(&clear);
        // SAFETY: pass and framebuffer fit each other.
        unsafe { device.cmd_begin_render_pass(commands, &info, vk::SubpassContents::INLINE) };
        // SAFETY: the pipeline was made for this pass.
        unsafe { device.cmd_bind_pipeline(commands, vk::PipelineBindPoint::GRAPHICS, self.pipeline) };
        let (graphics, sets) = (vk::PipelineBindPoint::GRAPHICS, [self.bindings.set]);
        // SAFETY: the set has the pipeline's layout.
        unsafe { device.cmd_bind_descriptor_sets(commands, graphics, self.layout, 0, &sets, &[]) };
        let (stage, stride) = (vk::ShaderStageFlags::FRAGMENT, stride.to_ne_bytes());
        // SAFETY: the layout has these four bytes for this stage.
        unsafe { device.cmd_push_constants(commands, self.layout, stage, 0, &stride) };
        // SAFETY: all that the pipeline needs is bound; the receiver of the frame has checked that its rows are inside.
        unsafe { device.cmd_draw(commands, 3, 1, 0, 0) };
        // SAFETY: inside the pass.
        unsafe { device.cmd_end_render_pass(commands) };
        if is_shared {
            let give = [dmabuf::to_foreign(view, foreign, ours, shader)];
            // SAFETY: outside the pass.
            unsafe { device.cmd_pipeline_barrier(commands, all, all, vk::DependencyFlags::empty(), &[], &give, &[]) };
        }
        let layers = vk::ImageSubresourceLayers {
            aspect_mask: vk::ImageAspectFlags::COLOR,
            layer_count: 1,
            ..Default::default()
        };
        let extent = vk::Extent3D { width: self.size.width, height: self.size.height, depth: 1 };
        let region = [vk::BufferImageCopy { image_subresource: layers, image_extent: extent, ..Default::default() }];
        let (image, to) = (self.target.handle, self.readback.handle);
        // SAFETY: the pass leaves the image in this layout, and the buffer is as large as the picture.
        unsafe { device.cmd_copy_image_to_buffer(commands, image, vk::ImageLayout::TRANSFER_SRC_OPTIMAL, to, &region) };
        let to_host = [vk::MemoryBarrier::default()
            .src_access_mask(vk::AccessFlags::TRANSFER_WRITE)
            .dst_access_mask(vk::AccessFlags::HOST_READ)];
        let (from, to) = (vk::PipelineStageFlags::TRANSFER, vk::PipelineStageFlags::HOST);
        // SAFETY: outside the pass.
        unsafe { device.cmd_pipeline_barrier(commands, from, to, vk::DependencyFlags::empty(), &to_host, &[], &[]) };
        // SAFETY: it is being recorded.
        unsafe { device.end_command_buffer(commands) }?;
        Ok(())
    }

    /// Submits the recorded picture, which signals `value`.
    pub(crate) fn submit(&self, value: u64) -> Result<(), vk::Result> {
        let (commands, signals, values) = ([self.commands], [self.timeline], [value]);
        let mut timeline = vk::TimelineSemaphoreSubmitInfo::default().signal_semaphore_values(&values);
        let work =
            [vk::SubmitInfo::default().command_buffers(&commands).signal_semaphores(&signals).push_next(&mut timeline)];
        // SAFETY: the commands were recorded, and only this thread uses the queue.
        unsafe { self.gpu.device.queue_submit(self.gpu.queue, &work, vk::Fence::null()) }
    }

    /// The pixels of the last picture, when it is over.
    pub(crate) fn pixels(&self) -> Vec<u8> {
        let mut pixels = vec![0; usize::try_from(self.readback.size).expect("it is mapped")];
        let from = self.readback.mapped().expect("host-visible memory is mapped");
        // SAFETY: the mapping is as long as the buffer, coherent, and the GPU writes it only while a picture is in flight.
        unsafe { from.copy_to_nonoverlapping(pixels.as_mut_ptr(), pixels.len()) };
        pixels
    }
}

impl Drop for Screen<'_> {
    fn drop(&mut self) {
        let device = &self.gpu.device;
        // SAFETY: the device is alive; a failure means that it is lost, and then nothing runs.
        let _ = unsafe { device.device_wait_idle() };
        // SAFETY: nothing runs, here and below; each was made from this device and is destroyed once.
        unsafe { device.destroy_semaphore(self.timeline, None) };
        // SAFETY: as above.
        unsafe { device.destroy_command_pool(self.pool, None) };
        // SAFETY: as above.
        unsafe { device.destroy_pipeline(self.pipeline, None) };
        // SAFETY: as above.
        unsafe { device.destroy_shader_module(self.module, None) };
        // SAFETY: as above.
        unsafe { device.destroy_pipeline_layout(self.layout, None) };
        // SAFETY: as above, and its set with it.
        unsafe { device.destroy_descriptor_pool(self.bindings.pool, None) };
        // SAFETY: as above.
        unsafe { device.destroy_descriptor_set_layout(self.bindings.layout, None) };
        // SAFETY: as above.
        unsafe { device.destroy_framebuffer(self.framebuffer, None) };
        // SAFETY: as above.
        unsafe { device.destroy_render_pass(self.pass, None) };
    }
}

/// The one binding: a storage buffer for the fragments.
struct Bindings {
    layout: vk::DescriptorSetLayout,
    pool: vk::DescriptorPool,
    set: vk::DescriptorSet,
}

impl Bindings {
    fn new(gpu: &Gpu) -> Result<Self> {
        let (device, kind) = (&gpu.device, vk::DescriptorType::STORAGE_BUFFER);
        let bindings = [vk::DescriptorSetLayoutBinding::default()
            .descriptor_type(kind)
            .descriptor_count(1)
            .stage_flags(vk::ShaderStageFlags::FRAGMENT)];
        let info = vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings);
        // SAFETY: a valid create info, here and below.
        let layout = unsafe { device.create_descriptor_set_layout(&info, None) }?;
        let sizes = [vk::DescriptorPoolSize { ty: kind, descriptor_count: 1 }];
        let info = vk::DescriptorPoolCreateInfo::default().max_sets(1).pool_sizes(&sizes);
        // SAFETY: as above.
        let pool = unsafe { device.create_descriptor_pool(&info, None) }?;
        let layouts = [layout];
        let info = vk::DescriptorSetAllocateInfo::default().descriptor_pool(pool).set_layouts(&layouts);
        // SAFETY: as above; the pool has room for one.
        let set = unsafe { device.allocate_descriptor_sets(&info) }?[0];
        Ok(Self { layout, pool, set })
    }

    /// Points at the frame. No work that uses the set is under way.
    fn show(&self, gpu: &Gpu, view: &View<'_>) {
        let buffers = [vk::DescriptorBufferInfo { buffer: view.buffer, offset: view.offset, range: view.size }];
        let write = [vk::WriteDescriptorSet::default()
            .dst_set(self.set)
            .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
            .buffer_info(&buffers)];
        // SAFETY: the set is not in use, and the buffer is alive and has these bytes.
        unsafe { gpu.device.update_descriptor_sets(&write, &[]) };
    }
}

/// A pass that starts black, and leaves the picture ready to be copied.
fn pass(gpu: &Gpu) -> Result<vk::RenderPass> {
    use vk::{AccessFlags as Access, PipelineStageFlags as Stage};
    let attachments = [vk::AttachmentDescription {
        format: FORMAT,
        samples: vk::SampleCountFlags::TYPE_1,
        load_op: vk::AttachmentLoadOp::CLEAR,
        store_op: vk::AttachmentStoreOp::STORE,
        final_layout: vk::ImageLayout::TRANSFER_SRC_OPTIMAL,
        ..Default::default()
    }];
    let drawn = [vk::AttachmentReference { attachment: 0, layout: vk::ImageLayout::COLOR_ATTACHMENT_OPTIMAL }];
    let subpasses = [vk::SubpassDescription::default().color_attachments(&drawn)];
    let dependencies = [
        vk::SubpassDependency {
            src_subpass: vk::SUBPASS_EXTERNAL,
            dst_subpass: 0,
            src_stage_mask: Stage::TRANSFER | Stage::COLOR_ATTACHMENT_OUTPUT,
            src_access_mask: Access::COLOR_ATTACHMENT_WRITE,
            dst_stage_mask: Stage::COLOR_ATTACHMENT_OUTPUT,
            dst_access_mask: Access::COLOR_ATTACHMENT_READ | Access::COLOR_ATTACHMENT_WRITE,
            ..Default::default()
        },
        vk::SubpassDependency {
            src_subpass: 0,
            dst_subpass: vk::SUBPASS_EXTERNAL,
            src_stage_mask: Stage::COLOR_ATTACHMENT_OUTPUT,
            src_access_mask: Access::COLOR_ATTACHMENT_WRITE,
            dst_stage_mask: Stage::TRANSFER,
            dst_access_mask: Access::TRANSFER_READ,
            ..Default::default()
        },
    ];
    let info =
        vk::RenderPassCreateInfo::default().attachments(&attachments).subpasses(&subpasses).dependencies(&dependencies);
    // SAFETY: a valid create info; all it points to is alive.
    Ok(unsafe { gpu.device.create_render_pass(&info, None) }?)
}

fn pipeline(
    gpu: &Gpu,
    module: vk::ShaderModule,
    layout: vk::PipelineLayout,
    pass: vk::RenderPass,
    size: vk::Extent2D,
) -> Result<vk::Pipeline> {
    let stage = |stage, name| vk::PipelineShaderStageCreateInfo::default().stage(stage).module(module).name(name);
    let stages = [stage(vk::ShaderStageFlags::VERTEX, c"cover"), stage(vk::ShaderStageFlags::FRAGMENT, c"show")];
    let input = vk::PipelineVertexInputStateCreateInfo::default();
    let assembly = vk::PipelineInputAssemblyStateCreateInfo::default().topology(vk::PrimitiveTopology::TRIANGLE_LIST);
    #[expect(clippy::cast_precision_loss, reason = "pixels, at most 16384 or so")]
    let viewports =
        [vk::Viewport { width: size.width as f32, height: size.height as f32, max_depth: 1.0, ..Default::default() }];
    let scissors = [size.into()];
    let viewport = vk::PipelineViewportStateCreateInfo::default().viewports(&viewports).scissors(&scissors);
    let raster = vk::PipelineRasterizationStateCreateInfo::default().line_width(1.0);
    let samples = vk::PipelineMultisampleStateCreateInfo::default().rasterization_samples(vk::SampleCountFlags::TYPE_1);
    let targets = [vk::PipelineColorBlendAttachmentState {
        color_write_mask: vk::ColorComponentFlags::RGBA,
        ..Default::default()
    }];
    let blend = vk::PipelineColorBlendStateCreateInfo::default().attachments(&targets);
    let info = [vk::GraphicsPipelineCreateInfo::default()
        .stages(&stages)
        .vertex_input_state(&input)
        .input_assembly_state(&assembly)
        .viewport_state(&viewport)
        .rasterization_state(&raster)
        .multisample_state(&samples)
        .color_blend_state(&blend)
        .layout(layout)
        .render_pass(pass)];
    // SAFETY: the shaders' inputs, outputs and constants fit this state, and all it points to is alive.
    let made = unsafe { gpu.device.create_graphics_pipelines(vk::PipelineCache::null(), &info, None) };
    Ok(made.map_err(|(_, error)| error)?[0])
}
