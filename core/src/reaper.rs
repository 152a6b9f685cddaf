//! What is done with, and the workers that let go of it.
//!
//! **Problem.** The last lease, the last retirement or an invalidation may end anywhere: where the driver must not be called, and 100,000 at a
//! time. One job each would stand in front of every acquisition that is asked for next.
//!
//! **Law.** Whatever is put here is let go of, on a thread that may call the device, and nobody who asks for something else waits for all of it.
//!
//! **Protocol.** What is done with goes into a list. A job takes a batch and, if something is left, queues itself again behind what has been
//! asked for meanwhile. Who needs the room at once empties the list himself.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Device;
use crate::engine::Engine;
use crate::object::{Object, Taken};

/// How much one job lets go of: some hundred microseconds' worth.
const BATCH: usize = 64;
/// Jobs at a time. Letting go of a large import is slow, and most of it is the kernel's work.
const MOST: usize = 4;

/// What nobody uses any more.
pub(crate) enum Dead<D: Device> {
    /// Pages that the device still has.
    Taken(Taken<D>),
    /// An object whose last handle is gone.
    Object(Arc<Object<D>>),
}

pub(crate) struct Graveyard<D: Device>(Mutex<Graves<D>>);

struct Graves<D: Device> {
    dead: Vec<Dead<D>>,
    /// Jobs that are queued or running.
    jobs: usize,
}

impl<D: Device> Default for Graveyard<D> {
    fn default() -> Self {
        Self(Mutex::new(Graves { dead: Vec::new(), jobs: 0 }))
    }
}

impl<D: Device> Graveyard<D> {
    fn graves(&self) -> MutexGuard<'_, Graves<D>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<D: Device> Engine<D> {
    /// Has it let go of by a worker.
    pub(crate) fn bury(self: &Arc<Self>, dead: Dead<D>) {
        let another = {
            let mut graves = self.graveyard.graves();
            graves.dead.push(dead);
            let another = graves.jobs < MOST && graves.dead.len() > graves.jobs * BATCH;
            graves.jobs += usize::from(another);
            another
        };
        if another {
            self.send_reaper();
        }
    }

    fn send_reaper(self: &Arc<Self>) {
        let engine = Arc::clone(self);
        // Called as cancelled when the workers are gone: then whoever asks does all of it.
        self.spawn_unordered(move |cancelled| {
            loop {
                engine.reap(if cancelled { usize::MAX } else { BATCH });
                let mut graves = engine.graveyard.graves();
                // Whoever has buried something meanwhile has left it to us.
                let again = !graves.dead.is_empty();
                if !again || !cancelled {
                    graves.jobs -= usize::from(!again);
                    drop(graves);
                    if again {
                        engine.send_reaper();
                    }
                    return;
                }
            }
        });
    }

    /// Lets go of at most so many on this thread, which must be one that may call the device. Returns the bytes that were given back.
    pub(crate) fn reap(&self, most: usize) -> u64 {
        let mut bytes = 0;
        let mut left = most;
        // Counted, so that who waits for room or for the end knows that some is in our hands.
        self.loose.add(0);
        while left > 0 {
            let batch: Vec<_> = {
                let mut graves = self.graveyard.graves();
                let rest = graves.dead.len().saturating_sub(BATCH.min(left));
                graves.dead.drain(rest..).collect()
            };
            if batch.is_empty() {
                break;
            }
            left = left.saturating_sub(batch.len());
            for dead in batch {
                match dead {
                    Dead::Taken(taken) => bytes += taken.give_back(),
                    Dead::Object(object) => bytes += object.finish(),
                }
            }
        }
        self.loose.sub(0);
        bytes
    }
}
