//! Draws a scene into an image and brings the image to the host.
//!
//! Nothing here knows whose memory the vertices are in: a draw is given buffers and offsets. Frames are recorded anew each time, as an
//! engine does whose buffers may be other ones after an object was acquired again.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use ash::vk;

use crate::camera::Camera;
use crate::device::Gpu;
use crate::geometry::{Part, Widened, locate};
use crate::picture::Picture;
use crate::pipeline::{self, Key};
use crate::resource::{Buffer, Image};
use crate::scene::{Draw, Scene};

/// The colour where nothing is drawn, as it is in the picture.
pub const BACKGROUND: [u8; 4] = [226, 230, 236, 255];

const COLOUR: vk::Format = vk::Format::R8G8B8A8_SRGB;

/// Longer than any frame takes, shorter than anybody waits.
const PATIENCE: Duration = Duration::from_secs(120);

/// Images, pipelines and commands for pictures of one size. One frame at a time is in flight.
pub struct Renderer<'g> {
    gpu: &'g Gpu,
    size: vk::Extent2D,
    samples: vk::SampleCountFlags,
    /// The pool of its command buffers, and of those its owner needs on the same thread.
    pub pool: vk::CommandPool,
    commands: vk::CommandBuffer,
    fence: vk::Fence,
    pass: vk::RenderPass,
    framebuffer: vk::Framebuffer,
    layout: vk::PipelineLayout,
    module: vk::ShaderModule,
    pipelines: HashMap<Key, vk::Pipeline>,
    // What is sampled once and copied to `readback`. The others exist for the framebuffer.
    resolved: Image<'g>,
    _attachments: Vec<Image<'g>>,
    readback: Buffer<'g>,
}

impl<'g> Renderer<'g> {
    /// Makes everything but the pipelines.
    ///
    /// # Errors
    /// A size beyond the device's limits, or no memory.
    pub fn new(gpu: &'g Gpu, width: u32, height: u32) -> Result<Self> {
        let limits = &gpu.properties.limits;
        let most = limits.max_image_dimension2_d.min(limits.max_framebuffer_width).min(limits.max_framebuffer_height);
        if width == 0 || height == 0 || width > most || height > most {
            bail!("pictures of this device have 1 to {most} pixels on a side, not {width}x{height}");
        }
        let size = vk::Extent2D { width, height };
        let four = limits.framebuffer_color_sample_counts & limits.framebuffer_depth_sample_counts;
        let samples = match four.contains(vk::SampleCountFlags::TYPE_4) {
            true => vk::SampleCountFlags::TYPE_4,
            false => vk::SampleCountFlags::TYPE_1,
        };
        let depth = depth_format(gpu)?;

        use vk::{ImageAspectFlags as Aspect, ImageUsageFlags as Usage};
        let one = vk::SampleCountFlags::TYPE_1;
        let copied = Usage::COLOR_ATTACHMENT | Usage::TRANSFER_SRC;
        let resolved = Image::new(gpu, size, COLOUR, one, copied, Aspect::COLOR)?;
        let depth_usage = Usage::DEPTH_STENCIL_ATTACHMENT;
        let mut attachments = vec![Image::new(gpu, size, depth, samples, depth_usage, Aspect::DEPTH)?];
        let mut views = vec![resolved.view, attachments[0].view];
        if samples != one {
            let usage = Usage::COLOR_ATTACHMENT | Usage::TRANSIENT_ATTACHMENT;
            let sampled = Image::new(gpu, size, COLOUR, samples, usage, Aspect::COLOR)?;
            views.push(sampled.view);
            attachments.push(sampled);
        }
        let bytes = u64::from(width) * u64::from(height) * 4;
        let host = vk::MemoryPropertyFlags::HOST_VISIBLE | vk::MemoryPropertyFlags::HOST_COHERENT;
        let wishes = [host | vk::MemoryPropertyFlags::HOST_CACHED, host];
        let readback = Buffer::new(gpu, bytes, vk::BufferUsageFlags::TRANSFER_DST, &wishes)?;

        let pass = pipeline::render_pass(gpu, COLOUR, depth, samples)?;
        let info = vk::FramebufferCreateInfo::default().render_pass(pass).attachments(&views);
        let info = info.width(width).height(height).layers(1);
        // SAFETY: the views fit the pass's attachments in number, format, samples and size.
        let framebuffer = unsafe { gpu.device.create_framebuffer(&info, None) }?;
        let info = vk::CommandPoolCreateInfo::default()
            .queue_family_index(gpu.family)
            .flags(vk::CommandPoolCreateFlags::RESET_COMMAND_BUFFER);
        // SAFETY: a valid create info with the family of the device's queue.
        let pool = unsafe { gpu.device.create_command_pool(&info, None) }?;
        let info = vk::CommandBufferAllocateInfo::default().command_pool(pool).command_buffer_count(1);
        // SAFETY: the pool is new.
        let commands = unsafe { gpu.device.allocate_command_buffers(&info) }?[0];
        // SAFETY: a valid create info.
        let fence = unsafe { gpu.device.create_fence(&vk::FenceCreateInfo::default(), None) }?;
        Ok(Self {
            gpu,
            size,
            samples,
            pool,
            commands,
            fence,
            pass,
            framebuffer,
            layout: pipeline::layout(gpu)?,
            module: pipeline::shaders(gpu)?,
            pipelines: HashMap::new(),
            resolved,
            _attachments: attachments,
            readback,
        })
    }

