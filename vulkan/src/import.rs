//! An object's bytes as Vulkan buffers, and how the program's own pages become some.
//!
//! Alignment is the driver's, not the page's: a range is rounded out to `minImportedHostPointerAlignment`, and the buffer is bound at the
//! remainder, so that it is exactly the object. Rounding never leaves the mappings of the range, and where the device writes it doesn't
//! happen at all, because the pages next door may have another owner.
//!
//! Large ranges become several chunks, each with its own memory object and buffer, because drivers refuse or truncate large imports.
//! Whatever a driver refuses, with whatever code, means one thing: this range becomes a mirror instead.

use std::fmt;
use std::sync::Arc;

use ash::vk;
use pinfold_core::dmabuf::DmaBufPart;
use pinfold_core::{Access, DeviceError, Path, Request};
use pinfold_invalidate::{Handful, HostRange, Protection};

use crate::Timeline;
use crate::alias::Alias;
use crate::block::{Block, Blocks, Listed};
use crate::gpu::{Gpu, OwnedBuffer};
use crate::mirror::Mirror;

/// An object's bytes on the device. A lease shows it; it lives until the last lease and the last unfinished work that name it are gone.
///
/// The buffers of a writable mapping can be used for everything but images: storage, uniform, both texel kinds, vertex, index, indirect,
/// transfer in both directions, and by address if the device was made for that. Those of a read-only mapping can't be used for what
/// writes: storage, storage texels and transfer destination. A mirror has the usages that an import of the same mapping would have.
///
/// Memory is always host-coherent. A host write before the submit needs no barrier; before the host reads what the device wrote, the work
/// needs a barrier to `HOST_READ` at its end.
pub struct Import {
    /// The buffer that holds the object, or its first chunk.
    pub buffer: vk::Buffer,
    /// Where the object's bytes start in `buffer`.
    pub offset: vk::DeviceSize,
    /// How many of the object's bytes are in `buffer` from there on: all, unless there are several [`chunks`](Self::chunks).
    pub size: vk::DeviceSize,
    chunks: Handful<Chunk>,
    path: Path,
    store: Store,
}

/// A part of an object in a buffer of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Where the part starts inside the object, in bytes.
    pub at: u64,
    /// The buffer that holds it.
    pub buffer: vk::Buffer,
    /// Where it starts in the buffer, in bytes.
    pub offset: vk::DeviceSize,
    /// How many bytes it has.
    pub size: vk::DeviceSize,
}

/// What keeps the buffers alive.
pub(crate) enum Store {
    Imported(Handful<ImportPiece>),
    Mirrored(Box<Mirror>),
}

impl Import {
    /// The parts of the object in address order, without a gap: one, unless the object is larger than about 1 GiB (precisely
    /// [`Capabilities::chunk_size`](crate::Capabilities::chunk_size)).
    #[must_use]
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// How the bytes reach the device.
    #[must_use]
    pub fn path(&self) -> Path {
        self.path
    }

    /// What work that reads it waits for, where uploads are [ordered](crate::Uploads::ordered): a timeline semaphore of the manager's, which reaches
    /// this value when the bytes that the acquire asked for have arrived. `None` where they are there already.
    ///
    /// The semaphore lives as long as this import.
    #[must_use]
    pub fn uploaded(&self) -> Option<Timeline> {
        match &self.store {
            Store::Imported(_) => None,
            Store::Mirrored(mirror) => mirror.uploaded(),
        }
    }

    /// Where the program has the first page of it, if it is an import of an alias.
    pub(crate) fn alias_of(&self) -> Option<HostRange> {
        match &self.store {
            Store::Imported(pieces) => pieces.first()?.block.alias_of(),
            Store::Mirrored(_) => None,
        }
    }

    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    /// The import whose chunks hold `sizes` bytes each, every one at the start of its buffer.
    pub(crate) fn new(path: Path, pieces: impl Iterator<Item = (vk::Buffer, u64)>, store: Store) -> Self {
        let mut at = 0;
        let chunks: Handful<Chunk> = pieces
            .map(|(buffer, size)| {
                let chunk = Chunk { at, buffer, offset: 0, size };
                at += size;
                chunk
            })
            .collect();
        let Chunk { buffer, offset, size, .. } = *chunks.first().expect("a range is never empty, so it has a chunk");
        Self { buffer, offset, size, chunks, path, store }
    }
}

