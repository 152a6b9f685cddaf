//! The way out for memory that a device can't import, or that is better copied: a copy in memory of the device, made current at every acquire.
//!
//! **Problem.** A copy is out of date as soon as it is made, and making it anew costs what the memory costs.
//!
//! **Law.** Whoever has acquired an object finds in its mirror every write of the program that came before. What the device writes comes back
//! where it was declared, and is not overwritten by an older copy meanwhile.
//!
//! **Protocol.** Where the kernel tells which pages were written ([`DirtyCursor`]), only those are copied: asked first, which protects them again,
//! then copied, under the mirror's lock, so that an acquire that finds nothing to copy doesn't overtake one that is copying. Where a copy fails,
//! all is copied the next time. Bytes that unfinished work is to write are left out, and are copied once after it.
//!
//! Of a discard the watch tells: the object is invalid then, and its mirror is made anew. Only writes through the registered mapping are told. So
//! the mirror of shared memory or of a file is copied in full, unless the program has said that nobody writes in another way
//! ([`Config::sole_writer`](crate::Config::sole_writer)).

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ash::vk;
use gpu_allocator::MemoryLocation;
use nix::errno::Errno;
use pinfold_core::{Access, Coverage, DeviceError, Path, Request};
use pinfold_invalidate::{Backing, DirtyCursor, HostRange, Taken};

use crate::copy::{self, Piece};
use crate::import::{Import, Store};
use crate::recorded::{Recorded, inside};
use crate::upload::Uploader;
use crate::{MirrorPlace, Timeline};

mod heap;

pub(crate) use heap::{MirrorHeap, MirrorPiece};

/// Results are brought back in parts of this many bytes, each after a look at whether the memory is still the object's.
const BACK: usize = 1 << 20;

/// A copy of one object.
pub(crate) struct Mirror {
    range: HostRange,
    pieces: Box<[MirrorPiece]>,
    fill: Fill,
    /// The value of the last upload.
    uploaded: AtomicU64,
    /// Held while the copy is made current.
    state: Mutex<State>,
}

/// How pieces are filled.
enum Fill {
    /// By this process, which sees them.
    Here,
    /// Through a queue of the engine's.
    Queue(Arc<Uploader>),
    /// By the engine's own work.
    Recorded(Recorded),
}

struct State {
    /// `None`: nobody can tell what was written.
    cursor: Option<DirtyCursor>,
    /// The whole copy is out of date.
    whole: bool,
    /// Bytes that unfinished work is to write, one entry for each declaration; counted from the start of the range.
    expected: Vec<Range<usize>>,
    /// Bytes that were left out for such work, which is over.
    owed: Vec<Range<usize>>,
    /// Room for the next answer.
    dirty: Vec<HostRange>,
}

/// A copy of the request's range as it is now.
///
/// # Errors
/// [`DeviceError::Budget`] if there is no room, [`DeviceError::Fault`] if the memory vanished, [`DeviceError::Failed`], [`DeviceError::Lost`].
pub(crate) fn mirror(
    heap: &Arc<MirrorHeap>,
    uploader: Option<&Arc<Uploader>>,
    request: &Request<'_>,
    path: Path,
    usage: vk::BufferUsageFlags,
) -> Result<Import, DeviceError> {
    let (gpu, mut rest) = (&heap.gpu, request.range.len() as u64);
    // What the device writes is brought back by the thread that hears of the end of the work, which can't wait for another copy of the device's.
    let (location, usage) = match (request.access, heap.place) {
        (Access::ReadWrite, _) => (MemoryLocation::GpuToCpu, usage),
        (Access::Read, MirrorPlace::DeviceLocal) => {
            (MemoryLocation::GpuOnly, usage | vk::BufferUsageFlags::TRANSFER_DST)
        }
        (Access::Read, _) => (MemoryLocation::CpuToGpu, usage),
    };
    let recorded = heap.recorded && location == MemoryLocation::GpuOnly;
    let (mut pieces, mut stages) = (Vec::new(), Vec::new());
    while rest > 0 {
        let size = rest.min(gpu.caps.chunk_size);
        pieces.push(heap.block(request.range, size, usage, location, request.label)?);
        if recorded {
            let (from, staging) = (vk::BufferUsageFlags::TRANSFER_SRC, MemoryLocation::CpuToGpu);
            stages.push(heap.block(request.range, size, from, staging, "pinfold staging")?);
        }
        rest -= size;
    }
    let chunks: Vec<_> = pieces.iter().map(|piece| (piece.raw(), piece.len() as u64)).collect();
    // Where there is no cursor, a copy in full is what the first answer of one would be, too.
    let cursor = is_told(heap, request).then(|| DirtyCursor::new(&heap.space, request.range));
    let state = State { cursor, whole: true, expected: Vec::new(), owed: Vec::new(), dirty: Vec::new() };
    let fill = match uploader.filter(|_| location == MemoryLocation::GpuOnly) {
        _ if recorded => Fill::Recorded(Recorded::new(stages.into())),
        Some(uploader) => Fill::Queue(Arc::clone(uploader)),
        None => Fill::Here,
    };
    let (pieces, state) = (pieces.into(), Mutex::new(state));
    let mirror = Mirror { range: request.range, pieces, fill, uploaded: AtomicU64::new(0), state };
    mirror.refresh()?;
    Ok(Import::new(path, chunks.into_iter(), Store::Mirrored(Box::new(mirror))))
}

