//! The two sources against each other, and the text parser against any bytes.

use std::ptr;

use proptest::prelude::*;

use super::*;

fn both() -> [Source; 2] {
    [Source::Query, Source::text().unwrap()]
}

/// Whether the running kernel has the ioctl; without it there is one source and nothing to compare.
fn has_query() -> bool {
    let known = query::covering_or_next(0).is_ok();
    if !known {
        eprintln!("skipped: this kernel has no PROCMAP_QUERY (Linux 6.11)");
    }
    known
}

/// A private anonymous area that nobody else maps into, unmapped when dropped.
struct Area(HostRange);

impl Area {
    fn new(pages: usize) -> Self {
        let len = pages * page_size();
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a mapping at an address of the kernel's choice disturbs nobody.
        let at = unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_READ, kind, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        Self(HostRange::from_ptr(at, len).unwrap())
    }

    fn page(&self, index: usize) -> *mut libc::c_void {
        ptr::with_exposed_provenance_mut(self.0.start() + index * page_size())
    }

    fn protect(&self, index: usize, protection: i32) {
        // SAFETY: the page is part of this area, to which no reference exists.
        assert_eq!(0, unsafe { libc::mprotect(self.page(index), page_size(), protection) });
    }

    fn unmap(&self, index: usize) {
        // SAFETY: the page is part of this area, to which no reference exists.
        assert_eq!(0, unsafe { libc::munmap(self.page(index), page_size()) });
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: the area is ours and no reference to it exists.
        unsafe { libc::munmap(self.page(0), self.0.len()) };
    }
}

#[test]
fn both_sources_tell_the_same_of_a_mapping_in_pieces() {
    let area = Area::new(8);
    area.protect(2, libc::PROT_NONE);
    area.protect(5, libc::PROT_READ | libc::PROT_WRITE);
    let found = both().map(|source| mappings_from(source, area.0).unwrap());
    assert_eq!(found[0], found[1]);
    let pages: Vec<_> = found[0].iter().map(|m| (m.range.pages(), m.protection.read, m.protection.write)).collect();
    assert_eq!(pages, [(2, true, false), (1, false, false), (2, true, false), (1, true, true), (2, true, false)]);
}

#[test]
fn both_sources_tell_the_same_of_the_whole_process() {
    if !has_query() {
        return;
    }
    // Other tests map and unmap at the same time: a mapping counts if both sources see it at one moment.
    let [mut query, _] = both();
    let (mut at, mut same) = (0, 0);
    while let Some(raw) = query.next(at).unwrap() {
        let read = Source::text().unwrap().next(at).unwrap();
        same += usize::from(read.as_ref() == Some(&raw));
        at = raw.end;
    }
    assert!(same > 10, "only {same} mappings look the same from both sides");
}

#[test]
fn both_sources_find_the_stack_and_the_kernels_pages() {
    for mut source in both() {
        let (mut at, mut seen) = (0, Vec::new());
        while let Some(raw) = source.next(at).unwrap() {
            at = raw.end;
            seen.push(raw.backing);
        }
        assert!(seen.contains(&Backing::Stack), "every process has a main stack");
        assert!(seen.contains(&Backing::Special), "every process has a [vdso]");
        assert!(seen.contains(&Backing::File), "this program is mapped from its file");
    }
}

#[test]
fn a_hole_is_told_by_its_first_address() {
    let area = Area::new(6);
    // In a child, which has one thread: here, others would map something into the hole. The first question of a process
    // maps a page too, so it is asked before.
    assert!(both().into_iter().all(|source| mappings_from(source, area.0).is_ok()));
    // SAFETY: the child unmaps its own copy, asks and leaves by _exit. It allocates, which the C library makes legal.
    let child = unsafe { libc::fork() };
    if child == 0 {
        area.unmap(3);
        let told = |source| match mappings_from(source, area.0) {
            Err(MapsError::Hole { at, range }) => (at, range) == (area.page(3).addr(), area.0),
            _ => false,
        };
        let right = both().into_iter().all(told) && mapping_at(area.page(3).addr()).is_ok_and(|there| there.is_none());
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(i32::from(!right)) };
    }
    assert!(child > 0, "fork: {}", io::Error::last_os_error());
    let mut status = 0;
    // SAFETY: `status` is a live integer that the call writes.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0, "the hole is told");
}

#[test]
fn the_text_goes_on_where_it_was_though_another_reads_it_and_lines_before_have_gone() {
    const PAGES: usize = 1000; // some ten reads
    let area = Area::new(PAGES);
    for page in (1..PAGES).step_by(2) {
        area.protect(page, libc::PROT_NONE);
    }
    let page_at = |source: &mut Source, index: usize| {
        let at = area.0.start() + index * page_size();
        assert_eq!(source.next(at).unwrap().map(|raw| raw.start), Some(at), "page {index}");
    };
    let _ = query::covering_or_next(0); // opens the file that is kept, whatever it answers
    let [mut first, mut second] = [Source::text().unwrap(), Source::text().unwrap()];
    (0..PAGES / 2).for_each(|index| page_at(&mut first, index));
    for page in (1..PAGES / 4).step_by(2) {
        area.protect(page, libc::PROT_READ);
    }
    (PAGES / 2..PAGES).for_each(|index| page_at(&mut second, index));
    (PAGES / 2..PAGES).for_each(|index| page_at(&mut first, index));
}

