//! What was recorded, line for line: a result with its errno, and the records that came with it.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd};

use pinfold_core::watch::{WatchError, WatchQueue, records};

const GOLDEN: &str = include_str!("watch-queue-6.12.txt");

pub(crate) struct Line {
    name: String,
    pub(crate) text: String,
    pub(crate) records: Vec<Vec<u8>>,
}

pub(crate) struct Replay {
    lines: VecDeque<Line>,
}

impl Replay {
    pub(crate) fn new() -> Self {
        let mut lines = VecDeque::<Line>::new();
        for line in GOLDEN.lines().filter(|line| !line.starts_with('#')) {
            let (kind, rest) = line.split_at(2);
            // Sizes are written as `size1  .rc=0`, all other names end with a blank.
            let spaced = rest.replace(".rc=", " rc=");
            let (name, text) = spaced.split_once(' ').expect("a name and what follows it");
            match kind {
                "T " => lines.push_back(Line { name: name.into(), text: text.trim().into(), records: Vec::new() }),
                "R " => lines.back_mut().expect("a result before its records").records.push(hex(line)),
                _ => panic!("a line that is neither a result nor a record: {line}"),
            }
        }
        Self { lines }
    }

    pub(crate) fn next(&mut self, name: &str) -> Line {
        let line = self.lines.pop_front().unwrap_or_else(|| panic!("{name} comes after the last line"));
        assert_eq!(line.name, name, "the replay and the recording are out of step");
        line
    }

    /// Every line has been used up.
    pub(crate) fn end(self) {
        assert!(self.lines.is_empty(), "{} lines are left", self.lines.len());
    }

    /// The kernel did something here that the queue has nothing like.
    pub(crate) fn skip(&mut self, name: &str, reason: &str) {
        assert!(!reason.is_empty());
        self.next(name);
    }

    pub(crate) fn skip_all(&mut self, names: &[&str], reason: &str) {
        for name in names {
            self.skip(name, reason);
        }
    }

    /// The call's result and errno.
    pub(crate) fn result(&mut self, name: &str, result: Result<usize, i32>) {
        assert_eq!(self.next(name).text, written(result), "{name}");
    }

    pub(crate) fn done<E>(&mut self, name: &str, result: Result<(), E>, errno: impl Fn(&E) -> i32) {
        self.result(name, result.map(|()| 0).map_err(|error| errno(&error)));
    }

    pub(crate) fn watch(&mut self, name: &str, result: Result<(), WatchError>) {
        self.done(name, result, WatchError::errno);
    }

    /// A read with a buffer of this size: its result, and each record that the recording shows.
    pub(crate) fn read(&mut self, name: &str, queue: &WatchQueue, size: usize) {
        let mut buffer = vec![0; size];
        let line = self.next(name);
        let read = queue.read(&mut buffer);
        assert_eq!(line.text, written(read.map_err(|error| error.errno())), "{name}");
        assert_eq!(split(&buffer[..read.unwrap_or(0)]), line.records, "{name}");
    }

    /// What a poll without timeout says.
    pub(crate) fn poll(&mut self, name: &str, queue: &WatchQueue) {
        assert_eq!(self.next(name).text, format!("rc={:#x}", poll(queue)), "{name}");
    }
}

fn written(result: Result<usize, i32>) -> String {
    let name = |errno| match errno {
        libc::EAGAIN => "EAGAIN",
        libc::EBADSLT => "EBADSLT",
        libc::EBUSY => "EBUSY",
        libc::EFAULT => "EFAULT",
        libc::EINVAL => "EINVAL",
        libc::ENOBUFS => "ENOBUFS",
        _ => "an errno that the recording doesn't have",
    };
    result.map_or_else(|errno| format!("rc=-1 {}", name(errno)), |rc| format!("rc={rc} OK"))
}

fn hex(line: &str) -> Vec<u8> {
    let (_, words) = line.split_once("hex=").expect("a record has bytes");
    let word = |word: &str| match word.strip_prefix('<').and_then(|word| word.strip_suffix('>')) {
        Some(symbol) => serial(symbol).to_le_bytes(),
        None => u32::from_str_radix(word, 16).expect("eight digits").to_be_bytes(),
    };
    words.trim().split('.').flat_map(word).collect()
}

pub(crate) fn split(bytes: &[u8]) -> Vec<Vec<u8>> {
    records(bytes).map(|record| record.expect("whole records").bytes().to_vec()).collect()
}

fn poll(queue: &WatchQueue) -> i16 {
    let mut fd = libc::pollfd { fd: queue.as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: `fd` is one writable pollfd for the length of the call.
    unsafe { libc::poll(&raw mut fd, 1, 0) };
    fd.revents
}

/// The serial that stands for a symbol.
pub(crate) fn serial(symbol: &str) -> u32 {
    symbol.bytes().fold(1, |serial, byte| serial << 8 | u32::from(byte))
}