impl fmt::Debug for Import {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Import").field("chunks", &self.chunks).field("path", &self.path).finish_non_exhaustive()
    }
}

/// One chunk's buffer and the imported memory under it. Dropped in this order.
pub(crate) struct ImportPiece {
    buffer: OwnedBuffer,
    pub(crate) block: Arc<Block>,
    /// Where it starts in the block's memory, in bytes.
    pub(crate) start: u64,
    size: u64,
    /// Whether the program may write there.
    pub(crate) writable: bool,
    /// What it was imported from, if that is a dma-buf.
    pub(crate) dmabuf: Option<DmaBufPart>,
}

impl ImportPiece {
    /// A buffer that is bound to this block of a dma-buf, where the part starts.
    pub(crate) fn of_dmabuf(buffer: OwnedBuffer, block: Arc<Block>, part: DmaBufPart, writable: bool) -> Self {
        Self { buffer, block, start: part.offset, size: part.len, writable, dmabuf: Some(part) }
    }
}

/// Why a range wasn't imported.
#[derive(Debug)]
pub(crate) enum NotImported {
    /// The driver, or a rule of Vulkan that it relies on, said no: the range can still be mirrored.
    Refused { call: &'static str, code: vk::Result },
    /// Nothing else will do either: the budget is used up, or the device is lost.
    Stop(DeviceError),
}

impl NotImported {
    pub(crate) fn refused(gpu: &Gpu, call: &'static str) -> impl Fn(vk::Result) -> Self {
        let lost = gpu.is_lost();
        move |code| {
            if lost || code == vk::Result::ERROR_DEVICE_LOST {
                Self::Stop(DeviceError::Lost)
            } else {
                Self::Refused { call, code }
            }
        }
    }
}

pub(crate) const EXTERNAL: vk::ExternalMemoryHandleTypeFlags = vk::ExternalMemoryHandleTypeFlags::HOST_ALLOCATION_EXT;

/// The usages of buffers that nobody can write through.
const READING: vk::BufferUsageFlags = vk::BufferUsageFlags::from_raw(
    vk::BufferUsageFlags::TRANSFER_SRC.as_raw()
        | vk::BufferUsageFlags::UNIFORM_TEXEL_BUFFER.as_raw()
        | vk::BufferUsageFlags::UNIFORM_BUFFER.as_raw()
        | vk::BufferUsageFlags::INDEX_BUFFER.as_raw()
        | vk::BufferUsageFlags::VERTEX_BUFFER.as_raw()
        | vk::BufferUsageFlags::INDIRECT_BUFFER.as_raw(),
);

/// The usages that can write.
const WRITING: vk::BufferUsageFlags = vk::BufferUsageFlags::from_raw(
    vk::BufferUsageFlags::TRANSFER_DST.as_raw()
        | vk::BufferUsageFlags::STORAGE_TEXEL_BUFFER.as_raw()
        | vk::BufferUsageFlags::STORAGE_BUFFER.as_raw(),
);

/// The usages of buffers over mappings with these protections. A CPU driver that writes to a read-only mapping kills the process, hence the
/// split.
pub(crate) fn usage(gpu: &Gpu, protections: impl IntoIterator<Item = Protection>) -> vk::BufferUsageFlags {
    if protections.into_iter().all(|protection| protection.write) { all_usages(gpu) } else { read_usages(gpu) }
}

/// The usages of buffers over memory that may be written.
pub(crate) fn all_usages(gpu: &Gpu) -> vk::BufferUsageFlags {
    read_usages(gpu) | WRITING
}

/// The usages of buffers over memory that may only be read.
pub(crate) fn read_usages(gpu: &Gpu) -> vk::BufferUsageFlags {
    let address = if gpu.context.buffer_device_address {
        vk::BufferUsageFlags::SHADER_DEVICE_ADDRESS
    } else {
        vk::BufferUsageFlags::empty()
    };
    READING | address
}

/// Imports the request's pages, through its own mapping or through `alias` (and the part of it that shows the request's pages). With `blocks`,
/// memory that is imported already is used again.
///
/// # Errors
/// [`NotImported`]; nothing is held then.
pub(crate) fn import(
    gpu: &Arc<Gpu>,
    blocks: Option<&Arc<Blocks>>,
    request: &Request<'_>,
    alias: Option<(&Arc<Alias>, HostRange)>,
    usage: vk::BufferUsageFlags,
) -> Result<Handful<ImportPiece>, NotImported> {
    // An alias has no neighbours that rounding could reach: it is only made where none is needed.
    let (range, limits) = match alias {
        Some((_, part)) => (part, (part.start(), part.end())),
        None => (request.range, room(request)),
    };
    let Some(cuts) = cut(range, limits, gpu.caps.import_alignment, gpu.caps.chunk_size) else {
        let code = vk::Result::ERROR_INVALID_EXTERNAL_HANDLE;
        return Err(NotImported::Refused { call: "rounding out to minImportedHostPointerAlignment", code });
    };
    let ground = Ground { gpu, blocks, request, alias, usage };
    cuts.map(|cut| ground.piece(&cut)).collect()
}

/// The chunks of an import.
pub(crate) fn imported(path: Path, pieces: Handful<ImportPiece>) -> Import {
    let chunks: Handful<_> = pieces.iter().map(|piece| (piece.buffer.raw, piece.size)).collect();
    Import::new(path, chunks.iter().copied(), Store::Imported(pieces))
}

/// How far the request's range may be rounded out: not at all if the device writes, else to the ends of the outermost mappings.
fn room(request: &Request<'_>) -> (usize, usize) {
    match (request.access, request.mappings) {
        (Access::Read, [first, .., last]) => (first.whole.start(), last.whole.end()),
        (Access::Read, [only]) => (only.whole.start(), only.whole.end()),
        _ => (request.range.start(), request.range.end()),
    }
}

/// One piece of memory to import, and the part of it that is the object's.
#[derive(Debug, PartialEq, Eq)]
struct Cut {
    memory: (usize, usize),
    object: (usize, usize),
}

/// `range` in pieces of at most `chunk` bytes whose bounds are multiples of `alignment`; inner bounds are multiples of `chunk`'s own
/// alignment too, as far as it is a power of two. `None` if that needs bytes outside `room`.
fn cut(range: HostRange, room: (usize, usize), alignment: u64, chunk: u64) -> Option<impl Iterator<Item = Cut>> {
    let (alignment, chunk) = (usize::try_from(alignment).ok()?, usize::try_from(chunk).ok()?);
    let start = range.start() / alignment * alignment;
    let end = range.end().checked_next_multiple_of(alignment)?;
    if start < room.0 || room.1 < end {
        return None;
    }
    let edge = 1 << chunk.trailing_zeros();
    let mut at = start;
    Some(std::iter::from_fn(move || {
        let next = ((at + chunk) / edge * edge).min(end);
        let cut = Cut { memory: (at, next), object: (at.max(range.start()), next.min(range.end())) };
        (std::mem::replace(&mut at, next) < end).then_some(cut)
    }))
}

/// What all pieces of one import have in common.
struct Ground<'a> {
    gpu: &'a Arc<Gpu>,
    blocks: Option<&'a Arc<Blocks>>,
    request: &'a Request<'a>,
    alias: Option<(&'a Arc<Alias>, HostRange)>,
    usage: vk::BufferUsageFlags,
}

impl Ground<'_> {
    /// A buffer on a block that exists, on one that it shares with its neighbours, or on one of its own.
    fn piece(&self, cut: &Cut) -> Result<ImportPiece, NotImported> {
        let buffer = self.buffer(cut)?;
        let needs = buffer.requirements();
        let imported = HostRange::new(cut.memory.0, cut.memory.1 - cut.memory.0).expect("whole pages of a mapping");
        let program = self.moved(imported, self.program_offset());
        let sharing = self.blocks.filter(|_| Blocks::shares(self.request) && !self.request.discarded);
        let _turn = sharing.and_then(|blocks| blocks.turn(self.request.range));
        let there = sharing.and_then(|blocks| blocks.find(self.request, program, imported));
        if let Some(block) = there.filter(|block| block.suits(needs.memory_type_bits)) {
            return self.put(buffer, block, cut);
        }
        let around = sharing.map(|blocks| (blocks, blocks.around(self.request, program)));
        if let Some((blocks, around)) = &around {
            let wide = around.wide;
            if let Some(listed) = blocks.neighbourhood(self.request, around).filter(|_| wide.covers(program)) {
                let through = self.moved(wide, self.program_offset().wrapping_neg());
                let within = self.alias.is_none_or(|(alias, _)| alias.range().covers(through));
                // What can't be had for all of them may still be had for one.
                let aligned =
                    (through.start() as u64 | through.len() as u64).is_multiple_of(self.gpu.caps.import_alignment);
                if within
                    && aligned
                    && let Ok(block) = self.block((wide, through), needs.memory_type_bits, Some(listed))
                    && block.suits(needs.memory_type_bits)
                {
                    return self.put(buffer, block, cut);
                }
            }
        }
        // Pages that were only rounded out into are not watched, so nobody else may be put on them.
        let whole = self.request.range.covers(program);
        let listed = around.filter(|_| whole).and_then(|(blocks, around)| Some(blocks.list(program, around.company?)));
        let block = self.block((program, imported), needs.memory_type_bits, listed)?;
        self.put(buffer, block, cut)
    }

