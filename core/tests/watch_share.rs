//! A queue read by another process, and one read by an enemy.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, SealFlag, fallocate, fcntl};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mprotect};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use pinfold_core::watch::share::{
    AttachError, Greeting, HelloError, ListenError, Offer, Remote, Server, Source, WELCOME_LEN, Welcome,
};
use pinfold_core::watch::{Note, ReadError, Record, TYPE_WORK, UserptrEvent, UserptrNote, WatchList, records};

/// A generous bound for waits that end at once where nothing is broken.
const LONG: Duration = Duration::from_secs(30);

/// A program with some objects.
struct Program {
    list: WatchList,
    objects: Vec<u64>,
}

impl Source for Program {
    fn watch_list(&self) -> &WatchList {
        &self.list
    }

    fn present(&self, put: &mut dyn FnMut(Record)) {
        for &object in &self.objects {
            put(UserptrNote { event: UserptrEvent::Present, object, ..Default::default() }.record());
        }
    }
}

fn path() -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("pinfold-test-{}-{count}.sock", std::process::id()))
}

fn serve(objects: Vec<u64>, offer: Offer) -> (Arc<Program>, Server) {
    let program = Arc::new(Program { list: WatchList::new(), objects });
    let server = Server::listen_with(&path(), Arc::downgrade(&program), offer).expect("a place for a socket");
    (program, server)
}

/// Attaches, and waits until all that there is has been told.
fn attach(path: &Path) -> (Remote, Vec<u64>) {
    let remote = Remote::attach(path).expect("an offer");
    let mut present = Vec::new();
    loop {
        match next(&remote).note() {
            Note::Userptr(note) if note.event == UserptrEvent::AllPresent => return (remote, present),
            Note::Userptr(note) => present.push(note.object),
            other => panic!("{other:?} before all was told"),
        }
    }
}

fn next(remote: &Remote) -> Record {
    let mut bytes = [0; 128];
    loop {
        if let Some(record) = remote.records().next() {
            return record;
        }
        // The descriptor is what tells: a byte that is no record can't be read.
        assert!(pollable(remote, LONG), "nothing came");
        assert_ne!(remote.read(&mut bytes[..1]), Ok(0), "the program has ended");
    }
}

fn pollable(fd: &impl AsFd, limit: Duration) -> bool {
    let mut fd = libc::pollfd { fd: fd.as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let limit = i32::try_from(limit.as_millis()).expect("a short time");
    // SAFETY: `fd` is one writable pollfd for the length of the call.
    unsafe { libc::poll(&raw mut fd, 1, limit) };
    fd.revents & libc::POLLIN != 0
}

fn numbered(number: u64) -> Record {
    Record::new(TYPE_WORK, 0, 0, &number.to_ne_bytes()).expect("a short record")
}

fn number(record: &Record) -> Option<u64> {
    record.payload().first_chunk().map(|bytes| u64::from_ne_bytes(*bytes))
}

#[test]
fn a_reader_is_told_what_there_is_and_then_what_happens() {
    let (program, server) = serve((0..100).collect(), Offer::default());
    let (remote, present) = attach(server.path());
    assert_eq!(present, (0..100).collect::<Vec<_>>());
    assert_eq!(remote.process(), std::process::id());
    for object in 0..10 {
        program.list.post(object, &numbered(object));
    }
    let got = (0..10).map(|_| number(&next(&remote))).collect::<Vec<_>>();
    assert_eq!(got, (0..10).map(Some).collect::<Vec<_>>());
}

#[test]
fn more_objects_than_slots_are_told_without_a_loss() {
    let (_program, server) = serve((0..10_000).collect(), Offer::default().records(40));
    let (remote, present) = attach(server.path());
    assert_eq!(present, (0..10_000).collect::<Vec<_>>());
    assert_eq!(remote.lost(), 0);
}

#[test]
fn a_remote_readers_descriptor_is_readable_exactly_while_there_is_something() {
    let (program, server) = serve(vec![], Offer::default());
    let (remote, _) = attach(server.path());
    // The byte that says that all is told may come after the last record, and at any time from now on.
    let mut late = 0;
    for round in 0..1000 {
        program.list.post(0, &numbered(round));
        program.list.post(0, &numbered(round));
        assert!(pollable(&remote, Duration::ZERO));
        assert_eq!(remote.read(&mut [0; 16]), Ok(16));
        assert!(pollable(&remote, Duration::ZERO), "round {round}: one record is left");
        assert_eq!(remote.read(&mut [0; 16]), Ok(16));
        late += u32::from(pollable(&remote, Duration::ZERO));
        assert!(late <= 1, "round {round}: nothing is left");
        assert_eq!(remote.read(&mut [0; 16]), Err(ReadError::Empty));
    }
}

#[test]
fn a_remote_reader_that_sleeps_between_records_misses_no_wake_up() {
    let (program, server) = serve(vec![], Offer::default().records(64));
    let (remote, _) = attach(server.path());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (mut next, mut received, mut marked) = (0, 0, false);
            let mut buffer = [0; 500];
            loop {
                let last = done.load(Ordering::Acquire);
                let limit = if last { Duration::ZERO } else { Duration::from_millis(1) };
                let len = match remote.read_timeout(&mut buffer, Some(limit)) {
                    Ok(len) => len,
                    Err(ReadError::Empty) if last => return received,
                    Err(ReadError::Empty) => continue,
                    Err(error) => panic!("{error}"),
                };
                for record in records(&buffer[..len]) {
                    let record = record.expect("whole records");
                    if record.note() == Note::Lost {
                        marked = true;
                        continue;
                    }
                    let number = number(&record).expect("a numbered record");
                    assert!(number == next || number > next && marked, "{number} after {next}");
                    (next, marked) = (number + 1, false);
                    received += 1;
                }
            }
        });
        for number in 0..200_000 {
            program.list.post(0, &numbered(number));
        }
        done.store(true, Ordering::Release);
        assert_eq!(reader.join().expect("the reader") + remote.lost(), 200_000);
    });
}

