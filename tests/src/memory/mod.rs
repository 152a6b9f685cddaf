//! Real memory of every kind a program has, and everything a program can do to it.
//!
//! **Problem.** The tests unmap, move and replace memory that devices and other threads use at that moment. Rust references into such
//! memory would be undefined behaviour, and an `munmap` of pages that someone else has been given meanwhile would tear a hole into them.
//!
//! **Law.** No reference ever points into a [`Region`]; bytes go in and out by system calls, which answer `EFAULT` where a load would crash.
//! A region operates only on pages it holds: what it has unmapped it takes back only if nobody else got there first.

mod backing;
mod pages;
mod pool;
mod region;

pub use backing::Backing;
pub(crate) use backing::remove_left_by;
pub use pages::{cached_pages, find_mapping, peek, poke, present_pages};
pub use pool::HugePages;
pub use region::{Move, Region};
