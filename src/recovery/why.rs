//! Why something that is remembered is not taken up as it was: what users read, and what they can do about it.

use std::path::{Path, PathBuf};

use super::DurableFacts;
use crate::door::PairError;
use crate::image::{ImageError, ImageErrorKind};
use crate::store::{Identity, Layout, TableError};

/// See above. The text says what is the matter; [`Why::advice`] what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Why {
    /// The record, or the mark of a broken version, says so already.
    #[error("{0}")]
    Said(String),
    /// What was saved in memory only went with the machine.
    #[error("the host went down while it was served, and what was saved for it was not on stable storage")]
    PowerCut,
    /// A snapshot that still drained when the machine went down.
    #[error("the host went down before all of it was on stable storage")]
    Unfinished,
    /// Its table says so, and nobody came to say why.
    #[error("it broke just before the daemon or the host went down")]
    Broke,
    /// A newer version that it reads through is lost.
    #[error("a newer snapshot through which it reads is lost")]
    ReadsThrough {
        /// Whether that one is lost for good.
        for_good: bool,
    },
    /// Somebody wrote the disk's image after a clean stop.
    #[error("the disk's image was changed while the daemon was not running")]
    DiskChanged,
    /// Somebody wrote a layer's image or a leg after a clean stop.
    #[error("its image {} was changed while the daemon was not running", _0.display())]
    ImageChanged(PathBuf),
    /// Another image is where a full image, a layer's or a leg was.
    #[error("its image {} is another one than it was: it is {now}, and was {was}", path.display())]
    Stranger {
        /// Where.
        path: PathBuf,
        /// What was there.
        was: Identity,
        /// What is.
        now: Identity,
    },
    /// A layer's image is not there.
    #[error("its image {} is missing or is not a file", _0.display())]
    Missing(PathBuf),
    /// A layer's image has another size.
    #[error("its image {} has {size_bytes} bytes, not {}", path.display(), match layout {
        Layout::Sparse => "the disk's",
        Layout::Packed => "those of a pack of such a disk",
    })]
    Size {
        /// The image.
        path: PathBuf,
        /// What it has.
        size_bytes: u64,
        /// How blocks lie in it.
        layout: Layout,
    },
    /// A full image has become smaller: what was behind its end is gone, or it is another one.
    #[error("its image {} has {size_bytes} bytes, and the disk has {before_bytes}", path.display())]
    Shrunk {
        /// The image.
        path: PathBuf,
        /// What it has.
        size_bytes: u64,
        /// What it had.
        before_bytes: u64,
    },
    /// A full image cannot be written in blocks of the disk's size.
    #[error("{} takes units of {unit_bytes} bytes, more than its block size of {block_bytes}", path.display())]
    Unit {
        /// The image.
        path: PathBuf,
        /// What it takes.
        unit_bytes: u32,
        /// The disk's block size.
        block_bytes: u32,
    },
    /// The legs of a mirror do not fit each other.
    #[error("{} has another size than the other leg", _0.display())]
    LegSize(PathBuf),
    /// A leg that was being added.
    #[error("it was not added to the end: the mirror does not know it yet")]
    NotAttached,
    /// A snapshot has a leg that failed before all was on it.
    #[error("{} failed as a leg before everything that the snapshot shows was on it", _0.display())]
    LegFailed(PathBuf),
    /// No leg of a mirror can be used.
    #[error("none of its legs is there")]
    NoLeg,
    /// An image cannot be opened.
    #[error("{text}")]
    Image {
        /// What callers may decide by.
        kind: ImageErrorKind,
        /// The system's error number, if the system reported it.
        errno: Option<i32>,
        /// All of it.
        text: String,
    },
    /// A table cannot be read.
    #[error("{0}")]
    Table(String),
    /// The bitmap of a mirror cannot be used, and perhaps why a leg is not.
    #[error("{0}")]
    Mirror(String),
    /// A clean stop did not save its table.
    #[error("its table was not saved")]
    NotSaved,
    /// A run table that is of another boot.
    #[error("its table was not on stable storage")]
    NotStored,
    /// Some sectors of a durable table cannot be read.
    #[error("{} is damaged: it does not tell whether {blocks} of the disk's blocks, from block {first} on, are in {}",
        place.display(), image.display())]
    Damaged {
        /// The table.
        place: PathBuf,
        /// Whose blocks it tells of.
        image: PathBuf,
        /// The first block that is not told of.
        first: u64,
        /// How many are not.
        blocks: u64,
    },
    /// A log, or a restore, without the run table of this boot.
    #[error(
        "{0}; without it what was written after the last flush is lost. Put it back, or stop the guests, start with \
         --take-flushed DISK, and start the guests anew"
    )]
    WithoutRunTable(Box<Why>),
    /// A pack is not as it was left, but what was flushed of it is whole.
    #[error(
        "{0}; what was flushed last is whole. To go on with that stop the guests, start with --take-flushed DISK, and start \
         the guests anew"
    )]
    FlushedIsWhole(Box<Why>),
    /// No version of a segment has the full image.
    #[error("its records name no full image")]
    NoFullImage,
    /// The live version's log cannot be had.
    #[error("its newest content is in a log that cannot be taken up: {0}")]
    LiveLost(Box<Why>),
    /// What is pending of a restore in place cannot be had.
    #[error("it is being restored from {from}, and what is not copied yet cannot be had: {why}")]
    RestoreLost {
        /// What is restored.
        from: String,
        /// Why not.
        why: Box<Why>,
    },
    /// What a volume stands on cannot be had.
    #[error("it stands on {from}: {why}")]
    BaseLost {
        /// The snapshot, `disk@name`.
        from: String,
        /// Why not.
        why: Box<Why>,
    },
    /// What is restored is no snapshot of the disk any more.
    #[error("the snapshot is lost")]
    SnapshotLost,
    /// No disk that is served has a version.
    #[error("its disk is not served")]
    NotServed,
    /// A version is there, and not for long.
    #[error("it is being deleted")]
    Deleting,
    /// A disk has another size than it had.
    #[error("its disk has another size now")]
    SizeChanged,
    /// A record cannot be true.
    #[error("its record contradicts itself: {0}")]
    Contradiction(String),
    /// The table of changes went with the machine.
    #[error("the host went down while it was served, and what was noted of its changes with it")]
    ChangesCut,
    /// Draining requests may have reached one leg only.
    #[error("the daemon ended while requests from before a split were on their way to both legs")]
    ChangesSplit,
    /// A clean stop did not save its dirty bitmap.
    #[error("its dirty bitmap was not saved")]
    ChangesNotSaved,
    /// There was no room for some bits.
    #[error("the run directory had no room for its dirty bitmap")]
    ChangesIncomplete,
}