#[test]
fn a_reader_hears_the_programs_end() {
    let (program, server) = serve(vec![], Offer::default().records(32));
    let (remote, _) = attach(server.path());
    for number in 0..40 {
        program.list.post(0, &numbered(number));
    }
    // The watch goes with the program's list; its removal record has a slot of its own. Then the connection ends.
    drop(program);
    drop(server);
    let mut notes = Vec::new();
    let mut bytes = [0; 100];
    loop {
        match remote.read_timeout(&mut bytes, Some(LONG)).expect("the end in time") {
            0 => break,
            len => notes.extend(records(&bytes[..len]).map(|record| record.expect("whole records").note())),
        }
    }
    assert_eq!(notes.len(), 34);
    assert!(notes[32..].contains(&Note::Lost) && notes[32..].contains(&Note::Removed(None)), "{:?}", &notes[32..]);
    assert!(pollable(&remote, Duration::ZERO), "the end can be read");
}

#[test]
fn whoever_may_not_read_is_told_why() {
    let (_program, server) = serve(vec![], Offer::default().admit(|_| false));
    assert!(matches!(Remote::attach(server.path()), Err(AttachError::NotPermitted(_))));

    let (_program, server) = serve(vec![], Offer::default().readers(1));
    let mut first = attach(server.path());
    assert!(matches!(Remote::attach(server.path()), Err(AttachError::Busy(_))));
    // Whoever has gone is gone, also for one who comes at once.
    for _ in 0..200 {
        drop(first);
        first = attach(server.path());
    }

    let path = path();
    assert!(matches!(Remote::attach(&path), Err(AttachError::NotOffered(_))));
    let error = Remote::attach_process(u32::MAX).expect_err("no such process");
    assert!(matches!(error, AttachError::NoProcess(u32::MAX)) && error.errno() == libc::ESRCH);

    let foreign = UnixListener::bind(&path).expect("a place for a socket");
    let answer =
        std::thread::spawn(move || foreign.accept().expect("a connection").0.write_all(b"HTTP/1.1 400 Bad Request"));
    assert!(matches!(Remote::attach(&path), Err(AttachError::Hello { source: HelloError::Foreign, .. })));
    answer.join().expect("the other program").expect("an answer");
    std::fs::remove_file(&path).expect("the socket");
}

#[test]
fn another_version_is_refused_by_both_sides() {
    let (_program, server) = serve(vec![], Offer::default());
    let mut connection = UnixStream::connect(server.path()).expect("an offer");
    let mut greeting = Greeting::default().to_bytes();
    greeting[8] += 1;
    connection.write_all(&greeting).expect("a greeting");
    let mut answer = [0; WELCOME_LEN];
    connection.read_exact(&mut answer).expect("an answer");
    assert_eq!(Welcome::from_bytes(&answer), Ok(Welcome::No(libc::EPROTO)));

    let path = path();
    let newer = UnixListener::bind(&path).expect("a place for a socket");
    let mut welcome = Welcome::No(1).to_bytes();
    welcome[8] = 9;
    let answer = std::thread::spawn(move || newer.accept().expect("a connection").0.write_all(&welcome));
    assert!(matches!(Remote::attach(&path), Err(AttachError::Hello { source: HelloError::Version { theirs: 9 }, .. })));
    answer.join().expect("the other program").expect("an answer");
    std::fs::remove_file(&path).expect("the socket");
}

