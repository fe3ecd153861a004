//! Volumes that are there: found, shown, and put on what they stand on.

use std::sync::Arc;

use crate::control::api::{self, DiskConfig, VolumeState};
use crate::control::timestamp::Timestamp;
use crate::control::{ApiError, ErrorCode, Name};
use crate::door::BaseSpec;
use crate::manager::Manager;
use crate::manager::entry::{DiskEntry, locked};
use crate::recovery::Why;
use crate::store::{DiskRecord, VolumeRecord};

impl Manager {
    /// A disk that is no volume.
    pub(crate) fn plain_disk(&self, name: &Name) -> Result<Arc<DiskEntry>, ApiError> {
        let disk = self.disk(name)?;
        match disk.is_volume() {
            false => Ok(disk),
            true => Err(ApiError::new(ErrorCode::DiskNotFound, format!("{name} is a volume, not a disk"))
                .with_action(format!("see 'halfsilver volume show {name}'"))),
        }
    }

    /// A volume that is served, or disabled.
    pub(crate) fn volume(&self, name: &Name) -> Result<Arc<DiskEntry>, ApiError> {
        self.refuse_unserved(name)?;
        let entry = self.disk(name).ok().filter(|d| d.is_volume());
        entry.ok_or_else(|| self.no_volume(name))
    }

    /// There is no such volume; but there may be a disk of that name.
    pub(crate) fn no_volume(&self, name: &Name) -> ApiError {
        ApiError::volume_not_found(name, self.registry().named(name).is_some_and(|disk| !disk.is_volume()))
    }

    /// What a volume stands on, as it is now. One that is lost, by what was decided too, says why at each request.
    pub(crate) fn base_of(&self, volume: &VolumeRecord, decided: Option<&Why>) -> BaseSpec {
        let found = self.all_disks().into_iter().find_map(|disk| {
            let entry = disk.snapshots().into_iter().find(|s| s.id == volume.snapshot)?;
            Some((disk, entry))
        });
        let from = self.name_now(volume.snapshot, &volume.from);
        let lost = |why: &str| BaseSpec::lost(why, volume.snapshot, &from, volume.size_bytes);
        if let Some(Why::BaseLost { why, .. }) = decided {
            return lost(&why.to_string());
        }
        match found {
            None => lost("its disk is not served"),
            Some((disk, entry)) if entry.is_lost => lost(&entry.broken(&disk.facts()).unwrap_or_default()),
            Some((disk, entry))
                if disk.facts().version(entry.id).is_some_and(|v| v.size_bytes != volume.size_bytes) =>
            {
                lost("it has another size now")
            }
            Some((disk, _)) => disk.disk.base(volume.snapshot, &from),
        }
    }

    /// All volumes by name, also those that are not served.
    pub(crate) fn all_volumes(&self) -> Vec<api::Volume> {
        let (served, unserved) = self.all_there();
        let mut volumes: Vec<_> = served.iter().filter(|d| d.is_volume()).map(|d| d.to_volume(self)).collect();
        volumes.extend(unserved.iter().filter_map(|u| self.unserved_to_volume(u)));
        volumes.sort_by(|one, other| one.name.cmp(&other.name));
        volumes
    }
}

pub(crate) fn of_lost(name: &Name, record: &DiskRecord, why: &str) -> Option<api::Volume> {
    let volume = record.volume.as_ref().or(record.stood_on.as_ref())?;
    let config: DiskConfig = serde_json::from_value(record.config.clone()).ok()?;
    Some(api::Volume {
        id: record.id,
        name: name.clone(),
        from: volume.from.clone(),
        from_id: volume.snapshot,
        state: VolumeState::Broken,
        reason: Some(why.to_owned()),
        socket: config.socket.clone().unwrap_or_default(),
        independent: record.volume.is_none(),
        image: record.live_log.clone().unwrap_or_else(|| config.path.clone()),
        size_bytes: volume.size_bytes,
        block_size: config.block_size,
        owned_bytes: 0,
        settings: api::Settings::of(&config),
        connected: false,
        frontends: 0,
        snapshots: u32::try_from(record.snapshots.len()).unwrap_or(u32::MAX),
        created_at: Timestamp::from_unix_ms(volume.created_ms),
    })
}

impl DiskEntry {
    pub(crate) fn to_volume(&self, manager: &Manager) -> api::Volume {
        let facts = self.facts();
        let (live, geometry, reason) = (facts.live(), &facts.geometry, self.failure());
        let frontends = self.frontends.count();
        let relations = locked(&self.relations).clone();
        let from = relations.relation().map(|v| manager.name_now(v.snapshot, &v.from)).unwrap_or_default();
        let state = self.volume_state(reason.as_ref());
        api::Volume {
            id: self.id,
            name: self.name.get(),
            from,
            from_id: relations.relation().map(|v| v.snapshot).unwrap_or_default(),
            independent: relations.volume.is_none(),
            state,
            reason,
            socket: self.socket(),
            image: live.image.clone(),
            size_bytes: geometry.size_bytes,
            block_size: geometry.block_bytes,
            owned_bytes: facts.owned_bytes(live),
            settings: self.settings(&facts),
            connected: frontends > 0,
            frontends,
            snapshots: u32::try_from(self.snapshots().len()).unwrap_or(u32::MAX),
            created_at: Timestamp::from_unix_ms(relations.relation().map_or(0, |v| v.created_ms)),
        }
    }
}
