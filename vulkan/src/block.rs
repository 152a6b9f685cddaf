//! Imported memory, shared by the objects that lie over it.
//!
//! **Problem.** An import is an allocation of the device, and devices allow some thousands. Objects overlap, lie side by side, and come by the ten
//! thousand.
//!
//! **Law.** An object is put on a block that exists only if the pages under the object are those the block was made of. No block outlives its
//! last object and the last image in it.
//!
//! **Protocol.** A block is a target of the address space like an object: over the same addresses, put there *before* they are watched, and they are
//! watched before they are imported. So every change under it that an object would hear of marks the block as stale, and nobody new is put on
//! it; who is on it and was not hit stays. Reading the mark is ordered by the object's own acquisition: a change that came before the object's
//! word was noted has been told by then, to the block as well; one that comes later moves the word, and the object isn't published. Where it
//! takes more than that to know what is there, blocks are not shared: where the watch is less than complete; for an object whose pages were
//! discarded, as a block may have been made before they went, after the discard was told; and for objects that were registered after the block
//! was made, and so were not told of such a discard. (Whatever moves the object's word next makes the block stale, too.)
//!
//! A small object's block takes in its neighbours: the registered objects of the same manager that join up with it inside one window of
//! [`WINDOW`] bytes and lie over the same kind of mapping. A part of an object is put on its whole's block, or has one of its own. Nothing is taken that the program hasn't registered: objects with gaps
//! between them take an allocation each, and beyond `maxMemoryAllocationCount` the idle ones make room or the acquire says so.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use ash::vk;
use pinfold_core::{Coverage, DeviceError, Request};
use pinfold_invalidate::{Change, HostRange, Mapping, Shards, Space, Target, Untracked, mappings};

use crate::alias::Alias;
use crate::budget::Share;
use crate::gpu::{Gpu, OwnedMemory};
use crate::import::{EXTERNAL, NotImported, memory_type};

/// Neighbours share a block if they lie in one aligned window of this size, that of a huge page.
const WINDOW: usize = 2 << 20;
/// How many blocks that begin before an object are looked at.
const LOOKED_AT: usize = 16;
/// Block ids have this bit, and objects' ids don't.
const BLOCK: u64 = 1 << 63;

/// The blocks of one device.
pub(crate) struct Blocks {
    pub(crate) space: Arc<Space>,
    /// Blocks that may be shared, by the first address of the program that they show. A leaf lock.
    alive: Mutex<BTreeMap<(usize, u64), Weak<Block>>>,
    /// Held while a small object finds or makes its block, so that neighbours that come at once don't make one each. By windows; taken before any
    /// other lock, and never by anyone whom a mutator waits for.
    turns: [Mutex<()>; 16],
}

static NEXT: AtomicU64 = AtomicU64::new(1);

/// Imported memory.
pub(crate) struct Block {
    // Dropped in this order: the device's memory first, then what is under it.
    memory: OwnedMemory,
    /// The addresses that were imported: the program's own, or an alias of them.
    imported: HostRange,
    /// The program's addresses.
    program: HostRange,
    /// The index of its memory type.
    kind: u32,
    /// What it was imported from.
    handle: vk::ExternalMemoryHandleTypeFlags,
    alias: Option<Arc<Alias>>,
    _untracked: Option<Untracked>,
    listed: Option<Listed>,
}

/// The place of a block among the targets of the address space, given up when dropped.
pub(crate) struct Listed {
    blocks: Arc<Blocks>,
    program: HostRange,
    id: u64,
    /// The number of the newest object that was there when it was made.
    newest: u64,
    news: Arc<News>,
}

/// Who is around an object. Those who come later are not on the block that is made then.
pub(crate) struct Around {
    /// The object with its neighbours in its window.
    pub(crate) wide: HostRange,
    /// The number of the newest in the window.
    newest: u64,
    /// The number of the newest over the addresses that the object needs, if it is not the only one.
    pub(crate) company: Option<u64>,
}

/// What a block is told.
#[derive(Default)]
struct News {
    stale: AtomicBool,
}

