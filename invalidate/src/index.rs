//! The index answers one question: which registered ranges touch these bytes? It is asked by a thread that may neither
//! allocate, free nor wait, while others insert and remove.
//!
//! So readers never meet writers. The content is a tree of small immutable nodes; a change copies the nodes on one path
//! and publishes a new root by one store. A reader looks at the root that it loaded, whole and unchanging, however long
//! its visit takes. Every level knows the highest end below it, so that one giant range costs two more nodes
//! on the way and not a scan.
//!
//! Laws:
//! - **A reader frees nothing.** It writes down which root it reads (`holds.rs`), and nobody else. A replaced root goes to
//!   the *graves*, where later changes ask whether it is still read; when it is not, it never will be again.
//! - **Nodes live as long as any root that reaches them.** A node that the change from root *n* to *n + 1* replaced is
//!   reachable from roots up to *n*. Graves are closed oldest first, and take along the nodes that left with them.
//! - **Nothing is allocated, freed or called under the writers' lock**, as freeing may unmap memory, which may wait for
//!   whoever asks the index. Nodes come from a stock that is filled before the lock is taken, and go back there; values that
//!   have died are carried out of it. A removed value dies like a node, so a visit may borrow it after `remove` has returned.
//!
//! Nodes link to values and children by bare pointers, not by `Arc`: copying a node of 64 counted links would touch 64
//! foreign cache lines twice. Their items are plain sorted arrays and not a `rust_lapper::Lapper`: over 48 ranges that is
//! as fast to ask (34 ns to 32), but takes 4 times as long to change (980 ns to 240), as it copies three vectors and counts
//! every value, and it allocates where nothing may. It is an oracle in the tests and a rival in the bench.

pub(crate) mod holds;
mod node;
mod stock;
mod tree;

use std::collections::VecDeque;
use std::fmt;
use std::mem::ManuallyDrop;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::HostRange;
use crate::sync::{AtomicPtr, AtomicUsize, Ordering, fence};
use holds::{hold, records};
use node::{Item, Link, Node, address, pages};
use stock::{List, Slab, Stock};
use tree::Tree;

/// What orders entries: the first address, then the id.
pub(crate) type Key = (usize, u64);

/// One registered range, as a visit shows it.
#[derive(Debug)]
pub struct Entry<'a, T> {
    /// The range.
    pub range: HostRange,
    /// The id that it was inserted with.
    pub id: u64,
    /// Its value. A clone that outlives the visit may become the last reference, to be freed where it is dropped.
    pub value: &'a Arc<T>,
}

impl<T> Clone for Entry<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Entry<'_, T> {}

/// A set of ranges, which may overlap and repeat, each with an id and a shared value.
///
/// Visits are lock-free and, on a thread that called [`warm_up_thread`], allocate and free nothing. They see the content
/// as it was at one moment: an entry whose removal returned before the visit began isn't seen, one whose removal returns
/// during the visit may be.
pub struct Index<T> {
    /// The newest tree, packed. Written by `change`, under `writer`'s lock.
    current: AtomicPtr<Node>,
    /// Entries. Written by `change`, likewise.
    len: AtomicUsize,
    writer: Mutex<Writer<T>>,
}

/// What only writers use, under their lock.
struct Writer<T> {
    /// The newest tree, as in `current`.
    tree: Tree,
    /// Roots that were replaced, oldest first.
    graves: VecDeque<Grave<T>>,
    spare: List,
    /// All nodes there are, in use or not.
    slabs: Option<Box<Slab>>,
    nodes: usize,
}

/// A root that was replaced, and what the change that replaced it took out of the tree.
struct Grave<T> {
    root: *const Node,
    nodes: List,
    _value: Option<Arc<T>>,
}

/// What nobody can see any more, on its way out of the writers' lock.
struct Dead<T>([Option<Grave<T>>; BURIED_AT_ONCE]);

/// More than one, so that graves become fewer when a long visit has ended.
const BURIED_AT_ONCE: usize = 4;

// SAFETY: tree, graves and lists have nodes that are only read, or belong to whoever holds the writer, and link to values that
// are an `Arc<T>` each; the rest is Send by itself. So is the index Sync by it, which shows `&Arc<T>` to any thread.
unsafe impl<T: Send + Sync> Send for Writer<T> {}

impl<T> Index<T> {
    /// An index of nothing.
    #[must_use]
    pub fn new() -> Self {
        let writer = Writer { tree: Tree::EMPTY, graves: VecDeque::new(), spare: List::new(), slabs: None, nodes: 0 };
        Self { current: AtomicPtr::new(Tree::EMPTY.pack()), len: AtomicUsize::new(0), writer: Mutex::new(writer) }
    }