/// Whether every write to the request's memory is told.
fn is_told(heap: &MirrorHeap, request: &Request<'_>) -> bool {
    let only_here = request.mappings.iter().all(|mapping| match mapping.backing {
        Backing::Anonymous | Backing::Heap | Backing::Stack => !mapping.shared,
        _ => false,
    });
    request.coverage == Some(Coverage::Watched) && (only_here || heap.sole_writer)
}

impl Drop for Mirror {
    fn drop(&mut self) {
        // An upload that took too long may still be writing to the buffers, which then can't be destroyed.
        if let Fill::Queue(uploader) = &self.fill
            && !uploader.is_idle()
        {
            std::mem::forget(std::mem::take(&mut self.pieces));
        }
    }
}

impl Mirror {
    /// Copies what the program has written since the last time.
    ///
    /// # Errors
    /// [`DeviceError::Fault`] if some of it vanished, and what the upload fails with. All is copied the next time, then.
    pub(crate) fn refresh(&self) -> Result<(), DeviceError> {
        let mut state = self.state();
        let State { cursor, whole, expected, owed, dirty } = &mut *state;
        dirty.clear();
        let taken = cursor.as_mut().map_or(Taken::Everything, |cursor| cursor.take(dirty));
        let mut parts: Vec<Range<usize>> = if *whole || taken == Taken::Everything {
            std::iter::once(0..self.range.len()).collect()
        } else {
            let start = self.range.start();
            dirty.iter().map(|part| part.start() - start..part.end() - start).chain(owed.drain(..)).collect()
        };
        owed.clear();
        *whole = true; // until it has been done
        join(&mut parts);
        if !expected.is_empty() {
            parts = without(parts, expected);
        }
        self.copy(&parts)?;
        let copied: usize = parts.iter().map(Range::len).sum();
        self.heap().copied.fetch_add(copied as u64, Ordering::Relaxed);
        *whole = false;
        Ok(())
    }

    fn heap(&self) -> &MirrorHeap {
        self.pieces.first().expect("a mirror has a piece").heap()
    }

    fn copy(&self, parts: &[Range<usize>]) -> Result<(), DeviceError> {
        let mut first = 0;
        for (number, piece) in self.pieces.iter().enumerate() {
            let pieces: Vec<_> = inside(parts, first..first + piece.len())
                .map(|part| Piece { from: self.range.start() + part.start, at: part.start - first, len: part.len() })
                .collect();
            let seen = match &self.fill {
                Fill::Here => piece,
                Fill::Recorded(recorded) => &recorded.stages[number],
                Fill::Queue(uploader) => {
                    let value = uploader.upload(self.range, piece.raw(), &pieces)?;
                    self.uploaded.fetch_max(value, Ordering::Relaxed); // read by those who hold, or held, the mirror's lock
                    first += piece.len();
                    continue;
                }
            };
            let mapped = seen.mapped().expect("memory that the host doesn't see is not filled by it");
            // SAFETY: the block has room for the piece's size, is mapped, and is written by nobody but such copies and the device.
            unsafe { copy::read_pieces(mapped, &pieces) }.map_err(|errno| vanished(self.range, errno))?;
            first += piece.len();
        }
        if let Fill::Recorded(recorded) = &self.fill {
            recorded.staged(parts);
        }
        Ok(())
    }

    /// When the last upload is over, where nobody has waited for it.
    pub(crate) fn uploaded(&self) -> Option<Timeline> {
        let Fill::Queue(uploader) = &self.fill else { return None };
        let value = self.uploaded.load(Ordering::Relaxed);
        uploader.timeline().filter(|_| value > 0).map(|semaphore| Timeline { semaphore, value })
    }

    /// Records what the device has not been sent.
    ///
    /// # Safety
    /// That of [`Recorded::record`].
    pub(crate) unsafe fn record(&self, device: &ash::Device, commands: vk::CommandBuffer) -> u64 {
        match &self.fill {
            // SAFETY: the contract is the same.
            Fill::Recorded(recorded) => unsafe { recorded.record(device, commands, &self.pieces) },
            Fill::Here | Fill::Queue(_) => 0,
        }
    }