impl Target for News {
    fn invalidated(&self, _: &Change) {
        // Release: pairs with the Acquire in `is_stale`. The gates order it for those who matter.
        self.stale.store(true, Ordering::Release);
    }

    fn settled(self: Arc<Self>) {}

    fn shards(&self) -> Shards {
        Shards::NONE // uses are counted by the objects
    }
}

impl Blocks {
    pub(crate) fn new(space: &Arc<Space>) -> Arc<Self> {
        Arc::new(Self { space: Arc::clone(space), alive: Mutex::default(), turns: Default::default() })
    }

    /// Whether blocks of this request may be shared at all.
    pub(crate) fn shares(request: &Request<'_>) -> bool {
        request.group != 0 && request.coverage == Some(Coverage::Watched)
    }

    /// The turn of a small object among those of its window.
    pub(crate) fn turn(&self, object: HostRange) -> Option<MutexGuard<'_, ()>> {
        let turn = &self.turns[object.start() / WINDOW % self.turns.len()];
        (object.len() <= WINDOW).then(|| turn.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A block that shows what is at these addresses of the program now, and was imported from `imported`.
    pub(crate) fn find(&self, request: &Request<'_>, program: HostRange, imported: HostRange) -> Option<Arc<Block>> {
        // Held beyond the lock, which the last owner of a block takes: that may be us by now.
        let begin_before: Vec<_> = {
            let alive = self.alive();
            let blocks = alive.range(..=(program.start(), u64::MAX)).rev().take(LOOKED_AT);
            blocks.filter_map(|(_, block)| block.upgrade()).collect()
        };
        let fits = |block: &Arc<Block>| {
            block.program.covers(program)
                && block.imported.start().wrapping_sub(block.program.start())
                    == imported.start().wrapping_sub(program.start())
                && block.listed.as_ref().is_some_and(|listed| request.id <= listed.newest && !listed.news.is_stale())
        };
        begin_before.into_iter().find(fits)
    }

    /// The objects of the request's manager over these addresses of the program, and in the request's window.
    pub(crate) fn around(&self, request: &Request<'_>, program: HostRange) -> Around {
        let first = request.range.start() / WINDOW * WINDOW;
        // A part takes no neighbours along: its whole is the one that is not to be taken.
        let window = HostRange::new(first, WINDOW).ok().filter(|window| window.covers(request.range) && !request.part);
        // Both have the object in them, so they are one piece.
        let (start, end) = window.map_or((program.start(), program.end()), |window| {
            (window.start().min(program.start()), window.end().max(program.end()))
        });
        let all = HostRange::new(start, end - start).expect("two ranges that overlap are one");
        let mut around = Around { wide: request.range, newest: 0, company: None };
        let (mut ranges, mut objects, mut newest) = (Vec::new(), 0, 0);
        self.space.visit(all, |range, id, target| {
            if target.group() != request.group {
                return;
            }
            if window.is_some_and(|window| window.covers(range)) {
                around.newest = id.max(around.newest);
                if range != request.range {
                    ranges.push(range);
                }
            }
            if range.overlaps(program) {
                objects += 1;
                newest = id.max(newest);
            }
        });
        around.company = (objects > 1).then_some(newest);
        if !ranges.is_empty() {
            around.wide = joined(request.range, ranges);
        }
        around
    }

    /// Takes a place over these addresses of the program.
    pub(crate) fn list(self: &Arc<Self>, program: HostRange, newest: u64) -> Listed {
        let id = BLOCK | NEXT.fetch_add(1, Ordering::Relaxed);
        let news = Arc::<News>::default();
        self.space.insert(program, id, Arc::clone(&news) as Arc<dyn Target>);
        Listed { blocks: Arc::clone(self), program, id, newest, news }
    }

    /// The place of a block of an object and its neighbours, which are watched then and ready to be imported; `None` if the object stands alone.
    pub(crate) fn neighbourhood(self: &Arc<Self>, request: &Request<'_>, around: &Around) -> Option<Listed> {
        let wide = around.wide;
        if wide == request.range {
            return None;
        }
        let before = mappings(wide).ok().filter(|mappings| are_alike(mappings, &request.mappings[0]))?;
        let listed = self.list(wide, around.newest);
        request.populate(wide, &before).ok()?;
        let watched = self.space.watch_as(wide, &before).ok()?;
        let whole = watched.coverage == Coverage::Watched && are_alike(&watched.mappings, &request.mappings[0]);
        whole.then_some(listed)
    }

    fn alive(&self) -> MutexGuard<'_, BTreeMap<(usize, u64), Weak<Block>>> {
        // A panic under the lock can only be a failed allocation of the map, which leaves the map as it was.
        self.alive.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `object` with those of `ranges` that join up with it.
fn joined(object: HostRange, mut ranges: Vec<HostRange>) -> HostRange {
    ranges.sort_unstable();
    let (mut start, mut end) = (object.start(), object.end());
    for range in &ranges {
        if range.start() <= end && range.end() > end {
            end = range.end();
        }
    }
    // From the right: whoever reaches `start` may begin anywhere before it.
    ranges.sort_unstable_by_key(|range| std::cmp::Reverse(range.end()));
    for range in &ranges {
        if range.end() >= start && range.start() < start {
            start = range.start();
        }
    }
    HostRange::new(start, end - start).expect("bounds of ranges")
}

/// Whether all of these mappings are as the first one of an object is, so that what was decided for the object holds for them.
fn are_alike(mappings: &[Mapping], object: &Mapping) -> bool {
    let offset = |at: usize| object.offset.wrapping_add((at as u64).wrapping_sub(object.range.start() as u64));
    mappings.iter().all(|mapping| {
        mapping.protection == object.protection
            && mapping.shared == object.shared
            && mapping.backing == object.backing
            && mapping.file == object.file
            && (mapping.file.is_none() || mapping.offset == offset(mapping.range.start()))
    })
}

impl Block {
    /// Imports memory: `imported`, which shows what the program has at `program`. `listed` makes it one that can be shared.
    ///
    /// # Errors
    /// [`NotImported`]; nothing is held then.
    pub(crate) fn new(
        gpu: &Arc<Gpu>,
        blocks: Option<&Arc<Blocks>>,
        request: &Request<'_>,
        (program, imported): (HostRange, HostRange),
        alias: Option<&Arc<Alias>>,
        buffer_bits: u32,
        listed: Option<Listed>,
    ) -> Result<Arc<Self>, NotImported> {
        let Some(host_memory) = &gpu.host_memory else {
            let code = vk::Result::ERROR_EXTENSION_NOT_PRESENT;
            return Err(NotImported::Refused { call: "VK_EXT_external_memory_host", code });
        };
        let refused = |call| NotImported::refused(gpu, call);
        let pointer = std::ptr::with_exposed_provenance_mut(imported.start());
        let mut pointed = vk::MemoryHostPointerPropertiesEXT::default();
        let query = host_memory.fp().get_memory_host_pointer_properties_ext;
        // SAFETY: the device is live and has the command; `pointer` is aligned as it asks, in mapped memory that passed admission.
        let answer = unsafe { query(gpu.device().handle(), EXTERNAL, pointer, &raw mut pointed) };
        answer.result().map_err(|code| gpu.saw(code)).map_err(refused("vkGetMemoryHostPointerPropertiesEXT"))?;
        let Some(kind) = memory_type(&gpu.memory, pointed.memory_type_bits, buffer_bits) else {
            let code = vk::Result::ERROR_INVALID_EXTERNAL_HANDLE;
            return Err(NotImported::Refused { call: "choosing a host-coherent memory type", code });
        };
        let untracked = match blocks {
            Some(blocks) => Some(Untracked::new(&blocks.space, program).map_err(|_| {
                let why = "its pages are write-protected for a mirror, and can't be freed of that while memory changes hands; acquire again";
                NotImported::Stop(DeviceError::Fault { range: program, why, errno: libc::EAGAIN })
            })?),
            None => None,
        };

        let size = imported.len() as u64;
        let heap = gpu.memory.memory_types[kind as usize].heap_index;
        let share = Share::take(gpu, request.range, heap, size).map_err(NotImported::Stop)?;
        let mut host = vk::ImportMemoryHostPointerInfoEXT::default().handle_type(EXTERNAL).host_pointer(pointer);
        let mut flags = vk::MemoryAllocateFlagsInfo::default().flags(vk::MemoryAllocateFlags::DEVICE_ADDRESS);
        let mut info =
            vk::MemoryAllocateInfo::default().allocation_size(size).memory_type_index(kind).push_next(&mut host);
        if gpu.context.buffer_device_address {
            info = info.push_next(&mut flags);
        }
        // SAFETY: pointer and size are multiples of the alignment that the device asks for, inside mapped memory that passed admission; who
        // registered the range has promised that it stays mapped while the import lives or that every change of it is seen in time.
        let memory = unsafe { OwnedMemory::new(share, &info, request.label) }.map_err(refused("vkAllocateMemory"))?;
        let block = Arc::new(Self {
            memory,
            imported,
            program,
            kind,
            handle: EXTERNAL,
            alias: alias.cloned(),
            _untracked: untracked,
            listed,
        });
        if let Some(listed) = &block.listed {
            listed.blocks.alive().insert((program.start(), listed.id), Arc::downgrade(&block));
        }
        Ok(block)
    }

    /// Memory that was imported from a dma-buf, for the object whose range is `range`. Nobody else is put on it.
    pub(crate) fn of_dmabuf(
        memory: OwnedMemory,
        kind: u32,
        handle: vk::ExternalMemoryHandleTypeFlags,
        range: HostRange,
    ) -> Arc<Self> {
        let (imported, program) = (range, range);
        Arc::new(Self { memory, imported, program, kind, handle, alias: None, _untracked: None, listed: None })
    }

    pub(crate) fn memory(&self) -> vk::DeviceMemory {
        self.memory.raw
    }

    /// The program's addresses that it shows.
    pub(crate) fn program(&self) -> HostRange {
        self.program
    }

    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        self.memory.gpu()
    }

    /// The index of its memory type.
    pub(crate) fn kind(&self) -> u32 {
        self.kind
    }

    /// What images and buffers on it must be made for.
    pub(crate) fn handle(&self) -> vk::ExternalMemoryHandleTypeFlags {
        self.handle
    }

    /// Whether a buffer with these bits can be put on it.
    pub(crate) fn suits(&self, buffer_bits: u32) -> bool {
        buffer_bits & (1 << self.kind) != 0
    }

    /// Where an address that was imported lies in the memory.
    pub(crate) fn offset_of(&self, address: usize) -> u64 {
        (address - self.imported.start()) as u64
    }

    pub(crate) fn len(&self) -> u64 {
        self.imported.len() as u64
    }

    /// The program's addresses, if an alias was imported in their place.
    pub(crate) fn alias_of(&self) -> Option<HostRange> {
        self.alias.as_ref().map(|_| self.program)
    }
}

impl News {
    fn is_stale(&self) -> bool {
        self.stale.load(Ordering::Acquire)
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.blocks.alive().remove(&(self.program.start(), self.id));
        self.blocks.space.remove(self.program, self.id);
    }
}

#[cfg(test)]
mod tests {
    use pinfold_invalidate::page_size;

    use super::*;

    #[test]
    fn an_object_joins_with_what_touches_it_and_nothing_behind_a_gap() {
        let range = |first: usize, pages: usize| HostRange::new(first * page_size(), pages * page_size()).unwrap();
        let mut seed = 3_u64;
        let mut below = |end: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as usize % end
        };
        for _ in 0..2000 {
            let ranges: Vec<_> = (0..1 + below(8)).map(|_| (1 + below(30), 1 + below(4))).collect();
            let object = ranges[0];
            let taken = |page: usize| ranges.iter().any(|&(first, pages)| (first..first + pages).contains(&page));
            let (mut start, mut end) = (object.0, object.0 + object.1);
            while taken(start - 1) {
                start -= 1;
            }
            while taken(end) {
                end += 1;
            }
            let all = ranges.iter().map(|&(first, pages)| range(first, pages)).collect();
            assert_eq!(joined(range(object.0, object.1), all), range(start, end - start));
        }
    }
}
