//! Filling memory that the host doesn't see without a queue of our own: the engine records the copies into its own commands.
//!
//! **Problem.** On a device with a single queue an engine may not want to lend it. But what is recorded may be submitted later, or never, while other
//! leases of the same object come and go.
//!
//! **Law.** Work that recorded the uploads of its lease finds every write of the program that came before the acquire, whatever became of
//! other leases, as long as all such work goes to one queue.
//!
//! **Protocol.** A mirror has a *stage* as large as itself where the host sees it. A refresh copies into the stage, and then puts what it copied
//! on a list with a stamp. Whoever records, records all of the list, and takes the latest stamp along. Only when the work has been submitted is
//! what is no younger than that stamp taken off: from then on, later work on the queue comes after it. Work that is given up has taken nothing off.
//! A stage is written while work may be reading it, as an import is: such work sees the older bytes or the newer ones.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ash::vk;

use crate::mirror::{MirrorPiece, join};

/// More parts than this are joined, for an engine that acquires and never records.
const KEPT: usize = 4096;

/// The stage of one mirror, a piece for each of the mirror's.
pub(crate) struct Recorded {
    pub(crate) stages: Box<[MirrorPiece]>,
    unsent: Mutex<Unsent>,
}

/// What is in the stage and has not been submitted to the device, in bytes from the start of the mirror.
#[derive(Default)]
struct Unsent {
    parts: Vec<(u64, Range<usize>)>,
    /// Of the youngest part.
    stamp: u64,
}

impl Recorded {
    pub(crate) fn new(stages: Box<[MirrorPiece]>) -> Self {
        Self { stages, unsent: Mutex::default() }
    }

    fn unsent(&self) -> MutexGuard<'_, Unsent> {
        // A panic under the lock can only be a failed allocation, before which nothing was taken off.
        self.unsent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These parts of the stage are new.
    pub(crate) fn staged(&self, parts: &[Range<usize>]) {
        self.unsent().add(parts);
    }

    /// Work that recorded up to this stamp has been submitted.
    pub(crate) fn submitted(&self, stamp: u64) {
        self.unsent().parts.retain(|&(put, _)| put > stamp);
    }

    /// Records copies from the stage to `pieces`, and tells the stamp of the youngest.
    ///
    /// # Safety
    /// `commands` are being recorded on `device`, outside a render pass, for a queue that can copy.
    pub(crate) unsafe fn record(
        &self,
        device: &ash::Device,
        commands: vk::CommandBuffer,
        pieces: &[MirrorPiece],
    ) -> u64 {
        let (mut parts, stamp) = {
            let unsent = self.unsent();
            (unsent.parts.iter().map(|(_, part)| part.clone()).collect::<Vec<_>>(), unsent.stamp)
        };
        if parts.is_empty() {
            return stamp;
        }
        join(&mut parts);
        let (all, transfer) = (vk::PipelineStageFlags::ALL_COMMANDS, vk::PipelineStageFlags::TRANSFER);
        let none = vk::DependencyFlags::empty();
        let barrier = |from, to| [vk::MemoryBarrier::default().src_access_mask(from).dst_access_mask(to)];
        // Work before may still be reading, or be an upload like this.
        let before = barrier(vk::AccessFlags::TRANSFER_WRITE, vk::AccessFlags::TRANSFER_WRITE);
        // SAFETY: being recorded, outside a render pass (contract).
        unsafe { device.cmd_pipeline_barrier(commands, all, transfer, none, &before, &[], &[]) };
        let mut first = 0;
        for (stage, piece) in self.stages.iter().zip(pieces) {
            let regions: Vec<_> = inside(&parts, first..first + piece.len())
                .map(|part| {
                    let (at, size) = ((part.start - first) as u64, part.len() as u64);
                    vk::BufferCopy { src_offset: at, dst_offset: at, size }
                })
                .collect();
            if !regions.is_empty() {
                // SAFETY: being recorded (contract); both buffers have the piece's size, and live as long as the lease that the commands are
                // submitted with, which names the mirror.
                unsafe { device.cmd_copy_buffer(commands, stage.raw(), piece.raw(), &regions) };
            }
            first += piece.len();
        }
        let after = barrier(vk::AccessFlags::TRANSFER_WRITE, vk::AccessFlags::MEMORY_READ);
        // SAFETY: as above.
        unsafe { device.cmd_pipeline_barrier(commands, transfer, all, none, &after, &[], &[]) };
        stamp
    }
}

impl Unsent {
    fn add(&mut self, parts: &[Range<usize>]) {
        if parts.is_empty() {
            return;
        }
        self.stamp += 1;
        self.parts.extend(parts.iter().map(|part| (self.stamp, part.clone())));
        if self.parts.len() > KEPT {
            // Under the youngest stamp, so that nothing is taken off too early.
            let mut joined: Vec<_> = self.parts.drain(..).map(|(_, part)| part).collect();
            join(&mut joined);
            if joined.len() > KEPT / 2 {
                let end = joined.last().map_or(0, |last| last.end);
                joined = std::iter::once(joined[0].start..end).collect();
            }
            self.parts.extend(joined.into_iter().map(|part| (self.stamp, part)));
        }
    }
}

/// The parts of ranges that are inside another.
pub(crate) fn inside(parts: &[Range<usize>], bounds: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let cut = move |part: &Range<usize>| part.start.max(bounds.start)..part.end.min(bounds.end);
    parts.iter().map(cut).filter(|part| !part.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Byte by byte: the latest stamp of each.
    #[test]
    fn what_was_staged_after_a_stamp_stays_until_a_later_one_is_submitted() {
        let mut seed = 3_u64;
        let mut below = |end: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as usize % end
        };
        let (recorded, mut owed) = (Recorded::new(Box::default()), [0_u64; 300]);
        let mut stamps = vec![0];
        for _ in 0..3000 {
            if below(3) > 0 {
                let start = below(290);
                let part = start..start + 1 + below(9);
                recorded.staged(std::slice::from_ref(&part));
                let stamp = recorded.unsent().stamp;
                stamps.push(stamp);
                owed[part].fill(stamp);
            } else {
                let stamp = stamps[below(stamps.len())];
                recorded.submitted(stamp);
                owed.iter_mut().filter(|byte| **byte <= stamp).for_each(|byte| *byte = 0);
            }
            let unsent = recorded.unsent();
            for (byte, &owed) in owed.iter().enumerate() {
                assert_eq!(unsent.parts.iter().any(|(_, part)| part.contains(&byte)), owed > 0, "byte {byte}");
            }
        }
    }

    #[test]
    fn one_who_never_records_costs_no_memory_and_loses_nothing() {
        let recorded = Recorded::new(Box::default());
        for at in 0..50_000 {
            let part = at * 20..at * 20 + 10;
            recorded.staged(std::slice::from_ref(&part));
            assert!(recorded.unsent().parts.len() <= KEPT);
        }
        let stamp = recorded.unsent().stamp;
        recorded.submitted(stamp - 1);
        // What was joined is only taken off with the youngest of it.
        assert!(recorded.unsent().parts.iter().any(|(_, part)| part.contains(&(49_999 * 20))));
        recorded.submitted(stamp);
        assert!(recorded.unsent().parts.is_empty());
    }
}
