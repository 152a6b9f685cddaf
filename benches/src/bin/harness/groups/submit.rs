//! What a lease adds to a submit: the look at every object's word and the counts, before and after the driver's own call.

use anyhow::{Result, anyhow, ensure};
use ash::vk;
use pinfold_vulkan::{Access, Config, Lease, Manager, Timeline, Userptr, page_size};

use crate::clock::wall;
use crate::groups::import::{PATIENCE, settle};
use crate::groups::index::counted;
use crate::memory::Memory;
use crate::session::{Contender, Goal, Plan, Session};
use crate::vulkan::Card;

/// Leases a sample.
const LEASES: usize = 64;

/// Nanoseconds a submit that gives the driver nothing: what is ours alone.
fn bookkeeping(manager: &Manager, objects: &[&Userptr]) -> Result<f64> {
    let leases: Result<Vec<Lease>, _> = (0..LEASES).map(|_| manager.acquire(objects)).collect();
    let (mut leases, mut fine) = (leases?.into_iter(), true);
    let time = wall(LEASES, || {
        let lease = leases.next().expect("one for each repetition");
        // SAFETY: nothing is submitted, so there is nothing to signal.
        fine &= unsafe { lease.submit([] as [Timeline; 0], || Ok::<_, vk::Result>(())) }.is_ok();
    });
    ensure!(fine, "a submit of valid objects was refused");
    Ok(time)
}

fn queue_submit(card: &Card, semaphore: vk::Semaphore, value: u64) -> Result<(), vk::Result> {
    let (signals, values) = ([semaphore], [value]);
    let mut timeline = vk::TimelineSemaphoreSubmitInfo::default().signal_semaphore_values(&values);
    let submits = [vk::SubmitInfo::default().signal_semaphores(&signals).push_next(&mut timeline)];
    // SAFETY: no commands; the semaphore is the card's and alive; values only grow; only this thread uses the queue.
    unsafe { card.device().queue_submit(card.gpu.queue, &submits, vk::Fence::null()) }
}

/// The driver's call alone.
fn bare(card: &Card) -> Result<f64> {
    let mut failed = None;
    let time = wall(LEASES, || {
        let (semaphore, value) = card.next_value();
        failed = queue_submit(card, semaphore, value).err().or(failed);
    });
    card.wait_idle()?;
    failed.map_or(Ok(time), |error| Err(error.into()))
}

/// Acquire, the driver's call, and all of ours.
fn whole(card: &Card, manager: &Manager, objects: &[&Userptr]) -> Result<f64> {
    let mut failed = None;
    let mut last = None;
    let time = wall(LEASES, || {
        let (semaphore, value) = card.next_value();
        let done = manager.acquire(objects).map_err(anyhow::Error::from).and_then(|lease| {
            // SAFETY: the submit has no commands that could outlast its signal.
            let pending =
                unsafe { lease.submit([Timeline { semaphore, value }], || queue_submit(card, semaphore, value)) };
            pending.map_err(|error| anyhow!("{error}"))
        });
        match done {
            Ok(pending) => last = Some(pending),
            Err(error) => failed = Some(error),
        }
    });
    card.wait_idle()?;
    let over = last.and_then(|pending| pending.wait(PATIENCE));
    failed.map_or_else(|| over.map(|_| time).ok_or_else(|| anyhow!("the last submit didn't end")), Err)
}

pub(crate) fn run(session: &mut Session, card: &Card) -> Result<()> {
    let manager = card.manager(Config::default())?;
    let memory = Memory::populated(256 * page_size())?;
    let objects: Vec<_> = (0..256)
        // SAFETY: as in `import::register`.
        .map(|index| unsafe { manager.register(memory.part(index, page_size()), Access::Read) })
        .collect::<Result<_, _>>()?;
    let refs: Vec<_> = objects.iter().collect();
    drop(manager.acquire_timeout(&refs, PATIENCE)?);

    let plan = Plan::new("vkQueueSubmit of nothing", "ns", Contender::new("vkQueueSubmit", || bare(card)));
    session.measure(plan.against(Contender::new("vkQueueSubmit", || bare(card)), None).control())?;

    let mut curve = Vec::new();
    for count in [1, 16, 256] {
        let some = &refs[..count];
        let each = count as f64;
        let name = format!("submit's own work, {}, for each", counted(count, "object"));
        let plan = Plan::new(name, "ns", Contender::new("pinfold", || Ok(bookkeeping(&manager, some)? / each)));
        let peer = Contender::new("vkQueueSubmit, shared by the objects", || Ok(bare(card)? / each));
        session.measure(plan.against(peer, None).goal(Goal::ours(50.0)))?;
        let name = format!("acquire and submit, {}", counted(count, "object"));
        let plan = Plan::new(name, "ns", Contender::new("pinfold", || whole(card, &manager, some)));
        curve.push((each, session.measure(plan.against(Contender::new("vkQueueSubmit", || bare(card)), None))?));
    }
    session.curve("acquire and submit", "objects in the lease", "ns", curve)?;
    drop(refs);
    drop(objects);
    settle(&manager)
}
