//! The table of quirks names tests that exist.

use std::fs;
use std::path::Path;

/// The text of every Rust file under a folder.
fn sources(folder: &Path, text: &mut String) {
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, text);
        } else if path.extension().is_some_and(|end| end == "rs") {
            text.push_str(&fs::read_to_string(path).unwrap());
        }
    }
}

#[test]
fn every_test_that_the_table_of_quirks_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    if !root.join("src").exists() {
        println!("skipped: the sources aren't where this was built");
        return;
    }
    let mut text = String::new();
    for folder in ["src", "tests", "../core/tests", "../tests/tests"] {
        sources(&root.join(folder), &mut text);
    }
    let table = include_str!("../src/quirks.md");
    let rows: Vec<_> = table
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| #") && !line.starts_with("| -"))
        .collect();
    assert!(rows.len() >= 24, "{} rows", rows.len());
    for row in rows {
        let shown = row.split('|').nth(5).expect("five columns");
        for name in shown.split('`').skip(1).step_by(2) {
            assert!(text.contains(&format!("fn {name}(")), "no test is called {name}:\n{row}");
        }
    }
}
