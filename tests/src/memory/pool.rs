//! The kernel's pool of huge pages, which is empty on most machines.

use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::process::is_isolated;

const SIZE: &str = "/proc/sys/vm/nr_hugepages";
const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

/// Huge pages of 2 MiB in the pool, until this is dropped.
#[derive(Debug)]
pub struct HugePages {
    /// What is to be taken out again.
    added: u64,
}

impl HugePages {
    /// Puts so many into the pool, which only root may; anybody else makes do with those that are free. A child of
    /// [`isolated`](crate::process::isolated) has those of its parent, which lives to take them out again.
    ///
    /// # Errors
    /// Why there aren't as many, in words.
    pub fn add(count: u64) -> Result<Self, String> {
        let free = read(FREE)?;
        if is_isolated() {
            return Ok(Self { added: 0 });
        }
        let _turn = turn();
        let before = read(SIZE)?;
        let wanted = before + count;
        match fs::write(SIZE, wanted.to_string()) {
            Err(_) if free >= count => Ok(Self { added: 0 }),
            Err(e) => Err(format!("{free} huge pages of {count} are free, and {SIZE}: {e}")),
            Ok(()) => {
                // The kernel puts in what it finds, and no more is to be taken out again.
                let found = read(SIZE)?;
                let pool = Self { added: found.saturating_sub(before) };
                if found < wanted {
                    Err(format!("{found} huge pages of {wanted}: memory is too fragmented"))
                } else {
                    Ok(pool)
                }
            }
        }
    }
}

/// Reading and writing are two steps.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // Relative, as others have put in theirs.
        let _turn = turn();
        if self.added > 0
            && let Ok(now) = read(SIZE)
        {
            // If it fails, the pool stays larger, which is all.
            let _ = fs::write(SIZE, format!("{}", now.saturating_sub(self.added)));
        }
    }
}

fn read(path: &str) -> Result<u64, String> {
    let text = fs::read_to_string(path).map_err(|e| format!("no huge pages of 2 MiB ({path}: {e})"))?;
    text.trim().parse().map_err(|e| format!("{path} says {text:?}: {e}"))
}
