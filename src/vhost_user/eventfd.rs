//! The eventfds that frontends hand over: kick, call and err.
//!
//! A frontend can hand over any descriptor. One that is not an eventfd is refused: reading `/dev/zero` for kicks would
//! never end, and writing to a file or a full pipe for calls could destroy something or block.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

/// An eventfd of the frontend's.
#[derive(Debug)]
pub(super) struct EventFd {
    fd: Arc<File>,
}

impl EventFd {
    /// Takes a descriptor that a frontend sent.
    ///
    /// # Errors
    /// When it is not an eventfd.
    pub(super) fn from_frontend(file: File) -> io::Result<EventFd> {
        let fd = Arc::new(file);
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        let is_eventfd = match link {
            Ok(target) => target.as_os_str() == "anon_inode:[eventfd]",
            // Without /proc, at least no file, device, socket or pipe: those have a type.
            Err(_) => rustix::fs::fstat(&fd)?.st_mode & libc::S_IFMT == 0,
        };
        if !is_eventfd {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the descriptor is not an eventfd"));
        }
        Ok(EventFd { fd })
    }

    /// The descriptor.
    pub(super) fn file(&self) -> &Arc<File> {
        &self.fd
    }

    /// Adds one to the count.
    pub(super) fn signal(&self) {
        // A blocking eventfd whose count is full would block us; such a count wakes the frontend anyway.
        let mut poll = [rustix::event::PollFd::new(&*self.fd, rustix::event::PollFlags::OUT)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let written = match rustix::event::poll(&mut poll, Some(&now)) {
            Ok(1..) => rustix::io::write(&*self.fd, &1u64.to_ne_bytes()).map(drop),
            Ok(_) => Ok(()),
            Err(e) => Err(e),
        };
        if let Err(e) = written
            && e != rustix::io::Errno::AGAIN
        {
            log::debug!("cannot signal the frontend: {e}");
        }
    }
}
