//! What differs between moments of a disk, and what a volume has itself.

use uuid::Uuid;

use super::engine::Disk;
use crate::engine::{ChangeSource, Changes, NoChanges, VersionId};
use crate::store::BlockRange;

/// Runs of blocks in ascending order; no two of them touch.
pub type Runs = Box<dyn Iterator<Item = BlockRange> + Send>;

/// How a volume and its source differ, in blocks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeCounts {
    /// Those that are in the volume's own images.
    pub owned: u64,
    /// Those that were written to it since it was made.
    pub changed: Result<u64, String>,
    /// Those that were written to its source since then.
    pub source_changed: Result<u64, String>,
    /// Those that were written to either, if that is known and they have the same size.
    pub differing: Option<u64>,
}

impl Disk {
    /// The blocks that may differ between the moment `from`, a frozen version or a mark, and the later one `to`, or the
    /// present; and where that comes from.
    ///
    /// # Errors
    /// When there is no such moment or its content is not settled, or when everything may have changed.
    pub fn changes(&self, from: VersionId, to: Option<VersionId>) -> Result<(ChangeSource, Runs), NoChanges> {
        let changes = self.open().disk.changes(from, to)?;
        Ok((changes.source(), Box::new(changes.into_runs())))
    }

    /// What was written to a volume since its version `origin`.
    ///
    /// # Errors
    /// Why that is not known.
    pub fn written_since(&self, origin: VersionId) -> Result<Runs, String> {
        self.noted_since(origin).map(|changes| Box::new(changes.into_runs()) as Runs)
    }

    fn noted_since(&self, origin: VersionId) -> Result<Changes, String> {
        match self.open().disk.changes(origin, None) {
            Ok(changes) if changes.source() == ChangeSource::Changed => Ok(changes),
            Ok(_) => Err("what was noted of its changes is lost; what it owns is known".to_owned()),
            Err(e) => Err(e.to_string()),
        }
    }

    /// The blocks that are in a volume's own images. None if it stands on nothing, and has everything.
    #[must_use]
    pub fn owned_by_volume(&self) -> Option<Runs> {
        self.open().disk.owned_by_volume().map(|owned| Box::new(owned.into_runs()) as Runs)
    }

    /// How a volume that began as its version `origin` shows differs from its source since the version that it stands on;
    /// that is given with its disk, if it is there.
    #[must_use]
    pub fn volume_counts(&self, origin: VersionId, source: Option<(Uuid, VersionId)>) -> VolumeCounts {
        let disk = self.open().disk.clone();
        let changed = self.noted_since(origin);
        let source = source.and_then(|(source, version)| Some((self.engine.find(source)?, version)));
        let theirs = match source {
            Some((source, version)) => source.disk.changes(version, None).map_err(|e| e.to_string()),
            None => Err("its source is not served".to_owned()),
        };
        let differing = match (&changed, &theirs) {
            (Ok(ours), Ok(theirs)) if ours.blocks() == theirs.blocks() => Some(ours.count_with(theirs)),
            _ => None,
        };
        VolumeCounts {
            owned: disk.owned_by_volume().map_or(disk.geometry().blocks(), |owned| owned.count()),
            changed: changed.as_ref().map(Changes::count).map_err(Clone::clone),
            source_changed: theirs.as_ref().map(Changes::count).map_err(Clone::clone),
            differing,
        }
    }
}
