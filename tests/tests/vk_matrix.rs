//! The cells of the matrix that a driver can be asked for: idle and busy. Those that crash a driver on the CPU by nature crash in processes of their own.

mod userptr;

use std::thread;

use pinfold_core::Access;
use pinfold_tests::matrix::{Kind, Mutation, Situation, crashes_by_nature};
use pinfold_tests::memory::{Backing, Region};
use pinfold_tests::process::{Verdict, isolated_case};
use pinfold_tests::vulkan::Gpu;
use pinfold_tests::{PATIENCE, gpu};

use userptr::vulkan::Vulkan;
use userptr::{Rig, matrix, space, wait_until};

#[test]
// rows: xe/system-allocator-{malloc,mmap,new,…}-{race,fork-read,mlock,remap,remap-dontunmap,remap-ro,huge,shared,file}
// rows: selftests/hmm anon_{read,write}{,_prot,_huge}, file_{read,write}
fn each_cell_comes_to_what_the_table_says() {
    let ending = isolated_case("", 5 * PATIENCE, || {
        let verdicts = matrix::run(&Vulkan::new(gpu!()), &[Situation::Idle, Situation::Busy]);
        assert_eq!(verdicts.not_pinnable, 0);
    });
    ending.output.lines().filter(|line| line.starts_with("verdicts")).for_each(|line| println!("{line}"));
    ending.expect_return();
}

/// Of each mutation that crashes a driver on the CPU, one kind of memory.
const CRASHES: [(&str, Backing, Mutation); 7] = [
    ("whole", Backing::Anonymous, Mutation::UnmapWhole),
    ("head", Backing::FilePrivate, Mutation::UnmapHead),
    ("middle", Backing::MemfdPrivate, Mutation::UnmapMiddle),
    ("tail", Backing::FileReadOnly, Mutation::UnmapTail),
    ("shrink", Backing::AnonymousHuge, Mutation::Shrink),
    ("move", Backing::Anonymous, Mutation::Move),
    ("truncate", Backing::Memfd, Mutation::Truncate),
];

#[test]
fn a_hole_made_under_running_work_crashes_a_driver_on_the_cpu_and_no_other() {
    let cpu = {
        let rig = Vulkan::new(gpu!());
        rig.manager().device().capabilities().device_type == ash::vk::PhysicalDeviceType::CPU
    };
    for (case, backing, mutation) in CRASHES {
        let kind = Kind::Mapped(backing);
        assert!(crashes_by_nature(kind, mutation, Situation::Busy), "{case}");
        let ending = isolated_case(case, PATIENCE, move || {
            let rig = Vulkan::new(Gpu::new().unwrap());
            let region = Region::new(backing, 4 * kind.unit()).unwrap();
            // SAFETY: no reference points into a region. That a driver may crash is what is shown here, in a process of its own.
            let object = unsafe { rig.manager().register(region.range(), Access::Read) }.unwrap();
            let work = rig.start(rig.manager().acquire_timeout(&[&object], PATIENCE).unwrap()).unwrap();
            thread::scope(|scope| {
                let mutator = scope.spawn(|| matrix::mutate(&region, kind.unit(), mutation).unwrap());
                wait_until("the hole", || mutator.is_finished() || space().is_busy(pinfold_invalidate::Shards::ALL));
                work.finish();
            });
        });
        let crash = if mutation == Mutation::Truncate { libc::SIGBUS } else { libc::SIGSEGV };
        ending.expect(if cpu { Verdict::Signal(crash) } else { Verdict::Returned });
    }
}
