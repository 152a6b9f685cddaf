//! A watch list: who wants to hear of which object.
//!
//! Posting walks a snapshot of the list, so it waits for nobody. Everything else takes the list's lock, then, where needed, a queue's; a watch is released by
//! whoever took it out of the list under that lock, so exactly once, whoever else was about to remove it. Release callbacks and the freeing
//! of old snapshots happen when no lock is held.

use std::sync::{Arc, Weak};

use thiserror::Error;

use super::queue::{Attachment, Offered, QueueInner, WatchQueue};
use super::record::Record;
use super::snapshot::{Garbage, Look, Snapshot};
use super::sync::{Mutex, lock};

/// Which posts a watch hears of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// Those of every object.
    All,
    /// Those of the object with this id.
    Object(u64),
}

impl Scope {
    /// The id that a removal record carries; 0 for none.
    fn object(self) -> u64 {
        match self {
            Self::All => 0,
            Self::Object(id) => id,
        }
    }
}

/// A watch that is gone, as a release callback gets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Released {
    /// What it heard of.
    pub scope: Scope,
    /// Its tag.
    pub tag: u8,
}

/// Why a watch was not made or not removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum WatchError {
    /// The queue watches this already. `EBUSY`.
    #[error("the queue watches {0:?} on this list already")]
    Exists(Scope),
    /// The queue is cleared. `ENOENT`.
    #[error("the queue is cleared; make a new one")]
    Defunct,
    /// The queue's owner has as many watches as it may have. `EAGAIN`.
    #[error("the owner of the queue has {0} watches, the most it may have; remove one or raise RLIMIT_NOFILE")]
    Limit(usize),
    /// The queue doesn't watch this. `EBADSLT`.
    #[error("the queue doesn't watch {0:?} on this list")]
    NotWatched(Scope),
}

impl WatchError {
    /// The errno that the kernel answers in this case.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Exists(_) => libc::EBUSY,
            Self::Defunct => libc::ENOENT,
            Self::Limit(_) => libc::EAGAIN,
            Self::NotWatched(_) => libc::EBADSLT,
        }
    }
}

/// The watches of a set of objects. Dropping it removes them all: each watcher gets a removal record.
pub struct WatchList {
    inner: Arc<ListInner>,
}

impl WatchList {
    /// An empty list.
    #[must_use]
    pub fn new() -> Self {
        Self::with(None)
    }

    /// An empty list that calls `release` once for each watch that is gone, with no lock held.
    #[must_use]
    pub fn with_release(release: impl Fn(Released) + Send + Sync + 'static) -> Self {
        Self::with(Some(Box::new(release)))
    }

    fn with(release: Option<Box<Release>>) -> Self {
        Self { inner: Arc::new(ListInner { posted_to: Snapshot::empty(), watches: Mutex::new(Vec::new()), release }) }
    }

    /// Gives the record to every queue that watches this object, marked with the watch's tag.
    ///
    /// Never waits, allocates, frees, or makes a system call that could block: right for the thread that a mutator waits for. A queue that has no room gets
    /// a loss record instead.
    #[inline]
    pub fn post(&self, object: u64, record: &Record) {
        // Only this much in the caller: most posts find nobody.
        if self.is_watched() {
            self.inner.post(object, record);
        }
    }

    /// Whether a post would find a watch at all. Cheap, for callers that would have to build the record first; may lag.
    #[inline]
    #[must_use]
    pub fn is_watched(&self) -> bool {
        self.inner.posted_to.is_some()
    }

    /// Lets the queue hear of `scope`; what it gets carries `tag`.
    ///
    /// # Errors
    /// [`WatchError::Defunct`], [`WatchError::Exists`] if it hears of that already, [`WatchError::Limit`]: in this order.
    pub fn add_watch(&self, queue: &WatchQueue, scope: Scope, tag: u8) -> Result<(), WatchError> {
        self.add_queue(&queue.inner, scope, tag)
    }

