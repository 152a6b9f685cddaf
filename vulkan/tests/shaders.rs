//! What shaders see of host memory by other ways than a storage buffer: by its address, and as texels.

#[path = "fixture/mod.rs"]
mod fixture;
#[path = "fixture/memory.rs"]
mod memory;

use ash::vk;
use fixture::{Fixture, GENEROUS, Readback};
use memory::{Memory, memfd};
use pinfold_vulkan::{Access, Config, Force, Manager, Path, Requirements, View};

/// Invocations of a workgroup.
const GROUP: u32 = 64;

/// A compute shader in SPIR-V: invocation `n` writes the word `n` behind the address in the push constant to `out[2 n]`, and texel `n` to
/// `out[2 n + 1]`. By hand, because WGSL knows neither pointers to physical memory nor texel buffers.
fn shader() -> Vec<u32> {
    // Storage classes.
    let (constant, input, push, storage, physical) = (0, 1, 9, 12, 5349);
    // Ids.
    let [main, void, function, uint, uint3, uint4, input_uint3, global, words, block] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10];
    let [address, pushed, push_block, push_var, push_address, physical_uint, image, image_pointer, texels] =
        [11, 12, 13, 14, 15, 16, 17, 18, 19];
    let [storage_block, out, storage_uint, zero, one, two, body] = [20, 21, 22, 23, 24, 25, 26];
    let [position, n, member, base, place, word, loaded, texel, red, even, odd, first, second] =
        [30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42];
    let text = |text: &str| {
        let mut bytes = text.as_bytes().to_vec();
        bytes.resize(text.len() / 4 * 4 + 4, 0);
        bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect::<Vec<_>>()
    };
    let mut code = vec![0x0723_0203, 0x0001_0300, 0, 50, 0];
    let mut op = |operation: u32, operands: &[u32]| {
        code.push((u32::try_from(operands.len()).unwrap() + 1) << 16 | operation);
        code.extend_from_slice(operands);
    };
    [1, 46, 5347].into_iter().for_each(|capability| op(17, &[capability])); // Shader, SampledBuffer, PhysicalStorageBufferAddresses
    op(10, &text("SPV_KHR_physical_storage_buffer"));
    op(14, &[5348, 1]); // OpMemoryModel PhysicalStorageBuffer64 GLSL450
    op(15, &[&[5, main], &text("main")[..], &[global]].concat()); // OpEntryPoint GLCompute
    op(16, &[main, 17, GROUP, 1, 1]); // OpExecutionMode LocalSize
    op(71, &[global, 11, 28]); // BuiltIn GlobalInvocationId
    op(71, &[words, 6, 4]); // ArrayStride
    for of in [block, push_block] {
        op(71, &[of, 2]); // Block
        op(72, &[of, 0, 35, 0]); // Offset
    }
    for (of, binding) in [(out, 0), (texels, 1)] {
        op(71, &[of, 34, 0]); // DescriptorSet
        op(71, &[of, 33, binding]); // Binding
    }
    op(19, &[void]);
    op(33, &[function, void]);
    op(21, &[uint, 32, 0]);
    op(23, &[uint3, uint, 3]);
    op(23, &[uint4, uint, 4]);
    op(32, &[input_uint3, input, uint3]);
    op(59, &[input_uint3, global, input]);
    op(29, &[words, uint]);
    op(30, &[block, words]);
    op(32, &[address, physical, block]);
    op(30, &[push_block, address]);
    op(32, &[pushed, push, push_block]);
    op(59, &[pushed, push_var, push]);
    op(32, &[push_address, push, address]);
    op(32, &[physical_uint, physical, uint]);
    op(25, &[image, uint, 5, 0, 0, 0, 1, 0]); // OpTypeImage Buffer, sampled, of unknown format
    op(32, &[image_pointer, constant, image]);
    op(59, &[image_pointer, texels, constant]);
    op(32, &[storage_block, storage, block]);
    op(59, &[storage_block, out, storage]);
    op(32, &[storage_uint, storage, uint]);
    [(zero, 0), (one, 1), (two, 2)].into_iter().for_each(|(id, value)| op(43, &[uint, id, value]));
    op(54, &[void, main, 0, function]);
    op(248, &[body]);
    op(61, &[uint3, position, global]);
    op(81, &[uint, n, position, 0]);
    op(65, &[push_address, member, push_var, zero]);
    op(61, &[address, base, member]);
    op(65, &[physical_uint, place, base, zero, n]);
    op(61, &[uint, word, place, 2, 4]); // OpLoad Aligned 4
    op(61, &[image, loaded, texels]);
    op(95, &[uint4, texel, loaded, n]); // OpImageFetch
    op(81, &[uint, red, texel, 0]);
    op(132, &[uint, even, n, two]);
    op(128, &[uint, odd, even, one]);
    op(65, &[storage_uint, first, out, zero, even]);
    op(62, &[first, word]);
    op(65, &[storage_uint, second, out, zero, odd]);
    op(62, &[second, red]);
    op(253, &[]);
    op(56, &[]);
    code
}

