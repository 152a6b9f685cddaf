//! Objects and dma-bufs: an object over one, and one made of an object.
//!
//! An object is identified by its range, and a dma-buf has no place in the address space: addresses are kept free for it. The other way round, an
//! object that is exported must be one whose changes are noticed, as the kernel's userptr objects have it: whoever gets the buffer can't know
//! that the program has promised to announce them.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use pinfold_invalidate::{Cause, Coverage, HostRange, Mapping, mappings, page_size};

use super::{DmaBuf, DmaBufError, MemoryPart, Udmabuf, memory_file_of};
use crate::object::Object;
use crate::{Device, Error};

/// A part of a dma-buf.
#[derive(Debug, Clone)]
pub struct DmaBufPart {
    /// The buffer.
    pub buffer: DmaBuf,
    /// Where in it the part starts, in bytes.
    pub offset: u64,
    /// How many bytes it has.
    pub len: u64,
}

impl From<super::Offered> for DmaBufPart {
    fn from(super::Offered { buffer, offset, len, .. }: super::Offered) -> Self {
        Self { buffer, offset, len }
    }
}

/// Addresses that are kept free for an object over a dma-buf: mapped without permission, so nothing else lands there and nobody touches them.
#[derive(Debug)]
pub(crate) struct Reserved {
    pub(crate) part: DmaBufPart,
    /// # Invariants
    /// A mapping of ours that nobody else knows, unmapped by drop only.
    pub(crate) range: HostRange,
}

impl Reserved {
    /// Reserves addresses for a part of a buffer.
    pub(crate) fn new(part: DmaBufPart) -> Result<Self, DmaBufError> {
        let DmaBufPart { ref buffer, offset, len } = part;
        let inside = len > 0 && offset.checked_add(len).is_some_and(|end| end <= buffer.size());
        let bytes = usize::try_from(len).ok().and_then(|len| len.checked_next_multiple_of(page_size()));
        let bytes = bytes.filter(|_| inside).and_then(NonZeroUsize::new);
        let bytes = bytes.ok_or_else(|| DmaBufError::Part { offset, len, size: buffer.size(), step: 1 })?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: without MAP_FIXED the kernel chooses a free place, so no memory in use is touched.
        let start = unsafe { mmap_anonymous(None, bytes, ProtFlags::PROT_NONE, flags) };
        let start = start.map_err(DmaBufError::system("mmap", "addresses for the buffer"))?;
        let range =
            HostRange::from_ptr(start.as_ptr(), bytes.get()).expect("the kernel maps whole pages of user space");
        // INVARIANT: just mapped.
        Ok(Self { part, range })
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let start = NonNull::new(std::ptr::with_exposed_provenance_mut(self.range.start())).expect("never page 0");
        // SAFETY: a mapping of ours without permission: nothing is or ever was accessed through it.
        let unmapped = unsafe { munmap(start, self.range.len()) };
        debug_assert!(unmapped.is_ok(), "a whole mapping of ours can be unmapped");
    }
}

/// A dma-buf of a part of an object. The object is watched afterwards, or nothing is exported.
pub(crate) fn export<D: Device>(object: &Object<D>, bytes: Range<u64>) -> Result<DmaBuf, Error> {
    let (step, size) = (page_size() as u64, object.range.len() as u64);
    let outside = DmaBufError::Part { offset: bytes.start, len: bytes.end.saturating_sub(bytes.start), size, step };
    if bytes.is_empty() || bytes.end > size || !(bytes.start | bytes.end).is_multiple_of(step) {
        return Err(outside.into());
    }
    if object.dmabuf.is_some() {
        return Err(DmaBufError::NotExportable("it is a dma-buf already, which can be handed on as it is").into());
    }
    let mappings = mappings(object.range)?;
    let first = run(&mappings).ok_or(DmaBufError::NotExportable("it is not one shared mapping of one file"))?;
    track(object, &mappings)?;
    let file = memory_file_of(first);
    let file = file.ok_or(DmaBufError::NotExportable("this process has no descriptor of its file open for writing"))?;
    let start = first.offset;
    let part = MemoryPart { file: file.as_fd(), bytes: start + bytes.start..start + bytes.end };
    Ok(Udmabuf::open()?.export(&[part])?)
}

/// The first of mappings that show one part of one file, without a gap.
fn run(mappings: &[Mapping]) -> Option<&Mapping> {
    let first = mappings.first()?;
    let continues = |mapping: &Mapping| {
        let at = (mapping.range.start() - first.range.start()) as u64;
        mapping.shared && mapping.file == first.file && mapping.offset == first.offset + at
    };
    (first.file.is_some() && mappings.iter().all(continues)).then_some(first)
}

/// Makes an object a watched one.
fn track<D: Device>(object: &Object<D>, mappings: &[Mapping]) -> Result<(), Error> {
    let known = object.slot().coverage;
    // Acquire: pairs with the Release below.
    if known == Some(Coverage::Watched) && !object.unwatched.load(Ordering::Acquire) {
        return Ok(());
    }
    let watched = object.engine.space.watch_as(object.range, mappings)?;
    if watched.coverage != Coverage::Watched {
        return Err(
            DmaBufError::Untracked("its memory can't be watched on this kernel, or not this mapping of it").into()
        );
    }
    // The whole that it is a part of, and the other parts, too: the receivers have promised nothing of any of them. A part that is being made goes into the
    // index with its whole's promise and then looks at it again: either the last of these visits meets it, or it sees what the one before did.
    let mut asked = false;
    loop {
        let mut more = false;
        fence(Ordering::SeqCst);
        object.engine.space.visit(object.range, |_, _, target| {
            if let Some(other) = Object::of(Arc::clone(target)).filter(|other| other.is_of(&object.engine)) {
                // Release: pairs with the Acquire of the next acquisition, which watches again what is watched already.
                more |= other.unwatched.swap(false, Ordering::AcqRel);
            }
        });
        asked |= more;
        if !more {
            break;
        }
    }
    if asked {
        // What they have now was taken unwatched, and its uses are counted in a shard that may be another.
        object.engine.space.invalidate(object.range, Cause::Manual)?;
    }
    Ok(())
}
