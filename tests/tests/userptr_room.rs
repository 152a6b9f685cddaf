//! What may be pinned is limited: idle objects make room, oldest first; those that are used never do.

#[macro_use]
mod userptr;

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::task::{Context, Wake, Waker};
use std::thread;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use pinfold_core::watch::{Note, NoteCause, UserptrEvent, WatchConfig};
use pinfold_core::{Access, Error, Manager, Outcome, State, Userptr, page_size};
use pinfold_invalidate::{Cause, Change, HostRange, Shards, Space, Target};
use pinfold_tests::PATIENCE;
use pinfold_tests::dma::DmaDevice;
use pinfold_tests::fake::{Answer, Call, FakeDevice};
use pinfold_tests::fence::Fence;
use pinfold_tests::memory::{Backing, Region};
use pinfold_tests::process::isolated;
use pinfold_tests::{leaks, skip};

use userptr::budget::{is_budget, lease, valid, with_budget};
use userptr::{Fake, alone, device_sees, filled, patient, program_sees, register, wait_until};

#[test]
fn the_least_recently_used_object_makes_room_and_its_next_acquire_is_a_new_import() {
    let _alone = alone();
    let (rig, _region, objects) = with_budget(3, 5);
    for object in &objects[..3] {
        drop(lease(&rig.manager, object));
    }
    let before = objects[1].generation().unwrap();
    drop(lease(&rig.manager, &objects[0])); // so that 1 is the oldest
    drop(lease(&rig.manager, &objects[3]));
    assert_eq!(valid(&objects), "V-VV-");
    drop(lease(&rig.manager, &objects[4]));
    assert_eq!(valid(&objects), "V--VV");
    let again = lease(&rig.manager, &objects[1]);
    assert!(again.changed_since(0, before), "who keeps descriptors is told of the new import");
    assert_eq!(valid(&objects), "-V-VV");
    let stats = rig.manager.stats();
    assert_eq!((stats.evicted, stats.evicted_bytes), (3, 3 * page_size() as u64));
    assert_eq!((stats.imports, stats.pinned_bytes), (3, 3 * page_size() as u64));
    assert_eq!(rig.device.live_imports(), 3);
}

#[test]
fn what_is_leased_or_under_way_is_never_evicted() {
    let _alone = alone();
    let (rig, _region, objects) = with_budget(2, 3);
    let (kept, fence) = (lease(&rig.manager, &objects[0]), Fence::new());
    // SAFETY: nothing is submitted.
    let pending = unsafe { lease(&rig.manager, &objects[1]).submit([fence.clone()], || Ok::<_, String>(())) }.unwrap();
    is_budget(rig.manager.acquire_timeout(&[&objects[2]], PATIENCE), 1, 0);
    assert_eq!((valid(&objects), rig.manager.stats().evicted), ("VV-".into(), 0));
    assert_eq!((rig.manager.idle_bytes(), rig.manager.shrink(u64::MAX)), (0, 0));
    fence.signal(Outcome::Done);
    assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
    drop(lease(&rig.manager, &objects[2]));
    assert_eq!(valid(&objects), "V-V");
    drop(kept);
    drop(lease(&rig.manager, &objects[1]));
    assert_eq!(valid(&objects), "-VV", "it was last used when its lease was taken");
}

#[test]
fn what_work_has_just_left_is_younger_than_what_was_acquired_meanwhile() {
    let _alone = alone();
    let (rig, _region, objects) = with_budget(3, 4);
    let fence = Fence::new();
    // SAFETY: nothing is submitted.
    let pending = unsafe { lease(&rig.manager, &objects[0]).submit([fence.clone()], || Ok::<_, String>(())) }.unwrap();
    drop(lease(&rig.manager, &objects[1]));
    drop(lease(&rig.manager, &objects[2]));
    fence.signal(Outcome::Done);
    assert_eq!(pending.wait(PATIENCE), Some(Outcome::Done));
    wait_until("the work's end", || objects[0].in_flight() == 0);
    drop(lease(&rig.manager, &objects[3]));
    assert_eq!(valid(&objects), "V-VV");
}

