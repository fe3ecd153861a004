//! A version's layer: an image, which blocks of it count, and what is kept of that for a power cut.

use std::sync::Arc;

use super::backing::Backing;
use crate::store::{BlockIndex, DurableTable, Table};

/// Which blocks a layer holds.
#[derive(Clone, Debug)]
pub enum Owned {
    /// All of them: the pivot.
    All,
    /// Those whose bit is set.
    Table(Arc<Table>),
}

/// An image and which blocks of it count.
#[derive(Clone)]
pub struct Layer {
    /// Where the bytes are, at the disk's own positions.
    pub image: Backing,
    /// Which blocks are there.
    pub owned: Owned,
    /// For a log, whose table says where the only copy of acknowledged bytes is.
    pub log: Option<Arc<Log>>,
    /// For what is saved for a frozen version below the pivot, if it is to outlive a power cut.
    pub saved: Option<Arc<Saved>>,
}

/// What a log has to survive a power cut.
pub struct Log {
    /// The durable copy of the layer's table, committed at each flush.
    pub table: DurableTable,
    /// Blocks whose entries were deleted. Their places are given back when that is durable: until then the durable
    /// table still points to them.
    pub freed: Table,
}

/// What a frozen version below the pivot has to survive a power cut: its bytes are durable before the entry is, and the
/// entry is before the overwrite that it announces.
pub struct Saved {
    /// The durable copy of the layer's table.
    pub table: DurableTable,
    /// Makes durable that nothing of the layer is to be believed any more; the overwrites that it cannot follow come after
    /// that. Blocks the thread, may be called again, and says why it could not.
    pub revoke: Revoke,
}

/// See [`Saved::revoke`].
pub type Revoke = Box<dyn Fn() -> Result<(), String> + Send + Sync>;

impl Layer {
    /// A layer that has everything.
    #[must_use]
    pub fn full(image: Backing) -> Layer {
        Layer { image, owned: Owned::All, log: None, saved: None }
    }

    /// A layer that has what its table says.
    #[must_use]
    pub fn of(image: Backing, table: Arc<Table>) -> Layer {
        Layer { image, owned: Owned::Table(table), log: None, saved: None }
    }

    /// The same, for a frozen version that outlives a power cut.
    #[must_use]
    pub fn saved(image: Backing, saved: Arc<Saved>) -> Layer {
        Layer { image, owned: Owned::Table(saved.table.table().clone()), log: None, saved: Some(saved) }
    }

    /// A log, whose table outlives a power cut.
    #[must_use]
    pub fn logged(image: Backing, log: Arc<Log>) -> Layer {
        Layer { image, owned: Owned::Table(log.table.table().clone()), log: Some(log), saved: None }
    }

    /// Whether the layer holds the block.
    #[must_use]
    pub fn owns(&self, block: BlockIndex) -> bool {
        match &self.owned {
            Owned::All => true,
            Owned::Table(table) => table.get(block),
        }
    }
}