    /// Adds a range. Ranges may overlap and repeat; an entry is known by the first address of its range and its id, and
    /// one that has both takes the place of the old, whose value is returned.
    pub fn insert(&self, range: HostRange, id: u64, value: Arc<T>) -> Option<Arc<T>> {
        let link = Arc::into_raw(value).cast();
        let (low, high) = pages(range.start(), range.end());
        let item = Item { low, high, id, link };
        // SAFETY: `change` hands over the newest tree, which it keeps alive, and a stock with room.
        self.change(|tree, stock| Some(unsafe { tree.insert(stock, item) }), 1)
    }

    /// Takes out the entry of exactly this range and id. `None` if there is none.
    ///
    /// A visit that is under way may still show it; its value lives until then.
    pub fn remove(&self, range: HostRange, id: u64) -> Option<Arc<T>> {
        let (low, high) = pages(range.start(), range.end());
        let take_out = |tree: Tree, stock: &mut Stock| {
            // SAFETY: as in `insert`.
            let (tree, link) = unsafe { tree.remove(stock, low, high, id) }?;
            Some((tree, Some(link)))
        };
        self.change(take_out, 0)
    }

    /// Shows every entry that overlaps `range`, in the order of first addresses, then of ids.
    pub fn visit_overlapping(&self, range: HostRange, visit: impl FnMut(Entry<'_, T>)) {
        self.visit(range.start(), range.end(), &mut || (), visit);
    }

    /// As [`visit_overlapping`](Self::visit_overlapping), but only the first `most` of those that come behind `after`. `Some`: there may be more,
    /// behind that one. Who goes on behind it sees what is there then.
    pub(crate) fn visit_some(
        &self,
        range: HostRange,
        after: Option<Key>,
        most: usize,
        mut visit: impl FnMut(Entry<'_, T>),
    ) -> Option<Key> {
        let mut last = after;
        let mut left = most;
        let low = after.map_or(range.start(), |(low, _)| low.max(range.start()));
        let stopped = self.visit_until(low, range.end(), &mut || (), |entry| {
            let key = (entry.range.start(), entry.id);
            // What begins before `low` and reaches beyond it.
            if after.is_some_and(|after| key <= after) {
                return ControlFlow::Continue(());
            }
            if left == 0 {
                return ControlFlow::Break(());
            }
            left -= 1;
            last = Some(key);
            visit(entry);
            ControlFlow::Continue(())
        });
        if stopped.is_break() { last } else { None }
    }

    /// Whether `test` holds for an entry that overlaps `range`. Asks no further once it does.
    pub fn any_overlapping(&self, range: HostRange, mut test: impl FnMut(Entry<'_, T>) -> bool) -> bool {
        let test = |entry: Entry<'_, T>| if test(entry) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
        self.visit_until(range.start(), range.end(), &mut || (), test).is_break()
    }

    /// Shows every entry that contains the byte at `addr`.
    pub fn find(&self, addr: usize, visit: impl FnMut(Entry<'_, T>)) {
        self.visit(addr, addr.saturating_add(1), &mut || (), visit);
    }

    /// Shows every entry.
    pub fn for_each(&self, visit: impl FnMut(Entry<'_, T>)) {
        self.visit(0, usize::MAX, &mut || (), visit);
    }

    /// The number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len.load(Ordering::Relaxed)
    }

    /// Whether there are no entries.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Frees what earlier changes replaced and nobody reads any more, and returns how many changes still have something to
    /// free. Every change frees what the one before left, so this matters after the last of many, and to know that no visit
    /// can show an entry that was removed: 0 says so.
    pub fn sweep(&self) -> usize {
        loop {
            let mut dead = Dead::new();
            let mut writer = self.lock();
            writer.bury(&mut dead);
            let left = writer.graves.len();
            drop(writer);
            if left == 0 || dead.0.iter().any(Option::is_none) {
                return left;
            }
        }
    }

    /// `seen` is called for each node that is looked into.
    fn visit(&self, low: usize, high: usize, seen: &mut impl FnMut(), mut visit: impl FnMut(Entry<'_, T>)) {
        let all = |entry: Entry<'_, T>| {
            visit(entry);
            ControlFlow::Continue(())
        };
        let _ = self.visit_until(low, high, seen, all);
    }

    /// As [`visit`](Self::visit), until `visit` answers `Break`.
    fn visit_until(
        &self,
        low: usize,
        high: usize,
        seen: &mut impl FnMut(),
        mut visit: impl FnMut(Entry<'_, T>) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let (low, high) = pages(low, high);
        let held = hold(&self.current);
        let mut hit = |item: Item| {
            // SAFETY: a leaf links to what `Arc::into_raw` gave, and the index keeps it while the root is held. It is
            // borrowed for the callback and not dropped.
            let value = ManuallyDrop::new(unsafe { Arc::from_raw(item.link.cast::<T>()) });
            let range = HostRange::from_known(address(item.low), address(item.high));
            visit(Entry { range, id: item.id, value: &value })
        };
        // SAFETY: the root is held during the call, and so are the nodes that it reaches.
        unsafe { Tree::unpack(held.root).visit(low, high, seen, &mut hit) }
    }

    /// Publishes what `edit` makes of the newest tree, and returns the value that left the tree. Nothing is published if it
    /// makes `None`, which must leave the stock as it was. `more` entries have come, beside the one that left.
    fn change(
        &self,
        edit: impl FnOnce(Tree, &mut Stock) -> Option<(Tree, Option<Link>)>,
        more: usize,
    ) -> Option<Arc<T>> {
        let mut dead = Dead::new(); // before the lock, so that it dies after it
        let mut writer = self.lock_with_room();

        let mut stock = Stock { spare: std::mem::replace(&mut writer.spare, List::new()), replaced: List::new() };
        let edited = edit(writer.tree, &mut stock);
        writer.spare = stock.spare;
        let (tree, old) = edited?;
        let root = std::mem::replace(&mut writer.tree, tree).pack();
        // Release: pairs with the Acquire in `hold`; who sees the root sees its nodes. And before `bury` looks who reads the old one.
        self.current.store(tree.pack(), Ordering::Release);
        let len = self.len.load(Ordering::Relaxed) + more - usize::from(old.is_some());
        self.len.store(len, Ordering::Relaxed);

        // SAFETY: the link was made by `Arc::into_raw` in `insert`, and no tree from here on has it.
        let value = old.map(|link| unsafe { Arc::from_raw(link.cast::<T>()) });
        let returned = value.clone();
        writer.graves.push_back(Grave { root, nodes: stock.replaced, _value: value });
        writer.bury(&mut dead);
        drop(writer);
        returned
    }

    /// The writers' lock, with nodes in stock for one change and a place for its grave.
    fn lock_with_room(&self) -> MutexGuard<'_, Writer<T>> {
        warm_up_thread();
        let mut writer = self.lock();
        loop {
            let lack = writer.tree.room().saturating_sub(writer.spare.len());
            let (graves, places, nodes) = (writer.graves.len(), writer.graves.capacity(), writer.nodes);
            if lack == 0 && graves < places {
                return writer;
            }
            drop(writer);
            // Growing with what there is, up to a huge page.
            let count = if nodes < Slab::MANY { Slab::FEW } else { Slab::MANY };
            let slab = (lack > 0).then(|| Slab::new(count));
            let mut larger = VecDeque::with_capacity(if graves < places { 0 } else { 2 * graves.max(4) });
            writer = self.lock();
            if let Some(slab) = slab {
                let this = &mut *writer;
                this.nodes += slab.len();
                // SAFETY: it was just made; spare nodes and slabs are both the writer's.
                unsafe { slab.join(&mut this.slabs, &mut this.spare) };
            }
            if larger.capacity() > writer.graves.capacity() {
                larger.append(&mut writer.graves);
                std::mem::swap(&mut writer.graves, &mut larger);
            }
            // `larger` is empty now, but may own memory.
            drop(writer);
            drop(larger);
            writer = self.lock();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Writer<T>> {
        self.writer.lock().expect("nothing that may panic is called under the writers' lock")
    }
}

impl<T> Writer<T> {
    /// Moves to `dead`, as far as it has places, what the oldest graves hold and no reader can reach.
    fn bury(&mut self, dead: &mut Dead<T>) {
        fence(Ordering::SeqCst); // between the replacing of the roots and our look at who reads them; partner: `hold`
        for place in &mut dead.0 {
            let unread = self.graves.front().is_some_and(|grave| !records().is_held(grave.root.addr()));
            let Some(mut grave) = unread.then(|| self.graves.pop_front()).flatten() else { return };
            while let Some(node) = grave.nodes.pop() {
                // SAFETY: it is in no list now, and older graves, whose roots might reach it, are closed.
                unsafe { self.spare.push(node) };
            }
            *place = Some(grave);
        }
    }
}

impl<T> Dead<T> {
    fn new() -> Self {
        Self([const { None }; BURIED_AT_ONCE])
    }
}

impl<T> Drop for Index<T> {
    fn drop(&mut self) {
        let writer = self.writer.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: a leaf links to what `Arc::into_raw` gave, and the tree is taken apart once.
        let mut let_go = |link: Link| drop(unsafe { Arc::from_raw(link.cast::<T>()) });
        // SAFETY: visits borrow the index, so none is left.
        unsafe { writer.tree.take_apart(&mut let_go) };
    }
}

impl<T> Default for Index<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> fmt::Debug for Index<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Index").field("len", &self.len()).finish_non_exhaustive()
    }
}

/// Makes this thread's later visits of any index free of allocation: the first one makes a record for the thread, and the C
/// library one for the destructor that gives it back.
pub fn warm_up_thread() {
    holds::warm_up();
}

#[cfg(all(test, not(loom)))]
mod tests;
