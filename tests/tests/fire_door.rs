//! The guard of the event path is itself on duty: what it must catch, it catches.

use pinfold_tests::fire_door::{FireDoorAllocator, calls_of_this_thread, rehearse};
use pinfold_tests::process::isolated;

#[global_allocator]
static ALLOCATOR: FireDoorAllocator = FireDoorAllocator;

#[test]
fn allocating_behind_the_door_aborts_and_says_so() {
    let ending = isolated(|| rehearse(|| drop(std::hint::black_box(Box::new(1)))));
    ending.expect_signal(libc::SIGABRT);
    assert!(ending.output.contains("something allocates on the event path"), "{}", ending.output);
}

#[test]
fn freeing_behind_the_door_aborts_and_says_so() {
    let ending = isolated(|| {
        let block = std::hint::black_box(Box::new(1));
        rehearse(|| drop(block));
    });
    ending.expect_signal(libc::SIGABRT);
    assert!(ending.output.contains("something frees on the event path"), "{}", ending.output);
}

#[test]
fn growing_behind_the_door_aborts_and_says_so() {
    let ending = isolated(|| {
        let mut block = std::hint::black_box(vec![1; 16]);
        rehearse(|| block.reserve_exact(1 << 16));
    });
    ending.expect_signal(libc::SIGABRT);
    assert!(ending.output.contains("something reallocates on the event path"), "{}", ending.output);
}

#[test]
fn atomics_and_locks_behind_the_door_are_fine() {
    let lock = std::sync::Mutex::new(0);
    let before = calls_of_this_thread();
    rehearse(|| *lock.lock().expect("nobody panicked") += 1);
    assert_eq!(calls_of_this_thread(), before);
    drop(std::hint::black_box(Box::new(1)));
    assert_eq!(calls_of_this_thread(), before + 2);
}
