//! A device that does what the test tells it: refuses, runs out, gets lost, or keeps a call waiting until the test lets it go.
//!
//! Its imports copy the first word of every page, so a test can tell which pages an import saw. Nothing is pinned.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use pinfold_core::{Device, DeviceError, Path, Preparation, Request, Ticket};
use pinfold_invalidate::{HostRange, page_size};

use crate::PATIENCE;
use crate::fence::{Fence, Followed};
use crate::memory::peek;

/// What the device answers to one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// It works.
    Fine,
    /// [`DeviceError::Fault`] with this errno.
    Fault(i32),
    /// [`DeviceError::Budget`]: nothing is left.
    Budget,
    /// [`DeviceError::Lost`].
    Lost,
    /// [`DeviceError::Failed`] with this code.
    Failed(i32),
    /// The call waits until [`FakeDevice::let_go`], then takes the next answer.
    Hold,
}

/// The calls that can be scripted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// [`Device::prepare`].
    Prepare,
    /// [`Device::import`].
    Import,
    /// [`Device::refresh`].
    Refresh,
    /// The end of [`Device::import`]: the pages have been looked at, and nobody has the import yet.
    Taken,
}

/// How often what happened, since the device was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Calls of `prepare`.
    pub prepared: usize,
    /// Calls of `import` that gave one.
    pub imported: usize,
    /// Calls of `refresh`.
    pub refreshed: usize,
    /// Calls of `release`.
    pub released: usize,
    /// Imports that were dropped without `release`. Always a bug of the caller.
    pub dropped: usize,
}

/// The device. Clones are the same device.
#[derive(Debug, Clone, Default)]
pub struct FakeDevice(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    state: Mutex<State>,
    changed: Condvar,
    followed: Followed,
}

#[derive(Debug, Default)]
struct State {
    scripts: [VecDeque<Answer>; 4],
    counts: Counts,
    /// Calls that are waiting, and the round they wait for the end of.
    held: usize,
    round: u64,
    next_id: u64,
    lost: bool,
    live: BTreeSet<u64>,
}

/// An import of the fake device.
#[derive(Debug)]
pub struct FakeImport {
    device: Arc<Inner>,
    released: bool,
    /// Differs from that of every other import of the device.
    pub id: u64,
    /// What was imported.
    pub range: HostRange,
    /// The first word of every page, as it was then.
    pub words: Vec<u64>,
}

impl FakeDevice {
    /// A device to which every call is fine.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds answers for the next calls of one kind. When they are used up, every call is fine again.
    pub fn script(&self, call: Call, answers: &[Answer]) {
        self.state().scripts[call as usize].extend(answers);
    }

    /// The device is lost from now on. Its work ends when the test signals its fences, as `Lost`.
    pub fn lose(&self) {
        self.state().lost = true;
    }

    /// Waits until at least so many calls are held.
    ///
    /// # Panics
    /// If that doesn't come about.
    pub fn wait_held(&self, calls: usize) {
        let (state, _) = self
            .0
            .changed
            .wait_timeout_while(self.state(), PATIENCE, |state| state.held < calls)
            .expect("nothing panics under this lock");
        assert!(state.held >= calls, "{} calls are held, not {calls}", state.held);
    }

    /// Lets every held call go on.
    pub fn let_go(&self) {
        self.state().round += 1;
        self.0.changed.notify_all();
    }

    /// What has happened so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.state().counts
    }

    /// How many imports are alive.
    #[must_use]
    pub fn live_imports(&self) -> usize {
        self.state().live.len()
    }

    /// Whether the import with this id is alive.
    #[must_use]
    pub fn is_live(&self, id: u64) -> bool {
        self.state().live.contains(&id)
    }

    /// Waits until no import is alive.
    ///
    /// # Panics
    /// If that doesn't come about.
    pub fn wait_no_imports(&self) {
        let (state, _) = self
            .0
            .changed
            .wait_timeout_while(self.state(), PATIENCE, |state| !state.live.is_empty())
            .expect("nothing panics under this lock");
        assert!(state.live.is_empty(), "imports {:?} are still alive", state.live);
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.state.lock().expect("nothing panics under this lock")
    }

    fn answer(&self, call: Call, range: HostRange) -> Result<(), DeviceError> {
        let mut state = self.state();
        loop {
            match state.scripts[call as usize].pop_front().unwrap_or(Answer::Fine) {
                Answer::Fine => return Ok(()),
                Answer::Fault(errno) => return Err(DeviceError::Fault { range, why: "the script says so", errno }),
                Answer::Budget => {
                    let needed = range.len() as u64;
                    return Err(DeviceError::Budget { range, what: "scripted memory", needed, available: 0 });
                }
                Answer::Lost => return Err(DeviceError::Lost),
                Answer::Failed(raw) => {
                    return Err(DeviceError::Failed { call: "script", range, code: "SCRIPTED".into(), raw });
                }
                Answer::Hold => {
                    let round = state.round;
                    state.held += 1;
                    self.0.changed.notify_all();
                    state = self
                        .0
                        .changed
                        .wait_while(state, |state| state.round == round)
                        .expect("nothing panics under this lock");
                    state.held -= 1;
                }
            }
        }
    }
}

impl Device for FakeDevice {
    type Prepared = ();
    type Import = FakeImport;
    type Signal = Fence;
    type Commands = ();

    fn prepare(&self, request: &Request<'_>) -> Result<Preparation<()>, DeviceError> {
        self.state().counts.prepared += 1;
        self.answer(Call::Prepare, request.range)?;
        Ok(Preparation::Ready(()))
    }

    fn import(&self, request: &Request<'_>, (): ()) -> Result<FakeImport, DeviceError> {
        let range = request.range;
        self.answer(Call::Import, range)?;
        let mut words = Vec::with_capacity(range.pages());
        for page in (range.start()..range.end()).step_by(page_size()) {
            let word =
                peek(page, 8).map_err(|_| DeviceError::Fault { range, why: "a page is gone", errno: libc::EFAULT })?;
            words.push(u64::from_ne_bytes(word.try_into().expect("eight bytes were read")));
        }
        self.answer(Call::Taken, range)?;
        let mut state = self.state();
        let id = state.next_id;
        state.next_id += 1;
        state.live.insert(id);
        state.counts.imported += 1;
        Ok(FakeImport { device: Arc::clone(&self.0), released: false, id, range, words })
    }

    fn refresh(&self, _: &FakeImport, request: &Request<'_>) -> Result<(), DeviceError> {
        self.state().counts.refreshed += 1;
        self.answer(Call::Refresh, request.range)
    }

    fn release(&self, mut import: FakeImport) {
        import.released = true;
    }

    fn path(&self, _: &FakeImport) -> Path {
        Path::Import
    }

    fn follow(&self, signal: Fence, ticket: Ticket) {
        self.0.followed.follow(signal, ticket);
    }

    fn is_lost(&self) -> bool {
        self.state().lost
    }

    fn wait_idle(&self, _: Duration) -> Result<(), DeviceError> {
        // It does no work of its own: a fence that the test hasn't signalled stands for nothing.
        self.0.followed.give_up();
        Ok(())
    }
}

impl Drop for FakeImport {
    fn drop(&mut self) {
        let mut state = self.device.state.lock().expect("nothing panics under this lock");
        state.live.remove(&self.id);
        if self.released {
            state.counts.released += 1;
        } else {
            state.counts.dropped += 1;
        }
        drop(state);
        self.device.changed.notify_all();
    }
}