#[test]
fn a_device_number_and_not_a_name_tells_shared_memory() {
    let line =
        |device: &str, name: &str| parse(&format!("10000-20000 rw-s 00001000 {device} 77   {name}")).unwrap().backing;
    assert_eq!(line("fd:01", "/memfd:imposter (deleted)"), Backing::File);
    assert_eq!(line("fd:01", "/dev/shm/../etc/x (deleted)"), Backing::File);
    assert_eq!(line("fd:01", "/SYSV00000000 (deleted)"), Backing::File);
    assert_eq!(line("fd:01", "/home/[heap]"), Backing::File);
    assert_eq!(line("fd:01", "[stack]"), Backing::File);
    assert_eq!(line("00:fffff", "anon_inode:[io_uring]"), Backing::Special);
    assert_eq!(line("00:fffff", "/dmabuf:no such file"), Backing::Special);
    let line = |name: &str| parse(&format!("10000-20000 rw-p 00000000 00:00 0   {name}")).unwrap().backing;
    assert_eq!(line(""), Backing::Anonymous);
    assert_eq!(line("[anon:heap]"), Backing::Anonymous);
    assert_eq!(line("[heap]"), Backing::Heap);
    assert_eq!(line("[stack]"), Backing::Stack);
    assert_eq!(line("[vvar_vclock]"), Backing::Special);
    assert_eq!(line("[a name of a later kernel]"), Backing::Special);
}

#[test]
fn what_is_no_line_is_refused() {
    let good = "10000-20000 rw-p 00000000 fd:01 5 /a b  c";
    assert!(parse(good).is_some());
    for bad in [
        "",
        "10000-20000",
        "20000-10000 rw-p 00000000 fd:01 5",
        "10000-10000 rw-p 00000000 fd:01 5",
        "+10000-20000 rw-p 00000000 fd:01 5",
        "10000-20000 rw-? 00000000 fd:01 5",
        "10000-20000 xw-p 00000000 fd:01 5",
        "10000-20000 rw-ps 00000000 fd:01 5",
        "10000-20000 rw-p 00000000 fd01 5",
        "10000-20000 rw-p 00000000 fd:01 -5",
        "10000-20000 rw-p 00000000 fd:01 5f",
        "10000000000000000-20000000000000000 rw-p 00000000 fd:01 5",
    ] {
        assert_eq!(parse(bad), None, "{bad:?}");
    }
}

fn parse(line: &str) -> Option<Raw> {
    text::parse(line.as_bytes())
}

proptest! {
    #[test]
    fn any_bytes_are_parsed_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), at: usize) {
        let _ = text::parse(&bytes);
        let _ = text::Lines::new(&bytes[..]).next(at);
    }

    #[test]
    fn nearly_right_lines_are_parsed_without_a_panic(line in "[0-9a-f]{0,17}[- ][0-9a-f]{0,17} [r-][w-][x-][ps] [0-9a-f]{0,17} [0-9a-f]{0,9}:[0-9a-f]{0,9} [0-9]{0,21} ?.{0,9}", at: usize) {
        if let Some(raw) = text::parse(line.as_bytes()) {
            prop_assert!(raw.start < raw.end);
            if let Some(whole) = raw.whole(at & !(page_size() - 1)) {
                prop_assert!(whole.contains(at));
                let _ = raw.mapping(whole, whole);
            }
        }
    }

    #[test]
    fn a_line_that_is_written_is_read_back(start in 0_usize..1 << 34, pages in 1_usize..1 << 20, offset: u64, major in 0_u32..4096,
        minor: u32, inode: u64, shared: bool, write: bool, name in "[ -~]{0,40}")
    {
        let (start, end) = (start * page_size(), (start + pages) * page_size());
        let (w, s) = (if write { 'w' } else { '-' }, if shared { 's' } else { 'p' });
        let line = format!("{start:08x}-{end:08x} r{w}-{s} {offset:08x} {major:02x}:{minor:02x} {inode}    {name}");
        let raw = parse(&line).expect("a line of the kernel's form");
        prop_assert_eq!((raw.start, raw.end, raw.offset, raw.shared, raw.protection.write), (start, end, offset, shared, write));
        let file = raw.file.unwrap_or(FileId { major: 0, minor: 0, inode: 0 });
        prop_assert_eq!((file.major, file.minor, file.inode), (major, minor, inode));
    }
}
