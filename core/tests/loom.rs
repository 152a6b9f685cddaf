//! Models of the hold-off protocol: loom runs the code as it is shipped (`Gate`, `protocol`, `Word`) through every interleaving up to a number
//! of preemptions, and through every stale value that its orderings allow.
//!
//! **Oracles.** A page is a cell that a device's use reads and a mutation writes: loom fails if neither happens before the other. Its value
//! is the version of the contents: a use that is let through with another version than its lease was taken of fails too. A lost wake-up is a
//! deadlock, which loom reports. What may never be seen (valid after the mutation, a count that is off) is asserted where it would be seen.
//!
//! **What is not the shipped code.** Closers are the steps of the monitor and of the bracket written once more, as [`World::round`],
//! [`World::bracket`] and [`World::invalidate`]: theirs need a kernel. The kernel's part of taking pages is a lock and a flag.
//!
//! **Limits.** Loom knows no time: no deadline passes here. Its `SeqCst` fences give happens-before, which is more than the language's do, and
//! it takes `SeqCst` accesses for `AcqRel` ones. To know which interleavings are worth trying it remembers one access of each atomic only, so
//! that a thread which loads before it writes can hide another's earlier load: who writes is therefore started first where that matters, and
//! that a model sees what it is there for is shown by mutants, not by its passing. Bounds and run times (one model at a time, two cores shared
//! with other work) stand at each model.
//!
//! `scripts/mutants` breaks the protocol in one place after the other and expects the model that it names to fail.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test --release --target-dir target/loom -p pinfold-core --test loom
//! ```
//! `LOOM_MAX_PREEMPTIONS` overrides the bounds.
#![cfg(loom)]

#[path = "loom/world.rs"]
mod world;

use std::sync::Arc;

use loom::thread;
use pinfold_core::protocol;
use pinfold_core::state::{Snapshot, State, Step};
use pinfold_invalidate::Shards;
use pinfold_invalidate::sync::{AtomicU32, Event, Ordering};

use world::{BOTH, FIRST, World, model, page, spawn};

// ---- holding off --------------------------------------------------------------------------------------------------------------------

/// Submitter, monitor, and a mutator that the monitor's read sets free. Preemptions ≤ 4, 8 s.
#[test]
fn a_use_never_meets_a_mutation_and_its_mutator_never_sees_the_object_valid() {
    model(4, || {
        let (world, lease) = World::valid(FIRST);
        let monitor = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                let mutator = world.round(FIRST, || {
                    spawn(&world, |world| {
                        world.pages[0].change();
                        assert_eq!(world.look().state, State::Invalid, "looked through a closed gate");
                    })
                });
                mutator.join().unwrap();
            })
        };
        world.submit(lease);
        monitor.join().unwrap();
        assert!(!world.submit(lease));
    });
}

/// Submitter, monitor that tells through an open gate, and the mutator. Preemptions ≤ 3, 12 s (4: 167 s).
#[test]
fn what_is_untold_is_as_good_as_closed() {
    model(3, || {
        let (world, lease) = World::valid(FIRST);
        let monitor = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                let mutator = world.long_round(FIRST, page(1), || {
                    spawn(&world, |world| {
                        world.pages[0].change();
                        assert_eq!(world.look().state, State::Invalid, "looked through a closed gate");
                    })
                });
                mutator.join().unwrap();
            })
        };
        world.submit(lease);
        monitor.join().unwrap();
        assert!(!world.submit(lease));
    });
}

/// A change over the object, one over something else, and the mutator of the first. Preemptions ≤ 3, 4 s.
#[test]
fn later_untold_bytes_hide_no_earlier_ones() {
    model(3, || {
        let (world, _) = World::valid(FIRST);
        let mutator = world.long_round(FIRST, page(1), || {
            spawn(&world, |world| assert_eq!(world.look().state, State::Invalid, "looked through a closed gate"))
        });
        world.long_round(FIRST, page(5), || ());
        mutator.join().unwrap();
    });
}

/// Two closers of one gate, each with its own page, and a submitter. Preemptions ≤ 2, 0.5 s.
#[test]
fn a_gate_opens_with_the_last_of_two_closers() {
    model(2, || {
        let (world, lease) = World::valid(FIRST);
        let closers = [0, 1].map(|page| spawn(&world, move |world| world.round(FIRST, || world.pages[page].change())));
        world.submit(lease);
        closers.into_iter().for_each(|closer| closer.join().unwrap());
        assert_eq!(world.look().generation.0, 2);
    });
}

