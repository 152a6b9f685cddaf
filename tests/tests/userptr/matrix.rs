//! Runs the cells of the matrix: see `pinfold_tests::matrix` for what each must come to.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use pinfold_core::{Coverage, Error, HostRange, State, Userptr};
use pinfold_invalidate::{Shards, page_size};
use pinfold_tests::PATIENCE;
use pinfold_tests::leaks::pinned;
use pinfold_tests::matrix::{
    After, Call, Expected, Kind, Mutation, News, Situation, Verdicts, crashes_by_nature, expect,
};
use pinfold_tests::memory::{Backing, HugePages, Move, Region, find_mapping};
use pinfold_tests::skip_part;

use super::change::move_onto;
use super::{Rig, assert_faults, assert_taken_back, device_sees, filled, program_sees, register, wait_until};

/// Parts of an object; what the mutations are about.
const PARTS: usize = 4;
/// Since Linux 6.13; not in the libc crate.
const MADV_GUARD_INSTALL: i32 = 102;
const MADV_PAGEOUT: i32 = 21;
const MADV_COLLAPSE: i32 = 25;

/// Huge pages for the cells that want some: a region's four, those of a child that writes over them, and as many on their way back to the pool.
/// To be held by the parent of the process that runs the cells, which may crash.
pub fn huge_pages() -> Option<HugePages> {
    HugePages::add(16).inspect_err(|why| skip_part!("{why}")).ok()
}

/// Runs every cell of the situations, and counts what they came to.
pub fn run<R: Rig>(rig: &R, situations: &[Situation]) -> Verdicts {
    let mut verdicts = Verdicts::default();
    let mut parts_of = Quarry { pinned: pinned(), ..Quarry::default() };
    for kind in Kind::ALL {
        for mutation in Mutation::ALL {
            for &situation in situations {
                println!("cell: {kind:?}, {mutation:?}, {situation:?}");
                let verdict = match cell(rig, &mut parts_of, kind, mutation, situation) {
                    Ok(verdict) => verdict,
                    Err(Skip::Kind(why)) => {
                        if mutation == Mutation::ALL[0] && situation == situations[0] {
                            skip_part!("{kind:?}: {why}");
                        }
                        Verdict::Skipped
                    }
                    Err(Skip::Mutation(why)) => {
                        skip_part!("{kind:?}, {mutation:?}: {why}");
                        Verdict::Skipped
                    }
                };
                *match verdict {
                    Verdict::AsExpected => &mut verdicts.as_expected,
                    Verdict::Refused => &mut verdicts.refused,
                    Verdict::NotPinnable => &mut verdicts.not_pinnable,
                    Verdict::Crashes => &mut verdicts.crashes,
                    Verdict::Impossible => &mut verdicts.impossible,
                    Verdict::Skipped => &mut verdicts.skipped,
                } += 1;
            }
        }
    }
    println!("verdicts: {verdicts:?}");
    verdicts
}

enum Verdict {
    AsExpected,
    Refused,
    NotPinnable,
    Crashes,
    Impossible,
    Skipped,
}

enum Skip {
    Kind(String),
    Mutation(String),
}

/// Memory of this kind, for one cell in a process of its own.
pub fn region(kind: Kind) -> Result<Region, String> {
    Quarry::default().region(kind).map_err(|skip| match skip {
        Skip::Kind(why) | Skip::Mutation(why) => why,
    })
}

/// Where pieces of the stack and of the heap come from.
#[derive(Default)]
struct Quarry {
    /// What is left of the stack's far end. It is used up from below: what is split off its mapping is not known as the stack any more, and that is
    /// always the lower part.
    stack: Option<Range<usize>>,
    /// Why there are no huge pages, once that is known.
    no_huge_pages: Option<String>,
    /// Bytes that were pinned before the first cell.
    pinned: u64,
}