    /// What was recorded up to this stamp has been submitted.
    pub(crate) fn submitted(&self, stamp: u64) {
        if let Fill::Recorded(recorded) = &self.fill {
            recorded.submitted(stamp);
        }
    }

    /// These bytes are about to be written by the device, and are not to be overwritten.
    pub(crate) fn expect(&self, written: &[Range<usize>]) {
        self.state().expected.extend_from_slice(written);
    }

    /// The work that was to write these bytes is over, or never came.
    pub(crate) fn forget(&self, written: &[Range<usize>]) {
        let mut state = self.state();
        for part in written {
            let at = state.expected.iter().position(|expected| expected == part);
            state.expected.swap_remove(at.expect("what is forgotten was expected"));
            state.owed.push(part.clone());
        }
    }

    /// Copies what the device has written into the program's memory. Takes no lock, and allocates nothing.
    ///
    /// # Errors
    /// [`DeviceError::Fault`] about the first part that isn't the object's any more.
    pub(crate) fn write_back(
        &self,
        written: &[Range<usize>],
        is_current: &dyn Fn(HostRange) -> bool,
    ) -> Result<(), DeviceError> {
        for part in written {
            let mut at = part.start;
            while at < part.end {
                let (piece, inside) = self.piece_at(at);
                let len = BACK.min(part.end - at).min(piece.len() - inside);
                self.write_part(piece, inside, at, len, is_current)?;
                at += len;
            }
        }
        Ok(())
    }

    fn write_part(
        &self,
        piece: &MirrorPiece,
        inside: usize,
        at: usize,
        len: usize,
        is_current: &dyn Fn(HostRange) -> bool,
    ) -> Result<(), DeviceError> {
        let to = self.range.start() + at;
        let range = HostRange::cover(std::ptr::without_provenance::<u8>(to), len).unwrap_or(self.range);
        let gone = |errno| {
            let why = "it changed hands before the device's results could be brought back; they are lost";
            DeviceError::Fault { range, why, errno }
        };
        if !is_current(range) {
            return Err(gone(libc::EFAULT));
        }
        let mapped = piece.mapped().expect("a mirror that the device writes is where the host sees it");
        // SAFETY: `inside + len` is at most the piece's size.
        let from = unsafe { mapped.add(inside) };
        // SAFETY: `from` has `len` bytes; that no Rust reference covers what the device may write is the contract of `register`.
        unsafe { copy::write(to, from, len) }.map_err(|errno| gone(errno as i32))
    }

    /// The piece that has this byte of the object, and the byte's place in it.
    fn piece_at(&self, at: usize) -> (&MirrorPiece, usize) {
        let mut inside = at;
        for piece in &self.pieces {
            if inside < piece.len() {
                return (piece, inside);
            }
            inside -= piece.len();
        }
        unreachable!("declared bytes are inside the object")
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic under the lock can only be a failed allocation, and `whole` is set then, or nothing was begun.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sorts ranges and joins those that touch.
pub(crate) fn join(parts: &mut Vec<Range<usize>>) {
    parts.sort_unstable_by_key(|part| part.start);
    parts.dedup_by(|next, last| {
        let touch = next.start <= last.end;
        if touch {
            last.end = last.end.max(next.end);
        }
        touch
    });
}

/// What is left of joined ranges without others.
fn without(mut parts: Vec<Range<usize>>, others: &[Range<usize>]) -> Vec<Range<usize>> {
    for other in others {
        parts = parts
            .into_iter()
            .flat_map(|part| [part.start..part.end.min(other.start), part.start.max(other.end)..part.end])
            .filter(|part| !part.is_empty())
            .collect();
    }
    parts
}

pub(crate) fn vanished(range: HostRange, errno: Errno) -> DeviceError {
    let why = "the memory vanished while it was copied (unmapped, or its file truncated)";
    DeviceError::Fault { range, why, errno: errno as i32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joining_and_taking_out_agree_with_a_byte_by_byte_oracle() {
        let mut seed = 5_u64;
        let mut below = |end: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as usize % end
        };
        for _ in 0..2000 {
            let mut some = |most| -> Vec<Range<usize>> {
                let starts: Vec<_> = (0..below(most)).map(|_| below(40)).collect();
                starts.into_iter().map(|start| start..start + 1 + below(9)).collect()
            };
            let (mut parts, others) = (some(7), some(4));
            let inside = |ranges: &[Range<usize>], byte| ranges.iter().any(|range| range.contains(&byte));
            let expected: Vec<_> = (0..50).filter(|&byte| inside(&parts, byte) && !inside(&others, byte)).collect();
            join(&mut parts);
            assert!(parts.windows(2).all(|pair| pair[0].end < pair[1].start), "{parts:?}");
            let left = without(parts, &others);
            assert_eq!(left.into_iter().flatten().collect::<Vec<_>>(), expected);
        }
    }
}
