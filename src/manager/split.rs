//! The leg that a write-mirroring snapshot takes, and what becomes of it when the snapshot goes (source 002; figures 9 to 14).

use std::path::Path;
use std::sync::Arc;

use crate::control::ApiError;
use crate::control::api::Strategy;
use crate::engine::{self, Backing, LegImage};
use crate::image::SharedImage;
use crate::manager::Manager;
use crate::manager::entry::{DiskEntry, SnapshotEntry, locked};
use crate::manager::legs::pair_error;

impl Manager {
    /// What a write-mirroring snapshot needs: the leg that it takes, and what the live version goes on with.
    pub(crate) fn split(&self, disk: &DiskEntry) -> Result<(Backing, Backing), ApiError> {
        let pair = locked(&disk.mirror).as_ref().filter(|m| m.legs.len() == 2).map(|m| m.pair.clone());
        let pair = pair.ok_or_else(|| ApiError::no_second_leg(&disk.name))?;
        let of = pair.clone();
        self.in_ring(async move |queue| of.prepare_split(&queue).await)
            .map_err(|e| ApiError { message: format!("disk {}: {}", disk.name, e.message), ..e })?;
        let frozen = pair.second().ok_or_else(|| ApiError::no_second_leg(&disk.name))?;
        let live = pair.detached().map_err(pair_error)?;
        if let Some(mirror) = locked(&disk.mirror).as_mut() {
            mirror.pair = live.clone();
        }
        Ok((Backing::One(frozen.image), Backing::Pair(live)))
    }

    /// A leg that failed after its split was prepared and before the cut: nothing was frozen on it yet.
    pub(crate) fn check_split(disk: &DiskEntry, entry: &SnapshotEntry, version: &engine::Version) {
        let path = locked(&entry.record).image.clone();
        let state = locked(&disk.mirror).as_ref().and_then(|mirror| {
            let (leg, _) = mirror.legs.iter().find(|(leg, _)| leg.path == path)?;
            mirror.state_of(leg.id)
        });
        if let Some(engine::LegState::Failed(reason)) = state {
            disk.disk.break_version(version, &reason);
        }
    }

    /// A leg comes back to the mirror, with what was written since it was split.
    pub(crate) fn rejoin(&self, disk: &Arc<DiskEntry>, path: &Path, image: SharedImage) -> Result<(), String> {
        let (pair, id) = {
            let mirror = locked(&disk.mirror);
            let mirror = mirror.as_ref().ok_or("the disk has no mirror any more")?;
            let (leg, _) = mirror.legs.iter().find(|(leg, _)| leg.path == path).ok_or("it is no leg any more")?;
            (mirror.pair.clone(), leg.id)
        };
        let (of, leg) = (pair.clone(), LegImage { id, image: image.clone() });
        self.in_ring(async move |queue| of.attach(&queue, leg, false).await).map_err(|e| e.message)?;
        if let Some(mirror) = locked(&disk.mirror).as_mut()
            && let Some((_, place)) = mirror.legs.iter_mut().find(|(leg, _)| leg.id == id)
        {
            *place = Some(image);
        }
        self.start_resync(disk, pair);
        Ok(())
    }

    /// Lets a leg go that does not come back, if there is one at `path`: by the bitmap alone nobody can tell any more what
    /// it holds. Its file stays.
    pub(crate) fn lose_leg(&self, disk: &Arc<DiskEntry>, path: &Path) -> Result<(), ApiError> {
        let leg = locked(&disk.mirror)
            .as_ref()
            .and_then(|m| m.legs.iter().find(|(leg, _)| leg.path == path).map(|(leg, _)| leg.clone()));
        leg.map_or(Ok(()), |leg| self.let_leg_go(disk, &leg))
    }

    /// The leg of a write-mirroring snapshot that is not to come back is none any more before the snapshot leaves the chain: a
    /// start in between must not take it for a split that never came to be.
    pub(crate) fn lose_leg_of(&self, disk: &Arc<DiskEntry>, entry: &SnapshotEntry) -> Result<(), ApiError> {
        let (is_split, path) = {
            let record = locked(&entry.record);
            (record.strategy == Strategy::WriteMirroring.to_string(), record.image.clone())
        };
        if is_split { self.lose_leg(disk, &path) } else { Ok(()) }
    }
}
