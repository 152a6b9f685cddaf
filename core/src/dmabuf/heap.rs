//! New pages as dma-bufs, from `/dev/dma_heap/*`.
//!
//! The system heap refuses no size: a request for a pebibyte ends in the out-of-memory killer, which takes whom it likes. So two bounds are
//! checked here before the kernel is asked: the program's own budget, and what the machine says is available.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pinfold_invalidate::page_size;

use super::{DmaBuf, DmaBufError, sys};

const FOLDER: &str = "/dev/dma_heap";

/// How many bytes may be allocated from heaps, all that share it together. What has been allocated counts until it is
/// [given back](Self::give_back), as its descriptors may live on anywhere.
#[derive(Debug)]
pub struct HeapBudget {
    most: u64,
    taken: AtomicU64,
}

impl HeapBudget {
    /// A budget of this many bytes.
    #[must_use]
    pub fn new(most: u64) -> Arc<Self> {
        Arc::new(Self { most, taken: AtomicU64::new(0) })
    }

    /// Bytes that are left.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.most.saturating_sub(self.taken.load(Ordering::Relaxed))
    }

    /// Says that a buffer of this many bytes, allocated under this budget, has been closed by everybody.
    pub fn give_back(&self, bytes: u64) {
        let less = |taken: u64| Some(taken.saturating_sub(bytes));
        // Relaxed, here and below: a bound, not a message. The closure never answers None.
        let _ = self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    fn take(&self, bytes: u64) -> Result<(), DmaBufError> {
        let more = |taken: u64| taken.checked_add(bytes).filter(|&sum| sum <= self.most);
        match self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            Ok(_) => Ok(()),
            Err(_) => Err(DmaBufError::Budget { needed: bytes, what: "the budget for heaps", available: self.left() }),
        }
    }
}

/// A heap, open.
#[derive(Debug)]
pub struct Heap {
    device: File,
    budget: Arc<HeapBudget>,
}

impl Heap {
    /// The names of the heaps that the machine has; empty if it has none.
    #[must_use]
    pub fn names() -> Vec<String> {
        let entries = fs::read_dir(FOLDER).into_iter().flatten().filter_map(Result::ok);
        let mut names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    }

    /// Opens a heap by its name: `system` is the one that every kernel with heaps has.
    ///
    /// # Errors
    /// [`DmaBufError::NoDevice`], [`DmaBufError::Denied`], [`DmaBufError::Name`].
    pub fn open(name: &str, budget: &Arc<HeapBudget>) -> Result<Self, DmaBufError> {
        if name.is_empty() || name.starts_with('.') || name.contains(['/', '\0']) {
            return Err(DmaBufError::Name { len: name.len() });
        }
        let path: PathBuf = Path::new(FOLDER).join(name);
        let opened = OpenOptions::new().read(true).write(true).open(&path);
        let option = "CONFIG_DMABUF_HEAPS and CONFIG_DMABUF_HEAPS_SYSTEM (Linux 5.6)";
        let device = opened.map_err(|source| DmaBufError::open(path, option, "system_heap", source))?;
        Ok(Self { device, budget: Arc::clone(budget) })
    }

    /// A dma-buf of at least `len` bytes, rounded up to whole pages, all zero.
    ///
    /// # Errors
    /// [`DmaBufError::Budget`] above the budget or above what is available; [`DmaBufError::Part`] for no bytes; [`DmaBufError::System`].
    pub fn allocate(&self, len: u64) -> Result<DmaBuf, DmaBufError> {
        let page = page_size() as u64;
        let rounded = len.checked_next_multiple_of(page).filter(|&rounded| rounded > 0);
        let rounded = rounded.ok_or(DmaBufError::Part { offset: 0, len, size: 0, step: page })?;
        self.budget.take(rounded)?;
        let made = available(rounded).and_then(|()| {
            let failed = DmaBufError::system("DMA_HEAP_IOCTL_ALLOC", "the heap");
            DmaBuf::from_fd(sys::heap_alloc(self.device.as_fd(), rounded).map_err(failed)?)
        });
        made.inspect_err(|_| self.budget.give_back(rounded))
    }
}

/// Whether the kernel thinks that this much can be had without swapping.
fn available(needed: u64) -> Result<(), DmaBufError> {
    let line = |line: &String| line.starts_with("MemAvailable:");
    let lines = File::open("/proc/meminfo").map(|file| BufReader::new(file).lines().map_while(Result::ok));
    let found = lines.ok().and_then(|mut lines| lines.find(line));
    let kib = found.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    // A machine that doesn't tell is trusted with what it never told: then the budget is what bounds.
    let available = kib.map_or(u64::MAX, |kib| kib << 10);
    if needed <= available {
        return Ok(());
    }
    Err(DmaBufError::Budget { needed, what: "the memory available (MemAvailable in /proc/meminfo)", available })
}
