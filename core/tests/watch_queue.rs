//! What a program that watches can rely on.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use pinfold_core::watch::{
    DmaBufEvent, DmaBufNote, FilterEntry, FilterError, Label, MAX_CAPACITY, MAX_RECORD_LEN, Note, NoteCause, NotePath,
    NoteState, ReadError, Record, Released, Scope, TYPE_META, TYPE_USERPTR, TYPE_WORK, UserptrEvent, UserptrNote, Wake,
    WatchConfig, WatchError, WatchLimit, WatchList, WatchQueue, WorkEvent, WorkNote, parse_filter, records,
};

/// A generous bound for waits that end at once where nothing is broken.
const LONG: Duration = Duration::from_secs(20);

fn open(config: WatchConfig) -> WatchQueue {
    WatchQueue::new(config).expect("an eventfd")
}

fn watched(config: WatchConfig) -> (WatchList, WatchQueue) {
    let (list, queue) = (WatchList::new(), open(config));
    list.add_watch(&queue, Scope::All, 1).expect("the first watch");
    (list, queue)
}

fn numbered(number: u64) -> Record {
    Record::new(TYPE_WORK, 0, 0, &number.to_ne_bytes()).expect("a short record")
}

fn number(record: &Record) -> Option<u64> {
    record.payload().first_chunk().map(|bytes| u64::from_ne_bytes(*bytes))
}

