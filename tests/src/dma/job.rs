//! One transfer between the program's memory and the device's own.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use nix::sys::eventfd::{EfdFlags, EventFd};
use pinfold_core::Outcome;

use super::engine::Queue;
use super::pins::Place;
use crate::PATIENCE;
use crate::fence::Fence;

/// Which way the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// Out of the program's memory.
    FromProgram,
    /// Into the program's memory.
    ToProgram,
}

/// A transfer: made, started (in the closure of a submit), and finished.
///
/// A job that is [`hold`](Self::hold)ing is in flight from its start on, as seen by everybody, but moves its bytes only after [`open`](Self::open).
/// So a test decides how long the device works, and needs no clock.
#[derive(Debug, Clone)]
pub struct Job {
    pub(super) order: Arc<Order>,
    pub(super) queue: Arc<Queue>,
}

/// What the engine needs to know of a job.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) place: Place,
    pub(super) direction: Direction,
    /// The device's own memory.
    pub(super) memory: File,
    /// Readable when a holding job may move its bytes.
    pub(super) gate: EventFd,
    pub(super) fence: Fence,
    pub(super) state: Mutex<State>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) holds: bool,
    started: bool,
    /// Bytes moved, or a negated errno.
    pub(super) result: Option<i32>,
}

impl Order {
    pub(super) fn new(place: Place, direction: Direction, memory: File) -> io::Result<Self> {
        let gate = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { place, direction, memory, gate, fence: Fence::new(), state: Mutex::default() })
    }

    pub(super) fn complete(&self, result: i32) {
        self.state.lock().expect("nothing panics under this lock").result = Some(result);
        self.fence.signal(if result == -libc::ECANCELED { Outcome::Lost } else { Outcome::Done });
    }
}

impl Job {
    /// Lets the job wait for [`open`](Self::open). To be called before [`start`](Self::start).
    #[must_use]
    pub fn hold(self) -> Self {
        self.order.state.lock().expect("nothing panics under this lock").holds = true;
        self
    }

    /// The fence that is signalled when the device is done: the signal to give to a submit.
    #[must_use]
    pub fn fence(&self) -> Fence {
        self.order.fence.clone()
    }

    /// Gives the job to the device.
    ///
    /// # Panics
    /// If it has been started before.
    pub fn start(&self) {
        let started =
            std::mem::replace(&mut self.order.state.lock().expect("nothing panics under this lock").started, true);
        assert!(!started, "a job runs once");
        self.queue.push(Arc::clone(&self.order));
    }

    /// Lets a holding job move its bytes.
    pub fn open(&self) {
        self.order.gate.write(1).expect("an eventfd takes a 1");
    }

    /// Opens the job, waits for its end, and gives what passed between device and program: for a reading job, the bytes the device saw.
    ///
    /// # Errors
    /// What the device met instead of its pin: `EFAULT` if the import had been released.
    ///
    /// # Panics
    /// If the job doesn't end.
    pub fn finish(&self) -> io::Result<Vec<u8>> {
        self.open();
        self.order.fence.wait(PATIENCE).expect("a transfer that may move its bytes ends");
        let result = self.order.state.lock().expect("nothing panics under this lock").result;
        let moved = result.expect("a job that is over has a result");
        if moved < 0 {
            return Err(io::Error::from_raw_os_error(-moved));
        }
        assert_eq!(moved.cast_unsigned(), self.order.place.len, "transfers to and from a memfd are whole");
        let mut bytes = vec![0; self.order.place.len as usize];
        self.order.memory.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }
}
