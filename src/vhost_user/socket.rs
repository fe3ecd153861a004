//! The listening socket in the file system.
//!
//! What always holds: the socket is never accessible to other users, not even for a moment; nothing but the stale socket
//! of a dead process is ever replaced; on removal only the socket that was made here goes.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// A listening socket that was made here. Dropping it removes the name.
#[derive(Debug)]
pub(super) struct BoundSocket {
    pub(super) listener: UnixListener,
    // None for a socket that somebody else made.
    name: Option<Arc<SocketName>>,
}

/// Where a socket is that was made here, and which one it is.
#[derive(Debug)]
pub(super) struct SocketName {
    path: Mutex<PathBuf>,
    dev: u64,
    ino: u64,
}

impl SocketName {
    fn is_at(&self, path: &Path) -> bool {
        fs::symlink_metadata(path).is_ok_and(|m| m.dev() == self.dev && m.ino() == self.ino)
    }

    /// Gives the socket another place in the same file system. Who is connected, or was about to be, does not notice.
    ///
    /// # Errors
    /// When something else is at `to`, or a live process listens there, or the system refuses.
    pub(super) fn move_to(&self, to: &Path) -> io::Result<()> {
        let mut path = self.path.lock().unwrap_or_else(PoisonError::into_inner);
        if *path == to {
            return Ok(());
        }
        if !self.is_at(&path) {
            return Err(with_path(&path, "the socket is not there any more"));
        }
        clear_stale(to)?;
        rustix::fs::renameat_with(rustix::fs::CWD, &*path, rustix::fs::CWD, to, rustix::fs::RenameFlags::NOREPLACE)
            .map_err(|e| with_path(to, &format!("the socket cannot be moved there: {e}")))?;
        to.clone_into(&mut path);
        Ok(())
    }
}

impl BoundSocket {
    /// Makes a socket with mode 0600 at `path`.
    ///
    /// # Errors
    /// When something else is at `path`, or a live process listens there, or the system refuses.
    pub(super) fn bind(path: &Path) -> io::Result<BoundSocket> {
        clear_stale(path)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // On Linux the name gets the mode of the socket, so it is never accessible to others (unlike chmod after bind).
        rustix::fs::fchmod(&socket, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)?;
        let address = SocketAddrUnix::new(path).map_err(|_| with_path(path, "the path is too long for a socket"))?;
        rustix::net::bind(&socket, &address).map_err(|e| with_path(path, &format!("cannot make the socket: {e}")))?;
        let meta = fs::symlink_metadata(path)?;
        let name = SocketName { path: Mutex::new(path.to_owned()), dev: meta.dev(), ino: meta.ino() };
        let bound = BoundSocket { listener: UnixListener::from(socket), name: Some(Arc::new(name)) };
        rustix::net::listen(&bound.listener, BACKLOG)?;
        Ok(bound)
    }

    /// Takes over a socket that already listens.
    ///
    /// # Errors
    /// When it is not a socket.
    pub(super) fn adopt(fd: OwnedFd) -> io::Result<BoundSocket> {
        let listener = UnixListener::from(fd);
        listener.local_addr()?;
        listener.set_nonblocking(true)?;
        Ok(BoundSocket { listener, name: None })
    }

    /// Where it is, if it was made here.
    pub(super) fn name(&self) -> Option<Arc<SocketName>> {
        self.name.clone()
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        let Some(name) = &self.name else { return };
        let path = name.path.lock().unwrap_or_else(PoisonError::into_inner);
        if name.is_at(&path)
            && let Err(e) = fs::remove_file(&*path)
        {
            log::warn!("cannot remove the socket {}: {e}", path.display());
        }
    }
}

/// Removes the socket that a dead process left behind.
///
/// # Errors
/// When something else is at `path`, or a live process listens there, or the system refuses.
pub fn clear_stale(path: &Path) -> io::Result<()> {
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(with_path(path, &e.to_string())),
    };
    if !meta.file_type().is_socket() {
        return Err(with_path(
            path,
            "something that is not a socket is already there; remove it or choose another path",
        ));
    }
    match probe(path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        // One that accepts nobody has a full backlog: it is in use all the same.
        Ok(()) => Err(with_path(path, "another process is listening on this socket")),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
            Err(with_path(path, "another process is listening on this socket"))
        }
        Err(e) => Err(with_path(path, &format!("cannot tell whether this socket is in use: {e}"))),
    }
}

/// Connects without waiting.
fn probe(path: &Path) -> io::Result<()> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    drop(UnixStream::from(socket));
    Ok(())
}

fn with_path(path: &Path, what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::AddrInUse, format!("{}: {what}", path.display()))
}
