//! What a forked child finds: everything answers "forked", and the parent is none the worse.
//!
//! **Problem.** A child has the parent's handles but none of its threads, and it holds copies of its descriptors. A userfaultfd lives on in such
//! a copy, so that the parent, having closed its own, would wait in its next `munmap` for a reader that doesn't exist.
//!
//! **Law.** No call hangs or touches a device in the child; the child's copies of our descriptors are closed before anything else runs in it.
//!
//! **Protocol.** `pthread_atfork`: *prepare* closes every gate and waits (bounded) until nobody is inside, so that the child's copy of the
//! counters is one of rest; *parent* opens again; *child* closes the descriptors. A bare `clone` runs no handlers: so the child is recognised by
//! a page that the kernel clears at every fork (`MADV_WIPEONFORK`), which also works where the descriptors stay open.

use std::cell::Cell;
use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::time::{Duration, Instant};

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags};

use crate::fault::{self, Call};
use crate::index::holds::forget_others;
use crate::page_size;
use crate::space::{FORK_HANDLERS, Inner, Shards, lock_current};

/// How long a fork waits for threads that are inside a gate, which takes them nanoseconds unless they are preempted.
const PATIENCE: Duration = Duration::from_millis(100);

/// Tells a forked child from the process that made it.
#[derive(Debug)]
pub(crate) enum ForkMark {
    /// A page of our own whose first byte is 1 here and 0 in a child.
    Page(NonNull<c_void>),
    /// The process id, on kernels that can't wipe.
    Pid(u32),
}

// SAFETY: the page is mapped as long as the mark lives, only read, and by single volatile loads.
unsafe impl Send for ForkMark {}
// SAFETY: as for Send.
unsafe impl Sync for ForkMark {}

impl ForkMark {
    pub(crate) fn new() -> Self {
        Self::page().unwrap_or_else(|| Self::Pid(std::process::id()))
    }

    fn page() -> Option<Self> {
        fault::at(Call::Mark).ok()?;
        let size = NonZeroUsize::new(page_size()).expect("a page has bytes");
        // SAFETY: a new mapping anywhere; nothing of the program's is replaced.
        let page = unsafe {
            nix::sys::mman::mmap_anonymous(
                None,
                size,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_PRIVATE,
            )
        }
        .ok()?;
        let mark = Self::Page(page);
        // SAFETY: the page is ours alone, just mapped.
        unsafe { nix::sys::mman::madvise(page, size.get(), MmapAdvise::MADV_WIPEONFORK) }.ok()?;
        // SAFETY: mapped writable above, and nobody else knows it yet.
        unsafe { page.cast::<u8>().write_volatile(1) };
        Some(mark)
    }

    #[inline]
    pub(crate) fn is_child(&self) -> bool {
        match self {
            // SAFETY: the page is mapped readable until the mark is dropped.
            Self::Page(page) => unsafe { page.cast::<u8>().read_volatile() == 0 },
            Self::Pid(pid) => std::process::id() != *pid,
        }
    }
}

impl Drop for ForkMark {
    fn drop(&mut self) {
        if let Self::Page(page) = *self {
            // SAFETY: mapped by `page`, and the mark's last use.
            let _ = unsafe { nix::sys::mman::munmap(page, page_size()) };
        }
    }
}

/// The space the handlers act on. Written and read under the lock of `lock_current`, which the handlers hold across the fork.
static ACTIVE: AtomicPtr<Inner> = AtomicPtr::new(std::ptr::null_mut());

thread_local! {
    /// The lock, kept from *prepare* to *parent* or *child*. `ManuallyDrop` semantics by `Option`: a thread that dies in between doesn't exist.
    static HELD: Cell<Option<Held>> = const { Cell::new(None) };
}

type Held = std::sync::MutexGuard<'static, std::sync::Weak<crate::Space>>;

/// Makes `inner` the space the handlers act on. The caller holds the lock of `lock_current`.
pub(crate) fn install(inner: &Arc<Inner>) {
    ACTIVE.store(Arc::as_ptr(inner).cast_mut(), Ordering::Relaxed);
    FORK_HANDLERS.get_or_init(|| {
        // SAFETY: the three are `extern "C"` functions that live as long as the program and don't unwind.
        unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) };
    });
}

/// Ends that, if it is still this one. When it returns, no handler uses `inner`.
pub(crate) fn uninstall(inner: &Arc<Inner>) {
    let this = Arc::as_ptr(inner).cast_mut();
    if ACTIVE.load(Ordering::Relaxed) != this {
        return; // never installed, as its making failed (under the lock), or replaced by a later space
    }
    let _lock = lock_current();
    let _ = ACTIVE.compare_exchange(this, std::ptr::null_mut(), Ordering::Relaxed, Ordering::Relaxed);
}

fn with_active(act: impl FnOnce(&Inner)) {
    // SAFETY: null, or a space that `install` named and `uninstall` hasn't taken back: its end needs the lock that this thread holds.
    if let Some(inner) = unsafe { ACTIVE.load(Ordering::Relaxed).as_ref() } {
        act(inner);
    }
}

extern "C" fn prepare() {
    let held = lock_current();
    with_active(|inner| {
        let deadline = Instant::now() + PATIENCE;
        inner.shards.iter().for_each(|shard| shard.gate.close());
        Shards::ALL.iter().for_each(|shard| _ = inner.shards[shard].gate.wait_users(Some(deadline)));
    });
    HELD.set(Some(held));
}

extern "C" fn parent() {
    with_active(|inner| inner.shards.iter().for_each(|shard| shard.gate.open()));
    drop(HELD.take());
}

extern "C" fn child() {
    forget_others();
    with_active(|inner| {
        inner.close_descriptors();
        // Open, so that a call that overlooks the mark meets no closed gate either: it would wait for an opener that doesn't exist here.
        inner.shards.iter().for_each(|shard| {
            shard.gate.told();
            shard.gate.open();
        });
    });
    ACTIVE.store(std::ptr::null_mut(), Ordering::Relaxed);
    drop(HELD.take());
}
