//! placeholder: replaced by the version chain
use super::{EpochClock, EpochLane, Request, RequestError, Ticket};
use crate::image::{IoBuf, IoQueue, SharedImage, read_exact_at, sync, write_all_at, zero_range};
use std::sync::Arc;

/// What frontends see of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size in bytes; a multiple of 512.
    pub size_bytes: u64,
    /// Logical block size to announce (512 or 4096).
    pub logical_block_bytes: u32,
    /// The block size of the tables: what discards and zeroes are best aligned to.
    pub block_bytes: u32,
}

/// A disk.
pub struct Disk {
    clock: EpochClock,
    geometry: Geometry,
    image: SharedImage,
    read_only: bool,
}

/// What one socket serves: the live version of a disk, or a frozen one.
#[derive(Clone)]
pub struct Attachment {
    disk: Arc<Disk>,
}

impl Disk {
    /// A disk on one raw image.
    pub fn plain(clock: EpochClock, image: SharedImage, read_only: bool) -> Arc<Disk> {
        let geometry = Geometry {
            size_bytes: image.size_bytes(),
            logical_block_bytes: image.alignment().offset_bytes.max(512),
            block_bytes: 4096,
        };
        Arc::new(Disk { clock, geometry, image, read_only })
    }
    /// The live version.
    pub fn attach_live(self: &Arc<Disk>) -> Attachment {
        Attachment { disk: self.clone() }
    }
}

impl Attachment {
    /// Size and block sizes.
    pub fn geometry(&self) -> &Geometry {
        &self.disk.geometry
    }
    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.disk.read_only
    }
    /// A way into the epochs, one for each worker.
    pub fn lane(&self) -> EpochLane {
        self.disk.clock.lane()
    }
    /// Executes one request. The ticket must be held (by the caller) until this has finished.
    ///
    /// # Errors
    /// When the request cannot be carried out; the guest gets an I/O error.
    pub async fn execute(&self, queue: &IoQueue, _ticket: &Ticket, request: Request) -> Result<(), RequestError> {
        let image = &*self.disk.image;
        match request {
            Request::Read { at, into } => drop(read_exact_at(image, queue, at, IoBuf::Guest(into)).await?),
            Request::Write { at, from, durable } => write_all_at(image, queue, at, IoBuf::Guest(from), durable).await?,
            Request::Flush => sync(image, queue).await?,
            Request::Discard { at, len } => zero_range(image, queue, at, len, true).await?,
            Request::WriteZeroes { at, len, unmap, .. } => zero_range(image, queue, at, len, unmap).await?,
        }
        Ok(())
    }
}
