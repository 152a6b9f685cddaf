//! Which way a range reaches the device: a table of wishes, and the reasons to do something else.

use std::fmt;

use pinfold_core::{MirrorReason, Path, Policy, Use};
use pinfold_invalidate::{Backing, FileId, Mapping, Protection};

use crate::{Force, TrialResult};

/// What a driver can treat differently: where the pages come from, and whether the program may write them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MappingKind {
    /// Where the pages come from.
    pub source: Source,
    /// Whether the mapping is writable.
    pub writable: bool,
}

/// Where the pages of a mapping come from, and who else sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// Private anonymous memory, `[heap]` and the stack too.
    Anonymous,
    /// A private mapping of a memfd or of other shared memory.
    PrivateMemfd,
    /// A shared mapping of a memfd, `/dev/shm`, System V or anonymous shared memory.
    SharedMemfd,
    /// A private mapping of any other file.
    PrivateFile,
    /// A shared mapping of any other file.
    SharedFile,
}

/// A way to the device that isn't a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Import the program's own mapping.
    Import,
    /// Import a second mapping of the same pages, so that the device is safe from the program's `munmap`.
    Alias,
}

/// The way each kind of memory goes if the device lets it. Only shared memory can have an alias.
const WAYS: [(Source, Way); 5] = [
    (Source::Anonymous, Way::Import),
    (Source::PrivateMemfd, Way::Import),
    (Source::SharedMemfd, Way::Alias),
    (Source::PrivateFile, Way::Import),
    (Source::SharedFile, Way::Alias),
];

impl MappingKind {
    /// Every kind there is.
    pub const ALL: [Self; 10] = {
        let mut all = [Self { source: Source::Anonymous, writable: false }; 10];
        let mut at = 0;
        while at < all.len() {
            all[at] = Self { source: WAYS[at / 2].0, writable: at % 2 == 1 };
            at += 1;
        }
        all
    };

    /// The kind of a mapping.
    #[must_use]
    pub fn of(mapping: &Mapping) -> Self {
        let source = match (mapping.backing, mapping.shared) {
            (Backing::SharedMemory, true) => Source::SharedMemfd,
            (Backing::SharedMemory, false) => Source::PrivateMemfd,
            (Backing::File, true) => Source::SharedFile,
            (Backing::File, false) => Source::PrivateFile,
            (Backing::Anonymous | Backing::Heap | Backing::Stack | Backing::Special, _) => Source::Anonymous,
        };
        Self { source, writable: mapping.protection.write }
    }

    /// The place of this kind in [`ALL`](Self::ALL).
    pub(crate) fn index(self) -> usize {
        self.source as usize * 2 + usize::from(self.writable)
    }

    /// The path that this kind of memory takes where the device lets it.
    #[must_use]
    pub fn wish(self) -> Path {
        match self.way() {
            Way::Import => Path::Import,
            Way::Alias => Path::AliasImport,
        }
    }

    fn way(self) -> Way {
        WAYS[self.source as usize].1
    }
}

impl fmt::Display for MappingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.writable { "writable " } else { "read-only " })?;
        f.write_str(match self.source {
            Source::Anonymous => "anonymous memory",
            Source::PrivateMemfd => "private mapping of shared memory",
            Source::SharedMemfd => "shared memory",
            Source::PrivateFile => "private mapping of a file",
            Source::SharedFile => "shared mapping of a file",
        })
    }
}

/// A part of one file, mapped without a gap and with one protection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Run {
    pub(crate) file: FileId,
    pub(crate) protection: Protection,
    pub(crate) offset: u64,
    pub(crate) len: usize,
}

impl Run {
    /// Whether all of `other` is a part of it.
    pub(crate) fn covers(&self, other: &Self) -> bool {
        let end = |run: &Self| run.offset + run.len as u64;
        self.file == other.file
            && self.protection == other.protection
            && self.offset <= other.offset
            && end(other) <= end(self)
    }

