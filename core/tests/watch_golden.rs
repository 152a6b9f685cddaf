//! Replays what a real kernel's watch queue was made to do, and compares every result, errno and byte.
//!
//! The kernel's queue watches keys. Here each key is a watch list, and what the kernel would do to the key is a post. The replay goes through
//! the recorded lines in their order and must use up each: by doing the same ([`Replay::result`] and the like), or by [`Replay::skip`] with the reason
//! why there is nothing of that kind here. The queues are in strict mode; what differs outside of it is tested, by name, in `watch_queue.rs`:
//! `a_trailing_loss_is_pollable_and_comes_with_the_same_read`, `removals_find_a_place_in_a_full_queue`,
//! `records_lost_before_the_size_is_set_leave_a_mark`, `all_subtypes_can_be_filtered`.

// The recording is from a little-endian machine.
#![cfg(target_endian = "little")]

#[path = "golden/replay.rs"]
mod replay;

use std::time::Duration;

use pinfold_core::watch::{
    FilterError, ReadError, Record, Scope, SizeError, TYPE_KEY_NOTIFY, WatchConfig, WatchError, WatchLimit, WatchList,
    WatchQueue, parse_filter,
};

use replay::{Replay, serial, split};

const PIPE: &str = "a call on pipes, and the queue is no pipe";
const WRITE_END: &str = "the queue has no write end";
const KEY: &str = "the key's own operation or check; here it is a post";
const NO_ID: &str = "a tag is a u8, a queue is a type: the caller can't say this";

const UPDATED: u8 = 1;
const LINKED: u8 = 2;
const UNLINKED: u8 = 3;
const CLEARED: u8 = 4;
const REVOKED: u8 = 5;
const INVALIDATED: u8 = 6;
const SETATTR: u8 = 7;

struct Key {
    serial: u32,
    list: WatchList,
}

impl Key {
    fn new(symbol: &str) -> Self {
        Self { serial: serial(symbol), list: WatchList::new() }
    }

    fn post(&self, subtype: u8, aux: u32) {
        let payload = [self.serial.to_ne_bytes(), aux.to_ne_bytes()].concat();
        let record = Record::new(TYPE_KEY_NOTIFY, subtype, 0, &payload).expect("a short record");
        self.list.post(self.serial.into(), &record);
    }

    fn updates(&self, times: usize) {
        for _ in 0..times {
            self.post(UPDATED, 0);
        }
    }

    fn watch(&self, queue: &WatchQueue, tag: u8) -> Result<(), WatchError> {
        self.list.add_watch(queue, Scope::Object(self.serial.into()), tag)
    }

    fn unwatch(&self, queue: &WatchQueue) -> Result<(), WatchError> {
        self.list.remove_watch(queue, Scope::Object(self.serial.into()))
    }

    fn destroy(&self) {
        self.list.remove_all(self.serial.into());
    }
}

fn unsized_queue() -> WatchQueue {
    WatchQueue::new(WatchConfig::default().strict().sized_later()).expect("an eventfd")
}

fn queue(size: usize) -> WatchQueue {
    let queue = unsized_queue();
    queue.set_size(size).expect("a first size");
    queue
}

fn filter(queue: &WatchQueue, raw: &[u8]) -> Result<(), FilterError> {
    queue.set_filter(Some(&parse_filter(raw)?))
}

/// `struct watch_notification_filter` with this count, reserved word and entries of {type, info_filter, info_mask, subtypes}.
fn raw(count: u32, reserved: u32, entries: &[(u32, u32, u32, [u32; 8])]) -> Vec<u8> {
    let mut words = vec![count, reserved];
    for &(kind, info_filter, info_mask, subtypes) in entries {
        words.extend([kind, info_filter, info_mask]);
        words.extend(subtypes);
    }
    words.into_iter().flat_map(u32::to_ne_bytes).collect()
}

const ALL: [u32; 8] = [u32::MAX; 8];
const NONE: [u32; 8] = [0; 8];

fn only(subtypes: &[u8]) -> [u32; 8] {
    [subtypes.iter().fold(0, |bits, subtype| bits | 1 << subtype), 0, 0, 0, 0, 0, 0, 0]
}

/// Big enough for whatever a queue of 512 holds.
const BIG: usize = 65536;