    pub(super) fn add_queue(&self, queue: &Arc<QueueInner>, scope: Scope, tag: u8) -> Result<(), WatchError> {
        self.inner.add(&Arc::downgrade(&self.inner), queue, scope, tag)
    }

    /// Ends a watch. Its queue gets a removal record.
    ///
    /// # Errors
    /// [`WatchError::NotWatched`].
    pub fn remove_watch(&self, queue: &WatchQueue, scope: Scope) -> Result<(), WatchError> {
        let wanted = |watch: &Watch| watch.is(&queue.inner, scope);
        if self.inner.remove(wanted, |watch| Some(watch.scope.object())) {
            Ok(())
        } else {
            Err(WatchError::NotWatched(scope))
        }
    }

    /// The object goes away: ends every watch on it. The removal records carry its id.
    pub fn remove_object(&self, object: u64) {
        self.inner.remove(|watch| watch.scope == Scope::Object(object), |_| Some(object));
    }

    /// Whatever the list stands for goes away: ends every watch. The removal records carry this id.
    pub fn remove_all(&self, object: u64) {
        self.inner.remove(|_| true, |_| Some(object));
    }

    /// How many watches there are.
    #[must_use]
    pub fn len(&self) -> usize {
        lock(&self.inner.watches).len()
    }

    /// Whether there is no watch.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Default for WatchList {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for WatchList {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WatchList").field("watches", &self.len()).finish()
    }
}

type Release = dyn Fn(Released) + Send + Sync;

#[derive(Clone)]
struct Watch {
    queue: Arc<QueueInner>,
    scope: Scope,
    tag: u8,
}

impl Watch {
    fn is(&self, queue: &QueueInner, scope: Scope) -> bool {
        std::ptr::eq(&raw const *self.queue, queue) && self.scope == scope
    }

    /// Not inlined: in a loop over watches the compiler would prepare all that might be needed of the record, and spill it.
    #[inline(never)]
    fn offer(&self, object: u64, record: &Record) {
        self.queue.offer(object, record, self.tag);
    }
}

/// What posts walk: a copy of a list's watches.
enum Posted {
    /// One, which hears of every object.
    One(Watch),
    Several {
        /// Those that hear of every object.
        of_all: Box<[Watch]>,
        /// The others, sorted by scope.
        of_one: Box<[Watch]>,
    },
}

impl Posted {
    fn offer(&self, object: u64, record: &Record) {
        match self {
            Self::One(watch) => watch.offer(object, record),
            Self::Several { of_all, of_one } => {
                of_all.iter().for_each(|watch| watch.offer(object, record));
                let first = of_one.partition_point(|watch| watch.scope < Scope::Object(object));
                let these = of_one[first..].iter().take_while(|watch| watch.scope == Scope::Object(object));
                these.for_each(|watch| watch.offer(object, record));
            }
        }
    }
}

pub(super) struct ListInner {
    /// What posts walk, or nothing if there are no watches.
    posted_to: Snapshot<Posted>,
    /// Sorted by scope. The list's lock: comes before a queue's.
    watches: Mutex<Vec<Watch>>,
    release: Option<Box<Release>>,
}

impl ListInner {
    /// What a post nearly always finds is done here. Whatever else there is goes on in a function of its own, which takes over the look: so this one calls
    /// nothing, and has nothing to keep over a call.
    fn post(&self, object: u64, record: &Record) {
        let Some(look) = self.posted_to.look() else { return self.post_anyhow(object, record) };
        match look.value() {
            Some(Posted::One(watch)) if !watch.queue.is_choosy() => {
                match watch.queue.offer_plainly(record, watch.tag) {
                    Offered::Whole => {}
                    Offered::Uncalled => call_one(look),
                    Offered::Not => store_one(look, record),
                }
            }
            Some(_) => offer_on(look, object, record),
            None => {}
        }
    }

    /// The same for a thread that has no seat, or looks at something already.
    #[inline(never)]
    fn post_anyhow(&self, object: u64, record: &Record) {
        self.posted_to.read(|posted| posted.offer(object, record));
    }