    fn buffer(&self, cut: &Cut) -> Result<OwnedBuffer, NotImported> {
        let mut external = vk::ExternalMemoryBufferCreateInfo::default().handle_types(EXTERNAL);
        let size = (cut.object.1 - cut.object.0) as u64;
        let info = vk::BufferCreateInfo::default().size(size).usage(self.usage).push_next(&mut external);
        let refused = NotImported::refused(self.gpu, "vkCreateBuffer");
        OwnedBuffer::new(self.gpu, &self.gpu.shared(info), self.request.label).map_err(refused)
    }

    fn block(
        &self,
        place: (HostRange, HostRange),
        buffer_bits: u32,
        listed: Option<Listed>,
    ) -> Result<Arc<Block>, NotImported> {
        let alias = self.alias.map(|(alias, _)| alias);
        Block::new(self.gpu, self.blocks, self.request, place, alias, buffer_bits, listed)
    }

    /// Binds a new buffer to its place in a block.
    fn put(&self, buffer: OwnedBuffer, block: Arc<Block>, cut: &Cut) -> Result<ImportPiece, NotImported> {
        let (needs, offset) = (buffer.requirements(), block.offset_of(cut.object.0));
        if !offset.is_multiple_of(needs.alignment) || offset + needs.size > block.len() {
            let code = vk::Result::ERROR_INVALID_EXTERNAL_HANDLE;
            return Err(NotImported::Refused { call: "vkGetBufferMemoryRequirements", code });
        }
        // SAFETY: the buffer is new and unbound, fits by size and alignment (checked above), both were made for the same handle type, and the
        // memory is dropped after the buffer. A type outside the buffer's own bits is tried only where the two sets have nothing in common:
        // such drivers contradict themselves, and then their answer to the bind decides.
        unsafe { buffer.bind(block.memory(), offset) }.map_err(NotImported::refused(self.gpu, "vkBindBufferMemory"))?;
        let (size, writable) = ((cut.object.1 - cut.object.0) as u64, self.usage.contains(WRITING));
        Ok(ImportPiece { buffer, block, start: offset, size, writable, dmabuf: None })
    }