    /// The run that `mappings` are; `None` unless they are one, and shared. The kernel may have split it into several mappings.
    pub(crate) fn of(mappings: &[Mapping]) -> Option<Self> {
        let first = mappings.first()?;
        let mut run = Self { file: first.file?, protection: first.protection, offset: first.offset, len: 0 };
        for mapping in mappings {
            let next = run.offset + run.len as u64;
            let same = mapping.shared
                && mapping.file == Some(run.file)
                && mapping.protection == run.protection
                && mapping.offset == next;
            if !same {
                return None;
            }
            run.len += mapping.range.len();
        }
        Some(run)
    }
}

/// What to do with a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Plan {
    Import,
    Alias(Run),
    /// By way of a dma-buf made of this part of a memory file.
    DmaBuf(Run),
    Mirror(MirrorReason),
}

/// What [`decide`] needs to know of the device.
pub(crate) struct Rules {
    pub(crate) force: Option<Force>,
    /// Host memory can be imported at all.
    pub(crate) imports: bool,
    /// An alias, which can start at any page, can be imported: imports need no coarser alignment than a page.
    pub(crate) aliases: bool,
    /// Dma-bufs can be imported, as far as the device's extensions say.
    pub(crate) dmabufs: bool,
}

/// Whether an object has been taken often enough to judge by.
pub(crate) fn is_known(used: Use) -> bool {
    const ENOUGH: u64 = 4;
    used.imports >= ENOUGH
}

/// Whether copying an object is the better deal: what taking its pages cost so far, and what mirrors would have. A refresh counts as a quarter of
/// a copy, as it copies what has changed. Asked only once there is something to judge by: an object that is taken once and used for ever is
/// best imported at any cost.
pub(crate) fn is_mirror_cheaper(used: Use, import_ns: u64, copy_ns: u64) -> bool {
    let imports = (u128::from(used.imports) * u128::from(import_ns)).saturating_mul(4);
    let copies = (u128::from(used.imports) * 4 + u128::from(used.leases)).saturating_mul(copy_ns.into());
    is_known(used) && imports > copies
}

/// The way of a range that consists of `mappings`.
///
/// A range that isn't one run of one file (shared and private memory mixed, two files side by side) is imported as the program mapped it:
/// an alias of a part would protect that part only.
///
/// Where the device refuses shared memory as it is mapped (devices that mirror the page tables take anonymous memory only), a dma-buf of it is tried.
pub(crate) fn decide(
    rules: &Rules,
    policy: Policy,
    mappings: &[Mapping],
    trial: impl Fn(MappingKind) -> TrialResult,
) -> Plan {
    let shared = || mappings.iter().all(|mapping| MappingKind::of(mapping).source == Source::SharedMemfd);
    let run = || Run::of(mappings).filter(|_| rules.dmabufs && shared());
    match rules.force {
        Some(Force::DmaBuf) if run().is_some() => return run().map_or(Plan::Import, Plan::DmaBuf),
        Some(Force::Mirror) => return Plan::Mirror(MirrorReason::Forced),
        None if policy == Policy::Mirror => return Plan::Mirror(MirrorReason::Asked),
        None if !rules.imports && run().is_some() => return run().map_or(Plan::Import, Plan::DmaBuf),
        _ if !rules.imports => return Plan::Mirror(MirrorReason::Unsupported),
        Some(Force::Import | Force::DmaBuf) => return Plan::Import,
        Some(Force::Alias) => {}
        None => {
            let refused = mappings.iter().find_map(|mapping| trial(MappingKind::of(mapping)).refusal());
            if let Some(code) = refused {
                if let Some(run) = run() {
                    return Plan::DmaBuf(run);
                }
                return Plan::Mirror(MirrorReason::Refused(code.as_raw()));
            }
        }
    }
    let wishes_alias = mappings.iter().all(|mapping| MappingKind::of(mapping).way() == Way::Alias);
    match Run::of(mappings) {
        Some(run) if wishes_alias && rules.aliases => Plan::Alias(run),
        _ => Plan::Import,
    }
}

