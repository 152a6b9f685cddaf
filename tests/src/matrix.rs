//! What must become of an object when memory of each kind suffers each mutation: the table, as a function, and as a page.
//!
//! **Problem.** Fourteen kinds of memory, twenty mutations and three situations are 840 cells; written by hand, half of them would be forgotten.
//!
//! **Law.** [`expect`] answers for every cell, from what the kernel reports about the kind and about the mutation, not from a list of cells. The test
//! programs `matrix` and `vk_matrix` hold each device to it.

use std::fmt::Write;

use crate::memory::Backing;

/// A kind of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A mapping of its own.
    Mapped(Backing),
    /// In the main stack, whose mutators are told of and not held.
    Stack,
    /// In `[heap]`, likewise.
    Brk,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 14] = [
        Self::Mapped(Backing::Anonymous),
        Self::Mapped(Backing::AnonymousHuge),
        Self::Stack,
        Self::Brk,
        Self::Mapped(Backing::AnonymousShared),
        Self::Mapped(Backing::Memfd),
        Self::Mapped(Backing::Shm),
        Self::Mapped(Backing::FileShared),
        Self::Mapped(Backing::MemfdPrivate),
        Self::Mapped(Backing::FilePrivate),
        Self::Mapped(Backing::FileReadOnly),
        Self::Mapped(Backing::FileSharedReadOnly),
        Self::Mapped(Backing::MemfdSealedReadOnly),
        Self::Mapped(Backing::HugeTlb),
    ];

    /// How its mappings behave.
    #[must_use]
    pub fn backing(self) -> Backing {
        match self {
            Self::Mapped(backing) => backing,
            Self::Stack | Self::Brk => Backing::Anonymous,
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Stack => "stack",
            Self::Brk => "brk",
            Self::Mapped(backing) => match backing {
                Backing::Anonymous => "anonymous",
                Backing::AnonymousHuge => "huge pages (THP)",
                Backing::AnonymousShared => "anonymous, shared",
                Backing::Memfd => "memfd",
                Backing::MemfdPrivate => "memfd, private",
                Backing::Shm => "tmpfs",
                Backing::FileShared => "file, shared",
                Backing::FilePrivate => "file, private",
                Backing::FileReadOnly => "file, read-only",
                Backing::FileSharedReadOnly => "file, shared read-only",
                Backing::MemfdSealedReadOnly => "memfd, sealed read-only",
                Backing::HugeTlb => "hugetlb",
            },
        }
    }

    /// Pages in one of the four parts that the mutations are about. For huge pages so many that the whole is one.
    #[must_use]
    pub fn unit(self) -> usize {
        match self.backing() {
            Backing::AnonymousHuge => 128,
            Backing::HugeTlb => 512,
            _ => 1,
        }
    }

    fn anonymous(self) -> bool {
        matches!(self.backing(), Backing::Anonymous | Backing::AnonymousHuge)
    }

    fn has_file(self) -> bool {
        !self.anonymous() && !matches!(self.backing(), Backing::AnonymousShared | Backing::HugeTlb)
    }
}

/// What is done to the memory of an object of four parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Mutation {
    UnmapWhole,
    UnmapHead,
    UnmapMiddle,
    UnmapTail,
    MapFixed,
    Grow,
    Shrink,
    Move,
    MoveDontUnmap,
    MoveOnto,
    DontNeed,
    Free,
    Remove,
    PageOut,
    Collapse,
    Guard,
    Protect,
    Truncate,
    PunchHole,
    Fork,
}

impl Mutation {
    /// Every mutation.
    pub const ALL: [Self; 20] = [
        Self::UnmapWhole,
        Self::UnmapHead,
        Self::UnmapMiddle,
        Self::UnmapTail,
        Self::MapFixed,
        Self::Grow,
        Self::Shrink,
        Self::Move,
        Self::MoveDontUnmap,
        Self::MoveOnto,
        Self::DontNeed,
        Self::Free,
        Self::Remove,
        Self::PageOut,
        Self::Collapse,
        Self::Guard,
        Self::Protect,
        Self::Truncate,
        Self::PunchHole,
        Self::Fork,
    ];

