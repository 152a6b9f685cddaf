//! The rows. Names are the peers'; what a row checks, and why it doesn't apply, is said in our words.

/// How a peer's test is carried over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// As it is: the same operations, the same demand.
    Direct,
    /// In spirit: what it does to a kernel interface is done to what stands for it here.
    Adapted,
    /// Not at all, for this reason.
    NotApplicable(&'static str),
    /// It applies, and nobody has carried it over.
    Missing,
}

/// One test of a peer, or a family of them.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// The peer's name for it. What comes in variants is written with braces, as in a shell.
    pub name: &'static str,
    /// What it checks.
    pub checks: &'static str,
    /// How it is carried over.
    pub verdict: Verdict,
}

/// The tests of one peer.
#[derive(Debug, Clone, Copy)]
pub struct Suite {
    /// What stands before the slash in a test's comment.
    pub key: &'static str,
    /// Whose tests they are.
    pub title: &'static str,
    /// All of them.
    pub rows: &'static [Row],
}

const fn direct(name: &'static str, checks: &'static str) -> Row {
    Row { name, checks, verdict: Verdict::Direct }
}

const fn adapted(name: &'static str, checks: &'static str) -> Row {
    Row { name, checks, verdict: Verdict::Adapted }
}

const fn not_applicable(name: &'static str, checks: &'static str, why: &'static str) -> Row {
    Row { name, checks, verdict: Verdict::NotApplicable(why) }
}

#[allow(dead_code, reason = "for the next row that nobody has carried over yet")]
const fn missing(name: &'static str, checks: &'static str) -> Row {
    Row { name, checks, verdict: Verdict::Missing }
}

const NO_FILE_CALLS: &str =
    "there is no read, write or map call on an object here: the program has the pointer and uses it";
const NO_FAULT_PATH: &str =
    "the devices here have no page faults that the library could answer; pages are taken before the work";

/// Every suite.
pub const SUITES: &[Suite] = &[
    Suite { key: "igt", title: "IGT, gem_userptr_blits", rows: IGT },
    Suite { key: "xe", title: "IGT, xe", rows: XE },
    Suite { key: "amdgpu", title: "IGT, amdgpu", rows: AMDGPU },
    Suite { key: "selftests", title: "Linux, tools/testing/selftests/mm", rows: SELFTESTS },
    Suite { key: "peers", title: "What went wrong in registration caches (libfabric, UCX)", rows: PEERS },
];

