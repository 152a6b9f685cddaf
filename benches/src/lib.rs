//! Benches of the workspace's crates, each against its rivals in the same run. See `README.md` beside this package's manifest for the figures.
