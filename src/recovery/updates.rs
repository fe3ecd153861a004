//! Whether what was taken for the update of a volume is still needed. What is not goes by itself.

use uuid::Uuid;

use crate::store::{DiskRecord, VolumeRecord};

/// What a volume needs a moment of its source for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// It stands on that snapshot, or is restored from it.
    Snapshot,
    /// It stood on it, and asks what has changed since.
    Bookmark,
    /// Nothing.
    Nothing,
}

impl Need {
    /// What the volume needs the moment for that was taken for its update. One that is not there needs nothing.
    #[must_use]
    pub fn of(records: &[DiskRecord], volume: Uuid, moment: Uuid) -> Need {
        let Some(volume) = records.iter().find(|record| record.id == volume) else { return Need::Nothing };
        let is_it = |of: &Option<VolumeRecord>| of.as_ref().is_some_and(|of| of.snapshot == moment);
        let is_restored = volume.restore.as_ref().is_some_and(|restore| restore.source == moment);
        match (is_it(&volume.volume) || is_restored, is_it(&volume.stood_on)) {
            (true, _) => Need::Snapshot,
            (false, true) => Need::Bookmark,
            (false, false) => Need::Nothing,
        }
    }
}
