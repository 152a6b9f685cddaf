//! What is measured, a file for each group.

pub(crate) mod bandwidth;
pub(crate) mod dmabuf;
pub(crate) mod frame;
pub(crate) mod import;
pub(crate) mod index;
pub(crate) mod invalidate;
pub(crate) mod limits;
pub(crate) mod mirror;
pub(crate) mod pin;
pub(crate) mod submit;
pub(crate) mod watch;
pub(crate) mod workqueue;
