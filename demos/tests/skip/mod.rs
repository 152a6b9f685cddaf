//! How a test says that it did not run, or not all of it: in lines that `scripts/test` collects for its summary.

use std::fmt::Display;

/// The whole test was skipped.
pub(crate) fn skip(why: impl Display) {
    println!("SKIP {}: {why}", test());
}

/// Something that the test also looks at could not be looked at.
pub(crate) fn skip_part(why: impl Display) {
    println!("SKIPPED PART OF {}: {why}", test());
}

/// The test's name: its thread's.
fn test() -> String {
    std::thread::current().name().unwrap_or("test").to_owned()
}