/// The pipeline that runs it.
struct Reader<'f> {
    fixture: &'f Fixture,
    module: vk::ShaderModule,
    set_layout: vk::DescriptorSetLayout,
    layout: vk::PipelineLayout,
    pipeline: vk::Pipeline,
    pool: vk::DescriptorPool,
}

impl<'f> Reader<'f> {
    fn new(fixture: &'f Fixture) -> Self {
        let device = &fixture.device;
        let stage = vk::ShaderStageFlags::COMPUTE;
        let code = shader();
        // SAFETY: the device is live, here and below, and each structure is valid; the layer says otherwise.
        let module =
            unsafe { device.create_shader_module(&vk::ShaderModuleCreateInfo::default().code(&code), None) }.unwrap();
        let kinds = [vk::DescriptorType::STORAGE_BUFFER, vk::DescriptorType::UNIFORM_TEXEL_BUFFER];
        let binding = |at: u32, kind| {
            vk::DescriptorSetLayoutBinding::default()
                .binding(at)
                .descriptor_type(kind)
                .descriptor_count(1)
                .stage_flags(stage)
        };
        let bindings = [binding(0, kinds[0]), binding(1, kinds[1])];
        let info = vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings);
        // SAFETY: as above.
        let set_layout = unsafe { device.create_descriptor_set_layout(&info, None) }.unwrap();
        let (layouts, pushed) = ([set_layout], [vk::PushConstantRange { stage_flags: stage, offset: 0, size: 8 }]);
        let info = vk::PipelineLayoutCreateInfo::default().set_layouts(&layouts).push_constant_ranges(&pushed);
        // SAFETY: as above.
        let layout = unsafe { device.create_pipeline_layout(&info, None) }.unwrap();
        let entry = vk::PipelineShaderStageCreateInfo::default().stage(stage).module(module).name(c"main");
        let info = [vk::ComputePipelineCreateInfo::default().stage(entry).layout(layout)];
        // SAFETY: as above.
        let pipeline = unsafe { device.create_compute_pipelines(vk::PipelineCache::null(), &info, None) }.unwrap()[0];
        let sizes = kinds.map(|ty| vk::DescriptorPoolSize { ty, descriptor_count: 8 });
        let info = vk::DescriptorPoolCreateInfo::default().max_sets(8).pool_sizes(&sizes);
        // SAFETY: as above.
        let pool = unsafe { device.create_descriptor_pool(&info, None) }.unwrap();
        Self { fixture, module, set_layout, layout, pipeline, pool }
    }

    /// The words that the shader finds by address and as texels.
    fn read(&self, view: &View<'_>) -> (Vec<u8>, Vec<u8>) {
        let device = &self.fixture.device;
        let back = Readback::new(self.fixture, 2 * view.size);
        let info = vk::BufferDeviceAddressInfo::default().buffer(view.buffer);
        // SAFETY: a live buffer of this device, which was made with the feature.
        let address = unsafe { device.get_buffer_device_address(&info) } + view.offset;
        let info = vk::BufferViewCreateInfo::default()
            .buffer(view.buffer)
            .format(vk::Format::R32_UINT)
            .offset(view.offset)
            .range(view.size);
        // SAFETY: a live buffer, and the layer watches whether it is one for texels.
        let texels = unsafe { device.create_buffer_view(&info, None) }.unwrap();
        let layouts = [self.set_layout];
        let info = vk::DescriptorSetAllocateInfo::default().descriptor_pool(self.pool).set_layouts(&layouts);
        // SAFETY: the pool has room for the few sets of a test.
        let set = unsafe { device.allocate_descriptor_sets(&info) }.unwrap()[0];
        let (out, views) =
            ([vk::DescriptorBufferInfo { buffer: back.buffer, offset: 0, range: 2 * view.size }], [texels]);
        let write = |at: u32| vk::WriteDescriptorSet::default().dst_set(set).dst_binding(at);
        let writes = [
            write(0).descriptor_type(vk::DescriptorType::STORAGE_BUFFER).buffer_info(&out),
            write(1).descriptor_type(vk::DescriptorType::UNIFORM_TEXEL_BUFFER).texel_buffer_view(&views),
        ];
        // SAFETY: the set is new, and what it names is live.
        unsafe { device.update_descriptor_sets(&writes, &[]) };
        self.fixture.run(|commands| {
            let point = vk::PipelineBindPoint::COMPUTE;
            // SAFETY: the commands are being recorded, here and below.
            unsafe { device.cmd_bind_pipeline(commands, point, self.pipeline) };
            // SAFETY: the set is of this layout.
            unsafe { device.cmd_bind_descriptor_sets(commands, point, self.layout, 0, &[set], &[]) };
            let stage = vk::ShaderStageFlags::COMPUTE;
            // SAFETY: the layout has eight bytes for this stage.
            unsafe { device.cmd_push_constants(commands, self.layout, stage, 0, &address.to_ne_bytes()) };
            let groups = u32::try_from(view.size).unwrap() / 4 / GROUP;
            // SAFETY: pipeline and set are bound.
            unsafe { device.cmd_dispatch(commands, groups, 1, 1) };
            let written = [vk::MemoryBarrier::default()
                .src_access_mask(vk::AccessFlags::SHADER_WRITE)
                .dst_access_mask(vk::AccessFlags::HOST_READ)];
            let (from, to, none) =
                (vk::PipelineStageFlags::COMPUTE_SHADER, vk::PipelineStageFlags::HOST, vk::DependencyFlags::empty());
            // SAFETY: outside a render pass.
            unsafe { device.cmd_pipeline_barrier(commands, from, to, none, &written, &[], &[]) };
        });
        // SAFETY: no work is running.
        unsafe { device.destroy_buffer_view(texels, None) };
        let (mut by_address, mut as_texels) = (Vec::new(), Vec::new());
        for pair in back.bytes().chunks_exact(8) {
            by_address.extend_from_slice(&pair[..4]);
            as_texels.extend_from_slice(&pair[4..]);
        }
        (by_address, as_texels)
    }
}

