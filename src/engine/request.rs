//! What a guest asks for, after validation.

use crate::image::{ByteOffset, GuestBuf, ImageError};

/// One validated request: inside the disk, and a multiple of 512 bytes in position and length.
#[derive(Debug)]
pub enum Request {
    /// Fill the guest's memory.
    Read {
        /// From where.
        at: ByteOffset,
        /// Into where.
        into: GuestBuf,
    },
    /// Store the guest's memory.
    Write {
        /// To where.
        at: ByteOffset,
        /// From where.
        from: GuestBuf,
        /// Complete only when on stable storage (writethrough).
        durable: bool,
    },
    /// Make everything acknowledged before durable.
    Flush,
    /// The guest does not need these bytes any more.
    Discard {
        /// From where.
        at: ByteOffset,
        /// How many bytes.
        len: u64,
    },
    /// Make these bytes zero.
    WriteZeroes {
        /// From where.
        at: ByteOffset,
        /// How many bytes.
        len: u64,
        /// Whether the storage may be given back.
        unmap: bool,
        /// Complete only when on stable storage.
        durable: bool,
    },
}

/// Why a request failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum RequestError {
    /// It leaves the disk, or is not a multiple of a sector.
    #[error("bytes {at}..{} are not whole sectors of a disk of {size} bytes", at.0.saturating_add(*len))]
    OutOfRange {
        /// Where it begins.
        at: ByteOffset,
        /// Its length in bytes.
        len: u64,
        /// The disk's size in bytes.
        size: u64,
    },
    /// A change to a disk or version that does not change.
    #[error("the disk is read-only")]
    ReadOnly,
    /// The version is broken; its content cannot be vouched for.
    #[error("the snapshot is broken: {0}")]
    Broken(String),
    /// The image below failed.
    #[error(transparent)]
    Image(#[from] ImageError),
}
