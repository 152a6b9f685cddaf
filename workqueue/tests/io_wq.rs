//! The kernel's own pool as the judge: what cancelling finds, and in which order work with one key runs, must be the
//! same here as in io_uring's io-wq.

use std::{
    ffi::CString,
    fs::{self, File, OpenOptions},
    io::Write,
    os::{fd::AsRawFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use io_uring::{IoUring, opcode, squeue, types};
use pinfold_workqueue::{Cancelled, Job, Pool};

const LONG: Duration = Duration::from_secs(30);

/// A ring whose bounded account has one worker; None, with the reason said, where there is none to be had.
fn ring() -> Option<IoUring> {
    let made = IoUring::new(64).and_then(|ring| {
        ring.submitter().register_iowq_max_workers(&mut [1, 1])?;
        Ok(ring)
    });
    made.map_err(|error| {
        eprintln!("SKIP {}: no io_uring with worker limits here: {error}", std::thread::current().name().unwrap_or("?"))
    })
    .ok()
}

fn push(ring: &mut IoUring, entry: squeue::Entry) {
    // SAFETY: every buffer and path that an entry of these tests names outlives the ring's last completion: they are
    // static, or live in the test until it has reaped what it submitted.
    unsafe { ring.submission().push(&entry) }.expect("the queue has room");
    ring.submit().expect("submitted");
}

/// The result of the request `wanted`; others that come before it are kept in `seen`.
fn reap(ring: &mut IoUring, seen: &mut Vec<(u64, i32)>, wanted: u64) -> i32 {
    loop {
        if let Some(at) = seen.iter().position(|&(id, _)| id == wanted) {
            return seen.swap_remove(at).1;
        }
        ring.submit_and_wait(1).expect("a completion");
        seen.extend(ring.completion().map(|entry| (entry.user_data(), entry.result())));
    }
}

/// A folder of its own, removed with all that is in it.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("pinfold-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("a folder");
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn fifo(path: &Path) -> CString {
    let name = CString::new(path.as_os_str().as_bytes()).expect("no zero in it");
    // SAFETY: `name` is a string that ends in zero and lives through the call.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    name
}

/// What the kernel's cancel answers, in our words.
fn ours(result: i32) -> Cancelled {
    match -result {
        0 => Cancelled::Ok,
        libc::EALREADY => Cancelled::Running,
        libc::ENOENT => Cancelled::NotFound,
        other => panic!("io-wq answers {other}"),
    }
}

/// What io-wq says when queued, running and unknown work is cancelled, in this order. None if the worker had not got to
/// the work that was to be running: it can't be watched from outside.
fn kernel_verdicts(ring: &mut IoUring, folder: &Path) -> Option<[Cancelled; 3]> {
    let fifos = [fifo(&folder.join("running")), fifo(&folder.join("queued"))];
    let mut seen = Vec::new();
    for (id, name) in (1..).zip(&fifos) {
        // Opening a FIFO that nobody writes to sleeps, in the one worker that there is.
        let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), name.as_ptr()).flags(libc::O_RDONLY);
        push(ring, open.build().flags(squeue::Flags::ASYNC).user_data(id));
    }
    std::thread::sleep(Duration::from_millis(20));
    let verdicts = [2, 1, 9].map(|target| {
        push(ring, opcode::AsyncCancel::new(target).build().user_data(100 + target));
        ours(reap(ring, &mut seen, 100 + target))
    });
    assert_eq!(reap(ring, &mut seen, 2), -libc::ECANCELED);
    let first = reap(ring, &mut seen, 1);
    assert!(first < 0, "told to stop: {first}");
    // Before its worker has it, it is found queued; while the worker is just taking it, it may not be found at all.
    (verdicts[1] == Cancelled::Running).then_some(verdicts)
}

#[test]
fn cancelling_finds_queued_running_and_unknown_work_as_io_wq_does() {
    let Some(mut ring) = ring() else { return };
    let end = Instant::now() + LONG;
    let kernel = loop {
        let folder = Folder::new("cancel");
        if let Some(verdicts) = kernel_verdicts(&mut ring, &folder.0) {
            break verdicts;
        }
        assert!(Instant::now() < end, "the kernel's worker never got to its work");
    };

    let pool = Pool::builder("oracle").bounded(1).build().expect("a pool");
    let (release, gate) = mpsc::channel::<()>();
    let (report, started) = mpsc::channel();
    let running = pool.submit(Job::new(move |_| {
        report.send(()).expect("the test waits");
        let _ = gate.recv();
    }));
    let running = running.expect("accepted");
    started.recv_timeout(LONG).expect("it runs");
    let queued = pool.submit(Job::new(|_| {})).expect("accepted");
    let over = pool.submit(Job::new(|_| {})).expect("accepted");
    assert_eq!(over.cancel(), Cancelled::Ok);
    assert_eq!([queued.cancel(), running.cancel(), over.cancel()], kernel);
    drop(release);
}

#[test]
fn writes_to_one_file_keep_their_order_as_in_io_wq() {
    const WRITES: u8 = 50;
    let Some(mut ring) = ring() else { return };
    ring.submitter().register_iowq_max_workers(&mut [8, 8]).expect("more workers");
    let folder = Folder::new("order");
    let append = |name: &str| -> File {
        OpenOptions::new().append(true).create(true).open(folder.0.join(name)).expect("a file")
    };
    let file = append("kernel");
    let bytes: Vec<u8> = (0..WRITES).collect();
    for byte in &bytes {
        let write = opcode::Write::new(types::Fd(file.as_raw_fd()), byte, 1).offset(u64::MAX);
        push(&mut ring, write.build().flags(squeue::Flags::ASYNC).user_data(u64::from(*byte)));
    }
    let mut seen = Vec::new();
    for byte in &bytes {
        assert_eq!(reap(&mut ring, &mut seen, u64::from(*byte)), 1);
    }

    let pool = Pool::builder("oracle").bounded(8).build().expect("a pool");
    let file = Arc::new(append("ours"));
    for byte in 0..WRITES {
        let file = Arc::clone(&file);
        let write = Job::new(move |_| (&*file).write_all(&[byte]).expect("written"));
        pool.submit(write.key(1)).expect("accepted");
    }
    drop(pool);
    let [mut kernel, ours] = ["kernel", "ours"].map(|name| fs::read(folder.0.join(name)).expect("readable"));
    assert_eq!(ours, bytes);
    if kernel != ours {
        // One at a time is what it promises; Linux 6.12 has been seen to swap two on a slow machine.
        println!("SKIPPED PART OF writes_to_one_file_keep_their_order_as_in_io_wq: io-wq itself did not: {kernel:?}");
        kernel.sort_unstable();
        assert_eq!(kernel, ours);
    }
}
