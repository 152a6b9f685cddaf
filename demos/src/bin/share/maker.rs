//! The process that has the frames: it fills the buffer, one frame after the other, and never sends one.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::libc;
use pinfold_core::dmabuf::{BufferSort, CpuAccess, DmaBuf, DmaBufMap, Layout, MESSAGE_LEN, Offered, send};
use pinfold_core::{HostBuffer, HostBufferKind, HugePages};
use rayon::prelude::*;

use crate::wire::{Sum, hear, hear_seen, limit, tell_frame};
use crate::{Arguments, PATIENCE, Report};

/// `DRM_FORMAT_ABGR8888`: red, green, blue and alpha in this order in memory.
pub(crate) const FORMAT: u32 = u32::from_le_bytes(*b"AB24");
/// What the viewer asks for.
pub(crate) const A_DMABUF: u8 = 1;

pub(crate) fn make(socket: &UnixStream, arguments: &Arguments) -> Result<Report> {
    let &Arguments { width, height, frames, .. } = arguments;
    let (stride, len) = (width * 4, width as usize * height as usize * 4);
    let mut input = match &arguments.input {
        None => None,
        Some(path) => {
            let file = File::open(path).with_context(|| path.display().to_string())?;
            let bytes = file.metadata()?.len();
            ensure!(bytes >= len as u64, "{}: {bytes} bytes; a frame has {len}", path.display());
            Some(file)
        }
    };
    limit(socket)?;
    let host = HostBuffer::new(len, HostBufferKind::Exportable, HugePages::No)?;
    let [asked] = hear(socket)?;
    let (buffer, reason) = export(&host, asked)?;
    // The processor's turn with a dma-buf is told to the kernel; a memory file has no turns.
    let map = (buffer.sort() == BufferSort::DmaBuf).then(|| buffer.map(CpuAccess::Write)).transpose()?;
    let handed_over = match buffer.sort() {
        BufferSort::DmaBuf => "a dma-buf",
        BufferSort::MemoryFile => "the memory file",
    };
    let layout = Layout { format: FORMAT, width, height, stride, modifier: 0 };
    send(socket, &Offered { buffer, offset: 0, len: len as u64, layout })?;

    let (mut made, mut told) = (0, MESSAGE_LEN as u64);
    while made < frames {
        let filled = in_turn(map.as_ref(), || match &mut input {
            None => draw(&host, width, height, made).map(|()| true),
            Some(file) => read(file, &host, len),
        })?;
        if !filled {
            break;
        }
        tell_frame(socket, Some(sum(&host, len)?))?;
        let [_seen] = hear(socket)?;
        made += 1;
        told += 10;
    }
    tell_frame(socket, None)?;
    let mut seen = hear_seen(socket)?;
    seen.because.splice(0..0, reason);
    Ok(Report { width, height, handed_over, told: told + 9, seen })
}

/// What goes to the viewer, and why it isn't a dma-buf if it isn't.
fn export(host: &HostBuffer, asked: u8) -> Result<(DmaBuf, Option<String>)> {
    let reason = match asked {
        A_DMABUF => match host.export_dmabuf(0..host.size()) {
            Ok(buffer) => return Ok((buffer, None)),
            Err(error) => Some(format!("no dma-buf: {error}")),
        },
        _ => None, // the viewer says why
    };
    Ok((DmaBuf::from_memory_file(host.as_fd().try_clone_to_owned()?)?, reason))
}

fn in_turn<R>(map: Option<&DmaBufMap>, fill: impl FnOnce() -> Result<R>) -> Result<R> {
    let _turn = map.map(|map| map.begin(CpuAccess::Write, PATIENCE)).transpose()?;
    fill()
}

/// Draws rings that move, with all cores, where the viewer's device will see them.
#[allow(clippy::cast_ptr_alignment, reason = "pixels of four bytes, from the start of a page on")]
fn draw(host: &HostBuffer, width: u32, height: u32, frame: u32) -> Result<()> {
    let (centre_x, centre_y, turn) = (i64::from(width) / 2, i64::from(height) / 2, i64::from(frame) * 4);
    let scale = i64::from(width.max(height)).pow(2) / 4096 + 1;
    (0..height).into_par_iter().for_each(|y| {
        for x in 0..width {
            let (dx, dy) = (i64::from(x) - centre_x, i64::from(y) - centre_y);
            let ring = (dx * dx + dy * dy) / scale - turn;
            let channel = |speed: i64| {
                let phase = (ring * speed) & 511;
                u32::try_from(phase.min(511 - phase)).expect("at most 255")
            };
            let pixel = 0xff00_0000 | channel(5) << 16 | channel(3) << 8 | channel(2);
            let at = host.as_ptr().wrapping_add((y as usize * width as usize + x as usize) * 4).cast();
            // SAFETY: the buffer has `width * height` pixels, starts at a page, and outlives this; a device may read it, and whoever else writes does
            // so by atomics or not in this process.
            let at = unsafe { AtomicU32::from_ptr(at) };
            at.store(pixel.to_le(), Ordering::Relaxed); // the message behind it orders
        }
    });
    Ok(())
}

/// Reads the next frame straight into the buffer; false at the end of the file.
fn read(file: &File, host: &HostBuffer, len: usize) -> Result<bool> {
    let mut done = 0;
    while done < len {
        let at = host.as_ptr().wrapping_add(done).cast();
        // SAFETY: the buffer has `len - done` bytes behind `at`, to which no reference exists.
        match Errno::result(unsafe { libc::read(file.as_raw_fd(), at, len - done) }) {
            Ok(0) => return Ok(false),
            Ok(more) => done += more.cast_unsigned(),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("reading the input"),
        }
    }
    Ok(true)
}

/// The sum of what is in the buffer.
fn sum(host: &HostBuffer, len: usize) -> Result<u64> {
    let (mut sum, mut part) = (Sum::new(), [0; 1 << 14]);
    for at in (0..len).step_by(part.len()) {
        let part = &mut part[..(len - at).min(1 << 14)];
        host.read(at, part)?;
        sum.add(part);
    }
    Ok(sum.end())
}
