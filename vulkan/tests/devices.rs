//! Several devices in one process, and one that is slow: what is decided for each, and that none disturbs another.

#[path = "fixture/mod.rs"]
mod fixture;
#[path = "fixture/memory.rs"]
mod memory;
#[path = "fixture/script.rs"]
mod script;

use std::process::Command;
use std::sync::atomic::Ordering::SeqCst;

use fixture::{Fixture, GENEROUS, manifest};
use memory::Memory;
use pinfold_core::{Access, Error, MirrorReason, Path};
use pinfold_invalidate::page_size;
use pinfold_vulkan::{Config, Manager};
use script::Scripted;

/// Runs itself in a child process, whose loader is given the drivers of all tests.
#[test]
fn devices_of_different_drivers_share_the_same_memory_and_one_goes_while_the_others_go_on() {
    const CHILD: &str = "PINFOLD_TEST_CHILD";
    let name = "devices_of_different_drivers_share_the_same_memory_and_one_goes_while_the_others_go_on";
    if std::env::var_os(CHILD).is_some() {
        return several_drivers();
    }
    let known = ["PINFOLD_LAVAPIPE_ICD", "PINFOLD_SWIFTSHADER_ICD"].map(manifest);
    let readable = |manifest: &Option<String>| manifest.as_ref().is_some_and(|path| std::fs::read(path).is_ok());
    if !known.iter().all(readable) {
        println!("SKIP {name}: it needs both drivers, and {known:?} are what is known of them");
        return;
    }
    let both = known.map(Option::unwrap_or_default).join(":");
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .envs([(CHILD, "1"), ("VK_DRIVER_FILES", &both), ("VK_ICD_FILENAMES", &both)])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success(), "{said}{}", String::from_utf8_lossy(&child.stderr));
    // A loader that can't load a driver leaves it out.
    if !said.contains("<2 devices>") {
        println!("SKIP {name}: the loader didn't take both drivers");
    }
}

fn several_drivers() {
    let fixtures: Vec<_> = (0..2).map_while(|number| Fixture::nth(number, Ok)).collect();
    // SAFETY: the fixtures' handles belong together; the managers and their leases are dropped first.
    let manager = |fixture: &Fixture| unsafe { Manager::new(fixture.context(), Config::default()) }.unwrap();
    let mut managers: Vec<_> = fixtures.iter().map(manager).collect();
    let drivers: Vec<_> = managers.iter().map(|manager| manager.capabilities().driver_id).collect();
    assert!(drivers.len() < 2 || drivers[0] != drivers[1], "{drivers:?}");
    let memory = Memory::anonymous(16);
    memory.fill();
    while let Some(manager) = managers.pop() {
        let all = || managers.iter().chain([&manager]).zip(&fixtures);
        for (round, (manager, fixture)) in all().enumerate() {
            // SAFETY: the memory outlives the object, and no references to it exist.
            let object = unsafe { manager.register(memory.range(), Access::Read) }.unwrap();
            memory.write(round * page_size(), 7);
            let lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
            assert_eq!(lease.view(0).path, Path::Import);
            assert!(fixture.read(&lease.view(0), 0, lease.view(0).size) == memory.bytes());
        }
    }
    println!("<{} devices>", fixtures.len());
}

#[test]
fn an_object_that_changes_hands_often_is_copied_where_imports_are_dear_and_imported_again_when_it_stays() {
    let Some(scripted) = Scripted::new() else { return };
    scripted.script().import_ns_per_page.store(20_000, SeqCst);
    // SAFETY: the fixture's handles belong together; the manager and its leases are dropped first.
    let manager = unsafe { Manager::new(scripted.context(), Config::default()) }.unwrap();
    let memory = Memory::anonymous(64);
    memory.fill();
    // SAFETY: the memory outlives the object, and no references to it exist.
    let object = unsafe { manager.register(memory.range(), Access::Read) }.unwrap();
    let path_now = || manager.acquire_timeout(&[&object], GENEROUS).unwrap().view(0).path;
    let path_anew = || {
        manager.invalidate(memory.range()).unwrap();
        path_now()
    };
    for _ in 0..4 {
        assert_eq!(path_anew(), Path::Import, "there is nothing to judge by yet");
    }
    match path_anew() {
        Path::Mirror(MirrorReason::Cheaper { import_ns, copy_ns }) => {
            assert!(import_ns > 64 * 20_000 / 2 && import_ns > copy_ns, "{import_ns} against {copy_ns}");
        }
        other => panic!("{other:?}"),
    }
    // As if it lived for a long time from here on.
    (0..30_000).for_each(|_| _ = path_now());
    assert_eq!(path_anew(), Path::Import);
}

#[test]
fn a_driver_that_does_not_count_imports_is_not_given_more_than_its_budget() {
    let Some(mut scripted) = Scripted::new() else { return };
    // The script tells the budget, also where the driver has no such extension.
    scripted.fixture.extensions.push(ash::ext::memory_budget::NAME);
    let pages = 40;
    scripted.script().heap_usage.store(0, SeqCst);
    scripted.script().heap_left.store((60 * page_size()) as u64, SeqCst);
    // SAFETY: the fixture's handles belong together; the manager and its leases are dropped first.
    let manager = unsafe { Manager::new(scripted.context(), Config::default()) }.unwrap();
    let [first, second] = [Memory::anonymous(pages), Memory::anonymous(pages)];
    let [one, two] = [&first, &second].map(|memory| {
        memory.fill();
        // SAFETY: the memory outlives the object, and no references to it exist.
        unsafe { manager.register(memory.range(), Access::Read) }.unwrap()
    });
    let lease = manager.acquire_timeout(&[&one], GENEROUS).unwrap();
    match manager.acquire_timeout(&[&two], GENEROUS) {
        Err(Error::Budget { needed, available, .. }) => {
            assert_eq!((needed, available), ((pages * page_size()) as u64, (20 * page_size()) as u64));
        }
        other => panic!("{other:?}"),
    }
    drop((lease, one));
    drop(first);
}
