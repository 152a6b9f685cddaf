//! From what happens to an object to a record in the watch queue. Posting allocates nothing, so the monitor may.

use std::sync::atomic::Ordering;

use pinfold_invalidate::{Cause, Change};

use crate::dmabuf::DmaBufPart;
use crate::engine::Engine;
use crate::object::Object;
use crate::state::State;
use crate::watch::{DmaBufEvent, DmaBufNote, Label, NoteCause, NotePath, NoteState, Record, UserptrEvent, UserptrNote};
use crate::{Access, Device, Generation, Path};

/// What happened, apart from changes of the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    Registered,
    Queued,
    Acquired(Path, Generation),
    Faulted(i32),
    /// Its pages were given back to make room.
    Evicted,
    /// Work that uses it has been submitted.
    Submitted,
    /// No work that uses it is under way any more.
    Retired,
    Closed,
}

impl<D: Device> Engine<D> {
    /// Posts what happened to an object.
    pub(crate) fn note(&self, object: &Object<D>, what: What) {
        if !self.notes.is_watched() {
            return;
        }
        let mut note = describe(object);
        (note.event, note.path, note.errno) = match what {
            What::Registered => (UserptrEvent::Registered, NotePath::None, 0),
            What::Queued => (UserptrEvent::Queued, NotePath::None, 0),
            What::Acquired(path, generation) => {
                // As it was published: the monitor may have taken it back since.
                (note.generation, note.state) = (generation.0, NoteState::Valid);
                (UserptrEvent::Acquired, path_code(path), 0)
            }
            What::Faulted(errno) => (UserptrEvent::Faulted, NotePath::None, errno),
            What::Evicted => {
                note.cause = NoteCause::Evicted;
                (UserptrEvent::Invalidated, NotePath::None, 0)
            }
            What::Submitted => (UserptrEvent::Submitted, NotePath::None, 0),
            What::Retired => (UserptrEvent::Retired, NotePath::None, 0),
            What::Closed => (UserptrEvent::Closed, NotePath::None, 0),
        };
        self.notes.post(object.id, &note.record());
    }

    /// How an object stands, for a reader that has just come.
    pub(crate) fn present(&self, object: &Object<D>) -> Record {
        let path = object.slot().pin.as_ref().map_or(NotePath::None, |pin| path_code(pin.path));
        UserptrNote { event: UserptrEvent::Present, path, ..describe(object) }.record()
    }

    /// Posts what happened to the dma-buf that an object's memory is, or has become.
    pub(crate) fn note_dmabuf(&self, object: &Object<D>, event: DmaBufEvent, part: &DmaBufPart) {
        if !self.notes.is_watched() {
            return;
        }
        let note = DmaBufNote {
            event,
            object: object.id,
            generation: object.word.read().generation.0,
            inode: part.buffer.inode(),
            size: part.len,
            offset: part.offset,
            errno: 0,
            reads: true,
            writes: object.access == Access::ReadWrite,
        };
        self.notes.post(object.id, &note.record());
    }

    /// Posts that an object's memory has changed hands, which ended the generation `ended`. For the monitor.
    pub(crate) fn note_change(&self, object: &Object<D>, change: &Change, ended: Generation) {
        // The shard was given up on; was this object's work part of it? It may have ended since the mutator was let go.
        let late = change.late && object.holds.was_late(ended);
        if late {
            self.counters.late.fetch_add(1, Ordering::Relaxed);
        }
        if !self.notes.is_watched() {
            return;
        }
        let touched = change.range.intersection(object.range).unwrap_or(object.range);
        let note = UserptrNote {
            event: UserptrEvent::Invalidated,
            start: touched.start() as u64,
            end: touched.end() as u64,
            hold_off_ns: u64::try_from(change.held.as_nanos()).unwrap_or(u64::MAX),
            cause: cause_code(change.cause),
            late,
            no_hold: change.no_hold,
            ..describe(object)
        };
        self.notes.post(object.id, &note.record());
    }
}

fn describe<D: Device>(object: &Object<D>) -> UserptrNote {
    let now = object.word.read();
    UserptrNote {
        object: object.id,
        generation: now.generation.0,
        start: object.range.start() as u64,
        end: object.range.end() as u64,
        state: state_code(now.state),
        writes: object.access == Access::ReadWrite,
        label: Label::new(&object.label),
        ..UserptrNote::default()
    }
}

fn state_code(state: State) -> NoteState {
    match state {
        State::New => NoteState::New,
        State::Queued => NoteState::Queued,
        State::Acquiring => NoteState::Acquiring,
        State::Valid => NoteState::Valid,
        State::Invalid => NoteState::Invalid,
        State::Faulted => NoteState::Faulted,
        State::Closed => NoteState::Closed,
        State::DeadAfterFork => NoteState::DeadAfterFork,
    }
}

fn cause_code(cause: Cause) -> NoteCause {
    match cause {
        Cause::Unmap => NoteCause::Unmap,
        Cause::Remap => NoteCause::Remap,
        // Discarded pages that are taken once more are still those that were discarded.
        Cause::Remove | Cause::Unproven => NoteCause::Remove,
        Cause::Bracket => NoteCause::Bracket,
        Cause::Injected => NoteCause::Injected,
        _ => NoteCause::Manual,
    }
}

fn path_code(path: Path) -> NotePath {
    match path {
        Path::Import => NotePath::Import,
        Path::AliasImport => NotePath::AliasImport,
        Path::DmaBuf => NotePath::DmaBuf,
        Path::Mirror(_) => NotePath::Mirror,
    }
}
