//! Disks and volumes that are remembered and not served: listed with the reason, and forgotten if that is wanted.
//!
//! What always holds: nothing that others need is forgotten; the record goes before the files that it names, which the
//! next start removes if this is killed; a disk's own image, or its legs, are the user's and stay.

use uuid::Uuid;

use super::changes::ids_of_changes;
use super::diff::is_id;
use super::entry::locked;
use super::layers::remove_file;
use super::manager::{Manager, record_error};
use crate::control::api::{Disk, DiskConfig, Unserved};
use crate::control::{ApiError, ErrorCode, EventKind, Name, Notice};
use crate::store::DiskRecord;

impl Manager {
    /// The disks that are not served, by name.
    pub(super) fn unserved_disks(&self) -> Vec<Disk> {
        locked(&self.lost_disks).iter().map(|(name, (record, reason))| disk_of(name, record, reason)).collect()
    }

    /// A disk that is not served, by its name or id.
    pub(super) fn unserved_disk(&self, name: &Name) -> Option<Disk> {
        let mut disks = self.unserved_disks();
        let found = |disk: &Disk| disk.name == *name || disk.id.is_some_and(|id| is_id(name, id));
        disks.iter().position(found).map(|at| disks.swap_remove(at))
    }

    /// All that is remembered and not served, by name.
    pub(super) fn all_unserved(&self) -> Vec<Unserved> {
        let of = |(name, (record, reason)): (&Name, &(DiskRecord, String))| Unserved {
            name: name.clone(),
            id: Some(record.id),
            reason: reason.clone(),
        };
        let mut all: Vec<_> = locked(&self.lost_disks).iter().map(of).collect();
        all.extend(locked(&self.lost_volumes).iter().map(of));
        all.sort_by(|one, other| one.name.cmp(&other.name));
        all
    }

    /// Refuses what can be done only with a disk that is served.
    pub(super) fn refuse_unserved(&self, name: &Name) -> Result<(), ApiError> {
        match locked(&self.lost_disks).get(name) {
            Some((_, reason)) => Err(unserved(name, reason)),
            None => Ok(()),
        }
    }

    pub(super) fn forget_unserved(&self, name: &Name) -> Result<(), ApiError> {
        if locked(&self.lost_volumes).contains_key(name) {
            return self.remove_volume(name, false);
        }
        if let Ok(disk) = self.disk(name) {
            let what = if disk.is_volume() { "volume" } else { "disk" };
            let instead = if disk.is_volume() { "delete" } else { "remove" };
            return Err(ApiError::new(ErrorCode::DiskBusy, format!("{what} {name} is served"))
                .with_action(format!("to be rid of it all the same: halfsilver {what} {instead} {name}")));
        }
        self.remove_unserved(name, true)
    }

    /// Forgets a disk that is not served; with `force` also what only its record tells of.
    pub(super) fn remove_unserved(&self, name: &Name, force: bool) -> Result<(), ApiError> {
        let _structure = locked(&self.structure);
        self.refuse_when_stopping()?;
        let record = locked(&self.lost_disks).get(name).map(|(record, _)| record.clone());
        let record = record.ok_or_else(|| ApiError::disk_not_found(name))?;
        self.refuse_if_needed(name, &record)?;
        let (snapshots, bookmarks) = (record.snapshots.len(), record.bookmarks.len());
        if !force && (snapshots > 0 || bookmarks > 0 || record.live_log.is_some()) {
            let message = format!(
                "disk {name} is not served, and is remembered with {snapshots} snapshots and {bookmarks} bookmarks"
            );
            return Err(ApiError::new(ErrorCode::DiskBusy, message)
                .with_action(format!("forget all of them with it: halfsilver disk forget {name}")));
        }
        self.records.remove(name.as_str()).map_err(record_error)?;
        locked(&self.lost_disks).remove(name);
        self.remove_files_of(&record);
        self.forget_jobs_of(name);
        self.bus.publish(Notice::of_disk(EventKind::DiskRemoved, name));
        log::info!("disk {name}: forgotten");
        Ok(())
    }

    /// Refuses to forget what a volume stands on, or a disk is restored from. The structure is locked.
    fn refuse_if_needed(&self, name: &Name, record: &DiskRecord) -> Result<(), ApiError> {
        for snapshot in &record.snapshots {
            if let Some(volume) = self.volumes_on(snapshot.id).first() {
                let message = format!("snapshot {name}@{} is needed by volume {volume}", snapshot.name);
                return Err(ApiError::new(ErrorCode::DiskBusy, message)
                    .with_action(format!("delete first what stands on it: halfsilver volume delete {volume}")));
            }
        }
        let has = |source: Uuid| record.snapshots.iter().any(|s| s.id == source);
        let needs = |restore: Option<Uuid>| restore.is_some_and(has);
        let served = self.all_disks().into_iter().find(|d| needs(locked(&d.restore).as_ref().map(|r| r.source)));
        let lost = locked(&self.lost_disks);
        let mut lost = lost.iter().filter(|(other, _)| *other != name);
        let lost = lost.find(|(_, (r, _))| needs(r.restore.as_ref().map(|r| r.source))).map(|(name, _)| name.clone());
        match served.map(|disk| disk.name.clone()).or(lost) {
            Some(disk) => {
                Err(ApiError::new(ErrorCode::DiskBusy, format!("disk {disk} is being restored from disk {name}"))
                    .with_action(format!("put back what {name} lacks and start again, or give up {disk} first")))
            }
            None => Ok(()),
        }
    }

    /// Removes all files that were made for a disk. A snapshot that has a full image has a leg: that is the user's.
    fn remove_files_of(&self, record: &DiskRecord) {
        if let Some(log) = &record.live_log {
            self.remove_layer(record.live, log);
        }
        for snapshot in record.snapshots.iter().filter(|snapshot| !snapshot.owns_all) {
            self.remove_layer(snapshot.id, &snapshot.image);
        }
        ids_of_changes(record).for_each(|id| self.remove_changed_table(id));
        remove_file(&self.places.durable_table(record.id));
        remove_file(&self.places.run_table(record.id));
        if let Some(mirror) = &record.mirror {
            remove_file(&self.places.log_table(mirror.bitmap));
        }
        if let Some(restore) = &record.restore {
            self.remove_restore_files(restore.id);
        }
    }
}

fn unserved(name: &Name, reason: &str) -> ApiError {
    ApiError::new(ErrorCode::DiskFailed, format!("disk {name} is not served: {reason}")).with_action(format!(
        "mend that and serve it again (halfsilver disk add), or be rid of it: halfsilver disk forget {name}"
    ))
}

fn disk_of(name: &Name, record: &DiskRecord, reason: &str) -> Disk {
    let disk = Disk {
        id: Some(record.id),
        epoch: record.live_began,
        snapshots: u32::try_from(record.snapshots.len()).unwrap_or(u32::MAX),
        ..Disk::unserved(name.clone(), reason.to_owned())
    };
    match serde_json::from_value::<DiskConfig>(record.config.clone()) {
        Ok(config) => disk.with_config(&config),
        Err(_) => disk,
    }
}
