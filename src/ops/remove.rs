//! Letting disks and volumes go, served or not.
//!
//! What always holds: what others need never goes (`registry`); requests have ended before a record is forgotten, and the
//! record is before the files that it names, which the next start removes if this is cut off; a disk's own image and the legs
//! of its mirror are the user's and stay.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::control::{ApiError, ErrorCode, EventKind, Name, Notice};
use crate::crash;
use crate::image::{Direct, ImageErrorKind, ImageOptions};
use crate::manager::changes::ids_of_changes;
use crate::manager::claims::Held;
use crate::manager::entry::{DiskEntry, locked};
use crate::manager::followups::FollowUp;
use crate::manager::sockets::serve_live;
use crate::manager::{Manager, record_error};
use crate::registry::Command;
use crate::store::{DiskRecord, RecordError};

impl Manager {
    /// Stops serving a disk, or forgets one that is not served; its image stays.
    pub(crate) fn remove_disk(&self, name: &Name, force: bool) -> Result<(), ApiError> {
        let command = Command::RemoveDisk { disk: name.clone(), force };
        let (held, _) = self.claim(&command)?;
        self.let_go(name, &command, &held)?;
        self.bus.publish(Notice::of_disk(EventKind::DiskRemoved, name));
        log::info!("disk {name}: no longer served");
        Ok(())
    }

    /// Deletes a volume and what was written to it.
    pub(crate) fn remove_volume(&self, name: &Name, force: bool) -> Result<(), ApiError> {
        let command = Command::DeleteVolume { volume: name.clone(), force };
        let (held, _) = self.claim(&command)?;
        self.let_go(name, &command, &held)?;
        self.bus.publish(Notice::of_disk(EventKind::VolumeDeleted, name));
        log::info!("volume {name}: deleted");
        self.tidy_moments_later();
        Ok(())
    }

    /// Forgets a disk or volume that is not served, and all that is remembered of it.
    pub(crate) fn forget(&self, name: &Name) -> Result<(), ApiError> {
        let command = Command::Forget { disk: name.clone() };
        let (held, _) = self.claim(&command)?;
        let kind = match locked(&self.unserved).get(name).is_some_and(crate::manager::unserved::Unserved::is_volume) {
            true => EventKind::VolumeDeleted,
            false => EventKind::DiskRemoved,
        };
        self.let_go(name, &command, &held)?;
        self.bus.publish(Notice::of_disk(kind, name));
        log::info!("{name}: forgotten");
        self.tidy_moments_later();
        Ok(())
    }

    fn let_go(&self, name: &Name, command: &Command, held: &Held) -> Result<(), ApiError> {
        let unserved = locked(&self.unserved).get(name).cloned();
        let is_served = locked(&self.disks).contains_key(name);
        if let Some(unserved) = unserved.filter(|_| !is_served) {
            match &unserved.record {
                Some(record) => {
                    self.refuse_what_is_in_use(record)?;
                    self.forget_record(record)?;
                }
                None => self.records.remove(name.as_str()).map_err(record_error)?,
            }
            locked(&self.unserved).remove(name);
            return Ok(());
        }
        let entry = self.disk(name)?;
        let snapshots = entry.snapshots();
        let places = || std::iter::once(&entry.server).chain(snapshots.iter().map(|snapshot| &snapshot.server));
        let servers: Vec<_> = places().filter_map(|server| locked(server).clone()).collect();
        held.waits_for(Some("its requests in flight".to_owned()));
        self.stop_servers(&entry, &servers, command, || Ok(()))?;
        entry.stop_abandoned();
        held.waits_for(None);
        places().for_each(|server| *locked(server) = None);
        let record = entry.to_record();
        match self.records.remove(name.as_str()) {
            Ok(()) => {}
            // Whoever wrote to it now might lose that with the next start.
            Err(e @ RecordError::Unknown(_)) => {
                self.follow_up(FollowUp::Stay(entry));
                return Err(record_error(e));
            }
            Err(e) => {
                self.serve_what_stays(&entry);
                return Err(record_error(e));
            }
        }
        crash::point("after a volume was forgotten");
        locked(&self.disks).remove(name);
        // Who still waits for one of them to be quiesced finds it gone.
        locked(&entry.snapshots).clear();
        self.remove_files_of(&record);
        self.forget_jobs_of(&entry);
        Ok(())
    }

    /// A removal that could not be recorded did not take place. What was not open stays so.
    pub(crate) fn serve_what_stays(&self, entry: &Arc<DiskEntry>) {
        if !locked(&entry.relations).disabled {
            match serve_live(&*self.host, &entry.name.get(), &entry.config(), &entry.disk, &entry.frontends) {
                Ok(server) => *locked(&entry.server) = Some(server),
                Err(e) => log::error!("{}: its socket cannot be opened again: {e}", entry.name),
            }
        }
        self.open_sockets_of_snapshots(entry);
    }

    /// What goes with the record of a disk that is not served may have become the image of one that is, by whatever name.
    fn refuse_what_is_in_use(&self, record: &DiskRecord) -> Result<(), ApiError> {
        let logs = record.live_log.iter().chain(record.snapshots.iter().filter(|s| !s.owns_all).map(|s| &s.image));
        let options = ImageOptions { direct: Direct::Off, read_only: false, lock_wait: Duration::ZERO };
        for path in logs.cloned().chain(full_image(record)) {
            if let Err(e) = self.host.probe_image(&path, options)
                && e.kind == ImageErrorKind::InUse
            {
                let message = format!("{}: its image goes with it, and is in use: {e}", record.name);
                return Err(ApiError::new(ErrorCode::Conflict, message)
                    .with_action("remove the disk that has it, or stop the program"));
            }
        }
        Ok(())
    }

    /// Forgets a record, and removes what it names.
    pub(crate) fn forget_record(&self, record: &DiskRecord) -> Result<(), ApiError> {
        self.records.remove(&record.name).map_err(record_error)?;
        self.remove_files_of(record);
        Ok(())
    }

    /// Removes all files that were made for a disk or volume. A snapshot that has a full image has a leg: that is the user's.
    fn remove_files_of(&self, record: &DiskRecord) {
        if let Some(log) = &record.live_log {
            self.remove_layer(record.live, log);
        }
        for snapshot in record.snapshots.iter().filter(|snapshot| !snapshot.owns_all) {
            self.remove_layer(snapshot.id, &snapshot.image);
        }
        ids_of_changes(record).for_each(|id| self.remove_changed_table(id));
        self.remove_file(&self.places.durable_table(record.id));
        self.remove_file(&self.places.run_table(record.id));
        if let Some(mirror) = &record.mirror {
            self.remove_file(&self.places.log_table(mirror.bitmap));
        }
        if let Some(restore) = &record.restore {
            self.remove_restore_files(restore.id);
        }
        if record.is_volume() {
            // A second name of a log, that was about to be its only one.
            self.remove_file(&self.places.own_image(record.id));
            full_image(record).iter().for_each(|path| self.remove_file(path));
        }
    }
}

/// The full image of a volume that became independent: it is what was written to the volume.
fn full_image(record: &DiskRecord) -> Option<PathBuf> {
    record.stood_on.as_ref()?;
    Some(PathBuf::from(record.config.get("path")?.as_str()?))
}
