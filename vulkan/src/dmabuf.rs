//! Dma-bufs as Vulkan buffers, and shared memory that takes this way because its pages are not imported otherwise.
//!
//! A driver closes the descriptor that it is given, so each import gets one of its own. It takes the size from whoever asks, so the size is the
//! kernel's and never the sender's. What it says it can import is obeyed here, other than for host memory: a driver is known that exports
//! something else under this name. The memory type is one that the descriptor *and* the buffer allow.
//!
//! Which barriers: the buffer belongs to whoever used it last. Work that uses it begins with [`from_foreign`] and ends with [`to_foreign`], if
//! somebody outside this device (a codec, a compositor, another device) uses it in between; the processor alone needs neither.

mod modifier;

use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use ash::vk;
use pinfold_core::dmabuf::{BufferSort, CpuAccess, DmaBuf, DmaBufPart, MemoryPart, Udmabuf, memory_file_of};
use pinfold_core::{Access, DeviceError, HostRange, MirrorReason, Path, Request};
use pinfold_invalidate::Handful;

use crate::block::Block;
use crate::budget::Share;
use crate::device::VulkanDevice;
use crate::gpu::{Gpu, OwnedBuffer, OwnedMemory};
use crate::import::{Import, ImportPiece, NotImported, all_usages, imported, read_usages};
use crate::path::Run;

pub use modifier::{Modifier, Plane, image_from_foreign, image_to_foreign, modifiers};

const EXTERNAL: vk::ExternalMemoryHandleTypeFlags = vk::ExternalMemoryHandleTypeFlags::DMA_BUF_EXT;

/// Imports a part of a dma-buf.
///
/// # Errors
/// [`NotImported`]; nothing is held then.
pub(crate) fn import_part(
    gpu: &Arc<Gpu>,
    range: HostRange,
    part: &DmaBufPart,
    access: Access,
    label: &str,
) -> Result<ImportPiece, NotImported> {
    let refused = |call| NotImported::refused(gpu, call);
    let no = |call, code| Err(refused(call)(code));
    if gpu.dmabuf.is_none() {
        return no("VK_EXT_external_memory_dma_buf", vk::Result::ERROR_EXTENSION_NOT_PRESENT);
    }
    let usage = match access {
        Access::Read => read_usages(gpu),
        Access::ReadWrite => all_usages(gpu),
    };
    let asked = vk::PhysicalDeviceExternalBufferInfo::default().usage(usage).handle_type(EXTERNAL);
    let mut able = vk::ExternalBufferProperties::default();
    // SAFETY: the device is live, and both structures are complete.
    unsafe {
        gpu.context.instance.get_physical_device_external_buffer_properties(gpu.context.physical, &asked, &mut able);
    };
    let features = able.external_memory_properties.external_memory_features;
    if !features.contains(vk::ExternalMemoryFeatureFlags::IMPORTABLE) {
        return no("vkGetPhysicalDeviceExternalBufferProperties", vk::Result::ERROR_INVALID_EXTERNAL_HANDLE);
    }
    let dedicated = features.contains(vk::ExternalMemoryFeatureFlags::DEDICATED_ONLY);

    let mut external = vk::ExternalMemoryBufferCreateInfo::default().handle_types(EXTERNAL);
    let info = vk::BufferCreateInfo::default().size(part.len).usage(usage).push_next(&mut external);
    let buffer = OwnedBuffer::new(gpu, &info, label).map_err(refused("vkCreateBuffer"))?;
    let needs = buffer.requirements();
    let total = part.buffer.size();
    let fits = part.offset.is_multiple_of(needs.alignment) && part.offset.saturating_add(needs.size) <= total;
    if !fits || (dedicated && part.offset != 0) {
        // Its length as a buffer may be more than the part has: some drivers want room behind it.
        return no("vkGetBufferMemoryRequirements", vk::Result::ERROR_INVALID_EXTERNAL_HANDLE);
    }

    let alone = dedicated.then(|| (vk::MemoryDedicatedAllocateInfo::default().buffer(buffer.raw), needs.size));
    let (memory, kind) = import_memory(gpu, range, &part.buffer, needs.memory_type_bits, alone, label)?;
    // SAFETY: the buffer is new and unbound, fits by size, alignment and type (checked above), both were made for the same handle type, and the
    // memory is dropped after the buffer.
    unsafe { buffer.bind(memory.raw, part.offset) }.map_err(refused("vkBindBufferMemory"))?;
    let block = Block::of_dmabuf(memory, kind, EXTERNAL, range);
    Ok(ImportPiece::of_dmabuf(buffer, block, part.clone(), access == Access::ReadWrite))
}

