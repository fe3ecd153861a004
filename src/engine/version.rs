//! A version of a disk: its name, when it began, and how it is. Where its bytes are is its chain's business.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use uuid::Uuid;

use super::{Changed, Epoch, Geometry};
use crate::store::BlockIndex;

/// The stable name of a version.
pub type VersionId = Uuid;

/// What stays the same of a version while chains around it change.
#[derive(Debug)]
pub struct Version {
    /// Its stable name.
    pub id: VersionId,
    /// The epoch in which it began.
    pub began: Epoch,
    /// What was written in its epochs. None where nothing is noted: no older moment asks, or did when it began.
    changed: Option<Changed>,
    forgets_changes: AtomicBool,
    quiesced: AtomicBool,
    retiring: AtomicBool,
    leaves_mark: AtomicBool,
    broken: OnceLock<String>,
    /// How large its disk was when it was frozen, in bytes and in blocks. `u64::MAX` for the live one, which is as large as its
    /// disk.
    size_bytes: AtomicU64,
    blocks: AtomicU64,
    /// Blocks copied into this version before they were overwritten.
    pub preserved_blocks: AtomicU64,
    /// The bytes of those copies that were not holes.
    pub preserved_bytes: AtomicU64,
}

impl Version {
    /// A version that begins at `began`.
    #[must_use]
    pub fn new(id: VersionId, began: Epoch) -> Arc<Version> {
        Version::noting(id, began, None)
    }

    /// The same, when it is noted what is written in its epochs, or known that it is not known.
    #[must_use]
    pub fn noting(id: VersionId, began: Epoch, changed: Option<Changed>) -> Arc<Version> {
        Arc::new(Version {
            id,
            began,
            changed,
            forgets_changes: AtomicBool::new(false),
            leaves_mark: AtomicBool::new(false),
            quiesced: AtomicBool::new(false),
            retiring: AtomicBool::new(false),
            broken: OnceLock::new(),
            size_bytes: AtomicU64::new(u64::MAX),
            blocks: AtomicU64::new(u64::MAX),
            preserved_blocks: AtomicU64::new(0),
            preserved_bytes: AtomicU64::new(0),
        })
    }

    /// Its size in bytes, when its disk has `disk_bytes` now.
    #[must_use]
    pub fn size_within(&self, disk_bytes: u64) -> u64 {
        self.size_bytes.load(Ordering::SeqCst).min(disk_bytes)
    }

    /// It keeps the size that its disk has now, whatever becomes of that.
    pub fn keep_size(&self, of: Geometry) {
        self.size_bytes.store(of.size_bytes, Ordering::SeqCst);
        self.blocks.store(of.blocks(), Ordering::SeqCst);
    }

    /// Whether it has any of a block.
    pub(super) fn reaches(&self, block: BlockIndex) -> bool {
        block.0 < self.blocks.load(Ordering::SeqCst)
    }

    /// Whether it never changes again.
    #[must_use]
    pub fn is_quiesced(&self) -> bool {
        self.quiesced.load(Ordering::SeqCst)
    }

    /// Says that it never changes again.
    pub fn set_quiesced(&self) {
        self.quiesced.store(true, Ordering::SeqCst);
    }

    /// Whether it is being deleted.
    #[must_use]
    pub fn is_retiring(&self) -> bool {
        self.retiring.load(Ordering::SeqCst)
    }

    pub(super) fn set_retiring(&self) {
        self.retiring.store(true, Ordering::SeqCst);
    }

    /// What was written in its epochs.
    #[must_use]
    pub fn changed(&self) -> Option<&Changed> {
        self.changed.as_ref().filter(|_| !self.forgets_changes.load(Ordering::SeqCst))
    }

    /// Notes nothing any more: nothing older is left. Whoever finds the table after a kill, with the older ones, must not
    /// believe it.
    pub(super) fn forget_changes(&self) {
        if let Some(Changed::Noted(table)) = &self.changed {
            table.mark_broken();
        }
        self.forgets_changes.store(true, Ordering::SeqCst);
    }

    /// Whether a mark of it stays when it is deleted.
    #[must_use]
    pub fn leaves_mark(&self) -> bool {
        self.leaves_mark.load(Ordering::SeqCst)
    }

    /// Says whether a mark of it stays when it is deleted.
    pub fn set_leaves_mark(&self, leaves: bool) {
        self.leaves_mark.store(leaves, Ordering::SeqCst);
    }

    /// Why its content cannot be vouched for, if so.
    #[must_use]
    pub fn broken(&self) -> Option<&str> {
        self.broken.get().map(String::as_str)
    }

    /// Breaks the version. Returns whether it was whole before.
    pub fn set_broken(&self, reason: impl Into<String>) -> bool {
        self.broken.set(reason.into()).is_ok()
    }

    /// Whether old bytes are still to be kept for it: not for one that goes, nor for one that is lost.
    #[must_use]
    pub fn keeps_blocks(&self) -> bool {
        !self.is_retiring() && self.broken().is_none()
    }
}

/// A moment of a disk of which only the changes are remembered: a bookmark, or a snapshot whose content was lost.
#[derive(Clone, Debug)]
pub struct Mark {
    /// The name of the version that it was.
    pub id: VersionId,
    /// The epoch in which that began.
    pub began: Epoch,
    /// Its size in bytes; `u64::MAX` if it is not known to have been less than its disk's now.
    pub size_bytes: u64,
    /// What was written from the marker before it on.
    pub changed: Option<Changed>,
}
