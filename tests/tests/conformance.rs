//! The page of rows, tests and verdicts says what the tests say.

use std::path::Path;

use pinfold_tests::conformance::{Sources, page};
use pinfold_tests::memory::Backing;
use pinfold_tests::skip;

#[test]
fn every_row_has_a_test_or_a_reason_and_the_page_says_which() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let page =
        page(&Sources::read(root).unwrap()).unwrap_or_else(|errors| panic!("rows and tests don't fit:\n{errors}"));
    if !Backing::FilePrivate.watchable() {
        skip!("the page has the verdicts of a kernel that watches mapped files (Linux 6.7)");
    }
    let committed = std::fs::read_to_string(root.join("tests/README.md")).unwrap();
    assert!(
        committed == page,
        "tests/README.md is out of date; `cargo run -p pinfold-tests --bin conformance` writes it"
    );
}
