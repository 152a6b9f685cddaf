//! What work writes to mirrors, and its way back into the program's memory.
//!
//! **Problem.** Work on a mirror writes into a copy. The program's bytes must get what it wrote, and nothing that it did not write: they may have
//! changed hands, or been written by the program, meanwhile.
//!
//! **Law.** Only what was declared comes back, only into pages of the generation that the work used, and before the work counts as over.
//!
//! **Protocol.** The device is told what will be written before the work is submitted, so that it doesn't take its own results for the
//! program's. The last signal brings the bytes back, then ends the uses, so a mutator that waits for these can't go on in between.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use pinfold_invalidate::{Coverage, HostRange, still_watched};

use crate::engine::Engine;
use crate::lease::Held;
use crate::object::{Handle, Pin};
use crate::state::Snapshot;
use crate::{Device, DeviceError, Path};

/// What the work of one submit writes to mirrors, to be brought back when it is over.
pub(crate) struct Writes<D: Device> {
    /// Emptied by retirement. Locked by the last signal only, and nothing else happens under the lock.
    all: Mutex<Vec<Write<D>>>,
    /// Why results are not in the program's memory.
    fault: OnceLock<DeviceError>,
}

struct Write<D: Device> {
    pin: Arc<Pin<D>>,
    noted: Snapshot,
    handle: Handle<D>,
    written: Vec<Range<usize>>,
    /// A mapping that takes the place of this one is not watched, and can be told by that.
    watched: bool,
}

impl<D: Device> Writes<D> {
    pub(crate) fn expect(held: &[Held<D>], written: &[(usize, Range<usize>)]) -> Self {
        let mut written = written.to_vec();
        written.sort_by_key(|&(index, _)| index);
        let of_one = written.chunk_by(|(index, _), (next, _)| index == next);
        let of_one = of_one.map(|parts| (&held[parts[0].0], parts.iter().map(|(_, part)| part.clone()).collect()));
        let to_mirrors = of_one.filter(|(held, _)| matches!(held.pin.path, Path::Mirror(_)));
        let writes: Vec<_> = to_mirrors.map(|(held, written)| Write::of(held, written)).collect();
        for write in &writes {
            write.handle.object.engine.device().expect_writes(write.pin.import(), &write.written);
        }
        Self { all: Mutex::new(writes), fault: OnceLock::new() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.all().is_empty()
    }

    /// The device need not expect them any more, and what they keep is let go of.
    pub(crate) fn forget(&self, engine: &Engine<D>) {
        let all = std::mem::take(&mut *self.all());
        all.iter().for_each(|write| engine.device().forget_writes(write.pin.import(), &write.written));
    }

    /// While the uses still count, so that a mutator that waits for them can't go on before the results are where they belong.
    pub(crate) fn bring_back(&self, engine: &Engine<D>) {
        for write in &*self.all() {
            if let Err(fault) = write.bring_back(engine) {
                let _ = self.fault.set(fault); // every one is tried, and the first fault kept
            }
        }
    }

    /// Why results are not in the program's memory.
    pub(crate) fn fault(&self) -> Option<&DeviceError> {
        self.fault.get()
    }

    fn all(&self) -> MutexGuard<'_, Vec<Write<D>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<D: Device> Write<D> {
    fn of(held: &Held<D>, written: Vec<Range<usize>>) -> Self {
        let (pin, handle) = (Arc::clone(&held.pin), held.handle.clone());
        let watched = handle.object.slot().coverage == Some(Coverage::Watched);
        Self { pin, noted: held.noted, handle, written, watched }
    }

    fn bring_back(&self, engine: &Engine<D>) -> Result<(), DeviceError> {
        let object = &self.handle.object;
        let is_current = |part: HostRange| {
            object.word.read().generation == self.noted.generation
                && !(self.watched && still_watched(part) == Some(false))
        };
        engine.device().write_back(self.pin.import(), object.range, &self.written, &is_current)
    }
}