/// An object in two shards, an event in each, and a submitter. Preemptions ≤ 2, 3 s.
#[test]
fn an_object_in_two_shards_is_held_off_in_both() {
    model(2, || {
        let (world, lease) = World::valid(BOTH);
        let closers = [0, 1].map(|number| {
            spawn(&world, move |world| {
                world.round(Shards::one(number), || world.pages[number].change());
                assert_eq!(world.look().state, State::Invalid);
            })
        });
        world.submit(lease);
        closers.into_iter().for_each(|closer| closer.join().unwrap());
    });
}

/// A bracket over an object that nobody has acquired yet, so that it has no shard, against its acquirer, who then submits.
/// Preemptions ≤ 4, 3 s.
#[test]
fn a_bracket_meets_an_acquisition_that_has_no_shard_yet() {
    model(4, || {
        let world = World::new();
        let bracket = spawn(&world, |world| world.bracket(|| world.zap(0)));
        if let Ok(noted) = world.word.step(world.word.read(), Step::Claim)
            && let Some(lease) = world.acquire(noted, FIRST)
        {
            world.submit(lease);
        }
        bracket.join().unwrap();
        assert_ne!(
            (world.look().state, world.pages[0].read()),
            (State::Valid, 0),
            "valid, of what is not there any more"
        );
    });
}

/// `invalidate`, and then a wait for the uses alone, against a submitter. Preemptions ≤ 4, 1 s.
#[test]
fn after_an_invalidation_no_use_of_the_old_contents_begins() {
    model(4, || {
        let (world, lease) = World::valid(FIRST);
        let owner = spawn(&world, |world| {
            world.invalidate();
            // Doesn't ask who is inside: whoever is has met the new word.
            assert!(world.gates[0].wait_drained(None));
            world.pages[0].change();
        });
        world.submit(lease);
        owner.join().unwrap();
    });
}

// ---- taking pages -------------------------------------------------------------------------------------------------------------------

/// An acquirer, who then submits, against the monitor and the mutator it sets free. Preemptions ≤ 4, 2 s.
#[test]
fn what_is_published_is_what_is_mapped() {
    model(4, || {
        let world = World::new();
        let monitor = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                *world.kernel.lock().unwrap() = true; // the mutator waits; now the monitor may hear of it
                let mutator = world.round(FIRST, || spawn(&world, |world| world.zap(0)));
                mutator.join().unwrap();
            })
        };
        if let Ok(noted) = world.word.step(world.word.read(), Step::Claim)
            && let Some(lease) = world.acquire(noted, FIRST)
        {
            world.submit(lease);
        }
        monitor.join().unwrap();
        assert_ne!(
            (world.look().state, world.pages[0].read()),
            (State::Valid, 0),
            "valid, of what is not there any more"
        );
    });
}

/// A lease from before a mutation against a bracket and the acquisition after it. Preemptions ≤ 5, 5 s.
#[test]
fn an_old_lease_stays_stale_when_the_object_is_valid_again() {
    model(5, || {
        let (world, old) = World::valid(FIRST);
        let other = spawn(&world, |world| {
            world.bracket(|| world.zap(0));
            let claimed = world.word.step(world.look(), Step::Claim).unwrap();
            assert!(world.acquire(claimed, FIRST).is_some());
        });
        world.submit(old);
        other.join().unwrap();
        assert!(!world.submit(old));
    });
}

/// Publishing against looking, no gate in between. All interleavings, < 0.2 s.
#[test]
fn who_sees_an_object_valid_sees_its_pin() {
    model(None, || {
        let world = World::new();
        let looker = spawn(&world, |world| {
            if world.look().state == State::Valid {
                assert_eq!(world.pages[0].read(), 1);
            }
        });
        let claimed = world.word.step(world.word.read(), Step::Claim).unwrap();
        world.pages[0].change(); // in place of the pin: what is written before it is published
        // The step alone: the gate's fence would order more than the word does.
        world.word.step_into(claimed, Step::Publish, FIRST).unwrap();
        looker.join().unwrap();
    });
}

/// Invalidation, close and publication of one word at once. All interleavings, < 0.2 s.
#[test]
fn nothing_undoes_a_taking_back() {
    model(None, || {
        let world = World::new();
        let claimed = world.word.step(world.word.read(), Step::Claim).unwrap();
        let takers =
            [Step::Invalidate, Step::Close].map(|step| spawn(&world, move |world| _ = world.word.take_back(step)));
        let _ = world.word.step_into(claimed, Step::Publish, FIRST);
        takers.into_iter().for_each(|taker| taker.join().unwrap());
        let last = world.word.read();
        assert_eq!((last.state, last.generation.0), (State::Closed, 2));
    });
}

