//! Which processor a thread runs on. A time in which one thread wakes another depends on that more than on anything else.

use std::fs;
use std::io;
use std::time::{Duration, Instant};

/// The processors this process may use, lowest first. What the main thread was given at the start; pinning it later changes nothing here.
pub(crate) fn allowed() -> Vec<usize> {
    use std::sync::OnceLock;
    static ALLOWED: OnceLock<Vec<usize>> = OnceLock::new();
    ALLOWED.get_or_init(read_allowed).clone()
}

fn read_allowed() -> Vec<usize> {
    let mut set = empty();
    // SAFETY: `set` is a live set of the size given, which the call fills.
    let answer = unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set) };
    if answer != 0 {
        return vec![0];
    }
    // SAFETY: the macro behind it reads a bit of the live set; every number below CPU_SETSIZE is one of its bits.
    (0..libc::CPU_SETSIZE.unsigned_abs() as usize).filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) }).collect()
}

fn empty() -> libc::cpu_set_t {
    // SAFETY: a set is an array of integers, for which zero is a value: no processor.
    unsafe { std::mem::zeroed() }
}

/// Keeps the thread `tid` (0: the caller) on these processors.
pub(crate) fn pin(tid: i32, cpus: &[usize]) -> io::Result<()> {
    let mut set = empty();
    for &cpu in cpus.iter().filter(|&&cpu| cpu < libc::CPU_SETSIZE.unsigned_abs() as usize) {
        // SAFETY: the macro behind it sets a bit of the live set, one that it has.
        unsafe { libc::CPU_SET(cpu, &mut set) };
    }
    // SAFETY: `set` is a live set of the size given, which the call reads.
    let answer = unsafe { libc::sched_setaffinity(tid, size_of::<libc::cpu_set_t>(), &raw const set) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The thread of this process with this name, of which the kernel keeps 15 bytes. A thread names itself, so one that has just been started is waited for.
pub(crate) fn thread_named(name: &str) -> Option<i32> {
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        let found = find_thread(name);
        if found.is_some() || Instant::now() > deadline {
            return found;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn find_thread(name: &str) -> Option<i32> {
    let tasks = fs::read_dir("/proc/self/task").ok()?.flatten();
    let mut fits =
        tasks.filter(|task| fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == name));
    fits.next()?.file_name().to_str()?.parse().ok()
}

/// While it lives the calling thread is on one processor, and afterwards on all that the process may use.
pub(crate) struct Pinned(());

impl Pinned {
    /// On the processor `at` places behind the first; the last one if there are not so many.
    pub(crate) fn to(at: usize) -> Self {
        let cpus = allowed();
        // Refused only by a system that doesn't let a process move at all; then nothing moves.
        let _ = pin(0, &cpus[at.min(cpus.len() - 1)..][..1]);
        Self(())
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = pin(0, &allowed());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pinned_thread_is_where_it_was_put_and_is_found_by_its_name() {
        let all = allowed();
        std::thread::Builder::new()
            .name("harness-pinned".into())
            .spawn(move || {
                assert!(thread_named("harness-pinned").is_some_and(|tid| tid > 0));
                let pinned = Pinned::to(0);
                assert_eq!(read_allowed(), all[..1]);
                drop(pinned);
                assert_eq!(read_allowed(), all);
            })
            .unwrap()
            .join()
            .unwrap();
    }
}
