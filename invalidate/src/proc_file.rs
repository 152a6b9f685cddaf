//! A file of `/proc/self` that is asked again and again: opened once, as opening costs four times what asking does, and takes a descriptor.
//!
//! Such a descriptor speaks of the process that opened it, also in a forked child's hands. So a child, which is recognised
//! by its cleared mark, opens the file for each question.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::OnceLock;

use crate::fork::ForkMark;

pub(crate) struct ProcFile {
    path: &'static str,
    kept: OnceLock<(ForkMark, File)>,
}

impl ProcFile {
    pub(crate) const fn new(path: &'static str) -> Self {
        Self { path, kept: OnceLock::new() }
    }

    /// The file, if it was asked before by this process, and not by the one that forked it.
    pub(crate) fn kept(&self) -> Option<&File> {
        self.kept.get().filter(|(mark, _)| !mark.is_child()).map(|(_, file)| file)
    }

    /// Asks `question` of the calling process's file.
    pub(crate) fn ask<R>(&self, question: impl FnOnce(BorrowedFd<'_>) -> io::Result<R>) -> io::Result<R> {
        match self.kept.get() {
            Some((mark, file)) if !mark.is_child() => question(file.as_fd()),
            // The standard library opens with O_CLOEXEC.
            Some(_) => question(File::open(self.path)?.as_fd()),
            None => {
                // If another thread is faster, this file is closed again.
                let _ = self.kept.set((ForkMark::new(), File::open(self.path)?));
                self.ask(question)
            }
        }
    }
}
