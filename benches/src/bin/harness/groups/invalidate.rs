//! What it costs a program that its memory is watched: the mutation itself, first touches, calls that have nothing to do with it, and beginning to watch.
//!
//! A watched mutation wakes a thread and waits for it, and that depends first on which processors the two are: so both are pinned, and the floor, a bare
//! userfaultfd whose reader does nothing, is pinned the same way.

mod en_masse;

use std::cell::RefCell;
use std::fs::File;
use std::io::Write;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use pinfold_invalidate::{Change, Coverage, DEFAULT_DEADLINE, HostRange, Shards, Space, Target, page_size};

use crate::clock::{cpu, microseconds};
use crate::groups::index::thousands;
use crate::memory::Memory;
use crate::placement::{self, Pinned, allowed};
use crate::session::{Contender, Goal, Plan, Session};
use crate::stats::Random;
use crate::ucx::Ucx;
use crate::userfault::Bare;

/// Mutations a sample.
const EACH: usize = 24;
/// The library's reader of events.
const MONITOR: &str = "pinfold-monitor";

/// Somebody who wants to know, and does nothing when told.
#[derive(Default)]
struct Told {
    shards: AtomicU16,
}

impl Target for Told {
    fn invalidated(&self, _: &Change) {}

    fn settled(self: Arc<Self>) {}

    fn shards(&self) -> Shards {
        Shards(self.shards.load(Ordering::SeqCst))
    }
}

/// Watches a range for somebody, as an object would.
fn watch(space: &Space, range: HostRange, id: u64) -> Result<()> {
    let told = Arc::new(Told::default());
    space.insert(range, id, Arc::clone(&told) as Arc<dyn Target>);
    let watched = space.watch(range)?;
    told.shards.store(watched.shards.0, Ordering::SeqCst);
    ensure!(
        watched.coverage == Coverage::Watched,
        "the kernel can't watch private memory here: {:?}",
        watched.coverage
    );
    Ok(())
}

/// How a sample's pages are watched.
#[derive(Clone, Copy)]
enum By<'a> {
    Nobody,
    Bare(&'a Bare),
    Ours(&'a Space),
}

impl By<'_> {
    fn watch(self, range: HostRange, id: usize) -> Result<()> {
        match self {
            Self::Nobody => Ok(()),
            Self::Bare(bare) => bare.watch(range),
            Self::Ours(space) => watch(space, range, id as u64),
        }
    }

    fn end(self, range: HostRange, id: usize) {
        if let Self::Ours(space) = self {
            space.remove(range, id as u64);
        }
    }
}

