//! What an engine wants kept ready comes back by itself, and takes room from nobody who asks.

mod userptr;

use std::thread;

use pinfold_core::State;
use pinfold_tests::PATIENCE;
use pinfold_tests::fake::{Answer, Call};

use userptr::budget::{lease, valid, with_budget};
use userptr::{alone, device_sees, filled, wait_until};

#[test]
fn an_object_that_is_kept_ready_is_valid_again_without_being_asked_for() {
    let _alone = alone();
    let (rig, region, objects) = with_budget(100, 1);
    let object = &objects[0];
    object.keep_ready();
    wait_until("the first acquisition", || object.state().unwrap() == State::Valid);
    let acquires = rig.manager.stats().acquires;
    for round in 0..3_u8 {
        let generation = object.generation().unwrap();
        region.map_over(0..1).unwrap();
        region.fill(0..1, round + 1).unwrap();
        rig.manager.invalidate(region.range()).unwrap();
        assert!(object.generation().unwrap() > generation);
        wait_until("the restore", || object.state().unwrap() == State::Valid);
        let imports = rig.manager.stats().imports_made;
        assert_eq!(device_sees(&rig, object), [filled(round + 1)]);
        assert_eq!(rig.manager.stats().imports_made, imports, "the acquire was a hit");
    }
    wait_until("the count", || rig.manager.stats().restored >= 4); // it comes after the state
    let stats = rig.manager.stats();
    assert_eq!((stats.acquires, stats.restore_failures), (acquires + 3, 0), "{stats:?}");

    rig.manager.shrink(u64::MAX);
    wait_until("the restore after an eviction", || object.state().unwrap() == State::Valid);
    object.let_rest();
    rig.manager.shrink(u64::MAX);
    assert_eq!(object.state().unwrap(), State::Invalid);
    let (restored, imports) = (rig.manager.stats().restored, rig.manager.stats().imports_made);
    drop(lease(&rig.manager, object));
    assert_eq!((rig.manager.stats().restored, rig.manager.stats().imports_made), (restored, imports + 1));
}

#[test]
fn a_restore_that_faults_is_told_to_nobody_and_rests_until_somebody_asks() {
    let _alone = alone();
    let (rig, region, objects) = with_budget(100, 1);
    let object = &objects[0];
    object.keep_ready();
    wait_until("the first acquisition", || object.state().unwrap() == State::Valid);
    region.unmap_all().unwrap();
    wait_until("the failed restore", || rig.manager.stats().restore_failures > 0);
    wait_until("the fault", || object.state().unwrap() == State::Faulted);
    region.map_over(0..1).unwrap();
    // Not the stored fault, but what is there now.
    assert_eq!(device_sees(&rig, object), [0]);
    region.map_over(0..1).unwrap();
    wait_until("the next restore", || object.state().unwrap() == State::Valid);
}

#[test]
fn a_restore_evicts_nobody_and_comes_when_there_is_room() {
    let _alone = alone();
    let (rig, _region, objects) = with_budget(1, 2);
    drop(lease(&rig.manager, &objects[0]));
    objects[1].keep_ready();
    wait_until("a failed restore", || rig.manager.stats().restore_failures > 0);
    assert_eq!((valid(&objects).as_str(), rig.manager.stats().evicted), ("V-", 0));
    rig.manager.shrink(u64::MAX);
    wait_until("the restore", || objects[1].state().unwrap() == State::Valid);
    // Whoever asks goes first all the same.
    drop(lease(&rig.manager, &objects[0]));
    assert_eq!(rig.manager.stats().evicted, 1);
}

#[test]
fn whoever_asks_while_another_is_being_restored_takes_the_pages_that_it_gets() {
    let _alone = alone();
    let (rig, _region, objects) = with_budget(1, 2);
    rig.device.script(Call::Import, &[Answer::Hold]);
    objects[1].keep_ready();
    rig.device.wait_held(1);
    thread::scope(|scope| {
        // There is no room, and nothing to be evicted: what is there is being taken by somebody whom nobody has asked for.
        let asks = scope.spawn(|| lease(&rig.manager, &objects[0]));
        wait_until("somebody who is short", || rig.manager.stats().short > 0);
        rig.device.let_go();
        drop(asks.join().unwrap());
    });
    assert_eq!((valid(&objects).as_str(), rig.manager.stats().evicted), ("V-", 1));
}

#[test]
fn what_is_kept_ready_takes_no_room_while_somebody_is_short() {
    let _alone = alone();
    let (rig, _region, objects) = with_budget(2, 4);
    let used = lease(&rig.manager, &objects[0]);
    rig.device.script(Call::Import, &[Answer::Hold]);
    objects[3].keep_ready();
    rig.device.wait_held(1);
    thread::scope(|scope| {
        let asks = scope.spawn(|| lease(&rig.manager, &objects[1]));
        wait_until("somebody who is short", || rig.manager.stats().short > 0);
        // There is room for one more now, but not for who comes unasked.
        drop(used);
        rig.manager.shrink(u64::MAX);
        objects[2].keep_ready();
        wait_until("a restore that finds no room", || rig.manager.stats().restore_failures > 0);
        rig.device.let_go();
        drop(asks.join().unwrap());
    });
    wait_until("the first restore", || objects[3].state().unwrap() == State::Valid);
    assert_eq!(valid(&objects), "-V-V");
}

#[test]
fn who_acquires_while_it_is_being_restored_adopts_it_and_is_told_its_failure() {
    let _alone = alone();
    let (rig, _region, objects) = with_budget(100, 1);
    rig.device.script(Call::Import, &[Answer::Hold, Answer::Fault(libc::EPERM)]);
    objects[0].keep_ready();
    rig.device.wait_held(1);
    assert!(rig.manager.acquire(&[&objects[0]]).unwrap_err().is_again());
    rig.device.let_go();
    assert_eq!(rig.manager.acquire_timeout(&[&objects[0]], PATIENCE).unwrap_err().errno(), libc::EPERM);
    assert_eq!(rig.manager.stats().restore_failures, 0);
}
