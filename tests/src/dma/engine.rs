//! The thread that works for the device.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use io_uring::squeue::Flags;
use io_uring::types::Fd;
use io_uring::{opcode, squeue};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::job::{Direction, Job, Order};
use super::pins::{Pins, Place};

/// `user_data` of the request that waits for new jobs. Jobs use twice their number, their gates one more.
const KICK: u64 = u64::MAX;
/// `user_data` of requests whose completion tells nothing.
const SILENT: u64 = u64::MAX - 1;

/// The thread, and the way to it. Dropping it cancels the jobs that wait for their gate, and joins.
#[derive(Debug)]
pub(super) struct Engine {
    queue: Arc<Queue>,
    thread: Option<JoinHandle<()>>,
}

/// What callers leave for the engine.
#[derive(Debug)]
pub(super) struct Queue {
    lists: Mutex<Lists>,
    idle: Condvar,
    kick: EventFd,
}

#[derive(Debug, Default)]
struct Lists {
    fresh: Vec<usize>,
    /// Jobs under way, by number. Grows when a job starts, never when one ends.
    running: Vec<Option<Arc<Order>>>,
    stop: bool,
}

impl Queue {
    pub(super) fn push(&self, order: Arc<Order>) {
        let mut lists = self.lists.lock().expect("nothing panics under this lock");
        let vacant = lists.running.iter().position(Option::is_none);
        let number = vacant.unwrap_or_else(|| {
            lists.running.push(None);
            lists.running.len() - 1
        });
        lists.running[number] = Some(order);
        lists.fresh.push(number);
        drop(lists);
        self.kick.write(1).expect("an eventfd takes a 1");
    }
}

impl Engine {
    pub(super) fn start(pins: Arc<Pins>) -> io::Result<Self> {
        let kick = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let queue = Arc::new(Queue { lists: Mutex::default(), idle: Condvar::new(), kick });
        let worker = Worker { pins, queue: Arc::clone(&queue) };
        let thread = std::thread::Builder::new().name("dma-engine".into()).spawn(move || worker.run())?;
        Ok(Self { queue, thread: Some(thread) })
    }

    pub(super) fn job(&self, place: Place, bytes: Option<&[u8]>) -> io::Result<Job> {
        let memory = File::from(memfd_create(c"dma-device-memory", MFdFlags::MFD_CLOEXEC)?);
        let direction = match bytes {
            Some(bytes) => {
                memory.write_all_at(bytes, 0)?;
                Direction::ToProgram
            }
            None => Direction::FromProgram,
        };
        let order = Arc::new(Order::new(place, direction, memory)?);
        Ok(Job { order, queue: Arc::clone(&self.queue) })
    }

    /// Whether no job runs within `limit`.
    pub(super) fn wait_idle(&self, limit: Duration) -> bool {
        let lists = self.queue.lists.lock().expect("nothing panics under this lock");
        let busy = |lists: &mut Lists| lists.running.iter().any(Option::is_some);
        let waited = self.queue.idle.wait_timeout_while(lists, limit, busy);
        !busy(&mut waited.expect("nothing panics under this lock").0)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.queue.lists.lock().expect("nothing panics under this lock").stop = true;
        self.queue.kick.write(1).expect("an eventfd takes a 1");
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(!matches!(ended, Some(Err(_))) || std::thread::panicking(), "the engine panicked");
    }
}

struct Worker {
    pins: Arc<Pins>,
    queue: Arc<Queue>,
}

impl Worker {
    fn run(&self) {
        self.listen();
        while self.take_jobs() {
            match self.pins.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                Err(e) => panic!("io_uring_enter: {e}"),
            }
            self.take_completions();
        }
    }

    /// Asks to be woken by the next kick.
    fn listen(&self) {
        self.submit(&[poll(&self.queue.kick).user_data(KICK)]);
    }

    /// Puts what is new into the ring. False if the device stops and nothing runs any more.
    fn take_jobs(&self) -> bool {
        let mut lists = self.queue.lists.lock().expect("nothing panics under this lock");
        while let Some(number) = lists.fresh.pop() {
            let order = lists.running[number].as_ref().expect("a fresh job is running");
            let [gate, transfer] = requests(order, number as u64 * 2);
            if order.state.lock().expect("nothing panics under this lock").holds {
                self.submit(&[gate, transfer]);
            } else {
                self.submit(&[transfer]);
            }
        }
        if lists.stop {
            for (number, _) in lists.running.iter().enumerate().filter(|(_, order)| order.is_some()) {
                // Where the gate is gone or never was, this finds nothing, which is fine.
                self.submit(&[opcode::PollRemove::new(number as u64 * 2 + 1).build().user_data(SILENT)]);
            }
        }
        !lists.stop || lists.running.iter().any(Option::is_some)
    }

    fn take_completions(&self) {
        loop {
            // SAFETY: only this thread looks at the completion queue, and it holds one view at a time.
            let entry = unsafe { self.pins.ring.completion_shared() }.next();
            let Some(entry) = entry else { return };
            match entry.user_data() {
                KICK => {
                    // Read before the lists are looked at, so that a kick that comes later is a kick again.
                    let _ = self.queue.kick.read();
                    self.listen();
                }
                job if job % 2 == 0 && job != SILENT => {
                    let number = usize::try_from(job / 2).expect("a number of a job");
                    let running = || self.queue.lists.lock().expect("nothing panics under this lock");
                    let order = running().running[number].clone().expect("a job completes once");
                    // Idle is who has told everybody: the job leaves the list only then.
                    order.complete(entry.result());
                    running().running[number] = None;
                    self.queue.idle.notify_all();
                }
                _ => {}
            }
        }
    }

    /// Puts linked requests into the ring together.
    fn submit(&self, requests: &[squeue::Entry]) {
        loop {
            // SAFETY: only this thread looks at the submission queue, and it holds one view at a time.
            let mut queue = unsafe { self.pins.ring.submission_shared() };
            // SAFETY: the descriptors in the requests belong to the queue, or to an order that stays in `running` until the request completes;
            // fixed buffers are pinned by the kernel, which refuses a slot that isn't.
            if unsafe { queue.push_multiple(requests) }.is_ok() {
                return;
            }
            drop(queue);
            self.pins.ring.submit().expect("the kernel takes what is in the ring");
        }
    }
}

fn poll(event: &EventFd) -> squeue::Entry {
    opcode::PollAdd::new(Fd(event.as_fd().as_raw_fd()), libc::POLLIN.cast_unsigned().into()).build()
}

/// The wait for a job's gate and, linked to it, the transfer itself, which never runs in the engine's own thread.
fn requests(order: &Order, user_data: u64) -> [squeue::Entry; 2] {
    let (memory, Place { slot, address, len }) = (Fd(order.memory.as_raw_fd()), order.place);
    let transfer = match order.direction {
        Direction::FromProgram => {
            opcode::WriteFixed::new(memory, std::ptr::without_provenance(address), len, slot).build()
        }
        Direction::ToProgram => {
            opcode::ReadFixed::new(memory, std::ptr::without_provenance_mut(address), len, slot).build()
        }
    };
    let gate = poll(&order.gate).user_data(user_data + 1).flags(Flags::IO_LINK);
    [gate, transfer.user_data(user_data).flags(Flags::ASYNC)]
}
