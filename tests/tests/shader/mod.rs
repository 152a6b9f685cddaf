//! The pipelines that tests run on a [`Fixture`]: a compute shader over a set of buffers, and a painter of coloured triangles. Their shaders are
//! in `shaders/`, and the build script translates them.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test binary uses its own part of this")]

use ash::vk;

use crate::fixture::Fixture;

fn module(fixture: &Fixture, spirv: &[u8]) -> vk::ShaderModule {
    let code: Vec<u32> =
        spirv.chunks_exact(4).map(|word| u32::from_ne_bytes(word.try_into().expect("a word has four bytes"))).collect();
    // SAFETY: the code is what naga wrote, and naga validated it.
    unsafe { fixture.device.create_shader_module(&vk::ShaderModuleCreateInfo::default().code(&code), None) }.unwrap()
}

/// A compute pipeline with one set of buffers, and one word of push constants if the shader has an immediate.
pub struct Compute<'f> {
    fixture: &'f Fixture,
    kinds: Vec<vk::DescriptorType>,
    module: vk::ShaderModule,
    set_layout: vk::DescriptorSetLayout,
    layout: vk::PipelineLayout,
    pipeline: vk::Pipeline,
    pool: vk::DescriptorPool,
}

impl<'f> Compute<'f> {
    /// The pipeline of the entry point `main`, with room for `sets` sets of buffers of these kinds.
    pub fn new(fixture: &'f Fixture, spirv: &[u8], kinds: &[vk::DescriptorType], sets: u32) -> Self {
        let (device, module) = (&fixture.device, module(fixture, spirv));
        let bindings: Vec<_> = (0..)
            .zip(kinds)
            .map(|(number, &kind)| {
                vk::DescriptorSetLayoutBinding::default()
                    .binding(number)
                    .descriptor_type(kind)
                    .descriptor_count(1)
                    .stage_flags(vk::ShaderStageFlags::COMPUTE)
            })
            .collect();
        let info = vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings);
        // SAFETY: the device is live, here and below, and every create info complete.
        let set_layout = unsafe { device.create_descriptor_set_layout(&info, None) }.unwrap();
        let (sets_of_layout, constants) =
            ([set_layout], [vk::PushConstantRange { stage_flags: vk::ShaderStageFlags::COMPUTE, offset: 0, size: 4 }]);
        let info =
            vk::PipelineLayoutCreateInfo::default().set_layouts(&sets_of_layout).push_constant_ranges(&constants);
        // SAFETY: as above.
        let layout = unsafe { device.create_pipeline_layout(&info, None) }.unwrap();
        let stage = vk::PipelineShaderStageCreateInfo::default()
            .stage(vk::ShaderStageFlags::COMPUTE)
            .module(module)
            .name(c"main");
        let info = [vk::ComputePipelineCreateInfo::default().stage(stage).layout(layout)];
        // SAFETY: as above.
        let pipeline = unsafe { device.create_compute_pipelines(vk::PipelineCache::null(), &info, None) }.unwrap()[0];
        let sizes: Vec<_> = kinds.iter().map(|&ty| vk::DescriptorPoolSize { ty, descriptor_count: sets }).collect();
        let info = vk::DescriptorPoolCreateInfo::default().max_sets(sets).pool_sizes(&sizes);
        // SAFETY: as above.
        let pool = unsafe { device.create_descriptor_pool(&info, None) }.unwrap();
        Self { fixture, kinds: kinds.to_vec(), module, set_layout, layout, pipeline, pool }
    }

    /// A set of buffers: each a buffer, where it starts, how long it is.
    pub fn set(&self, buffers: &[(vk::Buffer, u64, u64)]) -> vk::DescriptorSet {
        let device = &self.fixture.device;
        let layouts = [self.set_layout];
        let info = vk::DescriptorSetAllocateInfo::default().descriptor_pool(self.pool).set_layouts(&layouts);
        // SAFETY: the pool has room for as many sets as the test said.
        let set = unsafe { device.allocate_descriptor_sets(&info) }.unwrap()[0];
        let infos: Vec<_> = buffers
            .iter()
            .map(|&(buffer, offset, range)| [vk::DescriptorBufferInfo { buffer, offset, range }])
            .collect();
        let writes: Vec<_> = (0..)
            .zip(infos.iter().zip(&self.kinds))
            .map(|(binding, (info, &kind))| {
                vk::WriteDescriptorSet::default()
                    .dst_set(set)
                    .dst_binding(binding)
                    .descriptor_type(kind)
                    .buffer_info(info)
            })
            .collect();
        // SAFETY: the set is new, and the layer watches whether the buffers are what they are used as.
        unsafe { device.update_descriptor_sets(&writes, &[]) };
        set
    }

    /// Records as many workgroups as the first word of the three at `groups` says when the device gets there, and a barrier behind them.
    pub fn dispatch(&self, commands: vk::CommandBuffer, set: vk::DescriptorSet, word: u32, groups: (vk::Buffer, u64)) {
        let (device, point) = (&self.fixture.device, vk::PipelineBindPoint::COMPUTE);
        // SAFETY: the commands are being recorded, here and below.
        unsafe { device.cmd_bind_pipeline(commands, point, self.pipeline) };
        // SAFETY: the set is of this layout.
        unsafe { device.cmd_bind_descriptor_sets(commands, point, self.layout, 0, &[set], &[]) };
        // SAFETY: the layout has one word for this stage.
        unsafe {
            device.cmd_push_constants(commands, self.layout, vk::ShaderStageFlags::COMPUTE, 0, &word.to_ne_bytes())
        };
        // SAFETY: pipeline and set are bound.
        unsafe { device.cmd_dispatch_indirect(commands, groups.0, groups.1) };
        let after = [vk::MemoryBarrier::default()
            .src_access_mask(vk::AccessFlags::SHADER_WRITE)
            .dst_access_mask(vk::AccessFlags::MEMORY_READ | vk::AccessFlags::HOST_READ)];
        let (from, to) = (
            vk::PipelineStageFlags::COMPUTE_SHADER,
            vk::PipelineStageFlags::ALL_COMMANDS | vk::PipelineStageFlags::HOST,
        );
        // SAFETY: as above.
        unsafe { device.cmd_pipeline_barrier(commands, from, to, vk::DependencyFlags::empty(), &after, &[], &[]) };
    }
}

