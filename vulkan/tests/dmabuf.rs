//! Dma-bufs on a real driver. Where the kernel makes none, the memory file itself stands in, which lavapipe imports as one; `scripts/test-vm` has a
//! kernel that does.

#[path = "fixture/mod.rs"]
mod fixture;
#[path = "fixture/memory.rs"]
mod memory;

use std::convert::Infallible;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use ash::vk;
use fixture::{Fixture, GENEROUS, Readback};
use memory::Memory;
use pinfold_core::dmabuf::{BufferSort, CpuAccess, DmaBuf, DmaBufPart, Layout, Offered, Udmabuf, receive, send};
use pinfold_core::{HostBuffer, HostBufferKind, HugePages};
use pinfold_vulkan::watch::{DmaBufEvent, Note, WatchConfig};
use pinfold_vulkan::{
    Access, Config, Coverage, Error, Force, Manager, ManualReason, Outcome, Path, State, Support, Timeline, Userptr,
    dmabuf, page_size,
};

fn manager(fixture: &Fixture, config: Config) -> Manager {
    // SAFETY: the fixture's handles belong together, and tests drop the manager and its leases first.
    unsafe { Manager::new(fixture.context(), config) }.expect("a manager")
}

/// A manager of a device that imports dma-bufs, or the reason why the test doesn't run.
fn importing(test: &str, fixture: &Fixture) -> Option<Manager> {
    let manager = manager(fixture, Config::default());
    match manager.capabilities().dmabuf {
        Support::Usable => Some(manager),
        ref not => {
            println!("SKIP {test}: {not}");
            None
        }
    }
}

fn host(pages: usize) -> HostBuffer {
    let host = HostBuffer::new(pages * page_size(), HostBufferKind::Exportable, HugePages::No).unwrap();
    let bytes: Vec<u8> = (0..host.size()).map(|at| (at / 7 % 251) as u8).collect();
    host.write(0, &bytes).unwrap();
    host
}

fn bytes_of(host: &HostBuffer) -> Vec<u8> {
    let mut bytes = vec![0; host.size()];
    host.read(0, &mut bytes).unwrap();
    bytes
}

/// The whole of it as a dma-buf, or as what stands in for one.
fn exported(host: &HostBuffer) -> DmaBuf {
    let file = || DmaBuf::from_memory_file(host.as_fd().try_clone_to_owned().unwrap()).unwrap();
    host.export_dmabuf(0..host.size()).unwrap_or_else(|_| file())
}

fn whole(buffer: DmaBuf) -> DmaBufPart {
    DmaBufPart { offset: 0, len: buffer.size(), buffer }
}

#[test]
fn the_device_reads_and_writes_a_buffer_where_it_is() {
    let Some(fixture) = Fixture::new() else { return };
    let Some(manager) = importing("the_device_reads_and_writes_a_buffer_where_it_is", &fixture) else { return };
    let queue = manager.watch(WatchConfig::default()).unwrap();
    let host = host(8);
    let buffer = exported(&host);
    let inode = buffer.inode();
    let object = manager.register_dmabuf(whole(buffer), Access::ReadWrite, "frame").unwrap();
    let lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
    assert_eq!(lease.view(0).path, Path::DmaBuf);
    assert_eq!(object.coverage(), Some(Coverage::Manual(ManualReason::NotMapped)));
    assert_eq!(fixture.read(&lease.view(0), 0, lease.view(0).size), bytes_of(&host));
    fixture.write(&lease.view(0), 0x5a5a_5a5a);
    assert!(bytes_of(&host).iter().all(|&byte| byte == 0x5a), "the device wrote into the program's own pages");
    assert_eq!(manager.stats().dmabufs_imported, 1);

    let again = manager.acquire(&[&object]).unwrap();
    assert_eq!(again.view(0).buffer, lease.view(0).buffer, "what is right is kept");
    manager.invalidate(object.range()).unwrap();
    assert_eq!(object.state().unwrap(), State::Invalid);
    drop((lease, again));
    let anew = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
    assert_eq!(fixture.read(&anew.view(0), 0, 8), [0x5a; 8]);
    drop((anew, object, manager));
    let notes: Vec<_> = queue
        .records()
        .filter_map(|record| match record.note() {
            Note::DmaBuf(note) if note.inode == inode => Some(note.event),
            _ => None,
        })
        .collect();
    assert_eq!(notes, [DmaBufEvent::Imported, DmaBufEvent::Imported, DmaBufEvent::Closed]);
}

