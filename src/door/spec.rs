//! What a disk is to be made of: numbers, and descriptors that the engine has alone from then on.

use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use crate::engine::{Backing, Changed, Epoch, Geometry, LegImage, Mark, VersionId};
use crate::image::{ImageError, IoQueue, SharedImage, sync};
use crate::store::{DurableTable, Layout, Pack, Table, TableError};

/// The least that can be read and written.
const SECTOR_BYTES: u32 = 512;

/// A disk that is to be opened.
pub struct DiskSpec {
    /// Its name.
    pub id: Uuid,
    /// Where the full image of its live version is, or what a volume stands on.
    pub image: ImageSpec,
    /// The block size of tables and locks, in bytes; a power of two.
    pub block_bytes: u32,
    /// Its logical blocks, in bytes, if anything is said of them.
    pub logical_block_bytes: Option<u32>,
    /// Whether all changes are refused.
    pub read_only: bool,
    /// What background work may have in flight beside an active guest, in bytes; 0 for as much as it wants.
    pub window_bytes: u64,
    /// Discards that wait for a version to go.
    pub discards: Arc<Table>,
    /// Oldest first; the last one is live.
    pub versions: Vec<VersionSpec>,
    /// Moments of which only the changes are remembered.
    pub marks: Vec<Mark>,
    /// A restore in place that has begun.
    pub restore: Option<RestoreSpec>,
}

/// Where a disk's bytes are.
pub enum ImageSpec {
    /// In one image.
    Image(SharedImage),
    /// In the legs of a mirror that are there.
    Mirror {
        /// The name of its write-intent bitmap.
        id: Uuid,
        /// That bitmap.
        bitmap: SharedImage,
        /// In the order of their places.
        legs: Vec<LegImage>,
        /// Legs that are none any more if they are found to be split.
        unused: Vec<Uuid>,
    },
    /// In a frozen version of another disk.
    Base(BaseSpec),
}

/// A frozen version of another disk, below a volume.
#[derive(Clone, Debug)]
pub struct BaseSpec {
    /// The disk that has it, or why there is none.
    pub disk: Result<Uuid, String>,
    /// The version.
    pub version: VersionId,
    /// How it is called in messages.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The logical blocks that its disk shows, in bytes.
    pub logical_block_bytes: u32,
}

/// A version that is to be in a chain.
pub struct VersionSpec {
    /// Its stable name.
    pub id: VersionId,
    /// The epoch in which it began.
    pub began: Epoch,
    /// Its size in bytes. That of the live one is the disk's.
    pub size_bytes: u64,
    /// Whether the mirror was split when it began.
    pub splits: bool,
    /// Its layer.
    pub layer: LayerSpec,
    /// Why its content cannot be vouched for, if so.
    pub broken: Option<String>,
    /// What is known of what was written in its epochs; None where nothing is noted.
    pub changed: Option<Changed>,
}

/// A layer of a version.
pub enum LayerSpec {
    /// It has every block, where the disk's bytes are.
    Base,
    /// It has every block, in an image beside that.
    Full(SharedImage),
    /// What is saved for a frozen version as long as the machine runs.
    Table(Bytes, Arc<Table>),
    /// The same, and it outlives a power cut.
    Saved(Bytes, DurableTable),
    /// A log, and room for blocks whose entries are deleted ([`LayerSpec::log`]).
    Log(Bytes, DurableTable, Table),
}

/// Where the bytes of a part of a disk are.
#[derive(Clone)]
pub enum Bytes {
    /// Each block at its own position.
    Image(SharedImage),
    /// As they came.
    Pack(Arc<Pack>),
}

/// A restore in place that has begun.
pub struct RestoreSpec {
    /// Which blocks show what is restored.
    pub pending: DurableTable,
    /// The disk's own version that it goes back to. Else it waits for a volume's.
    pub own: Option<VersionId>,
    /// Why that volume's is lost, if so.
    pub lost: Option<String>,
}

impl ImageSpec {
    /// The geometry of a disk on this, of which nothing else is said.
    #[must_use]
    pub fn geometry(&self, block_bytes: u32) -> Geometry {
        let (size_bytes, logical_block_bytes) = match self {
            ImageSpec::Image(image) => (image.size_bytes(), SECTOR_BYTES),
            ImageSpec::Mirror { legs, .. } => (legs.first().map_or(0, |leg| leg.image.size_bytes()), SECTOR_BYTES),
            ImageSpec::Base(base) => (base.size_bytes, base.logical_block_bytes),
        };
        Geometry { size_bytes, logical_block_bytes, block_bytes }
    }

    /// What transfers must be aligned to.
    #[must_use]
    pub fn unit_bytes(&self) -> u32 {
        match self {
            ImageSpec::Image(image) => image.alignment().offset_bytes,
            ImageSpec::Mirror { legs, .. } => {
                legs.iter().map(|leg| leg.image.alignment().offset_bytes).max().unwrap_or(1)
            }
            ImageSpec::Base(_) => SECTOR_BYTES,
        }
    }
}

impl BaseSpec {
    /// One that is lost, and why.
    #[must_use]
    pub fn lost(reason: &str, version: VersionId, name: &str, size_bytes: u64) -> BaseSpec {
        let (disk, name) = (Err(reason.to_owned()), name.to_owned());
        BaseSpec { disk, version, name, size_bytes, logical_block_bytes: SECTOR_BYTES }
    }
}

impl LayerSpec {
    /// A log whose table is `table`.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn log(bytes: Bytes, table: DurableTable) -> Result<LayerSpec, TableError> {
        let freed = Table::in_memory(table.table().blocks())?;
        Ok(LayerSpec::Log(bytes, table, freed))
    }

    /// Where its bytes are, unless that is where the disk's are.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            LayerSpec::Base => None,
            LayerSpec::Full(image) => Some(image.path()),
            LayerSpec::Table(bytes, _) | LayerSpec::Saved(bytes, _) | LayerSpec::Log(bytes, ..) => Some(bytes.path()),
        }
    }

    /// How its blocks lie.
    #[must_use]
    pub fn layout(&self) -> Layout {
        match self {
            LayerSpec::Base | LayerSpec::Full(_) => Layout::Sparse,
            LayerSpec::Table(bytes, _) | LayerSpec::Saved(bytes, _) | LayerSpec::Log(bytes, ..) => bytes.layout(),
        }
    }
}

impl Bytes {
    /// How they lie.
    #[must_use]
    pub fn layout(&self) -> Layout {
        match self {
            Bytes::Image(_) => Layout::Sparse,
            Bytes::Pack(_) => Layout::Packed,
        }
    }

    /// Where they are.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Bytes::Image(image) => image.path(),
            Bytes::Pack(pack) => pack.image().path(),
        }
    }

    /// Makes everything that completed before durable.
    ///
    /// # Errors
    /// When the image refuses.
    pub async fn sync(&self, queue: &IoQueue) -> Result<(), ImageError> {
        match self {
            Bytes::Image(image) => sync(&**image, queue).await,
            Bytes::Pack(pack) => pack.sync(queue).await,
        }
    }

    pub(super) fn backing(self) -> Backing {
        match self {
            Bytes::Image(image) => Backing::One(image),
            Bytes::Pack(pack) => Backing::Packed(pack),
        }
    }
}
