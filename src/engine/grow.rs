//! A disk grows under its guest.
//!
//! What always holds:
//! - A version has the size that its disk had when it was frozen. The live one has that of the disk, which only grows.
//! - Whatever is sized by the disk has room first, then knows of it, and last the disk says its new size. So who goes by any
//!   size that was ever said finds everything that large, and nobody waits: who plans by the older size touches nothing
//!   behind it.
//! - No request reaches behind the old size before the new one is said, and no older version has bytes there: nothing of the
//!   tail is saved for one ([`super::VersionIn::nearest_reader`]). The block in which the old size ends is saved as far as the
//!   older version's own layer reaches.
//!
//! What is not done here: to make room in files, and to record the new size. Both come before.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::restoring::Restore;
use super::{Backing, Chain, ChainEditor, Changed, Disk, Geometry, VersionId};
use crate::store::Table;

/// Why a disk cannot grow now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GrowError {
    /// It would lose what is behind its new end.
    #[error("a disk does not shrink")]
    Smaller,
    /// The full image ends before the new size does.
    #[error("its image has no room for that")]
    NoRoom,
    /// The live version's bytes are in more places than one, which do not grow together.
    #[error("its newest content is in a log, or it stands on a snapshot")]
    InLog,
    /// It has two legs.
    #[error("it has a mirror")]
    Mirrored,
    /// Blocks of it show another version.
    #[error("it is being restored")]
    Restoring,
    /// Requests of an older version, which keeps its size, are still on their way.
    #[error("a snapshot of it is still draining")]
    Draining,
}

/// The tables that have a bit for each block of a disk, and so grow with it.
pub struct SizedTables {
    /// Of discards that were put off.
    pub discards: Arc<Table>,
    /// The live version, and where it is noted what is written to it.
    pub changed: Option<(VersionId, Arc<Table>)>,
}

impl Disk {
    /// What has to have room before the disk grows.
    #[must_use]
    pub fn sized_tables(&self) -> SizedTables {
        let chain = self.chain();
        let live = chain.version(chain.live());
        let changed = live.changed().and_then(Changed::table);
        SizedTables { discards: self.discards.clone(), changed: changed.map(|table| (live.id, table.clone())) }
    }

    /// As large as it was when it was served last, although its image may have room for more: before it is served.
    pub fn begin_with_size(&self, bytes: u64) {
        self.size_bytes.store(bytes, Ordering::SeqCst);
    }

    /// Whether it could grow now to `size_bytes`, if its image and its tables had room.
    ///
    /// # Errors
    /// Why not.
    pub fn can_grow(&self, size_bytes: u64) -> Result<(), GrowError> {
        let chain = self.chain();
        let live = chain.live();
        match &chain.layer(live).image {
            _ if size_bytes < self.geometry().size_bytes => Err(GrowError::Smaller),
            _ if !matches!(chain.restore(), Restore::None) => Err(GrowError::Restoring),
            _ if chain.pivot_of(live) != live => Err(GrowError::InLog),
            _ if is_draining(&chain) => Err(GrowError::Draining),
            Backing::One(_) => Ok(()),
            Backing::Pair(_) => Err(GrowError::Mirrored),
            Backing::Packed(_) | Backing::View(_) => Err(GrowError::InLog),
        }
    }
}

fn is_draining(chain: &Chain) -> bool {
    chain.links()[..chain.live()].iter().any(|link| link.version.broken().is_none() && !link.version.is_quiesced())
}

impl ChainEditor {
    /// The live version has `size_bytes` from now on. Its image and its tables have room, and the records say so.
    ///
    /// # Errors
    /// When it cannot grow now; nothing has changed then.
    ///
    /// # Panics
    /// When a table has no room.
    pub fn grow(&self, disk: &Disk, size_bytes: u64) -> Result<(), GrowError> {
        // No cut comes in between: a version is frozen with the size that its own tables have.
        let _editing = self.begin();
        disk.can_grow(size_bytes)?;
        let chain = disk.chain();
        if chain.layer(chain.live()).image.size_bytes() < size_bytes {
            return Err(GrowError::NoRoom);
        }
        let blocks = Geometry { size_bytes, ..disk.geometry() }.blocks();
        let SizedTables { discards, changed } = disk.sized_tables();
        discards.grow(blocks);
        changed.into_iter().for_each(|(_, table)| table.grow(blocks));
        disk.size_bytes.store(size_bytes, Ordering::SeqCst);
        Ok(())
    }
}
