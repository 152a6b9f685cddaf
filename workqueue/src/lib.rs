//! A work queue with bounded and may-sleep accounting, ordering by key, cancellation and delayed work.

#![forbid(unsafe_code)]

mod blocking;
mod completion;
mod control;
mod crew;
mod end;
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
pub use sys::Priority;
pub use system::{system, system_highpri, system_long, system_unbound};
pub use topology::Topology;

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("pinfold needs 64-bit Linux");