#[test]
fn a_part_is_exactly_the_part_and_a_part_outside_is_refused() {
    let Some(fixture) = Fixture::new() else { return };
    let Some(manager) = importing("a_part_is_exactly_the_part_and_a_part_outside_is_refused", &fixture) else { return };
    let host = host(4);
    let (buffer, all, size) = (exported(&host), bytes_of(&host), host.size() as u64);
    for (offset, len) in [(256, 1024), (page_size() as u64, 300), (size - 256, 256)] {
        let part = DmaBufPart { buffer: buffer.clone(), offset, len };
        let object = manager.register_dmabuf(part, Access::Read, "part").unwrap();
        let lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
        assert_eq!(lease.view(0).size, len);
        let (from, to) = (usize::try_from(offset).unwrap(), usize::try_from(offset + len).unwrap());
        assert_eq!(fixture.read(&lease.view(0), 0, len), all[from..to]);
    }
    for (offset, len) in [(0, 0), (0, size + 1), (size, 1), (u64::MAX, 2)] {
        let part = DmaBufPart { buffer: buffer.clone(), offset, len };
        let error = manager.register_dmabuf(part, Access::Read, "outside").unwrap_err();
        assert!(matches!(error, Error::DmaBuf(_)) && error.errno() == libc::EINVAL, "{error}");
    }
    // Drivers bind at multiples of their own only.
    let part = DmaBufPart { buffer, offset: 1, len: 64 };
    let object = manager.register_dmabuf(part, Access::Read, "crooked").unwrap();
    assert!(manager.acquire_timeout(&[&object], GENEROUS).is_err());
}

#[test]
fn a_part_of_an_object_over_a_buffer_is_an_object_over_the_same_bytes_at_addresses_of_its_own() {
    const TEST: &str = "a_part_of_an_object_over_a_buffer_is_an_object_over_the_same_bytes_at_addresses_of_its_own";
    let Some(fixture) = Fixture::new() else { return };
    let Some(manager) = importing(TEST, &fixture) else { return };
    let (host, page) = (host(4), page_size());
    let (buffer, all) = (exported(&host), bytes_of(&host));
    // From the second page of the buffer to within its fourth.
    let of = DmaBufPart { buffer, offset: page as u64, len: (2 * page + 512) as u64 };
    let whole = manager.register_dmabuf(of, Access::Read, "frame").unwrap();
    let check = |part: &Userptr, expected: &[u8]| {
        let lease = manager.acquire_timeout(&[part], GENEROUS).unwrap();
        let view = lease.view(0);
        assert_eq!((view.path, view.size), (Path::DmaBuf, expected.len() as u64));
        assert_eq!(fixture.read(&view, 0, view.size), expected);
    };
    let (first, rest) = (whole.part(1..2).unwrap(), whole.part(page + 7..2 * page + 600).unwrap());
    assert_eq!((first.range().pages(), rest.range().pages()), (1, 2));
    let ranges = [whole.range(), first.range(), rest.range()];
    for (at, range) in ranges.iter().enumerate() {
        let others = ranges.iter().skip(at + 1);
        assert!(others.filter_map(|other| range.intersection(*other)).next().is_none(), "{ranges:x?}");
    }
    check(&first, &all[page..2 * page]);
    check(&rest, &all[2 * page..3 * page + 512]);

    // Parts count from the part that they are of, and what happens to one is nothing to the others.
    let of_part = rest.part(page..page + 1).unwrap();
    check(&of_part, &all[3 * page..3 * page + 512]);
    manager.invalidate(rest.range()).unwrap();
    assert_eq!(
        [&first, &rest, &of_part].map(|part| part.state().unwrap()),
        [State::Valid, State::Invalid, State::Valid]
    );
    drop((whole, rest));
    check(&first, &all[page..2 * page]);
    check(&of_part, &all[3 * page..3 * page + 512]);
    assert!(matches!(of_part.part(0..page + 1).unwrap_err(), Error::Part { .. }));
}

