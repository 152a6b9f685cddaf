//! What the tests of userptr objects share: devices whose view of memory a test can look at, under one trait, so that a behaviour is written
//! down once and asked of each device.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test program uses its own part of this")]

pub mod budget;
pub mod change;
pub mod executor;
pub mod igt;
pub mod matrix;
pub mod oracle;
pub mod overlap;
pub mod part;
pub mod race;
pub mod register;
pub mod scripted;
pub mod silent;
pub mod vulkan;

use std::convert::Infallible;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use pinfold_core::{Access, Config, Device, Error, Lease, Manager, Outcome, Pending, State, SubmitError, Userptr};
use pinfold_invalidate::{HostRange, Shards, Space, page_size};
use pinfold_tests::PATIENCE;
use pinfold_tests::dma::DmaDevice;
use pinfold_tests::fake::{Answer, Call, FakeDevice};
use pinfold_tests::fence::Fence;
use pinfold_tests::memory::{Backing, Region};

/// A manager over a device, and a way to see what the device sees. What is seen of every page is its
/// first word.
pub trait Rig: Sync {
    type D: Device;
    /// So many times an object is valid, somebody returns from taking its memory away, and looks.
    const TRIES: usize = 100_000;

    fn manager(&self) -> &Manager<Self::D>;

    /// Whether the device can be given this kind of memory for reading.
    fn takes(&self, backing: Backing) -> bool;

    /// Whether the device can be given an object whose pieces are different files, as anonymous shared memory is after a mapping over a part of it.
    fn spans_files(&self) -> bool {
        true
    }

    /// Whether the device goes on seeing the old pages when the program's mapping has got others: it has pins, copies, or a mapping of its own.
    fn keeps_pages(&self, backing: Backing) -> bool;

    /// Whether the device goes on seeing pages that the program has lost, whatever took them: it has pins, or copies.
    fn pins(&self) -> bool {
        true
    }

    /// Whether these are copies.
    fn copies(&self) -> bool {
        false
    }

    /// To be told of what the program writes into memory it goes on having: a device of copies has to make new ones.
    fn written(&self, _: HostRange) {}

    /// Lets the next import take its pages and then wait until [`let_go`](Self::let_go). False if the device can't be told to.
    fn hold_next_import(&self) -> bool {
        false
    }

    /// Waits until an import is held.
    fn wait_held(&self) {}

    /// Lets the held import go on.
    fn let_go(&self) {}

    /// Submits work that reads the only object of the lease, and is under way until [`Work::finish`].
    fn start(&self, lease: Lease<Self::D>) -> Result<Work<'_, Self::D>, SubmitError<Self::D, Infallible>>;
}

/// Work that is under way for as long as a test wants.
pub struct Work<'a, D: Device> {
    pub pending: Pending<D>,
    end: Box<dyn FnOnce() -> Vec<u64> + Send + 'a>,
}

impl<'a, D: Device> Work<'a, D> {
    pub fn new(pending: Pending<D>, end: impl FnOnce() -> Vec<u64> + Send + 'a) -> Self {
        Self { pending, end: Box::new(end) }
    }

    /// Lets the work end, and tells what the device saw.
    pub fn finish(self) -> Vec<u64> {
        let seen = (self.end)();
        assert_eq!(self.pending.wait(PATIENCE), Some(Outcome::Done));
        seen
    }
}

/// Tests that hold mutators off run one after the other: the tracking is the process's, and a use in one test holds the mutators of another.
pub fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Work ends when the test says so, not when a deadline has passed.
pub fn patient() -> Config {
    let mut config = Config::default();
    config.deadline = Duration::from_secs(10);
    config
}

/// Registers memory that the device only reads.
pub fn register<D: Device>(manager: &Manager<D>, range: HostRange) -> Userptr<D> {
    // SAFETY: no reference points into a region, and mutations of it are what the tests are about: they are held off, bracketed or announced.
    unsafe { manager.register(range, Access::Read) }.unwrap()
}

