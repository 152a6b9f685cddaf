//! What can happen, why, and to what state and path it leads: each an enum that travels as one byte.
//!
//! A value's code is its place in the enum's list, so the lists only grow at their ends: a reader of another version decodes what it knows, and nothing wrongly.

/// An enum that travels as its position in a list.
pub(super) trait Code: Copy + PartialEq + 'static {
    const ALL: &'static [Self];

    fn code(self) -> u8 {
        let at = Self::ALL.iter().position(|&it| it == self).expect("every value is in its list");
        at as u8
    }

    fn from_code(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }
}

/// A key event, as `NOTIFY_KEY_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyEvent {
    /// The key was instantiated; the other word is an error code.
    Instantiated,
    /// The key has a new value.
    Updated,
    /// A key, the other word, was linked into the keyring.
    Linked,
    /// A key, the other word, was unlinked from the keyring.
    Unlinked,
    /// The keyring was emptied.
    Cleared,
    /// The key was revoked.
    Revoked,
    /// The key was invalidated.
    Invalidated,
    /// Owner, permissions or timeout changed.
    AttributeSet,
}

impl Code for KeyEvent {
    const ALL: &'static [Self] = &[
        Self::Instantiated,
        Self::Updated,
        Self::Linked,
        Self::Unlinked,
        Self::Cleared,
        Self::Revoked,
        Self::Invalidated,
        Self::AttributeSet,
    ];
}

/// What happened to a userptr object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum UserptrEvent {
    /// It was registered.
    #[default]
    Registered,
    /// A worker has been asked to acquire it.
    Queued,
    /// It is valid: the device has its pages, or a fresh copy.
    Acquired,
    /// Its generation moved on: what the device had is stale.
    Invalidated,
    /// It could not be acquired; `errno` says why.
    Faulted,
    /// Work that names it was submitted.
    Submitted,
    /// The last work that named it is over.
    Retired,
    /// A mutator was let go before the work that names it was over.
    Late,
    /// It was closed.
    Closed,
    /// Nothing happened: this is how it stands. Posted for a reader that has just come.
    Present,
    /// This process is a forked child: the object is the parent's.
    Forked,
    /// Every object that there was when the reader came has been told as [`Present`](Self::Present).
    AllPresent,
}

impl Code for UserptrEvent {
    const ALL: &'static [Self] = &[
        Self::Registered,
        Self::Queued,
        Self::Acquired,
        Self::Invalidated,
        Self::Faulted,
        Self::Submitted,
        Self::Retired,
        Self::Late,
        Self::Closed,
        Self::Present,
        Self::Forked,
        Self::AllPresent,
    ];
}

/// Why an object's generation moved on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum NoteCause {
    /// It didn't.
    #[default]
    None,
    /// `munmap`, or a mapping put over it.
    Unmap,
    /// `mremap`.
    Remap,
    /// `madvise` or `fallocate` took the pages out.
    Remove,
    /// A mutation done through the bracket.
    Bracket,
    /// The program said so.
    Manual,
    /// A test said so.
    Injected,
    /// The process forked.
    Fork,
    /// Nobody used it, and its pages made room for others.
    Evicted,
}

impl Code for NoteCause {
    const ALL: &'static [Self] = &[
        Self::None,
        Self::Unmap,
        Self::Remap,
        Self::Remove,
        Self::Bracket,
        Self::Manual,
        Self::Injected,
        Self::Fork,
        Self::Evicted,
    ];
}

/// The state an object is in after the event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum NoteState {
    /// Registered, never acquired.
    #[default]
    New,
    /// A worker will acquire it.
    Queued,
    /// A worker is acquiring it.
    Acquiring,
    /// The device may use it.
    Valid,
    /// The device must not use it.
    Invalid,
    /// The last acquire failed.
    Faulted,
    /// Closed.
    Closed,
    /// Belongs to the parent of this process.
    DeadAfterFork,
}

impl Code for NoteState {
    const ALL: &'static [Self] = &[
        Self::New,
        Self::Queued,
        Self::Acquiring,
        Self::Valid,
        Self::Invalid,
        Self::Faulted,
        Self::Closed,
        Self::DeadAfterFork,
    ];
}

/// How the object's bytes reach the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum NotePath {
    /// They don't, now.
    #[default]
    None,
    /// The program's own mapping is imported.
    Import,
    /// A second mapping of the same pages is imported.
    AliasImport,
    /// Through a dma-buf.
    DmaBuf,
    /// Through a copy in device memory.
    Mirror,
}

impl Code for NotePath {
    const ALL: &'static [Self] = &[Self::None, Self::Import, Self::AliasImport, Self::DmaBuf, Self::Mirror];
}

/// What happened to a piece of work, or to the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum WorkEvent {
    /// It was queued.
    #[default]
    Queued,
    /// A worker runs it.
    Started,
    /// It ran to its end.
    Finished,
    /// It was cancelled before it ran.
    Cancelled,
    /// The pool has one worker more.
    WorkerStarted,
    /// The pool has one worker less.
    WorkerStopped,
    /// Nothing happened: this is how the pool stands.
    Present,
}

impl Code for WorkEvent {
    const ALL: &'static [Self] = &[
        Self::Queued,
        Self::Started,
        Self::Finished,
        Self::Cancelled,
        Self::WorkerStarted,
        Self::WorkerStopped,
        Self::Present,
    ];
}

/// What happened to a dma-buf.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum DmaBufEvent {
    /// It was made from the object's memory.
    #[default]
    Exported,
    /// A device imported it.
    Imported,
    /// The processor begins to use it.
    SyncStart,
    /// The processor is done with it.
    SyncEnd,
    /// Our last handle to it is closed.
    Closed,
    /// Nothing happened: this is how it stands.
    Present,
    /// Somebody has waited for the work that drivers know of; `errno` says whether in vain.
    SyncWaited,
}

impl Code for DmaBufEvent {
    const ALL: &'static [Self] = &[
        Self::Exported,
        Self::Imported,
        Self::SyncStart,
        Self::SyncEnd,
        Self::Closed,
        Self::Present,
        Self::SyncWaited,
    ];
}