const IGT: &[Row] = &[
    direct("input-checking", "unknown flags and impossible sizes are errors"),
    direct("usage-restrictions", "an unaligned pointer or size is an error"),
    direct("invalid-null-pointer", "an object at null can be made; its first use fails"),
    adapted(
        "forked-access",
        "a child can't use the parent's object; the parent's memory is intact, also where fork leaves it out",
    ),
    not_applicable("forbidden-operations", "pread and pwrite of an object are refused", NO_FILE_CALLS),
    adapted(
        "sd-probe",
        "waiting for an object whose memory is gone or replaced reports it before any work is submitted",
    ),
    not_applicable(
        "set-cache-level",
        "caching of an object can be set",
        "the memory type of a Vulkan import is the driver's answer to the pointer, and nobody can change it afterwards",
    ),
    direct("userfault", "memory whose pages somebody else has to bring blocks its own acquirer only"),
    adapted("relocations", "commands of the device may themselves lie in registered memory"),
    direct("invalid-mmap-offset-unsync", "device memory is refused, also by one page at either edge"),
    direct("create-destroy-{unsync,sync}", "objects made, used and released over and over leave nothing behind"),
    direct("{unsync,sync}-overlap", "objects may overlap in every way"),
    direct("sync-unmap", "after munmap of several objects at once each use fails"),
    adapted("unsync-unmap", "an object nobody watches goes on as if nothing had happened"),
    direct("{unsync,sync}-unmap-cycles", "the same, over and over"),
    direct("{unsync,sync}-unmap-after-close", "memory of released objects is unmapped without any event"),
    adapted(
        "coherency-{unsync,sync}",
        "copies between many objects, more than fit the budget at once, move the right bytes",
    ),
    not_applicable(
        "dmabuf-{unsync,sync}",
        "an object exported as a dma-buf follows the lifetime of its memory",
        "host memory that was imported can't be exported again, by no driver known; exportable memory is a type of its own",
    ),
    adapted("readonly-unsync", "the device can't write through an object over read-only memory"),
    not_applicable("readonly-pwrite-unsync", "pwrite to a read-only object is refused", NO_FILE_CALLS),
    adapted(
        "forked-{sync,unsync}{,-swapping}{,-multifd}{,-mempressure}-{normal,interruptible}",
        "processes side by side, each with objects of its own, under pressure to give pages back and under signals",
    ),
    adapted(
        "{mlocked,swapping,minor,major}-{sync,unsync}-{normal,interruptible}",
        "locked memory, small and large objects, and no more than may be locked",
    ),
    direct("process-exit{,-busy}", "a process with objects in use ends, and so does one that becomes another program"),
    direct("stress-mm", "objects come and go while a thread maps, advises huge pages and unmaps"),
    adapted("stress-purge", "objects come and go while everything idle is taken back"),
    direct("stress-mm-invalidate-close{,-overlap}", "an object is closed while its memory is being discarded"),
    direct(
        "map-fixed-invalidate{,-overlap}{,-busy}",
        "another mapping, also a device's, put over an object takes its place",
    ),
    not_applicable("mmap-offset-banned", "an object can't be mapped", NO_FILE_CALLS),
    adapted(
        "nohangcheck",
        "work that never ends holds nobody for longer than the deadline, and not the end of the manager",
    ),
    direct("vma-merge", "neighbours that are remapped page by page don't touch a busy object"),
    direct("huge-split", "mappings put over both ends of a huge one don't touch a busy object in its middle"),
    adapted("access-control", "an object without tracking is only made by who promises to do the tracking"),
    direct("probe", "all 1,024 layouts of five pages around an object of three"),
];

const XE: &[Row] = &[
    direct("userptr-invalid", "a range without mappings is refused"),
    direct(
        "{large,mixed,…}-userptr{-split,-misaligned}-binds-N",
        "sizes by powers of two, split in two, off alignment",
    ),
    direct(
        "munmap-style-unbind-userptr-{all,one-partial,either-side,end,front,many,inval}",
        "a hole anywhere, and its refill",
    ),
    adapted("mmap-style-bind-userptr-{…}", "another mapping over a part"),
    direct("basic-userptr{,-rebind}", "a device uses memory it was given, again and again"),
    direct("userptr-invalidate", "between two submits the memory is replaced; the second one sees the new pages"),
    direct("userptr-invalidate-race", "the same while jobs run"),
    direct("{bindexecqueue,many-execqueues,many-vm}-userptr-{…}", "several managers and threads over the same memory"),
    adapted("compute-mode-userptr-{free,unmap}", "memory goes while a long job runs that nobody waits for"),
    not_applicable("fault-mode-userptr-{…}", "the same with page faults of the device", NO_FAULT_PATH),
    adapted("fault-mode-prefetch", "pages nobody has touched are brought before the work"),
    direct("threads-{userptr-invalidate,userptr-invalidate-race,rebind-err}", "the races, from many threads"),
    direct(
        "system-allocator-partial-{,middle-,atomic-}{munmap,remap}-{cpu,no-cpu}-fault",
        "a part of a used range is unmapped or moved",
    ),
    adapted(
        "system-allocator-{malloc,mmap,new,…}-{race,fork-read,mlock,remap,remap-dontunmap,remap-ro,huge,shared,file}",
        "every kind of memory by every mutation",
    ),
    adapted("userptr-inval-inject", "every Nth submit is told that its memory has changed hands"),
];

const AMDGPU: &[Row] = &[
    direct("amd_basic userptr-with-IP-DMA", "what a copy engine writes arrives in the program's memory"),
    direct("amd_fuzzing userptr-fuzzing", "a range that wraps around the address space is refused"),
];