#[test]
fn a_buffer_from_another_process_outlives_that_process() {
    let Some(fixture) = Fixture::new() else { return };
    let Some(manager) = importing("a_buffer_from_another_process_outlives_that_process", &fixture) else { return };
    let (ours, theirs) = UnixStream::pair().unwrap();
    // SAFETY: the child allocates at worst, which the C library makes legal after a fork, and leaves by _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let host = host(4);
        let buffer = exported(&host);
        let len = buffer.size();
        let sent = send(&theirs, &Offered { buffer, offset: 0, len, layout: Layout::default() });
        // SAFETY: ends the child, and with it everything it had, without running anything of the parent's.
        unsafe { libc::_exit(i32::from(sent.is_err())) };
    }
    let mut status = 0;
    // SAFETY: `status` is a live integer that the call writes.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0);
    let got = receive(&ours, GENEROUS).unwrap();
    let object = manager.register_dmabuf(got.into(), Access::Read, "orphan").unwrap();
    let lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
    assert_eq!(fixture.read(&lease.view(0), 0, lease.view(0).size), bytes_of(&host(4)));
}

#[test]
fn work_over_a_buffer_is_submitted_and_retired_like_any_other() {
    let Some(fixture) = Fixture::new() else { return };
    let Some(manager) = importing("work_over_a_buffer_is_submitted_and_retired_like_any_other", &fixture) else {
        return;
    };
    let host = host(4);
    let buffer = exported(&host);
    let object = manager.register_dmabuf(whole(buffer.clone()), Access::Read, "frame").unwrap();
    let (back, ready, done) = (Readback::new(&fixture, host.size() as u64), fixture.timeline(), fixture.timeline());
    let lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
    let view = lease.view(0);
    let foreign = dmabuf::foreign_family(&fixture.extensions);
    let commands = fixture.record(|commands| {
        let (all, none) = (vk::PipelineStageFlags::ALL_COMMANDS, vk::DependencyFlags::empty());
        let take = [dmabuf::from_foreign(&view, foreign, 0, vk::AccessFlags::TRANSFER_READ)];
        assert_eq!((take[0].src_queue_family_index, take[0].dst_queue_family_index), (foreign, 0));
        assert_eq!((take[0].buffer, take[0].offset, take[0].size), (view.buffer, view.offset, view.size));
        assert_eq!(take[0].dst_access_mask, vk::AccessFlags::TRANSFER_READ);
        // SAFETY: the command buffer is being recorded, and the import is alive.
        unsafe { fixture.device.cmd_pipeline_barrier(commands, all, all, none, &[], &take, &[]) };
        fixture.copy(commands, (view.buffer, view.offset), (back.buffer, 0), view.size);
        let give = [dmabuf::to_foreign(&view, foreign, 0, vk::AccessFlags::TRANSFER_READ)];
        assert_eq!((give[0].src_queue_family_index, give[0].dst_queue_family_index), (0, foreign));
        assert_eq!(give[0].src_access_mask, vk::AccessFlags::TRANSFER_READ);
        // SAFETY: as above.
        unsafe { fixture.device.cmd_pipeline_barrier(commands, all, all, none, &[], &give, &[]) };
    });
    let submit = || {
        fixture.submit(&[commands], Some((ready, 1)), Some((done, 1)));
        Ok::<_, Infallible>(())
    };
    // SAFETY: `done` is signalled by the copy, which reads the object through its view.
    let pending = unsafe { lease.submit([Timeline { semaphore: done, value: 1 }], submit) }.unwrap();
    assert_eq!(object.in_flight(), 1);
    let timeline = Timeline { semaphore: ready, value: 1 };
    // SAFETY: a live timeline of this device that nobody else signals.
    assert!(unsafe { manager.signal_when_ready(&buffer, CpuAccess::Read, timeline, GENEROUS) }.unwrap());
    assert_eq!(pending.wait(GENEROUS), Some(Outcome::Done));
    assert_eq!(back.bytes(), bytes_of(&host));
    assert!(manager.wait_dmabuf(&object, CpuAccess::Write, Duration::ZERO).unwrap());
    drop((pending, object));
    drop(manager);
    fixture.destroy_semaphore(ready);
    fixture.destroy_semaphore(done);
}

#[test]
fn a_device_without_the_extension_says_so() {
    let Some(fixture) = Fixture::new() else { return };
    let manager = manager(&fixture, Config::default());
    if manager.capabilities().dmabuf == Support::Usable {
        println!("SKIP a_device_without_the_extension_says_so: this one has it");
        return;
    }
    let object = manager.register_dmabuf(whole(exported(&host(1))), Access::Read, "frame").unwrap();
    let error = manager.acquire_timeout(&[&object], GENEROUS).unwrap_err().to_string();
    assert!(error.contains("VK_EXT_external_memory_dma_buf"), "{error}");
    assert!(manager.device().dmabuf_trial().is_err());
}

