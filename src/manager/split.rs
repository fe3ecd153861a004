//! The leg that a write-mirroring snapshot takes, and what becomes of it when the snapshot goes (source 002; figures 9 to 14).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::control::ApiError;
use crate::manager::entry::{DiskEntry, SnapshotEntry, locked};
use crate::manager::legs::Mirror;
use crate::manager::{Manager, engine_error};
use crate::store::Strategy;

impl Manager {
    /// Prepares the split of a mirror. Returns where the leg is that the snapshot takes.
    pub(crate) fn split(&self, disk: &DiskEntry) -> Result<PathBuf, ApiError> {
        if locked(&disk.mirror).as_ref().is_none_or(|mirror| mirror.legs.len() != 2) {
            return Err(ApiError::no_second_leg(&disk.name));
        }
        let split = disk.disk.split().map_err(engine_error);
        split.map_err(|e| ApiError { message: format!("disk {}: {}", disk.name, e.message), ..e })
    }

    /// The records have forgotten a snapshot that has left the chain. The leg at `path`, if it had one that comes back, does so
    /// with what was written since it was split.
    pub(crate) fn rejoin(&self, disk: &Arc<DiskEntry>, path: Option<&Path>) -> Result<(), String> {
        let named = |mirror: &Mirror| mirror.legs.iter().find(|leg| Some(&*leg.path) == path).map(|leg| leg.id);
        let leg = locked(&disk.mirror).as_ref().and_then(named);
        disk.disk.retired_forgotten(leg).map_err(|e| e.to_string())?;
        match (path, leg) {
            (None, _) => Ok(()),
            (Some(_), None) => Err("it is no leg any more".to_owned()),
            (Some(_), Some(_)) => {
                self.start_resync(disk);
                Ok(())
            }
        }
    }

    /// Lets a leg go that does not come back, if there is one at `path`: by the bitmap alone nobody can tell any more what
    /// it holds. Its file stays.
    pub(crate) fn lose_leg(&self, disk: &Arc<DiskEntry>, path: &Path) -> Result<(), ApiError> {
        let leg = locked(&disk.mirror).as_ref().and_then(|m| m.legs.iter().find(|leg| leg.path == path).cloned());
        leg.map_or(Ok(()), |leg| self.let_leg_go(disk, &leg))
    }

    /// The leg of a write-mirroring snapshot that is not to come back is none any more before the snapshot leaves the chain: a
    /// start in between must not take it for a split that never came to be.
    pub(crate) fn lose_leg_of(&self, disk: &Arc<DiskEntry>, entry: &SnapshotEntry) -> Result<(), ApiError> {
        let (is_split, path) = {
            let record = locked(&entry.record);
            (record.strategy == Strategy::WriteMirroring, record.image.clone())
        };
        if is_split { self.lose_leg(disk, &path) } else { Ok(()) }
    }
}
