//! Where a layer's bytes are: in one image, in two that are kept equal, in a pack, or in a frozen version of another disk.
//!
//! The engine moves bytes only through here, so that what is below makes no difference to it. A frozen version is the full
//! image of a volume, whose live version is a log: nothing writes there.

use std::sync::Arc;

use super::geometry::LOGICAL_BLOCK_BYTES;
use super::{Geometry, Pair, View};
use crate::image::{
    Alignment, ByteOffset, ImageError, ImageOp, IoBuf, IoQueue, SharedImage, needs_sync, read_exact_at, release_range,
    sync, write_all_at, zero_range,
};
use crate::store::{Layout, Pack};

const FROZEN: &str = "a frozen version never changes";

/// The bytes of a layer.
#[derive(Clone)]
pub enum Backing {
    /// One image.
    One(SharedImage),
    /// Two legs of a mirror. Writes hold their blocks' locks exclusively.
    Pair(Arc<Pair>),
    /// One image, in which blocks lie as they came. Parts of blocks are written with what is around them.
    Packed(Arc<Pack>),
    /// A frozen version of another disk. Only read.
    View(Arc<View>),
}

impl Backing {
    /// Whether this is the very same place.
    #[must_use]
    pub fn is(&self, other: &Backing) -> bool {
        match (self, other) {
            (Backing::One(one), Backing::One(other)) => Arc::ptr_eq(one, other),
            (Backing::Pair(one), Backing::Pair(other)) => Arc::ptr_eq(one, other),
            (Backing::Packed(one), Backing::Packed(other)) => Arc::ptr_eq(one, other),
            (Backing::View(one), Backing::View(other)) => Arc::ptr_eq(one, other),
            (Backing::One(_) | Backing::Pair(_) | Backing::Packed(_) | Backing::View(_), _) => false,
        }
    }

    /// How blocks lie there.
    #[must_use]
    pub fn layout(&self) -> Layout {
        match self {
            Backing::One(_) | Backing::Pair(_) | Backing::View(_) => Layout::Sparse,
            Backing::Packed(_) => Layout::Packed,
        }
    }

    /// Whether writes must be alone on their blocks.
    #[must_use]
    pub fn excludes(&self) -> bool {
        match self {
            Backing::One(_) | Backing::Packed(_) | Backing::View(_) => false,
            Backing::Pair(_) => true,
        }
    }

    /// Whether it copies what is written to it.
    #[must_use]
    pub fn copies(&self) -> bool {
        self.layout() == Layout::Packed
    }

