//! A part of a test in a process of its own: for what ends in a crash by nature, and for what may only be done once, or alone.
//!
//! The child is the same test program, told to run the same test. When it comes to [`isolated`], it runs the closure and leaves with an
//! exit code that nothing else uses; so a child that never reached the closure can't be taken for a success.

use std::any::type_name;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::PATIENCE;

/// How many times as long as it is allowed a child may take, if set: `scripts/test-vm` sets it, as an emulated processor is slower.
const PATIENCE_FACTOR: &str = "PINFOLD_TEST_PATIENCE";

/// Names the case that a child process is to run; unset in the parent.
const CASE: &str = "PINFOLD_ISOLATED";
/// Exit code of a child whose closure returned.
const RETURNED: i32 = 42;
/// Exit code of a test program of which a test failed.
const PANICKED: i32 = 101;

/// How the child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The closure returned.
    Returned,
    /// The closure panicked: an assertion failed.
    Panicked,
    /// The closure was left by `skip!`; its line has been passed on.
    Skipped,
    /// The child left by itself with this code.
    Exited(i32),
    /// A signal ended it: `SIGSEGV` for a crash, `SIGABRT` for an abort.
    Signal(i32),
    /// It ran longer than allowed and was killed.
    TimedOut,
    /// This is a child process, and the case is not its own.
    NotMine,
}

/// What is known of a child that has ended.
#[derive(Debug)]
pub struct Ending {
    /// How it ended.
    pub verdict: Verdict,
    /// What it wrote to standard output and standard error.
    pub output: String,
}

impl Ending {
    /// Asserts the verdict. A child that skipped, and a case that isn't this child's, satisfy every expectation.
    ///
    /// # Panics
    /// If it ended otherwise; the message holds the child's output.
    #[track_caller]
    pub fn expect(&self, wanted: Verdict) {
        let met = self.verdict == wanted || matches!(self.verdict, Verdict::Skipped | Verdict::NotMine);
        assert!(met, "the child ended with {:?}, not {wanted:?}; it wrote:\n{}", self.verdict, self.output);
    }

    /// Asserts that the closure returned.
    ///
    /// # Panics
    /// If it didn't.
    #[track_caller]
    pub fn expect_return(&self) {
        self.expect(Verdict::Returned);
    }

    /// Asserts that a signal ended the child.
    ///
    /// # Panics
    /// If none did, or another.
    #[track_caller]
    pub fn expect_signal(&self, signal: i32) {
        self.expect(Verdict::Signal(signal));
    }
}

/// Runs `body` in a child process, at most [`PATIENCE`] (times the number in `PINFOLD_TEST_PATIENCE`), and tells how that ended. To be called by a test, once; see [`isolated_case`].
///
/// The child runs the test from its beginning: what stands before this call runs there, too. Nothing behind it does.
pub fn isolated<F: FnOnce()>(body: F) -> Ending {
    isolated_case("", PATIENCE, body)
}

/// As [`isolated`], for tests that isolate several parts, each with its own name, or that need another time limit.
///
/// # Panics
/// If the child can't be made, or ends without having come to `body`.
pub fn isolated_case<F: FnOnce()>(case: &str, limit: Duration, body: F) -> Ending {
    let test = test_of(type_name::<F>());
    let key = format!("{test}#{case}");
    if let Some(mine) = std::env::var_os(CASE) {
        if mine != *key {
            return Ending { verdict: Verdict::NotMine, output: String::new() };
        }
        body();
        std::process::exit(RETURNED);
    }
    let (status, output) = run_child(&test, &key, limit);
    let skips: Vec<_> = output.lines().filter(|line| line.starts_with("SKIP")).collect();
    skips.iter().for_each(|line| println!("{line}"));
    let verdict = match status.map(|status| (status.code(), status.signal())) {
        None => Verdict::TimedOut,
        Some((Some(RETURNED), _)) if skips.iter().any(|line| line.starts_with("SKIP ")) => Verdict::Skipped,
        Some((Some(RETURNED), _)) => Verdict::Returned,
        Some((Some(PANICKED), _)) => Verdict::Panicked,
        Some((Some(0), _)) => panic!("the child never came to `{key}`; it wrote:\n{output}"),
        Some((Some(code), _)) => Verdict::Exited(code),
        Some((None, signal)) => Verdict::Signal(signal.expect("a process ends by exit or by signal")),
    };
    Ending { verdict, output }
}

/// Whether this process is a child that [`isolated`] has made.
pub(crate) fn is_isolated() -> bool {
    std::env::var_os(CASE).is_some()
}

/// The name that libtest knows a test by, from the path of something inside it: `program::tests::it_works::{{closure}}` is
/// `tests::it_works`.
#[must_use]
pub fn test_of(path: &str) -> String {
    let inside = path.split_once("::").map_or(path, |(_, rest)| rest);
    let inside = inside.strip_suffix("::here").unwrap_or(inside);
    inside.split("::{{closure}}").next().unwrap_or(inside).to_owned()
}

