//! Room for mappings: how many a watch may add, so that it is never the program whose `mmap` fails for our sake.
//!
//! **Problem.** A process may have `vm.max_map_count` mappings (65,530 unless configured). Watching part of one splits it into two or three.
//! Nothing tells how many there are but the list of all of them, and nobody can be asked to give some back at the moment the program needs one.
//!
//! **Law.** Exact watches together add at most an eighth of the limit, whatever the program does: seven eighths are always its own. And none is
//! added while fewer than an eighth are free.
//!
//! **Protocol.** The first half is arithmetic on the ledger. For the second the list is counted (0.3 µs a mapping), and what was found free is
//! spent split by split; when it is spent, or ten seconds old, it is counted anew, but at most once a second. Who may not split watches the
//! whole mapping, which takes none.

use std::fs::File;
use std::io::Read;
use std::time::{Duration, Instant};

/// The part of the limit that exact watches may take, and the part that is kept free: one in so many.
const PART: usize = 8;
/// The kernel's own default, where `/proc` doesn't tell.
const USUAL_LIMIT: usize = 65_530;
/// Most exact watches between two counts.
const AT_ONCE: usize = 1024;
/// A count is believed for so long.
const FRESH: Duration = Duration::from_secs(10);
/// And not repeated sooner than this.
const PAUSE: Duration = Duration::from_secs(1);

/// What may be split. Belongs to whoever holds the ledger.
#[derive(Debug, Default)]
pub(crate) struct Room {
    limit: usize,
    /// Exact watches that the last count allows still.
    left: usize,
    counted: Option<Instant>,
}

impl Room {
    /// Takes the two mappings of one more exact watch, beside `exact` others. False: there is no room for them.
    pub(crate) fn take(&mut self, exact: usize) -> bool {
        let age = self.counted.map(|at| at.elapsed());
        if age.is_none_or(|age| age > if self.left == 0 { PAUSE } else { FRESH }) {
            self.count();
        }
        if self.left == 0 || 2 * (exact + 1) > self.limit / PART {
            return false;
        }
        self.left -= 1;
        true
    }

    fn count(&mut self) {
        self.limit = max_map_count().unwrap_or(USUAL_LIMIT);
        // A list that can't be read leaves only the first half of the law.
        let free = self.limit.saturating_sub(count_mappings().unwrap_or(0));
        self.left = (free.saturating_sub(self.limit / PART) / 2).min(AT_ONCE);
        self.counted = Some(Instant::now());
    }
}

/// The system's limit on mappings per process.
pub(crate) fn max_map_count() -> Option<usize> {
    std::fs::read_to_string("/proc/sys/vm/max_map_count").ok()?.trim().parse().ok()
}

fn count_mappings() -> Option<usize> {
    let (mut list, mut lines, mut text) = (File::open("/proc/self/maps").ok()?, 0, [0_u8; 4096]);
    loop {
        match list.read(&mut text) {
            Ok(0) => return Some(lines),
            Ok(got) => lines += text[..got].iter().filter(|&&byte| byte == b'\n').count(),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn exact_watches_never_take_more_than_their_part() {
        let mut room = Room::default();
        assert!(room.take(0));
        let most = room.limit / PART / 2;
        assert!(room.take(most - 1));
        assert!(!room.take(most));
    }

    #[test]
    fn what_is_free_is_counted_anew_when_it_is_spent_or_old_and_not_at_every_question() {
        let mut room = Room::default();
        assert!(room.take(0));
        let spent = Room { left: 0, counted: Some(Instant::now()), ..room };
        room = spent;
        assert!(!room.take(0), "it was counted a moment ago");
        room.counted = Instant::now().checked_sub(2 * PAUSE);
        assert!(room.take(0));
        let left = room.left;
        assert!(room.take(0));
        assert_eq!(room.left, left - 1, "not counted");
        (room.left, room.counted) = (1, Instant::now().checked_sub(2 * FRESH));
        assert!(room.take(0));
        assert!(room.left > 1, "counted");
    }
}