/// Pages that are no neighbours, so that each is a mapping of its own whoever watches it. Each goes with its list.
fn single_pages() -> Result<Vec<Memory>> {
    let pages = (0..2 * EACH).map(|_| Memory::populated(page_size())).collect::<Result<Vec<_>>>()?;
    // The kernel puts mappings side by side; every second one goes.
    Ok(pages.into_iter().enumerate().filter(|(at, _)| at % 2 == 0).map(|(_, page)| page).collect())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mutation {
    Unmap,
    Discard,
}

/// Microseconds a call.
fn mutations(by: By<'_>, what: Mutation) -> Result<Vec<f64>> {
    let pages = single_pages()?;
    let ranges: Vec<_> = pages.iter().map(Memory::range).collect();
    for (id, range) in ranges.iter().enumerate() {
        by.watch(*range, id)?;
    }
    let timed = |page: Memory| {
        let begun = Instant::now();
        let kept = match what {
            Mutation::Unmap => {
                page.unmap();
                None
            }
            Mutation::Discard => {
                page.discard();
                Some(page)
            }
        };
        (microseconds(begun.elapsed()), kept)
    };
    let (times, kept): (Vec<_>, Vec<_>) = pages.into_iter().map(timed).unzip();
    ranges.iter().enumerate().for_each(|(id, range)| by.end(*range, id));
    drop(kept);
    Ok(times)
}

pub(crate) fn run(session: &mut Session) -> Result<()> {
    let raw = || Contender::many("raw munmap", || mutations(By::Nobody, Mutation::Unmap));
    session.measure(Plan::new("raw munmap", "µs", raw()).against(raw(), None).control())?;

    let space = Space::get(DEFAULT_DEADLINE)?;
    let probe = Memory::populated(page_size())?;
    if let Err(why) = watch(&space, probe.range(), u64::MAX) {
        session.absent("", why);
        return Ok(());
    }
    space.remove(probe.range(), u64::MAX);
    for place in [0, 1] {
        let where_to = ["the same processor", "another processor"][place];
        if place >= allowed().len() {
            session
                .absent("mutations with the watcher on another processor", "this process may use one processor only");
            continue;
        }
        mutating(session, &space, place, where_to)?;
    }
    watching(session, &space)?;
    touching(session, &space)?;
    against_ucx(session, &space)?;
    drop(space);
    unrelated(session)?;
    en_masse::run(session)
}

/// Hits, misses and mass invalidation beside UCX's registration cache. What it does with a hit is to find a range and to count its users; ours is to find it.
fn against_ucx(session: &mut Session, space: &Arc<Space>) -> Result<()> {
    let ucx = match Ucx::start() {
        Ok(ucx) => RefCell::new(ucx),
        Err(why) => {
            session.absent("UCX's registration cache", format!("{why:#}"));
            return Ok(());
        }
    };
    let name = "UCX rcache 1.13";
    for (count, goal) in [(1_000, 50.0), (100_000, 400.0)] {
        // Every second page, as UCX would merge neighbours. Nothing is watched: a look-up doesn't ask for that.
        let memory = Memory::untouched(2 * count * page_size())?;
        let range = |index: usize| memory.part(2 * index, page_size());
        (0..count).for_each(|id| space.insert(range(id), id as u64, Arc::new(Told::default())));
        let mut random = Random::new(6);
        let asked: Vec<_> = (0..1 << 14).map(|_| range(random.below(count))).collect();
        let hit = || {
            let (mut next, mut found) = (asked.iter(), 0);
            let time = cpu(asked.len(), || {
                next.next().into_iter().for_each(|&range| space.visit(range, |_, _, _| found += 1))
            });
            ensure!(found == asked.len(), "every object is found");
            Ok(time)
        };
        let plan = Plan::new(
            format!("find an object (a hit) among {}", thousands(count)),
            "ns",
            Contender::new("pinfold", hit),
        )
        .clock("cpu");
        let peer = Contender::new(name, || ucx.borrow_mut().ask("hit", count));
        session.measure(plan.against(peer, None).goal(Goal::ours(goal)))?;
        (0..count).for_each(|id| space.remove(range(id), id as u64));
    }
    let miss = || {
        let pages = single_pages()?;
        let mut next = pages.iter().enumerate();
        let mut watched = Ok(());
        let time = cpu(EACH, || {
            let (id, page) = next.next().expect("as many as there are");
            watched = std::mem::replace(&mut watched, Ok(())).and(watch(space, page.range(), id as u64));
        });
        pages.iter().enumerate().for_each(|(id, page)| space.remove(page.range(), id as u64));
        watched.map(|()| time)
    };
    let plan = Plan::new("watch a page that nobody knows (a miss)", "ns", Contender::new("pinfold", miss)).clock("cpu");
    session.measure(plan.against(Contender::new(name, || ucx.borrow_mut().ask("miss", 256)), None))?;
    let count = session.mode.pick(1_000, 10_000, 10_000);
    let mass = || {
        let memory = Memory::populated(2 * count * page_size())?;
        let watched = space.watch(memory.range())?;
        for id in 0..count {
            space.insert(
                memory.part(2 * id, page_size()),
                id as u64,
                Arc::new(Told { shards: AtomicU16::new(watched.shards.0) }),
            );
        }
        let ranges: Vec<_> = (0..count).map(|id| memory.part(2 * id, page_size())).collect();
        let begun = Instant::now();
        memory.unmap();
        let time = microseconds(begun.elapsed());
        ranges.iter().enumerate().for_each(|(id, range)| space.remove(*range, id as u64));
        Ok(time)
    };
    let plan = Plan::new(
        format!("one munmap over every second page, {} objects", thousands(count)),
        "µs",
        Contender::new("pinfold", mass),
    );
    session.measure(plan.against(Contender::new(name, || ucx.borrow_mut().ask("mass", count)), None).at_most(21))?;
    Ok(())
}

fn mutating(session: &mut Session, space: &Arc<Space>, place: usize, where_to: &str) -> Result<()> {
    let monitor = placement::thread_named(MONITOR).context("the monitor thread was not found by its name")?;
    let bare = Bare::new()?;
    bare.place(place)?;
    placement::pin(monitor, &allowed()[place..=place])?;
    let pinned = Pinned::to(0);
    let placed = format!("mutator on processor {}, watcher on processor {}", allowed()[0], allowed()[place]);
    for (what, call) in [(Mutation::Unmap, "munmap"), (Mutation::Discard, "madvise(DONTNEED)")] {
        let name = format!("watched {call} of a page, watcher on {where_to}");
        let plan = Plan::new(name, "µs", Contender::many("pinfold", || mutations(By::Ours(space), what)));
        let plan =
            plan.against(Contender::many("bare userfaultfd", || mutations(By::Bare(&bare), what)), Goal::ratio(1.2));
        let raw = Contender::many(&format!("raw {call}"), || mutations(By::Nobody, what));
        session.measure(plan.against(raw, None).placement(&placed))?;
    }
    drop(pinned);
    placement::pin(monitor, &allowed())?;
    Ok(())
}

/// Beginning to watch: a page of its own, and one inside memory that is watched already.
fn watching(session: &mut Session, space: &Arc<Space>) -> Result<()> {
    let bare = Bare::new()?;
    let each = |by: By<'_>| -> Result<f64> {
        let pages = single_pages()?;
        let begun = Instant::now();
        for (id, page) in pages.iter().enumerate() {
            by.watch(page.range(), id)?;
        }
        let time = microseconds(begun.elapsed()) / EACH as f64;
        pages.iter().enumerate().for_each(|(id, page)| by.end(page.range(), id));
        // With the bare one, whoever unmaps has to be read; its thread is there.
        Ok(time)
    };
    let plan = Plan::new("begin to watch a page", "µs", Contender::new("pinfold", || each(By::Ours(space))));
    session.measure(plan.against(Contender::new("bare UFFDIO_REGISTER", || each(By::Bare(&bare))), None))?;

    let (ours, theirs) = (Memory::populated(1024 * page_size())?, Memory::populated(1024 * page_size())?);
    watch(space, ours.range(), u64::MAX)?;
    bare.watch(theirs.range())?;
    let inside = |by: By<'_>, memory: &Memory| -> Result<f64> {
        let begun = Instant::now();
        for id in 0..EACH {
            by.watch(memory.part(2 * id, page_size()), id)?;
        }
        let time = microseconds(begun.elapsed()) / EACH as f64;
        (0..EACH).for_each(|id| by.end(memory.part(2 * id, page_size()), id));
        Ok(time)
    };
    let plan =
        Plan::new("watch a page of watched memory", "µs", Contender::new("pinfold", || inside(By::Ours(space), &ours)));
    let peer = Contender::new("bare UFFDIO_REGISTER", || inside(By::Bare(&bare), &theirs));
    session.measure(plan.against(peer, None).goal(Goal::ours(1.0)))?;
    space.remove(ours.range(), u64::MAX);
    Ok(())
}

