//! The Unix socket of the control server: making it, and knowing who is on it.
//!
//! Invariants: the socket file has mode 0600 from the instant it exists, whatever the umask; only a socket that nobody
//! answers is ever replaced, never a live one and never a file of another kind (a symlink included); what is removed at
//! the end is the file that was made here and no other. The caller makes the directory.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// The longest path that a Unix socket's address holds.
pub const SOCKET_PATH_LEN_MAX: usize = 107;

const LISTEN_BACKLOG: i32 = 128;
/// How long another start may have the directory locked.
const LOCK_WAIT: Duration = Duration::from_secs(5);
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Why the control socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The path does not fit into a socket address.
    #[error("{} has {} bytes and a socket's path at most {SOCKET_PATH_LEN_MAX}; choose a shorter one", .0.display(), .0.as_os_str().len())]
    TooLong(PathBuf),
    /// Another daemon is there.
    #[error("a daemon already answers at {}; stop it, or choose another path with --control", .0.display())]
    InUse(PathBuf),
    /// Something is there that is no socket.
    #[error("{} exists and is not a socket; remove it, or choose another path with --control", .0.display())]
    NotASocket(PathBuf),
    /// The system refused.
    #[error("cannot {doing} {}: {source}", .path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The file of a socket that listens; dropping it removes the file.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode, so that another daemon's file is not removed.
    identity: (u64, u64),
}

/// Makes a listening socket, taking the place of a dead daemon's. It does not block in accept.
pub(super) fn listen(path: &Path) -> Result<(UnixListener, SocketFile), SocketError> {
    let failed = |doing| move |source: io::Error| SocketError::Io { doing, path: path.to_owned(), source };
    if path.as_os_str().len() > SOCKET_PATH_LEN_MAX {
        return Err(SocketError::TooLong(path.to_owned()));
    }
    // Two daemons that start at once must not both find a dead socket and remove each other's new one.
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let lock = rustix::fs::open(directory, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| failed("open the directory of")(errno.into()))?;
    lock_for_a_while(&lock).map_err(failed("lock the directory of"))?;
    remove_stale(path)?;

    let listener = bind_private(path).map_err(failed("bind"))?;
    let metadata = fs::symlink_metadata(path).map_err(failed("look at"))?;
    let file = SocketFile { path: path.to_owned(), identity: (metadata.dev(), metadata.ino()) };
    if metadata.permissions().mode() & 0o777 != 0o600 {
        return Err(failed("protect")(io::Error::other("its mode is not 0600")));
    }
    rustix::net::listen(&listener, LISTEN_BACKLOG).map_err(|errno| failed("listen on")(errno.into()))?;
    Ok((listener, file))
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = |metadata: fs::Metadata| (metadata.dev(), metadata.ino()) == self.identity;
        if !fs::symlink_metadata(&self.path).is_ok_and(ours) {
            return;
        }
        if let Err(error) = fs::remove_file(&self.path) {
            log::warn!("cannot remove the control socket {}: {error}", self.path.display());
        }
    }
}

/// Another start has it for a moment; whoever has it for longer is no daemon that starts.
fn lock_for_a_while(directory: &OwnedFd) -> io::Result<()> {
    let deadline = Instant::now() + LOCK_WAIT;
    loop {
        match rustix::fs::flock(directory, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => std::thread::sleep(LOCK_PAUSE),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(io::Error::other("another process has held a lock on it for some seconds"));
            }
            done => return Ok(done?),
        }
    }
}

/// Binds with mode 0600. On Linux the file takes the mode of the socket's own inode less the umask, so setting that
/// before binding leaves no window; the umask itself belongs to the whole process and is not ours to change.
fn bind_private(path: &Path) -> io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixListener::from(socket))
}

/// Removes a socket that nobody answers.
fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let failed = |doing| move |source: io::Error| SocketError::Io { doing, path: path.to_owned(), source };
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at")(error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(SocketError::NotASocket(path.to_owned()));
    }
    match probe(path) {
        Ok(()) => Err(SocketError::InUse(path.to_owned())),
        // A full backlog means that somebody listens.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(SocketError::InUse(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            log::info!("replacing the socket {} of a daemon that is gone", path.display());
            fs::remove_file(path).map_err(failed("remove the dead socket"))
        }
        Err(error) => Err(failed("find out who answers at")(error)),
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

/// Whether a peer of this user may use the socket: the daemon's own user and root may.
pub(super) fn peer_allowed(peer_uid: u32, own_uid: u32) -> bool {
    peer_uid == own_uid || peer_uid == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_root_and_ourselves() {
        assert!(peer_allowed(0, 1000));
        assert!(peer_allowed(1000, 1000));
        assert!(!peer_allowed(1001, 1000));
        assert!(!peer_allowed(1000, 0));
    }

    #[test]
    fn another_daemons_file_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let (_listener, file) = listen(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "somebody else's").unwrap();
        drop(file);
        assert!(path.exists());
    }
}
