//! The process that shows the frames: it has a device, and no memory for frames.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use pinfold_core::dmabuf::{BufferSort, CpuAccess, DmaBufMap, Offered, receive};
use pinfold_demos::device::{Gpu, Validation};
use pinfold_demos::picture::Picture;
use pinfold_vulkan::{Access, Config, HostRange, Manager, Outcome, Path, Support, Timeline, Userptr};

use crate::draw::Screen;
use crate::maker::{A_DMABUF, FORMAT};
use crate::wire::{Sum, hear_frame, limit, tell, tell_seen};
use crate::{PATIENCE, Seen};

/// The shader only reads. But it reads a storage buffer, and what a device may not write can't be one (a read-only object is for vertices, indices,
/// uniforms and texels, and WGSL has no texel buffers).
const ACCESS: Access = Access::ReadWrite;

pub(crate) fn view(socket: &UnixStream, output: impl Write, validation: Validation) -> Result<()> {
    limit(socket)?;
    let gpu = Gpu::open(None, validation)?;
    let mut seen = look(&gpu, socket, output)?;
    seen.validation_messages = gpu.is_validated().then(|| gpu.messages());
    tell_seen(socket, &seen)
}

fn look(gpu: &Gpu, socket: &UnixStream, output: impl Write) -> Result<Seen> {
    // SAFETY: the handles are the device's own; the manager is dropped before it.
    let manager = unsafe { Manager::new(gpu.context(), Config::default()) }?;
    let takes = manager.capabilities().dmabuf;
    tell(socket, [if takes == Support::Usable { A_DMABUF } else { 0 }])?;
    let offered = receive(socket, PATIENCE)?;
    let layout = offered.layout;
    ensure!(layout.format == FORMAT && layout.modifier == 0, "frames that aren't rows of RGBA: {layout:?}");
    ensure!(layout.stride.is_multiple_of(4), "rows of {} bytes don't begin with a pixel", layout.stride);
    let most = manager.capabilities().max_storage_buffer_range;
    ensure!(offered.len <= most.into(), "a frame of {} bytes; a shader of this device sees {most}", offered.len);

    let screen = Screen::new(gpu, layout.width, layout.height)?;
    let frame = Frame::take(&manager, offered, takes)?;
    let (mut acquires, mut draws) = (Vec::new(), Vec::new());
    let (mut frames, mut right, mut bytes_copied, mut path) = (0, 0, 0, String::new());
    let mut rgba = Vec::new();
    while let Some(sum) = hear_frame(socket)? {
        frames += 1;
        let begun = Instant::now();
        if frame.copied {
            manager.invalidate(frame.object.range())?; // nobody tells this process what the other one writes
        }
        let lease = manager.acquire_timeout(&[&frame.object], PATIENCE)?;
        acquires.push(begun.elapsed());
        let view = lease.view(0);
        path = frame.in_words(view.path);
        if matches!(view.path, Path::Mirror(_)) {
            bytes_copied += view.size; // a mirror of shared memory is copied as a whole
        }
        screen.record(&view, layout.stride / 4)?;
        let done = Timeline { semaphore: screen.timeline, value: frames.into() };
        // SAFETY: the signal is that of the picture, which only reads the frame.
        let pending = unsafe { lease.submit([done], || screen.submit(frames.into())) }.map_err(|e| anyhow!("{e}"))?;
        ensure!(pending.wait(PATIENCE) == Some(Outcome::Done), "the picture wasn't drawn");
        draws.push(begun.elapsed());
        rgba = screen.pixels();
        let mut saw = Sum::new();
        saw.add(&rgba);
        right += u32::from(saw.end() == sum);
        tell(socket, [1])?;
    }
    ensure!(frames > 0, "there was no frame");
    Picture { width: layout.width, height: layout.height, rgba }.write_png(output)?;
    let (device, because) = (gpu.name(), frame.because.clone());
    drop((frame, manager));
    let (acquire, drawn) = (middle(acquires), middle(draws));
    Ok(Seen { device, path, because, frames, bytes_copied, right, acquire, drawn, validation_messages: None })
}

/// The maker's buffer as an object of this process. The object goes before the mapping.
struct Frame {
    object: Userptr,
    map: Option<DmaBufMap>,
    sort: BufferSort,
    copied: bool,
    /// Why not by a better way.
    because: Vec<String>,
}

impl Frame {
    /// The buffer itself if the device takes it, else its pages, mapped, like any other memory.
    fn take(manager: &Manager, offered: Offered, takes: Support) -> Result<Self> {
        let (sort, len) = (offered.buffer.sort(), usize::try_from(offered.len)?);
        let mut because = Vec::new();
        if takes == Support::Usable {
            let object = manager.register_dmabuf(offered.clone().into(), ACCESS, "frame")?;
            match manager.acquire_timeout(&[&object], PATIENCE) {
                Ok(_) => return Ok(Self { object, map: None, sort, copied: false, because }),
                Err(error) => because.push(format!("not imported as a buffer: {error}")),
            }
        } else {
            because.push(format!("not imported as a buffer: {takes}"));
        }
        ensure!(offered.offset == 0, "the maker's frames start at the beginning of the buffer");
        let map = offered.buffer.map(CpuAccess::Write)?;
        let start = map.begin(CpuAccess::Read, PATIENCE)?.as_ptr();
        let range = HostRange::from_ptr(start, len.next_multiple_of(pinfold_vulkan::page_size()))?;
        // SAFETY: the mapping goes after the object, and no references to its bytes exist.
        let object = unsafe { manager.register_labelled(range, ACCESS, "frame") }?;
        let copied = match manager.acquire_timeout(&[&object], PATIENCE)?.view(0).path {
            Path::Mirror(reason) => {
                because.push(format!("not imported as memory either: {reason:?}"));
                true
            }
            _ => false,
        };
        Ok(Self { object, map: Some(map), sort, copied, because })
    }

    fn in_words(&self, path: Path) -> String {
        let what = match (&self.map, self.sort) {
            (Some(_), _) => "the mapped memory file",
            (None, BufferSort::MemoryFile) => "the memory file, taken for a dma-buf",
            (None, BufferSort::DmaBuf) => "the dma-buf",
        };
        match path {
            Path::Mirror(_) => format!("Mirror: {what}, copied"),
            path => format!("{path:?}: {what}"),
        }
    }
}

fn middle(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    (times[times.len() / 2].as_secs_f64() * 1e6).round() / 1e3
}