    /// What has to be added to an imported address to get the program's.
    fn program_offset(&self) -> usize {
        let imported = self.alias.map_or(self.request.range, |(_, part)| part);
        self.request.range.start().wrapping_sub(imported.start())
    }

    fn moved(&self, range: HostRange, by: usize) -> HostRange {
        HostRange::new(range.start().wrapping_add(by), range.len()).expect("the program and its alias are user space")
    }
}

/// The best memory type for an import: among those that pointer and buffer both allow, or, where the two sets have nothing in common, among
/// the pointer's. Host-coherent always, so that nobody has to flush; host-cached if possible, because the program reads this memory too.
pub(crate) fn memory_type(memory: &vk::PhysicalDeviceMemoryProperties, pointer: u32, buffer: u32) -> Option<u32> {
    let allowed = if pointer & buffer != 0 { pointer & buffer } else { pointer };
    let with = |flags| {
        let fits = |&kind: &u32| {
            allowed & (1 << kind) != 0 && memory.memory_types[kind as usize].property_flags.contains(flags)
        };
        (0..memory.memory_type_count).find(fits)
    };
    let coherent = vk::MemoryPropertyFlags::HOST_VISIBLE | vk::MemoryPropertyFlags::HOST_COHERENT;
    with(coherent | vk::MemoryPropertyFlags::HOST_CACHED).or_else(|| with(coherent))
}

