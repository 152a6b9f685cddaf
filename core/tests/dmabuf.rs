//! Dma-bufs against the kernel: every recorded answer of a stock kernel 6.12 again, and what is ours on top.
//!
//! Most of this needs `/dev/udmabuf`, `/dev/dma_heap/system` or a render node, which `scripts/test-vm` has.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{Whence, ftruncate, lseek, pipe};
use pinfold_core::dmabuf::{CpuAccess, DmaBuf, DmaBufError, Heap, HeapBudget, MemoryPart, SyncFile, Udmabuf};
use pinfold_core::{HostBuffer, HostBufferKind, HugePages, page_size};

const GOLDEN: &str = include_str!("golden/dma-buf-6.12.txt");
const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_millis(20);

fn page() -> u64 {
    page_size() as u64
}

/// Says that the calling test does not run, and why.
fn skip(test: &str, why: impl std::fmt::Display) {
    println!("SKIP {test}: {why}");
}

/// The device, or the reason why there is none: that of a kernel without it, or of a user who may not open it.
fn udmabuf(test: &str) -> Option<Udmabuf> {
    match Udmabuf::open() {
        Ok(device) => Some(device),
        Err(error @ (DmaBufError::NoDevice { .. } | DmaBufError::Denied { .. })) => {
            skip(test, error);
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn buffer(pages: usize) -> HostBuffer {
    HostBuffer::new(pages * page_size(), HostBufferKind::Exportable, HugePages::No).unwrap()
}

fn memory_file(pages: u64, seals: SealFlag) -> OwnedFd {
    let file = memfd_create(c"golden", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
    ftruncate(&file, i64::try_from(pages * page()).unwrap()).unwrap();
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
    file
}

/// What the kernel answered: `OK`, or the name of the errno.
fn answer<T>(result: Result<T, DmaBufError>) -> String {
    result.map_or_else(|error| format!("{:?}", Errno::from_raw(error.errno())), |_| "OK".into())
}

/// The same of a call that is not ours.
fn raw<T>(result: nix::Result<T>) -> String {
    result.map_or_else(|errno| format!("{errno:?}"), |_| "OK".into())
}

/// Rows of the recording, each to be replayed or left out with a reason.
struct Golden(HashMap<&'static str, &'static str>);

impl Golden {
    fn part(prefix: &str) -> Self {
        let lines = GOLDEN.lines().filter_map(|line| line.strip_prefix("T "));
        let rows = lines.filter(|line| line.starts_with(prefix)).map(|line| {
            let (name, rest) = line.split_once(char::is_whitespace).unwrap();
            (name, rest.split_once("rc=").unwrap().1)
        });
        Self(rows.collect())
    }

    /// The row of this name must have had this outcome, and is done.
    fn same(&mut self, name: &str, got: &str) {
        let want = self.0.remove(name).unwrap_or_else(|| panic!("no row {name}, or twice"));
        let (rc, outcome) = want.split_once(' ').unwrap_or((want, ""));
        let outcome = if outcome.is_empty() { rc } else { outcome };
        assert_eq!(got, outcome, "{name}");
    }

    fn leave(&mut self, name: &str, why: &str) {
        assert!(self.0.remove(name).is_some(), "no row {name}: {why}");
    }

    fn end(self) {
        assert!(self.0.is_empty(), "rows without a counterpart: {:?}", self.0);
    }
}

/// `DMA_BUF_IOCTL_SYNC` with flags that nothing of ours can say.
mod raw_sync {
    #[repr(C)]
    pub(super) struct Flags(pub(super) u64);
    nix::ioctl_write_ptr!(ask, b'b', 0, Flags);
}

fn sync(buffer: &DmaBuf, flags: u64) -> nix::Result<i32> {
    // SAFETY: the call reads one word.
    unsafe { raw_sync::ask(buffer.as_fd().as_raw_fd(), &raw_sync::Flags(flags)) }
}

#[test]
fn udmabuf_answers_as_recorded() {
    let Some(device) = udmabuf("udmabuf_answers_as_recorded") else { return };
    let mut golden = Golden::part("udmabuf.");
    golden.same("udmabuf.open", "OK");
    let solid = SealFlag::F_SEAL_SHRINK;
    let export = |file: &OwnedFd, bytes| device.export(&[MemoryPart { file: file.as_fd(), bytes }]);
    let good = memory_file(4, solid);
    let unsealed = memory_file(4, SealFlag::empty());
    golden.same("udmabuf.create.unsealed", &answer(export(&unsealed, 0..page())));
    golden.same("udmabuf.create.offset_unaligned", &answer(export(&good, 1..page() + 1)));
    golden.same("udmabuf.create.size0", &answer(export(&good, 0..0)));
    golden.same("udmabuf.create.size_unaligned", &answer(export(&good, 0..page() - 1)));
    golden.same("udmabuf.create.past_end", &answer(export(&good, 0..5 * page())));
    golden.same(
        "udmabuf.create.sealed_write",
        &answer(export(&memory_file(4, solid | SealFlag::F_SEAL_WRITE), 0..page())),
    );

    let host = buffer(4);
    let dmabuf = host.export_dmabuf(page_size()..3 * page_size());
    golden.same("udmabuf.create.ok", &answer(dmabuf.as_ref().map_err(|_| DmaBufError::NotExportable(""))));
    let dmabuf = dmabuf.unwrap();
    assert_eq!(dmabuf.size(), 2 * page());
    if page_size() == 4096 {
        golden.same("udmabuf.lseek_end", "OK");
    } else {
        golden.leave("udmabuf.lseek_end", "recorded with pages of 4 KiB");
    }
    golden.same("udmabuf.lseek_mid", &raw(lseek(dmabuf.as_fd(), 1, Whence::SeekSet)));
    let map = dmabuf.map(CpuAccess::Write);
    golden.same("udmabuf.mmap", &answer(map.as_ref().map_err(|_| DmaBufError::NotExportable(""))));
    let map = map.unwrap();

    host.write(page_size(), b"from the memory file").unwrap();
    let mut seen = [0; 20];
    map.begin(CpuAccess::Read, SOON).unwrap().read(0, &mut seen).unwrap();
    assert_eq!(&seen, b"from the memory file");
    map.begin(CpuAccess::Write, SOON).unwrap().write(page_size(), b"from the dma-buf").unwrap();
    host.read(2 * page_size(), &mut seen[..16]).unwrap();
    golden.same("udmabuf.coherent_with_memfd", if &seen[..16] == b"from the dma-buf" { "1" } else { "0" });

    golden.same("udmabuf.sync_start", &raw(sync(&dmabuf, 3)));
    golden.same("udmabuf.sync_end", &raw(sync(&dmabuf, 3 | 4)));
    golden.same("udmabuf.sync_flags0", &raw(sync(&dmabuf, 0)));
    golden.same("udmabuf.sync_badflag", &raw(sync(&dmabuf, 0x10)));
    golden.same("udmabuf.set_name", &answer(dmabuf.set_name("a name of thirty-one bytes, yes")));
    golden.same("udmabuf.set_name_32", &answer(dmabuf.set_name("a name of thirty-two bytes, sic!")));
    let mut fds = [PollFd::new(dmabuf.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).unwrap();
    golden.same("udmabuf.poll", &format!("{:#x}", fds[0].revents().unwrap().bits()));
    golden.end();
}

#[test]
fn the_system_heap_answers_as_recorded() {
    let budget = HeapBudget::new(64 * MIB);
    let heap = match Heap::open("system", &budget) {
        Ok(heap) => heap,
        Err(error @ (DmaBufError::NoDevice { .. } | DmaBufError::Denied { .. })) => {
            return skip("the_system_heap_answers_as_recorded", error);
        }
        Err(error) => panic!("{error}"),
    };
    let mut golden = Golden::part("dma_heap.");
    golden.same("dma_heap.open", "OK");
    golden.same("dma_heap.len0", &answer(heap.allocate(0)));
    for name in ["fd_nonzero", "heap_flags1", "bad_fd_flags"] {
        golden.leave(&format!("dma_heap.{name}"), "nothing of ours can say this");
    }
    let made = heap.allocate(5000);
    golden.same("dma_heap.alloc_5000", &answer(made.as_ref().map_err(|_| DmaBufError::NotExportable(""))));
    let made = made.unwrap();
    if page_size() == 4096 {
        golden.same("dma_heap.size", "OK");
    } else {
        golden.leave("dma_heap.size", "recorded with pages of 4 KiB");
    }
    assert_eq!(made.size(), 5000_u64.next_multiple_of(page()));
    let map = made.map(CpuAccess::Write);
    golden.same("dma_heap.mmap", &answer(map.as_ref().map_err(|_| DmaBufError::NotExportable(""))));
    let map = map.unwrap();
    let mut bytes = vec![1; map.size()];
    let mut guard = map.begin(CpuAccess::Write, SOON).unwrap();
    guard.read(0, &mut bytes).unwrap();
    golden.same("dma_heap.zeroed", if bytes.iter().all(|&byte| byte == 0) { "1" } else { "0" });
    let error = guard.write(map.size(), &[1]).unwrap_err();
    golden.same("dma_heap.mmap_past_end", &answer::<()>(Err(error)));
    golden.end();

    assert!(Heap::names().contains(&"system".to_owned()));
    assert_eq!(budget.left(), 64 * MIB - made.size());
    assert_eq!(heap.allocate(64 * MIB).unwrap_err().errno(), libc::ENOMEM);
    let endless = HeapBudget::new(u64::MAX);
    let error = Heap::open("system", &endless).unwrap().allocate(1 << 50).unwrap_err();
    assert!(error.to_string().contains("MemAvailable") && error.errno() == libc::ENOMEM, "{error}");
    assert_eq!(endless.left(), u64::MAX, "what was refused is given back");
}

#[test]
fn device_nodes_are_as_recorded() {
    let mut golden = Golden::part("dev.dri.");
    let node = |name: &str| OpenOptions::new().read(true).write(true).open(Path::new("/dev/dri").join(name));
    match (node("card0"), node("renderD128")) {
        (Ok(_), Ok(_)) => {
            golden.same("dev.dri.card0", "OK");
            golden.same("dev.dri.renderD128", "OK");
            golden.end();
        }
        (card, _) => skip("device_nodes_are_as_recorded", format_args!("/dev/dri/card0: {:?}", card.err())),
    }
}

#[test]
fn a_missing_device_is_told_with_the_option_that_brings_it() {
    let error = Heap::open("no-such-heap", &HeapBudget::new(1)).unwrap_err();
    assert!(error.to_string().contains("CONFIG_DMABUF_HEAPS_SYSTEM") && error.errno() == libc::ENOENT, "{error}");
    if !Path::new("/dev/udmabuf").exists() {
        let error = Udmabuf::open().unwrap_err();
        assert!(error.to_string().contains("CONFIG_UDMABUF") && error.errno() == libc::ENOENT, "{error}");
    }
    for name in ["", "..", "../udmabuf", "a\0b"] {
        assert!(matches!(Heap::open(name, &HeapBudget::new(1)), Err(DmaBufError::Name { .. })), "{name:?}");
    }
}

#[test]
fn a_seal_that_is_in_the_way_is_told_by_name_with_or_without_the_device() {
    let sealed = HostBuffer::new(page_size(), HostBufferKind::Sealed, HugePages::No).unwrap();
    let error = sealed.export_dmabuf(0..page_size()).unwrap_err();
    assert!(error.to_string().contains("F_SEAL_FUTURE_WRITE") && error.errno() == libc::EINVAL, "{error}");
    let error = buffer(1).export_dmabuf(0..2 * page_size()).unwrap_err();
    assert!(matches!(error, DmaBufError::Part { .. }), "{error}");
    let error = DmaBuf::from_memory_file(memory_file(1, SealFlag::F_SEAL_GROW)).unwrap_err();
    assert!(error.to_string().contains("F_SEAL_SHRINK"), "{error}");
}

#[test]
fn what_is_no_dma_buf_is_refused_and_closed() {
    let (reading, _writing) = pipe().unwrap();
    let number = reading.as_raw_fd();
    let error = DmaBuf::from_fd(reading).unwrap_err();
    assert!(matches!(error, DmaBufError::NotADmaBuf { .. }) && error.errno() == libc::EINVAL, "{error}");
    // Another test may have a descriptor of that number by now, but no pipe.
    let there = std::fs::read_link(format!("/proc/self/fd/{number}")).unwrap_or_default();
    assert!(!there.to_string_lossy().starts_with("pipe:"), "{there:?}");
    for other in [memory_file(1, SealFlag::F_SEAL_SHRINK), File::open("/proc/self/exe").unwrap().into()] {
        assert!(matches!(DmaBuf::from_fd(other), Err(DmaBufError::NotADmaBuf { .. })));
    }
    let program = File::open("/proc/self/exe").unwrap();
    // It may lie in shared memory; then it is the seal that it lacks.
    let refused = DmaBuf::from_memory_file(program.into()).unwrap_err();
    assert!(matches!(refused, DmaBufError::NotADmaBuf { .. } | DmaBufError::Seal { .. }), "{refused}");
    let (reading, _writing) = pipe().unwrap();
    assert_eq!(SyncFile::from_fd(reading).unwrap_err().errno(), libc::ENOTTY);
}

#[test]
fn a_memory_file_stands_in_for_a_dma_buf() {
    let host = buffer(2);
    let stand_in = DmaBuf::from_memory_file(host.as_fd().try_clone_to_owned().unwrap()).unwrap();
    assert_eq!(stand_in.size(), 2 * page());
    let map = stand_in.map(CpuAccess::Write).unwrap();
    map.begin(CpuAccess::Write, SOON).unwrap().write(5, b"through the stand-in").unwrap();
    let mut seen = [0; 20];
    host.read(5, &mut seen).unwrap();
    assert_eq!(&seen, b"through the stand-in");
    assert!(stand_in.wait(CpuAccess::Write, Duration::ZERO).unwrap(), "nobody uses a memory file");
    assert_eq!(stand_in.export_sync_file(CpuAccess::Read).unwrap_err().errno(), libc::ENOTTY);
}

#[test]
fn a_bracket_for_reading_writes_nothing() {
    let host = buffer(1);
    let stand_in = DmaBuf::from_memory_file(host.as_fd().try_clone_to_owned().unwrap()).unwrap();
    let map = stand_in.map(CpuAccess::Read).unwrap();
    assert_eq!(map.begin(CpuAccess::Write, SOON).unwrap_err().errno(), libc::EACCES);
    let mut guard = map.begin(CpuAccess::Read, SOON).unwrap();
    assert_eq!(guard.write(0, &[1]).unwrap_err().errno(), libc::EACCES);
    assert_eq!(guard.read(page_size() - 1, &mut [0; 2]).unwrap_err().errno(), libc::EINVAL);
}

#[test]
fn parts_of_several_files_become_one_buffer() {
    let test = "parts_of_several_files_become_one_buffer";
    let Some(device) = udmabuf(test) else { return };
    let (a, b) = (buffer(3), buffer(2));
    a.write(2 * page_size(), b"second").unwrap();
    b.write(0, b"first").unwrap();
    let part = |host: &HostBuffer, first: u64, pages: u64| {
        (host.as_fd().try_clone_to_owned().unwrap(), first * page()..(first + pages) * page())
    };
    let parts = [part(&b, 0, 1), part(&a, 2, 1)];
    let parts = parts.each_ref().map(|(file, bytes)| MemoryPart { file: file.as_fd(), bytes: bytes.clone() });
    let dmabuf = device.export(&parts).unwrap();
    assert_eq!(dmabuf.size(), 2 * page());
    let map = dmabuf.map(CpuAccess::Read).unwrap();
    let guard = map.begin(CpuAccess::Read, SOON).unwrap();
    let mut seen = [0; 6];
    guard.read(0, &mut seen[..5]).unwrap();
    assert_eq!(&seen[..5], b"first");
    guard.read(page_size(), &mut seen).unwrap();
    assert_eq!(&seen, b"second");
    assert_eq!(device.export(&[]).unwrap_err().errno(), libc::EINVAL);
}

#[test]
fn a_buffer_above_the_limit_of_the_module_is_told_with_its_parameter() {
    let Some(_) = udmabuf("a_buffer_above_the_limit_of_the_module_is_told_with_its_parameter") else { return };
    let limit = std::fs::read_to_string("/sys/module/udmabuf/parameters/size_limit_mb").unwrap();
    let limit: usize = limit.trim().parse().unwrap();
    let large = HostBuffer::new((limit + 1) << 20, HostBufferKind::Exportable, HugePages::No).unwrap();
    let error = large.export_dmabuf(0..large.size()).unwrap_err();
    assert!(error.to_string().contains("udmabuf.size_limit_mb") && error.errno() == libc::EINVAL, "{error}");
}

#[test]
fn a_hole_in_the_file_leaves_the_dma_buf_with_the_old_pages() {
    let Some(_) = udmabuf("a_hole_in_the_file_leaves_the_dma_buf_with_the_old_pages") else { return };
    let host = buffer(1);
    host.write(0, b"old").unwrap();
    let dmabuf = host.export_dmabuf(0..page_size()).unwrap();
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(host.as_fd(), hole, 0, i64::try_from(page()).unwrap()).unwrap();
    let read = |dmabuf: &DmaBuf| {
        let map = dmabuf.map(CpuAccess::Read).unwrap();
        let mut seen = [9; 3];
        map.begin(CpuAccess::Read, SOON).unwrap().read(0, &mut seen).unwrap();
        seen
    };
    let mut seen = [9; 3];
    host.read(0, &mut seen).unwrap();
    assert_eq!((seen, &read(&dmabuf)), ([0; 3], b"old"));
    assert_eq!(read(&host.export_dmabuf(0..page_size()).unwrap()), [0; 3], "a new export has the new pages");
    host.write(0, b"new").unwrap();
    drop(host);
    assert_eq!(&read(&dmabuf), b"old", "and it stays when the file goes");
}

/// Fences that are signalled when a test says so, in a buffer of the kernel's virtual device (`drm/vgem_drm.h`).
mod vgem {
    use super::*;

    #[repr(C)]
    #[derive(Default)]
    struct CreateDumb {
        height: u32,
        width: u32,
        bpp: u32,
        flags: u32,
        handle: u32,
        pitch: u32,
        size: u64,
    }
    #[repr(C)]
    struct Prime {
        handle: u32,
        flags: u32,
        fd: i32,
    }
    #[repr(C)]
    struct Attach {
        handle: u32,
        flags: u32,
        fence: u32,
        pad: u32,
    }
    #[repr(C)]
    struct Signal {
        fence: u32,
        flags: u32,
    }
    nix::ioctl_readwrite!(create_dumb, b'd', 0xb2, CreateDumb);
    nix::ioctl_readwrite!(prime_export, b'd', 0x2d, Prime);
    nix::ioctl_readwrite!(fence_attach, b'd', 0x41, Attach);
    nix::ioctl_write_ptr!(fence_signal, b'd', 0x42, Signal);

    pub(super) struct Vgem {
        node: File,
        handle: u32,
        fence: u32,
    }

    impl Vgem {
        /// A buffer with a fence that its writer has not signalled yet.
        pub(super) fn busy() -> Result<(Self, DmaBuf), String> {
            let node = OpenOptions::new().read(true).write(true).open("/dev/dri/card0");
            let node = node.map_err(|error| format!("/dev/dri/card0: {error}"))?;
            let fd = node.as_raw_fd();
            let mut dumb = CreateDumb { height: 16, width: 64, bpp: 32, ..Default::default() };
            // SAFETY: the call reads and writes `dumb`.
            unsafe { create_dumb(fd, &raw mut dumb) }.map_err(|errno| format!("/dev/dri/card0 is no vgem: {errno}"))?;
            let mut prime = Prime { handle: dumb.handle, flags: (libc::O_RDWR | libc::O_CLOEXEC) as u32, fd: -1 };
            // SAFETY: the call reads and writes `prime`.
            unsafe { prime_export(fd, &raw mut prime) }.unwrap();
            // SAFETY: the call has just made this descriptor.
            let buffer = DmaBuf::from_fd(unsafe { OwnedFd::from_raw_fd(prime.fd) }).unwrap();
            let mut vgem = Self { node, handle: dumb.handle, fence: 0 };
            vgem.use_again()?;
            Ok((vgem, buffer))
        }

        /// Attaches a new fence, as a writer.
        pub(super) fn use_again(&mut self) -> Result<(), String> {
            let mut attach = Attach { handle: self.handle, flags: 1, fence: 0, pad: 0 };
            // SAFETY: the call reads and writes `attach`.
            unsafe { fence_attach(self.node.as_raw_fd(), &raw mut attach) }
                .map_err(|errno| format!("no vgem: {errno}"))?;
            self.fence = attach.fence;
            Ok(())
        }

        pub(super) fn signal(&self) {
            // SAFETY: the call reads the structure. A fence that has timed out meanwhile (after 10 s) answers an error, which the test then sees.
            unsafe { fence_signal(self.node.as_raw_fd(), &Signal { fence: self.fence, flags: 0 }) }.unwrap();
        }
    }
}

#[test]
fn a_bracket_waits_for_the_writers_fence_and_no_longer_than_its_limit() {
    let (mut vgem, buffer) = match vgem::Vgem::busy() {
        Ok(made) => made,
        Err(why) => return skip("a_bracket_waits_for_the_writers_fence_and_no_longer_than_its_limit", why),
    };
    let map = buffer.map(CpuAccess::Write).unwrap();
    assert!(matches!(map.begin(CpuAccess::Read, SOON), Err(DmaBufError::Busy(limit)) if limit == SOON));
    assert!(!buffer.wait(CpuAccess::Write, Duration::ZERO).unwrap());
    std::thread::scope(|threads| {
        let bracket = threads.spawn(|| map.begin(CpuAccess::Read, Duration::from_secs(60)).map(|_| ()));
        vgem.signal();
        bracket.join().unwrap().unwrap();
    });
    assert!(buffer.wait(CpuAccess::Write, Duration::ZERO).unwrap());
    vgem.use_again().unwrap();
    assert!(!buffer.wait(CpuAccess::Read, Duration::ZERO).unwrap());
    vgem.signal();
}

#[test]
fn a_fence_travels_as_a_sync_file_from_one_buffer_to_another() {
    let test = "a_fence_travels_as_a_sync_file_from_one_buffer_to_another";
    let Some(_) = udmabuf(test) else { return };
    let (vgem, busy) = match vgem::Vgem::busy() {
        Ok(made) => made,
        Err(why) => return skip(test, why),
    };
    let fence = busy.export_sync_file(CpuAccess::Read).unwrap();
    assert!(!fence.is_signalled().unwrap() && !fence.wait(SOON).unwrap());

    let other = buffer(1).export_dmabuf(0..page_size()).unwrap();
    assert!(other.wait(CpuAccess::Write, Duration::ZERO).unwrap());
    other.import_sync_file(&fence, CpuAccess::Write).unwrap();
    assert!(!other.wait(CpuAccess::Read, SOON).unwrap(), "its readers wait for the writer of the first");
    assert!(matches!(other.map(CpuAccess::Read).unwrap().begin(CpuAccess::Read, SOON), Err(DmaBufError::Busy(_))));

    vgem.signal();
    assert!(fence.wait(Duration::from_secs(60)).unwrap() && fence.is_signalled().unwrap());
    assert!(other.wait(CpuAccess::Write, Duration::from_secs(60)).unwrap());
    assert!(busy.export_sync_file(CpuAccess::Write).unwrap().is_signalled().unwrap(), "nothing left to wait for");
}