/// Imports a whole buffer as memory of one of the types `allowed`, and says of which. `alone` is what it is for, and how many bytes that needs, if
/// nothing else may lie in it.
fn import_memory(
    gpu: &Arc<Gpu>,
    range: HostRange,
    buffer: &DmaBuf,
    allowed: u32,
    alone: Option<(vk::MemoryDedicatedAllocateInfo<'_>, u64)>,
    label: &str,
) -> Result<(OwnedMemory, u32), NotImported> {
    let refused = |call| NotImported::refused(gpu, call);
    let no = |call, code| Err(refused(call)(code));
    let Some(external_fd) = &gpu.dmabuf else {
        return no("VK_EXT_external_memory_dma_buf", vk::Result::ERROR_EXTENSION_NOT_PRESENT);
    };
    let mine = buffer.duplicate().map_err(|_| NotImported::Stop(no_descriptor(range)))?;
    let mut told = vk::MemoryFdPropertiesKHR::default();
    // SAFETY: the device is live and has the command; `mine` is an open descriptor, which this call only looks at.
    let asked = unsafe { external_fd.get_memory_fd_properties(EXTERNAL, mine.as_raw_fd(), &mut told) };
    asked.map_err(|code| gpu.saw(code)).map_err(refused("vkGetMemoryFdPropertiesKHR"))?;
    let allowed = told.memory_type_bits & allowed;
    if allowed == 0 {
        return no("choosing a memory type for a dma-buf", vk::Result::ERROR_INVALID_EXTERNAL_HANDLE);
    }
    let kind = allowed.trailing_zeros();
    // What is alone in its memory has exactly the memory that it needs (VUID-VkMemoryDedicatedAllocateInfo-buffer-02965, -image-02964).
    let size = alone.map_or(buffer.size(), |(_, needed)| needed);
    let share = Share::take(gpu, range, gpu.memory.memory_types[kind as usize].heap_index, size);
    let share = share.map_err(NotImported::Stop)?;

    let fd = mine.into_raw_fd();
    let mut from = vk::ImportMemoryFdInfoKHR::default().handle_type(EXTERNAL).fd(fd);
    let mut only = alone.map(|(only, _)| only);
    let mut flags = vk::MemoryAllocateFlagsInfo::default().flags(vk::MemoryAllocateFlags::DEVICE_ADDRESS);
    let mut info = vk::MemoryAllocateInfo::default().allocation_size(size).memory_type_index(kind).push_next(&mut from);
    if let Some(only) = &mut only {
        info = info.push_next(only);
    }
    if gpu.context.buffer_device_address {
        info = info.push_next(&mut flags);
    }
    // SAFETY: `fd` is an open dma-buf (or what this driver takes for one) of at least `size` bytes by the kernel's word; the driver owns it if it says yes.
    let memory = unsafe { OwnedMemory::new(share, &info, label) };
    let memory = memory.inspect_err(|_| {
        // SAFETY: the driver has refused, so the descriptor is still ours, and nobody else knows it.
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
    });
    Ok((memory.map_err(refused("vkAllocateMemory"))?, kind))
}

fn no_descriptor(range: HostRange) -> DeviceError {
    DeviceError::Budget { range, what: "descriptors (ulimit -n)", needed: 1, available: 0 }
}

impl VulkanDevice {
    /// The import of an object that was registered for a dma-buf.
    pub(crate) fn import_registered(&self, request: &Request<'_>, part: &DmaBufPart) -> Result<Import, DeviceError> {
        match import_part(&self.gpu, request.range, part, request.access, request.label) {
            Ok(piece) => Ok(imported(Path::DmaBuf, Handful::one(piece))),
            Err(NotImported::Stop(error)) => Err(error),
            Err(NotImported::Refused { call, code }) => Err(self.gpu.failed(call, request.range, code)),
        }
    }

    /// The import of shared memory by way of a dma-buf made of it now: the pages that are in the file now, so one that is made anew after every
    /// invalidation.
    pub(crate) fn import_shared(&self, request: &Request<'_>, run: Run) -> Result<Import, NotImported> {
        let refused = |call| NotImported::Refused { call, code: vk::Result::ERROR_INVALID_EXTERNAL_HANDLE };
        let first = request.mappings.first().ok_or(refused("finding the mappings"))?;
        let file = memory_file_of(first).ok_or(refused("finding a descriptor of the memory file"))?;
        let part = MemoryPart { file: file.as_fd(), bytes: run.offset..run.offset + run.len as u64 };
        let made = Udmabuf::open().and_then(|device| device.export(&[part]));
        let buffer = made.map_err(|_| refused("/dev/udmabuf"))?;
        let part = DmaBufPart { offset: 0, len: buffer.size(), buffer };
        let piece = import_part(&self.gpu, request.range, &part, request.access, request.label)?;
        Ok(imported(Path::DmaBuf, Handful::one(piece)))
    }

    /// Whether shared memory reaches this device as a dma-buf, found out by doing it; `Err` has the step that failed. What a report shows.
    ///
    /// # Errors
    /// [`MirrorReason`] with the driver's code, or with `VK_ERROR_INVALID_EXTERNAL_HANDLE` where there is no udmabuf.
    pub fn dmabuf_trial(&self) -> Result<(), MirrorReason> {
        *self.dmabuf_trial.get_or_init(|| {
            let no = |code: vk::Result| MirrorReason::Refused(code.as_raw());
            if self.gpu.dmabuf.is_none() {
                return Err(MirrorReason::Unsupported);
            }
            let handle = no(vk::Result::ERROR_INVALID_EXTERNAL_HANDLE);
            let kind = pinfold_core::HostBufferKind::Exportable;
            let sample = pinfold_core::HostBuffer::new(1, kind, pinfold_core::HugePages::No).map_err(|_| handle)?;
            let buffer = sample.export_dmabuf(0..sample.size()).map_err(|_| handle)?;
            let part = DmaBufPart { offset: 0, len: buffer.size(), buffer };
            match import_part(&self.gpu, sample.range(), &part, Access::ReadWrite, "trial import of a dma-buf") {
                Ok(_) => Ok(()),
                Err(NotImported::Refused { code, .. }) => Err(no(code)),
                Err(NotImported::Stop(_)) => Err(handle),
            }
        })
    }
}

/// The queue family that stands for everybody outside this Vulkan device, if the device was made with `VK_EXT_queue_family_foreign`; else the one
/// for other devices of the same driver.
#[must_use]
pub fn foreign_family(extensions: &[&std::ffi::CStr]) -> u32 {
    if extensions.contains(&ash::ext::queue_family_foreign::NAME) {
        vk::QUEUE_FAMILY_FOREIGN_EXT
    } else {
        vk::QUEUE_FAMILY_EXTERNAL
    }
}

/// The barrier at the beginning of work that uses a dma-buf which somebody outside this device has used: takes it over from `foreign`
/// ([`foreign_family`]) to the queue family `ours`. One for each of the import's [`chunks`](Import::chunks), as there is only one.
pub fn from_foreign(
    import: &Import,
    foreign: u32,
    ours: u32,
    then: vk::AccessFlags,
) -> vk::BufferMemoryBarrier<'static> {
    barrier(import).src_queue_family_index(foreign).dst_queue_family_index(ours).dst_access_mask(then)
}

