//! A frame handed to another process: as a dma-buf, without a copy, or through a pipe or shared memory, with one copy on either side.
//!
//! The other process is this program started anew; it says when it has the frame, which for a buffer means mapped, inside a bracket, and looked at. Where
//! the kernel makes no dma-bufs, the memory file behind the buffer is handed over instead, which is what some drivers take in their place; the rest is
//! left out.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use pinfold_core::dmabuf::{BufferSort, CpuAccess, DmaBuf, Layout, MemoryPart, Offered, Udmabuf, receive, send};
use pinfold_core::{HostBuffer, HostBufferKind, HugePages, page_size};

use crate::clock::{microseconds, wall};
use crate::memory::Memory;
use crate::session::{Contender, Plan, Session};
use crate::vulkan::Card;

/// The hidden argument that makes this program the receiver.
pub(crate) const ARGUMENT: &str = "--be-the-receiving-child";
/// Longer than any frame takes.
const PATIENCE: Duration = Duration::from_secs(20);
/// Frames of four bytes a pixel.
const FRAMES: [(&str, u32, u32); 2] = [("1080p", 1920, 1080), ("4K", 3840, 2160)];

fn frame_bytes(width: u32, height: u32) -> usize {
    (width as usize * height as usize * 4).next_multiple_of(page_size())
}

/// What the child does until it is told nothing more: takes a frame in the way it is told, and says so. `arguments`: the descriptors of the socket and of the
/// pipe, which only this process's parent knows, and that of the shared memory with its length.
pub(crate) fn child(arguments: impl Iterator<Item = String>) -> Result<()> {
    let numbers: Vec<usize> = arguments.map(|word| word.parse()).collect::<Result<_, _>>()?;
    let [socket, pipe, shared, len] = numbers[..] else { bail!("the receiver is started by the harness only") };
    let owned = |number: usize| -> Result<OwnedFd> {
        // SAFETY: the parent has left these descriptors open for this process, which owns its copies; each is taken once.
        Ok(unsafe { OwnedFd::from_raw_fd(RawFd::try_from(number)?) })
    };
    let (socket, mut pipe) = (UnixStream::from(owned(socket)?), std::fs::File::from(owned(pipe)?));
    let shared = DmaBuf::from_memory_file(owned(shared)?)?.map(CpuAccess::Read)?;
    let mut private = vec![0_u8; len];
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let (how, bytes) = line.split_once(' ').context("a command has two words")?;
        let bytes: usize = bytes.parse()?;
        match how {
            "buffer" => {
                let offered = receive(&socket, PATIENCE)?;
                let map = offered.buffer.map(CpuAccess::Read)?;
                let guard = map.begin(CpuAccess::Read, PATIENCE)?;
                guard.read(bytes - 8, &mut private[..8])?;
            }
            "pipe" => pipe.read_exact(&mut private[..bytes])?,
            "shared" => shared.begin(CpuAccess::Read, PATIENCE)?.read(0, &mut private[..bytes])?,
            _ => bail!("nobody knows {how}"),
        }
        println!("{}", private[0]);
    }
    Ok(())
}

/// The other process.
struct Receiver {
    child: Child,
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    socket: UnixStream,
    pipe: std::fs::File,
    shared: HostBuffer,
}

/// Lets a child inherit it.
fn inherit(fd: BorrowedFd<'_>) -> Result<String> {
    // SAFETY: the descriptor is open; the call takes an integer and touches no memory.
    let answer = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) };
    ensure!(answer == 0, "a descriptor can't be handed to a child: {}", std::io::Error::last_os_error());
    Ok(fd.as_raw_fd().to_string())
}

