//! What the tests of this workspace stand on: real memory of every kind, a real Vulkan device that tolerates no message,
//! a device in software that pins real pages, child processes that may crash, and an allocator that guards the event path.
//!
//! A test that needs what the machine lacks says so with [`skip!`] and returns; `scripts/test` collects these lines.
//! Nothing here sleeps: what must be waited for is waited for as an event, at most [`PATIENCE`].

use std::time::{Duration, Instant};

use pinfold_core::{Device, Error, Generation, State, Userptr};

pub mod conformance;
pub mod dma;
pub mod fake;
pub mod fence;
pub mod fire_door;
pub mod leaks;
pub mod matrix;
pub mod memory;
pub mod process;
mod skip;
pub mod vulkan;

/// How long a test waits for what must happen. Only a failing test ever waits that long, so it is generous.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The state of an object whose manager has a short deadline. A look waits for two such deadlines only, in which a busy machine may not come to tell
/// of a change; so it is asked again.
///
/// # Panics
/// If there is another error, or no answer for so long.
#[track_caller]
pub fn state_of<D: Device>(object: &Userptr<D>) -> State {
    answer(|| object.state())
}

/// The generation of such an object.
///
/// # Panics
/// As [`state_of`].
#[track_caller]
pub fn generation_of<D: Device>(object: &Userptr<D>) -> Generation {
    answer(|| object.generation())
}

#[track_caller]
fn answer<T>(look: impl Fn() -> Result<T, Error>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match look() {
            Err(error) if error.is_again() && Instant::now() < deadline => {}
            answer => return answer.unwrap_or_else(|error| panic!("{error}")),
        }
    }
}

/// How many rounds a race is to be run that has so many on a real processor: an n-th, where `PINFOLD_TEST_FEWER` says n, and at least one.
/// `scripts/test-vm` says so: an emulated processor takes minutes for what is done in seconds elsewhere, and what a kernel does otherwise it does
/// in each round.
///
/// # Panics
/// If the variable is no number above zero.
#[must_use]
pub fn rounds(whole: usize) -> usize {
    let Ok(fewer) = std::env::var("PINFOLD_TEST_FEWER") else { return whole };
    let fewer: std::num::NonZeroUsize = fewer.parse().unwrap_or_else(|e| panic!("PINFOLD_TEST_FEWER={fewer}: {e}"));
    (whole / fewer).max(1)
}