const SELFTESTS: &[Row] = &[
    direct("uffd register-ioctls", "what can be watched is known for each kind of memory"),
    adapted("uffd wp-fork{,-with-event}, wp-fork-pin{,-with-event}", "a pinned page stays the parent's across fork"),
    direct("uffd wp-unpopulated", "pages nobody has touched are tracked, too"),
    direct("uffd events{,-wp}", "fork, move, discard and unmap arrive as what they are, for each kind of memory"),
    not_applicable(
        "uffd sigbus{,-wp}, minor{,-wp,-collapse}, zeropage",
        "faults are answered in various ways",
        "no fault is ever ours to answer",
    ),
    adapted("uffd move, poison", "another userfaultfd works on memory that is registered here"),
    adapted("uffd-stress", "watched pages race with everything, checked by an oracle"),
    adapted(
        "hmm anon_{read,write}{,_prot,_huge}, file_{read,write}",
        "a device reads and writes each kind of memory, as its protection allows",
    ),
    adapted(
        "hmm anon_write_child{,_shared}, hmm_cow_in_device",
        "after fork, parent and child each see their own pages",
    ),
    adapted("hmm snapshot", "what a device may be given is known page by page"),
    adapted("hmm double_map", "two mappings of the same pages are one memory"),
    not_applicable(
        "hmm mixedmap",
        "a driver's mixed mapping is mirrored",
        "device memory is refused here, whichever way its driver maps it",
    ),
    not_applicable(
        "hmm migrate*, exclusive*",
        "pages move to the device, or are its alone",
        "host memory stays host memory: nothing is migrated",
    ),
];

const PEERS: &[Row] = &[
    direct("free-under-the-monitors-lock", "the handler frees or allocates and waits for itself"),
    direct(
        "flush-in-the-hook-under-the-heap-lock",
        "giving pages back from the hook deadlocks with the allocator's lock",
    ),
    direct(
        "allocator-advises-under-its-lock",
        "an allocator discards pages under its lock while the completion needs memory",
    ),
    direct("debug-print-in-the-hook-allocates", "telling of an event allocates"),
    direct("signal-kills-the-event-thread", "a signal ends the thread that reads events, and every mutator hangs"),
    not_applicable(
        "code-patching-races",
        "hooks are written into running code",
        "no code is patched and no symbol is hooked",
    ),
    direct("dereg-after-free-breaks-fork", "what was freed before its registration ended is missing after fork"),
    direct("memory-missing-in-the-child", "registered memory is not there in a forked child"),
    direct("child-deadlocks", "a forked child hangs in a lock that a thread of the parent held"),
    direct(
        "late-unsubscribe-drops-a-newer-registration",
        "the end of an old registration ends a newer one at the same address",
    ),
    direct("blocked-in-containers", "without userfaultfd everything fails, or nobody says so"),
    direct("subscribe-failure-becomes-another-error", "the reason why memory can't be had is lost on the way"),
    direct("corruption-without-a-trace", "bytes are wrong until the cache is switched off"),
    not_applicable(
        "one-global-lock",
        "a lock around all lookups costs a hundredfold",
        "a matter of speed: the benches compare lookups with readers in parallel",
    ),
    direct("pending-invalidations-grow", "what was invalidated and is never looked up again piles up"),
    direct("cannot-force-deregistration", "nobody can say that memory is to be let go now"),
    direct("assumed-cache-never-started", "the cache could not start and is used all the same"),
    direct("merging-is-harmful", "neighbours are merged into one registration with the rights and the fate of both"),
    direct("first-touch-hangs", "the first read or write of an absent page in a registered range never returns"),
    direct("watches-more-than-it-was-asked", "a small request silently watches its neighbourhood"),
    direct("dead-entry-after-the-call-returned", "after munmap the entry is still found valid"),
    direct("mremap-target-is-missed", "a mapping moved onto a registered range goes unnoticed"),
    direct("raw-system-calls-are-missed", "who doesn't call the C library's functions goes unnoticed"),
    direct("file-operations-are-missed", "truncation and hole punching go unnoticed"),
];