#[cfg(test)]
mod tests {
    use pinfold_invalidate::page_size;

    use super::*;

    fn range(start: usize, pages: usize) -> HostRange {
        HostRange::new(start, pages * page_size()).unwrap()
    }

    #[test]
    fn cuts_are_aligned_cover_the_object_and_nothing_outside_the_room() {
        let page = page_size();
        for (first, pages, alignment, chunk) in
            [(16, 1, 1, 16), (17, 5, 4, 16), (15, 40, 4, 16), (16, 64, 1, 16), (31, 2, 16, 16), (3, 100, 2, 6)]
        {
            let range = range(first * page, pages);
            let cuts = cut(range, (0, usize::MAX), (alignment * page) as u64, (chunk * page) as u64);
            let cuts: Vec<_> = cuts.unwrap().collect();
            assert_eq!(cuts[0].object.0, range.start());
            assert_eq!(cuts.last().unwrap().object.1, range.end());
            for pair in cuts.windows(2) {
                assert_eq!((pair[0].memory.1, pair[0].object.1), (pair[1].memory.0, pair[1].object.0));
            }
            for Cut { memory, object } in cuts {
                assert!(memory.0 % (alignment * page) == 0 && memory.1 % (alignment * page) == 0, "{memory:x?}");
                assert!(
                    memory.1 - memory.0 <= chunk * page && memory.0 <= object.0 && object.1 <= memory.1,
                    "{memory:x?}"
                );
                assert!(
                    object.0 < object.1
                        && object.0 - memory.0 < alignment * page
                        && memory.1 - object.1 < alignment * page
                );
            }
        }
    }

    #[test]
    fn rounding_never_leaves_the_room() {
        let page = page_size();
        let alignment = 4 * page as u64;
        let range = range(5 * page, 2);
        assert!(cut(range, (5 * page, 8 * page), alignment, alignment).is_none());
        assert!(cut(range, (4 * page, 7 * page), alignment, alignment).is_none());
        assert_eq!(cut(range, (4 * page, 8 * page), alignment, alignment).unwrap().count(), 1);
    }

    #[test]
    fn the_room_is_the_mapping_for_readers_and_nothing_for_writers() {
        use pinfold_invalidate::{Backing, Mapping};
        let page = page_size();
        let (whole, inner) = (range(4 * page, 4), range(5 * page, 2));
        let protection = Protection { read: true, write: true, exec: false };
        let mappings = [Mapping {
            range: inner,
            whole,
            protection,
            shared: false,
            backing: Backing::Anonymous,
            file: None,
            offset: 0,
        }];
        let request = |access| Request::new(inner, access, &mappings);
        assert_eq!(room(&request(Access::Read)), (whole.start(), whole.end()));
        assert_eq!(room(&request(Access::ReadWrite)), (inner.start(), inner.end()));
    }

    #[test]
    fn memory_types_are_chosen_cached_and_coherent_and_from_the_pointer_if_the_buffer_disagrees() {
        use vk::MemoryPropertyFlags as F;
        let mut memory = vk::PhysicalDeviceMemoryProperties { memory_type_count: 4, ..Default::default() };
        let flags = [
            F::DEVICE_LOCAL,
            F::HOST_VISIBLE | F::HOST_COHERENT,
            F::HOST_VISIBLE | F::HOST_COHERENT | F::HOST_CACHED,
            F::HOST_VISIBLE | F::HOST_CACHED,
        ];
        for (kind, flags) in memory.memory_types.iter_mut().zip(flags) {
            kind.property_flags = flags;
        }
        assert_eq!(memory_type(&memory, 0b1111, 0b1111), Some(2));
        assert_eq!(memory_type(&memory, 0b1111, 0b0011), Some(1));
        assert_eq!(memory_type(&memory, 0b0110, 0b0001), Some(2)); // disjoint
        assert_eq!(memory_type(&memory, 0b0110, 0), Some(2));
        assert_eq!(memory_type(&memory, 0b1000, 0b1111), None); // not coherent
        assert_eq!(memory_type(&memory, 0, 0b1111), None);
    }
}
