//! What an allocator does behind the program's back to memory that is watched, and what may not come of it: the same tests for each allocator.
//!
//! Pages inside a block of the allocator are registered, which `Manager::register` advises against: an allocator discards and unmaps under its locks,
//! and work that needs memory to come to its end then waits for whoever waits for it. The deadline is what ends that; nothing hangs, and no byte goes
//! wrong.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use pinfold_core::{Access, Config, Error, HostRange, Manager, Outcome, State};
use pinfold_invalidate::page_size;
use pinfold_tests::PATIENCE;
use pinfold_tests::fake::FakeDevice;
use pinfold_tests::fence::Fence;

/// Large enough to be a mapping of its own, or at least whole pages, with every allocator.
const BLOCK: usize = 4 << 20;

fn manager(deadline: Duration) -> Manager<FakeDevice> {
    let mut config = Config::default();
    config.deadline = deadline;
    Manager::new(FakeDevice::new(), config).unwrap()
}

/// The whole pages inside a block.
fn pages_of(block: &[u8]) -> HostRange {
    let start = block.as_ptr().addr().next_multiple_of(page_size());
    let end = (block.as_ptr().addr() + block.len()) & !(page_size() - 1);
    HostRange::new(start, end - start).unwrap()
}

/// A block is freed (and given back, by an allocator that has to be asked) while work over its pages is under way, and the thread that ends the work allocates first, as a driver does.
pub(crate) fn a_block_in_use_is_freed_while_completion_allocates(give_back: fn()) {
    let manager = manager(Duration::from_millis(50)); // it ends each round
    for round in 0..20 {
        let block = vec![round; BLOCK];
        // SAFETY: no reference points into the block from here on but to drop it; the scripted device looks through system calls.
        let object = unsafe { manager.register(pages_of(&block), Access::Read) }.unwrap();
        let lease = manager.acquire_timeout(&[&object], PATIENCE).unwrap();
        let fence = Fence::new();
        // SAFETY: the fence is signalled below, and nothing accesses the object.
        let pending = unsafe { lease.submit([fence.clone()], || Ok::<_, Error>(())) }.unwrap();
        thread::scope(|scope| {
            scope.spawn(move || {
                drop(block);
                give_back();
            });
            scope.spawn(|| {
                // From every size class, also those that need new pages of the system.
                for shift in 4..22 {
                    drop(black_box(vec![1_u8; 1 << shift]));
                }
                fence.signal(Outcome::Done);
            });
        });
        assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
        // Some keep what another thread has freed until the thread that it came from is asked.
        give_back();
    }
    let stats = manager.stats();
    println!("{stats:?}");
    assert!(stats.space.events > 0, "the allocator has given nothing back: {stats:?}");
    assert_eq!(stats.in_flight, 0);
}

/// Threads allocate and free at full speed, and give pages back, while others register, acquire and submit pages of their own blocks.
pub(crate) fn a_storm_of_allocations_under_watched_blocks(give_back: fn()) {
    /// So that a failure ends the threads, too.
    struct Stop<'a>(&'a AtomicBool);

    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    let manager = manager(PATIENCE); // no work is under way when somebody waits
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let _stop = Stop(&stop);
        for thread in 0..2_usize {
            let stop = &stop;
            scope.spawn(move || {
                let mut kept = Vec::new();
                for round in 0.. {
                    kept.push(vec![0_u8; 1 << (10 + (round + thread) % 12)]);
                    if kept.len() > 64 {
                        kept.drain(..48);
                    }
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
        }
        for round in 0..60_u8 {
            let mut block = vec![0; BLOCK / 8];
            block.fill(round);
            // SAFETY: as above.
            let object = unsafe { manager.register(pages_of(&block), Access::Read) }.unwrap();
            let lease = manager.acquire_timeout(&[&object], PATIENCE).unwrap();
            assert!(lease.view(0).words.iter().all(|&word| word == u64::from_ne_bytes([round; 8])), "round {round}");
            let fence = Fence::new();
            fence.signal(Outcome::Done);
            // SAFETY: nothing accesses the object.
            let submitted = unsafe { lease.submit([fence], || Ok::<_, Error>(())) };
            assert!(submitted.is_ok_and(|pending| pending.wait(PATIENCE).is_some()));
            // The allocator may keep the pages, discard them, or unmap them; the object follows, and a block that gets the address anew is another.
            drop(block);
            give_back();
            assert!(matches!(object.state().unwrap(), State::Valid | State::Invalid));
        }
    });
    let stats = manager.stats();
    assert!(stats.space.events > 0, "the allocator has given nothing back: {stats:?}");
    let device = manager.device().clone();
    drop(manager);
    assert_eq!((device.live_imports(), device.counts().dropped), (0, 0));
}
