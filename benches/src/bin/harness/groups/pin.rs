//! Giving memory to a device that pins its pages: through Pinfold, and by the bare call.
//!
//! A GPU's import takes every page and keeps it; a CPU driver's notes a pointer. So beside a CPU driver all that Pinfold does looks large, and here it
//! stands beside what a pin costs. The device is the one of the tests, fixed buffers of an io_uring. No Vulkan is needed.

use std::io;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use io_uring::IoUring;
use pinfold_core::{Access, Config, Manager};
use pinfold_invalidate::Space;
use pinfold_tests::dma::DmaDevice;

use crate::clock::microseconds;
use crate::groups::import::{KIB, MIB, PATIENCE, bytes, cold, register, settle, wait_for_nobody_over, warm};
use crate::groups::limits::memlock;
use crate::machine::memory_available;
use crate::memory::Memory;
use crate::session::{Contender, Goal, Plan, Session};

/// What the kernel lets one fixed buffer have.
const MOST: usize = 1 << 30;

/// A ring with one fixed buffer.
struct ByHand(IoUring);

impl ByHand {
    fn new() -> Result<Self> {
        let ring = IoUring::new(1).context("no io_uring here")?;
        ring.submitter().register_buffers_sparse(1).context("no fixed buffers here")?;
        Ok(Self(ring))
    }

    /// Lets the buffer be this memory, all of whose pages the kernel pins; at address 0 with length 0, nothing.
    fn point(&self, start: *mut u8, len: usize) -> io::Result<()> {
        let buffer = libc::iovec { iov_base: start.cast(), iov_len: len };
        // SAFETY: the pages stay alive while they are pinned, whatever becomes of the mapping, and nothing is ever read or written through the buffer.
        unsafe { self.0.submitter().register_buffers_update(0, &[buffer], None) }
    }

    /// Pins memory and lets go of it: afterwards what the kernel counts of each page is in this processor's caches, and not in those of the worker that
    /// has let go of the pages of another sample. Every sample begins like that, as a count that another processor has takes longer than a pin.
    fn pin_and_let_go(&self, memory: &Memory) -> io::Result<()> {
        self.point(memory.pointer(), memory.len())?;
        self.point(std::ptr::null_mut(), 0)
    }

    /// Microseconds to pin memory: nothing is looked at, and nothing is watched.
    fn pin(&self, memory: &Memory) -> Result<f64> {
        self.pin_and_let_go(memory)?;
        let begun = Instant::now();
        self.point(memory.pointer(), memory.len())?;
        let time = microseconds(begun.elapsed());
        self.point(std::ptr::null_mut(), 0)?;
        Ok(time)
    }
}

/// As [`cold`] of `import`, after which the watch has ended, too, so that the rival doesn't pay for it.
fn cold_after_a_pin(by_hand: &ByHand, manager: &Manager<DmaDevice>, memory: &Memory) -> Result<f64> {
    by_hand.pin_and_let_go(memory)?;
    let time = cold(manager, memory)?;
    wait_for_nobody_over(memory)?;
    let left = Space::current().is_some_and(|space| space.is_watched(memory.range()));
    ensure!(!left, "a watch is left where no object is");
    Ok(time)
}

/// Whether memory of this size can be measured, and if not, why.
fn fits(by_hand: &ByHand, size: usize) -> Result<(), String> {
    let most = usize::try_from(memory_available() / 4).unwrap_or(usize::MAX);
    if size > most {
        return Err(format!("more than {} would be taken from this machine", bytes(most / MIB * MIB)));
    }
    if size > MOST {
        return Err(format!("a fixed buffer has {} at most", bytes(MOST)));
    }
    let memory = Memory::populated(size).map_err(|error| format!("{error:#}"))?;
    by_hand.pin_and_let_go(&memory).map_err(|error| match error.raw_os_error() {
        Some(libc::ENOMEM) => format!("more than may be locked: RLIMIT_MEMLOCK is {}", memlock()),
        _ => format!("it can't be pinned: {error}"),
    })
}

pub(crate) fn run(session: &mut Session) -> Result<()> {
    let by_hand = ByHand::new()?;
    let manager = Manager::new(DmaDevice::new().context("no device that pins")?, Config::default())?;

    let memory = Memory::populated(MIB)?;
    let hand = || Contender::new("pin by hand", || by_hand.pin(&memory));
    session.measure(Plan::new("pin by hand, 1 MiB", "µs", hand()).against(hand(), None).control())?;

    let wanted = session.mode.pick(
        vec![4 * KIB, 64 * KIB, MIB, 16 * MIB, 256 * MIB],
        vec![4 * KIB, 64 * KIB, MIB, 16 * MIB, 256 * MIB, 1024 * MIB],
        vec![4 * KIB, 64 * KIB, MIB, 16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB],
    );
    let mut curve = Vec::new();
    for size in wanted {
        if let Err(why) = fits(&by_hand, size) {
            session.absent(&bytes(size), why);
            continue;
        }
        let memory = Memory::populated(size)?;
        let rounds = match size {
            size if size > 512 * MIB => session.mode.pick(3, 5, 9),
            size if size > 64 * MIB => session.mode.pick(5, 9, 15),
            _ => 41,
        };
        let ours = Contender::new("pinfold", || cold_after_a_pin(&by_hand, &manager, &memory));
        let plan = Plan::new(format!("acquire, cold, {}, on a device that pins", bytes(size)), "µs", ours);
        let plan = plan
            .against(Contender::new("pin by hand", || by_hand.pin(&memory)), Goal::ratio_plus(1.10, 2.0))
            .at_most(rounds);
        curve.push((size as f64, session.measure(plan)?));
    }
    session.curve("give memory to a device that pins", "bytes", "µs", curve)?;
    again(session, &by_hand, &manager)
}

/// What the device has already.
fn again(session: &mut Session, by_hand: &ByHand, manager: &Manager<DmaDevice>) -> Result<()> {
    let memory = Memory::populated(MIB)?;
    let object = register(manager, &memory, Access::Read)?;
    drop(manager.acquire_timeout(&[&object], PATIENCE)?);
    session.fact(
        "coverage of memory on a device that pins",
        object.coverage().map_or("none".into(), |how| format!("{how:?}")),
    );
    let ours = Contender::new("pinfold", || warm(manager, &object));
    let plan = Plan::new("acquire, warm, 1 MiB, on a device that pins", "µs", ours);
    let hand = Contender::new("pin by hand", || by_hand.pin(&memory));
    session.measure(plan.against(hand, Goal::ratio(1.10)))?;
    drop(object);
    settle(manager)
}
