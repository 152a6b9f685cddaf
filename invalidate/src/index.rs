//! The index answers one question: which registered ranges touch these bytes? It is asked by a thread that may neither
//! allocate, free nor wait, while others insert and remove.
//!
//! So readers never meet writers. The content is a tree of small immutable nodes; a change copies the nodes on one path
//! and publishes a new root through an [`ArcSwap`]. A reader looks at the root that it loaded, whole and unchanging,
//! however long its visit takes. Every level knows the highest end below it, so that one giant range costs two more nodes
//! on the way and not a scan.
//!
//! Laws:
//! - **A reader frees nothing.** A replaced root goes to the *graves*, which hold a reference of their own, and leaves them
//!   only when that is the only one. A root's count can't rise from one again: when [`ArcSwap::swap`] returns, each
//!   reader of the old root either owns a reference that is counted (the swap paid its debt) or has let go; a reader only
//!   raises a count while it owns part of it; and nobody can load the old root any more. So while a reader drops its
//!   reference, the graves' is still there, or, before the swap returns, the one that the swap is about to hand back.
//! - **Nodes live as long as any root that reaches them.** A node that the change from root *n* to *n + 1* replaced is
//!   reachable from roots up to *n*. Graves are closed oldest first, and take along the nodes that left with them.
//! - **Nothing is allocated, freed or called under the writers' lock**, as freeing may unmap memory, which may wait for
//!   whoever asks the index. Nodes come from a stock that is filled before the lock is taken; what has died is carried out
//!   of it. A removed value dies like a node, so a visit may borrow it after `remove` has returned.
//!
//! Nodes link to values and children by bare pointers, not by `Arc`: copying a node of 64 counted links would touch 64
//! foreign cache lines twice. Their items are plain sorted arrays and not a `rust_lapper::Lapper`: over 48 ranges that is
//! as fast to ask (34 ns to 32), but takes 4 times as long to change (980 ns to 240), as it copies three vectors and counts
//! every value, and it allocates where nothing may. It is an oracle in the tests and a rival in the bench.

mod node;
mod stock;
mod tree;

use std::cell::Cell;
use std::collections::VecDeque;
use std::fmt;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::{ArcSwap, ArcSwapOption};

use crate::HostRange;
pub(crate) use node::Key;
use node::{Item, Link, Node};
use stock::{List, Stock};
use tree::Tree;

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
    /// Written by `publish`, under `writer`'s lock.
    current: ArcSwap<Root<T>>,
    writer: Mutex<Writer<T>>,
}

/// What readers load: one version of the tree. Its nodes and values belong to the index.
struct Root<T> {
    tree: Tree,
    values: PhantomData<Arc<T>>,
}

/// What only writers use, under their lock.
struct Writer<T> {
    /// The newest tree, as in `current`.
    tree: Tree,
    /// Roots that were replaced, oldest first.
    graves: VecDeque<Grave<T>>,
    spare: List,
}

/// A root that was replaced, and what the change that replaced it took out of the tree.
struct Grave<T> {
    root: Arc<Root<T>>,
    nodes: List,
    _value: Option<Arc<T>>,
}

/// What nobody can see any more, on its way out of the writers' lock.
struct Dead<T> {
    graves: [Option<Grave<T>>; BURIED_AT_ONCE],
    nodes: List,
}

/// More than one, so that graves become fewer when a long visit has ended.
const BURIED_AT_ONCE: usize = 4;

/// Nodes that are kept for later changes: enough for one of a tree of seven levels, which no address space can fill.
const SPARE: usize = 32;

// SAFETY: a root gives `&Arc<T>` to the thread that it is shared with or sent to, as an `Arc<T>` would; its nodes are
// only read, or belong to one writer at a time.
unsafe impl<T: Send + Sync> Send for Root<T> {}
// SAFETY: as for `Send`.
unsafe impl<T: Send + Sync> Sync for Root<T> {}
// SAFETY: the lists hold nodes that belong to whoever holds the writer; the rest is Send by itself.
unsafe impl<T: Send + Sync> Send for Writer<T> {}

impl<T> Index<T> {
    /// An index of nothing.
    #[must_use]
    pub fn new() -> Self {
        let root = Root { tree: Tree::EMPTY, values: PhantomData };
        let writer = Writer { tree: Tree::EMPTY, graves: VecDeque::new(), spare: List::new() };
        Self { current: ArcSwap::from_pointee(root), writer: Mutex::new(writer) }
    }

    /// Adds a range. Ranges may overlap and repeat; an entry is known by the first address of its range and its id, and
    /// one that has both takes the place of the old, whose value is returned.
    pub fn insert(&self, range: HostRange, id: u64, value: Arc<T>) -> Option<Arc<T>> {
        let link = Arc::into_raw(value).cast();
        let item = Item { low: range.start(), high: range.end(), id, link };
        // SAFETY: `change` hands over the newest tree, which it keeps alive, and a stock with room.
        self.change(|tree, stock| Some(unsafe { tree.insert(stock, item) }))
    }