impl Quarry {
    fn region(&mut self, kind: Kind) -> Result<Region, Skip> {
        let pages = PARTS * kind.unit();
        match kind {
            Kind::Mapped(Backing::HugeTlb) => {
                if let Some(why) = &self.no_huge_pages {
                    return Err(Skip::Kind(why.clone()));
                }
                let region = Region::new(Backing::HugeTlb, pages).map_err(|e| e.to_string());
                self.no_huge_pages = region.as_ref().err().cloned();
                region.map_err(Skip::Kind)
            }
            Kind::Mapped(backing) => Region::new(backing, pages).map_err(|e| Skip::Kind(e.to_string())),
            Kind::Brk => {
                // A page on either side stays the heap's.
                let len = (pages + 2) * page_size();
                // SAFETY: sbrk moves the break up only; what it gives belongs to the caller.
                let at = unsafe { libc::sbrk(isize::try_from(len + page_size()).unwrap()) }.addr();
                let range = HostRange::new(at.next_multiple_of(page_size()) + page_size(), pages * page_size());
                let range = range.map_err(|e| Skip::Kind(e.to_string()))?;
                if find_mapping_of(range.start()).as_deref() != Some("[heap]") {
                    return Err(Skip::Kind("the program has no heap in one piece".into()));
                }
                // SAFETY: the pages have just been given by sbrk.
                filled_in(unsafe { Region::adopt(range) })
            }
            Kind::Stack => {
                const CELLS: usize = 70;
                let step = (pages + 2) * page_size();
                let left = self.stack.get_or_insert_with(|| {
                    let top = find_mapping("[stack]").expect("a process has a stack").start();
                    let bottom = top - CELLS * step;
                    // SAFETY: a stack grows down to where it is touched; nobody else uses that page.
                    unsafe { std::ptr::without_provenance_mut::<u8>(bottom).write_volatile(0) };
                    bottom..top
                });
                if left.len() < step {
                    return Err(Skip::Kind("the stack is used up".into()));
                }
                let start = left.start;
                left.start += step;
                let range = HostRange::new(start + page_size(), pages * page_size()).expect("a part of the stack");
                // SAFETY: below every frame that is alive: the main thread is asleep in a wait for this test.
                filled_in(unsafe { Region::adopt(range) })
            }
        }
    }
}

fn filled_in(region: Region) -> Result<Region, Skip> {
    let contents = region.original(0..region.range().pages());
    region.write(0, &contents).map_err(|e| Skip::Kind(e.to_string()))?;
    Ok(region)
}

/// The name of the mapping at an address.
fn find_mapping_of(address: usize) -> Option<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let line = maps.lines().find(|line| {
        let (start, end) = line.split(' ').next().and_then(|range| range.split_once('-')).unwrap_or_default();
        let bound = |text| usize::from_str_radix(text, 16).unwrap_or(0);
        (bound(start)..bound(end)).contains(&address)
    })?;
    line.split_whitespace().nth(5).map(str::to_owned)
}

pub fn mutate(region: &Region, unit: usize, mutation: Mutation) -> io::Result<()> {
    let parts = |parts: Range<usize>| parts.start * unit..parts.end * unit;
    match mutation {
        Mutation::UnmapWhole => region.unmap(parts(0..4)),
        Mutation::UnmapHead => region.unmap(parts(0..1)),
        Mutation::UnmapMiddle => region.unmap(parts(1..3)),
        Mutation::UnmapTail => region.unmap(parts(3..4)),
        Mutation::MapFixed => region.map_over(parts(1..3)),
        Mutation::Grow => region.grow(5 * unit),
        Mutation::Shrink => region.shrink(3 * unit),
        Mutation::Move => region.relocate(parts(0..4), Move::Away).map(drop),
        Mutation::MoveDontUnmap => region.relocate(parts(0..4), Move::DontUnmap).map(drop),
        Mutation::MoveOnto => move_onto(region.range(), 0x99),
        Mutation::DontNeed => region.advise(parts(1..3), libc::MADV_DONTNEED),
        Mutation::Free => region.advise(parts(1..3), libc::MADV_FREE),
        Mutation::Remove => region.advise(parts(1..3), libc::MADV_REMOVE),
        Mutation::PageOut => region.advise(parts(0..4), MADV_PAGEOUT),
        Mutation::Collapse => region.advise(parts(0..4), MADV_COLLAPSE),
        Mutation::Guard => region.advise(parts(1..3), MADV_GUARD_INSTALL),
        Mutation::Protect => region.protect(parts(1..3), libc::PROT_READ),
        Mutation::Truncate => region.truncate(2 * unit),
        Mutation::PunchHole => region.punch_hole(parts(1..3)),
        Mutation::Fork => fork_and_write(region),
    }
}

