//! Where the GPU finds the bytes of the file: in buffers that cover parts of it, whoever made them.
//!
//! The renderer knows offsets in the file only. So the same draws work on an imported mapping, on a staged copy, and on whatever an object
//! becomes after its range was mapped anew.

use std::collections::HashMap;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, bail};
use ash::vk;
use nix::libc;

use crate::device::Gpu;
use crate::glb::{Array, Glb, Span};
use crate::resource::Buffer;
use crate::scene::Scene;

/// Part of the file in a buffer.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    /// Which bytes of the file.
    pub span: Span,
    /// The buffer.
    pub buffer: vk::Buffer,
    /// Where in the buffer the first of them is.
    pub offset: u64,
}

/// Where an array is bound.
pub type Place = (vk::Buffer, u64);

/// The place of `array` in one of `parts`.
///
/// # Errors
/// If no part has all of it. Imports come in parts only where a file is larger than a gigabyte or so.
pub fn locate(parts: &[Part], array: Array) -> Result<Place> {
    let has = |part: &&Part| part.span.start <= array.offset && array.offset + array.bytes <= part.span.end();
    let part = parts.iter().find(has).with_context(|| {
        format!("bytes {}+{} of the file are in no single buffer of the device", array.offset, array.bytes)
    })?;
    Ok((part.buffer, part.offset + (array.offset - part.span.start)))
}

/// A copy of the binary chunk in the device's memory: what a program does that can't draw from the file.
pub struct Staged<'g> {
    /// The copy, as a part of the file.
    pub part: Part,
    /// How many bytes were moved to make it, all hops together.
    pub copied: u64,
    buffer: Buffer<'g>,
}

impl<'g> Staged<'g> {
    /// Reads the binary chunk into a buffer: directly where the device shares the host's memory, else by a copy on the queue.
    ///
    /// # Errors
    /// No memory, or a file that is shorter than it was.
    pub fn load(gpu: &'g Gpu, pool: vk::CommandPool, glb: &Glb) -> Result<Self> {
        use vk::MemoryPropertyFlags as Flags;
        // An offset in the file and the offset in the copy agree in their low bits, so one is aligned where the other is.
        let slack = glb.binary.start % 256;
        let size = slack + glb.binary.len;
        let usage = vk::BufferUsageFlags::VERTEX_BUFFER | vk::BufferUsageFlags::INDEX_BUFFER;
        let host = Flags::HOST_VISIBLE | Flags::HOST_COHERENT;
        let shares = gpu.is_cpu() || gpu.properties.device_type == vk::PhysicalDeviceType::INTEGRATED_GPU;

        let first_usage = if shares { usage } else { vk::BufferUsageFlags::TRANSFER_SRC };
        let mut buffer = Buffer::new(gpu, size, first_usage, &[host])?;
        let mapped = buffer.mapped().context("host-visible memory is mapped")?;
        // SAFETY: `slack` is below the size.
        let to = unsafe { mapped.add(usize::try_from(slack)?) };
        // SAFETY: the buffer has room for the chunk behind `slack`, and no work of the GPU names it yet.
        unsafe { read_into(glb, glb.binary, to) }?;
        let mut copied = glb.binary.len;
        if !shares {
            let usage = usage | vk::BufferUsageFlags::TRANSFER_DST;
            let local = Buffer::new(gpu, size, usage, &[Flags::DEVICE_LOCAL])?;
            copy(gpu, pool, &buffer, &local)?;
            copied += size;
            buffer = local;
        }
        let part = Part { span: glb.binary, buffer: buffer.handle, offset: slack };
        Ok(Self { part, copied, buffer })
    }

    /// Its size in the device's memory.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.buffer.size
    }
}

/// One-byte indices made two bytes wide, for devices that can't bind them as they are.
#[derive(Default)]
pub struct Widened<'g> {
    buffer: Option<Buffer<'g>>,
    places: HashMap<u64, u64>,
    /// How many bytes of the file were read for it.
    pub copied: u64,
}

