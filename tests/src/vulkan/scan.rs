//! The compute pipeline that counts words.

use ash::vk;

/// The pipeline and what it is made of. Destroyed by who made it.
#[derive(Debug)]
pub(super) struct Scan {
    module: vk::ShaderModule,
    set_layout: vk::DescriptorSetLayout,
    layout: vk::PipelineLayout,
    pipeline: vk::Pipeline,
}

impl Scan {
    pub(super) fn new(device: &ash::Device) -> Self {
        let code: Vec<u32> = include_bytes!(concat!(env!("OUT_DIR"), "/count_others.spv"))
            .chunks_exact(4)
            .map(|word| u32::from_ne_bytes(word.try_into().expect("a word has four bytes")))
            .collect();
        // SAFETY: the code is what naga wrote, and naga validated it. The device is alive, here and below.
        let module = unsafe { device.create_shader_module(&vk::ShaderModuleCreateInfo::default().code(&code), None) };
        let module = module.expect("a shader module");
        let binding = |number| {
            vk::DescriptorSetLayoutBinding::default()
                .binding(number)
                .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                .descriptor_count(1)
                .stage_flags(vk::ShaderStageFlags::COMPUTE)
        };
        let bindings = [binding(0), binding(1)];
        let info = vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings);
        // SAFETY: as the shader declares its bindings.
        let set_layout = unsafe { device.create_descriptor_set_layout(&info, None) }.expect("a set layout");
        let set_layouts = [set_layout];
        let info = vk::PipelineLayoutCreateInfo::default().set_layouts(&set_layouts);
        // SAFETY: the set layout is new.
        let layout = unsafe { device.create_pipeline_layout(&info, None) }.expect("a pipeline layout");
        let stage = vk::PipelineShaderStageCreateInfo::default()
            .stage(vk::ShaderStageFlags::COMPUTE)
            .module(module)
            .name(c"main");
        let info = [vk::ComputePipelineCreateInfo::default().stage(stage).layout(layout)];
        // SAFETY: module and layout are new, and fit each other.
        let pipelines = unsafe { device.create_compute_pipelines(vk::PipelineCache::null(), &info, None) };
        let pipeline = pipelines.map_err(|(_, e)| e).expect("a pipeline")[0];
        Self { module, set_layout, layout, pipeline }
    }

    /// A set for two buffers, and the pool that owns it.
    pub(super) fn bind(
        &self,
        device: &ash::Device,
        data: vk::Buffer,
        count: vk::Buffer,
    ) -> (vk::DescriptorPool, vk::DescriptorSet) {
        let sizes = [vk::DescriptorPoolSize { ty: vk::DescriptorType::STORAGE_BUFFER, descriptor_count: 2 }];
        let info = vk::DescriptorPoolCreateInfo::default().max_sets(1).pool_sizes(&sizes);
        // SAFETY: the device is alive, here and below.
        let pool = unsafe { device.create_descriptor_pool(&info, None) }.expect("a descriptor pool");
        let layouts = [self.set_layout];
        let info = vk::DescriptorSetAllocateInfo::default().descriptor_pool(pool).set_layouts(&layouts);
        // SAFETY: the pool is new, and has room for one such set.
        let set = unsafe { device.allocate_descriptor_sets(&info) }.expect("a descriptor set")[0];
        let all = |buffer| [vk::DescriptorBufferInfo { buffer, offset: 0, range: vk::WHOLE_SIZE }];
        let (data, count) = (all(data), all(count));
        let write = |binding, info| {
            vk::WriteDescriptorSet::default()
                .dst_set(set)
                .dst_binding(binding)
                .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                .buffer_info(info)
        };
        // SAFETY: the set is new, and the buffers are storage buffers.
        unsafe { device.update_descriptor_sets(&[write(0, &data), write(1, &count)], &[]) };
        (pool, set)
    }

    /// Records one count.
    pub(super) fn dispatch(&self, device: &ash::Device, commands: vk::CommandBuffer, set: vk::DescriptorSet) {
        let compute = vk::PipelineBindPoint::COMPUTE;
        // SAFETY: the commands are being recorded, here and below.
        unsafe { device.cmd_bind_pipeline(commands, compute, self.pipeline) };
        // SAFETY: the set has the layout's.
        unsafe { device.cmd_bind_descriptor_sets(commands, compute, self.layout, 0, &[set], &[]) };
        // SAFETY: pipeline and set are bound.
        unsafe { device.cmd_dispatch(commands, 16, 1, 1) };
    }

    pub(super) fn destroy(&self, device: &ash::Device) {
        // SAFETY: the caller has waited for the device, here and below.
        unsafe { device.destroy_pipeline(self.pipeline, None) };
        // SAFETY: as above.
        unsafe { device.destroy_pipeline_layout(self.layout, None) };
        // SAFETY: as above; every set of it went with its pool.
        unsafe { device.destroy_descriptor_set_layout(self.set_layout, None) };
        // SAFETY: as above.
        unsafe { device.destroy_shader_module(self.module, None) };
    }
}