#[cfg(test)]
mod tests {
    use ash::vk;
    use pinfold_invalidate::{HostRange, page_size};

    use super::*;

    const RULES: Rules = Rules { force: None, imports: true, aliases: true, dmabufs: false };

    /// A mapping of page `page`, which is page `file_page` of file `inode` if the memory has one.
    fn mapping(page: usize, source: Source, writable: bool, inode: u64, file_page: u64) -> Mapping {
        let range = HostRange::new(page * page_size(), page_size()).unwrap();
        let (backing, shared) = match source {
            Source::Anonymous => (Backing::Anonymous, false),
            Source::PrivateMemfd => (Backing::SharedMemory, false),
            Source::SharedMemfd => (Backing::SharedMemory, true),
            Source::PrivateFile => (Backing::File, false),
            Source::SharedFile => (Backing::File, true),
        };
        let file = (source != Source::Anonymous).then_some(FileId { major: 1, minor: 2, inode });
        let protection = Protection { read: true, write: writable, exec: false };
        Mapping { range, whole: range, protection, shared, backing, file, offset: file_page * page_size() as u64 }
    }

    fn plan(rules: &Rules, mappings: &[Mapping]) -> Plan {
        decide(rules, Policy::Auto, mappings, |_| TrialResult::Imported)
    }

    #[test]
    fn kinds_know_their_place() {
        for (at, kind) in MappingKind::ALL.into_iter().enumerate() {
            assert_eq!(kind.index(), at);
            let sample = mapping(1, kind.source, kind.writable, 7, 0);
            assert_eq!(MappingKind::of(&sample), kind);
            assert_eq!(WAYS[kind.source as usize].0, kind.source);
            // An alias of private memory can't be made: the kernel refuses.
            assert_eq!(kind.way() == Way::Alias, sample.shared);
        }
    }

    #[test]
    fn a_shared_file_in_several_mappings_is_one_run() {
        let pages: Vec<_> = (0..3).map(|n| mapping(10 + n, Source::SharedFile, true, 7, n as u64)).collect();
        let Plan::Alias(run) = plan(&RULES, &pages) else { panic!("no alias") };
        assert_eq!((run.offset, run.len), (0, 3 * page_size()));
    }

    #[test]
    fn what_is_not_one_run_is_imported_as_it_is() {
        let shared = |page, inode, at| mapping(page, Source::SharedMemfd, true, inode, at);
        let mut other_protection = shared(2, 7, 1);
        other_protection.protection.write = false;
        let cases: [(&str, [Mapping; 2]); 4] = [
            ("two files", [shared(1, 7, 0), shared(2, 8, 1)]),
            ("a gap in the file", [shared(1, 7, 0), shared(2, 7, 2)]),
            ("two protections", [shared(1, 7, 0), other_protection]),
            ("private memory behind it", [shared(1, 7, 0), mapping(2, Source::Anonymous, true, 0, 0)]),
        ];
        for (what, mappings) in cases {
            assert_eq!(plan(&RULES, &mappings), Plan::Import, "{what}");
        }
    }

    #[test]
    fn one_refused_kind_makes_the_whole_range_a_mirror() {
        let mappings = [mapping(1, Source::Anonymous, true, 0, 0), mapping(2, Source::PrivateFile, false, 7, 0)];
        let refuse_files = |kind: MappingKind| match kind.source {
            Source::PrivateFile => TrialResult::Refused(vk::Result::ERROR_UNKNOWN),
            _ => TrialResult::Imported,
        };
        let refused = Plan::Mirror(MirrorReason::Refused(vk::Result::ERROR_UNKNOWN.as_raw()));
        assert_eq!(decide(&RULES, Policy::Auto, &mappings, refuse_files), refused);
        assert_eq!(decide(&RULES, Policy::Auto, &mappings[..1], refuse_files), Plan::Import);
    }