/// The barrier at the end of such work: gives it back. `before` is what the work did.
pub fn to_foreign(
    import: &Import,
    foreign: u32,
    ours: u32,
    before: vk::AccessFlags,
) -> vk::BufferMemoryBarrier<'static> {
    barrier(import).src_queue_family_index(ours).dst_queue_family_index(foreign).src_access_mask(before)
}

fn barrier(import: &Import) -> vk::BufferMemoryBarrier<'static> {
    vk::BufferMemoryBarrier::default().buffer(import.buffer).offset(import.offset).size(import.size)
}

impl crate::Manager {
    /// Signals `timeline` on the host when the work that drivers know of on a dma-buf is over (for a read: what writes), so that a submit which waits
    /// for that value is ordered behind it: implicit synchronisation as one of our timelines. Waits for it on the calling thread, at most for
    /// `limit`, and returns false without signalling when that has passed. Works on every driver; one that takes sync_files
    /// itself can be given [`DmaBuf::export_sync_file`].
    ///
    /// The other way round, work of this device becomes a fence of the dma-buf through
    /// [`DmaBuf::import_sync_file`], of a semaphore that was exported as `SYNC_FD`; where the driver exports none (lavapipe and SwiftShader don't),
    /// the work is waited for ([`Pending::wait`](crate::Pending::wait)) before the buffer is passed on.
    ///
    /// # Errors
    /// [`crate::Error::DmaBuf`] if the buffer can't be waited for, [`crate::Error::Device`] if the semaphore can't be signalled.
    ///
    /// # Safety
    /// The timeline's semaphore is a live timeline semaphore of this manager's device, and its value is higher than every other that is, or will be
    /// before this is, signalled on it.
    pub unsafe fn signal_when_ready(
        &self,
        buffer: &DmaBuf,
        access: CpuAccess,
        timeline: crate::Timeline,
        limit: Duration,
    ) -> Result<bool, crate::Error> {
        if buffer.sort() == BufferSort::DmaBuf && !buffer.wait(access, limit)? {
            return Ok(false);
        }
        // SAFETY: the contract of this function is the one asked for.
        unsafe { self.device().gpu.signal(timeline.semaphore, timeline.value) }
            .map_err(|code| DeviceError::Failed {
                call: "vkSignalSemaphore",
                range: HostRange::new(0, pinfold_core::page_size()).expect("the first page"),
                code: format!("{code:?}"),
                raw: code.as_raw(),
            })
            .map_err(crate::Error::from)?;
        Ok(true)
    }
}
