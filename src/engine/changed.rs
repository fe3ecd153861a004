//! What is known of the blocks that were written in the epochs of one version.
//!
//! What always holds: what is not known counts as changed. A table that could not be extended, or was lost, is never taken
//! for an empty one. What differs between moments is told in [`super::changes`].

use std::sync::Arc;

use crate::store::Table;

const NO_ROOM: &str = "the run directory had no room for its dirty bitmap";

/// What is known of the blocks that were written in the epochs of a version.
#[derive(Clone, Debug)]
pub enum Changed {
    /// Those whose bit is set, and no others, unless the table is marked as broken.
    Noted(Arc<Table>),
    /// Any may have been, and why that is so.
    Unknown(Arc<str>),
}

impl Changed {
    /// Nothing is known of them.
    #[must_use]
    pub fn unknown(why: &str) -> Changed {
        Changed::Unknown(why.into())
    }

    /// The table, if it is to be believed.
    ///
    /// # Errors
    /// Why it is not.
    pub fn known(&self) -> Result<&Arc<Table>, &str> {
        match self {
            Changed::Noted(table) if !table.is_broken() => Ok(table),
            Changed::Noted(_) => Err(NO_ROOM),
            Changed::Unknown(why) => Err(why),
        }
    }

    /// The table, believed or not.
    #[must_use]
    pub fn table(&self) -> Option<&Arc<Table>> {
        match self {
            Changed::Noted(table) => Some(table),
            Changed::Unknown(_) => None,
        }
    }

    /// Takes in what was noted for a marker that goes.
    pub(super) fn take_in(&self, gone: Option<&Changed>) {
        let Changed::Noted(table) = self else { return };
        let merged = gone.and_then(|gone| gone.known().ok()).is_some_and(|gone| table.merge(gone).is_ok());
        if !merged {
            table.mark_broken();
        }
    }
}