    fn title(self) -> &'static str {
        match self {
            Self::UnmapWhole => "munmap, whole",
            Self::UnmapHead => "munmap, head",
            Self::UnmapMiddle => "munmap, middle",
            Self::UnmapTail => "munmap, tail",
            Self::MapFixed => "MAP_FIXED",
            Self::Grow => "mremap, growing",
            Self::Shrink => "mremap, shrinking",
            Self::Move => "mremap, away",
            Self::MoveDontUnmap => "MREMAP_DONTUNMAP",
            Self::MoveOnto => "mremap, onto it",
            Self::DontNeed => "MADV_DONTNEED",
            Self::Free => "MADV_FREE",
            Self::Remove => "MADV_REMOVE",
            Self::PageOut => "MADV_PAGEOUT",
            Self::Collapse => "MADV_COLLAPSE",
            Self::Guard => "MADV_GUARD_INSTALL",
            Self::Protect => "mprotect",
            Self::Truncate => "ftruncate",
            Self::PunchHole => "FALLOC_FL_PUNCH_HOLE",
            Self::Fork => "fork",
        }
    }
}

/// What the object is doing meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Situation {
    /// It is valid, and no work uses it.
    Idle,
    /// Work that uses it is under way.
    Busy,
    /// The device has just taken its pages, and they are not published yet.
    Acquiring,
}

impl Situation {
    /// Every situation.
    pub const ALL: [Self; 3] = [Self::Idle, Self::Busy, Self::Acquiring];
}

/// What the kernel makes of the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// It does what was asked.
    Done,
    /// It refuses, for this kind of memory; the program and the device go on seeing the same.
    Refused,
    /// It may do either, by how the pages happen to lie.
    Either,
    /// There is nothing to call it with: no descriptor.
    Impossible,
}

/// How the object comes to know of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    /// By an event: whoever has returned from the mutation finds the object invalid, and work under way has been waited for.
    Held,
    /// By an event, soon after the mutator has been let go: memory that the C library itself lives in.
    NotHeld,
    /// Not at all; the device goes on seeing the pages that the program goes on having.
    NothingToTell,
    /// Not at all, and the device goes on seeing pages that are no longer the program's, until it is told.
    Stale,
    /// Not at all; whether the device sees old pages depends on whether it has copies of its own.
    Unsaid,
}

/// What the next acquisition finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// What is mapped there then.
    Pages,
    /// A fault, until the hole is filled.
    Fault,
    /// Memory that the program may read and not write.
    ReadOnly,
}

/// One cell, but for the situation, which adds: *busy*, a mutator that is told of is held until the work is over; *acquiring*, what was taken
/// before a mutation that is told of is thrown away and taken anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// What the kernel makes of the call.
    pub call: Call,
    /// How the object comes to know.
    pub news: News,
    /// What the next acquisition finds.
    pub after: After,
}

/// What must become of an object over this kind of memory.
#[must_use]
pub fn expect(kind: Kind, mutation: Mutation) -> Expected {
    use Mutation::{
        Collapse, DontNeed, Fork, Free, Grow, Guard, MapFixed, Move, MoveDontUnmap, MoveOnto, PageOut, Protect,
        PunchHole, Remove, Shrink, Truncate, UnmapHead, UnmapMiddle, UnmapTail, UnmapWhole,
    };
    let backing = kind.backing();
    let (huge, shared) = (backing == Backing::HugeTlb, backing.shared());
    let call = match mutation {
        Free if !kind.anonymous() => Call::Refused,
        // Wants a shared mapping that could be written.
        Remove if !(shared && backing.writable()) => Call::Refused,
        // The neighbour is in the way.
        Grow if matches!(kind, Kind::Stack | Kind::Brk) => Call::Refused,
        Grow if huge => Call::Either,
        MoveDontUnmap | PageOut | Guard if huge => Call::Refused,
        Collapse => Call::Either,
        Truncate | PunchHole if !kind.has_file() => Call::Impossible,
        // Opened for reading only.
        Truncate | PunchHole if !backing.writable() && backing.on_disk() => Call::Refused,
        PunchHole if backing == Backing::MemfdSealedReadOnly => Call::Refused,
        _ => Call::Done,
    };
    let reported = match (kind, mutation) {
        _ if !backing.watchable() => None,
        (_, Grow | PageOut | Collapse | Guard | Protect | Truncate | PunchHole | Fork) => None,
        (Kind::Stack | Kind::Brk, _) => Some(News::NotHeld),
        (Kind::Mapped(_), _) => Some(News::Held),
    };
    let news = reported.unwrap_or(match mutation {
        Grow | PageOut | Collapse | Protect | Fork => News::NothingToTell,
        // The same pages, or a mapping of the same pages, come back.
        DontNeed | MapFixed | MoveDontUnmap if shared => News::NothingToTell,
        Free => News::NothingToTell,
        // Pages that were copied on write are not the file's any more.
        PunchHole if !shared => News::Unsaid,
        UnmapWhole | UnmapHead | UnmapMiddle | UnmapTail | Shrink | Move | MoveOnto | Remove | Guard | Truncate
        | PunchHole => News::Stale,
        DontNeed | MapFixed | MoveDontUnmap => News::Unsaid,
    });
    let after = match mutation {
        UnmapWhole | UnmapHead | UnmapMiddle | UnmapTail | Shrink | Move | Guard | Truncate => After::Fault,
        Protect => After::ReadOnly,
        _ => After::Pages,
    };
    Expected { call, news, after }
}