impl Drop for Reader<'_> {
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

#[test]
fn a_shader_reads_host_memory_by_address_and_as_texels_on_every_path() {
    let Some(fixture) = Fixture::with(Requirements::with_buffer_device_address) else { return };
    let reader = Reader::new(&fixture);
    for force in [None, Some(Force::Mirror)] {
        let mut config = Config::default();
        config.force = force;
        // SAFETY: the fixture's handles belong together; the manager and its leases are dropped first.
        let manager = unsafe { Manager::new(fixture.context(), config) }.unwrap();
        for (memory, path) in
            [(Memory::anonymous(5), Path::Import), (Memory::of_file(&memfd(5), 5, true), Path::AliasImport)]
        {
            memory.fill();
            // SAFETY: the mapping outlives the manager's work, and no references to it exist.
            let object = unsafe { manager.register(memory.range(), Access::Read) }.unwrap();
            let lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
            let view = lease.view(0);
            assert!(view.path == path || (force.is_some() && matches!(view.path, Path::Mirror(_))), "{:?}", view.path);
            let (by_address, as_texels) = reader.read(&view);
            assert!(by_address == memory.bytes(), "{:?}", view.path);
            assert!(as_texels == memory.bytes(), "{:?}", view.path);
            drop((lease, object));
        }
    }
}