#[test]
fn what_is_exported_is_tracked_afterwards_or_not_exported() {
    let Some(fixture) = Fixture::new() else { return };
    let manager = manager(&fixture, Config::default());
    let host = host(4);
    // SAFETY: nobody changes the mapping; no references to it exist.
    let object = unsafe { manager.register_unwatched(host.range(), Access::Read) }.unwrap();
    drop(manager.acquire_timeout(&[&object], GENEROUS).unwrap());
    assert_eq!(object.coverage(), Some(Coverage::Manual(ManualReason::Asked)));
    let all = 0..host.size() as u64;
    match manager.export_dmabuf(&object, all.clone()) {
        Ok(buffer) => {
            assert_eq!((buffer.size(), buffer.sort()), (all.end, BufferSort::DmaBuf));
            assert_eq!(manager.stats().dmabufs_exported, 1);
        }
        Err(error) => {
            let no_device = Udmabuf::open().map(|_| ()).unwrap_err();
            println!("SKIPPED PART OF what_is_exported_is_tracked_afterwards_or_not_exported: {no_device}");
            if error.errno() == libc::EPERM {
                return; // this kernel can't watch shared memory, so nothing was exported
            }
            assert_eq!(error.errno(), no_device.errno(), "{error}");
        }
    }
    assert_eq!(object.state().unwrap(), State::Invalid, "what the device had was taken unwatched");
    drop(manager.acquire_timeout(&[&object], GENEROUS).unwrap());
    assert_eq!(object.coverage(), Some(Coverage::Watched));

    for bad in [0..0, 0..all.end + page_size() as u64, 1..page_size() as u64] {
        assert_eq!(manager.export_dmabuf(&object, bad).unwrap_err().errno(), libc::EINVAL);
    }
    let private = Memory::anonymous(2);
    // SAFETY: as above.
    let object = unsafe { manager.register(private.range(), Access::Read) }.unwrap();
    let error = manager.export_dmabuf(&object, 0..page_size() as u64).unwrap_err();
    assert!(error.to_string().contains("HostBuffer"), "{error}");
}

#[test]
fn shared_memory_goes_by_way_of_a_dma_buf_and_a_hole_in_it_is_noticed() {
    let test = "shared_memory_goes_by_way_of_a_dma_buf_and_a_hole_in_it_is_noticed";
    let Some(fixture) = Fixture::new() else { return };
    let mut config = Config::default();
    config.force = Some(Force::DmaBuf);
    let manager = manager(&fixture, config);
    if let Err(why) = manager.device().dmabuf_trial() {
        println!("SKIP {test}: {why:?}; {:?}", Udmabuf::open().err());
        return;
    }
    let host = host(4);
    // SAFETY: the device only reads, and the hole below is what this is about; no references to the memory exist.
    let object = unsafe { manager.register(host.range(), Access::Read) }.unwrap();
    let lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
    assert_eq!((lease.view(0).path, object.coverage()), (Path::DmaBuf, Some(Coverage::Watched)));
    assert_eq!(fixture.read(&lease.view(0), 0, lease.view(0).size), bytes_of(&host));
    drop(lease);
    let start = std::ptr::with_exposed_provenance_mut(host.range().start());
    // SAFETY: the pages become zeros, which no reference sees.
    assert_eq!(unsafe { libc::madvise(start, page_size(), libc::MADV_REMOVE) }, 0);
    assert_eq!(object.state().unwrap(), State::Invalid, "the dma-buf has the old pages, the file new ones");
    let lease = manager.acquire_timeout(&[&object], GENEROUS).unwrap();
    assert_eq!(fixture.read(&lease.view(0), 0, lease.view(0).size), bytes_of(&host));
    assert_eq!(fixture.read(&lease.view(0), 0, page_size() as u64), vec![0; page_size()]);
    let again = lease.view(0).buffer;
    // The unmapping takes nothing from the dma-buf: the device may go on reading what it had.
    let whole = bytes_of(&host);
    drop(host);
    assert_eq!(object.state().unwrap(), State::Invalid);
    assert_eq!(lease.view(0).buffer, again);
    assert_eq!(fixture.read(&lease.view(0), 0, lease.view(0).size), whole);
}