    /// Samples per pixel.
    #[must_use]
    pub fn samples(&self) -> u32 {
        self.samples.as_raw()
    }

    /// Makes the pipelines that `scene` needs. [`record`](Self::record) would make them too, within its time.
    ///
    /// # Errors
    /// What the driver answers.
    pub fn prepare(&mut self, scene: &Scene) -> Result<()> {
        for draw in &scene.draws {
            let key = Key::of(draw);
            if !self.pipelines.contains_key(&key) {
                let made =
                    pipeline::pipeline(self.gpu, key, self.module, self.layout, self.pass, self.size, self.samples)?;
                self.pipelines.insert(key, made);
            }
        }
        Ok(())
    }

    /// Records a frame that draws the scene `times` times over itself, which changes nothing but how long it takes.
    /// The frame before it must be over.
    ///
    /// # Errors
    /// What the driver answers, or an array that is in no part.
    pub fn record(
        &mut self,
        scene: &Scene,
        camera: &Camera,
        parts: &[Part],
        widened: &Widened<'_>,
        times: u32,
    ) -> Result<()> {
        self.prepare(scene)?;
        let (device, commands) = (&self.gpu.device, self.commands);
        let begin = vk::CommandBufferBeginInfo::default().flags(vk::CommandBufferUsageFlags::ONE_TIME_SUBMIT);
        // SAFETY: the frame before is over (the caller's promise), so the buffer isn't pending; the pool allows the reset.
        unsafe { device.begin_command_buffer(commands, &begin) }?;
        let [r, g, b, _] = BACKGROUND.map(linear);
        let mut clears = [vk::ClearValue::default(); 3];
        clears[0].color.float32 = [r, g, b, 1.0];
        clears[1].depth_stencil = vk::ClearDepthStencilValue { depth: 1.0, stencil: 0 };
        clears[2].color.float32 = [r, g, b, 1.0];
        let used = if self.samples == vk::SampleCountFlags::TYPE_1 { 2 } else { 3 };
        let info = vk::RenderPassBeginInfo::default()
            .render_pass(self.pass)
            .framebuffer(self.framebuffer)
            .render_area(self.size.into())
            .clear_values(&clears[..used]);
        // SAFETY: recording has begun; pass and framebuffer fit each other.
        unsafe { device.cmd_begin_render_pass(commands, &info, vk::SubpassContents::INLINE) };
        for _ in 0..times {
            let mut bound = None;
            for draw in &scene.draws {
                let key = Key::of(draw);
                if bound.replace(key) != Some(key) {
                    let graphics = vk::PipelineBindPoint::GRAPHICS;
                    // SAFETY: inside the pass that the pipeline was made for.
                    unsafe { device.cmd_bind_pipeline(commands, graphics, self.pipelines[&key]) };
                }
                self.record_draw(draw, camera, parts, widened)?;
            }
        }
        // SAFETY: inside the pass begun above.
        unsafe { device.cmd_end_render_pass(commands) };
        self.record_readback();
        // SAFETY: recording has begun, and no pass is open.
        unsafe { device.end_command_buffer(commands) }?;
        Ok(())
    }

