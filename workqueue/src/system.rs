//! The queues that a process shares.

use std::sync::OnceLock;

use crate::{
    Error,
    pool::Pool,
    queue::{Flags, Queue},
};

/// Made when first asked for, and never ended: a static is not dropped.
static SHARED: OnceLock<(Queue, Queue, Queue)> = OnceLock::new();
static HIGH: OnceLock<Queue> = OnceLock::new();

fn shared() -> Result<&'static (Queue, Queue, Queue), Error> {
    if let Some(queues) = SHARED.get() {
        return Ok(queues);
    }
    let pool = Pool::builder("wq-system").build()?;
    let normal = pool.queue("system", Flags::NONE, 0)?;
    let long = pool.queue("system_long", Flags::MAY_SLEEP, 0)?;
    let unbound = pool.queue("system_unbound", Flags::UNBOUND, 0)?;
    Ok(SHARED.get_or_init(|| (normal, long, unbound)))
}

/// The queue for short work.
///
/// # Errors
/// Those of [`PoolBuilder::build`](crate::PoolBuilder::build), the first time.
pub fn system() -> Result<&'static Queue, Error> {
    Ok(&shared()?.0)
}

/// The queue for work that takes long because it sleeps; it counts against the may-sleep limit.
///
/// # Errors
/// As [`system`].
pub fn system_long() -> Result<&'static Queue, Error> {
    Ok(&shared()?.1)
}

/// The queue for work that starts as soon as a worker can be had.
///
/// # Errors
/// As [`system`].
pub fn system_unbound() -> Result<&'static Queue, Error> {
    Ok(&shared()?.2)
}

/// The queue whose workers have the best priority the process may get.
///
/// # Errors
/// As [`system`].
pub fn system_highpri() -> Result<&'static Queue, Error> {
    if let Some(queue) = HIGH.get() {
        return Ok(queue);
    }
    let queue = Queue::new("wq-highpri", Flags::HIGHPRI, 0)?;
    Ok(HIGH.get_or_init(|| queue))
}