/// The child writes over its own copy and is gone.
fn fork_and_write(region: &Region) -> io::Result<()> {
    // SAFETY: the child uses only what is its own, and leaves by _exit.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    if pid == 0 {
        if !region.backing().shared() {
            let _ = region.write(0, &[0xee; 64]);
        }
        // SAFETY: ends the child at once; nothing of the parent's is run.
        unsafe { libc::_exit(0) };
    }
    let mut status = 0;
    // SAFETY: `status` is a live int of this frame.
    let got = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert_eq!((got, status), (pid, 0), "the child came to its end");
    Ok(())
}

/// What the kernel made of it, as far as the table allows. `None`: it did it.
fn refusal(expected: Expected, result: io::Result<()>) -> Result<Option<io::Error>, Skip> {
    match (expected.call, result) {
        (Call::Done | Call::Either, Ok(())) => Ok(None),
        (Call::Refused | Call::Either, Err(e)) => Ok(Some(e)),
        (Call::Done, Err(e)) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS)) => {
            Err(Skip::Mutation(format!("this kernel can't: {e}")))
        }
        (Call::Done, Err(e)) => panic!("the kernel refuses: {e}"),
        (Call::Refused, Ok(())) => panic!("the kernel does what it was expected to refuse"),
        (Call::Impossible, _) => unreachable!("nothing is called in an impossible cell"),
    }
}

/// One cell in its whole.
fn cell<R: Rig>(
    rig: &R,
    quarry: &mut Quarry,
    kind: Kind,
    mutation: Mutation,
    situation: Situation,
) -> Result<Verdict, Skip> {
    let expected = expect(kind, mutation);
    if expected.call == Call::Impossible {
        return Ok(Verdict::Impossible);
    }
    // Devices whose pins, copies or aliases keep the pages whatever happens to private memory, and those that go through the page table.
    let pins = rig.keeps_pages(Backing::Anonymous);
    if !pins && crashes_by_nature(kind, mutation, situation) {
        return Ok(Verdict::Crashes);
    }
    if kind.unit() > 1 {
        // As much as may be locked, and io_uring of older kernels lets go of the cell before this a second later.
        wait_until("the end of every pin", || pinned() <= quarry.pinned);
    }
    let region = quarry.region(kind)?;
    let object = register(rig.manager(), region.range());
    if !rig.takes(kind.backing()) {
        assert_not_pinnable(rig, &object);
        return Ok(Verdict::NotPinnable);
    }
    // Each mapping of these is of a file of its own.
    if matches!(kind, Kind::Mapped(Backing::AnonymousShared | Backing::HugeTlb)) && !rig.spans_files() {
        return Err(Skip::Kind("this kernel's io_uring pins memory of one file at a time".into()));
    }
    let before = program_sees(&region);
    let cell = Cell { rig, kind, mutation, expected, region: &region, object: &object, before };
    let refused = match situation {
        Situation::Idle => cell.idle()?,
        Situation::Busy => cell.busy()?,
        Situation::Acquiring => cell.acquiring()?,
    };
    cell.ends_in_step(refused.is_some(), pins);
    let verdict = if refused.is_some() { Verdict::Refused } else { Verdict::AsExpected };
    // Pins are let go by a worker, and what may be locked is little.
    drop(object);
    wait_until("the end of the imports", || rig.manager().stats().imports == 0);
    Ok(verdict)
}

/// The device can't take it, says so as often as it is asked, and keeps nothing.
fn assert_not_pinnable<R: Rig>(rig: &R, object: &Userptr<R::D>) {
    for _ in 0..2 {
        match rig.manager().acquire_timeout(&[object], PATIENCE) {
            Err(Error::Fault { .. }) => {}
            other => panic!("not pinnable, and {other:?}"),
        }
    }
    assert_eq!(object.state().unwrap(), State::Faulted);
}