fn run_child(test: &str, key: &str, limit: Duration) -> (Option<ExitStatus>, String) {
    let program = std::env::current_exe().expect("a test program knows its own path");
    // A file, not a pipe: the child can't block on it, and what it wrote before a crash is all there.
    let mut written = File::from(memfd_create(c"output", MFdFlags::MFD_CLOEXEC).expect("memfd for the child's output"));
    let output = |file: &File| Stdio::from(file.try_clone().expect("descriptor for the child's output"));
    let mut command = Command::new(program);
    // Quiet: else the name of the test and its first line of output share a line.
    command.args([test, "--exact", "--nocapture", "--quiet", "--test-threads=1"]).env(CASE, key);
    command.stdin(Stdio::null()).stdout(output(&written)).stderr(output(&written));
    // SAFETY: the closure runs between fork and exec of a process with threads; it only makes system calls and touches no lock.
    unsafe { command.pre_exec(no_core_and_no_orphan) };
    let mut child = command.spawn().expect("the test program starts once more");
    let status = wait(&mut child, limit * patience_factor());
    crate::memory::remove_left_by(child.id());
    let mut text = Vec::new();
    written.rewind().expect("rewinding a memfd");
    written.read_to_end(&mut text).expect("reading a memfd");
    (status, String::from_utf8_lossy(&text).into_owned())
}

fn patience_factor() -> u32 {
    let Ok(factor) = std::env::var(PATIENCE_FACTOR) else { return 1 };
    factor.parse().unwrap_or_else(|e| panic!("{PATIENCE_FACTOR}={factor}: {e}"))
}

/// A crash that is expected leaves no core file, and a test that is killed leaves no child.
fn no_core_and_no_orphan() -> std::io::Result<()> {
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0)?;
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
    Ok(())
}

/// Waits for the child; `None` if it had to be killed.
fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let pid = libc::c_long::from(child.id().cast_signed());
    // SAFETY: pidfd_open takes numbers only. The child has not been waited for, so its number is still its own.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    assert!(fd >= 0, "pidfd_open: {}", std::io::Error::last_os_error());
    // SAFETY: the call above made this descriptor, and nobody else owns it.
    let ended = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).expect("a descriptor is an int")) };
    if !readable(&ended, limit) {
        child.kill().expect("killing our own child");
        child.wait().expect("waiting for our own child");
        return None;
    }
    Some(child.wait().expect("waiting for our own child"))
}

/// Waits until a descriptor is readable, at most `limit`.
pub fn readable(fd: &impl AsFd, limit: Duration) -> bool {
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left.as_millis()).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
        match nix::poll::poll(&mut fds, timeout) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(nix::errno::Errno::EINTR) => {}
            Err(e) => panic!("poll of descriptor {}: {e}", fd.as_fd().as_raw_fd()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Backing, Region};

    #[test]
    fn each_way_to_end_is_told_apart() {
        isolated_case("returns", PATIENCE, || {}).expect(Verdict::Returned);
        isolated_case("panics", PATIENCE, || panic!("on purpose")).expect(Verdict::Panicked);
        isolated_case("leaves", PATIENCE, || std::process::exit(3)).expect(Verdict::Exited(3));
        isolated_case("aborts", PATIENCE, || std::process::abort()).expect_signal(libc::SIGABRT);
        isolated_case("crashes", PATIENCE, || {
            crash();
        })
        .expect_signal(libc::SIGSEGV);
    }

    #[test]
    fn a_child_that_hangs_is_killed() {
        let ending = isolated_case("hangs", Duration::from_millis(300), || {
            loop {
                std::thread::park();
            }
        });
        ending.expect(Verdict::TimedOut);
    }

    #[test]
    fn what_the_child_wrote_before_a_crash_is_kept() {
        let ending = isolated(|| {
            println!("last words");
            crash();
        });
        ending.expect_signal(libc::SIGSEGV);
        assert!(ending.output.contains("last words"));
    }

    #[test]
    fn the_files_of_a_child_that_crashed_are_removed() {
        let ending = isolated(|| {
            let regions = [Backing::FilePrivate, Backing::Shm].map(|backing| Region::new(backing, 1).unwrap());
            println!("pages of {} files, by {}", regions.len(), std::process::id());
            crash();
        });
        ending.expect_signal(libc::SIGSEGV);
        let child = ending.output.split_once(" by ").map(|(_, rest)| rest.split_whitespace().next().unwrap().parse());
        assert_eq!(crate::memory::remove_left_by(child.unwrap().unwrap()), 0, "nothing was left to remove");
    }

    fn crash() {
        // SAFETY: it isn't; this is a child process that is meant to crash here.
        unsafe { std::ptr::null::<u8>().with_addr(64).read_volatile() };
    }
}