    /// Its size in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        match self {
            Backing::One(image) => image.size_bytes(),
            Backing::Pair(pair) => pair.size_bytes(),
            Backing::Packed(pack) => pack.size_bytes(),
            Backing::View(view) => view.size_bytes(),
        }
    }

    /// What transfers must be aligned to.
    #[must_use]
    pub fn alignment(&self) -> Alignment {
        match self {
            Backing::One(image) => image.alignment(),
            Backing::Pair(pair) => pair.alignment(),
            Backing::Packed(pack) => Alignment { offset_bytes: pack.block_bytes(), memory_bytes: 1 },
            Backing::View(view) => view.alignment(),
        }
    }

    /// Whether a sync has failed, so that nobody knows what is stored.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        match self {
            Backing::One(image) => image.is_poisoned(),
            Backing::Pair(pair) => pair.is_poisoned(),
            Backing::Packed(pack) => pack.image().is_poisoned(),
            Backing::View(_) => false, // Nothing is stored here.
        }
    }

    /// Whether nobody knows what a write has left that failed, so that what is there is not to be believed as it is.
    #[must_use]
    pub fn is_in_doubt(&self) -> bool {
        match self {
            Backing::One(_) | Backing::Pair(_) | Backing::View(_) => false,
            Backing::Packed(pack) => pack.is_in_doubt(),
        }
    }

    /// Bytes of storage in use, if the container can tell; of a mirror, on one leg.
    #[must_use]
    pub fn allocated_bytes(&self) -> Option<u64> {
        match self {
            Backing::One(image) => image.allocated_bytes(),
            Backing::Pair(pair) => pair.allocated_bytes(),
            Backing::Packed(pack) => pack.image().allocated_bytes(),
            Backing::View(_) => Some(0), // That is the other disk's.
        }
    }

    /// Where it is, for messages.
    #[must_use]
    pub fn path(&self) -> &std::path::Path {
        match self {
            Backing::One(image) => image.path(),
            Backing::Pair(pair) => pair.path(),
            Backing::Packed(pack) => pack.image().path(),
            Backing::View(view) => view.path(),
        }
    }

    /// Whether bytes in these places can be written without those around them.
    #[must_use]
    pub fn takes(&self, at: ByteOffset, len: u64) -> bool {
        let unit = u64::from(self.alignment().offset_bytes);
        // The last block of a pack may be short, as the disk's is.
        let ends = matches!(self, Backing::Packed(_)) && at.0 + len == self.size_bytes();
        at.0.is_multiple_of(unit) && (ends || len.is_multiple_of(unit))
    }

    /// How many of the `len` bytes from `at` on are known to be zeros without being read.
    #[must_use]
    pub fn known_zeros(&self, at: ByteOffset, len: u64) -> u64 {
        match self {
            Backing::One(image) => image.next_data(at).map_or(0, |data| data.0.saturating_sub(at.0).min(len)),
            Backing::Pair(_) => 0,
            Backing::Packed(pack) => pack.known_zeros(at, len),
            Backing::View(view) => view.known_zeros(at, len),
        }
    }

    // What a mirror or a pack does is boxed below: every request's future would carry the room for it.

    /// Fills `buf` from `at` on. Gives the buffer back.
    ///
    /// # Errors
    /// When the image refuses or is too short.
    pub async fn read(&self, queue: &IoQueue, at: ByteOffset, buf: IoBuf) -> Result<IoBuf, ImageError> {
        match self {
            Backing::One(image) => read_exact_at(&**image, queue, at, buf).await,
            Backing::Pair(pair) => Box::pin(pair.read(queue, at, buf)).await,
            Backing::Packed(pack) => Box::pin(pack.read(queue, at, buf)).await,
            Backing::View(view) => view.read(queue, at, buf).await,
        }
    }

    /// Stores all of `buf`; with `durable`, on stable storage.
    ///
    /// # Errors
    /// When the image refuses.
    pub async fn write(&self, queue: &IoQueue, at: ByteOffset, buf: IoBuf, durable: bool) -> Result<(), ImageError> {
        match self {
            Backing::One(image) => write_all_at(&**image, queue, at, buf, durable).await,
            Backing::Pair(pair) => Box::pin(pair.write(queue, at, buf, durable)).await,
            Backing::Packed(pack) => Box::pin(pack.write(queue, at, buf, durable)).await,
            Backing::View(view) => Err(view.refusal(ImageOp::Write, FROZEN)),
        }
    }

    /// Makes a range zero; `unmap` gives its storage back where that can be done.
    ///
    /// # Errors
    /// When the image refuses.
    pub async fn zero(&self, queue: &IoQueue, at: ByteOffset, len: u64, unmap: bool) -> Result<(), ImageError> {
        match self {
            Backing::One(image) => zero_range(&**image, queue, at, len, unmap).await,
            Backing::Pair(pair) => Box::pin(pair.zero(queue, at, len, unmap)).await,
            Backing::Packed(pack) => Box::pin(pack.zero(queue, at, len)).await,
            Backing::View(view) => Err(view.refusal(ImageOp::Zero, FROZEN)),
        }
    }

    /// Gives a range's storage back if that can be done; otherwise nothing happens.
    ///
    /// # Errors
    /// When the image refuses.
    pub async fn release(&self, queue: &IoQueue, at: ByteOffset, len: u64) -> Result<(), ImageError> {
        match self {
            Backing::One(image) => release_range(&**image, queue, at, len).await,
            Backing::Pair(pair) => Box::pin(pair.release(queue, at, len)).await,
            Backing::Packed(pack) => Box::pin(pack.zero(queue, at, len)).await,
            Backing::View(view) => Err(view.refusal(ImageOp::Discard, FROZEN)),
        }
    }

    /// Whether a sync would make anything durable, or has something to say.
    #[must_use]
    pub fn needs_sync(&self) -> bool {
        match self {
            Backing::One(image) => needs_sync(&**image),
            Backing::Pair(_) => true, // What else changes its legs it does not note.
            Backing::Packed(pack) => pack.needs_sync(),
            Backing::View(_) => false,
        }
    }

    /// Makes everything that completed before durable.
    ///
    /// # Errors
    /// When the image refuses; it is failed then.
    pub async fn sync(&self, queue: &IoQueue) -> Result<(), ImageError> {
        match self {
            Backing::One(image) => sync(&**image, queue).await,
            Backing::Pair(pair) => Box::pin(pair.sync(queue)).await,
            Backing::Packed(pack) => Box::pin(pack.sync(queue)).await,
            Backing::View(_) => Ok(()), // It was stored before anybody could stand on it.
        }
    }
}

impl Geometry {
    /// The geometry of a disk on this image. Its logical blocks are sectors, whatever the image is written in, but those of
    /// a volume are those of the disk that it stands on.
    #[must_use]
    pub fn of(image: &Backing, block_bytes: u32) -> Geometry {
        let logical_block_bytes = match image {
            Backing::View(view) => view.logical_block_bytes(),
            Backing::One(_) | Backing::Pair(_) | Backing::Packed(_) => LOGICAL_BLOCK_BYTES,
        };
        Geometry { size_bytes: image.size_bytes(), logical_block_bytes, block_bytes }
    }
}
