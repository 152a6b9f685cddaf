//! A part of an object.
//!
//! **Problem.** A program registers in one piece what it has in one piece, and work needs some pages of it. To acquire the whole would populate,
//! pin and copy all of it, and a change at its far end would make the work's lease stale.
//!
//! **Law.** For a part, nothing but its own pages is populated, watched, given to the device or copied; and what makes it invalid is what happens
//! to them.
//!
//! **Protocol.** A part is an object of its own over these pages, in the same index, with a word, a pin and a generation of its own. So there is nothing to
//! keep in step between it and its whole, whichever is acquired, closed or invalidated first: a change tells everybody it overlaps.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use pinfold_invalidate::{HostRange, page_size};

use crate::dmabuf::{DmaBufPart, Reserved};
use crate::object::Object;
use crate::{Device, Error, Userptr};

impl<D: Device> Userptr<D> {
    /// A part of it, as an object of its own: acquired, prefetched, leased and submitted like any other. `bytes` are counted from the start of the
    /// [range](Self::range) and rounded out to whole pages; the part's own range says which.
    ///
    /// An acquire of the part populates, watches, takes and copies its pages only, and asks the budget for them only; a lease of it is stale only after a change to
    /// them. Its buffer, or whatever the device makes of it, begins with its first page. Where the device has all of the whole in one import already, it may show the part in
    /// that one.
    ///
    /// Access, label and [policy](Self::policy) are those of the whole, and so is the promise that was made when it was registered; all else is
    /// the part's own, and neither needs the other to stay. Costs what `register` costs: who needs the same part again keeps it.
    ///
    /// A part of an object over a dma-buf is registered as by [`register_dmabuf`](crate::Manager::register_dmabuf), at addresses of its own.
    ///
    /// # Errors
    /// [`Error::Part`] if `bytes` are none, or not inside the object; [`Error::Closed`], [`Error::Forked`], [`Error::DmaBuf`].
    pub fn part(&self, bytes: Range<usize>) -> Result<Self, Error> {
        let whole = &*self.handle.object;
        whole.engine.check()?;
        let pages = inside(whole.range, &bytes)?;
        let reserved = whole.dmabuf.as_ref().map(|reserved| reserved_part(reserved, whole.range, pages)).transpose()?;
        let range = reserved.as_ref().map_or(pages, |reserved| reserved.range);
        let mut object = Object::new(range, whole.access, whole.label.clone(), Arc::clone(&whole.engine));
        object.part = true;
        object.dmabuf = reserved.map(Box::new);
        *object.policy.get_mut() = whole.policy() as u8;
        // Acquire: pairs with the export that clears it.
        *object.unwatched.get_mut() = whole.unwatched.load(Ordering::Acquire);
        let part = Self::first(object);
        // An export that came before it was in the index has cleared the whole's promise alone. Its fence pairs with this one.
        fence(Ordering::SeqCst);
        if !whole.unwatched.load(Ordering::Acquire) {
            part.handle.object.unwatched.store(false, Ordering::Release);
        }
        Ok(part)
    }
}

/// The pages under some bytes of a range.
fn inside(whole: HostRange, bytes: &Range<usize>) -> Result<HostRange, Error> {
    if bytes.is_empty() || bytes.end > whole.len() {
        return Err(Error::Part { start: bytes.start, end: bytes.end, size: whole.len(), range: whole });
    }
    let start = bytes.start / page_size() * page_size();
    let end = bytes.end.next_multiple_of(page_size()); // a range's length is one
    Ok(HostRange::new(whole.start() + start, end - start).expect("whole pages inside a range are a range"))
}

/// The same pages of the dma-buf behind a whole. Its last page may be no whole one.
fn reserved_part(of: &Reserved, whole: HostRange, pages: HostRange) -> Result<Reserved, Error> {
    let DmaBufPart { ref buffer, offset, len } = of.part;
    let start = (pages.start() - whole.start()) as u64;
    let len = (len - start).min(pages.len() as u64);
    Ok(Reserved::new(DmaBufPart { buffer: buffer.clone(), offset: offset + start, len })?)
}