    /// Takes out the entry of exactly this range and id. `None` if there is none.
    ///
    /// A visit that is under way may still show it; its value lives until then.
    pub fn remove(&self, range: HostRange, id: u64) -> Option<Arc<T>> {
        self.change(|tree, stock| {
            // SAFETY: as in `insert`.
            let (tree, link) = unsafe { tree.remove(stock, range.start(), range.end(), id) }?;
            Some((tree, Some(link)))
        })
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
        self.current.load().tree.len()
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
            if left == 0 || dead.graves.iter().any(Option::is_none) {
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
        let root = self.current.load();
        let mut hit = |item: Item| {
            // SAFETY: a leaf links to what `Arc::into_raw` gave, and the index keeps it while the root is held. It is
            // borrowed for the callback and not dropped.
            let value = ManuallyDrop::new(unsafe { Arc::from_raw(item.link.cast::<T>()) });
            visit(Entry { range: HostRange::from_known(item.low, item.high), id: item.id, value: &value })
        };
        // SAFETY: `root` is held during the call, and so are the nodes that it reaches.
        unsafe { root.tree.visit(low, high, seen, &mut hit) }
    }

    /// Publishes what `edit` makes of the newest tree, and returns the value that left the tree. Nothing is published if it
    /// makes `None`, which must leave the stock as it was.
    fn change(&self, edit: impl FnOnce(Tree, &mut Stock) -> Option<(Tree, Option<Link>)>) -> Option<Arc<T>> {
        let mut next = Arc::new(Root { tree: Tree::EMPTY, values: PhantomData });
        let mut dead = Dead::new(); // before the lock, so that it dies after it
        let mut writer = self.lock_with_room();

        let mut stock = Stock { spare: std::mem::replace(&mut writer.spare, List::new()), replaced: List::new() };
        let edited = edit(writer.tree, &mut stock);
        writer.spare = stock.spare;
        let (tree, old) = edited?;
        writer.tree = tree;
        Arc::get_mut(&mut next).expect("a root is shared when it is published").tree = tree;
        let root = self.current.swap(next);

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
            let (graves, places) = (writer.graves.len(), writer.graves.capacity());
            if lack == 0 && graves < places {
                return writer;
            }
            drop(writer);
            let mut nodes = List::new();
            for _ in 0..lack {
                // SAFETY: it was just made by `Box`.
                unsafe { nodes.push(Box::into_raw(Box::new(Node::new()))) };
            }
            let mut larger = VecDeque::with_capacity(if graves < places { 0 } else { 2 * graves.max(4) });
            writer = self.lock();
            while let Some(node) = nodes.pop() {
                // SAFETY: it is in no list now, and nobody else's.
                unsafe { writer.spare.push(node) };
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
        for place in &mut dead.graves {
            // `get_mut` also pairs with the last reader's release, whose reads are over before its nodes are reused.
            let unread = self.graves.front_mut().is_some_and(|grave| Arc::get_mut(&mut grave.root).is_some());
            let Some(mut grave) = unread.then(|| self.graves.pop_front()).flatten() else { return };
            while let Some(node) = grave.nodes.pop() {
                let list = if self.spare.len() < SPARE { &mut self.spare } else { &mut dead.nodes };
                // SAFETY: it is in no list now, and older graves, whose roots might reach it, are closed.
                unsafe { list.push(node) };
            }
            *place = Some(grave);
        }
    }
}

impl<T> Dead<T> {
    fn new() -> Self {
        Self { graves: [const { None }; BURIED_AT_ONCE], nodes: List::new() }
    }
}

impl<T> Drop for Dead<T> {
    fn drop(&mut self) {
        // SAFETY: no root that is still held reaches these nodes.
        unsafe { self.nodes.free() };
    }
}

impl<T> Drop for Index<T> {
    fn drop(&mut self) {
        let mut nodes = List::new();
        let writer = self.writer.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: a leaf links to what `Arc::into_raw` gave, and the tree is taken apart once.
        let mut let_go = |link: Link| drop(unsafe { Arc::from_raw(link.cast::<T>()) });
        // SAFETY: visits borrow the index, so none is left.
        unsafe { writer.tree.take_apart(&mut nodes, &mut let_go) };
        // SAFETY: as above.
        unsafe { nodes.free() };
        // SAFETY: as above.
        unsafe { writer.spare.free() };
        for grave in &mut writer.graves {
            // SAFETY: as above.
            unsafe { grave.nodes.free() };
        }
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

/// Makes this thread's later visits of any index free of allocation: [`ArcSwap`] makes a record per thread at the thread's
/// first load, and the C library one for the destructor that gives it back.
pub fn warm_up_thread() {
    static ANY: ArcSwapOption<()> = ArcSwapOption::const_empty();
    thread_local!(static IS_WARM: Cell<bool> = const { Cell::new(false) });
    if !IS_WARM.replace(true) {
        drop(ANY.load());
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