#[test]
fn a_strict_queue_does_what_the_kernels_did() {
    let mut replay = Replay::new();
    sizes(&mut replay);
    filter_arguments(&mut replay);
    events(&mut replay);
    filters(&mut replay);
    overflow(&mut replay);
    readers(&mut replay);
    replay.end();
}

fn sizes(replay: &mut Replay) {
    replay.skip_all(
        &["pipe2.notification", "set_size.on_plain_pipe", "set_filter.on_plain_pipe", "default.F_GETPIPE_SZ"],
        PIPE,
    );
    let queue = unsized_queue();
    for (name, size) in [("0", 0), ("-1", usize::MAX), ("513", 513), ("512", 512), ("again", 512)] {
        replay.done(&format!("set_size.{name}"), queue.set_size(size), SizeError::errno);
    }
    replay.skip("set_size.write_end_again", WRITE_END);
    replay.skip_all(&["size512.F_GETPIPE_SZ", "F_SETPIPE_SZ", "write"], PIPE);
    replay.read("read.empty_nonblock", &queue, BIG);
    replay.read("read.len0", &queue, 0);
    replay.skip_all(&["splice.in_from_plain", "splice.out_empty_nonblock", "tee.into", "vmsplice.into"], PIPE);
    replay.poll("poll.empty", &queue);
    replay.skip("poll.write_end", WRITE_END);
    replay.skip_all(&["pipe2.notif|direct", "pipe2.notif|cloexec|nonblock"], PIPE);
    for size in [1, 31, 32, 33, 64, 65, 96, 128, 256, 257, 511] {
        let queue = unsized_queue();
        let rc = queue.set_size(size).map_or(-1, |()| 0);
        let bytes = queue.capacity().expect("it has a size") * 128;
        let line = replay.next(&format!("size{size}"));
        assert_eq!(line.text, format!("rc={rc} F_GETPIPE_SZ={bytes}"), "size {size}");
    }
}

fn filter_arguments(replay: &mut Replay) {
    let queue = queue(512);
    let mut tried = |name: &str, result: Result<(), FilterError>| {
        replay.done(&format!("filter.{name}"), result, FilterError::errno);
    };
    let key = (TYPE_KEY_NOTIFY, 0, 0, ALL);
    let of_type = |kind| raw(1, 0, &[(kind, 0, 0, ALL)]);
    let masked = |kind, info_filter, info_mask| raw(1, 0, &[(kind, info_filter, info_mask, ALL)]);
    tried("null", queue.set_filter(None));
    tried("badptr", filter(&queue, &[]));
    tried("nr0", filter(&queue, &raw(0, 0, &[])));
    tried("nr16", filter(&queue, &raw(16, 0, &[key; 16])));
    tried("nr17", filter(&queue, &raw(17, 0, &[key; 17])));
    tried("nr_max_u32", filter(&queue, &raw(u32::MAX, 0, &[key])));
    tried("reserved1", filter(&queue, &raw(1, 1, &[key])));
    tried("info_filter_outside_mask", filter(&queue, &masked(TYPE_KEY_NOTIFY, 0x20000, 0x10000)));
    tried("mask_has_length_bits", filter(&queue, &masked(TYPE_KEY_NOTIFY, 0, 0x40)));
    tried("mask_bit7", filter(&queue, &masked(TYPE_KEY_NOTIFY, 0, 0x80)));
    tried("type_NR(2)", filter(&queue, &of_type(2)));
    tried("type3", filter(&queue, &of_type(3)));
    tried("type127", filter(&queue, &of_type(127)));
    tried("type_2^24", filter(&queue, &of_type(1 << 24)));
    tried("type_u32max", filter(&queue, &of_type(u32::MAX)));
    tried("type_u32max_badmask", filter(&queue, &masked(u32::MAX, 1, 0)));
    tried("no_subtypes", filter(&queue, &raw(1, 0, &[(TYPE_KEY_NOTIFY, 0, 0, NONE)])));
    tried("all_subtype_words", filter(&queue, &raw(1, 0, &[key])));
    tried("type_meta", filter(&queue, &of_type(0)));
    tried("array_faults", filter(&queue, &raw(2, 0, &[key])));
    replay.skip("filter.write_end_fd", WRITE_END);
}

