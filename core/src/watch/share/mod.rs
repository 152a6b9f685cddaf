//! A queue that another process reads.
//!
//! The program offers a Unix socket ([`Server`]); whoever may connect gets a ring of its own ([`Remote`]). The reader maps the records read-only and
//! takes them without a system call; only waking it costs one.
//!
//! **Law.** A reader can stop its own reading. It can't corrupt, block or crash the program, nor another reader, whatever it does with what it has.
//!
//! What it has, and why that is harmless:
//!
//! - *The records*, a memory file sealed against growing, shrinking, and every new way to write. The program's own mapping, made before the
//!   seal, is the only writable one there will ever be.
//! - *A page for its position*, sealed against growing and shrinking, so that the program's look at it can't fault. The program never indexes by what
//!   it reads there: it compares it with its own position, and an absurd one makes the ring look full, so that this reader loses records.
//! - *Its end of the connection.* The program sends a byte there to wake it: with `MSG_DONTWAIT` for each call, as the flag of a descriptor that was ever shared
//!   could be cleared, and never more than one until the reader asks again. Whatever the reader sends after its greeting ends the connection.
//!
//! A reader that asks to be woken for every record can make each post pay for one send that doesn't wait, and one that punches holes into its page can make
//! a post pay for a page fault. It must be of the same user (see [`Offer::admit`]), who could stop the program altogether.
//!
//! # Protocol
//!
//! Over a stream socket, native-endian, both sides on one machine: the reader sends a [`Greeting`], the program answers with a [`Welcome`], and if that says yes,
//! with two descriptors in the same message: records, position. Then come wake-up bytes, whose value means nothing. The
//! first one comes when all objects that there were have been told, see [`UserptrEvent::AllPresent`](super::UserptrEvent::AllPresent). A connection
//! that ends is the program's end.
//!
//! | bytes | greeting | | bytes | welcome |
//! | --- | --- | --- | --- | --- |
//! | 0..8 | `PFWATCH\0` | | 0..8 | `PFWATCH\0` |
//! | 8..12 | version | | 8..12 | version |
//! | 12..16 | 0 | | 12..16 | 0, or the errno of the refusal |
//! | | | | 16..20, 20..24 | process id, 0 |
//! | | | | 24..32, 32..40, 40..48 | slots (a power of two), how many of them are used, 0 |
//!
//! The records' file is: position and flags of the writer at 0, the count of lost records at 128, slots of 192 bytes from 256, each a commit word and
//! 128 bytes of record. The position's file is the reader's position at 0 and its wake-up counter at 128.

mod hello;
mod memory;
mod place;
mod remote;
mod server;

pub use hello::{GREETING_LEN, Greeting, HelloError, VERSION, WELCOME_LEN, Welcome};
pub use place::{default_path, path_of};
pub use remote::{AttachError, Remote};
pub use server::{Credentials, ListenError, Offer, Server, Source};

pub(super) use memory::SharedRing;
pub(super) use server::Caller;
