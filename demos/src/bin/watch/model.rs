//! What is known of the program, from its records alone.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use pinfold_core::watch::{Note, NoteCause, NotePath, NoteState, Record, UserptrEvent, UserptrNote, WorkNote};

/// Upper bounds of the hold-off histogram, in nanoseconds; what is longer goes into one more.
pub(crate) const HOLD_OFF_BOUNDS: [u64; 8] =
    [1_000, 10_000, 100_000, 1_000_000, 10_000_000, 50_000_000, 100_000_000, 1_000_000_000];
/// Their names, and that of the rest.
pub(crate) const HOLD_OFF_NAMES: [&str; 9] = ["1µs", "10µs", "100µs", "1ms", "10ms", "50ms", "100ms", "1s", "more"];
/// How long rates look back.
const WINDOW: Duration = Duration::from_secs(5);
/// How many events are kept to be shown.
const RECENT: usize = 64;

/// One object as it was last heard of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Object {
    pub(crate) note: UserptrNote,
    /// The range, from a record that speaks of all of it.
    pub(crate) bytes: u64,
    pub(crate) start: u64,
}

/// The program as it was last heard of.
pub(crate) struct Model {
    process: u32,
    objects: BTreeMap<u64, Object>,
    /// Objects that were closed while we were still being told what there is: what comes late about them is no news.
    closed: HashSet<u64>,
    complete: bool,
    causes: HashMap<NoteCause, u64>,
    recent_causes: VecDeque<(Instant, NoteCause)>,
    recent: VecDeque<(Duration, UserptrNote)>,
    hold_offs: [u64; HOLD_OFF_BOUNDS.len() + 1],
    late: u64,
    work: Option<WorkNote>,
    loss_records: u64,
    lost: u64,
    records: u64,
    start: Instant,
}

impl Model {
    pub(crate) fn new(process: u32, start: Instant) -> Self {
        Self {
            process,
            objects: BTreeMap::new(),
            closed: HashSet::new(),
            complete: false,
            causes: HashMap::new(),
            recent_causes: VecDeque::new(),
            recent: VecDeque::new(),
            hold_offs: [0; HOLD_OFF_BOUNDS.len() + 1],
            late: 0,
            work: None,
            loss_records: 0,
            lost: 0,
            records: 0,
            start,
        }
    }

    pub(crate) fn take(&mut self, record: &Record, now: Instant) {
        self.records += 1;
        match record.note() {
            Note::Lost => self.loss_records += 1,
            Note::Work(note) => self.work = Some(note),
            Note::Userptr(note) => self.userptr(note, now),
            _ => {}
        }
    }

    fn userptr(&mut self, note: UserptrNote, now: Instant) {
        let id = note.object;
        match note.event {
            UserptrEvent::AllPresent => {
                self.complete = true;
                self.closed.clear();
                return;
            }
            // What happened since is newer than what was told to be there.
            UserptrEvent::Present if self.objects.contains_key(&id) || self.closed.contains(&id) => return,
            UserptrEvent::Present => {}
            UserptrEvent::Closed => {
                self.objects.remove(&id);
                if !self.complete {
                    self.closed.insert(id);
                }
            }
            UserptrEvent::Invalidated | UserptrEvent::Late => self.mutated(&note, now),
            _ => {}
        }
        if note.event != UserptrEvent::Present {
            self.recent.push_front((now.saturating_duration_since(self.start), note));
            self.recent.truncate(RECENT);
        }
        if note.event != UserptrEvent::Closed {
            let known = self.objects.get(&id).copied();
            // An invalidation speaks of the bytes that were touched, everything else of the whole object.
            let whole = !matches!(note.event, UserptrEvent::Invalidated | UserptrEvent::Late) && note.end > note.start;
            let (start, bytes) = match known {
                Some(object) if !whole => (object.start, object.bytes),
                _ => (note.start, note.end.saturating_sub(note.start)),
            };
            // Only an acquisition tells how the bytes reach the device; they do as long as the object is valid.
            let path = match known {
                Some(object) if note.path == NotePath::None && note.state == NoteState::Valid => object.note.path,
                _ => note.path,
            };
            let label = known.map_or(note.label, |object| object.note.label);
            let label = if note.label.as_str().is_empty() { label } else { note.label };
            self.objects.insert(id, Object { note: UserptrNote { label, path, ..note }, bytes, start });
        }
    }

    fn mutated(&mut self, note: &UserptrNote, now: Instant) {
        if note.event == UserptrEvent::Invalidated {
            *self.causes.entry(note.cause).or_default() += 1;
            self.recent_causes.push_back((now, note.cause));
            if note.hold_off_ns > 0 {
                let place = HOLD_OFF_BOUNDS.iter().position(|&bound| note.hold_off_ns < bound);
                self.hold_offs[place.unwrap_or(HOLD_OFF_BOUNDS.len())] += 1;
            }
        }
        self.late += u64::from(note.late || note.event == UserptrEvent::Late);
    }

    /// Forgets what rates don't look back to.
    pub(crate) fn tick(&mut self, now: Instant) {
        while self.recent_causes.front().is_some_and(|(then, _)| now.saturating_duration_since(*then) > WINDOW) {
            self.recent_causes.pop_front();
        }
    }

    pub(crate) fn set_lost(&mut self, lost: u64) {
        self.lost = lost;
    }

    /// Whether everything that there was when we came has been told.
    pub(crate) fn is_complete(&self) -> bool {
        self.complete
    }

    pub(crate) fn process(&self) -> u32 {
        self.process
    }

    pub(crate) fn objects(&self) -> &BTreeMap<u64, Object> {
        &self.objects
    }

    /// How many objects are in this state and reach the device this way.
    pub(crate) fn count(&self, state: NoteState, path: NotePath) -> usize {
        self.objects.values().filter(|object| object.note.state == state && object.note.path == path).count()
    }

    /// The bytes of the objects that reach the device this way.
    pub(crate) fn bytes(&self, path: NotePath) -> u64 {
        self.objects.values().filter(|object| object.note.path == path).map(|object| object.bytes).sum()
    }

    /// Bytes whose pages a device has taken: all paths but the copy.
    pub(crate) fn bytes_pinned(&self) -> u64 {
        [NotePath::Import, NotePath::AliasImport, NotePath::DmaBuf].map(|path| self.bytes(path)).iter().sum()
    }

    /// Invalidations of this cause, in all.
    pub(crate) fn invalidations(&self, cause: NoteCause) -> u64 {
        self.causes.get(&cause).copied().unwrap_or(0)
    }

    /// Invalidations of this cause per second, of late.
    pub(crate) fn rate(&self, cause: NoteCause) -> f64 {
        let count = self.recent_causes.iter().filter(|(_, recent)| *recent == cause).count();
        count as f64 / WINDOW.as_secs_f64()
    }

    pub(crate) fn recent(&self) -> impl Iterator<Item = &(Duration, UserptrNote)> {
        self.recent.iter()
    }

    pub(crate) fn hold_offs(&self) -> &[u64] {
        &self.hold_offs
    }

    pub(crate) fn late(&self) -> u64 {
        self.late
    }

    pub(crate) fn work(&self) -> Option<WorkNote> {
        self.work
    }

    /// Records that this reader lost, and how often it was told so.
    pub(crate) fn lost(&self) -> (u64, u64) {
        (self.lost, self.loss_records)
    }

    pub(crate) fn records(&self) -> u64 {
        self.records
    }
}