#[test]
fn a_set_that_does_not_fit_is_an_error_and_does_not_evict_itself_in_turns() {
    let _alone = alone();
    for inline in [usize::MAX, 0] {
        let (rig, _region, objects) = {
            let mut config = patient();
            (config.budget, config.inline_limit) = (2 * page_size() as u64, inline);
            let rig = Fake::with(config);
            let region = Region::new(Backing::Anonymous, 3).unwrap();
            let objects: Vec<_> = (0..3).map(|page| register(&rig.manager, region.part(page..page + 1))).collect();
            (rig, region, objects)
        };
        let all: Vec<_> = objects.iter().collect();
        is_budget(rig.manager.acquire_timeout(&all, PATIENCE), 1, 0);
        assert_eq!(rig.manager.stats().evicted, 0);
        // Workers may still be taking the others' pages, for who was refused; they are nobody else's until they are there.
        let is_over = |object: &Userptr<_>| !matches!(object.state().unwrap(), State::Queued | State::Acquiring);
        wait_until("the end of all three", || objects.iter().all(is_over));
        assert_eq!(rig.manager.acquire_timeout(&all[1..], PATIENCE).unwrap().len(), 2);
        assert_eq!(rig.manager.acquire_timeout(&all[..2], PATIENCE).unwrap().len(), 2);
    }
}

#[test]
fn what_can_never_fit_evicts_nobody() {
    let _alone = alone();
    let (rig, region, objects) = with_budget(3, 4);
    for object in &objects[..3] {
        drop(lease(&rig.manager, object));
    }
    let large = register(&rig.manager, region.range());
    is_budget(rig.manager.acquire_timeout(&[&large], PATIENCE), 4, 0);
    assert_eq!(valid(&objects), "VVV-");
}

#[test]
fn a_device_that_is_short_is_asked_again_after_others_have_made_room() {
    let _alone = alone();
    let (rig, _region, objects) = with_budget(100, 4);
    for object in &objects[..3] {
        drop(lease(&rig.manager, object));
    }
    rig.device.script(Call::Import, &[Answer::Budget, Answer::Budget]);
    drop(lease(&rig.manager, &objects[3]));
    // One page, and twice as much when that was not enough.
    assert_eq!(valid(&objects), "---V");
    // Nobody is left to make room: now it is an error, with the device's numbers.
    rig.device.script(Call::Import, &[Answer::Budget, Answer::Budget]);
    is_budget(rig.manager.acquire_timeout(&[&objects[0]], PATIENCE), 1, 0);
    assert_eq!(valid(&objects), "----");
    drop(lease(&rig.manager, &objects[0]));
    assert_eq!(rig.device.counts().dropped, 0);
}

#[test]
fn pages_of_an_old_generation_are_room_before_anybody_is_evicted() {
    let _alone = alone();
    let (rig, region, objects) = with_budget(2, 2);
    // So often that what is between two hands just then is looked for, too.
    for _ in 0..pinfold_tests::rounds(5_000) {
        drop(rig.manager.acquire_timeout(&[&objects[0], &objects[1]], PATIENCE).unwrap());
        region.map_over(0..2).unwrap();
    }
    assert_eq!(rig.manager.stats().evicted, 0);
}

/// Keeps the thread that takes stale pages out of their objects waiting, until `go` is dropped.
struct Halt {
    came: Sender<()>,
    go: Mutex<Receiver<()>>,
}

impl Target for Halt {
    fn invalidated(&self, _: &Change) {}

    fn settled(self: Arc<Self>) {
        self.came.send(()).unwrap();
        _ = self.go.lock().unwrap().recv();
    }

    fn shards(&self) -> Shards {
        Shards::NONE
    }
}