impl Receiver {
    fn start(len: usize) -> Result<Self> {
        let (socket, theirs) = UnixStream::pair()?;
        let (reader, writer) = std::io::pipe()?;
        let shared = HostBuffer::new(len, HostBufferKind::Exportable, HugePages::No)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(ARGUMENT).arg(inherit(theirs.as_fd())?).arg(inherit(reader.as_fd())?);
        command.arg(inherit(shared.as_fd())?).arg(len.to_string()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let (commands, answers) = (child.stdin.take(), child.stdout.take().context("the child's output")?);
        let pipe = std::fs::File::from(OwnedFd::from(writer));
        // As large as a user may have it; refused, it is smaller.
        // SAFETY: fcntl with an integer touches no memory.
        unsafe { libc::fcntl(pipe.as_raw_fd(), libc::F_SETPIPE_SZ, 1 << 20) };
        Ok(Self { child, commands, answers: BufReader::new(answers), socket, pipe, shared })
    }

    /// Microseconds from before the frame leaves until the other side has it.
    fn hand_over(&mut self, how: &str, bytes: usize, leave: impl FnOnce(&Self) -> Result<()>) -> Result<f64> {
        let begun = Instant::now();
        let commands = self.commands.as_mut().context("the child's input is open until the end")?;
        writeln!(commands, "{how} {bytes}")?;
        leave(self)?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        ensure!(!answer.is_empty(), "the receiver has ended");
        Ok(microseconds(begun.elapsed()))
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        drop(self.commands.take());
        let _ = self.child.wait();
    }
}

pub(crate) fn run(session: &mut Session, _: Option<&Card>) -> Result<()> {
    let device = Udmabuf::open();
    if let Err(why) = &device {
        session.absent(
            "export, bracket, and handing over of a dma-buf",
            format!("{why}; a memory file is handed over instead"),
        );
    }
    let largest = FRAMES.iter().map(|&(_, width, height)| frame_bytes(width, height)).max().expect("two frames");
    let receiver = std::cell::RefCell::new(Receiver::start(largest)?);
    for (name, width, height) in FRAMES {
        let len = frame_bytes(width, height);
        let frame = Memory::populated(len)?;
        // SAFETY: the mapping is `len` bytes long and readable, and nothing writes it while the slice is used: this group only reads it.
        let bytes = unsafe { std::slice::from_raw_parts(frame.pointer().cast_const(), len) };
        let buffer = HostBuffer::new(len, HostBufferKind::Exportable, HugePages::No)?;
        buffer.write(0, bytes)?;
        let export = || -> Result<DmaBuf> {
            match &device {
                Ok(device) => Ok(device.export(&[MemoryPart { file: buffer.as_fd(), bytes: 0..len as u64 }])?),
                Err(_) => Ok(DmaBuf::from_memory_file(buffer.as_fd().try_clone_to_owned()?)?),
            }
        };
        let exported = export()?;
        let copy_to = Memory::populated(len)?;
        let memcpy = || {
            Ok(wall(1, || {
                // SAFETY: two mappings of this length, which nobody else writes.
                unsafe { copy_to.pointer().copy_from_nonoverlapping(frame.pointer(), len) };
            }) / 1e3)
        };

        if name == FRAMES[0].0 {
            session.measure(
                Plan::new(format!("memcpy of a {name} frame"), "µs", Contender::new("memcpy", memcpy))
                    .against(Contender::new("memcpy", memcpy), None)
                    .control(),
            )?;
        }
        if exported.sort() == BufferSort::DmaBuf {
            let one = || {
                let begun = Instant::now();
                let made = export()?;
                let time = microseconds(begun.elapsed());
                drop(made);
                Ok(time)
            };
            let plan = Plan::new(format!("export a {name} frame"), "µs", Contender::new("udmabuf", one));
            session.measure(plan.against(Contender::new("memcpy of it", memcpy), None))?;
        }
        let import = || {
            let fd = exported.duplicate()?;
            let begun = Instant::now();
            let buffer = match exported.sort() {
                BufferSort::DmaBuf => DmaBuf::from_fd(fd)?,
                BufferSort::MemoryFile => DmaBuf::from_memory_file(fd)?,
            };
            let map = buffer.map(CpuAccess::Read)?;
            let time = microseconds(begun.elapsed());
            drop(map);
            Ok(time)
        };
        let plan = Plan::new(format!("take in and map a {name} frame"), "µs", Contender::new("descriptor", import));
        session.measure(plan.against(Contender::new("memcpy of it", memcpy), None))?;
        if exported.sort() == BufferSort::DmaBuf {
            let map = exported.map(CpuAccess::Write)?;
            let bracket = || {
                let begun = Instant::now();
                drop(map.begin(CpuAccess::Write, PATIENCE)?);
                Ok(microseconds(begun.elapsed()))
            };
            let plan = Plan::new(format!("bracket of a {name} frame"), "µs", Contender::new("begin and end", bracket));
            session.measure(plan.against(Contender::new("memcpy of it", memcpy), None))?;
        }

        let layout = Layout { format: u32::from_le_bytes(*b"XR24"), width, height, stride: width * 4, modifier: 0 };
        let offered =
            Offered { buffer: exported.clone(), offset: 0, len: u64::from(width) * u64::from(height) * 4, layout };
        let given = || receiver.borrow_mut().hand_over("buffer", len, |to| Ok(send(&to.socket, &offered)?));
        let piped = || receiver.borrow_mut().hand_over("pipe", len, |to| Ok((&to.pipe).write_all(bytes)?));
        let shared = || {
            // Written before it is told, as the other side reads at once.
            let begun = Instant::now();
            receiver.borrow().shared.write(0, bytes)?;
            let written = microseconds(begun.elapsed());
            Ok(written + receiver.borrow_mut().hand_over("shared", len, |_| Ok(()))?)
        };
        let what = if exported.sort() == BufferSort::DmaBuf { "dma-buf" } else { "memory file" };
        let plan = Plan::new(format!("hand a {name} frame to another process"), "µs", Contender::new(what, given));
        let plan = plan
            .against(Contender::new("through a pipe", piped), None)
            .against(Contender::new("through shared memory, copied in and out", shared), None);
        session.measure(plan)?;
    }
    Ok(())
}
