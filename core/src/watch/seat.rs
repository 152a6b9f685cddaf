//! Who is looking at what: a seat for each thread, in which it says what it looks at without disturbing the others.
//!
//! A counter per value would do, but counting up and down costs a post two atomic additions, and a cache line that travels between the posting
//! threads. A thread's own seat takes two plain stores.
//!
//! **Laws.** A seat belongs to one thread at a time: taken by compare-exchange at the thread's first look, given back when the thread ends. Looking
//! never allocates, so the end is told by a pthread key, whose value the C libraries keep inside the thread for low-numbered keys. A thread without a seat
//! (all are taken, or there is no such key) is told so, and counts instead. In a forked child the seats of the threads that did not come along stay
//! taken, with what they said; only the one thread that came uses its own.

use std::cell::Cell;
use std::ptr;

use super::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
#[cfg(not(loom))]
use key::{ASKED, MINE, SEATS, told_at_end};
#[cfg(loom)]
use model::{ASKED, MINE, SEATS, told_at_end};

/// A look at a filter happens inside a look at a list; deeper ones count.
const DEPTH: usize = 2;

#[derive(Debug)]
#[repr(align(128))]
struct Seat {
    taken: AtomicBool,
    /// What the thread looks at. Written by that thread only.
    looking: [AtomicPtr<()>; DEPTH],
}

/// A thread says that it is looking, until this is dropped.
pub(super) struct Looking {
    place: &'static AtomicPtr<()>,
}

impl Looking {
    /// The same as [`at`](Self::at) for a thread that has a seat and looks at nothing, as most have and do; `None` for the others.
    #[inline]
    pub(super) fn just_at(what: *const ()) -> Option<Self> {
        let place = &MINE.with(Cell::get)?.looking[0];
        // The orders are those of `at`.
        place.load(Ordering::Relaxed).is_null().then(|| {
            place.store(what.cast_mut(), Ordering::Relaxed);
            Self { place }
        })
    }

    /// Says that this thread looks at `what`; `None` if it can't be said here. The caller passes [`light`](super::barrier::light) before it looks.
    #[inline]
    pub(super) fn at(what: *const ()) -> Option<Self> {
        let seat = match MINE.with(Cell::get) {
            Some(seat) => seat,
            None => take()?,
        };
        // Relaxed: written by this thread only.
        let place = seat.looking.iter().find(|place| place.load(Ordering::Relaxed).is_null())?;
        // Relaxed: the barrier orders it before the look.
        place.store(what.cast_mut(), Ordering::Relaxed);
        Some(Self { place })
    }
}

impl Drop for Looking {
    #[inline]
    fn drop(&mut self) {
        // Release: what was looked at was looked at before anybody sees that it isn't any more.
        self.place.store(ptr::null_mut(), Ordering::Release);
    }
}

/// Whether any seated thread is looking at `what`. The caller has passed [`heavy`](super::barrier::heavy).
pub(super) fn is_looked_at(what: *const ()) -> bool {
    // Acquire: pairs with the Release of the drop.
    SEATS.iter().flat_map(|seat| &seat.looking).any(|place| ptr::eq(place.load(Ordering::Acquire), what))
}

/// Looks for a seat, once in a thread's life. Who found none stays without.
#[cold]
fn take() -> Option<&'static Seat> {
    if ASKED.with(|asked| asked.replace(true)) {
        return None;
    }
    // Acquire: pairs with the Release of who had the seat before: its looks are over.
    let free = |seat: &Seat| seat.taken.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok();
    let seat = SEATS.iter().position(free);
    let seat = seat.filter(|&seat| {
        let told = told_at_end(seat);
        if !told {
            leave(seat);
        }
        told
    });
    let seat = seat.map(|seat| &SEATS[seat]);
    MINE.with(|mine| mine.set(seat));
    seat
}

fn leave(seat: usize) {
    // Release: pairs with the Acquire in `take`.
    SEATS[seat].taken.store(false, Ordering::Release);
}

#[cfg(not(loom))]
pub(super) use key::prepare;
#[cfg(loom)]
pub(super) use model::prepare;

#[cfg(not(loom))]
mod key {
    use std::cell::Cell;
    use std::ptr;
    use std::sync::OnceLock;

    use super::{AtomicBool, AtomicPtr, DEPTH, Seat, leave};

    /// 8 KiB. Threads that post at the same time are the workers, the monitor, and the engine's own.
    pub(super) static SEATS: [Seat; 64] =
        [const { Seat { taken: AtomicBool::new(false), looking: [const { AtomicPtr::new(ptr::null_mut()) }; DEPTH] } };
            64];

