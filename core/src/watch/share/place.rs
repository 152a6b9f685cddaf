//! Where a program's socket is.

use std::path::PathBuf;

/// The environment variable that makes a program watchable: `1`, or the path of its socket.
const VARIABLE: &str = "PINFOLD_WATCH";

/// Where the socket of the program with this process id is, if it was not told otherwise: in `XDG_RUNTIME_DIR`, or else in `/tmp`.
#[must_use]
pub fn path_of(process: u32) -> PathBuf {
    let folder = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(|| PathBuf::from("/tmp"), PathBuf::from);
    folder.join(format!("pinfold-{process}.sock"))
}

/// Where this program shall offer its socket: what `PINFOLD_WATCH` says, or [`path_of`] this process if it says `1`; nowhere if it is unset, empty or `0`.
#[must_use]
pub fn default_path() -> Option<PathBuf> {
    let wanted = std::env::var_os(VARIABLE)?;
    match wanted.to_str() {
        Some("" | "0") => None,
        Some("1") => Some(path_of(std::process::id())),
        _ => Some(wanted.into()),
    }
}