/// Waits until something has come about, which only a failing test waits long for.
#[track_caller]
pub fn wait_until(what: &str, mut come: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !come() {
        assert!(Instant::now() < deadline, "{what} doesn't come about");
        thread::yield_now();
    }
}

/// Waits until some mutator has begun and waits for its event to be read.
#[track_caller]
pub fn wait_for_mutator() {
    let space = space();
    wait_until("a mutation of watched memory", || space.is_busy(Shards::ALL));
}

/// The tracking of this process, as the managers share it.
pub fn space() -> std::sync::Arc<Space> {
    Space::get(Duration::ZERO).expect("a manager has it already")
}

/// The first word of every page of a region, as the program sees it.
pub fn program_sees(region: &Region) -> Vec<u64> {
    first_words(&region.read(0, region.range().len()).expect("mapped"))
}

/// The first word of every page.
pub fn first_words(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks(page_size()).map(|page| u64::from_ne_bytes(page[..8].try_into().expect("eight bytes"))).collect()
}

/// The word of a page that is filled with one byte.
pub fn filled(byte: u8) -> u64 {
    u64::from_ne_bytes([byte; 8])
}

/// What the device sees of an object, acquired and read anew until no mutation comes in between.
#[track_caller]
pub fn device_sees<R: Rig>(rig: &R, object: &Userptr<R::D>) -> Vec<u64> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let lease = match rig.manager().acquire_timeout(&[object], PATIENCE) {
            // What this object had locked before, the kernel may not have taken off its account yet.
            Err(Error::Budget { .. }) if Instant::now() < deadline => {
                thread::yield_now();
                continue;
            }
            lease => lease.unwrap(),
        };
        match rig.start(lease) {
            Ok(work) => return work.finish(),
            // Discarded pages are taken a second time after a while, which makes leases of the first time stale.
            Err(error) => assert!(error.is_stale() && Instant::now() < deadline, "{error}"),
        }
    }
}

/// Asserts that the object is invalid, and has changed hands since `generation`.
#[track_caller]
pub fn assert_taken_back<D: Device>(object: &Userptr<D>, generation: pinfold_core::Generation) {
    assert_eq!(object.state().unwrap(), State::Invalid);
    assert!(object.generation().unwrap() > generation, "the generation has moved");
}

/// Asserts that the object can't be acquired, by the fault of its memory, and that this is no lasting verdict.
#[track_caller]
pub fn assert_faults<D: Device>(manager: &Manager<D>, object: &Userptr<D>) {
    for _ in 0..2 {
        let error = manager.acquire_timeout(&[object], PATIENCE).expect_err("a hole");
        assert_eq!(error.errno(), libc::EFAULT, "{error}");
        assert_eq!(object.state().unwrap(), State::Faulted);
    }
}

/// The kinds of memory that are watched and that the device takes, each with a region of so many pages.
pub fn regions<R: Rig>(rig: &R, pages: usize) -> impl Iterator<Item = (Backing, Region)> {
    let keeps = move |backing| backing != Backing::AnonymousShared || rig.spans_files();
    let takes = Backing::ALL.into_iter().filter(move |&it| it.watchable() && rig.takes(it) && keeps(it));
    takes.map(move |backing| (backing, Region::new(backing, pages).unwrap()))
}

/// The scripted device. Its imports copy what they are given, so they go on showing what was there when they were made.
pub struct Fake {
    /// First, so that a test that fails doesn't wait for a call that it holds itself.
    _let_go: LetGo,
    pub device: FakeDevice,
    pub manager: Manager<FakeDevice>,
}

struct LetGo(FakeDevice);

impl Drop for LetGo {
    fn drop(&mut self) {
        self.0.let_go();
    }
}

impl Fake {
    pub fn new() -> Self {
        Self::with(patient())
    }

    pub fn with(config: Config) -> Self {
        let device = FakeDevice::new();
        Self { _let_go: LetGo(device.clone()), manager: Manager::new(device.clone(), config).unwrap(), device }
    }
}

impl Rig for Fake {
    type D = FakeDevice;
    const TRIES: usize = 20_000;

    fn manager(&self) -> &Manager<FakeDevice> {
        &self.manager
    }

