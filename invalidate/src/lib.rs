//! Tells a program, in time, when bytes of its address space change hands.

mod maps;
mod range;

pub use maps::{Backing, FileId, Mapping, MapsError, Protection};
pub use range::{HostRange, MAX_PAGES, RangeError, USER_SPACE_END, page_size};

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("pinfold needs 64-bit Linux");