impl<'g> Widened<'g> {
    /// Widens what `scene` needs on this device; usually nothing.
    ///
    /// # Errors
    /// No memory, or a file that is shorter than it was.
    pub fn load(gpu: &'g Gpu, glb: &Glb, scene: &Scene) -> Result<Self> {
        let mut result = Self::default();
        if gpu.byte_indices {
            return Ok(result);
        }
        let mut wide: Vec<u8> = Vec::new();
        for indices in scene.draws.iter().filter_map(|draw| draw.indices).filter(|indices| indices.component == 1) {
            if result.places.contains_key(&indices.offset) {
                continue;
            }
            let mut narrow = vec![0_u8; indices.count as usize];
            let span = Span { start: indices.offset, len: indices.bytes };
            // SAFETY: one-byte indices are packed, so `narrow` has room for the span, and it is ours alone.
            unsafe { read_into(glb, span, narrow.as_mut_ptr()) }?;
            result.places.insert(indices.offset, wide.len() as u64);
            result.copied += indices.bytes;
            wide.extend(narrow.iter().flat_map(|&index| u16::from(index).to_ne_bytes()));
        }
        if !wide.is_empty() {
            let host = vk::MemoryPropertyFlags::HOST_VISIBLE | vk::MemoryPropertyFlags::HOST_COHERENT;
            let buffer = Buffer::new(gpu, wide.len() as u64, vk::BufferUsageFlags::INDEX_BUFFER, &[host])?;
            let to = buffer.mapped().context("host-visible memory is mapped")?;
            // SAFETY: the mapping is as long as `wide`, and no work of the GPU names it yet.
            unsafe { to.copy_from_nonoverlapping(wide.as_ptr(), wide.len()) };
            result.buffer = Some(buffer);
        }
        Ok(result)
    }

    /// The two-byte form of these indices, if they were widened.
    #[must_use]
    pub fn place(&self, indices: Array) -> Option<Place> {
        let offset = *self.places.get(&indices.offset).filter(|_| indices.component == 1)?;
        Some((self.buffer.as_ref()?.handle, offset))
    }
}

/// Reads bytes of the file to `to` by `pread`, which answers less if the file was truncated meanwhile, where a mapping would raise SIGBUS.
///
/// # Safety
/// `to` is valid for writes of `span.len` bytes that nobody else reads or writes meanwhile.
pub unsafe fn read_into(glb: &Glb, span: Span, to: *mut u8) -> Result<()> {
    let mut done = 0;
    while done < span.len {
        let (left, at) = (usize::try_from(span.len - done)?, i64::try_from(span.start + done)?);
        // SAFETY: `done` is below the span's length, so this is inside what the caller promises.
        let to = unsafe { to.add(usize::try_from(done)?) };
        // SAFETY: the descriptor is open, and `left` bytes at `to` may be written.
        let got = unsafe { libc::pread(glb.file.as_raw_fd(), to.cast(), left, at) };
        match u64::try_from(got) {
            Ok(0) => bail!("the file was truncated while it was read: it ends at byte {}", span.start + done),
            Ok(got) => done += got,
            Err(_) => {
                let error = std::io::Error::last_os_error();
                if error.kind() != std::io::ErrorKind::Interrupted {
                    return Err(error.into());
                }
            }
        }
    }
    Ok(())
}

/// Copies a buffer on the queue and waits for it.
fn copy(gpu: &Gpu, pool: vk::CommandPool, from: &Buffer<'_>, to: &Buffer<'_>) -> Result<()> {
    let info = vk::CommandBufferAllocateInfo::default().command_pool(pool).command_buffer_count(1);
    // SAFETY: `pool` is a pool of this device that only this thread uses.
    let commands = unsafe { gpu.device.allocate_command_buffers(&info) }?;
    let begin = vk::CommandBufferBeginInfo::default().flags(vk::CommandBufferUsageFlags::ONE_TIME_SUBMIT);
    // SAFETY: the command buffer is new.
    unsafe { gpu.device.begin_command_buffer(commands[0], &begin) }?;
    let all = [vk::BufferCopy { src_offset: 0, dst_offset: 0, size: from.size }];
    // SAFETY: both buffers have this size and the usages for it.
    unsafe { gpu.device.cmd_copy_buffer(commands[0], from.handle, to.handle, &all) };
    // SAFETY: recording was begun above.
    unsafe { gpu.device.end_command_buffer(commands[0]) }?;
    let submit = [vk::SubmitInfo::default().command_buffers(&commands)];
    // SAFETY: the command buffer is executable, and only this thread uses the queue.
    unsafe { gpu.device.queue_submit(gpu.queue, &submit, vk::Fence::null()) }?;
    // SAFETY: only this thread uses the queue.
    unsafe { gpu.device.queue_wait_idle(gpu.queue) }?;
    // SAFETY: the work is over.
    unsafe { gpu.device.free_command_buffers(pool, &commands) };
    Ok(())
}