    fn takes(&self, _: Backing) -> bool {
        true
    }

    fn keeps_pages(&self, _: Backing) -> bool {
        true
    }

    fn copies(&self) -> bool {
        true
    }

    fn written(&self, range: HostRange) {
        self.manager.invalidate(range).unwrap();
    }

    fn hold_next_import(&self) -> bool {
        self.device.script(Call::Taken, &[Answer::Hold]);
        true
    }

    fn wait_held(&self) {
        self.device.wait_held(1);
    }

    fn let_go(&self) {
        self.device.let_go();
    }

    fn start(&self, lease: Lease<FakeDevice>) -> Result<Work<'_, FakeDevice>, SubmitError<FakeDevice, Infallible>> {
        let (fence, view) = (Fence::new(), lease.view(0));
        let (id, seen) = (view.id, view.words.clone());
        let device = &self.device;
        let hand_over = || {
            assert!(device.is_live(id), "the commands name an import that has been released");
            Ok(())
        };
        // SAFETY: the fence is signalled when the "work" ends, which accesses nothing.
        let pending = unsafe { lease.submit([fence.clone()], hand_over) }?;
        Ok(Work::new(pending, move || {
            assert!(device.is_live(id), "the import was released while work that names it was under way");
            fence.signal(Outcome::Done);
            seen
        }))
    }
}

/// The device in software that pins real pages.
pub struct Dma {
    pub device: DmaDevice,
    pub manager: Manager<DmaDevice>,
    pins_files: bool,
    spans_files: bool,
}

impl Dma {
    /// `Err` where there is no io_uring.
    pub fn new() -> std::io::Result<Self> {
        let device = DmaDevice::new()?;
        let (pins_files, spans_files) = (device.pins_files(), device.spans_files());
        Ok(Self { manager: Manager::new(device.clone(), patient()).unwrap(), pins_files, spans_files, device })
    }
}

impl Rig for Dma {
    type D = DmaDevice;

    fn manager(&self) -> &Manager<DmaDevice> {
        &self.manager
    }

    fn takes(&self, backing: Backing) -> bool {
        backing.writable() && backing != Backing::FileShared && (self.pins_files || backing != Backing::FilePrivate)
    }

    fn spans_files(&self) -> bool {
        self.spans_files
    }

    fn keeps_pages(&self, _: Backing) -> bool {
        true
    }

    fn hold_next_import(&self) -> bool {
        self.device.hold_next_import();
        true
    }

    fn wait_held(&self) {
        self.device.wait_held();
    }

    fn let_go(&self) {
        self.device.let_go();
    }

    fn start(&self, lease: Lease<DmaDevice>) -> Result<Work<'_, DmaDevice>, SubmitError<DmaDevice, Infallible>> {
        let view = lease.view(0);
        let job = self.device.read_job(&view, 0, view.range.len()).unwrap().hold();
        let hand_over = || {
            job.start();
            Ok(())
        };
        // SAFETY: the job's fence is signalled when it is over, and it reads the import of the view only.
        let pending = unsafe { lease.submit([job.fence()], hand_over) }?;
        Ok(Work::new(pending, move || first_words(&job.finish().expect("the pages stay pinned"))))
    }
}

/// Makes a test of each behaviour for each device named: `fake`, `dma`.
#[macro_export]
macro_rules! for_devices {
    ([$($device:ident)+] $cases:ident $list:tt) => {
        $(for_devices!(@$device $cases $list);)+
    };
    (@fake $cases:ident { $($case:ident)+ }) => {
        mod fake {
            $(#[test]
            fn $case() {
                let _alone = super::userptr::alone();
                super::userptr::$cases::$case(&super::userptr::Fake::new());
            })+
        }
    };
    (@dma $cases:ident { $($case:ident)+ }) => {
        mod dma {
            $(#[test]
            fn $case() {
                let _alone = super::userptr::alone();
                match super::userptr::Dma::new() {
                    Ok(rig) => super::userptr::$cases::$case(&rig),
                    Err(e) => pinfold_tests::skip!("no io_uring here: {e}"),
                }
            })+
        }
    };
}