/// The first write to each of 256 pages.
fn touching(session: &mut Session, space: &Arc<Space>) -> Result<()> {
    const PAGES: usize = 256;
    let touch = |by: By<'_>, populated: bool| -> Result<f64> {
        let memory = Memory::untouched(PAGES * page_size())?;
        if populated {
            memory.fill(1);
        }
        by.watch(memory.range(), 0)?;
        let mut page = 0;
        let time = cpu(PAGES, || {
            memory.touch(page);
            page += 1;
        });
        by.end(memory.range(), 0);
        Ok(time)
    };
    let _pinned = Pinned::to(0);
    for (name, populated) in
        [("first touch of watched anonymous memory", false), ("write to memory that was populated, then watched", true)]
    {
        let plan = Plan::new(name, "ns", Contender::new("watched by pinfold", || touch(By::Ours(space), populated)))
            .clock("cpu");
        session
            .measure(plan.against(Contender::new("not watched", || touch(By::Nobody, populated)), Goal::ratio(1.1)))?;
    }
    // What a watch costs memory that was not populated before: the kernel maps the pages of the page cache one by one, and not sixteen at a time.
    for (name, file) in [
        ("first look at watched shared memory, untouched", shared_memory(PAGES)),
        ("first look at a watched file on a disk, untouched", file_on_disk(PAGES)),
    ] {
        let file = match file {
            Ok(file) => file,
            Err(why) => {
                session.absent(name, format!("{why:#}"));
                continue;
            }
        };
        let look = |by: By<'_>| -> Result<f64> {
            let memory = Memory::of_file(&file)?;
            by.watch(memory.range(), 0)?;
            let mut page = 0;
            let time = cpu(PAGES, || {
                memory.look(page);
                page += 1;
            });
            by.end(memory.range(), 0);
            Ok(time)
        };
        let plan = Plan::new(name, "ns", Contender::new("watched by pinfold", || look(By::Ours(space)))).clock("cpu");
        session.measure(plan.against(Contender::new("not watched", || look(By::Nobody)), None))?;
    }
    Ok(())
}

