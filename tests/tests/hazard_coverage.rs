//! What can't be watched, or not held: each says so, works as far as it can, and is right where the program does its part.

use std::io;
use std::time::{Duration, Instant};

use pinfold_core::watch::{Note, UserptrEvent, WatchConfig};
use pinfold_core::{
    Access, Config, Coverage, Error, HostRange, Manager, ManualReason, NoHoldReason, Outcome, Pending, State, Userptr,
};
use pinfold_invalidate::{Space, page_size};
use pinfold_tests::fake::FakeDevice;
use pinfold_tests::fence::Fence;
use pinfold_tests::memory::{Backing, Region, find_mapping};
use pinfold_tests::process::{isolated, isolated_case};
use pinfold_tests::{PATIENCE, skip};

mod stranger;
use stranger::Stranger;

fn patient() -> Manager<FakeDevice> {
    let mut config = Config::default();
    config.deadline = Duration::from_secs(10);
    Manager::new(FakeDevice::new(), config).unwrap()
}

fn valid(manager: &Manager<FakeDevice>, range: HostRange) -> Userptr<FakeDevice> {
    // SAFETY: no reference points into the range, and what isn't watched is bracketed.
    let object = unsafe { manager.register(range, Access::Read) }.unwrap();
    drop(manager.acquire_timeout(&[&object], PATIENCE).unwrap());
    object
}

fn busy(manager: &Manager<FakeDevice>, object: &Userptr<FakeDevice>) -> (Fence, Pending<FakeDevice>) {
    let lease = manager.acquire_timeout(&[object], PATIENCE).unwrap();
    let fence = Fence::new();
    // SAFETY: each test signals the fence, and nothing accesses the object.
    let pending = unsafe { lease.submit([fence.clone()], || Ok::<_, Error>(())) }.unwrap();
    (fence, pending)
}

/// What an object that isn't watched must do: not notice the program's own mutations, and be right about those in brackets.
fn assert_manual(manager: &Manager<FakeDevice>, region: &Region, reason: ManualReason) {
    let object = valid(manager, region.range());
    assert_eq!(object.coverage(), Some(Coverage::Manual(reason)));
    let events = manager.stats().space.events;
    let (fence, pending) = busy(manager, &object);
    region.advise(0..1, libc::MADV_DONTNEED).unwrap(); // nobody holds it, and nobody notices
    assert_eq!(object.state().unwrap(), State::Valid);
    manager.invalidate(region.range()).unwrap();
    assert_eq!(object.state().unwrap(), State::Invalid);
    assert_eq!(fence.outcome(), None);
    // A bracket holds all the same.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mutation = || {
                assert_eq!(fence.outcome(), Some(Outcome::Done));
                region.map_over(0..1).unwrap();
            };
            manager.mutate(&[region.range()], mutation).unwrap();
        });
        let space = Space::get(Duration::ZERO).unwrap();
        while space.gate(0).is_open() {
            std::thread::yield_now(); // until the bracket has begun, which closes every gate
        }
        fence.signal(Outcome::Done);
    });
    assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
    drop(manager.acquire_timeout(&[&object], PATIENCE).unwrap());
    manager.mutate(&[region.range()], || region.unmap_all().unwrap()).unwrap();
    assert_eq!(manager.acquire_timeout(&[&object], PATIENCE).unwrap_err().errno(), libc::EFAULT);
    assert_eq!((manager.stats().late, manager.stats().space.events), (0, events));
}

#[test]
// rows (fake): selftests/uffd move, poison
fn memory_that_somebody_else_watches_is_foreign_and_ours_when_they_have_gone() {
    isolated(|| {
        let manager = patient();
        let stranger = match Stranger::new() {
            Ok(stranger) => stranger,
            Err(e) => skip!("no userfaultfd here: {e}"),
        };
        let region = Region::new(Backing::Anonymous, 4).unwrap();
        stranger.register(region.part(1..2)).unwrap();
        let object = valid(&manager, region.range());
        assert_eq!(object.coverage(), Some(Coverage::Manual(ManualReason::Foreign)));
        drop(stranger);
        manager.invalidate(region.range()).unwrap();
        drop(manager.acquire_timeout(&[&object], PATIENCE).unwrap());
        assert_eq!(object.coverage(), Some(Coverage::Watched));
        region.unmap_all().unwrap();
        assert_eq!(object.state().unwrap(), State::Invalid);
    })
    .expect_return();
}

#[test]
fn foreign_memory_is_used_and_bracketed_but_not_held() {
    isolated(|| {
        let manager = patient();
        let stranger = match Stranger::new() {
            Ok(stranger) => stranger,
            Err(e) => skip!("no userfaultfd here: {e}"),
        };
        // A page of a memfd stays in the page cache when it is dropped: no fault is ever the stranger's to answer.
        let region = Region::new(Backing::Memfd, 2).unwrap();
        stranger.register(region.part(1..2)).unwrap();
        region.read(0, 2 * page_size()).unwrap();
        stranger.register(region.part(0..1)).unwrap();
        assert_manual(&manager, &region, ManualReason::Foreign);
    })
    .expect_return();
}

