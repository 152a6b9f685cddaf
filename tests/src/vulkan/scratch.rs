//! Buffers of the test's own, for results.

use ash::vk;

use super::Gpu;

/// A buffer in memory of the device that the host can see.
#[derive(Debug)]
pub struct Scratch {
    gpu: Gpu,
    /// The buffer.
    pub buffer: vk::Buffer,
    memory: vk::DeviceMemory,
    mapped: *mut u8,
    len: usize,
}

// SAFETY: the pointer is to memory that belongs to this buffer alone, and it is read and written by methods that say when they may be called.
unsafe impl Send for Scratch {}
// SAFETY: as above; the methods that write take `&mut self`.
unsafe impl Sync for Scratch {}

impl Scratch {
    pub(super) fn new(gpu: &Gpu, bytes: &[u8]) -> Self {
        use vk::BufferUsageFlags as Usage;
        let device = gpu.device();
        let usage = Usage::TRANSFER_SRC | Usage::TRANSFER_DST | Usage::STORAGE_BUFFER;
        let info = vk::BufferCreateInfo::default().size(bytes.len() as u64).usage(usage);
        // SAFETY: the device is alive as long as `gpu`, here and below.
        let buffer = unsafe { device.create_buffer(&info, None) }.expect("a buffer");
        // SAFETY: the buffer is new.
        let needs = unsafe { device.get_buffer_memory_requirements(buffer) };
        // Both drivers have one type of memory: the host's.
        let info = vk::MemoryAllocateInfo::default().allocation_size(needs.size).memory_type_index(0);
        // SAFETY: the type exists.
        let memory = unsafe { device.allocate_memory(&info, None) }.expect("memory for a scratch buffer");
        // SAFETY: both are new, and the memory is as large as the buffer needs.
        unsafe { device.bind_buffer_memory(buffer, memory, 0) }.expect("bound");
        // SAFETY: the memory is not mapped yet.
        let mapped =
            unsafe { device.map_memory(memory, 0, vk::WHOLE_SIZE, vk::MemoryMapFlags::empty()) }.expect("mapped");
        let mut scratch = Self { gpu: gpu.clone(), buffer, memory, mapped: mapped.cast(), len: bytes.len() };
        scratch.write(bytes);
        scratch
    }

    /// Puts bytes at the beginning. To be called when no work is running that uses them.
    ///
    /// # Panics
    /// If there is no room for them.
    pub fn write(&mut self, bytes: &[u8]) {
        assert!(bytes.len() <= self.len, "{} bytes into a buffer of {}", bytes.len(), self.len);
        // SAFETY: the mapping has at least `len` bytes, which no reference points to.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.mapped, bytes.len()) };
    }

    /// The bytes. To be called when no work writes them.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        // SAFETY: the mapping has `len` bytes. Copied, not borrowed, so that not even a test that is wrong has a reference to what a device writes.
        unsafe { std::ptr::copy_nonoverlapping(self.mapped, bytes.as_mut_ptr(), self.len) };
        bytes
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: whoever holds the buffer in commands waits for their end before it lets go of it.
        unsafe { self.gpu.device().destroy_buffer(self.buffer, None) };
        // SAFETY: as above; freeing unmaps.
        unsafe { self.gpu.device().free_memory(self.memory, None) };
    }
}
