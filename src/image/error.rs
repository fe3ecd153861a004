//! Errors of images: a stable kind, the context (path, operation, position), and the system's error.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::ByteOffset;

/// What was being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageOp {
    /// Opening or inspecting the container.
    Open,
    /// Reading bytes.
    Read,
    /// Writing bytes.
    Write,
    /// Zeroing a range.
    Zero,
    /// Releasing a range.
    Discard,
    /// Making earlier writes durable.
    Sync,
}

impl fmt::Display for ImageOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ImageOp::Open => "open",
            ImageOp::Read => "read",
            ImageOp::Write => "write",
            ImageOp::Zero => "zero",
            ImageOp::Discard => "discard",
            ImageOp::Sync => "sync",
        })
    }
}

/// The kinds that callers tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageErrorKind {
    /// No space left where the image is stored.
    NoSpace,
    /// Another process (or this one) holds the image.
    InUse,
    /// The size, type or file system does not fit what was asked for.
    Unsuitable,
    /// An earlier sync failed, so nothing more is accepted.
    Poisoned,
    /// Fewer bytes than the image should have.
    Truncated,
    /// Anything else the system reported.
    Io,
}

/// A failed operation on an image.
#[derive(Clone, Debug, thiserror::Error)]
#[error("cannot {op} {}{}: {message}", path.display(), at.map(|a| format!(" at byte {a}")).unwrap_or_default())]
pub struct ImageError {
    /// What callers may decide by.
    pub kind: ImageErrorKind,
    /// What was being done.
    pub op: ImageOp,
    /// On which container.
    pub path: PathBuf,
    /// At which position, where that means something.
    pub at: Option<ByteOffset>,
    /// What is wrong, and what to do about it where that is known.
    pub message: String,
    /// The system's error number, if the system reported it.
    pub errno: Option<i32>,
}

impl ImageError {
    /// An error reported by the system.
    pub fn from_io(op: ImageOp, path: impl Into<PathBuf>, at: Option<ByteOffset>, source: &io::Error) -> ImageError {
        let kind = match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => ImageErrorKind::NoSpace,
            Some(libc::EAGAIN | libc::EBUSY) if op == ImageOp::Open => ImageErrorKind::InUse,
            _ => ImageErrorKind::Io,
        };
        ImageError { kind, op, path: path.into(), at, message: source.to_string(), errno: source.raw_os_error() }
    }

    /// Whether the memory of the transfer may be to blame, and not the image.
    #[must_use]
    pub fn may_be_of_memory(&self) -> bool {
        let of_memory = [libc::EFAULT, libc::ENOMEM, libc::EHWPOISON, libc::EINVAL, libc::EREMOTEIO, libc::EOPNOTSUPP];
        self.errno.is_some_and(|errno| of_memory.contains(&errno))
    }

    /// An error found here.
    pub fn new(kind: ImageErrorKind, op: ImageOp, path: impl Into<PathBuf>, message: impl Into<String>) -> ImageError {
        ImageError { kind, op, path: path.into(), at: None, message: message.into(), errno: None }
    }
}