#[test]
fn shared_memory_that_can_never_be_written_is_not_watched() {
    for backing in [Backing::FileSharedReadOnly, Backing::MemfdSealedReadOnly] {
        let case = || {
            let region = match Region::new(backing, 2) {
                Ok(region) => region,
                Err(e) if e.kind() == io::ErrorKind::NotFound => skip!("{backing:?}: {e}"),
                Err(e) => panic!("{backing:?}: {e}"),
            };
            let manager = patient();
            let coverage = valid(&manager, region.range()).coverage();
            if coverage == Some(Coverage::Manual(ManualReason::Unsupported)) {
                skip!("{backing:?}: this kernel watches no such memory, writable or not");
            }
            assert_manual(&manager, &region, ManualReason::SharedReadOnly);
        };
        isolated_case(&format!("{backing:?}"), PATIENCE, case).expect_return();
    }
}

/// Discards a page that work uses, with a deadline so long that a hold would be noticed as LATE.
fn assert_not_held(manager: &Manager<FakeDevice>, range: HostRange, reason: NoHoldReason) {
    let object = valid(manager, range);
    assert_eq!(object.coverage(), Some(Coverage::NoHold(reason)));
    let queue = manager.watch(WatchConfig::default()).unwrap();
    let (fence, pending) = busy(manager, &object);
    // SAFETY: the caller's page, which nothing points into; it reads as zeros from now on.
    let advised =
        unsafe { libc::madvise(std::ptr::without_provenance_mut(range.start()), range.len(), libc::MADV_DONTNEED) };
    assert_eq!(advised, 0);
    assert_eq!(fence.outcome(), None, "the mutator returned while the work was under way");
    assert_eq!(object.state().unwrap(), State::Invalid, "and was noticed");
    let (mut told, deadline) = (None, Instant::now() + PATIENCE);
    while told.is_none() {
        assert!(Instant::now() < deadline, "the invalidation is not told");
        told = queue.notes().find_map(|note| match note {
            Note::Userptr(note) if note.event == UserptrEvent::Invalidated => Some(note),
            _ => None,
        });
    }
    assert!(told.is_some_and(|note| note.no_hold && !note.late), "{told:?}");
    assert_eq!((manager.stats().late, manager.stats().space.late), (0, 0));
    fence.signal(Outcome::Done);
    assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
    drop(manager.acquire_timeout(&[&object], PATIENCE).unwrap());
}

#[test]
fn the_heap_is_noticed_and_not_held() {
    isolated(|| {
        let manager = patient();
        let page = page_size();
        // Pages of the heap that the C library doesn't use: it goes on behind them.
        // SAFETY: sbrk moves the break up only; what it gives belongs to the caller.
        let at = unsafe { libc::sbrk(isize::try_from(4 * page).unwrap()) }.addr();
        let range = HostRange::new(at.next_multiple_of(page), 2 * page).unwrap();
        if find_mapping("[heap]").is_none_or(|heap| !heap.covers(range)) {
            skip!("this program has no heap in one piece");
        }
        assert_not_held(&manager, range, NoHoldReason::Heap);
    })
    .expect_return();
}

#[test]
fn the_stack_is_noticed_and_not_held() {
    isolated(|| {
        let manager = patient();
        let stack = find_mapping("[stack]").expect("a process has a stack");
        // Its far end, which no call of this program reaches.
        let range = HostRange::new(stack.start(), page_size()).unwrap();
        let here = std::ptr::from_ref(&range).addr();
        assert!(range.intersection(HostRange::new(here & !(page_size() - 1), page_size()).unwrap()).is_none());
        assert_not_held(&manager, range, NoHoldReason::Stack);
    })
    .expect_return();
}

/// From now on `userfaultfd` fails with `EPERM` in this thread and its children. False if there is still the way through the device node.
fn forbid_userfaultfd() -> bool {
    let device = || std::fs::OpenOptions::new().read(true).write(true).open("/dev/userfaultfd").is_ok();
    if device() {
        // SAFETY: numbers only. A user who may not open the node; the process can still look at itself afterwards.
        assert_eq!(unsafe { libc::setresuid(65534, 65534, 65534) }, 0, "{}", io::Error::last_os_error());
        // SAFETY: numbers only.
        assert_eq!(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) }, 0);
        if device() {
            return false;
        }
    }
    let load = u16::try_from(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS).unwrap();
    let jump = u16::try_from(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K).unwrap();
    let ret = u16::try_from(libc::BPF_RET | libc::BPF_K).unwrap();
    let number = u32::try_from(libc::SYS_userfaultfd).unwrap();
    let refusal = libc::SECCOMP_RET_ERRNO | libc::EPERM.cast_unsigned();
    let step = |code, k, jf| libc::sock_filter { code, jt: 0, jf, k };
    // The number of the system call is the first word of what a filter sees.
    let mut filter =
        [step(load, 0, 0), step(jump, number, 1), step(ret, refusal, 0), step(ret, libc::SECCOMP_RET_ALLOW, 0)];
    let program = libc::sock_fprog { len: 4, filter: filter.as_mut_ptr() };
    // SAFETY: numbers only.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
    // SAFETY: the program and its four steps live through the call, which copies them.
    let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    assert_eq!(set, 0, "{}", io::Error::last_os_error());
    assert_eq!(Stranger::new().err().and_then(|e| e.raw_os_error()), Some(libc::EPERM), "the filter works");
    true
}

#[test]
// rows (fake): peers/blocked-in-containers; peers/assumed-cache-never-started
fn without_userfaultfd_everything_is_manual_and_works() {
    isolated(|| {
        if !forbid_userfaultfd() {
            skip!("everybody may open /dev/userfaultfd here");
        }
        let manager = patient();
        for backing in [Backing::Anonymous, Backing::Memfd] {
            assert_manual(&manager, &Region::new(backing, 2).unwrap(), ManualReason::NoUserfaultfd);
        }
    })
    .expect_return();
}
