//! Records and snapshots as JSON.

use std::fmt::Debug;
use std::time::Duration;

use pinfold_core::watch::{Note, Record};
use serde_json::{Value, json};

use crate::model::{HOLD_OFF_NAMES, Model};
use crate::view::{CAUSES, PATHS, STATES};

/// One record, at this time since we attached.
pub(crate) fn line(record: &Record, at: Duration) -> Value {
    let mut value = match record.note() {
        Note::Removed(object) => json!({ "type": "meta", "event": "removed", "object": object }),
        Note::Lost => json!({ "type": "meta", "event": "lost" }),
        Note::Key(note) => json!({ "type": "key", "event": name(note.event), "key": note.key, "aux": note.aux }),
        Note::Userptr(note) => json!({
            "type": "userptr", "event": name(note.event), "object": note.object, "generation": note.generation,
            "start": note.start, "end": note.end, "hold_off_ns": note.hold_off_ns, "cause": name(note.cause),
            "state": name(note.state), "path": name(note.path), "errno": note.errno, "late": note.late,
            "no_hold": note.no_hold, "writes": note.writes, "label": note.label.as_str(),
        }),
        Note::Work(note) => json!({
            "type": "work", "event": name(note.event), "work": note.work, "object": note.object,
            "waited_ns": note.waited_ns, "ran_ns": note.ran_ns, "workers": note.workers, "running": note.running,
            "pending": note.pending, "errno": note.errno,
        }),
        Note::DmaBuf(note) => json!({
            "type": "dmabuf", "event": name(note.event), "object": note.object, "generation": note.generation,
            "inode": note.inode, "size": note.size, "offset": note.offset, "errno": note.errno,
            "reads": note.reads, "writes": note.writes,
        }),
        _ => json!({ "type": record.kind(), "event": record.subtype(), "bytes": record.payload() }),
    };
    value["at_us"] = json!(at.as_micros() as u64);
    value["tag"] = json!(record.tag());
    value
}

/// How things stand.
pub(crate) fn snapshot(model: &Model) -> Value {
    let objects = model.objects().iter().map(|(id, object)| {
        json!({
            "object": id, "label": object.note.label.as_str(), "state": name(object.note.state),
            "path": name(object.note.path), "generation": object.note.generation, "start": object.start,
            "bytes": object.bytes, "no_hold": object.note.no_hold,
        })
    });
    let states = STATES.iter().flat_map(|&state| {
        PATHS.iter().map(move |&path| (state, path, model.count(state, path))).filter(|(_, _, count)| *count > 0)
    });
    let states =
        states.map(|(state, path, count)| json!({ "state": name(state), "path": name(path), "objects": count }));
    let bytes = PATHS.iter().map(|&path| (name(path), json!(model.bytes(path)))).collect::<serde_json::Map<_, _>>();
    let causes = CAUSES.iter().map(|&cause| (name(cause), json!(model.invalidations(cause))));
    let hold_offs =
        HOLD_OFF_NAMES.iter().zip(model.hold_offs()).map(|(name, count)| ((*name).to_owned(), json!(count)));
    let work =
        model.work().map(|work| json!({ "workers": work.workers, "running": work.running, "pending": work.pending }));
    json!({
        "process": model.process(), "complete": model.is_complete(),
        "states": states.collect::<Vec<_>>(), "bytes": bytes, "bytes_pinned": model.bytes_pinned(),
        "invalidations": causes.collect::<serde_json::Map<_, _>>(),
        "hold_off_below": hold_offs.collect::<serde_json::Map<_, _>>(),
        "late": model.late(), "lost": model.lost().0, "pool": work, "objects": objects.collect::<Vec<_>>(),
    })
}

/// `AllPresent` as `all_present`.
pub(crate) fn name(value: impl Debug) -> String {
    let mut out = String::new();
    for (at, letter) in format!("{value:?}").char_indices() {
        if letter.is_uppercase() && at > 0 {
            out.push('_');
        }
        out.extend(letter.to_lowercase());
    }
    out
}
