//! The cells of the matrix that a driver can be asked for: idle and busy. Those that crash a driver on the CPU by nature crash in processes of their own.

mod userptr;

use std::thread;

use pinfold_core::Access;
use pinfold_tests::matrix::{Kind, Mutation, Situation, crashes_by_nature, is_filled};
use pinfold_tests::process::{Verdict, isolated_case};
use pinfold_tests::vulkan::Gpu;
use pinfold_tests::{PATIENCE, gpu, skip_part};

use userptr::vulkan::Vulkan;
use userptr::{Rig, matrix, space, wait_until};

#[test]
// rows: xe/system-allocator-{malloc,mmap,new,…}-{race,fork-read,mlock,remap,remap-dontunmap,remap-ro,huge,shared,file}
// rows: selftests/hmm anon_{read,write}{,_prot,_huge}, file_{read,write}
fn each_cell_comes_to_what_the_table_says() {
    let _pool = matrix::huge_pages();
    let ending = isolated_case("", 5 * PATIENCE, || {
        let verdicts = matrix::run(&Vulkan::new(gpu!()), &[Situation::Idle, Situation::Busy]);
        assert_eq!(verdicts.not_pinnable, 0);
    });
    ending.output.lines().filter(|line| line.starts_with("verdicts")).for_each(|line| println!("{line}"));
    ending.expect_return();
}

#[test]
fn a_hole_made_under_running_work_crashes_a_driver_on_the_cpu_and_no_other() {
    let _pool = matrix::huge_pages();
    let cells = Kind::ALL.into_iter().flat_map(|kind| Mutation::ALL.map(|mutation| (kind, mutation)));
    let crashes = cells.filter(|&(kind, mutation)| crashes_by_nature(kind, mutation, Situation::Busy));
    let endings: Vec<_> = crashes
        .map(|(kind, mutation)| {
            let case = move || {
                // On a busy machine the work may be over before the hole is there, so it is tried again where it must crash.
                let tries = if is_filled(kind, mutation) { 1 } else { 5 };
                for _ in 0..tries {
                    if let Err(why) = make_a_hole_under_running_work(kind, mutation) {
                        skip_part!("{kind:?}, {mutation:?}: {why}");
                        std::process::exit(LACKING);
                    }
                }
            };
            (kind, mutation, isolated_case(&format!("{kind:?}, {mutation:?}"), PATIENCE, case))
        })
        .collect();
    // Asked last, as each child runs what stands before it.
    let rig = Vulkan::new(gpu!());
    let cpu = rig.manager().device().capabilities().device_type == ash::vk::PhysicalDeviceType::CPU;
    let unexpected: Vec<_> = endings
        .iter()
        .filter(|(kind, mutation, ending)| {
            let wanted = match mutation {
                _ if !cpu || is_filled(*kind, *mutation) => Verdict::Returned,
                Mutation::Truncate => Verdict::Signal(libc::SIGBUS),
                _ => Verdict::Signal(libc::SIGSEGV),
            };
            ![wanted, Verdict::Exited(LACKING), Verdict::NotMine].contains(&ending.verdict)
        })
        .collect();
    assert!(unexpected.is_empty(), "{unexpected:#?}");
    let ended = |verdict| endings.iter().filter(|(.., ending)| ending.verdict == verdict).count();
    let (bus, segv) = (ended(Verdict::Signal(libc::SIGBUS)), ended(Verdict::Signal(libc::SIGSEGV)));
    let lacking = ended(Verdict::Exited(LACKING));
    let filled = ended(Verdict::Returned);
    println!("{} cells: {segv} SIGSEGV, {bus} SIGBUS, {filled} filled, {lacking} skipped", endings.len());
}

/// Exit code of a child that lacks the memory, or the mutation.
const LACKING: i32 = 77;

fn make_a_hole_under_running_work(kind: Kind, mutation: Mutation) -> Result<(), String> {
    let rig = Vulkan::new(Gpu::new().unwrap());
    let region = matrix::region(kind)?;
    // SAFETY: no reference points into a region. That a driver may crash is what is shown here, in a process of its own.
    let object = unsafe { rig.manager().register(region.range(), Access::Read) }.unwrap();
    let work = rig.start(rig.manager().acquire_timeout(&[&object], PATIENCE).unwrap()).unwrap();
    thread::scope(|scope| {
        let mutator = scope.spawn(|| matrix::mutate(&region, kind.unit(), mutation));
        wait_until("the hole", || mutator.is_finished() || space().is_busy(pinfold_invalidate::Shards::ALL));
        work.finish();
        mutator.join().unwrap().map_err(|e| format!("this kernel can't: {e}"))
    })
}
