//! A target that is taken away while somebody looks: it is let go of when nobody does any more, without anything else having to happen.

mod support;

use std::sync::{Arc, Weak};
use std::time::Duration;

use pinfold_invalidate::{Change, Shards, Space, Target};
use support::{Memory, Told, isolated, wait_until};

#[test]
fn a_target_that_is_removed_during_a_visit_is_let_go_of_after_it() {
    isolated("a_target_that_is_removed_during_a_visit_is_let_go_of_after_it", || {
        let space = Space::get(Duration::from_secs(10)).unwrap();
        // More than one change frees of what those before it have left.
        let memory = Memory::new(100);
        let range = |at: usize| memory.part(at, 1);
        let targets: Vec<Weak<Told>> = (0..100)
            .map(|at| {
                let told = Arc::new(Told::default());
                space.insert(range(at), at as u64, Arc::<Told>::clone(&told));
                Arc::downgrade(&told)
            })
            .collect();
        space.visit(range(0), |_, _, _| {
            (0..100).for_each(|at| space.remove(range(at), at as u64));
            let alive = targets.iter().filter(|target| target.strong_count() > 0).count();
            assert_eq!(alive, 100, "the visitor may look at any of them");
        });
        // Neither a change nor an event comes from here on.
        wait_until("the end of all targets", || targets.iter().all(|target| target.strong_count() == 0));
    });
}

/// What targets hold may be the space itself, and then nobody else is left to end it.
#[test]
fn a_space_held_by_a_target_ends_when_that_is_removed_during_a_visit() {
    isolated("a_space_held_by_a_target_ends_when_that_is_removed_during_a_visit", || {
        let space = Space::get(Duration::from_secs(10)).unwrap();
        let memory = Memory::new(1);
        space.insert(memory.0, 1, Arc::new(Holder(Arc::clone(&space))));
        let ended = Arc::downgrade(&space);
        space.visit(memory.0, |_, _, _| space.remove(memory.0, 1));
        drop(space);
        wait_until("the end of the space", || ended.strong_count() == 0);
    });
}

struct Holder(#[allow(dead_code, reason = "held")] Arc<Space>);

impl Target for Holder {
    fn invalidated(&self, _: &Change) {}

    fn settled(self: Arc<Self>) {}

    fn shards(&self) -> Shards {
        Shards::NONE
    }
}
