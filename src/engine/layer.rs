//! A version's layer: an image, which blocks of it count, and what is kept of that for a power cut.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Backing;
use crate::store::{BlockIndex, DurableTable, Table};

/// An image and which blocks of it count.
#[derive(Clone)]
pub struct Layer {
    /// Where the bytes are, at the disk's own positions.
    pub image: Backing,
    kind: Kind,
    places: Arc<Places>,
}

/// What a layer is for. The table of one that outlives a power cut is here as well: a look at a block goes straight to it.
#[derive(Clone)]
enum Kind {
    /// It has every block: the pivot's.
    Full,
    /// It has what the table says, as long as the machine runs.
    Table(Arc<Table>),
    /// What is saved for a frozen version below the pivot, and outlives a power cut.
    Saved(Arc<Table>, Arc<Saved>),
    /// A log, whose table says where the only copy of acknowledged bytes is.
    Log(Arc<Table>, Arc<Log>),
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
        Layer::new(image, Kind::Full)
    }

    /// A layer that has what its table says.
    #[must_use]
    pub fn of(image: Backing, table: Arc<Table>) -> Layer {
        Layer::new(image, Kind::Table(table))
    }

    /// The same, for a frozen version that outlives a power cut.
    #[must_use]
    pub fn saved(image: Backing, saved: Arc<Saved>) -> Layer {
        Layer::new(image, Kind::Saved(saved.table.table().clone(), saved))
    }

    /// A log, whose table outlives a power cut.
    #[must_use]
    pub fn logged(image: Backing, log: Arc<Log>) -> Layer {
        Layer::new(image, Kind::Log(log.table.table().clone(), log))
    }

    fn new(image: Backing, kind: Kind) -> Layer {
        Layer { image, kind, places: Arc::default() }
    }

    /// The same layer, which outlives a power cut from now on, or no longer.
    #[must_use]
    pub(super) fn with_saved(&self, saved: Option<Arc<Saved>>) -> Layer {
        let image = self.image.clone();
        let layer = match (saved, self.table()) {
            (Some(saved), _) => Layer::saved(image, saved),
            (None, Some(table)) => Layer::of(image, table.clone()),
            (None, None) => Layer::full(image),
        };
        Layer { places: self.places.clone(), ..layer }
    }

    /// What is known of its places.
    pub(super) fn places(&self) -> &Places {
        &self.places
    }

    /// Whether it has every block.
    #[must_use]
    pub fn is_full(&self) -> bool {
        matches!(self.kind, Kind::Full)
    }

    /// Which blocks it has; None if it has every one.
    #[must_use]
    pub fn table(&self) -> Option<&Arc<Table>> {
        match &self.kind {
            Kind::Full => None,
            Kind::Table(table) | Kind::Saved(table, _) | Kind::Log(table, _) => Some(table),
        }
    }

    /// What a frozen version's layer has to survive a power cut.
    #[must_use]
    pub fn saved_durably(&self) -> Option<&Arc<Saved>> {
        match &self.kind {
            Kind::Saved(_, saved) => Some(saved),
            Kind::Full | Kind::Table(_) | Kind::Log(..) => None,
        }
    }

    /// What a log has to survive a power cut.
    #[must_use]
    pub fn log(&self) -> Option<&Arc<Log>> {
        match &self.kind {
            Kind::Log(_, log) => Some(log),
            Kind::Full | Kind::Table(_) | Kind::Saved(..) => None,
        }
    }

    /// Whether a flush has anything to do here. One that is asked before it takes the changes of a log farther out may miss
    /// what those are to come after.
    pub(super) fn needs_storing(&self) -> bool {
        self.image.needs_sync() || self.log().is_some_and(|log| log.table.needs_commit())
    }

    /// Whether the layer holds the block.
    #[must_use]
    pub fn owns(&self, block: BlockIndex) -> bool {
        self.table().is_none_or(|table| table.get(block))
    }
}

/// What this process knows of the places of blocks that a layer does not hold ([`super::place`]): that they are empty, if it
/// made the image and nothing has been left in one since. All copies of a layer share it.
#[derive(Default)]
pub(super) struct Places {
    are_empty: AtomicBool,
}

impl Places {
    /// Of a new image, in which nothing was ever written.
    pub(super) fn begin_empty(&self) {
        self.are_empty.store(true, Ordering::SeqCst);
    }

    /// Whether every place without an entry is a hole.
    pub(super) fn are_empty(&self) -> bool {
        self.are_empty.load(Ordering::SeqCst)
    }

    /// Something is left in a place without an entry.
    pub(super) fn doubt(&self) {
        self.are_empty.store(false, Ordering::SeqCst);
    }
}