impl Drop for Compute<'_> {
    fn drop(&mut self) {
        let device = &self.fixture.device;
        // SAFETY: no work is running, here and below; everything is the pipeline's own and destroyed once.
        unsafe { device.destroy_descriptor_pool(self.pool, None) };
        // SAFETY: as above.
        unsafe { device.destroy_pipeline(self.pipeline, None) };
        // SAFETY: as above.
        unsafe { device.destroy_pipeline_layout(self.layout, None) };
        // SAFETY: as above.
        unsafe { device.destroy_descriptor_set_layout(self.set_layout, None) };
        // SAFETY: as above.
        unsafe { device.destroy_shader_module(self.module, None) };
    }
}

/// Bytes of one vertex of a [`Painter`].
pub const VERTEX: usize = 24;

/// Draws triangles of one colour each into an image that it clears before: red, 1.0 or the largest value.
pub struct Painter<'f> {
    fixture: &'f Fixture,
    module: vk::ShaderModule,
    pass: vk::RenderPass,
    layout: vk::PipelineLayout,
    pipeline: vk::Pipeline,
    extent: vk::Extent2D,
    view: vk::ImageView,
    framebuffer: vk::Framebuffer,
}

impl<'f> Painter<'f> {
    /// For an image that is drawn to and then left in `layout_after`.
    pub fn new(
        fixture: &'f Fixture,
        image: vk::Image,
        format: vk::Format,
        extent: vk::Extent2D,
        layout_after: vk::ImageLayout,
    ) -> Self {
        let (device, module) =
            (&fixture.device, module(fixture, include_bytes!(concat!(env!("OUT_DIR"), "/coloured.spv"))));
        let pass = pass(fixture, format, layout_after);
        // SAFETY: the device is live, here and below, and every create info complete.
        let layout = unsafe { device.create_pipeline_layout(&vk::PipelineLayoutCreateInfo::default(), None) }.unwrap();
        let pipeline = pipeline(fixture, module, pass, layout, extent);
        let range = vk::ImageSubresourceRange {
            aspect_mask: vk::ImageAspectFlags::COLOR,
            level_count: 1,
            layer_count: 1,
            ..Default::default()
        };
        let info = vk::ImageViewCreateInfo::default()
            .image(image)
            .view_type(vk::ImageViewType::TYPE_2D)
            .format(format)
            .subresource_range(range);
        // SAFETY: as above; the image is bound.
        let view = unsafe { device.create_image_view(&info, None) }.unwrap();
        let views = [view];
        let info = vk::FramebufferCreateInfo::default()
            .render_pass(pass)
            .attachments(&views)
            .width(extent.width)
            .height(extent.height)
            .layers(1);
        // SAFETY: as above.
        let framebuffer = unsafe { device.create_framebuffer(&info, None) }.unwrap();
        Self { fixture, module, pass, layout, pipeline, extent, view, framebuffer }
    }

