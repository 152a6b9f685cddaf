//! What the drivers at hand never do, and others do: refuse, contradict themselves, run out, get lost.

#[path = "fixture/mod.rs"]
mod fixture;
#[path = "fixture/memory.rs"]
mod memory;
#[path = "fixture/script.rs"]
mod script;

use std::convert::Infallible;
use std::sync::atomic::Ordering::SeqCst;

use ash::vk;
use fixture::{GENEROUS, acquire, refresh};
use memory::{Memory, memfd};
use pinfold_core::{Access, Device as _, DeviceError, MirrorReason, Outcome, Path};
use pinfold_invalidate::{HostRange, page_size};
use pinfold_vulkan::{
    Config, Error, Force, Manager, MirrorPlace, SetupError, Signal, SubmitError, Timeline, TrialResult, Uploads,
    VulkanDevice,
};
use script::{PASS, Scripted};

fn open(scripted: &Scripted, force: Option<Force>) -> VulkanDevice {
    let mut config = Config::default();
    config.force = force;
    // SAFETY: the fixture's handles belong together; tests drop the device and its imports first, and wait for idle alone.
    unsafe { VulkanDevice::new(scripted.context(), &config) }.expect("a device")
}

fn mirrored(code: vk::Result) -> Path {
    Path::Mirror(MirrorReason::Refused(code.as_raw()))
}

