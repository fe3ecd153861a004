//! Who may change chains: one at a time for the whole daemon, because a group of disks is published at one cut.

use super::EpochClock;
use crate::sync::{Mutex, MutexGuard, lock};

/// Changes chains, one change at a time.
pub struct ChainEditor {
    pub(super) clock: EpochClock,
    editing: Mutex<()>,
}

impl ChainEditor {
    /// The editor of the disks that go by `clock`.
    #[must_use]
    pub fn new(clock: EpochClock) -> ChainEditor {
        ChainEditor { clock, editing: Mutex::new(()) }
    }

    /// Keeps all other changes away until it is dropped.
    pub(super) fn begin(&self) -> MutexGuard<'_, ()> {
        lock(&self.editing)
    }
}