    fn record_draw(&self, draw: &Draw, camera: &Camera, parts: &[Part], widened: &Widened<'_>) -> Result<()> {
        let (device, commands) = (&self.gpu.device, self.commands);
        let constants = constants(draw, camera);
        let stages = vk::ShaderStageFlags::VERTEX | vk::ShaderStageFlags::FRAGMENT;
        // SAFETY: the layout's one range is as long as the constants and for both stages.
        unsafe { device.cmd_push_constants(commands, self.layout, stages, 0, &constants) };

        let positions = locate(parts, draw.positions)?;
        let normals = draw.normals.map(|normals| locate(parts, normals)).transpose()?;
        let (buffers, offsets): (Vec<_>, Vec<_>) = [Some(positions), normals].into_iter().flatten().unzip();
        // SAFETY: the buffers have vertex usage, the offsets lie inside them and are multiples of 4.
        unsafe { device.cmd_bind_vertex_buffers(commands, 0, &buffers, &offsets) };
        let Some(indices) = draw.indices else {
            // SAFETY: all that the pipeline reads is bound, for `count` vertices.
            unsafe { device.cmd_draw(commands, draw.positions.count, 1, 0, 0) };
            return Ok(());
        };
        let wide = widened.place(indices);
        let kind = match indices.component {
            1 if wide.is_none() => vk::IndexType::UINT8_EXT,
            4 => vk::IndexType::UINT32,
            _ => vk::IndexType::UINT16,
        };
        let (buffer, offset) = wide.map_or_else(|| locate(parts, indices), Ok)?;
        // SAFETY: the buffer has index usage, the offset lies inside it and is a multiple of the index size; one-byte
        // indices are bound only where the feature is enabled, as they are widened elsewhere.
        unsafe { device.cmd_bind_index_buffer(commands, buffer, offset, kind) };
        // SAFETY: all that the pipeline reads is bound. An index beyond the vertices reads nothing outside the buffer,
        // because robustBufferAccess is enabled.
        unsafe { device.cmd_draw_indexed(commands, indices.count, 1, 0, 0, 0) };
        Ok(())
    }

    /// Copies the image that the pass has left for it, and lets the host see the copy.
    fn record_readback(&self) {
        let (device, commands) = (&self.gpu.device, self.commands);
        let layers = vk::ImageSubresourceLayers {
            aspect_mask: vk::ImageAspectFlags::COLOR,
            layer_count: 1,
            ..Default::default()
        };
        let region = [vk::BufferImageCopy {
            image_subresource: layers,
            image_extent: vk::Extent3D { width: self.size.width, height: self.size.height, depth: 1 },
            ..Default::default()
        }];
        let layout = vk::ImageLayout::TRANSFER_SRC_OPTIMAL;
        // SAFETY: the pass leaves the image in this layout with a dependency to this copy; the buffer has its size.
        unsafe {
            device.cmd_copy_image_to_buffer(commands, self.resolved.handle, layout, self.readback.handle, &region);
        };
        let seen = [vk::MemoryBarrier::default()
            .src_access_mask(vk::AccessFlags::TRANSFER_WRITE)
            .dst_access_mask(vk::AccessFlags::HOST_READ)];
        let (from, to) = (vk::PipelineStageFlags::TRANSFER, vk::PipelineStageFlags::HOST);
        // SAFETY: outside any pass, with stages that every queue has.
        unsafe { device.cmd_pipeline_barrier(commands, from, to, vk::DependencyFlags::empty(), &seen, &[], &[]) };
    }

    /// Submits the recorded frame. If `timeline` is given, it reaches the value when the frame is over.
    ///
    /// # Errors
    /// What the driver answers; nothing was submitted then.
    ///
    /// # Safety
    /// Every buffer that the recorded commands name stays alive until [`wait`](Self::wait) has returned.
    pub unsafe fn submit(&self, timeline: Option<(vk::Semaphore, u64)>) -> Result<(), vk::Result> {
        let commands = [self.commands];
        let (semaphores, values): (Vec<_>, Vec<_>) = timeline.into_iter().unzip();
        let mut values = vk::TimelineSemaphoreSubmitInfo::default().signal_semaphore_values(&values);
        let mut info = vk::SubmitInfo::default().command_buffers(&commands).signal_semaphores(&semaphores);
        if timeline.is_some() {
            info = info.push_next(&mut values);
        }
        // SAFETY: the commands are recorded and what they name is alive (the caller's promise); only this thread uses the
        // queue; the fence is unsignalled, as `wait` resets it.
        unsafe { self.gpu.device.queue_submit(self.gpu.queue, &[info], self.fence) }
    }

