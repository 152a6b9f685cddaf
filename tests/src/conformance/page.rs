//! The page that shows rows, tests and verdicts.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::{SUITES, Sources, Verdict};
use crate::matrix;

/// The text of `tests/README.md`.
///
/// # Errors
/// What doesn't fit together, one line each: rows without a test, tests of unknown rows, rows that don't apply and have a test all the same.
pub fn page(sources: &Sources) -> Result<String, String> {
    let mut errors = sources.errors.clone();
    let mut known = BTreeSet::new();
    let mut page = HEAD.to_owned();
    for suite in SUITES {
        let count = |wanted: fn(&Verdict) -> bool| suite.rows.iter().filter(|row| wanted(&row.verdict)).count();
        let direct = count(|verdict| *verdict == Verdict::Direct);
        let adapted = count(|verdict| *verdict == Verdict::Adapted);
        let missing = count(|verdict| *verdict == Verdict::Missing);
        let rows = suite.rows.len();
        line(&mut page, format_args!("\n### {}\n", suite.title));
        line(
            &mut page,
            format_args!(
                "{rows} rows: {direct} direct, {adapted} adapted, {missing} missing, {} that don't apply.\n",
                rows - direct - adapted - missing
            ),
        );
        line(
            &mut page,
            format_args!("| row | what it checks | verdict | tests, and on what |\n| --- | --- | --- | --- |"),
        );
        for row in suite.rows {
            let key = format!("{}/{}", suite.key, row.name);
            let answers = sources.answers.get(&key).map_or(&[][..], Vec::as_slice);
            known.insert(key.clone());
            let (verdict, tests) = match row.verdict {
                Verdict::NotApplicable(why) => {
                    if !answers.is_empty() {
                        errors.push(format!("{key}: doesn't apply, and has a test"));
                    }
                    ("does not apply", why.to_owned())
                }
                Verdict::Missing => {
                    if !answers.is_empty() {
                        errors.push(format!("{key}: said to be missing, and has a test"));
                    }
                    ("missing", String::new())
                }
                Verdict::Direct | Verdict::Adapted => {
                    if answers.is_empty() {
                        errors.push(format!("{key}: no test answers it"));
                    }
                    let tests = answers.iter().map(|answer| match &answer.devices[..] {
                        [] => format!("`{}`", answer.test),
                        devices => format!("`{}` ({})", answer.test, devices.join(", ")),
                    });
                    let verdict = if row.verdict == Verdict::Direct { "direct" } else { "adapted" };
                    (verdict, tests.collect::<Vec<_>>().join("<br>"))
                }
            };
            line(&mut page, format_args!("| {} | {} | {verdict} | {tests} |", row.name, row.checks));
        }
    }
    errors.extend(sources.answers.iter().filter(|(row, _)| !known.contains(*row)).map(|(row, answers)| {
        format!("{row}: no such row, and answered by {}", answers.first().map_or("", |answer| &answer.test))
    }));
    page.push_str(&matrix::page());
    if errors.is_empty() { Ok(page) } else { Err(errors.join("\n")) }
}

fn line(page: &mut String, text: std::fmt::Arguments<'_>) {
    writeln!(page, "{text}").expect("a String takes every line");
}

const HEAD: &str = "\
<!-- Written by `cargo run -p pinfold-tests --bin conformance` from the comments in the tests and the tables in `src`; don't edit it here. -->

# Tests

`scripts/test` runs everything: what needs no Vulkan once, what does on each driver, all of it again as an ordinary user. What stands behind the tests
(real memory of every kind, devices, child processes) is this package's library; `tests/` has the programs. A test that needs what the machine lacks says
`SKIP` and is not counted as passed. `scripts/soak` runs what gains by running longer, and `scripts/test-vm`: what a kernel may change, on stock kernels 6.12
(udmabuf, DMA heaps) and 6.1 (neither, and fewer abilities of userfaultfd and io_uring) in an emulated machine, which takes too long for every change.
`scripts/fuzz` runs the fuzz targets of the decoders and of the index, guided by coverage, with the stable compiler.

The devices are a *scripted* one, which copies what it is given and does what a test tells it; the *DMA* device, which pins real pages by io_uring's
fixed buffers and moves bytes through the pins by itself, so that a stale pin shows; and the *Vulkan drivers* lavapipe and SwiftShader, with the
validation layer on.

## Conformance

What the test suites of the kernel's own userptr, and the bug lists of registration caches, ask for. *Direct*: the same operations with the same demand.
*Adapted*: what is done to a kernel interface there is done to what stands for it here.
";