fn events(replay: &mut Replay) {
    let (first, second) = (queue(512), queue(512));
    let [k1, k2, k3, k4, k5, ring] = ["K1", "K2", "K3", "K4", "K5", "RING"].map(Key::new);
    replay.skip("add_key.ring", KEY);
    replay.skip_all(&["watch.id256", "watch.id-2", "watch.plain_pipe", "watch.fd-1", "watch.fd_null"], NO_ID);
    replay.skip("watch.bad_key", KEY);
    replay.watch("unwatch.never_watched", k1.unwatch(&first));
    replay.watch("watch.k1_id1", k1.watch(&first, 1));
    replay.watch("watch.k1_dup", k1.watch(&first, 1));
    replay.watch("watch.k1_dup_other_id", k1.watch(&first, 2));
    replay.watch("watch.k1_other_queue_id255", k1.watch(&second, 255));
    replay.watch("watch.k2_id0", k2.watch(&first, 0));
    replay.watch("unwatch.k2_by_other_queue", k2.unwatch(&second));

    replay.skip("k1.update", KEY);
    k1.updates(1);
    replay.read("rec.update", &first, BIG);
    replay.read("rec.update.queue2", &second, BIG);
    replay.skip("k2.update", KEY);
    k2.updates(1);
    replay.read("rec.update_id0", &first, BIG);
    replay.read("rec.nothing_for_queue2", &second, BIG);

    replay.skip_all(&["k1.setperm", "k1.set_timeout_1000s", "k1.chown"], KEY);
    for _ in 0..3 {
        k1.post(SETATTR, 0);
    }
    replay.read("rec.setattr", &first, BIG);
    let _ = second.records().count();

    replay.watch("watch.ring_id7", ring.watch(&first, 7));
    ring.post(LINKED, k3.serial);
    replay.read("rec.ring_link", &first, BIG);
    replay.skip_all(&["ring.unlink_k3", "ring.link_self_k1", "k1.update_by_add_key"], KEY);
    ring.post(UNLINKED, k3.serial);
    k1.updates(1);
    replay.read("rec.ring_unlink_link_addupdate", &first, BIG);
    let _ = second.records().count();

    replay.watch("unwatch.k1", k1.unwatch(&first));
    replay.skip("FIONREAD.removal", PIPE);
    replay.read("rec.removal_explicit", &first, BIG);
    replay.watch("unwatch.k1_again", k1.unwatch(&first));
    replay.watch("rewatch.k1_id9", k1.watch(&first, 9));
    replay.skip("k1.update", KEY);
    k1.updates(1);
    replay.read("rec.after_rewatch", &first, BIG);
    let _ = second.records().count();

    replay.skip("k1.revoke", KEY);
    k1.post(REVOKED, 0);
    replay.read("rec.revoke", &first, BIG);
    replay.read("rec.revoke.queue2", &second, BIG);
    replay.skip("k1.revoke_again", KEY);
    replay.read("rec.revoke_again", &first, BIG);
    replay.skip_all(&["k1.update_revoked", "watch.revoked_key", "unwatch.revoked_key"], KEY);
    replay.read("rec.unwatch_revoked", &first, BIG);

    replay.skip("k2.invalidate", KEY);
    k2.post(INVALIDATED, 0);
    replay.poll("poll.after_invalidate", &first);
    k2.destroy();
    replay.read("rec.invalidate_then_gc", &first, BIG);

    replay.skip("ring.clear", KEY);
    ring.post(CLEARED, 0);
    replay.read("rec.ring_clear", &first, BIG);
    replay.read("rec.queue2_gc_of_revoked", &second, BIG);
    replay.skip("ring.clear_empty", KEY);
    ring.post(CLEARED, 0);
    replay.read("rec.ring_clear_empty", &first, BIG);

    k4.watch(&first, 4).expect("a watch");
    k4.post(SETATTR, 0);
    replay.read("rec.expiry_1s", &first, BIG);
    k5.watch(&first, 5).expect("a watch");
    replay.skip("k5.unlink", KEY);
    ring.post(UNLINKED, k5.serial);
    replay.read("rec.last_unlink_immediate", &first, BIG);
    k5.destroy();
    replay.read("rec.last_unlink_after_gc", &first, BIG);
    replay.skip("watch.no_view_permission", KEY);
}

