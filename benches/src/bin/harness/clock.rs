//! Stopwatches. A value is the time of many repetitions divided by their number, so that reading the clock is not what is measured.

use std::time::{Duration, Instant};

/// Nanoseconds a repetition, by the clock on the wall.
pub(crate) fn wall(repetitions: usize, mut work: impl FnMut()) -> f64 {
    let begun = Instant::now();
    for _ in 0..repetitions {
        work();
    }
    nanoseconds(begun.elapsed()) / repetitions as f64
}

/// Nanoseconds a repetition of the calling thread's own processor time: what other processes do in between doesn't count, only what they do to the caches.
pub(crate) fn cpu(repetitions: usize, mut work: impl FnMut()) -> f64 {
    let begun = thread_time();
    for _ in 0..repetitions {
        work();
    }
    nanoseconds(thread_time().saturating_sub(begun)) / repetitions as f64
}

pub(crate) fn nanoseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e9
}

pub(crate) fn microseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// Processor time of the calling thread.
pub(crate) fn thread_time() -> Duration {
    // SAFETY: a timespec is two integers, for which zero is a value.
    let mut now: libc::timespec = unsafe { std::mem::zeroed() };
    // SAFETY: `now` is a live timespec that the call writes.
    let answer = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut now) };
    assert_eq!(answer, 0, "every thread has a clock");
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).expect("less than a second"))
}
