//! The text of `/proc/<pid>/maps` (proc_pid_maps(5)), one mapping per line:
//! `7f12c0000000-7f12c0021000 rw-p 00000000 00:01 1035  /memfd:pool (deleted)`.

use std::ffi::OsStr;
use std::io::{self, BufRead};
use std::os::unix::ffi::OsStrExt;

use super::{FileId, Protection, Raw, backing};

/// Mappings read line by line.
pub(super) struct Lines<R> {
    from: R,
    line: Vec<u8>,
    /// The last one read, as the next question may be about the same.
    last: Option<Raw>,
}

impl<R: BufRead> Lines<R> {
    pub(super) fn new(from: R) -> Self {
        Self { from, line: Vec::new(), last: None }
    }

    /// The first mapping that ends above `at`, which never falls from call to call.
    pub(super) fn next(&mut self, at: usize) -> io::Result<Option<Raw>> {
        while self.last.as_ref().is_none_or(|raw| raw.end <= at) {
            self.line.clear();
            if self.from.read_until(b'\n', &mut self.line)? == 0 {
                return Ok(None);
            }
            let line = self.line.strip_suffix(b"\n").unwrap_or(&self.line);
            self.last = Some(parse(line).ok_or_else(|| bad_line(line))?);
        }
        Ok(self.last.clone())
    }
}

fn bad_line(line: &[u8]) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{:?} is not a line of it", String::from_utf8_lossy(line)))
}

/// One line without its line feed. `None` if it isn't one.
pub(super) fn parse(line: &[u8]) -> Option<Raw> {
    // The name is what follows the inode and may contain anything, blanks included; only line feeds are escaped.
    let (bounds, rest) = field(line)?;
    let (flags, rest) = field(rest)?;
    let (offset, rest) = field(rest)?;
    let (device, rest) = field(rest)?;
    let (inode, name) = field(rest)?;

    let (start, end) = pair(bounds, b'-')?;
    let (start, end) = (usize::try_from(hex(start)?).ok()?, usize::try_from(hex(end)?).ok()?);
    let &[read, write, exec, shared @ (b's' | b'p')] = flags else { return None };
    let (major, minor) = pair(device, b':')?;
    let (major, minor) = (u32::try_from(hex(major)?).ok()?, u32::try_from(hex(minor)?).ok()?);
    let file = FileId { major, minor, inode: number(inode, 10)? };
    let file = (file != FileId { major: 0, minor: 0, inode: 0 }).then_some(file);
    let raw = Raw {
        start,
        end,
        protection: Protection { read: flag(read, b'r')?, write: flag(write, b'w')?, exec: flag(exec, b'x')? },
        shared: shared == b's',
        offset: hex(offset)?,
        file,
        backing: backing::classify(OsStr::from_bytes(name.trim_ascii_start()), file),
    };
    (start < end).then_some(raw)
}

/// The bytes up to the next blank, and what follows the blank.
fn field(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = bytes.iter().position(|&b| b == b' ').unwrap_or(bytes.len());
    (end > 0).then(|| (&bytes[..end], bytes.get(end + 1..).unwrap_or_default()))
}

fn pair(bytes: &[u8], separator: u8) -> Option<(&[u8], &[u8])> {
    let at = bytes.iter().position(|&b| b == separator)?;
    Some((&bytes[..at], &bytes[at + 1..]))
}

fn flag(byte: u8, set: u8) -> Option<bool> {
    (byte == set || byte == b'-').then_some(byte == set)
}

fn hex(digits: &[u8]) -> Option<u64> {
    number(digits, 16)
}

fn number(digits: &[u8], radix: u32) -> Option<u64> {
    // `from_str_radix` would also take a sign.
    let digits = digits.iter().all(u8::is_ascii_alphanumeric).then_some(digits)?;
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, radix).ok()
}
