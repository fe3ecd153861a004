//! What frontends hand over to be kicked by and to be signalled: kick, call and err.
//!
//! A frontend can hand over any descriptor. Most are eventfds; Linux' own virtio_uml has pairs of sockets, and others pipes,
//! of which each kick or call is eight bytes. Everything else is refused: reading `/dev/zero` for kicks would never end, and
//! writing to a file for calls could destroy something. So is an eventfd that counts as a semaphore: it is ready again after
//! each read, and its count can keep a thread at work for centuries.
//!
//! What always holds: signalling never waits, and waiting takes no thread. Whether a descriptor blocks is not asked, since
//! all who share it can change that at any time: an eventfd is signalled by a [`Bell`], a socket by a call that does not
//! wait, and a pipe is opened anew, so that its flags are ours.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::net::{AddressFamily, SendFlags};

use crate::image::Bell;

/// Something that the frontend signals, or that is signalled.
#[derive(Clone, Debug)]
pub(super) struct Event {
    file: Arc<File>,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Counter,
    Pipe,
    Socket,
}

impl Event {
    /// Takes a descriptor that kicks come from.
    ///
    /// # Errors
    /// When it is none that can be waited for, or nobody can tell.
    pub(super) fn to_wait_for(file: File) -> io::Result<Event> {
        Event::new(file, false)
    }

    /// Takes a descriptor that is to be signalled.
    ///
    /// # Errors
    /// When it is none that can be signalled without waiting, or nobody can tell.
    pub(super) fn to_signal(file: File) -> io::Result<Event> {
        Event::new(file, true)
    }

    fn new(file: File, is_written: bool) -> io::Result<Event> {
        let refused = |what| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        let is_type = file.metadata()?.file_type();
        if is_type.is_fifo() {
            return Ok(Event { file: Arc::new(own_end(&file, is_written)?), kind: Kind::Pipe });
        }
        if is_type.is_socket() {
            if rustix::net::sockopt::socket_domain(&file)? != AddressFamily::UNIX {
                return refused("the descriptor is a socket of another kind than Unix sockets");
            }
            return Ok(Event { file: Arc::new(file), kind: Kind::Socket });
        }
        let number = file.as_raw_fd();
        if std::fs::read_link(format!("/proc/self/fd/{number}"))?.as_os_str() != "anon_inode:[eventfd]" {
            return refused("the descriptor is neither an eventfd nor a pipe or Unix socket");
        }
        // Kernels before 6.5 do not say so; such a kick is found out by its kicks that are in vain.
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}"))?;
        let is_semaphore = |line: &str| line.strip_prefix("eventfd-semaphore:").is_some_and(|is| is.trim() != "0");
        if info.lines().any(is_semaphore) {
            return refused("the descriptor is an eventfd in semaphore mode");
        }
        Ok(Event { file: Arc::new(file), kind: Kind::Counter })
    }

    /// The descriptor to wait for.
    pub(super) fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Signals it. What is full is left as it is: who reads it is awake anyway.
    ///
    /// # Errors
    /// When the other end is gone, or the system refuses.
    pub(super) fn signal(&self, bell: &mut Option<Bell>) -> io::Result<()> {
        let one = 1u64.to_ne_bytes();
        let sent = match self.kind {
            Kind::Counter => {
                return match bell {
                    Some(bell) => bell.ring(&self.file),
                    None => Bell::new().and_then(|new| bell.insert(new).ring(&self.file)),
                };
            }
            Kind::Pipe => rustix::io::write(&*self.file, &one),
            Kind::Socket => rustix::net::send(&*self.file, &one, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
        };
        match sent {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

/// The same end of a pipe with flags of our own: one to read from waits, one to write to does not.
fn own_end(pipe: &File, is_written: bool) -> io::Result<File> {
    let mode = rustix::fs::fcntl_getfl(pipe)? & OFlags::ACCMODE;
    let other = if is_written { OFlags::RDONLY } else { OFlags::WRONLY };
    if mode == other {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the descriptor is the wrong end of a pipe"));
    }
    // Opened so that it does not wait for somebody at the other end.
    let own = OpenOptions::new()
        .read(!is_written)
        .write(is_written)
        .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open(format!("/proc/self/fd/{}", pipe.as_raw_fd()))?;
    if !is_written {
        rustix::fs::fcntl_setfl(&own, rustix::fs::fcntl_getfl(&own)? & !OFlags::NONBLOCK)?;
    }
    Ok(own)
}