/// Shared memory whose pages are there, mapped nowhere.
fn shared_memory(pages: usize) -> Result<File> {
    // SAFETY: the name is a string that ends; the call makes a descriptor.
    let fd = unsafe { libc::memfd_create(c"pinfold-harness".as_ptr(), libc::MFD_CLOEXEC) };
    ensure!(fd >= 0, "memfd_create: {}", std::io::Error::last_os_error());
    // SAFETY: just made, and nobody else's.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    (&file).write_all(&vec![1; pages * page_size()])?;
    Ok(file)
}

/// A file without a name, in the page cache. `/var/tmp` is on a disk where anything is.
fn file_on_disk(pages: usize) -> Result<File> {
    let flags = libc::O_TMPFILE | libc::O_CLOEXEC;
    let file = File::options().read(true).write(true).custom_flags(flags).open("/var/tmp").context("/var/tmp")?;
    (&file).write_all(&vec![1; pages * page_size()])?;
    Ok(file)
}

/// A mapping that nobody watches, in a process that watches another, and in one that watches none.
/// A hundredth is below what two samples differ by, so there are as many rounds as can be. And no sample begins with threads that have just been
/// started or ended: their leftovers on the other processor make an unmap dearer for a while.
fn unrelated(session: &mut Session) -> Result<()> {
    let watched = Memory::populated(page_size())?;
    let space = RefCell::new(None);
    let settled = || {
        mutations(By::Nobody, Mutation::Unmap)?;
        mutations(By::Nobody, Mutation::Unmap)
    };
    let beside = || {
        if space.borrow().is_none() {
            let fresh = Space::get(DEFAULT_DEADLINE)?;
            watch(&fresh, watched.range(), 0)?;
            space.replace(Some(fresh));
        }
        settled()
    };
    let alone = || {
        if let Some(space) = space.take() {
            space.remove(watched.range(), 0);
        }
        settled()
    };
    let _pinned = Pinned::to(0);
    let plan = Plan::new("munmap of memory that nobody watches", "µs", Contender::many("with pinfold at work", beside));
    let plan = plan.against(Contender::many("without", alone), Goal::ratio(1.01));
    session.measure(plan.exactly(usize::MAX))?;
    alone()?;
    Ok(())
}
