//! System calls that fail on purpose. Compiled into unit tests only; elsewhere [`at`] is nothing.
//!
//! The kernel refuses when memory, mappings, descriptors or rights run out, which a test can't bring about at one chosen call. So each call of
//! ours that may be refused asks here first. Faults belong to the thread that asked for them: the monitor's calls go through.

use std::io;

/// A call that may be refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    /// `userfaultfd`, and the device node in its place.
    Open,
    Api,
    Register,
    Unregister,
    /// `UFFDIO_WRITEPROTECT`, asked whether a page is watched.
    Protect,
    /// `UFFDIO_WRITEPROTECT`, asked whether an event is in flight.
    Probe,
    /// `PROCMAP_QUERY`.
    Query,
    /// Opening the text of `/proc/self/maps`.
    Text,
    /// `PAGEMAP_SCAN`, and opening the file for it.
    Scan,
    Epoll,
    EventFd,
    Thread,
    /// `mmap` and `madvise` of the page that tells a forked child.
    Mark,
}

/// The refusal that a test has asked for, if it is this call's turn.
#[cfg(not(all(test, not(loom))))]
#[inline(always)]
#[expect(clippy::unnecessary_wraps, clippy::inline_always, reason = "its other self, below, refuses")]
pub(crate) fn at(_: Call) -> io::Result<()> {
    Ok(())
}

#[cfg(all(test, not(loom)))]
pub(crate) use tested::{at, meanwhile, refuse, refused};

#[cfg(all(test, not(loom)))]
mod tested {
    use std::cell::{Cell, RefCell};

    use super::{Call, io};

    /// Which call, how many of them go through before, how many then are refused, with what.
    type Plan = (Call, u32, u32, i32);

    thread_local! {
        static PLAN: Cell<Option<Plan>> = const { Cell::new(None) };
        static REFUSED: Cell<u32> = const { Cell::new(0) };
        static ACT: RefCell<Option<Act>> = const { RefCell::new(None) };
    }

    /// Before which call something is to be done, and what.
    type Act = (Call, Box<dyn FnOnce()>);

    pub(crate) fn at(call: Call) -> io::Result<()> {
        if let Some((_, act)) = ACT.with_borrow_mut(|act| act.take_if(|act| act.0 == call)) {
            act();
        }
        let Some((planned, before, times, errno)) = PLAN.get().filter(|plan| plan.0 == call && plan.2 > 0) else {
            return Ok(());
        };
        if before > 0 {
            PLAN.set(Some((planned, before - 1, times, errno)));
            return Ok(());
        }
        PLAN.set(Some((planned, 0, times - 1, errno)));
        REFUSED.set(REFUSED.get() + 1);
        Err(io::Error::from_raw_os_error(errno))
    }

    /// While `body` runs, `times` calls of this thread are refused, after `before` that are not.
    pub(crate) fn refuse<R>(call: Call, before: u32, times: u32, errno: i32, body: impl FnOnce() -> R) -> R {
        REFUSED.set(0);
        PLAN.set(Some((call, before, times, errno)));
        let result = body();
        PLAN.set(None);
        result
    }

    /// While `body` runs, `act` is done once, right before this thread's next call of that kind, as another thread might.
    pub(crate) fn meanwhile<R>(call: Call, act: impl FnOnce() + 'static, body: impl FnOnce() -> R) -> R {
        ACT.set(Some((call, Box::new(act))));
        let result = body();
        assert!(ACT.take().is_none(), "there was no such call");
        result
    }

    /// How many calls have been refused since the last [`refuse`] began.
    pub(crate) fn refused() -> u32 {
        REFUSED.get()
    }
}
