//! Growth of a disk, step by step: who asks does them in their order ([`crate::engine::ChainEditor::grow`]).

use super::engine::Disk;
use super::error::Error;
use super::save::Kept;
use crate::engine::{Backing, Geometry, GrowError, SizedTables};
use crate::store::{Table, TableError};

/// Makes room in a table, and in its file, for the bits of so many blocks.
pub type Extend<'a> = &'a dyn Fn(Kept, &Table, u64) -> Result<(), TableError>;

impl Disk {
    /// Whether it could grow now to so many bytes, if its image and its tables had room.
    ///
    /// # Errors
    /// Why not.
    pub fn can_grow(&self, size_bytes: u64) -> Result<(), GrowError> {
        self.open().disk.can_grow(size_bytes)
    }

    /// Makes room in all tables that have a bit for each block.
    ///
    /// # Errors
    /// When one cannot have it. Room that was made stays, and changes nothing.
    pub fn make_room(&self, size_bytes: u64, extend: Extend) -> Result<(), Error> {
        let disk = &self.open().disk;
        let blocks = Geometry { size_bytes, ..disk.geometry() }.blocks();
        let SizedTables { discards, changed } = disk.sized_tables();
        extend(Kept::Discards, &discards, blocks)?;
        changed.map_or(Ok(()), |(version, table)| extend(Kept::Changed(version), &table, blocks))?;
        Ok(())
    }

    /// How large the live version's full image is. It may have room for more than the disk has.
    #[must_use]
    pub fn image_bytes(&self) -> u64 {
        let chain = self.open().disk.chain();
        chain.layer(chain.pivot_of(chain.live())).image.size_bytes()
    }

    /// The live version's full image is that large from now on, durably.
    ///
    /// # Errors
    /// When it cannot be.
    pub fn grow_image(&self, size_bytes: u64) -> Result<(), Error> {
        let chain = self.open().disk.chain();
        match &chain.layer(chain.live()).image {
            Backing::One(image) => Ok(self.engine.host.grow_image(image, size_bytes)?),
            Backing::Pair(_) | Backing::Packed(_) | Backing::View(_) => Err(Error::Io(GrowError::InLog.to_string())),
        }
    }

    /// It has this size from now on, of which the records know.
    ///
    /// # Errors
    /// When it cannot grow now; nothing has changed then.
    ///
    /// # Panics
    /// When a table has no room.
    pub fn grow(&self, size_bytes: u64) -> Result<(), GrowError> {
        self.engine.editor.grow(&self.open().disk, size_bytes)
    }
}