fn filters(replay: &mut Replay) {
    let queue = queue(512);
    let (k6, k7) = (Key::new("K6"), Key::new("K7"));
    k6.watch(&queue, 0x61).expect("a watch");
    k7.watch(&queue, 0x71).expect("a watch");
    let mut tried = |name: &str, entries: &[(u32, u32, u32, [u32; 8])]| {
        let set = filter(&queue, &raw(entries.len() as u32, 0, entries));
        replay.done(&format!("setfilter.{name}"), set, FilterError::errno);
        k6.updates(1);
        k7.updates(1);
        k6.post(SETATTR, 0);
        replay.read(&format!("filt.{name}"), &queue, BIG);
    };
    let updated = (1, 0, 0, only(&[UPDATED]));
    let updated_of = |id: u32| (1, id << 8, 0xff00, only(&[UPDATED]));
    tried("sub_updated_only", &[updated]);
    tried("sub_setattr_or_linked", &[(1, 0, 0, only(&[SETATTR, LINKED]))]);
    tried("two_same_type_disjoint_subs", &[updated_of(0x61), (1, 0, 0, only(&[SETATTR]))]);
    tried("two_same_type_same_sub_diff_id", &[updated_of(0x61), updated_of(0x71)]);
    tried("id_0x61_only", &[(1, 0x6100, 0xff00, ALL)]);
    tried("id_bit_mask_0x1000", &[(1, 0x1000, 0x1000, ALL)]);
    tried("flag0_required", &[(1, 0x10000, 0x10000, ALL)]);
    tried("flag0_must_be_clear", &[(1, 0, 0x10000, ALL)]);
    tried("mask_bit7_required0", &[(1, 0, 0x80, ALL)]);
    tried(
        "sub_words_1to7_only",
        &[(1, 0, 0, [0, u32::MAX, u32::MAX, u32::MAX, u32::MAX, u32::MAX, u32::MAX, u32::MAX])],
    );
    tried("only_unknown_type", &[(2, 0, 0, ALL)]);
    tried("unknown_plus_updated", &[(2, 0, 0, ALL), updated]);
    tried("meta_only", &[(0, 0, 0, ALL)]);
    tried("no_subtypes", &[(1, 0, 0, NONE)]);
    replay.watch("unwatch.k7_under_reject_all", k7.unwatch(&queue));
    replay.read("filt.removal_bypasses_filter", &queue, BIG);
    replay.done("filter.remove", queue.set_filter(None), FilterError::errno);
    k6.updates(1);
    replay.read("filt.after_remove", &queue, BIG);
    replay.skip("k6.update_after_close", KEY);
    drop(queue);
    k6.updates(1);
    assert!(k6.list.is_empty(), "a closed queue watches nothing");
}

