//! The monitor against a program that is this test.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use pinfold_core::watch::share::{Server, Source};
use pinfold_core::watch::{
    Label, NotePath, NoteState, Record, UserptrEvent, UserptrNote, WatchList, WorkEvent, WorkNote,
};

struct Program {
    list: WatchList,
}

impl Source for Program {
    fn watch_list(&self) -> &WatchList {
        &self.list
    }

    fn present(&self, put: &mut dyn FnMut(Record)) {
        put(note(UserptrEvent::Present).record());
        put(WorkNote { event: WorkEvent::Present, workers: 3, running: 2, ..Default::default() }.record());
    }
}

fn note(event: UserptrEvent) -> UserptrNote {
    UserptrNote {
        event,
        object: 5,
        generation: 9,
        start: 0x10_0000,
        end: 0x20_0000,
        state: NoteState::Valid,
        path: NotePath::AliasImport,
        label: Label::new("town hall"),
        ..Default::default()
    }
}

fn serve(folder: &Path) -> (Arc<Program>, Server) {
    let program = Arc::new(Program { list: WatchList::new() });
    let server = Server::listen(&folder.join("watch.sock"), Arc::downgrade(&program)).expect("a place for a socket");
    (program, server)
}

fn monitor(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_watch"));
    command.args(arguments);
    command
}

fn run(arguments: &[&str]) -> Output {
    monitor(arguments).output().expect("the monitor")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

#[test]
fn a_snapshot_shows_what_there_is() {
    let folder = tempfile::tempdir().expect("a folder");
    let (_program, server) = serve(folder.path());
    let plain = run(&[text(server.path()), "--once"]);
    let shown = String::from_utf8_lossy(&plain.stdout);
    assert!(
        plain.status.success() && shown.contains("#5 valid alias_import gen 9 0x100000+0x100000 town hall"),
        "{shown}"
    );

    let json = run(&[text(server.path()), "--once", "--json"]);
    let value = serde_json::from_slice::<serde_json::Value>(&json.stdout).expect("JSON");
    assert_eq!(value["objects"][0]["label"], "town hall");
    assert_eq!(value["bytes"]["alias_import"], 0x10_0000);
    assert_eq!(value["pool"]["workers"], 3);
}

#[test]
fn records_stream_as_lines_until_the_program_ends() {
    let folder = tempfile::tempdir().expect("a folder");
    let (program, server) = serve(folder.path());
    let mut monitor = monitor(&[text(server.path()), "--json"]).stdout(Stdio::piped()).spawn().expect("the monitor");
    let mut lines = BufReader::new(monitor.stdout.take().expect("a pipe")).lines();
    let mut next = || {
        let line = lines.next().expect("a line").expect("text");
        serde_json::from_str::<serde_json::Value>(&line).expect("JSON")
    };
    assert_eq!(next()["event"], "present");
    assert_eq!(next()["type"], "work");
    assert_eq!(next()["event"], "all_present");
    program.list.post(5, &note(UserptrEvent::Late).record());
    let late = next();
    assert_eq!((&late["event"], &late["object"]), (&"late".into(), &5.into()));
    drop(server);
    assert!(monitor.wait().expect("the monitor").success(), "a program that ends is no error");
}

#[test]
fn errors_say_what_to_do() {
    let folder = tempfile::tempdir().expect("a folder");
    let nowhere = folder.path().join("nowhere.sock");
    let said = |arguments: &[&str]| {
        let output = run(arguments);
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(said(&[text(&nowhere), "--once"]).contains("start the program with PINFOLD_WATCH=1"));
    assert!(said(&["4294967295", "--once"]).contains("no process 4294967295"));
    let own = std::process::id().to_string();
    assert!(said(&[&own, "--once"]).contains("PINFOLD_WATCH=1"), "this test is not on offer");
    let foreign = folder.path().join("foreign.sock");
    let listener = std::os::unix::net::UnixListener::bind(&foreign).expect("a place for a socket");
    let other = std::thread::spawn(move || drop(listener.accept().expect("a connection")));
    assert!(said(&[text(&foreign), "--once"]).contains("doesn't talk as it should"));
    other.join().expect("the other program");
}