    #[test]
    fn a_policy_wins_over_trials_and_force_over_both() {
        let mappings = [mapping(1, Source::Anonymous, true, 0, 0)];
        let trial = |_| TrialResult::Imported;
        assert_eq!(decide(&RULES, Policy::Mirror, &mappings, trial), Plan::Mirror(MirrorReason::Asked));
        let forced = Rules { force: Some(Force::Import), ..RULES };
        assert_eq!(decide(&forced, Policy::Mirror, &mappings, trial), Plan::Import);
    }

    #[test]
    fn a_mirror_is_cheaper_only_where_imports_are_dear_and_short_lived() {
        let used = |imports, leases| Use { imports, leases };
        assert!(!is_mirror_cheaper(used(3, 3), 1000, 1), "nothing to judge by yet");
        assert!(is_mirror_cheaper(used(4, 4), 1000, 100));
        assert!(!is_mirror_cheaper(used(4, 4), 100, 100), "an import that costs what a copy costs");
        assert!(is_mirror_cheaper(used(10, 300), 1000, 100));
        assert!(!is_mirror_cheaper(used(10, 400), 1000, 100), "one that lives long enough");
        assert!(is_mirror_cheaper(used(u64::MAX, 1), u64::MAX, 1), "no overflow");
    }

    #[test]
    fn force_wins_over_trials_but_not_over_a_missing_extension() {
        let shared = [mapping(1, Source::SharedMemfd, true, 7, 0)];
        let private = [mapping(1, Source::PrivateFile, false, 7, 0)];
        let refuse = |_| TrialResult::Refused(vk::Result::ERROR_UNKNOWN);
        let forced = |force, mappings: &[Mapping]| {
            decide(&Rules { force: Some(force), ..RULES }, Policy::Mirror, mappings, refuse)
        };
        assert_eq!(forced(Force::Mirror, &shared), Plan::Mirror(MirrorReason::Forced));
        assert_eq!(forced(Force::Import, &shared), Plan::Import);
        assert!(matches!(forced(Force::Alias, &shared), Plan::Alias(_)));
        assert_eq!(forced(Force::Alias, &private), Plan::Import);
        let none = Rules { force: Some(Force::Import), imports: false, aliases: false, dmabufs: true };
        assert_eq!(decide(&none, Policy::Auto, &shared, refuse), Plan::Mirror(MirrorReason::Unsupported));
    }

    #[test]
    fn shared_memory_that_is_refused_goes_by_way_of_a_dma_buf_and_other_memory_does_not() {
        let rules = Rules { dmabufs: true, ..RULES };
        let refuse = |_| TrialResult::Refused(vk::Result::ERROR_UNKNOWN);
        let shared = [mapping(1, Source::SharedMemfd, true, 7, 3), mapping(2, Source::SharedMemfd, true, 7, 4)];
        let Plan::DmaBuf(run) = decide(&rules, Policy::Auto, &shared, refuse) else { panic!("no dma-buf") };
        assert_eq!((run.offset, run.len), (3 * page_size() as u64, 2 * page_size()));
        let mirrored = Plan::Mirror(MirrorReason::Refused(vk::Result::ERROR_UNKNOWN.as_raw()));
        for source in [Source::Anonymous, Source::PrivateMemfd, Source::PrivateFile, Source::SharedFile] {
            assert_eq!(decide(&rules, Policy::Auto, &[mapping(1, source, true, 7, 0)], refuse), mirrored, "{source:?}");
        }
        let two_files = [mapping(1, Source::SharedMemfd, true, 7, 0), mapping(2, Source::SharedMemfd, true, 8, 1)];
        assert_eq!(decide(&rules, Policy::Auto, &two_files, refuse), mirrored);
        assert_eq!(decide(&RULES, Policy::Auto, &shared, refuse), mirrored, "a device without the extension");
        assert!(matches!(plan(&rules, &shared), Plan::Alias(_)), "what can be imported is");
        let none = Rules { imports: false, ..rules };
        assert!(
            matches!(decide(&none, Policy::Auto, &shared, refuse), Plan::DmaBuf(_)),
            "a device without imports of host memory"
        );
    }
}
