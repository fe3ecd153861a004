//! The eventfds that frontends hand over: kick, call and err.
//!
//! A frontend can hand over any descriptor. One that is not an eventfd is refused: reading `/dev/zero` for kicks would
//! never end, and writing to a file or a full pipe for calls could destroy something or block. So is an eventfd that
//! counts as a semaphore: it is ready again after each read, and its count can keep a thread at work for centuries.
//!
//! What is not decided here: whether it blocks. All who share it can change that at any time, so it is read by a ring,
//! which waits without a thread, and signalled by a [`crate::image::Bell`], which never waits.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

/// An eventfd of the frontend's.
#[derive(Clone, Debug)]
pub(super) struct EventFd {
    file: Arc<File>,
}

impl EventFd {
    /// Takes a descriptor that a frontend sent.
    ///
    /// # Errors
    /// When it is not an eventfd that counts, or nobody can tell.
    pub(super) fn from_frontend(file: File) -> io::Result<EventFd> {
        let refused = |what| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        let number = file.as_raw_fd();
        if std::fs::read_link(format!("/proc/self/fd/{number}"))?.as_os_str() != "anon_inode:[eventfd]" {
            return refused("the descriptor is not an eventfd");
        }
        // Kernels before 6.5 do not say so; such a kick is found out by its kicks that are in vain.
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}"))?;
        let is_semaphore = |line: &str| line.strip_prefix("eventfd-semaphore:").is_some_and(|is| is.trim() != "0");
        if info.lines().any(is_semaphore) {
            return refused("the descriptor is an eventfd in semaphore mode");
        }
        Ok(EventFd { file: Arc::new(file) })
    }

    /// The descriptor.
    pub(super) fn file(&self) -> &Arc<File> {
        &self.file
    }
}
