//! Buffers from one process to another, and everything a hostile sender can do to a receiver.

use std::io::{IoSlice, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};
use nix::unistd::{ftruncate, pipe};
use pinfold_core::dmabuf::{
    CpuAccess, DmaBuf, DmaBufError, HandOverError, Layout, MESSAGE_LEN, Offered, receive, send,
};
use pinfold_core::{HostBuffer, HostBufferKind, HugePages, page_size};

const SOON: Duration = Duration::from_millis(50);
const LONG: Duration = Duration::from_secs(60);
const RGBA: Layout = Layout { format: 0x3432_4241, width: 16, height: 8, stride: 64, modifier: 0 };

/// A dma-buf of a host buffer where the kernel makes one for us, else the memory file itself.
fn stand_in(host: &HostBuffer) -> DmaBuf {
    let file = || DmaBuf::from_memory_file(host.as_fd().try_clone_to_owned().unwrap()).unwrap();
    host.export_dmabuf(0..host.size()).unwrap_or_else(|_| file())
}

fn offered(pages: usize) -> (HostBuffer, Offered) {
    let host = HostBuffer::new(pages * page_size(), HostBufferKind::Exportable, HugePages::No).unwrap();
    let buffer = stand_in(&host);
    (host, Offered { buffer, offset: 64, len: 512, layout: RGBA })
}

/// What goes over the wire for an offer.
fn bytes_of(offered: &Offered) -> Vec<u8> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    send(&ours, offered).unwrap();
    let mut bytes = vec![0; MESSAGE_LEN];
    std::io::Read::read_exact(&mut &theirs, &mut bytes).unwrap();
    bytes
}

fn post(socket: impl AsFd, bytes: &[u8], fds: &[RawFd]) {
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &rights[..0] } else { &rights[..] };
    sendmsg::<()>(socket.as_fd().as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::empty(), None).unwrap();
}

