//! The types of changes: bookmarks, differences, and what a volume does not share with what it stands on.
//!
//! Long lists are streams ([`crate::control::changes`]); what is here of them is their shape.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::control::name::{Name, SnapshotRef};
use crate::control::timestamp::Timestamp;
use crate::control::words::words;

words! {
    /// What a bookmark is good for.
    BookmarkState {
        /// It can be said what has changed since.
        Kept = "kept",
        /// It cannot; its reason says why.
        Lost = "lost",
    }
}

words! {
    /// What a list of differences goes by.
    DiffSource {
        /// What was written.
        ChangedTables = "changed-tables",
        /// What is stored in different places, because it is not known what was written.
        OwnedTables = "owned-tables",
    }
}

/// What is left of a deleted snapshot: a moment, from which on changes are known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Bookmark {
    /// The snapshot's.
    #[schema(value_type = String, format = "uuid")]
    pub id: Uuid,
    /// Shared by the snapshots that one request took in the same epoch.
    #[schema(value_type = String, format = "uuid")]
    pub group: Uuid,
    /// The disk or volume that the snapshot was taken of.
    pub disk: Name,
    /// The snapshot's. No snapshot of the disk has the same.
    pub name: Name,
    /// What it is good for.
    pub state: BookmarkState,
    /// Why it is lost.
    pub reason: Option<String>,
    /// The last epoch whose writes the snapshot showed.
    pub epoch: u64,
    /// The size of the blocks that its table counts in.
    pub block_size: u32,
    /// The size of the disk.
    pub size_bytes: u64,
    /// When the cut was.
    pub created_at: Timestamp,
    /// When the last request of its epoch was done.
    pub quiesced_at: Option<Timestamp>,
}

impl Bookmark {
    /// `disk@name`.
    pub fn reference(&self) -> SnapshotRef {
        SnapshotRef { disk: self.disk.clone(), name: self.name.clone() }
    }
}

/// A range of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ByteRange {
    /// Where it begins.
    pub offset: u64,
    /// How long it is; not 0.
    pub length: u64,
}

/// The query of a difference.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct DiffQuery {
    /// The later snapshot or bookmark, `disk@name` or its id; the present when absent.
    #[serde(default)]
    #[param(required = false)]
    pub to: Option<String>,
}

/// Which blocks of a volume are its own, and which were written. Lists of runs of blocks: each is the number of its first
/// block and how many there are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeMap {
    /// The volume.
    pub name: Name,
    /// The size of a block in bytes; the last one may be short.
    pub block_size: u32,
    /// How many blocks there are.
    pub blocks: u64,
    /// The volume's size.
    pub size_bytes: u64,
    /// Why `changed` is null.
    pub reason: Option<String>,
    /// Blocks whose bytes are in the volume's own images.
    pub owned: Vec<(u64, u64)>,
    /// Blocks that were written since the volume was made or made fresh; null when it is not known.
    pub changed: Option<Vec<(u64, u64)>>,
}

/// How much of a volume is its own, and how far it is from its source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VolumeStatus {
    /// The volume's id.
    #[schema(value_type = String, format = "uuid")]
    pub id: Uuid,
    /// The volume.
    pub name: Name,
    /// The snapshot that it stands on.
    pub from: String,
    /// The disk or volume whose present it is compared with.
    pub source: String,
    /// The size of a block in bytes.
    pub block_size: u32,
    /// How many blocks there are.
    pub blocks: u64,
    /// Those whose bytes are in the volume's own images.
    pub owned_blocks: u64,
    /// Those that were written since the volume was made or made fresh; null when it is not known.
    pub changed_blocks: Option<u64>,
    /// Those of the source that were written since that snapshot; null when it is not known.
    pub source_changed_blocks: Option<u64>,
    /// Those that were written in either, and so may differ; null when it is not known.
    pub differing_blocks: Option<u64>,
    /// The same, of a hundred.
    pub percent_differing: Option<f64>,
    /// How many of a hundred blocks are the volume's own: at 100 it needs nobody.
    pub percent_complete: f64,
    /// Why something is not known.
    pub reason: Option<String>,
}

impl VolumeStatus {
    /// How many of a hundred; 100 only when all are.
    #[expect(clippy::cast_precision_loss, reason = "shown with two decimals")]
    pub fn percent(part: u64, all: u64) -> f64 {
        match (part, all) {
            (_, 0) => 0.0,
            (part, all) if part >= all => 100.0,
            (part, all) => (part as f64 * 100.0 / all as f64).min(99.99),
        }
    }
}
