//! Images: containers of bytes at positions, and the ring that moves those bytes.
//!
//! What always holds:
//! - A buffer given to an operation stays with [`IoQueue`] until the kernel has finished with it, and so does the file,
//!   even when the future that waits for it is dropped.
//! - A transfer that moved fewer bytes than asked for is continued or reported, never called done.
//! - A failed sync poisons the image: later syncs and writes fail too (the kernel may have dropped
//!   the dirty pages, so a second `fsync` that says yes would be a lie).
//!
//! What this room does not know: blocks, versions, guests. Positions are byte offsets.

mod bell;
mod budget;
mod buffer;
mod error;
mod executor;
mod file;
mod inline;
mod join;
mod lock;
mod probe;
mod queue;
mod transfer;
mod unsynced;

pub use bell::Bell;
pub use budget::{Budget, Share};
pub use buffer::{AlignedBuf, GuestBuf, GuestPin, IoBuf, IoSegment, PAGE_BYTES};
pub use error::{ImageError, ImageErrorKind, ImageOp};
pub use executor::{Executor, RemoteWaker, block_on};
pub use file::{Direct, FileImage, ImageOptions};
pub use join::join_all;
pub use lock::LockMode;
pub use probe::{SYSCTL, probe_ring};
pub use queue::{Completed, Completion, IoQueue, OpKind, OpTicket, RingOptions};
pub use transfer::{
    needs_sync, read_by_copy, read_exact_at, release_range, sync, try_release_range, write_all_at, zero_range,
};
pub use unsynced::Unsynced;

use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// A position in an image, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct ByteOffset(pub u64);

impl ByteOffset {
    /// This position moved forward by `bytes`.
    ///
    /// # Panics
    /// When the result does not fit; callers hold positions that were checked against a capacity.
    #[must_use]
    #[allow(clippy::should_implement_trait)]
    pub fn add(self, bytes: u64) -> ByteOffset {
        ByteOffset(self.0.checked_add(bytes).expect("offset was checked against the capacity"))
    }
}

impl fmt::Display for ByteOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What an image asks of the transfers on it, in bytes. All are powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Offsets and lengths must be multiples of this (512 or 4096 with `O_DIRECT`, 1 without).
    pub offset_bytes: u32,
    /// Buffer addresses must be multiples of this.
    pub memory_bytes: u32,
}

/// Bytes at positions. Implemented by files and block devices here, and by simulated images in the tests.
///
/// An operation is started with [`Image::start`] on the calling worker's [`IoQueue`] and is finished by
/// that queue. An implementation may start it on the queue's ring, or keep the [`OpTicket`] and finish it
/// itself later; nothing else differs between a real and a simulated image.
pub trait Image: Send + Sync + 'static {
    /// The size in bytes.
    fn size_bytes(&self) -> u64;

    /// What transfers must be aligned to.
    fn alignment(&self) -> Alignment;

    /// Starts one operation; the answer arrives through the ticket's queue.
    fn start(&self, queue: &IoQueue, ticket: OpTicket);

    /// Where the bytes are, for messages.
    fn path(&self) -> &Path;

    /// The first position at or after `from` where there may be anything but zeros, or the size; None if the container cannot
    /// tell. Blocks the thread for a moment.
    fn next_data(&self, _from: ByteOffset) -> Option<ByteOffset> {
        None
    }

    /// Makes it at least `size_bytes` large, durably; what is new reads as zeros, or on a block device, which must have grown
    /// already, as what is there. Blocks the thread.
    ///
    /// # Errors
    /// When it cannot have exactly that size, or the system refuses.
    fn grow(&self, _size_bytes: u64) -> Result<(), ImageError> {
        Err(ImageError::new(ImageErrorKind::Unsuitable, ImageOp::Open, self.path(), "it cannot grow"))
    }

    /// Says that the file has another name now. It can be said once.
    fn moved(&self, _path: &Path) {}

    /// Whether an earlier failed sync has poisoned this image.
    fn is_poisoned(&self) -> bool;

    /// Marks the image as failed: every later write and sync fails.
    fn poison(&self);

    /// What was written and not synced. None if that is not known: then there is always something.
    fn unsynced(&self) -> Option<&Unsynced> {
        None
    }

    /// Bytes of storage in use (not the size), if the container can tell.
    fn allocated_bytes(&self) -> Option<u64> {
        None
    }
}

/// A shared image.
pub type SharedImage = Arc<dyn Image>;
