//! What the two say to each other besides the buffer: a few bytes before, and a few for each frame.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, bail, ensure};

use crate::{PATIENCE, Seen};

/// The longest report that is read.
const LONGEST: u32 = 1 << 16;

/// Makes the socket one on which nothing is waited for without a limit.
pub(crate) fn limit(socket: &UnixStream) -> Result<()> {
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket.set_write_timeout(Some(PATIENCE))?)
}

pub(crate) fn tell<const N: usize>(mut socket: &UnixStream, bytes: [u8; N]) -> Result<()> {
    socket.write_all(&bytes).context("the other process is gone")
}

pub(crate) fn hear<const N: usize>(mut socket: &UnixStream) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    socket.read_exact(&mut bytes).context("the other process said nothing, or is gone")?;
    Ok(bytes)
}

/// A frame is there; `None` at the end. The sum is that of its bytes.
pub(crate) fn tell_frame(socket: &UnixStream, sum: Option<u64>) -> Result<()> {
    let mut bytes = [0; 9];
    if let Some(sum) = sum {
        bytes[0] = 1;
        bytes[1..].copy_from_slice(&sum.to_le_bytes());
    }
    tell(socket, bytes)
}

pub(crate) fn hear_frame(socket: &UnixStream) -> Result<Option<u64>> {
    let [kind, sum @ ..] = hear::<9>(socket)?;
    match kind {
        0 => Ok(None),
        1 => Ok(Some(u64::from_le_bytes(sum))),
        _ => bail!("the maker said {kind} where it says 0 or 1"),
    }
}

pub(crate) fn tell_seen(mut socket: &UnixStream, seen: &Seen) -> Result<()> {
    let text = serde_json::to_vec(seen)?;
    tell(socket, u32::try_from(text.len())?.to_le_bytes())?;
    Ok(socket.write_all(&text)?)
}

pub(crate) fn hear_seen(mut socket: &UnixStream) -> Result<Seen> {
    let len = u32::from_le_bytes(hear(socket)?);
    ensure!(len <= LONGEST, "the viewer has {len} bytes to say; {LONGEST} are heard");
    let mut text = vec![0; len as usize];
    socket.read_exact(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

/// FNV-1a over words: which bytes, and where.
pub(crate) struct Sum(u64);

impl Sum {
    pub(crate) fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    /// Whole pixels.
    pub(crate) fn add(&mut self, pixels: &[u8]) {
        for pixel in pixels.chunks_exact(4) {
            let word = u32::from_le_bytes(pixel.try_into().expect("four bytes"));
            self.0 = (self.0 ^ u64::from(word)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    pub(crate) fn end(self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_tells_a_changed_byte_and_a_changed_place() {
        let of = |pixels: &[u8]| {
            let mut sum = Sum::new();
            sum.add(pixels);
            sum.end()
        };
        let frame: Vec<u8> = (0..=255).collect();
        let mut changed = frame.clone();
        changed[77] ^= 1;
        let mut moved = frame.clone();
        moved.rotate_left(4);
        assert!(of(&frame) != of(&changed) && of(&frame) != of(&moved));
    }

    #[test]
    fn what_is_told_is_heard_and_an_end_is_an_error() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        for sum in [Some(0), Some(u64::MAX), None] {
            tell_frame(&ours, sum).unwrap();
            assert_eq!(hear_frame(&theirs).unwrap(), sum);
        }
        tell(&ours, [7; 9]).unwrap();
        assert!(hear_frame(&theirs).is_err());
        tell(&ours, u32::MAX.to_le_bytes()).unwrap();
        assert!(hear_seen(&theirs).is_err(), "nobody is made to allocate 4 GiB");
        drop(ours);
        assert!(hear_frame(&theirs).is_err());
    }
}