/// Returns when the thread that takes stale pages out of their objects is done with those that are stale by now. It halts there, until what is
/// returned is dropped.
fn halt_settling(elsewhere: HostRange) -> Sender<()> {
    let ((came, has_come), (go, waits)) = (channel(), channel());
    let space = Space::get(PATIENCE).unwrap();
    space.insert(elsewhere, u64::MAX, Arc::new(Halt { came, go: Mutex::new(waits) }));
    space.invalidate(elsewhere, Cause::Manual).unwrap();
    has_come.recv_timeout(PATIENCE).unwrap();
    space.remove(elsewhere, u64::MAX);
    go
}

#[test]
fn pages_that_nobody_has_taken_out_yet_are_room_and_no_eviction() {
    let _alone = alone();
    let (rig, region, objects) = with_budget(1, 3);
    let notes = rig.manager.watch(WatchConfig::default()).unwrap();
    drop(lease(&rig.manager, &objects[0]));
    let go = halt_settling(region.part(2..3));
    rig.manager.invalidate(objects[0].range()).unwrap();
    assert_eq!(rig.device.live_imports(), 1, "it would be taken out behind what waits");
    drop(lease(&rig.manager, &objects[1]));
    assert_eq!((valid(&objects), rig.device.live_imports()), ("-V-".into(), 1));
    assert_eq!((rig.manager.stats().evicted, rig.manager.stats().evicted_bytes), (0, 0));
    let told = |note: &Note| matches!(note, Note::Userptr(note) if note.cause == NoteCause::Evicted);
    assert_eq!(notes.notes().find(told), None);
    drop(go);
}

/// As many acquisitions as there are at a time.
const WORKERS: usize = 64;