    thread_local! {
        /// Has no destructor and a constant start, so touching it doesn't allocate.
        pub(super) static MINE: Cell<Option<&'static Seat>> = const { Cell::new(None) };
        /// Whether this thread has looked for a seat.
        pub(super) static ASKED: Cell<bool> = const { Cell::new(false) };
    }

    /// The key whose destructor gives a seat back; `None` if its values would be allocated.
    static KEY: OnceLock<Option<libc::pthread_key_t>> = OnceLock::new();

    /// glibc keeps the values of this many keys inside the thread (`PTHREAD_KEY_2NDLEVEL_SIZE`); musl those of all.
    const KEPT_INSIDE: libc::pthread_key_t = 32;

    /// Makes the key, once. Without this call nobody has a seat.
    pub(in super::super) fn prepare() {
        KEY.get_or_init(|| {
            let mut key = 0;
            // SAFETY: `key` is writable for the length of the call; the destructor is a function of this program that takes what it is given.
            let made = unsafe { libc::pthread_key_create(&raw mut key, Some(thread_ends)) } == 0;
            made.then_some(key).filter(|&key| key < KEPT_INSIDE)
        });
    }

    /// Sees to it that the seat is given back when this thread ends. Answers whether that can be.
    pub(super) fn told_at_end(seat: usize) -> bool {
        // One more than the seat's number, as a null value isn't told.
        let value = ptr::without_provenance(seat + 1);
        // SAFETY: the key was made by `prepare` and is never deleted; the value is a number.
        KEY.get().copied().flatten().is_some_and(|key| unsafe { libc::pthread_setspecific(key, value) } == 0)
    }

    extern "C" fn thread_ends(value: *mut libc::c_void) {
        // A destructor that comes later and posts has to count.
        MINE.set(None);
        leave(value.addr() - 1);
    }
}

/// The models' threads never end before the model does, so none gives its seat back.
#[cfg(loom)]
mod model {
    use std::cell::Cell;
    use std::ptr;

    use super::{AtomicBool, AtomicPtr, Seat};

    loom::lazy_static! {
        /// Fewer than threads, so that some have to count.
        pub(super) static ref SEATS: [Seat; 2] = std::array::from_fn(|_| Seat {
            taken: AtomicBool::new(false),
            looking: std::array::from_fn(|_| AtomicPtr::new(ptr::null_mut())),
        });
    }

    loom::thread_local! {
        pub(super) static MINE: Cell<Option<&'static Seat>> = Cell::new(None);
        pub(super) static ASKED: Cell<bool> = Cell::new(false);
    }

    pub(in super::super) fn prepare() {}

    pub(super) fn told_at_end(_: usize) -> bool {
        true
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::Barrier;
    use std::thread;

    use super::{Looking, SEATS, is_looked_at, prepare};

    #[test]
    fn who_looks_is_seen_looking_until_the_end_of_the_look() {
        prepare();
        let (list, filter, deeper) = (1_u8, 2_u8, 3_u8);
        let [list, filter, deeper] = [&raw const list, &raw const filter, &raw const deeper].map(<*const u8>::cast);
        let outer = Looking::at(list).expect("a seat");
        let inner = Looking::at(filter).expect("the seat's second place");
        assert!(Looking::at(deeper).is_none(), "a seat has two places");
        assert!(is_looked_at(list) && is_looked_at(filter) && !is_looked_at(deeper));
        drop(outer);
        assert!(!is_looked_at(list) && is_looked_at(filter));
        drop(inner);
        assert!(!is_looked_at(filter));
    }

    #[test]
    fn seats_are_given_back_by_threads_that_end_and_who_finds_none_is_told() {
        prepare();
        let what = std::ptr::from_ref(&SEATS).cast();
        for _ in 0..3 * SEATS.len() {
            let seated = thread::spawn(move || Looking::at(std::ptr::from_ref(&SEATS).cast()).is_some()).join();
            assert!(seated.expect("a thread"), "threads that have ended still have their seats");
        }
        // More threads at a time than there are seats, also with the other tests' threads.
        let all_here = Barrier::new(SEATS.len() + 1);
        let look = || {
            let looking = Looking::at(std::ptr::from_ref(&SEATS).cast());
            all_here.wait();
            looking.is_some()
        };
        let seated = thread::scope(|scope| {
            let threads = (0..=SEATS.len()).map(|_| scope.spawn(look)).collect::<Vec<_>>();
            threads.into_iter().map(|thread| thread.join().expect("a thread")).filter(|&seated| seated).count()
        });
        assert!(seated <= SEATS.len());
        assert!(!is_looked_at(what));
    }
}
