//! The fixed parts of drawing: one render pass, one layout, and a pipeline for each way in which draws differ.

use anyhow::Result;
use ash::vk;

use crate::device::Gpu;
use crate::scene::{Draw, Topology};

/// Bytes of the shader's `Draw`.
pub(crate) const CONSTANTS: u32 = 96;

/// What a pipeline is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    topology: Topology,
    /// Bytes from one position to the next.
    positions: u32,
    /// Bytes from one normal to the next; flat shading without.
    normals: Option<u32>,
    double_sided: bool,
    /// The matrix turns the mesh inside out, so its front faces run clockwise.
    pub(crate) mirrored: bool,
}

impl Key {
    pub(crate) fn of(draw: &Draw) -> Self {
        Self {
            topology: draw.topology,
            positions: draw.positions.stride,
            normals: draw.normals.map(|normals| normals.stride),
            double_sided: draw.double_sided,
            mirrored: draw.world.determinant() < 0.0,
        }
    }
}

/// A pass that clears, draws, and leaves attachment 0 ready to be copied. Attachments: colour (the resolved one), depth, and with
/// several samples the colour that is drawn to.
pub(crate) fn render_pass(
    gpu: &Gpu,
    colour: vk::Format,
    depth: vk::Format,
    samples: vk::SampleCountFlags,
) -> Result<vk::RenderPass> {
    use vk::PipelineStageFlags as Stage;
    use vk::{AccessFlags as Access, AttachmentLoadOp as Load, AttachmentStoreOp as Store, ImageLayout as Layout};
    let one = vk::SampleCountFlags::TYPE_1;
    let attachment = |format, samples, load, store, layout| vk::AttachmentDescription {
        format,
        samples,
        load_op: load,
        store_op: store,
        stencil_load_op: Load::DONT_CARE,
        stencil_store_op: Store::DONT_CARE,
        initial_layout: Layout::UNDEFINED,
        final_layout: layout,
        ..Default::default()
    };
    let depth_layout = Layout::DEPTH_STENCIL_ATTACHMENT_OPTIMAL;
    let target = Layout::COLOR_ATTACHMENT_OPTIMAL;
    let resolves = samples != one;
    let load = if resolves { Load::DONT_CARE } else { Load::CLEAR };
    let mut attachments = vec![
        attachment(colour, one, load, Store::STORE, Layout::TRANSFER_SRC_OPTIMAL),
        attachment(depth, samples, Load::CLEAR, Store::DONT_CARE, depth_layout),
    ];
    if resolves {
        attachments.push(attachment(colour, samples, Load::CLEAR, Store::DONT_CARE, target));
    }
    let reference = |attachment, layout| vk::AttachmentReference { attachment, layout };
    let drawn = [reference(if resolves { 2 } else { 0 }, target)];
    let resolved = [reference(0, target)];
    let depth = reference(1, depth_layout);
    let mut subpass = vk::SubpassDescription::default()
        .pipeline_bind_point(vk::PipelineBindPoint::GRAPHICS)
        .color_attachments(&drawn)
        .depth_stencil_attachment(&depth);
    if resolves {
        subpass = subpass.resolve_attachments(&resolved);
    }
    let tests = Stage::EARLY_FRAGMENT_TESTS | Stage::LATE_FRAGMENT_TESTS;
    let dependencies = [
        // The frame before has been copied and has left its depths.
        vk::SubpassDependency {
            src_subpass: vk::SUBPASS_EXTERNAL,
            dst_subpass: 0,
            src_stage_mask: Stage::TRANSFER | Stage::COLOR_ATTACHMENT_OUTPUT | tests,
            src_access_mask: Access::COLOR_ATTACHMENT_WRITE | Access::DEPTH_STENCIL_ATTACHMENT_WRITE,
            dst_stage_mask: Stage::COLOR_ATTACHMENT_OUTPUT | tests,
            dst_access_mask: Access::COLOR_ATTACHMENT_WRITE
                | Access::DEPTH_STENCIL_ATTACHMENT_READ
                | Access::DEPTH_STENCIL_ATTACHMENT_WRITE,
            ..Default::default()
        },
        // The copy that follows sees all of the picture.
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
    let subpasses = [subpass];
    let info =
        vk::RenderPassCreateInfo::default().attachments(&attachments).subpasses(&subpasses).dependencies(&dependencies);
    // SAFETY: a valid create info; all it points to is alive.
    Ok(unsafe { gpu.device.create_render_pass(&info, None) }?)
}

/// A layout with nothing but the push constants.
pub(crate) fn layout(gpu: &Gpu) -> Result<vk::PipelineLayout> {
    let stages = vk::ShaderStageFlags::VERTEX | vk::ShaderStageFlags::FRAGMENT;
    let ranges = [vk::PushConstantRange { stage_flags: stages, offset: 0, size: CONSTANTS }];
    let info = vk::PipelineLayoutCreateInfo::default().push_constant_ranges(&ranges);
    // SAFETY: a valid create info; every device has 128 bytes of push constants.
    Ok(unsafe { gpu.device.create_pipeline_layout(&info, None) }?)
}

/// All shaders, from `shaders/mesh.wgsl` by the build script.
pub(crate) fn shaders(gpu: &Gpu) -> Result<vk::ShaderModule> {
    let bytes = include_bytes!(concat!(env!("OUT_DIR"), "/mesh.spv"));
    let words: Vec<u32> =
        bytes.chunks_exact(4).map(|word| u32::from_ne_bytes(word.try_into().expect("four bytes"))).collect();
    let info = vk::ShaderModuleCreateInfo::default().code(&words);
    // SAFETY: naga has validated the module that these words were made from.
    Ok(unsafe { gpu.device.create_shader_module(&info, None) }?)
}

/// The pipeline for `key`.
pub(crate) fn pipeline(
    gpu: &Gpu,
    key: Key,
    module: vk::ShaderModule,
    layout: vk::PipelineLayout,
    pass: vk::RenderPass,
    size: vk::Extent2D,
    samples: vk::SampleCountFlags,
) -> Result<vk::Pipeline> {
    let (vertex, fragment) = match key.normals {
        Some(_) => (c"vertex_smooth", c"fragment_smooth"),
        None => (c"vertex_flat", c"fragment_flat"),
    };
    let stage = |stage, name| vk::PipelineShaderStageCreateInfo::default().stage(stage).module(module).name(name);
    let stages = [stage(vk::ShaderStageFlags::VERTEX, vertex), stage(vk::ShaderStageFlags::FRAGMENT, fragment)];

    let strides: Vec<_> = [Some(key.positions), key.normals].into_iter().flatten().zip(0_u32..).collect();
    let bindings: Vec<_> = strides
        .iter()
        .map(|&(stride, binding)| vk::VertexInputBindingDescription { binding, stride, ..Default::default() })
        .collect();
    let attributes: Vec<_> = strides
        .iter()
        .map(|&(_, at)| vk::VertexInputAttributeDescription {
            location: at,
            binding: at,
            format: vk::Format::R32G32B32_SFLOAT,
            offset: 0,
        })
        .collect();
    let input = vk::PipelineVertexInputStateCreateInfo::default()
        .vertex_binding_descriptions(&bindings)
        .vertex_attribute_descriptions(&attributes);
    let assembly = vk::PipelineInputAssemblyStateCreateInfo::default().topology(match key.topology {
        Topology::List => vk::PrimitiveTopology::TRIANGLE_LIST,
        Topology::Strip => vk::PrimitiveTopology::TRIANGLE_STRIP,
        Topology::Fan => vk::PrimitiveTopology::TRIANGLE_FAN,
    });
    #[allow(clippy::cast_precision_loss)] // pixels, at most 16384 or so
    let viewports =
        [vk::Viewport { width: size.width as f32, height: size.height as f32, max_depth: 1.0, ..Default::default() }];
    let scissors = [size.into()];
    let viewport = vk::PipelineViewportStateCreateInfo::default().viewports(&viewports).scissors(&scissors);
    let raster = vk::PipelineRasterizationStateCreateInfo::default()
        .cull_mode(if key.double_sided { vk::CullModeFlags::NONE } else { vk::CullModeFlags::BACK })
        .front_face(if key.mirrored { vk::FrontFace::CLOCKWISE } else { vk::FrontFace::COUNTER_CLOCKWISE })
        .line_width(1.0);
    let multisample = vk::PipelineMultisampleStateCreateInfo::default().rasterization_samples(samples);
    let depth = vk::PipelineDepthStencilStateCreateInfo::default()
        .depth_test_enable(true)
        .depth_write_enable(true)
        .depth_compare_op(vk::CompareOp::LESS);
    let targets = [vk::PipelineColorBlendAttachmentState::default().color_write_mask(vk::ColorComponentFlags::RGBA)];
    let blend = vk::PipelineColorBlendStateCreateInfo::default().attachments(&targets);
    let info = [vk::GraphicsPipelineCreateInfo::default()
        .stages(&stages)
        .vertex_input_state(&input)
        .input_assembly_state(&assembly)
        .viewport_state(&viewport)
        .rasterization_state(&raster)
        .multisample_state(&multisample)
        .depth_stencil_state(&depth)
        .color_blend_state(&blend)
        .layout(layout)
        .render_pass(pass)];
    // SAFETY: the shaders' inputs, outputs and constants fit this state, and all it points to is alive.
    let made = unsafe { gpu.device.create_graphics_pipelines(vk::PipelineCache::null(), &info, None) };
    Ok(made.map_err(|(_, error)| error)?[0])
}
