//! Writes `tests/README.md` from what the tests say of themselves.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use pinfold_tests::conformance::{Sources, page};

fn main() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the package lies in the workspace")?;
    let sources = Sources::read(root).context("reading the tests")?;
    let page = page(&sources).map_err(|errors| anyhow!("rows and tests don't fit:\n{errors}"))?;
    std::fs::write(root.join("tests/README.md"), page).context("writing tests/README.md")
}
