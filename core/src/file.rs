//! Operations on files: they reach every mapping of the file, and the kernel reports them to nobody.

use std::ops::{Bound, Range, RangeBounds};
use std::os::fd::AsFd;
use std::sync::Arc;

use pinfold_invalidate::{Cause, FileId, HostRange, mapped_from};

use crate::{Device, Error, Manager};

/// How often the mappings of a file may change between being listed and the gates being closed.
const ATTEMPTS: u32 = 16;

impl<D: Device> Manager<D> {
    /// As [`mutate`](Self::mutate), for an operation on a file (`ftruncate`, hole punching, zeroing, cloning into it): finds every mapping of the
    /// process that shows these bytes of the file, whoever made it, and takes back all objects over them before `f` runs.
    ///
    /// `file` may be any descriptor of the file. `bytes` are offsets in it; truncating to `len` is `len..`. Takes as long as a walk over
    /// all mappings of the process (about a microsecond each), part of it with every gate closed.
    ///
    /// # Errors
    /// [`Error::File`] if the descriptor has no file; [`Error::Watch`] if the mappings can't be listed, [`Error::Again`] if they don't come to
    /// rest; [`Error::Nested`], [`Error::Forked`]. `f` has not run then.
    pub fn mutate_file<R>(
        &self,
        file: impl AsFd,
        bytes: impl RangeBounds<u64>,
        f: impl FnOnce() -> R,
    ) -> Result<R, Error> {
        let (file, bytes) = (identify(&file)?, offsets(&bytes));
        let mut f = Some(f);
        for _ in 0..ATTEMPTS {
            let ranges = self.registered(file, &bytes)?;
            let done = self.engine().space.mutate(&ranges, || {
                // What is mapped from here on can't become valid before the gates open; what was mapped just before must be in the list.
                let now = self.registered(file, &bytes)?;
                let complete = now.iter().all(|range| ranges.iter().any(|known| known.covers(*range)));
                Ok::<_, Error>(if complete { f.take().map(|f| f()) } else { None })
            })??;
            if let Some(result) = done {
                return Ok(result);
            }
        }
        Err(Error::Again)
    }

    /// As [`invalidate`](Self::invalidate), of every object over these bytes of a file: for operations on the file that somebody else has done.
    ///
    /// # Errors
    /// As [`mutate_file`](Self::mutate_file).
    pub fn invalidate_file(&self, file: impl AsFd, bytes: impl RangeBounds<u64>) -> Result<(), Error> {
        let file = identify(&file)?;
        for range in self.registered(file, &offsets(&bytes))? {
            self.engine().space.invalidate(range, Cause::Manual)?;
        }
        Ok(())
    }

    /// The mapped ranges of a file that something is registered over.
    fn registered(&self, file: FileId, bytes: &Range<u64>) -> Result<Vec<HostRange>, Error> {
        let mut ranges = mapped_from(file, bytes)?;
        ranges.retain(|&range| {
            let mut any = false;
            self.engine().space.visit(range, |_, _, _| any = true);
            any
        });
        Ok(ranges)
    }
}

fn identify(file: &impl AsFd) -> Result<FileId, Error> {
    FileId::of(file.as_fd()).map_err(|source| Error::File { source: Arc::new(source) })
}

fn offsets(bytes: &impl RangeBounds<u64>) -> Range<u64> {
    let start = match bytes.start_bound() {
        Bound::Included(&start) => start,
        Bound::Excluded(&start) => start.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match bytes.end_bound() {
        Bound::Included(&end) => end.saturating_add(1),
        Bound::Excluded(&end) => end,
        Bound::Unbounded => u64::MAX,
    };
    start..end
}
