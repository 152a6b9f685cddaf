//! Where the kernel refuses `membarrier`, posts and reads fence for themselves: every record is heard of all the same. A program of its own, as the refusal is
//! the process's, and for good. What it finds is a step that is forgotten on the way that such posts take; the orders of the steps are for the models.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use pinfold_core::watch::{
    FilterEntry, ReadError, Record, Scope, TYPE_DMABUF, TYPE_WORK, WatchConfig, WatchList, WatchQueue,
};

const ROUNDS: u64 = 20_000;
/// Far more than any round takes: who waits that long wasn't woken.
const LIMIT: Duration = Duration::from_secs(20);

/// Lets `membarrier` fail in this thread, and in all that it starts.
fn refuse_membarrier() -> std::io::Result<()> {
    let allow = libc::SECCOMP_RET_ALLOW;
    let refuse = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    let number = std::mem::offset_of!(libc::seccomp_data, nr) as u32;
    let step = |code: u32, jt, k| libc::sock_filter { code: code as u16, jt, jf: 0, k };
    let mut steps = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, number),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, libc::SYS_membarrier as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, allow),
        step(libc::BPF_RET | libc::BPF_K, 0, refuse),
    ];
    let program = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    // SAFETY: the call takes integers.
    let alone = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    // SAFETY: `program` and its steps live, and are not written, until the call returns.
    let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    if alone == 0 && set == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

fn numbered(number: u64) -> Record {
    Record::new(TYPE_WORK, 0, 0, &number.to_ne_bytes()).expect("a short record")
}

#[test]
fn without_membarrier_each_post_wakes_its_sleeper_and_each_reader_gets_its_turn() {
    let (list, queue) = (WatchList::new(), WatchQueue::new(WatchConfig::default()).expect("a queue"));
    list.add_watch(&queue, Scope::All, 0).expect("the first watch");
    // The process is registered, and this thread has a seat, when the refusal comes.
    list.post(0, &numbered(0));
    assert_eq!(queue.records().count(), 1);
    if let Err(error) = refuse_membarrier() {
        println!(
            "SKIP without_membarrier_each_post_wakes_its_sleeper_and_each_reader_gets_its_turn: no seccomp: {error}"
        );
        return;
    }
    queue.set_filter(Some(&[FilterEntry::all_of(TYPE_DMABUF)])).expect("a sound filter");
    list.post(0, &numbered(0));
    assert_eq!((queue.read(&mut [0; 64]), queue.counters().filtered), (Err(ReadError::Empty), 1));
    queue.set_filter(None).expect("no filter");

    // One reader, which looks for the next record and falls asleep while it is posted. Then two, of which one may have to wait for the other's turn.
    let taken = AtomicU64::new(0);
    let read = || {
        // Room for one.
        while queue.read_timeout(&mut [0; 16], Some(LIMIT)).expect("a wake-up in time") > 0 {
            taken.fetch_add(1, Ordering::Relaxed);
        }
    };
    thread::scope(|scope| {
        let mut readers = vec![scope.spawn(read)];
        for number in 0..ROUNDS {
            if number == ROUNDS / 2 {
                readers.push(scope.spawn(read));
            }
            list.post(0, &numbered(number));
            let mut looks = 0_u32;
            while taken.load(Ordering::Relaxed) <= number && !readers.iter().any(|reader| reader.is_finished()) {
                looks += 1;
                if looks.is_multiple_of(256) { thread::yield_now() } else { std::hint::spin_loop() }
            }
        }
        queue.clear();
    });
    assert_eq!((taken.into_inner(), queue.counters().lost), (ROUNDS, 0));
}