    /// Records one draw of `count` indices of 16 bits. Vertices and indices are a buffer and where they start in it.
    pub fn draw(
        &self,
        commands: vk::CommandBuffer,
        vertices: (vk::Buffer, u64),
        indices: (vk::Buffer, u64),
        count: u32,
    ) {
        let device = &self.fixture.device;
        let clear = [vk::ClearValue { color: vk::ClearColorValue { float32: [1.0, 0.0, 0.0, 1.0] } }];
        let info = vk::RenderPassBeginInfo::default()
            .render_pass(self.pass)
            .framebuffer(self.framebuffer)
            .render_area(self.extent.into())
            .clear_values(&clear);
        // SAFETY: the commands are being recorded, here and below.
        unsafe { device.cmd_begin_render_pass(commands, &info, vk::SubpassContents::INLINE) };
        // SAFETY: as above.
        unsafe { device.cmd_bind_pipeline(commands, vk::PipelineBindPoint::GRAPHICS, self.pipeline) };
        // SAFETY: as above; the layer watches whether the buffers are what they are used as.
        unsafe { device.cmd_bind_vertex_buffers(commands, 0, &[vertices.0], &[vertices.1]) };
        // SAFETY: as above.
        unsafe { device.cmd_bind_index_buffer(commands, indices.0, indices.1, vk::IndexType::UINT16) };
        // SAFETY: as above.
        unsafe { device.cmd_draw_indexed(commands, count, 1, 0, 0, 0) };
        // SAFETY: as above.
        unsafe { device.cmd_end_render_pass(commands) };
    }
}

impl Drop for Painter<'_> {
    fn drop(&mut self) {
        let device = &self.fixture.device;
        // SAFETY: no work is running, here and below; everything is the painter's own and destroyed once.
        unsafe { device.destroy_framebuffer(self.framebuffer, None) };
        // SAFETY: as above.
        unsafe { device.destroy_image_view(self.view, None) };
        // SAFETY: as above.
        unsafe { device.destroy_pipeline(self.pipeline, None) };
        // SAFETY: as above.
        unsafe { device.destroy_pipeline_layout(self.layout, None) };
        // SAFETY: as above.
        unsafe { device.destroy_render_pass(self.pass, None) };
        // SAFETY: as above.
        unsafe { device.destroy_shader_module(self.module, None) };
    }
}

