//! What a decision asks of the world: how images look, and what tables say.
//!
//! What always holds: nobody who answers changes anything, nor leaves anything open.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::door::{PairError, PairFacts};
use crate::image::ImageError;
use crate::store::{Believed, BlockRange, Fingerprint, Identity, MirrorRecord, PackFacts, RunTableFacts, TableError};

/// The durable copies of tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durable {
    /// That of a log, of a mirror's bitmap or of pending blocks.
    Log,
    /// That of a snapshot that outlives power cuts.
    Saved,
    /// What that became when the snapshot was given up.
    GivenUp,
}

/// An image that could be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageFacts {
    /// Where it is.
    pub path: PathBuf,
    /// Its size.
    pub size_bytes: u64,
    /// What its transfers must be multiples of.
    pub unit_bytes: u32,
}

/// The durable copy of a table, whose header is right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DurableFacts {
    /// Where it is.
    pub place: PathBuf,
    /// Blocks whose bits cannot be read, in order.
    pub damaged: Vec<BlockRange>,
    /// How many bits are set of those that can.
    pub ones: u64,
}

/// What there is of one disk, with the configuration that it would be served with.
pub trait Evidence {
    /// How many bytes a block of the disk's tables has.
    fn block_bytes(&self) -> u32;

    /// How the disk's own image looks, if it is there.
    fn full_image_looks(&self) -> Option<Fingerprint>;

    /// The disk's own image. One that was `made_here` is used through the page cache where there is no other way.
    ///
    /// # Errors
    /// When it could not be opened as the disk's.
    fn full_image(&self, made_here: bool) -> Result<ImageFacts, ImageError>;

    /// A leg of the disk's mirror.
    ///
    /// # Errors
    /// When it could not be opened.
    fn leg(&self, path: &Path) -> Result<ImageFacts, ImageError>;

    /// An image beside the full one.
    ///
    /// # Errors
    /// When it could not be opened.
    fn layer_image(&self, path: &Path) -> Result<ImageFacts, ImageError>;

    /// An image beside the full one that is the pack of the version `id` of a disk of `size_bytes`.
    ///
    /// # Errors
    /// When it would not be taken up as it is believed.
    fn pack(&self, path: &Path, id: Uuid, size_bytes: u64, believed: Believed) -> Result<PackFacts, TableError>;

    /// What the bitmap says of a mirror of which these legs can be used. Their size is `size_bytes`.
    ///
    /// # Errors
    /// When it would not be taken up.
    fn mirror(&self, mirror: &MirrorRecord, usable: &[Uuid], size_bytes: u64) -> Result<PairFacts, PairError>;

    /// How an image looks, if it is there.
    fn looks(&self, path: &Path) -> Option<Fingerprint>;

    /// What tells an image from every other, if that can be told.
    fn identity(&self, path: &Path) -> Option<Identity>;

    /// What tells the directory of the records from every other, if that can be told.
    fn kept_in(&self) -> Option<Identity>;

    /// Whether there is a plain file.
    fn is_file(&self, path: &Path) -> bool;

    /// The run table of this boot that goes by this name.
    ///
    /// # Errors
    /// When it could not be taken up.
    fn run_table(&self, id: Uuid, blocks: u64) -> Result<RunTableFacts, TableError>;

    /// A table that a clean stop saved.
    ///
    /// # Errors
    /// When it is not the one with this seal, or not whole.
    fn saved_table(&self, id: Uuid, blocks: u64, seal: Uuid) -> Result<(), TableError>;

    /// The durable copy of a table.
    ///
    /// # Errors
    /// When its header is not right.
    fn durable_table(&self, which: Durable, id: Uuid, blocks: u64) -> Result<DurableFacts, TableError>;

    /// Whether a snapshot that outlives power cuts was given up durably.
    fn is_given_up(&self, id: Uuid) -> bool;

    /// The dirty bitmap of this boot that goes by this name.
    ///
    /// # Errors
    /// When it could not be taken up.
    fn run_changes(&self, id: Uuid, blocks: u64) -> Result<RunTableFacts, TableError>;

    /// A dirty bitmap that a clean stop saved.
    ///
    /// # Errors
    /// When it is not the one with this seal, or not whole.
    fn saved_changes(&self, id: Uuid, blocks: u64, seal: Uuid) -> Result<(), TableError>;

    /// What the mark of a broken version says. It is true whatever came after it: no version becomes whole again.
    fn why_broken(&self, id: Uuid) -> Option<String>;
}
