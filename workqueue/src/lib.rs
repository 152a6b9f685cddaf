//! A work queue with bounded and may-sleep accounting, ordering by key, cancellation and delayed work.
//!
//! It follows two models. Its workers are managed like those of io_uring's io-wq: work that finishes by itself and work
//! that may sleep for long have limits of their own, a worker that blocks never holds up what is queued, and cancelling
//! says whether it found the work pending, running or not at all. Its work items have the rules of Linux's workqueues:
//! one item never runs twice at a time, queued again while it runs means one more run, and after a cancel that waits it
//! does not run.
//!
//! # A pool
//!
//! A job is called once, by a worker or as cancelled; its result can be waited for.
//!
//! ```
//! use pinfold_workqueue::{Job, Pool};
//!
//! let pool = Pool::builder("sums").bounded(4).build()?;
//! let (job, sum) = Job::tracked(|_| Ok((1..=100).sum::<u32>()));
//! pool.submit(job)?;
//! assert_eq!(sum.wait()?, 5050);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Order by key
//!
//! Jobs of one key run one at a time, in the order they were queued, on whatever worker; other keys overtake them.
//!
//! ```
//! # use pinfold_workqueue::{Job, Pool};
//! # let pool = Pool::builder("keys").build()?;
//! let (send, seen) = std::sync::mpsc::channel();
//! for n in 0..10 {
//!     let send = send.clone();
//!     pool.submit(Job::new(move |_| send.send(n).expect("somebody listens")).key(7))?;
//! }
//! drop(send);
//! assert!(seen.iter().eq(0..10));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Cancelling
//!
//! Pending work is taken back and called as cancelled, running work is told; the answer says which it was.
//!
//! ```
//! # use pinfold_workqueue::{Cancelled, Ended, Job, Pool};
//! # let pool = Pool::builder("cancel").build()?;
//! let (send, started) = std::sync::mpsc::channel();
//! let (job, done) = Job::tracked::<()>(move |context| {
//!     let _ = send.send(());
//!     loop {
//!         context.check()?;
//!         std::thread::yield_now();
//!     }
//! });
//! let handle = pool.submit(job)?;
//! started.recv()?;
//! assert_eq!(handle.cancel(), Cancelled::Running);
//! assert!(matches!(done.wait(), Err(Ended::Interrupted)));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Delayed and repeated work
//!
//! An item is made once and queued as often as wanted, at once or later; queueing it allocates nothing.
//!
//! ```
//! # use pinfold_workqueue::{Flags, Queue};
//! use std::time::Duration;
//!
//! let queue = Queue::new("flusher", Flags::ORDERED, 0)?;
//! let mut runs = 0;
//! let work = queue.work(move |_| runs += 1);
//! assert!(work.queue_delayed(Duration::from_secs(3600))?);
//! assert!(!work.queue()?, "its timer runs");
//! assert!(work.modify_delayed(Duration::from_millis(1))?, "it was pending");
//! work.flush()?;
//! assert!(work.queue_delayed(Duration::from_secs(3600))?);
//! assert!(work.cancel_sync()?, "it was taken back, and doesn't run until queued again");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What else there is
//!
//! | wanted | use |
//! | --- | --- |
//! | run once, with a key, a delay, a follow-up or a cancel hook | [`Job`], [`Pool::submit`], [`Queue::submit`] |
//! | wait for the result: blocked, as a future, by eventfd | [`Job::tracked`], [`Completion`] |
//! | run again and again, without allocating | [`Work`], from [`Queue::work`] |
//! | limit, order, drain or prioritise a kind of work | [`Queue`], [`Flags`] |
//! | sleep inside work | [`blocking()`], or leave it to the watchdog |
//! | see what goes on | [`Pool::counters`], and the `Debug` of [`Pool`] |
//!
//! # What it is built on
//!
//! One lock per pool guards everything; under it nothing is allocated, freed, woken or called. That is fast where a few
//! processors share a pool, and the limit where many do: then use several pools. The sleeping and waking protocol has
//! its proof in the `crew` module and its models in `tests/loom.rs`. There is no unsafe code.
//!
//! # When the calling thread may not allocate
//!
//! [`Work::queue`] and its kin allocate and free nothing. With
//! [`PoolBuilder::submitters_never_start_threads`] they don't start threads either: they take one short lock and at
//! most wake a thread.
//!
//! # Tests beyond `cargo test`
//!
//! `RUSTFLAGS="--cfg loom" LOOM_MAX_PREEMPTIONS=2 cargo test -p pinfold-workqueue --test loom --release` explores the
//! models, and with `--lib table_models` every pair of operations on a work item.
//! `PINFOLD_SOAK_CYCLES=10000000 cargo test -p pinfold-workqueue --release --test pool no_wake_up_is_lost` looks for lost
//! wake-ups for longer.

#![forbid(unsafe_code)]

mod blocking;
mod completion;
mod control;
mod crew;
mod effects;
mod end;
mod entry;
mod error;
mod item;
mod job;
mod keeper;
mod keys;
mod list;
mod pool;
mod queue;
mod shared;
mod slab;
mod state;
mod stats;
mod sync;
mod sys;
mod system;
mod table;
#[cfg(all(test, loom))]
mod table_models;
#[cfg(all(test, not(loom)))]
mod table_tests;
mod topology;
mod transit;
mod worker;

pub use blocking::blocking;
pub use completion::{Completion, Ended};
pub use error::{Error, Refused};
pub use item::Work;
pub use job::{Account, Cancelled, Context, Interrupted, Job, JobHandle};
pub use pool::{JobInfo, Pool, PoolBuilder};
pub use queue::{Flags, Queue};
pub use stats::Counters;
pub use sys::{Obtained, Priority};
pub use system::{system, system_highpri, system_long, system_unbound};
pub use topology::Topology;

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("pinfold needs 64-bit Linux");