fn overflow(replay: &mut Replay) {
    let k6 = Key::new("K6");
    let full = |size, tag| {
        let queue = queue(size);
        k6.watch(&queue, tag).expect("a watch");
        k6.updates(size.next_multiple_of(32) + 8);
        queue
    };
    for size in [1, 33, 65, 512] {
        let queue = full(size, 33);
        let mut buffer = vec![0; BIG];
        let read = queue.read(&mut buffer).expect("records");
        let got = split(&buffer[..read]);
        let line = replay.next(&format!("overflow.size{size}"));
        let index = got.iter().position(|record| record.len() == 8).map_or("-1".into(), |index| index.to_string());
        let said = format!("FIONREAD={read} read={read} records={} loss_index={index}", got.len());
        assert_eq!(line.text, said);
        assert!(line.records.is_empty() || line.records == got, "size {size}");
    }

    let queue = full(1, 34);
    replay.read("ovf.read7", &queue, 7);
    replay.read("ovf.read15", &queue, 15);
    replay.read("ovf.read16", &queue, 16);
    replay.read("ovf.read24_of_two", &queue, 24);
    replay.read("ovf.read47", &queue, 47);
    assert_eq!(queue.read(&mut [0; 27 * 16]), Ok(27 * 16));
    replay.read("ovf.last_record_exact16", &queue, 16);
    replay.poll("ovf.poll_with_only_loss_pending", &queue);
    replay.skip("ovf.FIONREAD_with_only_loss_pending", PIPE);
    replay.read("ovf.loss_read7", &queue, 7);
    replay.read("ovf.loss_read8", &queue, 8);
    replay.read("ovf.then_empty", &queue, BIG);

    k6.updates(40);
    replay.read("ovf2.read_first", &queue, 16);
    k6.updates(3);
    let mut buffer = vec![0; BIG];
    let read = queue.read(&mut buffer).expect("records");
    assert_eq!(replay.next("ovf2.two_episodes").text, format!("read={read}"));
    let got = split(&buffer[..read]);
    let line = replay.next("ovf2.tail.records");
    assert_eq!(line.text, format!("rc={}", got.len()));
    assert_eq!(got[got.len() - 3..], line.records);
    k6.updates(1);
    replay.read("ovf2.after", &queue, BIG);

    k6.updates(32);
    replay.watch("ovf3.unwatch_when_full", k6.unwatch(&queue));
    let read = queue.read(&mut buffer).expect("records");
    assert_eq!(replay.next("ovf3.removal_note_lost").text, format!("read={read}"));
    let got = split(&buffer[..read]);
    let line = replay.next("ovf3.tail.records");
    assert_eq!(line.text, format!("rc={}", got.len()));
    assert_eq!(got[got.len() - 2..], line.records);
    replay.read("ovf3.next_read", &queue, BIG);

    let queue = full(1, 37);
    let read = queue.read(&mut buffer).expect("records");
    assert_eq!(replay.next("lostwake.read_big_buffer").text, format!("rc={read}"));
    replay.poll("lostwake.poll_500ms", &queue);
    k6.updates(1);
    replay.poll("lostwake.poll_after_next_note", &queue);
    replay.read("lostwake.read", &queue, BIG);
}

fn readers(replay: &mut Replay) {
    let (queue, k6) = (unsized_queue(), Key::new("K6"));
    replay.watch("unsized.watch", k6.watch(&queue, 35));
    k6.updates(2);
    replay.poll("unsized.poll", &queue);
    replay.read("unsized.read", &queue, BIG);
    replay.done("unsized.late_size", queue.set_size(1), SizeError::errno);
    assert_eq!(queue.read(&mut [0; 16]), Err(ReadError::Empty));
    k6.updates(1);
    replay.read("unsized.after_size", &queue, BIG);
    k6.updates(1);
    replay.read("blocking.prefill", &queue, BIG);
    replay.skip_all(
        &["epollet.first", "epollet.second_without_post", "epollet.second_post_undrained"],
        "an edge comes with the first record after the queue was found empty, not with each record",
    );
    replay.skip("F_GETFL", PIPE);

    let line = replay.next("forked_blocking_reader");
    let read = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut buffer = vec![0; BIG];
            let read = queue.read_timeout(&mut buffer, Some(Duration::from_secs(20))).expect("a record in time");
            split(&buffer[..read])
        });
        k6.updates(1);
        reader.join().expect("the reader")
    });
    assert!(line.text.starts_with(&format!("rc={}", read.concat().len())));
    assert_eq!(read, line.records);

    replay.skip_all(
        &[
            "writer_closed.pending",
            "writer_closed.empty",
            "writer_closed.poll",
            "writer_closed.post_still_arrives",
            "writer_closed.unwatch",
            "writer_closed.removal",
        ],
        WRITE_END,
    );
    drop(queue);
    k6.updates(1);
    replay.skip("reader_closed.post", KEY);
    replay.skip("reader_closed.unwatch_by_write_end", WRITE_END);

    let queue = WatchQueue::new(WatchConfig::default().strict().limit(WatchLimit::new(12))).expect("an eventfd");
    let list = WatchList::new();
    let mut attempts = (0..).map(|object| list.add_watch(&queue, Scope::Object(object), 0));
    assert!(attempts.by_ref().take(2).all(|result| result.is_ok()), "two watches that the user has already");
    let accepted = attempts.by_ref().take_while(Result::is_ok).count();
    let refused = attempts.next().expect("there is always another").expect_err("the limit stays");
    assert_eq!(refused.errno(), libc::EAGAIN);
    assert_eq!(replay.next("rlimit_nofile12.watches_accepted").text, format!("rc={accepted} EAGAIN"));
}