#[test]
fn a_dead_programs_socket_is_replaced_and_a_living_ones_is_not() {
    let path = path();
    drop(UnixListener::bind(&path).expect("a place for a socket"));
    let program = Arc::new(Program { list: WatchList::new(), objects: vec![1] });
    let server = Server::listen(&path, Arc::downgrade(&program)).expect("nobody answers there");
    assert!(matches!(Server::listen(&path, Arc::downgrade(&program)), Err(ListenError::InUse(_))));
    assert_eq!(attach(&path).1, [1]);
    drop(server);
    assert!(!path.exists());
}

#[test]
fn hellos_of_random_bytes_are_refused_and_never_panic() {
    let mut random = 0x1234_5678_9abc_def0_u64;
    let mut sound = 0;
    for _ in 0..200_000 {
        let mut bytes = Welcome::No(0).to_bytes();
        for _ in 0..4 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            bytes[(random >> 32) as usize % WELCOME_LEN] = (random >> 56) as u8;
        }
        let len = (random >> 40) as usize % (WELCOME_LEN + 1);
        let _ = (Greeting::from_bytes(&bytes[..len]), Welcome::from_bytes(&bytes[..len]));
        if let Ok(Welcome::Yes { slots, limit, .. }) = Welcome::from_bytes(&bytes) {
            assert!(slots.is_power_of_two() && (1..=slots).contains(&limit));
            sound += 1;
        }
        for record in records(&bytes) {
            let _ = record.map(|record| (record.note(), record.tag()));
        }
    }
    assert!(sound > 0, "some of the bytes must get past the first check");
}

/// The ways of an enemy, each played by a process of its own.
const ENEMIES: [&str; 8] = ["scribble", "remap", "rouse", "flood", "stall", "crowd", "leave", "die"];
const ROLE: &str = "PINFOLD_TEST_ENEMY";

#[test]
fn an_enemy_reader_harms_nobody_but_itself() {
    if let Ok(role) = std::env::var(ROLE) {
        let (enemy, path) = role.split_once(':').expect("an enemy and a path");
        return play(enemy, Path::new(path));
    }
    let (program, server) = serve(vec![1, 2, 3], Offer::default().records(64).readers(64));
    let (honest, _) = attach(server.path());
    for enemy in ENEMIES {
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["an_enemy_reader_harms_nobody_but_itself", "--exact", "--nocapture"])
            .env(ROLE, format!("{enemy}:{}", server.path().display()))
            .spawn()
            .expect("a process");
        let mut posted = 0;
        let status = loop {
            // Many at a time, so that an enemy's ring is full and comes round, and the honest reader's never is.
            for _ in 0..32 {
                program.list.post(0, &numbered(posted));
                posted += 1;
            }
            for want in posted - 32..posted {
                assert_eq!(number(&next(&honest)), Some(want), "{enemy}");
            }
            if let Some(status) = ended(&mut child) {
                break status;
            }
        };
        assert!(status.success() || enemy == "die", "{enemy}: {status}");
        assert_eq!(honest.lost(), 0, "{enemy}");
    }
    // Whoever has gone is gone: all the places are free again.
    let _others = (0..63).map(|_| attach(server.path())).collect::<Vec<_>>();
}

fn ended(child: &mut Child) -> Option<std::process::ExitStatus> {
    child.try_wait().expect("our own child")
}

/// What a reader is given.
struct Given {
    connection: UnixStream,
    records: OwnedFd,
    position: OwnedFd,
    slots: u64,
}

const RECORDS_AT: usize = 256;
const SLOT: usize = 192;

fn greet(path: &Path) -> Given {
    let mut connection = UnixStream::connect(path).expect("an offer");
    connection.write_all(&Greeting::default().to_bytes()).expect("a greeting");
    let mut bytes = [0; WELCOME_LEN];
    let mut space = nix::cmsg_space!([RawFd; 2]);
    let mut slices = [std::io::IoSliceMut::new(&mut bytes)];
    let message =
        recvmsg::<()>(connection.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::empty()).expect("an answer");
    let fds = message.cmsgs().expect("whole messages").find_map(|control| match control {
        ControlMessageOwned::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fds = fds.expect("descriptors");
    // SAFETY: the kernel has just put these descriptors into this process for us.
    let [records, position] = [fds[0], fds[1]].map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    let Ok(Welcome::Yes { slots, .. }) = Welcome::from_bytes(&bytes) else { panic!("not welcome") };
    Given { connection, records, position, slots }
}

/// The position's page, writable.
fn position(given: &Given) -> &'static [AtomicU64; 32] {
    let len = std::num::NonZeroUsize::new(256).expect("not zero");
    let both = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: without MAP_FIXED the kernel chooses a free place. The mapping is never undone, so it is static.
    let start = unsafe { mmap(None, len, both, MapFlags::MAP_SHARED, &given.position, 0) }.expect("our own page");
    // SAFETY: the mapping is page-aligned and 256 bytes long; atomics may be written by anybody.
    unsafe { start.cast().as_ref() }
}

/// Some thousand turns of mischief, while the program posts.
fn turns() -> impl Iterator<Item = u64> {
    let mut random = 88_172_645_463_325_252_u64;
    (0..20_000).map(move |_| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    })
}