struct Cell<'a, R: Rig> {
    rig: &'a R,
    kind: Kind,
    mutation: Mutation,
    expected: Expected,
    region: &'a Region,
    object: &'a Userptr<R::D>,
    before: Vec<u64>,
}

impl<R: Rig> Cell<'_, R> {
    fn mutate(&self) -> Result<Option<io::Error>, Skip> {
        refusal(self.expected, mutate(self.region, self.kind.unit(), self.mutation))
    }

    fn assert_coverage(&self) {
        let coverage = self.object.coverage().expect("it has been acquired");
        let right = match self.kind {
            Kind::Mapped(backing) if backing.watchable() => coverage == Coverage::Watched,
            Kind::Mapped(_) => matches!(coverage, Coverage::Manual(_)),
            Kind::Stack | Kind::Brk => matches!(coverage, Coverage::NoHold(_)),
        };
        assert!(right, "{coverage:?}");
    }

    /// Nobody is held, and nobody has been given up on.
    fn late(&self) -> u64 {
        self.rig.manager().stats().space.late
    }

    /// After a mutation that the kernel has done, or refused.
    fn assert_told(&self, generation: pinfold_core::Generation, refused: bool) {
        let now = || self.object.generation().unwrap();
        match self.expected.news {
            // A refusal may have sent its event first.
            _ if refused => {}
            News::Held => assert_taken_back(self.object, generation),
            News::NotHeld => wait_until("the news", || now() > generation),
            News::NothingToTell | News::Stale | News::Unsaid => {
                assert_eq!((self.object.state().unwrap(), now()), (State::Valid, generation), "nobody has told");
            }
        }
    }

    fn idle(&self) -> Result<Option<io::Error>, Skip> {
        drop(self.rig.manager().acquire_timeout(&[self.object], PATIENCE).unwrap());
        self.assert_coverage();
        let (generation, late) = (self.object.generation().unwrap(), self.late());
        let refused = self.mutate()?;
        self.assert_told(generation, refused.is_some());
        assert_eq!(self.late(), late);
        Ok(refused)
    }

    fn busy(&self) -> Result<Option<io::Error>, Skip> {
        let lease = self.rig.manager().acquire_timeout(&[self.object], PATIENCE).unwrap();
        self.assert_coverage();
        let (generation, late) = (lease.view(0).generation, self.late());
        let work = self.rig.start(lease).unwrap();
        let over = AtomicBool::new(false);
        let held = self.expected.news == News::Held && self.expected.call == Call::Done;
        let (refused, seen) = thread::scope(|scope| {
            let mutator = scope.spawn(|| {
                let refused = self.mutate();
                if held && matches!(refused, Ok(None)) {
                    assert!(over.load(Ordering::SeqCst), "the mutator has returned while the device worked");
                }
                if let Ok(refused) = &refused {
                    self.assert_told(generation, refused.is_some());
                }
                refused
            });
            // Whoever must be held has begun to wait; whoever must not is through, or else waits for an event that a refusal sent.
            let space = super::space();
            wait_until("the mutation", || mutator.is_finished() || space.is_busy(Shards::ALL));
            if !held && self.expected.call == Call::Done {
                wait_until("the end of the mutation", || mutator.is_finished());
                assert_eq!(work.pending.poll(), None, "the work is under way");
            }
            over.store(true, Ordering::SeqCst);
            let seen = work.finish();
            (mutator.join().unwrap(), seen)
        });
        let refused = refused?;
        assert_eq!(self.late(), late, "nobody has been given up on");
        // Held before the pages went, or kept by a pin: the work saw what it was given. A page table shows what is there.
        if self.rig.keeps_pages(Backing::Anonymous) {
            assert_eq!(seen, self.before, "what work under way has seen");
        }
        Ok(refused)
    }

    fn acquiring(&self) -> Result<Option<io::Error>, Skip> {
        assert!(self.rig.hold_next_import(), "the device can be told to wait");
        let late = self.late();
        let (refused, acquired, generation) = thread::scope(|scope| {
            let acquirer = scope.spawn(|| {
                self.rig.manager().acquire_timeout(&[self.object], PATIENCE).map(|lease| lease.view(0).generation)
            });
            self.rig.wait_held();
            let generation = self.object.generation().unwrap();
            let refused = self.mutate();
            let told = matches!(self.expected.news, News::Held | News::NotHeld) && matches!(refused, Ok(None));
            if told {
                // Nothing is valid yet, so nobody needs to wait for the gates to see that: the news may come a moment after the call has returned.
                wait_until("the news", || self.object.generation().unwrap() > generation);
            }
            self.rig.let_go();
            (refused, acquirer.join().unwrap(), generation)
        });
        let refused = refused?;
        assert_eq!(self.late(), late);
        if refused.is_none() {
            match (self.expected.news, self.expected.after, acquired) {
                // What was taken before is thrown away; what is taken anew is there, or not.
                (News::Held | News::NotHeld, After::Pages, Ok(now)) => {
                    assert!(now > generation, "published all the same")
                }
                (News::Held | News::NotHeld, After::Fault, Err(Error::Fault { errno, .. })) => {
                    assert_eq!(errno, libc::EFAULT);
                }
                (News::NothingToTell | News::Stale | News::Unsaid, _, Ok(now)) => assert_eq!(now, generation),
                // Found out by the acquisition itself, which compares the mappings after it has taken the pages.
                (News::Stale | News::NothingToTell | News::Unsaid, _, Err(Error::Fault { .. })) => {}
                (.., acquired) => panic!("acquired: {acquired:?}"),
            }
        }
        Ok(refused)
    }

    /// The silent ones are told, holes are filled, new bytes written; the device sees what the program sees.
    fn ends_in_step(&self, refused: bool, pins: bool) {
        let (rig, region, object) = (self.rig, self.region, self.object);
        if self.mutation == Mutation::Grow && !refused {
            // Watched like the rest of the mapping, and no part of the object.
            region.ungrow((PARTS + 1) * self.kind.unit()).unwrap();
        }
        let silent = !refused && !matches!(self.expected.news, News::Held | News::NotHeld);
        if silent {
            // A page table with a hole in it is not to be shown to a driver that goes through it.
            let safe = pins || self.expected.after != After::Fault;
            if safe && object.state().unwrap() == State::Valid {
                let seen = device_sees(rig, object);
                match self.expected.news {
                    News::Stale if pins => {
                        assert_eq!(seen, self.before, "the stale pages show");
                        let now = region.read(0, region.range().len());
                        assert!(now.is_err() || program_sees(region) != self.before, "and the program sees others");
                    }
                    News::NothingToTell if pins => {
                        assert_eq!(seen, program_sees(region), "the pages are the program's")
                    }
                    _ => {}
                }
            }
            rig.manager().invalidate(region.range()).unwrap();
        }
        if !refused && self.expected.after == After::Fault {
            assert_faults(rig.manager(), object);
            self.refill();
        }
        if !refused && self.expected.after == After::ReadOnly && region.backing().writable() {
            region.protect(0..region.range().pages(), libc::PROT_READ | libc::PROT_WRITE).unwrap();
        }
        let byte = 0x71;
        if region.backing().writable() {
            region.fill(0..region.range().pages(), byte).unwrap();
            rig.written(region.range());
            assert_eq!(device_sees(rig, object), vec![filled(byte); region.range().pages()]);
        } else {
            assert_eq!(device_sees(rig, object), program_sees(region));
        }
    }

    fn refill(&self) {
        let unit = self.kind.unit();
        let parts = match self.mutation {
            Mutation::UnmapHead => 0..1,
            Mutation::UnmapMiddle | Mutation::Guard => 1..3,
            Mutation::UnmapTail | Mutation::Shrink => 3..4,
            Mutation::Truncate => return self.region.truncate(PARTS * unit).unwrap(),
            _ => 0..4,
        };
        self.region.map_over(parts.start * unit..parts.end * unit).unwrap();
        if !self.kind.backing().watchable() {
            self.rig.manager().invalidate(self.region.range()).unwrap();
        }
    }
}