/// Workers that are kept where they tell of a failed acquisition, until this is dropped.
struct Busy(Arc<Door>, Vec<Userptr<FakeDevice>>, #[expect(dead_code, reason = "the objects lie over it")] Region);

#[derive(Default)]
struct Door {
    inside: AtomicUsize,
    open: Mutex<bool>,
    opened: Condvar,
}

impl Wake for Door {
    fn wake(self: Arc<Self>) {
        self.inside.fetch_add(1, Ordering::Relaxed);
        drop(self.opened.wait_while(self.open.lock().unwrap(), |open| !*open).unwrap());
    }
}

impl Busy {
    fn new(rig: &Fake, workers: usize) -> Self {
        let region = Region::untouched(Backing::Anonymous, workers).unwrap(); // so that it is a worker's work
        let objects: Vec<_> = (0..workers).map(|page| register(&rig.manager, region.part(page..page + 1))).collect();
        rig.device.script(Call::Prepare, &[Answer::Hold].repeat(workers));
        rig.device.script(Call::Prepare, &[Answer::Fault(libc::EPERM)].repeat(workers));
        let door = Arc::new(Door::default());
        let waker = Waker::from(Arc::clone(&door));
        for object in &objects {
            let objects = [object];
            let acquire = pin!(rig.manager.acquire_async(&objects));
            assert!(acquire.poll(&mut Context::from_waker(&waker)).is_pending());
        }
        rig.device.wait_held(workers);
        rig.device.let_go();
        wait_until("the workers", || door.inside.load(Ordering::Relaxed) == workers);
        Self(door, objects, region)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        *self.0.open.lock().unwrap() = true;
        self.0.opened.notify_all();
        self.1.clear();
    }
}

#[test]
fn pages_that_no_worker_has_come_to_give_back_are_room_before_anybody_is_evicted() {
    let _alone = alone();
    let (rig, region, objects) = with_budget(2, 4);
    let _busy = Busy::new(&rig, WORKERS);
    drop(lease(&rig.manager, &objects[0]));
    let used = lease(&rig.manager, &objects[1]);
    rig.manager.invalidate(objects[1].range()).unwrap();
    drop(halt_settling(region.part(3..4)));
    drop(used);
    drop(lease(&rig.manager, &objects[2]));
    assert_eq!((valid(&objects).as_str(), rig.manager.stats().evicted), ("V-V-", 0));
}

#[test]
fn pages_that_are_let_go_of_while_somebody_waits_for_room_are_his() {
    let _alone = alone();
    let (rig, region, objects) = with_budget(2, 4);
    let behind = Region::untouched(Backing::Anonymous, 1).unwrap();
    let behind = register(&rig.manager, behind.range());
    let _busy = Busy::new(&rig, WORKERS - 1);
    let used = lease(&rig.manager, &objects[0]);
    rig.manager.invalidate(objects[0].range()).unwrap();
    drop(halt_settling(region.part(3..4)));
    rig.device.script(Call::Import, &[Answer::Hold]);
    objects[1].keep_ready();
    rig.device.wait_held(1);
    thread::scope(|scope| {
        let (tell, told) = channel();
        let (rig, objects) = (&rig, &objects);
        let asks = scope.spawn(move || {
            tell.send(nix::unistd::gettid()).unwrap();
            lease(&rig.manager, &objects[2])
        });
        let asks_as = told.recv_timeout(PATIENCE).unwrap();
        wait_until("somebody who is short", || rig.manager.stats().short > 0);
        // It has found nothing, and waits for what is being restored.
        wait_until("its sleep", || is_asleep(asks_as));
        // The worker that this sets free goes there, and not to what is dead.
        rig.device.script(Call::Prepare, &[Answer::Hold]);
        assert!(rig.manager.acquire(&[&behind]).unwrap_err().is_again());
        drop(used);
        rig.device.let_go();
        drop(asks.join().unwrap());
    });
    assert_eq!((valid(&objects).as_str(), rig.manager.stats().evicted), ("-VV-", 0));
    rig.device.wait_held(1);
    rig.device.let_go();
}

#[test]
fn what_is_being_taken_for_nobody_any_more_is_room_for_who_waits() {
    let _alone = alone();
    for how in ["cancelled", "closed", "begun anew"] {
        let (rig, _region, objects) = with_budget(1, 1);
        let untouched = Region::untouched(Backing::Anonymous, 1).unwrap(); // so that it is a worker's work
        let mut first = Some(register(&rig.manager, untouched.range()));
        rig.device.script(Call::Import, &[Answer::Hold]);
        assert!(rig.manager.acquire(&[first.as_ref().unwrap()]).unwrap_err().is_again());
        rig.device.wait_held(1);
        match how {
            "cancelled" => assert!(first.as_ref().unwrap().cancel()),
            "closed" => first = None,
            _ => rig.manager.invalidate(untouched.range()).unwrap(),
        }
        let asked = first.as_ref().filter(|_| how == "begun anew").unwrap_or(&objects[0]);
        thread::scope(|scope| {
            let (tell, told) = channel();
            let manager = &rig.manager;
            let asks = scope.spawn(move || {
                tell.send(nix::unistd::gettid()).unwrap();
                manager.acquire_timeout(&[asked], PATIENCE).map(drop)
            });
            let asks_as = told.recv_timeout(PATIENCE).unwrap();
            let is_waiting = || manager.stats().short > 0 && is_asleep(asks_as);
            wait_until("somebody who is short", || asks.is_finished() || is_waiting());
            rig.device.let_go();
            asks.join().unwrap().unwrap_or_else(|error| panic!("{how}: {error}"));
        });
        assert_eq!((asked.state().unwrap(), rig.device.live_imports()), (State::Valid, 1), "{how}");
        assert_eq!(rig.manager.stats().evicted, 0, "{how}");
        let end = thread::spawn(move || drop(rig));
        wait_until("the manager's end: nobody is waited for any more", || end.is_finished());
    }
}

#[test]
fn who_does_not_wait_leaves_it_to_a_worker_to_wait_for_room() {
    let _alone = alone();
    let (rig, _region, objects) = with_budget(1, 1);
    let untouched = Region::untouched(Backing::Anonymous, 1).unwrap();
    let first = register(&rig.manager, untouched.range());
    rig.device.script(Call::Import, &[Answer::Hold]);
    assert!(rig.manager.acquire(&[&first]).unwrap_err().is_again());
    rig.device.wait_held(1);
    assert!(first.cancel());
    let error = rig.manager.acquire(&[&objects[0]]).unwrap_err();
    assert!(error.is_again(), "{error}");
    assert_eq!(rig.manager.stats().acquired_inline, 1, "it was tried at once, as the page is in memory");
    rig.device.let_go();
    drop(lease(&rig.manager, &objects[0]));
    assert_eq!((valid(&objects).as_str(), rig.manager.stats().evicted), ("V", 0));
}

#[test]
fn nobody_is_evicted_for_an_acquisition_that_is_over() {
    let _alone = alone();
    let (rig, _region, objects) = with_budget(2, 1);
    drop(lease(&rig.manager, &objects[0]));
    let untouched = Region::untouched(Backing::Anonymous, 1).unwrap();
    let cancelled = register(&rig.manager, untouched.range());
    rig.device.script(Call::Import, &[Answer::Hold, Answer::Budget]);
    assert!(rig.manager.acquire(&[&cancelled]).unwrap_err().is_again());
    rig.device.wait_held(1);
    assert!(cancelled.cancel());
    rig.device.let_go();
    wait_until("the builder's end", || rig.manager.stats().pinned_bytes == page_size() as u64);
    assert_eq!((valid(&objects).as_str(), rig.manager.stats().evicted), ("V", 0));
    let end = thread::spawn(move || drop(rig));
    wait_until("the manager's end: nobody is waited for any more", || end.is_finished());
}

fn is_asleep(thread: nix::unistd::Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap();
    stat.rsplit(')').next().unwrap().trim_start().starts_with('S')
}

#[test]
// rows (fake): igt/stress-purge
fn shrinking_takes_the_oldest_and_says_how_much_it_was() {
    let _alone = alone();
    let (rig, _region, objects) = with_budget(100, 6);
    let watch = rig.manager.watch(WatchConfig::default()).unwrap();
    for index in [3, 0, 1, 2, 4, 5] {
        drop(lease(&rig.manager, &objects[index]));
    }
    let page = page_size() as u64;
    let kept = lease(&rig.manager, &objects[0]);
    assert_eq!(rig.manager.idle_bytes(), 5 * page);
    assert_eq!(rig.manager.shrink(page + 1), 2 * page);
    assert_eq!(valid(&objects), "V-V-VV");
    assert_eq!(rig.manager.shrink(0), 0);
    assert_eq!(rig.manager.shrink(u64::MAX), 3 * page);
    assert_eq!((valid(&objects).as_str(), rig.manager.stats().shrunk_bytes), ("V-----", 5 * page));
    assert_eq!((rig.device.live_imports(), rig.manager.stats().pinned_bytes), (1, page));
    let evicted = watch.records().filter_map(|record| match record.note() {
        Note::Userptr(note) if note.cause == NoteCause::Evicted => Some((note.event, note.object)),
        _ => None,
    });
    let expected = [3, 1, 2, 4, 5].map(|index: usize| (UserptrEvent::Invalidated, objects[index].id()));
    assert_eq!(evicted.collect::<Vec<_>>(), expected);
    drop(kept);
}

#[test]
// rows (fake): igt/coherency-{unsync,sync}
fn an_eviction_loses_no_bytes_and_the_memory_is_watched_as_before() {
    let _alone = alone();
    let (rig, region, objects) = with_budget(1, 2);
    assert_eq!(device_sees(&rig, &objects[0]), program_sees(&region)[..1]);
    assert_eq!(device_sees(&rig, &objects[1]), program_sees(&region)[1..]);
    assert_eq!(objects[0].state().unwrap(), State::Invalid);
    region.fill(0..1, 0x77).unwrap();
    assert_eq!(device_sees(&rig, &objects[0]), [filled(0x77)]);
    let generation = objects[0].generation().unwrap();
    region.map_over(0..1).unwrap();
    userptr::assert_taken_back(&objects[0], generation);
}

#[test]
// rows (fake): igt/stress-purge
fn threads_that_share_too_small_a_budget_all_get_their_turn() {
    let _alone = alone();
    let (rig, region, objects) = with_budget(2, 8);
    thread::scope(|scope| {
        for (page, object) in objects.iter().enumerate() {
            let (rig, expected) = (&rig, program_sees(&region)[page]);
            scope.spawn(move || {
                for _ in 0..50 {
                    // Others' leases may be all there is: that is an error, and the next try may find them idle.
                    let lease = loop {
                        match rig.manager.acquire_timeout(&[object], PATIENCE) {
                            Ok(lease) => break lease,
                            Err(Error::Budget { .. }) => thread::yield_now(),
                            Err(error) => panic!("{error}"),
                        }
                    };
                    assert_eq!(lease.view(0).words, [expected]);
                }
            });
        }
    });
    let stats = rig.manager.stats();
    assert!(stats.imports <= 2 && stats.pinned_bytes <= 2 * page_size() as u64, "{stats:?}");
    drop(objects);
    rig.device.wait_no_imports();
    assert_eq!(rig.device.counts().dropped, 0);
}

/// Lets this process lock so many pages. `false` where that changes nothing, or nothing can be locked.
fn limit_locked_pages(pages: usize) -> bool {
    let (soft, hard) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap();
    let limit = (pages * page_size()) as u64;
    !nix::unistd::geteuid().is_root() && soft >= limit && setrlimit(Resource::RLIMIT_MEMLOCK, limit, hard).is_ok()
}

#[test]
// rows: igt/{mlocked,swapping,minor,major}-{sync,unsync}-{normal,interruptible}
fn locked_memory_is_limited_by_the_process_and_idle_objects_make_room() {
    isolated(|| {
        let device = match DmaDevice::new() {
            Ok(device) => device,
            Err(e) => skip!("no io_uring here: {e}"),
        };
        if !device.lets_go_at_once() {
            skip!("this kernel's io_uring unpins a second after it is told to, so idle objects make no room at once");
        }
        // What the ring itself takes of it, and other processes of the same user, is the kernel's to refuse.
        if !limit_locked_pages(64) {
            skip!("root is exempt from RLIMIT_MEMLOCK, or it is too small for this test");
        }
        let manager = Manager::new(device, patient()).unwrap();
        let region = Region::new(Backing::Anonymous, 256).unwrap();
        let objects: Vec<_> = (0..16)
            // SAFETY: no reference points into a region.
            .map(|part| unsafe { manager.register(region.part(16 * part..16 * part + 16), Access::Read) }.unwrap())
            .collect();
        for object in objects.iter().chain(objects.iter().rev()) {
            drop(lease(&manager, object));
            assert!(leaks::pinned() <= 64 * page_size() as u64);
        }
        let stats = manager.stats();
        assert!(stats.evicted >= 12 && stats.locked_bytes <= 64 * page_size() as u64, "{stats:?}");
        let (one, two) = (lease(&manager, &objects[0]), lease(&manager, &objects[1]));
        // SAFETY: no reference points into a region.
        let large = unsafe { manager.register(region.part(32..66), Access::Read) }.unwrap();
        let error = manager.acquire_timeout(&[&large], PATIENCE).unwrap_err();
        assert!(matches!(error, Error::Budget { .. }), "{error}");
        drop((one, two));
        drop(lease(&manager, &large));
    })
    .expect_return();
}