fn pollable(fd: &impl AsFd) -> bool {
    let mut fd = libc::pollfd { fd: fd.as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: `fd` is one writable pollfd for the length of the call.
    let ready = unsafe { libc::poll(&raw mut fd, 1, 0) };
    assert!(ready >= 0, "{}", io::Error::last_os_error());
    fd.revents & libc::POLLIN != 0
}

fn drain(queue: &WatchQueue) -> Vec<Option<u64>> {
    queue.records().map(|record| if record.note() == Note::Lost { None } else { number(&record) }).collect()
}

#[test]
fn records_of_every_length_come_out_whole_and_a_read_writes_nothing_behind_them() {
    let (list, queue) = watched(WatchConfig::default());
    for len in 8..=MAX_RECORD_LEN {
        let payload = (8..len).map(|at| at as u8).collect::<Vec<_>>();
        let record = Record::new(TYPE_WORK, 2, 0x0304, &payload).expect("a record");
        list.post(0, &record);
        let mut out = [0xee; 2 * MAX_RECORD_LEN];
        assert_eq!(queue.read(&mut out[..len]), Ok(len));
        let (read, behind) = out.split_at(len);
        assert_eq!(read, record.with_tag(1).bytes(), "{len} bytes");
        assert!(behind.iter().all(|&byte| byte == 0xee), "{len} bytes");
    }
    // Together, at places that have no alignment.
    let mut out = vec![0xee; 1 << 14];
    let posted = (8..=MAX_RECORD_LEN).map(|len| Record::new(TYPE_WORK, 0, 0, &vec![len as u8; len - 8]));
    let posted = posted.collect::<Result<Vec<_>, _>>().expect("records");
    posted.iter().for_each(|record| list.post(0, record));
    let len = queue.read(&mut out).expect("records");
    let read = records(&out[..len]).collect::<Result<Vec<_>, _>>().expect("records");
    assert!(read.iter().copied().eq(posted.iter().map(|record| record.with_tag(1))), "{read:?}");
    assert!(out[len..].iter().all(|&byte| byte == 0xee));
}

#[test]
fn notes_come_out_as_they_went_in() {
    let (list, queue) = watched(WatchConfig::default());
    let userptr = UserptrNote {
        event: UserptrEvent::Invalidated,
        object: 1 << 63 | 5,
        generation: 6,
        start: 0x7f00_0000_0000,
        end: 0x7f00_0000_3000,
        hold_off_ns: 1_234_567,
        cause: NoteCause::Remap,
        state: NoteState::Invalid,
        path: NotePath::AliasImport,
        errno: -14,
        late: true,
        no_hold: false,
        writes: true,
        label: Label::new("mesh of the town hall"),
    };
    let work = WorkNote {
        event: WorkEvent::Finished,
        work: 1,
        object: 2,
        waited_ns: 3,
        ran_ns: 4,
        workers: 5,
        running: 6,
        pending: 7,
        errno: 8,
    };
    let dmabuf = DmaBufNote {
        event: DmaBufEvent::SyncEnd,
        object: 1,
        generation: 2,
        inode: 3,
        size: 4,
        offset: 5,
        errno: 6,
        reads: true,
        writes: false,
    };
    for record in [userptr.record(), work.record(), dmabuf.record()] {
        list.post(0, &record);
    }
    let got = queue.notes().collect::<Vec<_>>();
    assert_eq!(got, [Note::Userptr(userptr), Note::Work(work), Note::DmaBuf(dmabuf)]);
}

#[test]
fn a_watch_hears_of_its_object_and_a_watch_of_all_hears_of_every_object() {
    let list = WatchList::new();
    let [one, all, another] = [(); 3].map(|()| open(WatchConfig::default()));
    list.add_watch(&one, Scope::Object(5), 50).expect("a watch");
    list.add_watch(&one, Scope::Object(7), 70).expect("a watch");
    list.add_watch(&all, Scope::All, 0).expect("a watch");
    list.add_watch(&another, Scope::All, 1).expect("a watch");
    for object in 4..9 {
        list.post(object, &numbered(object));
    }
    let tagged = |queue: &WatchQueue| queue.records().map(|it| (it.tag(), number(&it))).collect::<Vec<_>>();
    assert_eq!(tagged(&one), [(50, Some(5)), (70, Some(7))]);
    for (queue, tag) in [(&all, 0), (&another, 1)] {
        assert_eq!(tagged(queue), [4, 5, 6, 7, 8].map(|object| (tag, Some(object))));
    }
}

#[test]
fn a_full_queue_keeps_what_it_has_and_says_where_something_is_missing() {
    let (list, queue) = watched(WatchConfig::default().capacity(32));
    for number in 0..40 {
        list.post(0, &numbered(number));
    }
    let mut want = (0..32).map(Some).collect::<Vec<_>>();
    want.push(None);
    assert_eq!(drain(&queue), want);
    let counters = queue.counters();
    assert_eq!((counters.posted, counters.lost, counters.high_water, counters.pending), (40, 8, 32, 0));

    // A second episode gives a second mark, and each stands where records are missing.
    for number in 0..33 {
        list.post(0, &numbered(number));
    }
    let mut first = [0; 16];
    assert_eq!(queue.read(&mut first), Ok(16));
    for number in 100..102 {
        list.post(0, &numbered(number));
    }
    let mut want = (1..32).map(Some).collect::<Vec<_>>();
    want.extend([None, Some(100), None]);
    assert_eq!(drain(&queue), want);
}

#[test]
fn a_trailing_loss_is_pollable_and_comes_with_the_same_read() {
    let (list, queue) = watched(WatchConfig::default().capacity(32));
    for number in 0..33 {
        list.post(0, &numbered(number));
    }
    let mut buffer = vec![0; 32 * 16];
    assert_eq!(queue.read(&mut buffer), Ok(32 * 16));
    assert!(pollable(&queue), "the loss is still to be read");
    assert_eq!(queue.read(&mut buffer[..7]), Err(ReadError::NoBuffer { needed: 8, given: 7 }));
    assert_eq!(queue.read(&mut buffer), Ok(8));
    assert!(!pollable(&queue));

    for number in 0..33 {
        list.post(0, &numbered(number));
    }
    let mut buffer = vec![0; 32 * 16 + 8];
    assert_eq!(queue.read(&mut buffer), Ok(32 * 16 + 8));
}

#[test]
fn removals_find_a_place_in_a_full_queue() {
    let list = WatchList::new();
    let queue = open(WatchConfig::default().capacity(32));
    for object in 1..=100 {
        list.add_watch(&queue, Scope::Object(object), object as u8).expect("a watch");
    }
    for number in 0..33 {
        list.post(1, &numbered(number));
    }
    for object in 1..=100 {
        list.remove_object(object);
    }
    let unknown = Note::Unknown { kind: TYPE_WORK, subtype: 0 };
    let want = (0..32).map(|number| (1, unknown, Some(number))).collect::<Vec<_>>();
    let got = queue.records().map(|record| (record.tag(), record.note(), number(&record))).collect::<Vec<_>>();
    assert_eq!(got[..32], want);
    assert_eq!(got[32], (0, Note::Lost, None));
    let removals = (1..=100).map(|object| (object as u8, Note::Removed(Some(object)), Some(object)));
    assert_eq!(got[33..], removals.collect::<Vec<_>>());
}

#[test]
fn a_removal_that_found_no_room_comes_before_what_was_posted_after_it() {
    let list = WatchList::new();
    let queue = open(WatchConfig::default().capacity(32));
    for object in 1..=101 {
        list.add_watch(&queue, Scope::Object(object), object as u8).expect("a watch");
    }
    for number in 0..32 {
        list.post(101, &numbered(number));
    }
    for object in 1..=100 {
        list.remove_object(object);
    }
    // All that was posted, and half of the removals. The rest is not in the ring, where there is room by now.
    for _ in 0..32 + 50 {
        assert_eq!(queue.read(&mut [0; 16]), Ok(16));
    }
    list.post(101, &numbered(500));
    let got = queue.records().map(|record| (record.note(), number(&record))).collect::<Vec<_>>();
    let mut want = (51..=100).map(|object| (Note::Removed(Some(object)), Some(object))).collect::<Vec<_>>();
    want.push((Note::Unknown { kind: TYPE_WORK, subtype: 0 }, Some(500)));
    assert_eq!(got, want);
}

#[test]
fn records_lost_before_the_size_is_set_leave_a_mark() {
    let (list, queue) = watched(WatchConfig::default().sized_later());
    list.post(0, &numbered(1));
    list.post(0, &numbered(2));
    assert_eq!(queue.read(&mut [0; 64]), Err(ReadError::Empty));
    assert!(!pollable(&queue));
    queue.set_size(1).expect("a first size");
    assert!(pollable(&queue));
    list.post(0, &numbered(3));
    assert_eq!(drain(&queue), [None, Some(3)]);
    assert_eq!(queue.counters().lost, 2);
}

#[test]
fn sizes_are_whole_groups_of_32_and_are_set_once() {
    let queue = open(WatchConfig::default().sized_later());
    assert_eq!(queue.set_size(0).expect_err("no size").errno(), libc::EINVAL);
    assert_eq!(queue.set_size(513).expect_err("too much").errno(), libc::EINVAL);
    assert_eq!(queue.capacity(), None);
    queue.set_size(65).expect("a first size");
    assert_eq!(queue.capacity(), Some(96));
    assert_eq!(queue.set_size(65).expect_err("a second time").errno(), libc::EBUSY);
    let error = WatchQueue::new(WatchConfig::default().capacity(MAX_CAPACITY + 1)).expect_err("too much");
    assert_eq!(error.errno(), libc::EINVAL);
    assert_eq!(open(WatchConfig::default().capacity(1000)).capacity(), Some(1024));
}

#[test]
fn a_capacity_that_is_no_power_of_two_is_exact() {
    let (list, queue) = watched(WatchConfig::default().capacity(96));
    for round in 0..5 {
        for number in 0..97 {
            list.post(0, &numbered(number));
        }
        let got = drain(&queue);
        assert_eq!(got.len(), 97, "round {round}");
        assert_eq!(got[96], None);
    }
}

#[test]
fn the_descriptor_is_readable_exactly_while_there_is_something() {
    let (list, queue) = watched(WatchConfig::default());
    list.post(0, &numbered(0));
    assert!(pollable(&queue), "the record was there before the descriptor was asked for");
    list.post(0, &numbered(1));
    assert_eq!(queue.read(&mut [0; 16]), Ok(16));
    assert!(pollable(&queue));
    assert_eq!(queue.read(&mut [0; 16]), Ok(16));
    assert!(!pollable(&queue));
    assert_eq!(queue.read(&mut [0; 16]), Err(ReadError::Empty));
    assert!(!pollable(&queue));
    list.post(0, &numbered(2));
    assert!(pollable(&queue));
}

#[test]
fn on_demand_the_descriptor_is_written_only_after_arming() {
    let (list, queue) = watched(WatchConfig::default().wake(Wake::OnDemand));
    list.post(0, &numbered(0));
    assert!(!pollable(&queue));
    assert!(queue.arm(), "there is something to read already");
    assert_eq!(drain(&queue), [Some(0)]);
    assert!(!queue.arm());
    assert!(!pollable(&queue));
    list.post(0, &numbered(1));
    assert!(pollable(&queue));
}

#[test]
fn a_sleeping_reader_wakes_for_a_record_for_the_end_and_for_the_deadline() {
    let (list, queue) = watched(WatchConfig::default());
    let queue = Arc::new(queue);
    assert_eq!(queue.read_timeout(&mut [0; 64], Some(Duration::from_millis(1))), Err(ReadError::Empty));
    let barrier = Arc::new(Barrier::new(2));
    let reader = std::thread::spawn({
        let (queue, barrier) = (Arc::clone(&queue), Arc::clone(&barrier));
        move || {
            let mut buffer = [0; 64];
            barrier.wait();
            let first = queue.read_timeout(&mut buffer, Some(LONG));
            barrier.wait();
            (first, queue.read_timeout(&mut buffer, None))
        }
    });
    barrier.wait();
    list.post(0, &numbered(0));
    barrier.wait();
    queue.clear();
    assert_eq!(reader.join().expect("the reader"), (Ok(16), Ok(0)));
}

#[test]
fn a_cleared_queue_can_be_read_to_its_end_and_refuses_the_rest() {
    let (list, queue) = watched(WatchConfig::default());
    list.post(0, &numbered(1));
    queue.clear();
    list.post(0, &numbered(2));
    assert!(list.is_empty());
    assert_eq!(queue.read(&mut [0; 64]), Ok(16));
    assert_eq!(queue.read(&mut [0; 64]), Ok(0));
    assert!(pollable(&queue), "the end can be read");
    assert_eq!(list.add_watch(&queue, Scope::All, 0).map_err(|error| error.errno()), Err(libc::ENOENT));
}

#[test]
fn watches_are_refused_with_the_kernels_errors() {
    let list = WatchList::new();
    let limit = WatchLimit::new(2);
    let (a, b) = (open(WatchConfig::default().limit(limit.clone())), open(WatchConfig::default().limit(limit)));
    list.add_watch(&a, Scope::Object(1), 1).expect("a watch");
    assert_eq!(list.add_watch(&a, Scope::Object(1), 2), Err(WatchError::Exists(Scope::Object(1))));
    list.add_watch(&b, Scope::Object(1), 1).expect("a watch");
    assert_eq!(list.add_watch(&b, Scope::Object(2), 1), Err(WatchError::Limit(2)));
    assert_eq!(list.remove_watch(&b, Scope::Object(2)), Err(WatchError::NotWatched(Scope::Object(2))));
    drop(a);
    list.add_watch(&b, Scope::Object(2), 1).expect("room after the other queue is gone");
    let errnos = [WatchError::Exists(Scope::All), WatchError::Limit(2), WatchError::NotWatched(Scope::All)];
    assert_eq!(errnos.map(|error| error.errno()), [libc::EBUSY, libc::EAGAIN, libc::EBADSLT]);
}

#[test]
fn each_watch_is_released_once_however_it_ends() {
    let released = Arc::new(AtomicUsize::new(0));
    let list = WatchList::with_release({
        let released = Arc::clone(&released);
        move |Released { .. }| {
            released.fetch_add(1, Ordering::Relaxed);
        }
    });
    let (a, b) = (open(WatchConfig::default()), open(WatchConfig::default()));
    for object in 0..4 {
        list.add_watch(&a, Scope::Object(object), 0).expect("a watch");
        list.add_watch(&b, Scope::Object(object), 0).expect("a watch");
    }
    list.remove_watch(&a, Scope::Object(0)).expect("a watch");
    list.remove_object(1);
    assert_eq!(released.load(Ordering::Relaxed), 3);
    b.clear();
    assert_eq!(released.load(Ordering::Relaxed), 6);
    drop(list);
    assert_eq!(released.load(Ordering::Relaxed), 8);
    let removals = a.notes().collect::<Vec<_>>();
    assert_eq!(removals, [0, 1, 2, 3].map(|object| Note::Removed((object != 0).then_some(object))));
    assert_eq!(b.notes().collect::<Vec<_>>(), [Note::Removed(Some(1))]);
}

#[test]
fn a_release_callback_may_use_the_list() {
    let list = Arc::new_cyclic(|list: &std::sync::Weak<WatchList>| {
        let list = list.clone();
        WatchList::with_release(move |_| {
            if let Some(list) = list.upgrade() {
                list.post(0, &numbered(0));
                list.remove_all(0);
            }
        })
    });
    let queue = open(WatchConfig::default());
    list.add_watch(&queue, Scope::Object(1), 0).expect("a watch");
    list.add_watch(&queue, Scope::Object(2), 0).expect("a watch");
    list.remove_object(1);
    assert!(list.is_empty());
}

#[test]
fn all_subtypes_can_be_filtered() {
    let (list, queue) = watched(WatchConfig::default());
    queue.set_filter(Some(&[FilterEntry::some_of(TYPE_WORK, &[0, 31, 32, 200, 255])])).expect("a sound filter");
    for subtype in 0..=255 {
        list.post(0, &Record::new(TYPE_WORK, subtype, 0, &[]).expect("a header"));
    }
    assert_eq!(queue.records().map(|record| record.subtype()).collect::<Vec<_>>(), [0, 31, 32, 200, 255]);
    assert_eq!(queue.counters().filtered, 251);
    queue.set_filter(None).expect("no filter");
    list.post(0, &Record::new(TYPE_WORK, 77, 0, &[]).expect("a header"));
    assert_eq!(queue.records().count(), 1);
}

#[test]
fn a_refused_filter_leaves_the_old_one() {
    let (list, queue) = watched(WatchConfig::default());
    queue.set_filter(Some(&[FilterEntry::all_of(TYPE_WORK)])).expect("a sound filter");
    let bad = FilterEntry::all_of(TYPE_USERPTR).with_info(0xff00, 0x10000);
    let refused = FilterError::OutsideMask { entry: 0, filter: 0x10000, mask: 0xff00 };
    assert_eq!(queue.set_filter(Some(&[bad])), Err(refused));
    assert_eq!(queue.set_filter(Some(&[])), Err(FilterError::Count(0)));
    list.post(0, &numbered(1));
    list.post(0, &UserptrNote::default().record());
    assert_eq!(queue.records().count(), 1);
}

#[test]
fn types_behind_the_limit_are_dropped_and_meta_passes_always() {
    let (list, queue) = watched(WatchConfig::default());
    queue.set_filter(Some(&[FilterEntry::all_of(128)])).expect("a filter that is empty after the drop");
    list.post(0, &Record::new(128, 0, 0, &[]).expect("a header"));
    list.post(0, &Record::new(TYPE_META, 9, 0, &[]).expect("a header"));
    assert_eq!(queue.records().map(|record| record.kind()).collect::<Vec<_>>(), [TYPE_META]);
    queue.set_filter(Some(&[FilterEntry::all_of(127)])).expect("a sound filter");
    list.post(0, &Record::new(127, 0, 0, &[]).expect("a header"));
    assert_eq!(queue.records().count(), 1);
}

#[test]
fn a_raw_filter_is_parsed_as_the_kernels_struct() {
    let entry = FilterEntry { kind: 64, info_filter: 0x100, info_mask: 0xff00, subtypes: [1, 2, 3, 4, 5, 6, 7, 8] };
    let words = [1, 0, 64, 0x100, 0xff00, 1, 2, 3, 4, 5, 6, 7, 8_u32];
    let bytes = words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>();
    assert_eq!(parse_filter(&bytes), Ok(vec![entry]));
    let short = parse_filter(&bytes[..51]).expect_err("cut");
    assert_eq!((short, short.errno()), (FilterError::Truncated { given: 51, announced: 1 }, libc::EFAULT));
}

#[test]
fn the_policy_is_asked_after_the_filter_and_counts_what_it_denies() {
    let asked = Arc::new(AtomicUsize::new(0));
    let config = WatchConfig::default().policy({
        let asked = Arc::clone(&asked);
        move |object, record| {
            asked.fetch_add(1, Ordering::Relaxed);
            assert_eq!(record.tag(), 1);
            object == 3
        }
    });
    let (list, queue) = watched(config);
    queue.set_filter(Some(&[FilterEntry::all_of(TYPE_WORK)])).expect("a sound filter");
    list.post(3, &numbered(3));
    list.post(4, &numbered(4));
    list.post(3, &UserptrNote::default().record());
    assert_eq!(drain(&queue), [Some(3)]);
    let counters = queue.counters();
    assert_eq!((counters.posted, counters.denied, counters.filtered), (1, 1, 1));
    assert_eq!(asked.load(Ordering::Relaxed), 2);
}

#[test]
fn who_reads_that_a_watch_is_gone_may_make_another_at_once() {
    let lists = [WatchList::new(), WatchList::new()];
    let queue = WatchQueue::new(WatchConfig::default().limit(WatchLimit::new(1))).unwrap();
    lists[0].add_watch(&queue, Scope::All, 0).unwrap();
    for round in 0..2000 {
        let (old, new) = (&lists[round % 2], &lists[(round + 1) % 2]);
        assert!(
            !queue.arm(),
            "to be woken takes whoever tells a system call, between telling and all that it does then"
        );
        std::thread::scope(|scope| {
            scope.spawn(|| old.remove_all(0));
            while queue.records().next().is_none() {
                std::hint::spin_loop();
            }
            new.add_watch(&queue, Scope::All, 0).expect("the only other watch is gone");
        });
    }
}