/// A builder that is abandoned while it publishes, and the next claim. All interleavings, < 0.2 s.
#[test]
fn an_abandoned_builder_never_publishes_in_the_name_of_the_next() {
    model(None, || {
        let world = World::new();
        let noted = world.word.step(world.word.read(), Step::Claim).unwrap();
        let builder = spawn(&world, move |world| _ = protocol::publish(world, &world.word, noted, FIRST));
        let next = world.word.step(noted, Step::Abandon).and_then(|seen| world.word.step(seen, Step::Claim));
        builder.join().unwrap();
        let last = world.word.read();
        assert_eq!(last, next.unwrap_or(Snapshot { state: State::Valid, shards: FIRST, ..noted }));
    });
}

// ---- sleeping and waking ------------------------------------------------------------------------------------------------------------

/// One who enters, uses and ends; one who only enters; one who closes and sleeps until both are gone. Preemptions ≤ 3, 2 s.
#[test]
fn a_sleeping_closer_is_woken_by_whoever_is_the_last_to_leave() {
    model(3, || {
        let world = World::new();
        let user = spawn(&world, |world| {
            let era = world.gates[0].try_enter().map(|visit| visit.begin());
            assert!(!era.is_some_and(|era| world.gates[0].end(era)), "nobody gives up");
        });
        let visitor = spawn(&world, |world| drop(world.gates[0].try_enter()));
        world.gates[0].close();
        assert!(world.gates[0].wait_users(None) && world.gates[0].wait_quiet(None));
        world.gates[0].open();
        user.join().unwrap();
        visitor.join().unwrap();
    });
}

/// A looker and a submitter asleep on the epoch, and the closer who opens. Preemptions ≤ 4, 4 s.
#[test]
fn whoever_sleeps_before_a_closed_gate_is_woken_by_its_opening() {
    model(4, || {
        let (world, lease) = World::valid(FIRST);
        world.gates[0].close();
        let looker = spawn(&world, |world| assert_eq!(world.look().state, State::Invalid));
        let submitter = spawn(&world, move |world| assert!(!world.submit(lease)));
        world.word.take_back(Step::Invalidate);
        world.gates[0].open();
        looker.join().unwrap();
        submitter.join().unwrap();
    });
}

/// Two who wait for a count to become nothing, as the manager's end does, and the one who makes it so. Preemptions ≤ 4.
#[test]
fn whoever_sleeps_on_an_event_is_woken_by_its_change() {
    model(4, || {
        let shared = Arc::new((Event::new(), AtomicU32::new(1)));
        let waiters = [(); 2].map(|()| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let (event, count) = &*shared;
                loop {
                    let seen = event.value();
                    if count.load(Ordering::Acquire) == 0 {
                        return;
                    }
                    event.wait(seen, None);
                }
            })
        });
        let (event, count) = &*shared;
        count.fetch_sub(1, Ordering::Release);
        event.bump();
        waiters.into_iter().for_each(|waiter| waiter.join().unwrap());
    });
}

// ---- giving up ----------------------------------------------------------------------------------------------------------------------

/// A use given up on while it ends, then another, of the next era. All interleavings, < 0.2 s.
#[test]
fn a_use_given_up_on_still_counts_until_it_ends() {
    model(None, || {
        let (world, lease) = World::valid(FIRST);
        let reserve = move |world: &World| {
            protocol::reserve(world, std::iter::once((&world.word, lease.noted, page(1)))).unwrap()
        };
        let uses = reserve(&world);
        let device = spawn(&world, move |world| {
            world.use_pages(lease);
            uses.end(world);
            let uses = reserve(world);
            world.use_pages(lease);
            uses.end(world);
        });
        let monitor = spawn(&world, |world| _ = world.gates[0].give_up());
        device.join().unwrap();
        monitor.join().unwrap();
        assert_eq!((world.gates[0].inflight(), world.gates[0].late()), (0, 0));
    });
}

/// A use given up on while it ends, against an owner who waits for it. Preemptions ≤ 4, 5 s.
#[test]
fn drained_means_that_late_uses_are_over_too() {
    model(4, || {
        let (world, lease) = World::valid(FIRST);
        let uses = protocol::reserve(&*world, std::iter::once((&world.word, lease.noted, page(1)))).unwrap();
        let (device, monitor) = (Arc::clone(&world), Arc::clone(&world));
        let device = thread::spawn(move || {
            device.use_pages(lease);
            uses.end(&*device)
        });
        let monitor = thread::spawn(move || monitor.gates[0].give_up() > 0);
        assert!(world.gates[0].wait_drained(None));
        world.pages[0].change();
        assert_eq!(device.join().unwrap(), monitor.join().unwrap(), "late is who was given up on");
        assert_eq!((world.gates[0].inflight(), world.gates[0].late()), (0, 0));
    });
}