impl Why {
    /// Whether nothing that could be put back would change it.
    #[must_use]
    pub fn is_for_good(&self) -> bool {
        match self {
            Why::PowerCut | Why::Unfinished | Why::Broke | Why::Said(_) | Why::LegFailed(_) => true,
            Why::ReadsThrough { for_good } => *for_good,
            _ => false,
        }
    }

    /// Whether an image would do if its user said that it is the one.
    #[must_use]
    pub fn is_stranger(&self) -> bool {
        match self {
            Why::Stranger { .. } => true,
            Why::LiveLost(why) => why.is_stranger(),
            _ => false,
        }
    }

    /// What to do about a snapshot that is broken by this.
    #[must_use]
    pub fn advice(&self) -> &'static str {
        match self {
            Why::PowerCut => "delete it and take another (on a disk with durability=power it would have been kept)",
            why if why.is_for_good() => "delete it and take another",
            _ => "put back what is missing before the next start, or delete it and take another",
        }
    }

    /// The reason as it is remembered of a snapshot: who reads it later has no other place to look for advice.
    #[must_use]
    pub fn in_record(&self) -> String {
        match self {
            Why::Said(reason) => reason.clone(),
            why => format!("{why}; {}", why.advice()),
        }
    }

    pub(super) fn damage(facts: &DurableFacts, image: &Path) -> Option<Why> {
        let first = facts.damaged.first()?.start.0;
        let blocks = facts.damaged.iter().map(|range| range.count()).sum();
        Some(Why::Damaged { place: facts.place.clone(), image: image.to_owned(), first, blocks })
    }
}

impl From<ImageError> for Why {
    fn from(e: ImageError) -> Why {
        Why::Image { kind: e.kind, errno: e.errno, text: e.to_string() }
    }
}

impl From<TableError> for Why {
    fn from(e: TableError) -> Why {
        Why::Table(e.to_string())
    }
}

impl From<PairError> for Why {
    fn from(e: PairError) -> Why {
        Why::Mirror(e.to_string())
    }
}