/// Whether a driver that reads through the program's own page table crashes by its nature: the kernel tells of holes when they are there.
#[must_use]
pub fn crashes_by_nature(kind: Kind, mutation: Mutation, situation: Situation) -> bool {
    let Expected { call, news, after } = expect(kind, mutation);
    let alias = kind.backing().shared();
    let under_work = situation == Situation::Busy;
    call == Call::Done
        && after == After::Fault
        && under_work
        // A file that is cut is cut for every mapping of it; any other hole only in the program's.
        && (mutation == Mutation::Truncate || !alias)
        && news != News::NothingToTell
}

/// Whether the kernel fills the hole before a driver crashes in it: the stack grows into a hole below a part of it, and the driver reads zeros. Guard pages
/// are no hole.
#[must_use]
pub fn is_filled(kind: Kind, mutation: Mutation) -> bool {
    kind == Kind::Stack && mutation != Mutation::Guard
}

/// How many of the cells come to what on a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Verdicts {
    /// The object and the device did what the table says.
    pub as_expected: usize,
    /// The kernel refuses the mutation for that kind of memory, and object and program stay in step.
    pub refused: usize,
    /// The device can't be given that kind of memory; it says so.
    pub not_pinnable: usize,
    /// The device crashes by its nature; run in a process of its own.
    pub crashes: usize,
    /// There is nothing to call the mutation with.
    pub impossible: usize,
    /// This machine lacks the memory, or this kernel the mutation.
    pub skipped: usize,
}

/// The table as a part of the page.
#[must_use]
pub(crate) fn page() -> String {
    let mut page = HEAD.to_owned();
    let titles: Vec<_> = Kind::ALL.iter().map(|kind| kind.title()).collect();
    writeln!(page, "| | {} |", titles.join(" | ")).expect("a String takes every line");
    writeln!(page, "|{}", " --- |".repeat(titles.len() + 1)).expect("a String takes every line");
    for mutation in Mutation::ALL {
        let cells: Vec<_> = Kind::ALL.iter().map(|&kind| cell(kind, mutation)).collect();
        writeln!(page, "| {} | {} |", mutation.title(), cells.join(" | ")).expect("a String takes every line");
    }
    page
}

fn cell(kind: Kind, mutation: Mutation) -> String {
    let Expected { call, news, after } = expect(kind, mutation);
    match call {
        Call::Impossible => return String::new(),
        Call::Refused => return "✗".into(),
        Call::Done | Call::Either => {}
    }
    let news = match news {
        News::Held => "held",
        News::NotHeld => "told",
        News::NothingToTell => "same",
        News::Stale => "**silent**",
        News::Unsaid => "silent",
    };
    match after {
        After::Fault => format!("{news}, fault"),
        After::Pages | After::ReadOnly => news.to_owned(),
    }
}

const HEAD: &str = "
## The matrix

Every kind of memory by every mutation, each while the object is idle, while work uses it, and while the device has taken its pages and not yet
published them: 840 cells for a device, generated. `tests/matrix.rs` runs them on the scripted and the DMA device, `tests/vk_matrix.rs` the idle and the busy
ones on the Vulkan drivers. Each cell ends with the hole filled, new bytes written, and the device seeing what the program sees.

- *held*: whoever returns finds the object invalid; work under way has been waited for; what was being taken is thrown away and taken anew.
- *told*: the same, but the mutator is not held (the C library lives there).
- *same*: no event, and none is needed: the device goes on seeing the program's pages.
- *silent*: no event, and the device goes on seeing pages that may not be the program's any more; in bold, surely not: the test demands that the stale pages
  show. `invalidate` or a bracket makes it right, and the test goes on by the former.
- *fault*: the next acquire faults until the hole is filled.
- ✗: the kernel refuses this for that kind of memory. Empty: there is no descriptor to call it with.

Verdicts of their own, never counted as passed: the DMA device can't pin what the program may not write, nor a shared mapping of a file on a disk
(*not pinnable*: the acquire says so); a CPU driver that reads through the program's page table crashes when a hole is made under running work, or a file is cut
(*crashes by nature*: each of these cells is run in a process of its own, and must end by `SIGSEGV` or `SIGBUS`; but for holes in the stack, which the kernel fills by letting
it grow); mutations that the kernel lacks are *skipped* and said, and so is hugetlb memory where the pool has too few huge pages: root puts them in for
the time of the tests.

";