fn kinds() -> [(OwnedFd, OwnedFd); 2] {
    [SockType::Stream, SockType::SeqPacket]
        .map(|kind| socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap())
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn a_buffer_arrives_with_what_was_said_of_it() {
    for (ours, theirs) in kinds() {
        let (host, sent) = offered(2);
        host.write(64, b"pixels").unwrap();
        send(&ours, &sent).unwrap();
        let got = receive(&theirs, LONG).unwrap();
        assert_eq!((got.offset, got.len, got.layout), (64, 512, RGBA));
        assert_eq!((got.buffer.size(), got.buffer.sort()), (sent.buffer.size(), sent.buffer.sort()));
        assert_eq!(got.buffer.inode(), sent.buffer.inode());
        drop((host, sent)); // the sender's are gone, the bytes are not
        let map = got.buffer.map(CpuAccess::Read).unwrap();
        let mut seen = [0; 6];
        map.begin(CpuAccess::Read, LONG).unwrap().read(64, &mut seen).unwrap();
        assert_eq!(&seen, b"pixels");
    }
}

#[test]
fn a_message_in_pieces_is_put_together() {
    let (_host, sent) = offered(1);
    let bytes = bytes_of(&sent);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    post(&ours, &bytes[..1], &[sent.buffer.as_fd().as_raw_fd()]);
    ours.write_all(&bytes[1..]).unwrap();
    assert_eq!(receive(&theirs, LONG).unwrap().buffer.inode(), sent.buffer.inode());
}

/// Every word of the message with values that it can't have: each must be noticed, whatever it is.
#[test]
fn no_lie_about_a_buffer_is_believed() {
    let (_host, sent) = offered(2);
    let (good, fd) = (bytes_of(&sent), sent.buffer.as_fd().as_raw_fd());
    let size = sent.buffer.size();
    let lies: [(usize, &[u8]); 13] = [
        (0, b"x"),
        (8, &2_u32.to_le_bytes()),
        (12, &2_u32.to_le_bytes()),
        (16, &(size - 1).to_le_bytes()),
        (16, &(1_u64 << 50).to_le_bytes()),
        (24, &size.to_le_bytes()),
        (24, &u64::MAX.to_le_bytes()),
        (32, &0_u64.to_le_bytes()),
        (32, &u64::MAX.to_le_bytes()),
        (40, &0_u32.to_le_bytes()),
        (44, &0_u32.to_le_bytes()),
        (48, &u32::MAX.to_le_bytes()),
        (52, &u32::MAX.to_le_bytes()),
    ];
    for (at, lie) in lies {
        let mut bytes = good.clone();
        bytes[at..at + lie.len()].copy_from_slice(lie);
        let (ours, theirs) = UnixStream::pair().unwrap();
        post(&ours, &bytes, &[fd]);
        let error = receive(&theirs, LONG).unwrap_err();
        assert!(matches!(error, DmaBufError::HandOver(_)), "{lie:?} at {at}: {error}");
        assert!([libc::EPROTO, libc::EBADMSG].contains(&error.errno()), "{lie:?} at {at}: {error}");
    }
    let mut other_sort = good.clone();
    other_sort[12] ^= 1;
    let (ours, theirs) = UnixStream::pair().unwrap();
    post(&ours, &other_sort, &[fd]);
    assert!(matches!(receive(&theirs, LONG), Err(DmaBufError::NotADmaBuf { .. })));
}

#[test]
fn a_lie_of_our_own_is_not_even_sent() {
    let (_host, mut sent) = offered(1);
    sent.len = sent.buffer.size();
    let (ours, _theirs) = UnixStream::pair().unwrap();
    assert_eq!(send(&ours, &sent).unwrap_err().errno(), libc::EBADMSG);
}

#[test]
fn too_few_and_too_many_descriptors_are_refused() {
    let (_host, sent) = offered(1);
    let (bytes, fd) = (bytes_of(&sent), sent.buffer.as_fd().as_raw_fd());
    for count in [0, 2, 4, 5, 200] {
        for (ours, theirs) in kinds() {
            post(&ours, &bytes, &vec![fd; count]);
            let error = receive(&theirs, LONG).unwrap_err();
            let told = matches!(error, DmaBufError::HandOver(HandOverError::Descriptors(_) | HandOverError::CutOff(_)));
            assert!(told, "{count}: {error}");
        }
    }
}

#[test]
fn a_descriptor_that_is_no_buffer_is_refused() {
    let (_host, sent) = offered(1);
    let bytes = bytes_of(&sent);
    let (reading, _writing) = pipe().unwrap();
    let loose = memfd_create(c"loose", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
    ftruncate(&loose, i64::try_from(page_size()).unwrap()).unwrap();
    for sort in [0_u8, 1] {
        let mut bytes = bytes.clone();
        bytes[12] = sort;
        for fd in [reading.as_raw_fd(), loose.as_raw_fd(), std::io::stderr().as_raw_fd()] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            post(&ours, &bytes, &[fd]);
            let error = receive(&theirs, LONG).unwrap_err();
            // The loose file could be pulled from under a mapping.
            assert!(matches!(error, DmaBufError::NotADmaBuf { .. } | DmaBufError::Seal { .. }), "{error}");
        }
    }
}

#[test]
fn a_sender_that_stops_in_the_middle_is_not_waited_for() {
    let (_host, sent) = offered(1);
    let bytes = bytes_of(&sent);
    let (ours, theirs) = UnixStream::pair().unwrap();
    assert_eq!(receive(&theirs, SOON).unwrap_err().errno(), libc::ETIMEDOUT);
    post(&ours, &bytes[..20], &[sent.buffer.as_fd().as_raw_fd()]);
    assert_eq!(receive(&theirs, SOON).unwrap_err().errno(), libc::ETIMEDOUT);
    drop(ours);
    // A child that another test has forked has the socket, too, until it ends.
    assert_eq!(receive(&theirs, LONG).unwrap_err().errno(), libc::ECONNRESET);
}

#[test]
fn a_buffer_cannot_be_truncated_under_its_receiver() {
    let (host, sent) = offered(2);
    let (ours, theirs) = UnixStream::pair().unwrap();
    send(&ours, &sent).unwrap();
    let got = receive(&theirs, LONG).unwrap();
    let map = got.buffer.map(CpuAccess::Read).unwrap();
    let guard = map.begin(CpuAccess::Read, LONG).unwrap();
    // What the sender can still try while it is mapped: to cut it, and to punch a hole into it.
    assert!(ftruncate(host.as_fd(), 0).is_err());
    assert!(ftruncate(sent.buffer.as_fd(), 0).is_err());
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(host.as_fd(), hole, 0, i64::try_from(host.size()).unwrap()).unwrap();
    let mut all = vec![1; map.size()];
    guard.read(0, &mut all).unwrap(); // every page can be touched
    assert!(all.iter().all(|&byte| byte == 0));
}

#[test]
fn nothing_that_a_sender_does_leaks_a_descriptor() {
    // In a process of its own, as other tests open and close descriptors at the same time.
    let (_host, sent) = offered(1);
    let (bytes, fd) = (bytes_of(&sent), sent.buffer.as_fd().as_raw_fd());
    // SAFETY: the child only makes calls that allocate at worst, which the C library makes legal after a fork, and leaves by _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let before = open_descriptors();
        for round in 0..64_usize {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let mut bytes = bytes.clone();
            bytes[round] ^= 0xff;
            post(&ours, &bytes, &vec![fd; 1 + round % 8]);
            drop(receive(&theirs, SOON));
        }
        // With room for fewer descriptors than are sent, the kernel delivers some and cuts off the rest.
        let tight = before as u64 + 5;
        let limit = libc::rlimit { rlim_cur: tight, rlim_max: tight };
        // SAFETY: the call reads `limit`.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
        let (ours, theirs) = UnixStream::pair().unwrap();
        post(&ours, &bytes, &[fd; 4]);
        let cut = receive(&theirs, SOON).is_err();
        drop((ours, theirs));
        let code = if !cut { 2 } else { i32::from(open_descriptors() != before) };
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: `status` is a live integer that the call writes.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(libc::WEXITSTATUS(status), 0, "1: descriptors have been left open, 2: what was cut off was taken");
}

#[test]
fn a_sealed_memory_file_is_no_secret_way_to_write() {
    let host = HostBuffer::new(page_size(), HostBufferKind::Sealed, HugePages::No).unwrap();
    let buffer = DmaBuf::from_memory_file(host.as_fd().try_clone_to_owned().unwrap()).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let len = buffer.size();
    send(&ours, &Offered { buffer, offset: 0, len, layout: Layout::default() }).unwrap();
    let got = receive(&theirs, LONG).unwrap();
    assert_eq!(got.buffer.map(CpuAccess::Write).unwrap_err().errno(), libc::EPERM);
    host.write(0, b"seen").unwrap();
    let mut seen = [0; 4];
    got.buffer.map(CpuAccess::Read).unwrap().begin(CpuAccess::Read, LONG).unwrap().read(0, &mut seen).unwrap();
    assert_eq!(&seen, b"seen");
}
