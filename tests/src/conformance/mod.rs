//! Which tests of the kernel's drivers this project carries over, and where each one is.
//!
//! **Problem.** A list of tests kept beside the tests is wrong after the next change of either.
//!
//! **Law.** A row of a peer's test list is either answered by a test, or has a reason here why it doesn't apply; never both, never neither. A test
//! says itself which rows it answers, in a comment above it: `// rows: igt/sync-unmap; xe/userptr-invalid`.
//!
//! **Protocol.** `rows` has the lists. [`Sources::read`] finds the comments and the programs and devices that run what they stand above.
//! [`page`] joins the two; `cargo run -p pinfold-tests --bin conformance` writes it to `tests/README.md`, and the test `conformance` fails while
//! that file says anything else.

mod page;
mod rows;
mod sources;

pub use page::page;
pub use rows::{Row, SUITES, Suite, Verdict};
pub use sources::{Answer, Sources};