#[test]
fn a_kind_of_memory_that_is_refused_with_whatever_code_is_mirrored() {
    let Some(scripted) = Scripted::new() else { return };
    for code in [
        vk::Result::ERROR_INVALID_EXTERNAL_HANDLE,
        vk::Result::ERROR_UNKNOWN,
        vk::Result::ERROR_OUT_OF_DEVICE_MEMORY,
        vk::Result::ERROR_OUT_OF_HOST_MEMORY,
    ] {
        scripted.script().import.store(code.as_raw(), SeqCst);
        let device = open(&scripted, None);
        assert!(device.trials().iter().all(|trial| match trial.result {
            TrialResult::Refused(refused) => refused == code,
            TrialResult::NotTried(_) => true,
            TrialResult::Imported => false,
        }));
        for memory in [Memory::anonymous(3), Memory::of_file(&memfd(3), 3, true)] {
            memory.fill();
            let import = acquire(&device, memory.range(), Access::Read).unwrap();
            assert_eq!(import.path(), mirrored(code));
            assert_eq!(scripted.fixture.read(&import, 0, import.size), memory.bytes());
            let import = acquire(&device, memory.range(), Access::ReadWrite).unwrap();
            assert_eq!(import.path(), mirrored(code));
        }
        for force in [Force::Import, Force::Alias] {
            let (forced, memory) = (open(&scripted, Some(force)), Memory::anonymous(1));
            match acquire(&forced, memory.range(), Access::Read) {
                Err(DeviceError::Failed { call: "vkAllocateMemory", raw, .. }) => assert_eq!(raw, code.as_raw()),
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn a_range_that_is_refused_although_its_kind_is_not_is_mirrored_for_this_time() {
    let Some(scripted) = Scripted::new() else { return };
    let device = open(&scripted, None);
    let (private, shared) = (Memory::anonymous(3), Memory::of_file(&memfd(3), 3, true));
    for (memory, path) in [(&private, Path::Import), (&shared, Path::AliasImport)] {
        memory.fill();
        scripted.script().import.store(PASS, SeqCst);
        assert_eq!(acquire(&device, memory.range(), Access::Read).unwrap().path(), path);
        scripted.script().import.store(vk::Result::ERROR_UNKNOWN.as_raw(), SeqCst);
        let import = acquire(&device, memory.range(), Access::Read).unwrap();
        assert_eq!(import.path(), mirrored(vk::Result::ERROR_UNKNOWN));
        assert_eq!(scripted.fixture.read(&import, 0, import.size), memory.bytes());
        scripted.script().import.store(PASS, SeqCst);
        assert_eq!(acquire(&device, memory.range(), Access::Read).unwrap().path(), path);
    }
}

#[test]
fn a_failed_bind_leaves_nothing_behind() {
    let Some(scripted) = Scripted::new() else { return };
    let device = open(&scripted, None);
    let memory = Memory::anonymous(1);
    drop(acquire(&device, memory.range(), Access::Read).unwrap()); // the trial is over
    scripted.script().bind_failures.store(1, SeqCst);
    let import = acquire(&device, memory.range(), Access::Read).unwrap();
    assert_eq!(import.path(), mirrored(vk::Result::ERROR_OUT_OF_DEVICE_MEMORY));
    // The validation layer names what is still alive when the device is destroyed.
}

#[test]
fn pointers_without_a_usable_memory_type_are_mirrored() {
    let Some(scripted) = Scripted::new() else { return };
    // None at all, and one that the device doesn't have.
    for bits in [0, 1 << 20] {
        scripted.script().pointer_bits.store(bits, SeqCst);
        let (device, memory) = (open(&scripted, None), Memory::anonymous(1));
        let import = acquire(&device, memory.range(), Access::Read).unwrap();
        assert_eq!(import.path(), mirrored(vk::Result::ERROR_INVALID_EXTERNAL_HANDLE));
    }
}

#[test]
fn where_buffer_and_pointer_have_no_type_in_common_the_pointers_is_tried() {
    let Some(scripted) = Scripted::new() else { return };
    scripted.script().buffer_bits.store(1 << 20, SeqCst);
    let (device, memory) = (open(&scripted, None), Memory::anonymous(2));
    memory.fill();
    let import = acquire(&device, memory.range(), Access::Read).unwrap();
    assert_eq!(import.path(), Path::Import);
    assert_eq!(scripted.fixture.read(&import, 0, import.size), memory.bytes());
}

#[test]
fn coarse_alignment_is_met_inside_the_mapping_and_never_for_writers() {
    let Some(scripted) = Scripted::new() else { return };
    let alignment = 16 * page_size();
    scripted.script().import_alignment.store(alignment as u64, SeqCst);
    let device = open(&scripted, None);
    let memory = Memory::anonymous(64);
    memory.fill();
    let aligned = memory.range().start().next_multiple_of(alignment);
    let first = aligned + alignment + 3 * page_size();
    let range = HostRange::new(first, 5 * page_size()).unwrap();
    let import = acquire(&device, range, Access::Read).unwrap();
    assert_eq!((import.path(), import.size), (Path::Import, range.len() as u64));
    let at = first - memory.range().start();
    assert_eq!(scripted.fixture.read(&import, 0, import.size), memory.bytes()[at..at + range.len()]);

    // The pages around it may be someone else's, whom the device must not write over.
    let import = acquire(&device, range, Access::ReadWrite).unwrap();
    assert_eq!(import.path(), mirrored(vk::Result::ERROR_INVALID_EXTERNAL_HANDLE));
    let whole = HostRange::new(aligned, alignment).unwrap();
    assert_eq!(acquire(&device, whole, Access::ReadWrite).unwrap().path(), Path::Import);

    // At the border of the mapping there is nothing to round out into. And an alias can start anywhere, so shared memory is imported directly.
    let small = Memory::of_file(&memfd(1), 1, true);
    let import = acquire(&device, small.range(), Access::Read).unwrap();
    assert_eq!(import.path(), mirrored(vk::Result::ERROR_INVALID_EXTERNAL_HANDLE));
}

#[test]
fn small_limits_make_many_chunks_that_show_the_same_bytes() {
    let Some(scripted) = Scripted::new() else { return };
    let alignment = 4 * page_size() as u64;
    scripted.script().import_alignment.store(alignment, SeqCst);
    scripted.script().max_allocation_size.store(5 * alignment, SeqCst);
    let memory = Memory::anonymous(200);
    memory.fill();
    for force in [None, Some(Force::Mirror)] {
        let device = open(&scripted, force);
        assert_eq!(device.capabilities().chunk_size, 4 * alignment);
        let start = memory.range().start().next_multiple_of(4 * page_size()) + page_size();
        let range = HostRange::new(start, 150 * page_size()).unwrap();
        let import = acquire(&device, range, Access::Read).unwrap();
        assert!(import.chunks().len() >= 150 / 16, "{:?}", import.chunks());
        let at = start - memory.range().start();
        assert_eq!(scripted.fixture.read(&import, 0, range.len() as u64), memory.bytes()[at..at + range.len()]);
    }
}

#[test]
fn the_devices_count_of_allocations_is_a_budget_that_comes_back() {
    let Some(scripted) = Scripted::new() else { return };
    scripted.script().max_allocations.store(2, SeqCst);
    let (device, memory) = (open(&scripted, None), Memory::anonymous(1));
    let take = || acquire(&device, memory.range(), Access::Read);
    let (first, _second) = (take().unwrap(), take().unwrap());
    let error = take().unwrap_err();
    assert!(matches!(error, DeviceError::Budget { available: 0, .. }), "{error:?}");
    assert!(error.to_string().contains("maxMemoryAllocationCount"), "{error}");
    device.release(first);
    take().unwrap();
}

#[test]
fn what_the_driver_says_is_left_is_a_budget_for_imports_and_mirrors() {
    let Some(mut scripted) = Scripted::new() else { return };
    scripted.fixture.extensions.push(ash::ext::memory_budget::NAME);
    for force in [None, Some(Force::Mirror)] {
        let (device, memory) = (open(&scripted, force), Memory::anonymous(2));
        scripted.script().heap_left.store(2 * page_size() as u64, SeqCst);
        drop(acquire(&device, memory.range(), Access::Read).unwrap());
        scripted.script().heap_left.store(page_size() as u64, SeqCst);
        match acquire(&device, memory.range(), Access::Read) {
            Err(DeviceError::Budget { what, needed, available, .. }) => {
                assert_eq!((needed, available), (2 * page_size() as u64, page_size() as u64));
                assert!(what.contains("VK_EXT_memory_budget"));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_mirror_without_memory_is_a_budget_error() {
    let Some(scripted) = Scripted::new() else { return };
    let (device, memory) = (open(&scripted, Some(Force::Mirror)), Memory::anonymous(1));
    scripted.script().allocate.store(vk::Result::ERROR_OUT_OF_DEVICE_MEMORY.as_raw(), SeqCst);
    assert!(matches!(acquire(&device, memory.range(), Access::Read), Err(DeviceError::Budget { .. })));
}

#[test]
fn a_device_lost_in_an_import_is_lost_for_good() {
    let Some(scripted) = Scripted::new() else { return };
    let (device, memory) = (open(&scripted, None), Memory::anonymous(1));
    let before = acquire(&device, memory.range(), Access::Read).unwrap();
    scripted.script().import.store(vk::Result::ERROR_DEVICE_LOST.as_raw(), SeqCst);
    assert!(matches!(acquire(&device, memory.range(), Access::Read), Err(DeviceError::Lost)));
    scripted.script().import.store(PASS, SeqCst);
    assert!(matches!(acquire(&device, memory.range(), Access::Read), Err(DeviceError::Lost)));
    assert!(matches!(refresh(&device, &before, memory.range()), Err(DeviceError::Lost)));
    assert!(matches!(device.wait_idle(GENEROUS), Err(DeviceError::Lost)));
}

#[test]
fn a_device_lost_under_running_work_ends_every_submit_and_every_acquire() {
    let Some(scripted) = Scripted::new() else { return };
    // SAFETY: the fixture's handles belong together; the manager and its leases are dropped first.
    let manager = unsafe { Manager::new(scripted.context(), Config::default()) }.unwrap();
    let memory = Memory::of_file(&memfd(1), 1, true);
    // SAFETY: the mapping outlives the manager's work.
    let object = unsafe { manager.register(memory.range(), Access::Read) }.unwrap();
    let semaphores = [scripted.fixture.timeline(), scripted.fixture.timeline()];
    // SAFETY: the device is live.
    let fence = unsafe { scripted.fixture.device.create_fence(&vk::FenceCreateInfo::default(), None) }.unwrap();
    let signal = |semaphore| Signal::from(Timeline { semaphore, value: 1 });
    let pending = [signal(semaphores[0]), signal(semaphores[1]), fence.into()].map(|signal| {
        let lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
        // SAFETY: no work is submitted, so none accesses the object.
        unsafe { lease.submit([signal], || Ok::<_, Infallible>(())) }.unwrap()
    });
    scripted.script().wait.store(vk::Result::ERROR_DEVICE_LOST.as_raw(), SeqCst);
    for pending in pending {
        assert_eq!(pending.wait(GENEROUS), Some(Outcome::Lost));
    }
    manager.invalidate(memory.range()).unwrap();
    match manager.acquire_timeout(&[&object], GENEROUS) {
        Err(Error::Device(error)) => assert!(matches!(*error, DeviceError::Lost)),
        other => panic!("{other:?}"),
    }
    drop((object, manager));
    // SAFETY: nobody waits for it any more.
    unsafe { scripted.fixture.device.destroy_fence(fence, None) };
    semaphores.into_iter().for_each(|semaphore| scripted.fixture.destroy_semaphore(semaphore));
}

#[test]
fn a_driver_that_cuts_sizes_to_32_bits_imports_more_than_4_gib_all_the_same() {
    let Some(scripted) = Scripted::new() else { return };
    scripted.script().truncates.store(1, SeqCst);
    let (device, end) = (open(&scripted, None), 4_usize << 30);
    // Only the pages that are written are there.
    let memory = Memory::anonymous(end / page_size() + 3);
    for at in [0, end - 1, end, memory.range().len() - 1] {
        memory.write(at, 77);
    }
    let import = acquire(&device, memory.range(), Access::Read).unwrap();
    assert_eq!(import.path(), Path::Import);
    assert_eq!(import.chunks().iter().map(|chunk| chunk.size).sum::<u64>(), memory.range().len() as u64);
    let read = |at: usize, size| scripted.fixture.read(&import, at as u64, size);
    assert_eq!(read(0, 4), [77, 0, 0, 0]);
    assert_eq!(read(end - 4, 8), [0, 0, 0, 77, 77, 0, 0, 0]);
    assert_eq!(read(memory.range().len() - 4, 4), [0, 0, 0, 77]);
}

#[test]
fn a_device_lost_in_a_submit_of_the_engines_is_lost_when_the_engine_says_so() {
    let Some(scripted) = Scripted::new() else { return };
    let context = scripted.context();
    let (device, queue) = (context.device.clone(), scripted.fixture.queue);
    // SAFETY: the fixture's handles belong together; the manager and its leases are dropped first.
    let manager = unsafe { Manager::new(context, Config::default()) }.unwrap();
    let memory = Memory::anonymous(1);
    // SAFETY: the mapping outlives the manager's work.
    let object = unsafe { manager.register(memory.range(), Access::Read) }.unwrap();
    let done = scripted.fixture.timeline();
    let submit = |value| {
        let lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
        // SAFETY: the fixture's queue, which this thread alone uses.
        let nothing = || unsafe { device.queue_submit(queue, &[], vk::Fence::null()) };
        // SAFETY: no work accesses the object.
        unsafe { lease.submit([Timeline { semaphore: done, value }], nothing) }
    };
    let before = submit(1).unwrap();
    scripted.script().submit.store(vk::Result::ERROR_DEVICE_LOST.as_raw(), SeqCst);
    match submit(2) {
        Err(SubmitError::Rejected { error, .. }) => assert_eq!(error, vk::Result::ERROR_DEVICE_LOST),
        other => panic!("{other:?}"),
    }
    manager.note_lost();
    assert_eq!(before.wait(GENEROUS), Some(Outcome::Lost), "its signal will never come");
    match manager.acquire_timeout(&[&object], GENEROUS) {
        Err(Error::Device(error)) => assert!(matches!(*error, DeviceError::Lost)),
        other => panic!("{other:?}"),
    }
    drop((object, before, manager));
    scripted.fixture.destroy_semaphore(done);
}

#[test]
fn a_device_lost_in_the_submit_of_an_upload_is_lost_for_good() {
    let Some(scripted) = Scripted::new() else { return };
    let (context, mut config, memory) = (scripted.context(), Config::default(), Memory::anonymous(1));
    let (device, queue) = (context.device.clone(), scripted.fixture.queue);
    (config.force, config.mirrors) = (Some(Force::Mirror), MirrorPlace::DeviceLocal);
    // SAFETY: the fixture's only queue is of family 0, and this test uses it on one thread.
    let submit = move |work: &[vk::SubmitInfo<'_>], fence| unsafe { device.queue_submit(queue, work, fence) };
    // SAFETY: see above.
    config.uploads = Some(unsafe { Uploads::new([0], submit) });
    // SAFETY: the fixture's handles belong together; the device and its imports are dropped first.
    let device = unsafe { VulkanDevice::new(context, &config) }.unwrap();
    drop(acquire(&device, memory.range(), Access::Read).unwrap());
    scripted.script().submit.store(vk::Result::ERROR_DEVICE_LOST.as_raw(), SeqCst);
    assert!(matches!(acquire(&device, memory.range(), Access::Read), Err(DeviceError::Lost)));
    scripted.script().submit.store(PASS, SeqCst);
    assert!(matches!(acquire(&device, memory.range(), Access::Read), Err(DeviceError::Lost)));
}

#[test]
fn imports_are_never_mapped_and_nothing_is_exported() {
    let Some(scripted) = Scripted::new() else { return };
    for (force, access) in [(None, Access::ReadWrite), (None, Access::Read), (Some(Force::Mirror), Access::ReadWrite)] {
        let device = open(&scripted, force);
        for memory in [Memory::anonymous(3), Memory::of_file(&memfd(3), 3, true)] {
            memory.fill();
            let import = acquire(&device, memory.range(), access).unwrap();
            refresh(&device, &import, memory.range()).unwrap();
            device.release(import);
        }
    }
    let script = scripted.script();
    assert!(script.maps.load(SeqCst) > 0, "mirrors are mapped, so the count counts");
    assert_eq!((script.maps_of_imports.load(SeqCst), script.exports.load(SeqCst)), (0, 0));
}

#[test]
fn objects_are_made_for_every_family_whose_queues_use_them() {
    let Some(scripted) = Scripted::new() else { return };
    let (memory, script) = (Memory::anonymous(3), scripted.script());
    memory.fill();
    let (device, queue) = (scripted.fixture.device.clone(), scripted.fixture.queue);
    for (families, uploads, shared_by) in [
        (vec![], None, 0),
        (vec![0], Some(vec![0]), 0),
        (vec![2, 0], None, 0b101),
        (vec![2], Some(vec![0, 1, 0]), 0b111),
    ] {
        for force in [None, Some(Force::Mirror)] {
            let mut config = Config::default();
            (config.force, config.queue_families) = (force, families.clone());
            let device = device.clone();
            // SAFETY: this test uses the fixture's queue on one thread.
            let submit = move |work: &[vk::SubmitInfo<'_>], fence| unsafe { device.queue_submit(queue, work, fence) };
            // SAFETY: the script makes a device with three families of the one that the driver has, whose only queue is of family 0.
            config.uploads = uploads.clone().map(|families| unsafe { Uploads::new(families, submit) });
            // SAFETY: the fixture's handles belong together; the device and its imports are dropped first.
            let device = unsafe { VulkanDevice::new(scripted.context(), &config) }.unwrap();
            script.shared_by.store(0, SeqCst);
            let import = acquire(&device, memory.range(), Access::Read).unwrap();
            assert_eq!(script.shared_by.load(SeqCst), shared_by, "{config:?}");
            assert_eq!(scripted.fixture.read(&import, 0, import.size), memory.bytes());
        }
    }
}

#[test]
fn an_extension_that_was_said_to_be_enabled_and_is_not_is_named() {
    let Some(scripted) = Scripted::new() else { return };
    scripted.script().hide_import.store(1, SeqCst);
    // SAFETY: it fails before anything is made.
    match unsafe { VulkanDevice::new(scripted.context(), &Config::default()) } {
        Err(SetupError::NotEnabled { needed: "VK_EXT_external_memory_host", command }) => {
            assert_eq!(command, "vkGetMemoryHostPointerPropertiesEXT");
        }
        other => panic!("{other:?}"),
    }
}
