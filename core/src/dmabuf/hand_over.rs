//! Over: a buffer goes to another process, with what has to be known about it.
//!
//! **Problem.** The receiver believes nothing: the other side may lie about sizes, send another descriptor, none, or twenty, or stop in the middle.
//!
//! **Law.** What [`receive`] returns is true of the descriptor that came with it. Every descriptor that arrives is owned from the moment it
//! arrives. Nothing is waited for beyond the limit.
//!
//! **Protocol.** One message of [`MESSAGE_LEN`] bytes with exactly one descriptor. All numbers are little-endian.
//!
//! | bytes | field |
//! | --- | --- |
//! | 0..8 | `PFDMABUF` |
//! | 8..12 | version: 1. Everything behind it belongs to the version |
//! | 12..16 | what the descriptor is: 0 a dma-buf, 1 a memory file |
//! | 16..24 | size of the whole buffer |
//! | 24..32, 32..40 | offset and length of what is meant |
//! | 40..44 | format: a DRM fourcc, 0 for plain bytes |
//! | 44..48, 48..52, 52..56 | width, height in pixels, stride in bytes; 0 for plain bytes |
//! | 56..64 | DRM format modifier; 0 (linear) for plain bytes |

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use thiserror::Error;

use super::sync::wait_for;
use super::{BufferSort, DmaBuf, DmaBufError};

/// Bytes of a message.
pub const MESSAGE_LEN: usize = 64;
const MAGIC: [u8; 8] = *b"PFDMABUF";
const VERSION: u32 = 1;
/// `DRM_FORMAT_MOD_LINEAR`.
const LINEAR: u64 = 0;
/// More descriptors than a message has, so that those too many are seen, and closed.
const ROOM: usize = 4;

/// Why what came is not what was promised.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum HandOverError {
    /// Not our protocol, or cut off. `EPROTO`.
    #[error("the other side sent {0} bytes that are no hand-over message")]
    Foreign(usize),
    /// Another version. `EPROTO`.
    #[error("the other side speaks version {0} of the hand-over, this one version {VERSION}")]
    Version(u32),
    /// Not exactly one descriptor. `EPROTO`.
    #[error("{0} descriptors came with the message; one belongs to it")]
    Descriptors(usize),
    /// A message that is too long, or more descriptors than one message has, or than this process has room for. `EPROTO`.
    #[error("the message was cut off, with {0} of its descriptors; it is too long, or there is no room (ulimit -n)")]
    CutOff(usize),
    /// A field that can't be, or isn't true of the descriptor. `EBADMSG`.
    #[error("the other side says that {field} is {said}; that can't be, as {because}")]
    Untrue {
        /// Which field.
        field: &'static str,
        /// What it says.
        said: u64,
        /// What is known.
        because: &'static str,
    },
    /// The other side is gone. `ECONNRESET`.
    #[error("the other side closed the connection")]
    Closed,
    /// Nothing, or not all of it, came in time. `ETIMEDOUT`.
    #[error("no whole message came within {0:?}")]
    Late(Duration),
}

impl HandOverError {
    /// The errno that says the same.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Foreign(_) | Self::Version(_) | Self::Descriptors(_) | Self::CutOff(_) => libc::EPROTO,
            Self::Untrue { .. } => libc::EBADMSG,
            Self::Closed => libc::ECONNRESET,
            Self::Late(_) => libc::ETIMEDOUT,
        }
    }
}

/// How the bytes are to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Layout {
    /// DRM fourcc of the pixels; 0 for plain bytes.
    pub format: u32,
    /// Pixels in a row; 0 for plain bytes.
    pub width: u32,
    /// Rows; 0 for plain bytes.
    pub height: u32,
    /// Bytes from one row to the next; 0 for plain bytes, and where the modifier says it.
    pub stride: u32,
    /// DRM format modifier; 0 is linear.
    pub modifier: u64,
}

/// A part of a buffer, and how to read it.
#[derive(Debug, Clone)]
pub struct Offered {
    /// The buffer.
    pub buffer: DmaBuf,
    /// Where the part starts, in bytes.
    pub offset: u64,
    /// How many bytes it has.
    pub len: u64,
    /// How to read them.
    pub layout: Layout,
}

