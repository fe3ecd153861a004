//! What frontends hand over to be kicked by and to be signalled: kick, call and err.
//!
//! A frontend can hand over any descriptor. Most are eventfds; Linux' own virtio_uml is called by a pair of sockets, and
//! others by a pipe, of which each call is eight bytes. Everything else is refused: writing to a file for calls could destroy
//! something. So is an eventfd that counts as a semaphore: it is ready again after each read, and its count can keep a thread
//! at work for centuries. Kicks come from eventfds only: who reads a pipe or a socket waits, whatever its flags say, while
//! another one reads it into memory that does not answer.
//!
//! What always holds: waiting takes no thread, and signalling does not wait for room. Whether a descriptor blocks is not
//! asked, since all who share it can change that at any time: an eventfd is signalled by a [`Bell`], a socket by a call that
//! does not wait, and a pipe is opened anew, so that its flags are ours. A pipe can still hold up who writes it, as long as
//! one that reads it has memory that does not answer; that is the frontend's own queue.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::net::{AddressFamily, SendFlags};

use crate::image::Bell;

/// The name of an eventfd.
const COUNTER: &str = "anon_inode:[eventfd]";

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
    /// When it is no eventfd that counts, or nobody can tell.
    pub(super) fn to_wait_for(file: File) -> io::Result<Event> {
        if name_of(&file)? != COUNTER {
            return refused("the descriptor is no eventfd");
        }
        Event::counter(file)
    }

    /// Takes a descriptor that is to be signalled.
    ///
    /// # Errors
    /// When it is none that can be signalled without waiting, or nobody can tell.
    pub(super) fn to_signal(file: File) -> io::Result<Event> {
        // By its name: whoever is asked for more may be a file system that does not answer.
        let name = name_of(&file)?;
        if name == COUNTER {
            return Event::counter(file);
        }
        if name.starts_with("socket:[") && rustix::net::sockopt::socket_domain(&file)? == AddressFamily::UNIX {
            return Ok(Event { file: Arc::new(file), kind: Kind::Socket });
        }
        if name.starts_with("pipe:[") {
            return Ok(Event { file: Arc::new(own_end(&file)?), kind: Kind::Pipe });
        }
        refused("the descriptor is neither an eventfd nor a pipe or Unix socket")
    }

    fn counter(file: File) -> io::Result<Event> {
        // Kernels before 6.5 do not say so; such a kick is found out by its kicks that are in vain.
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?;
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

fn refused<T>(what: &str) -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::InvalidInput, what))
}

/// What the kernel calls a descriptor. A file of this name has a path before it.
fn name_of(file: &File) -> io::Result<String> {
    Ok(std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?.to_string_lossy().into_owned())
}

/// The end of a pipe that is written to, with flags of our own: one that does not wait.
fn own_end(pipe: &File) -> io::Result<File> {
    let flags = rustix::fs::fcntl_getfl(pipe)?;
    if flags.contains(OFlags::PATH) || flags & OFlags::ACCMODE == OFlags::RDONLY {
        return refused("the descriptor is the wrong end of a pipe");
    }
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    OpenOptions::new().write(true).custom_flags(flags).open(format!("/proc/self/fd/{}", pipe.as_raw_fd()))
}