/// A pass that clears, draws, and makes the picture visible to copies and to the host.
fn pass(fixture: &Fixture, format: vk::Format, layout_after: vk::ImageLayout) -> vk::RenderPass {
    let attachments = [vk::AttachmentDescription {
        format,
        samples: vk::SampleCountFlags::TYPE_1,
        load_op: vk::AttachmentLoadOp::CLEAR,
        store_op: vk::AttachmentStoreOp::STORE,
        final_layout: layout_after,
        ..Default::default()
    }];
    let drawn = [vk::AttachmentReference { attachment: 0, layout: vk::ImageLayout::COLOR_ATTACHMENT_OPTIMAL }];
    let subpasses = [vk::SubpassDescription::default()
        .pipeline_bind_point(vk::PipelineBindPoint::GRAPHICS)
        .color_attachments(&drawn)];
    let dependencies = [vk::SubpassDependency {
        src_subpass: 0,
        dst_subpass: vk::SUBPASS_EXTERNAL,
        src_stage_mask: vk::PipelineStageFlags::COLOR_ATTACHMENT_OUTPUT,
        src_access_mask: vk::AccessFlags::COLOR_ATTACHMENT_WRITE,
        dst_stage_mask: vk::PipelineStageFlags::TRANSFER | vk::PipelineStageFlags::HOST,
        dst_access_mask: vk::AccessFlags::TRANSFER_READ | vk::AccessFlags::HOST_READ,
        ..Default::default()
    }];
    let info =
        vk::RenderPassCreateInfo::default().attachments(&attachments).subpasses(&subpasses).dependencies(&dependencies);
    // SAFETY: the device is live, and the create info complete.
    unsafe { fixture.device.create_render_pass(&info, None) }.unwrap()
}

fn pipeline(
    fixture: &Fixture,
    module: vk::ShaderModule,
    pass: vk::RenderPass,
    layout: vk::PipelineLayout,
    extent: vk::Extent2D,
) -> vk::Pipeline {
    let stage = |stage, name| vk::PipelineShaderStageCreateInfo::default().stage(stage).module(module).name(name);
    let stages = [stage(vk::ShaderStageFlags::VERTEX, c"corner"), stage(vk::ShaderStageFlags::FRAGMENT, c"pixel")];
    let bindings = [vk::VertexInputBindingDescription { stride: VERTEX as u32, ..Default::default() }];
    let attribute =
        |location, format, offset| vk::VertexInputAttributeDescription { location, format, offset, binding: 0 };
    let attributes = [attribute(0, vk::Format::R32G32_SFLOAT, 0), attribute(1, vk::Format::R32G32B32A32_SFLOAT, 8)];
    let input = vk::PipelineVertexInputStateCreateInfo::default()
        .vertex_binding_descriptions(&bindings)
        .vertex_attribute_descriptions(&attributes);
    let assembly = vk::PipelineInputAssemblyStateCreateInfo::default().topology(vk::PrimitiveTopology::TRIANGLE_LIST);
    let (width, height) = (u16::try_from(extent.width).unwrap(), u16::try_from(extent.height).unwrap());
    let viewports = [vk::Viewport { width: width.into(), height: height.into(), max_depth: 1.0, ..Default::default() }];
    let scissors = [extent.into()];
    let viewport = vk::PipelineViewportStateCreateInfo::default().viewports(&viewports).scissors(&scissors);
    let raster = vk::PipelineRasterizationStateCreateInfo::default().line_width(1.0);
    let samples = vk::PipelineMultisampleStateCreateInfo::default().rasterization_samples(vk::SampleCountFlags::TYPE_1);
    let targets = [vk::PipelineColorBlendAttachmentState::default().color_write_mask(vk::ColorComponentFlags::RGBA)];
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
    // SAFETY: the device is live, and the state fits the shaders.
    unsafe { fixture.device.create_graphics_pipelines(vk::PipelineCache::null(), &info, None) }.unwrap()[0]
}
