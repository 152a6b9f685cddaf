//! What the bytes of a record say, also if somebody else made them.

use pinfold_core::watch::{
    Label, MAX_RECORD_LEN, Note, NoteCause, NotePath, NoteState, Record, RecordError, TYPE_USERPTR, TYPE_WORK,
    UserptrEvent, UserptrNote, records,
};

#[test]
fn the_bytes_of_a_userptr_record_are_those_of_the_table() {
    let note = UserptrNote {
        event: UserptrEvent::Late,
        object: 0x1111_1111_1111_1111,
        generation: 0x2222_2222_2222_2222,
        start: 0x3333_3333_3333_3000,
        end: 0x4444_4444_4444_4000,
        hold_off_ns: 0x5555_5555_5555_5555,
        cause: NoteCause::Bracket,
        state: NoteState::Valid,
        path: NotePath::Mirror,
        errno: 0x0666_6666,
        late: true,
        no_hold: true,
        writes: false,
        label: Label::new("né"),
    };
    let mut want = Vec::new();
    want.extend((64_u32 | 7 << 24).to_ne_bytes());
    want.extend((59_u32 | 0b11 << 16).to_ne_bytes());
    for word in [note.object, note.generation, note.start, note.end, note.hold_off_ns] {
        want.extend(word.to_ne_bytes());
    }
    want.extend([4, 3, 4, 0]);
    want.extend(note.errno.to_ne_bytes());
    want.extend("né".as_bytes());
    assert_eq!(note.record().bytes(), want);
}

#[test]
fn a_label_is_cut_after_a_whole_character() {
    let name = format!("{}é", "x".repeat(63));
    assert_eq!(Label::new(&name).as_str(), "x".repeat(63));
    let note = UserptrNote { label: Label::new(&name), ..Default::default() };
    assert!(note.record().bytes().len() <= MAX_RECORD_LEN);
}

#[test]
fn codes_without_a_meaning_decode_as_unknown() {
    let sound = UserptrNote::default().record();
    for (at, code) in [(40, 9), (41, 8), (42, 5)] {
        let mut payload = sound.payload().to_vec();
        payload[at] = code;
        let record = Record::new(TYPE_USERPTR, 0, 0, &payload).expect("a short record");
        assert_eq!(record.note(), Note::Unknown { kind: TYPE_USERPTR, subtype: 0 }, "byte {}", at + 8);
    }
    let short = Record::new(TYPE_USERPTR, 0, 0, &sound.payload()[..47]).expect("a short record");
    assert_eq!(short.note(), Note::Unknown { kind: TYPE_USERPTR, subtype: 0 });
    assert_eq!(Record::new(77, 3, 0, &[]).expect("a header").note(), Note::Unknown { kind: 77, subtype: 3 });
}

#[test]
fn bytes_whose_length_field_is_wrong_are_no_record() {
    let header = |len: u32| [64_u32.to_ne_bytes(), len.to_ne_bytes()].concat();
    for (bytes, said) in [(header(0), 0), (header(7), 7), (header(9), 9), (vec![0; 3], 0)] {
        let given = bytes.len();
        assert_eq!(Record::from_bytes(&bytes), Err(RecordError::Length { said, given }));
    }
    assert_eq!(RecordError::Type(1 << 24).errno(), libc::EINVAL);
    assert_eq!(Record::new(1 << 24, 0, 0, &[]), Err(RecordError::Type(1 << 24)));
    assert!(Record::new(64, 0, 0, &[0; 119]).is_ok());
    assert!(Record::new(64, 0, 0, &[0; 120]).is_err());
}

#[test]
fn splitting_steps_over_unknown_records_and_stops_at_garbage() {
    let unknown = Record::new(0x00ab_cdef, 9, 0, &[1, 2, 3]).expect("a short record");
    let known = Record::new(TYPE_WORK, 0, 0, &5_u64.to_ne_bytes()).expect("a short record");
    let mut bytes = [unknown.bytes(), known.bytes()].concat();
    bytes.extend([1, 0, 0, 0, 0, 0, 0, 0, 9, 9]);
    let split = records(&bytes).collect::<Vec<_>>();
    assert_eq!(split.len(), 3);
    assert_eq!(split[0], Ok(unknown));
    assert_eq!(split[1], Ok(known));
    assert!(split[2].is_err());
}
