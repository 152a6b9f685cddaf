//! Work that a thread begins at once and shares with whoever has time.
//!
//! **Problem.** A scope or a parallel iterator of rayon's puts a caller from outside the pool to sleep until a worker has woken up and done the
//! work, and a worker that is busy with the program's own jobs comes when those are over. Making a mirror current is over sooner than that.
//!
//! **Law.** [`share`] returns when every unit has been worked on. It waits for nobody who has not begun.
//!
//! **Protocol.** The caller works through the units, and asks threads of rayon's pool to do so, too; a counter hands the units out. A helper comes
//! in under the lock before it looks at the work, which is the caller's own, and goes out under it. When the caller finds no unit left it closes
//! the door, and waits for those inside. Who comes to a closed door goes away.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// What a unit is worked on with.
type Work<'a> = dyn Fn(usize) + Sync + 'a;

struct Crew {
    /// That of a caller, who is still in [`share`] as long as anyone is inside. Later it points to nothing.
    work: *const Work<'static>,
    units: usize,
    next: AtomicUsize,
    door: Mutex<Door>,
    /// With `door`: the last one went out.
    empty: Condvar,
}

// SAFETY: `work` is the only part that isn't `Send` and `Sync`, and what it points to is `Sync`: any thread may call it.
unsafe impl Send for Crew {}
// SAFETY: as above.
unsafe impl Sync for Crew {}

#[derive(Default)]
struct Door {
    closed: bool,
    inside: usize,
    panicked: bool,
}

/// Calls `work` once with each number below `units`, on this thread and on those of rayon's pool that come in time.
///
/// # Panics
/// If `work` does.
pub(crate) fn share(units: usize, work: &Work<'_>) {
    // SAFETY: only the lifetime changes, and a pointer promises none.
    let work = unsafe { std::mem::transmute::<*const Work<'_>, *const Work<'static>>(work) };
    let (door, empty) = (Mutex::default(), Condvar::new());
    let crew = Arc::new(Crew { work, units, next: AtomicUsize::new(0), door, empty });
    let closing = Closing(&crew);
    for _ in 1..rayon::current_num_threads().min(units) {
        let crew = Arc::clone(&crew);
        rayon::spawn(move || crew.help());
    }
    crew.work();
    drop(closing);
    assert!(!crew.door().panicked, "a thread that helped has panicked");
}

/// Closes the door and waits for those inside.
struct Closing<'a>(&'a Crew);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let mut door = self.0.door();
        door.closed = true;
        while door.inside > 0 {
            door = self.0.empty.wait(door).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Crew {
    /// By the caller, and inside the door.
    fn work(&self) {
        // SAFETY: `share` has borrowed it, and `Closing` lets that end, also by a panic, only when nobody is inside any more and nobody can come in.
        let work = unsafe { &*self.work };
        // Relaxed: hands out numbers; what the work wrote is seen through the door's lock.
        while let unit = self.next.fetch_add(1, Ordering::Relaxed)
            && unit < self.units
        {
            work(unit);
        }
    }

    fn help(&self) {
        let mut door = self.door();
        if door.closed {
            return;
        }
        door.inside += 1;
        drop(door);
        let panicked = catch_unwind(AssertUnwindSafe(|| self.work())).is_err();
        let mut door = self.door();
        door.inside -= 1;
        door.panicked |= panicked;
        if door.inside == 0 && door.closed {
            self.empty.notify_one();
        }
    }

    fn door(&self) -> MutexGuard<'_, Door> {
        self.door.lock().unwrap_or_else(PoisonError::into_inner) // nothing panics under it
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn each_unit_is_worked_on_once() {
        for units in [0, 1, 2, 7, 1000] {
            let done: Vec<_> = (0..units).map(|_| AtomicUsize::new(0)).collect();
            for _ in 0..50 {
                share(units, &|unit| _ = done[unit].fetch_add(1, Ordering::Relaxed));
            }
            assert!(done.iter().all(|count| count.load(Ordering::Relaxed) == 50), "{units} units");
        }
    }

    fn crew(units: usize, work: &'static Work<'static>) -> Crew {
        Crew { work, units, next: AtomicUsize::new(0), door: Mutex::default(), empty: Condvar::new() }
    }

    #[test]
    fn who_has_begun_is_waited_for_and_who_comes_too_late_finds_nothing() {
        static TOUCHED: AtomicUsize = AtomicUsize::new(0);
        static BEGUN: AtomicUsize = AtomicUsize::new(0);
        static GO: Mutex<()> = Mutex::new(());
        let crew = crew(2, &|_| {
            BEGUN.fetch_add(1, Ordering::Relaxed);
            drop(GO.lock().unwrap());
            TOUCHED.fetch_add(1, Ordering::Relaxed);
        });
        let held = GO.lock().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| crew.help());
            while BEGUN.load(Ordering::Relaxed) == 0 {
                thread::yield_now();
            }
            let closing = scope.spawn(|| {
                drop(Closing(&crew));
                TOUCHED.load(Ordering::Relaxed)
            });
            while !crew.door().closed {
                thread::yield_now();
            }
            assert!(!closing.is_finished(), "the helper is inside");
            drop(held);
            assert_eq!(closing.join().unwrap(), 2, "the helper has left, with both units behind it");
        });
        crew.next.store(0, Ordering::Relaxed);
        crew.help();
        assert_eq!(TOUCHED.load(Ordering::Relaxed), 2, "the door is closed");
    }

    #[test]
    fn a_pool_that_is_busy_is_not_waited_for() {
        let (release, held) = mpsc::channel::<()>();
        let held = Arc::new(Mutex::new(held));
        let (begun, has_begun) = mpsc::channel();
        for _ in 0..rayon::current_num_threads() {
            let (held, begun) = (Arc::clone(&held), begun.clone());
            rayon::spawn(move || {
                begun.send(()).unwrap();
                _ = held.lock().unwrap().recv(); // until `release` is dropped
            });
        }
        (0..rayon::current_num_threads()).for_each(|_| has_begun.recv().unwrap());
        let (done, is_done) = mpsc::channel();
        let caller = thread::spawn(move || {
            let counted = AtomicUsize::new(0);
            share(100, &|_| _ = counted.fetch_add(1, Ordering::Relaxed));
            done.send(counted.into_inner()).unwrap();
        });
        let answer = is_done.recv_timeout(Duration::from_secs(60));
        drop(release);
        caller.join().unwrap();
        assert_eq!(answer, Ok(100));
    }

    #[test]
    fn a_panic_of_a_helper_is_the_callers_and_nobody_is_left_inside() {
        let crew = crew(1, &|_| panic!("a unit that fails"));
        crew.help();
        let door = crew.door();
        assert!(door.panicked && door.inside == 0);
    }
}
