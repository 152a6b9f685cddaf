//! Whatever bytes a read returned: they split into records that are what they were, and every record decodes.
//! `scripts/fuzz 60 records`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pinfold_core::watch::{Note, Scope, WatchConfig, WatchList, WatchQueue, parse_filter, records};

fuzz_target!(|bytes: &[u8]| {
    let mut at = 0;
    for record in records(bytes) {
        let Ok(record) = record else { break };
        assert_eq!(record.bytes(), &bytes[at..at + record.bytes().len()]);
        at += record.bytes().len();
        if let Note::Userptr(note) = record.note() {
            assert_eq!(note.record().note(), Note::Userptr(note), "what was decoded encodes to the same");
        }
    }
    // A filter from the same bytes is refused or works; a record passes it or not.
    let Ok(entries) = parse_filter(bytes) else { return };
    let queue = WatchQueue::new(WatchConfig::default().capacity(32)).expect("an eventfd");
    if queue.set_filter(Some(&entries)).is_err() {
        return;
    }
    let list = WatchList::new();
    list.add_watch(&queue, Scope::All, 0).expect("a watch");
    for record in records(&bytes[8..]).flatten() {
        list.post(0, &record);
    }
    let counters = queue.counters();
    assert_eq!(counters.posted - counters.lost, counters.pending);
});