impl Offered {
    fn to_bytes(&self) -> [u8; MESSAGE_LEN] {
        let mut bytes = [0; MESSAGE_LEN];
        let sort = u32::from(self.buffer.sort() == BufferSort::MemoryFile);
        let Layout { format, width, height, stride, modifier } = self.layout;
        bytes[..8].copy_from_slice(&MAGIC);
        for (at, value) in [(8, VERSION), (12, sort), (40, format), (44, width), (48, height), (52, stride)] {
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        for (at, value) in [(16, self.buffer.size()), (24, self.offset), (32, self.len), (56, modifier)] {
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    /// Judges a message and its descriptor.
    fn from_parts(bytes: &[u8], fd: OwnedFd) -> Result<Self, DmaBufError> {
        let claims = Claims::decode(bytes)?;
        let buffer = match claims.sort {
            BufferSort::DmaBuf => DmaBuf::from_fd(fd)?,
            BufferSort::MemoryFile => DmaBuf::from_memory_file(fd)?,
        };
        claims.check(buffer.size())?;
        Ok(Self { buffer, offset: claims.offset, len: claims.len, layout: claims.layout })
    }
}

/// What a message says, before anybody knows whether it is true.
struct Claims {
    sort: BufferSort,
    size: u64,
    offset: u64,
    len: u64,
    layout: Layout,
}

impl Claims {
    fn decode(bytes: &[u8]) -> Result<Self, HandOverError> {
        let Some(bytes) = bytes.first_chunk::<MESSAGE_LEN>().filter(|_| bytes.len() == MESSAGE_LEN) else {
            return Err(HandOverError::Foreign(bytes.len()));
        };
        let u32_at = |at: usize| u32::from_le_bytes(*bytes[at..].first_chunk().expect("the length is checked"));
        let u64_at = |at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().expect("the length is checked"));
        if bytes[..8] != MAGIC {
            return Err(HandOverError::Foreign(bytes.len()));
        }
        if u32_at(8) != VERSION {
            return Err(HandOverError::Version(u32_at(8)));
        }
        let sort = match u32_at(12) {
            0 => BufferSort::DmaBuf,
            1 => BufferSort::MemoryFile,
            other => return Err(untrue("the sort of the descriptor", other.into(), "there are two, 0 and 1")),
        };
        let layout = Layout {
            format: u32_at(40),
            width: u32_at(44),
            height: u32_at(48),
            stride: u32_at(52),
            modifier: u64_at(56),
        };
        Ok(Self { sort, size: u64_at(16), offset: u64_at(24), len: u64_at(32), layout })
    }

    /// Whether a buffer of `size` bytes can be what is claimed.
    fn check(&self, size: u64) -> Result<(), HandOverError> {
        let Layout { format, width, height, stride, modifier } = self.layout;
        if self.size != size {
            return Err(untrue("its size", self.size, "the kernel says otherwise"));
        }
        if self.len == 0 || self.offset.checked_add(self.len).is_none_or(|end| end > size) {
            return Err(untrue("its length", self.len, "the buffer ends before, or it is 0"));
        }
        if format == 0 {
            let image = u64::from(width | height | stride) | modifier;
            return if image == 0 { Ok(()) } else { Err(untrue("its layout", image, "plain bytes have none")) };
        }
        if width == 0 || height == 0 {
            return Err(untrue("its width or height", 0, "an image has pixels"));
        }
        // How many bytes a row has at least, only the format knows; but rows can't be shorter than one bit a pixel, and must all be inside.
        let rows = u64::from(stride) * u64::from(height);
        if modifier == LINEAR && (stride < width.div_ceil(8) || rows > self.len) {
            return Err(untrue(
                "its stride",
                stride.into(),
                "the rows don't fit into its length, or not into each other",
            ));
        }
        Ok(())
    }
}

fn untrue(field: &'static str, said: u64, because: &'static str) -> HandOverError {
    HandOverError::Untrue { field, said, because }
}

/// Sends a part of a buffer. The receiver gets a descriptor of its own: what is here may be closed.
///
/// # Errors
/// [`HandOverError::Untrue`] for an offer that no receiver would take; [`DmaBufError::System`].
pub fn send(socket: impl AsFd, offered: &Offered) -> Result<(), DmaBufError> {
    let bytes = offered.to_bytes();
    Claims::decode(&bytes)?.check(offered.buffer.size())?;
    let fds = [offered.buffer.as_fd().as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    let fd = socket.as_fd().as_raw_fd();
    let sent = loop {
        match sendmsg::<()>(fd, &[IoSlice::new(&bytes)], &rights, MsgFlags::MSG_NOSIGNAL, None) {
            Err(Errno::EINTR) => {}
            sent => break sent.map_err(DmaBufError::system("sendmsg", "a buffer"))?,
        }
    };
    if sent == bytes.len() {
        return Ok(());
    }
    let source = io::Error::new(io::ErrorKind::WriteZero, "the socket took a part of the message");
    Err(DmaBufError::System { call: "sendmsg", what: "a buffer", source })
}

/// Receives a part of a buffer, within `limit`. Everything the sender says has been checked against the descriptor.
///
/// # Errors
/// [`DmaBufError::HandOver`], [`DmaBufError::NotADmaBuf`], [`DmaBufError::Seal`], [`DmaBufError::System`]. Whatever came has been closed. A stream
/// can't be used further, as nobody knows where its next message starts.
pub fn receive(socket: impl AsFd, limit: Duration) -> Result<Offered, DmaBufError> {
    let socket = socket.as_fd();
    let deadline = Instant::now() + limit;
    let (mut bytes, mut len, mut fds) = ([0; MESSAGE_LEN], 0, Vec::new());
    while len < MESSAGE_LEN {
        if !wait_for(socket, PollFlags::POLLIN, deadline.saturating_duration_since(Instant::now()))? {
            return Err(HandOverError::Late(limit).into());
        }
        match take(socket, &mut bytes[len..], &mut fds) {
            Ok(0) if len == 0 => return Err(HandOverError::Closed.into()),
            Ok(0) => return Err(HandOverError::Foreign(len).into()),
            Ok(more) => len += more,
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(Errno::EMSGSIZE) => return Err(HandOverError::CutOff(fds.len()).into()),
            Err(errno) => return Err(DmaBufError::system("recvmsg", "a buffer")(errno)),
        }
        if fds.len() > 1 {
            return Err(HandOverError::Descriptors(fds.len()).into());
        }
    }
    Claims::decode(&bytes)?; // before the descriptor is looked at: another version may send none
    match fds.pop() {
        Some(fd) => Offered::from_parts(&bytes, fd),
        None => Err(HandOverError::Descriptors(0).into()),
    }
}

/// Takes what there is. The descriptors are ours from here on, also if this is an error: a wrapper that hides them from a message that was cut off
/// (which happens when the process has no room for all) would leak them at the sender's will.
fn take(socket: BorrowedFd<'_>, into: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<usize, Errno> {
    let mut space = nix::cmsg_space!([RawFd; ROOM]);
    let mut slice = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    // SAFETY: a `msghdr` of zeros is one without address, data and control messages.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut slice, 1);
    (message.msg_control, message.msg_controllen) = (space.as_mut_ptr().cast(), space.capacity());
    let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
    // SAFETY: `message` points to a live slice and to control space of the lengths it says, which only this call writes.
    let got = Errno::result(unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) })?;
    // SAFETY: the kernel has filled in `message`.
    let mut control = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !control.is_null() {
        // SAFETY: the macros answer null or a whole header inside the control space; its bytes are the kernel's.
        let header = unsafe { control.read_unaligned() };
        if (header.cmsg_level, header.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: `control` is such a header.
            let data = unsafe { libc::CMSG_DATA(control) };
            let bytes = header.cmsg_len - (data.addr() - control.addr());
            for index in 0..bytes / size_of::<RawFd>() {
                // SAFETY: the header's length says that this descriptor is there.
                let fd =
                    unsafe { data.wrapping_add(index * size_of::<RawFd>()).cast::<[u8; size_of::<RawFd>()]>().read() };
                let fd = RawFd::from_ne_bytes(fd);
                // SAFETY: the kernel has just put it into this process for us, and nobody else knows it.
                fds.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
        // SAFETY: both are what the calls above made of them.
        control = unsafe { libc::CMSG_NXTHDR(&raw const message, control) };
    }
    let cut = message.msg_flags & (libc::MSG_CTRUNC | libc::MSG_TRUNC) != 0;
    if cut { Err(Errno::EMSGSIZE) } else { Ok(got.cast_unsigned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims() -> Claims {
        let layout = Layout { format: 0x3432_5258, width: 16, height: 4, stride: 64, modifier: LINEAR };
        Claims { sort: BufferSort::DmaBuf, size: 4096, offset: 128, len: 256, layout }
    }

    #[test]
    fn a_layout_that_fits_is_taken_and_one_byte_more_is_not() {
        assert_eq!(claims().check(4096), Ok(()));
        let mut rows = claims();
        rows.layout.stride += 1;
        assert!(rows.check(4096).is_err());
        let mut long = claims();
        long.len = 4096 - 128 + 1;
        assert!(long.check(4096).is_err());
        let mut wrapped = claims();
        wrapped.offset = u64::MAX;
        assert!(wrapped.check(4096).is_err());
        let mut tiled = claims();
        (tiled.layout.modifier, tiled.layout.stride) = (1, 0);
        assert_eq!(tiled.check(4096), Ok(()), "what a modifier means is the driver's business");
    }

    #[test]
    fn plain_bytes_have_no_layout() {
        let mut plain = claims();
        plain.layout = Layout::default();
        assert_eq!(plain.check(4096), Ok(()));
        plain.layout.width = 1;
        assert!(plain.check(4096).is_err());
    }

    #[test]
    fn other_versions_are_told_by_number_and_other_bytes_by_length() {
        let mut bytes = [0; MESSAGE_LEN];
        assert_eq!(Claims::decode(&bytes).err(), Some(HandOverError::Foreign(MESSAGE_LEN)));
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8] = 9;
        assert_eq!(Claims::decode(&bytes).err(), Some(HandOverError::Version(9)));
        assert_eq!(Claims::decode(&bytes[1..]).err(), Some(HandOverError::Foreign(MESSAGE_LEN - 1)));
    }
}