fn play(enemy: &str, path: &Path) {
    match enemy {
        "scribble" => {
            let given = greet(path);
            let words = position(&given);
            for random in turns() {
                // Absurd ones, and ones that look right: ahead, behind, a whole lap off.
                let near = words[0].load(Ordering::Relaxed).wrapping_add(random % 513).wrapping_sub(256);
                words[0].store(if random % 3 == 0 { random } else { near }, Ordering::Relaxed);
                words[(random >> 8) as usize % 32].store(random, Ordering::Relaxed);
            }
        }
        "remap" => remap(&greet(path)),
        "rouse" => {
            // Asks for a wake-up all the time, never takes one, and makes its end block.
            let given = greet(path);
            fcntl(&given.connection, FcntlArg::F_SETFL(OFlag::empty())).expect("our own flags");
            let words = position(&given);
            for random in turns() {
                words[16].store(random, Ordering::Relaxed);
            }
        }
        "flood" => {
            let mut given = greet(path);
            // The program ends the connection; until then it may take what it likes.
            while given.connection.write_all(&[0xff; 4096]).is_ok() {}
        }
        "stall" => {
            // Connections that say a little and then nothing; the program forgets them.
            let stalled = (0..30).map(|len| {
                let mut connection = UnixStream::connect(path).expect("an offer");
                connection.write_all(&Greeting::default().to_bytes()[..len % 16]).expect("the beginning of a greeting");
                connection
            });
            for mut connection in stalled.collect::<Vec<_>>() {
                assert_eq!(connection.read(&mut [0; 64]).expect("the end"), 0);
            }
        }
        "crowd" => {
            let crowd = (0..200).map(|_| UnixStream::connect(path)).collect::<Vec<_>>();
            assert!(crowd.iter().filter(|connection| connection.is_ok()).count() > 0);
        }
        "leave" => {
            for _ in 0..20 {
                let given = greet(path);
                drop(given.records);
                drop(given.position);
                given.connection.shutdown(std::net::Shutdown::Both).expect("our own end");
            }
        }
        "die" => {
            let given = greet(path);
            position(&given)[0].store(u64::MAX, Ordering::Relaxed);
            std::process::abort();
        }
        other => panic!("no enemy plays {other}"),
    }
}

/// Tries everything that would let it write the records, or pull the ground from under the program.
fn remap(given: &Given) {
    let len = RECORDS_AT + given.slots as usize * SLOT;
    let size = std::num::NonZeroUsize::new(len).expect("not zero");
    let both = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let reopen = |fd: &OwnedFd| {
        std::fs::OpenOptions::new().read(true).write(true).open(format!("/proc/self/fd/{}", fd.as_raw_fd()))
    };
    let writable = reopen(&given.records).expect("a memory file of this user");
    for file in [given.records.as_fd(), writable.as_fd()] {
        // SAFETY: without MAP_FIXED the kernel chooses a free place.
        let mapped = unsafe { mmap(None, size, both, MapFlags::MAP_SHARED, file, 0) };
        assert_eq!(mapped.expect_err("sealed"), nix::errno::Errno::EPERM);
        // SAFETY: as above.
        let mapped = unsafe { mmap(None, size, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, file, 0) }.expect("a look");
        // SAFETY: the mapping is ours, and no reference into it exists.
        unsafe { mprotect(mapped, len, both) }.expect_err("sealed");
        nix::unistd::write(file, &[0xff; 64]).expect_err("sealed");
        fallocate(file, FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, 4096)
            .expect_err("sealed");
    }
    for file in [&given.records, &given.position] {
        for len in [0, 1, 1 << 30] {
            nix::unistd::ftruncate(file, len).expect_err("sealed");
        }
        fcntl(file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).expect_err("sealed");
    }
    // The one thing left: holes in its own page.
    for _ in 0..1000 {
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&given.position, hole, 0, 4096).expect("its own page");
    }
}