    fn add(&self, this: &Weak<Self>, queue: &Arc<QueueInner>, scope: Scope, tag: u8) -> Result<(), WatchError> {
        if queue.is_defunct() {
            return Err(WatchError::Defunct);
        }
        let mut watches = lock(&self.watches);
        if watches.iter().any(|watch| watch.is(queue, scope)) {
            return Err(WatchError::Exists(scope));
        }
        if !queue.limit.charge() {
            return Err(WatchError::Limit(queue.limit.max()));
        }
        let mut attachments = lock(&queue.watches);
        let Some(attached) = attachments.as_mut() else {
            queue.limit.uncharge();
            return Err(WatchError::Defunct);
        };
        queue.reserve_removal(attached.len());
        attached.push(Attachment { list: this.clone(), scope });
        drop(attachments);
        let at = watches.partition_point(|watch| watch.scope <= scope);
        watches.insert(at, Watch { queue: Arc::clone(queue), scope, tag });
        let garbage = self.publish(&watches);
        drop(watches);
        drop(garbage);
        Ok(())
    }

    /// Takes out the watches that are `wanted` and tells their queues, with the id that `told` answers. Answers whether there were any.
    fn remove(&self, wanted: impl Fn(&Watch) -> bool, told: impl Fn(&Watch) -> Option<u64>) -> bool {
        let mut watches = lock(&self.watches);
        let (gone, kept) = std::mem::take(&mut *watches).into_iter().partition::<Vec<_>, _>(wanted);
        *watches = kept;
        let garbage = if gone.is_empty() { None } else { Some(self.publish(&watches)) };
        for watch in &gone {
            if let Some(attached) = lock(&watch.queue.watches).as_mut() {
                let mine = |at: &Attachment| at.scope == watch.scope && std::ptr::eq(at.list.as_ptr(), self);
                attached.retain(|at| !mine(at));
            }
        }
        drop(watches);
        drop(garbage);
        for watch in &gone {
            watch.queue.limit.uncharge(); // first: who reads that a watch is gone may make another
            if let Some(object) = told(watch) {
                watch.queue.announce_removal(&Record::removal(object), watch.tag);
            }
            if let Some(release) = &self.release {
                release(Released { scope: watch.scope, tag: watch.tag });
            }
        }
        !gone.is_empty()
    }

    /// The queue goes away: takes its watch out and tells it nothing.
    pub(super) fn detach(&self, queue: &QueueInner, scope: Scope) {
        self.remove(|watch| watch.is(queue, scope), |_| None);
    }

    fn publish(&self, watches: &[Watch]) -> Garbage<Posted> {
        self.posted_to.replace((!watches.is_empty()).then(|| {
            let (of_all, of_one) = watches.split_at(watches.partition_point(|watch| watch.scope == Scope::All));
            Box::new(match (of_all, of_one) {
                ([watch], []) => Posted::One(watch.clone()),
                _ => Posted::Several { of_all: of_all.into(), of_one: of_one.into() },
            })
        }))
    }
}

/// Goes on with a post that has offered the record to nobody.
#[inline(never)]
fn offer_on(look: Look<'_, Posted>, object: u64, record: &Record) {
    if let Some(posted) = look.value() {
        posted.offer(object, record);
    }
}

/// Goes on with a post that hasn't stored its record in the only queue, which wants it.
#[inline(never)]
fn store_one(look: Look<'_, Posted>, record: &Record) {
    if let Some(Posted::One(watch)) = look.value() {
        watch.queue.store(record, watch.tag);
    }
}

/// Goes on with a post that has stored its record in the only queue.
#[inline(never)]
fn call_one(look: Look<'_, Posted>) {
    if let Some(Posted::One(watch)) = look.value() {
        watch.queue.call();
    }
}

impl Drop for ListInner {
    fn drop(&mut self) {
        self.remove(|_| true, |watch| Some(watch.scope.object()));
    }
}
