//! The smallest executor.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;
use std::time::Duration;

use super::wait_until;

/// Wakes the thread that waits, and remembers that it has.
struct Alarm(thread::Thread, AtomicBool);

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        self.1.store(true, Ordering::SeqCst);
        self.0.unpark();
    }
}

/// Polls when it was woken, and only then.
pub fn block_on<F: Future>(future: F) -> F::Output {
    let alarm = Arc::new(Alarm(thread::current(), AtomicBool::new(false)));
    let waker = Waker::from(Arc::clone(&alarm));
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return output;
        }
        wait_until("the wake-up", || {
            thread::park_timeout(Duration::from_millis(100));
            alarm.1.swap(false, Ordering::SeqCst)
        });
    }
}