    /// Waits until the submitted frame is over.
    ///
    /// # Errors
    /// A lost device, or a frame that takes minutes.
    pub fn wait(&self) -> Result<()> {
        let limit = u64::try_from(PATIENCE.as_nanos())?;
        // SAFETY: the fence is alive and was given to a submit.
        unsafe { self.gpu.device.wait_for_fences(&[self.fence], true, limit) }.context("the frame didn't end")?;
        // SAFETY: no submit that would signal the fence is pending.
        unsafe { self.gpu.device.reset_fences(&[self.fence]) }?;
        Ok(())
    }

    /// The picture of the last frame that was waited for.
    #[must_use]
    pub fn picture(&self) -> Picture {
        let mut rgba = vec![0; usize::try_from(self.readback.size).expect("it fits in memory, as it is mapped")];
        let from = self.readback.mapped().expect("host-visible memory is mapped");
        // SAFETY: the mapping is as long as the buffer, coherent, and the GPU writes it only while a frame is in flight.
        unsafe { from.copy_to_nonoverlapping(rgba.as_mut_ptr(), rgba.len()) };
        Picture { width: self.size.width, height: self.size.height, rgba }
    }
}

impl Drop for Renderer<'_> {
    fn drop(&mut self) {
        let device = &self.gpu.device;
        // SAFETY: the device is alive; a failure means that it is lost, and then nothing runs.
        let _ = unsafe { device.device_wait_idle() };
        for &pipeline in self.pipelines.values() {
            // SAFETY: nothing runs, here and below; each was made from this device and is destroyed once.
            unsafe { device.destroy_pipeline(pipeline, None) };
        }
        // SAFETY: as above.
        unsafe { device.destroy_shader_module(self.module, None) };
        // SAFETY: as above.
        unsafe { device.destroy_pipeline_layout(self.layout, None) };
        // SAFETY: as above.
        unsafe { device.destroy_framebuffer(self.framebuffer, None) };
        // SAFETY: as above.
        unsafe { device.destroy_render_pass(self.pass, None) };
        // SAFETY: as above.
        unsafe { device.destroy_fence(self.fence, None) };
        // SAFETY: as above; this frees the command buffer.
        unsafe { device.destroy_command_pool(self.pool, None) };
    }
}

/// The 96 bytes that the shader calls `Draw`.
fn constants(draw: &Draw, camera: &Camera) -> Vec<u8> {
    let view = camera.view * draw.world;
    let mirrors = if Key::of(draw).mirrored { -1.0 } else { 1.0 };
    let up = camera.view.transform_vector3(glam::DVec3::Y).normalize();
    let rows = [view.row(0), view.row(1), view.row(2)].map(|row| row.as_vec4().to_array());
    let [r, g, b] = draw.colour;
    let vectors = [
        rows[0],
        rows[1],
        rows[2],
        glam::DVec4::from(camera.projection).as_vec4().to_array(),
        [r, g, b, mirrors],
        up.extend(0.0).as_vec4().to_array(),
    ];
    vectors.as_flattened().iter().flat_map(|number| number.to_ne_bytes()).collect()
}

/// The light that an 8-bit sRGB value stands for.
fn linear(value: u8) -> f32 {
    let v = f32::from(value) / 255.0;
    if v <= 0.04045 { v / 12.92 } else { ((v + 0.055) / 1.055).powf(2.4) }
}

/// A depth format that the device can draw to; the specification promises one of the first two.
fn depth_format(gpu: &Gpu) -> Result<vk::Format> {
    let wishes = [vk::Format::D32_SFLOAT, vk::Format::X8_D24_UNORM_PACK32, vk::Format::D16_UNORM];
    let can = |format: &vk::Format| {
        // SAFETY: the physical device comes from this instance.
        let found = unsafe { gpu.instance.get_physical_device_format_properties(gpu.physical, *format) };
        found.optimal_tiling_features.contains(vk::FormatFeatureFlags::DEPTH_STENCIL_ATTACHMENT)
    };
    wishes.into_iter().find(can).context("the device has no depth format")
}
