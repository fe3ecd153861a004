//! Letting disks and volumes go, served or not.
//!
//! What always holds: what others need never goes (`registry`); requests have ended before a record is forgotten, and the
//! record is before the files that it names, which the next start removes if this is cut off; a disk's own image and the legs
//! of its mirror are the user's and stay.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use crate::control::{ApiError, ErrorCode, EventKind, Name, Notice};
use crate::crash;
use crate::host::{Host, receive};
use crate::image::{Direct, ImageErrorKind, ImageOptions};
use crate::manager::changes::ids_of_changes;
use crate::manager::entry::{DiskEntry, locked};
use crate::manager::followups::FollowUp;
use crate::manager::sockets::serve_live;
use crate::manager::unserved::images_of;
use crate::manager::{Manager, record_error};
use crate::registry::Command;
use crate::store::{DiskRecord, RecordError};

/// How long the images of what is forgotten may take to be looked at.
const LOOK_WAIT: Duration = Duration::from_secs(10);
/// How long it is waited for somebody who holds one: we may have looked at it ourselves just now.
const LOCK_WAIT: Duration = Duration::from_secs(1);

impl Manager {
    /// Stops serving a disk, or forgets one that is not served; its image stays.
    pub(crate) fn remove_disk(&self, name: &Name, force: bool) -> Result<(), ApiError> {
        let command = Command::RemoveDisk { disk: name.clone(), force };
        let _claim = self.claim(&command)?;
        self.let_go(name, &command)?;
        self.bus.publish(Notice::of_disk(EventKind::DiskRemoved, name));
        log::info!("disk {name}: no longer served");
        Ok(())
    }

    /// Deletes a volume and what was written to it.
    pub(crate) fn remove_volume(&self, name: &Name, force: bool) -> Result<(), ApiError> {
        let command = Command::DeleteVolume { volume: name.clone(), force };
        let _claim = self.claim(&command)?;
        self.let_go(name, &command)?;
        self.bus.publish(Notice::of_disk(EventKind::VolumeDeleted, name));
        log::info!("volume {name}: deleted");
        self.tidy_moments_later();
        Ok(())
    }

    /// Forgets a disk or volume that is not served, and all that is remembered of it.
    pub(crate) fn forget(&self, name: &Name) -> Result<(), ApiError> {
        let command = Command::Forget { disk: name.clone() };
        let _claim = self.claim(&command)?;
        let kind = match locked(&self.unserved).get(name).is_some_and(crate::manager::unserved::Unserved::is_volume) {
            true => EventKind::VolumeDeleted,
            false => EventKind::DiskRemoved,
        };
        self.let_go(name, &command)?;
        self.bus.publish(Notice::of_disk(kind, name));
        log::info!("{name}: forgotten");
        self.tidy_moments_later();
        Ok(())
    }

    fn let_go(&self, name: &Name, command: &Command) -> Result<(), ApiError> {
        let unserved = locked(&self.unserved).get(name).cloned();
        let is_served = locked(&self.disks).contains_key(name);
        if let Some(unserved) = unserved.filter(|_| !is_served) {
            match &unserved.record {
                Some(record) => {
                    let images = self.images_that_go(record)?;
                    self.records.remove(&record.name).map_err(record_error)?;
                    self.remove_files_of(record, &images);
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
        let waits = self.waiting_for(&entry, self.requests_of(&entry));
        self.stop_servers(&entry, &servers, command, || Ok(()))?;
        entry.stop_abandoned();
        drop(waits);
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
        self.remove_files_of(&record, &self.images_made_for(&record));
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

    /// The images that go with the record of a disk that is not served. None of them if they do not answer.
    ///
    /// # Errors
    /// When one of them is somebody's, by whatever name, or that cannot be told.
    fn images_that_go(&self, record: &DiskRecord) -> Result<Vec<PathBuf>, ApiError> {
        let images = self.images_made_for(record);
        let (served, unserved) = self.all_there();
        let unserved = unserved.into_iter().filter(|u| u.id != record.id).filter_map(|u| u.record);
        let others = served.iter().map(|disk| disk.to_record()).chain(unserved);
        let theirs: Vec<(PathBuf, String)> = others.flat_map(|other| images_of(&other)).collect();
        let Some(taken) = taken_in_time(&self.host, &images, theirs) else {
            log::warn!("{}: its images do not answer, and stay when it is forgotten: {images:?}", record.name);
            return Ok(Vec::new());
        };
        match taken {
            None => Ok(images),
            Some(why) => {
                Err(ApiError::new(ErrorCode::Conflict, format!("{}: its image goes with it: {why}", record.name))
                    .with_action("remove the disk that has it, or stop the program; or put the image elsewhere"))
            }
        }
    }

    /// Forgets a record, and removes what it names.
    pub(crate) fn forget_record(&self, record: &DiskRecord) -> Result<(), ApiError> {
        self.records.remove(&record.name).map_err(record_error)?;
        self.remove_files_of(record, &self.images_made_for(record));
        Ok(())
    }

    /// The images that were made for a disk or volume. A snapshot that has a full image has a leg: that is the user's.
    fn images_made_for(&self, record: &DiskRecord) -> Vec<PathBuf> {
        let snapshots = record.snapshots.iter().filter(|s| !s.owns_all).map(|s| s.image.clone());
        // A second name of a log, that was about to be its only one.
        let second = record.is_volume().then(|| self.places.own_image(record.id));
        let images = record.live_log.iter().cloned().chain(snapshots).chain(second).chain(full_image(record));
        images.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Removes the files that were made for a disk or volume; of the images these.
    fn remove_files_of(&self, record: &DiskRecord, images: &[PathBuf]) {
        images.iter().for_each(|image| self.remove_file(image));
        let live = record.live_log.iter().map(|_| record.live);
        let layers = live.chain(record.snapshots.iter().filter(|s| !s.owns_all).map(|s| s.id));
        layers.for_each(|id| self.remove_tables_of_layer(id));
        ids_of_changes(record).for_each(|id| self.remove_changed_table(id));
        self.remove_file(&self.places.durable_table(record.id));
        self.remove_file(&self.places.run_table(record.id));
        if let Some(mirror) = &record.mirror {
            self.remove_file(&self.places.log_table(mirror.bitmap));
        }
        if let Some(restore) = &record.restore {
            self.remove_restore_files(restore.id);
        }
    }
}

/// The full image of a volume that became independent: it is what was written to the volume.
fn full_image(record: &DiskRecord) -> Option<PathBuf> {
    record.stood_on.as_ref()?;
    Some(PathBuf::from(record.config.get("path")?.as_str()?))
}

/// Why one of these images is not to be removed, if so: it is one of `theirs`, with whose that is, or somebody holds it, or that
/// cannot be told. None at all if nobody answers in time.
fn taken_in_time(host: &Arc<dyn Host>, images: &[PathBuf], theirs: Vec<(PathBuf, String)>) -> Option<Option<String>> {
    let (tell, told) = channel();
    let (images, on) = (images.to_vec(), host.clone());
    let look = move || {
        if tell.send(why_taken(&*on, &images, &theirs)).is_err() {
            log::debug!("nobody waits any more for what images are");
        }
    };
    // None of those that a stop joins.
    if let Err(e) = host.start_thread("look", Box::new(look)) {
        return Some(Some(format!("no thread can look whether somebody has it: {e}")));
    }
    receive(&**host, &told, LOOK_WAIT).ok()
}

fn why_taken(host: &dyn Host, images: &[PathBuf], theirs: &[(PathBuf, String)]) -> Option<String> {
    let identity = |path: &Path| host.look(&host.resolve(path)).ok().map(|look| look.identity);
    let theirs: Vec<_> = theirs.iter().map(|(path, whose)| (path, identity(path), whose)).collect();
    let mut probed = BTreeSet::new();
    for image in images {
        let this = identity(image);
        let is_it = |(path, that, _): &&(&PathBuf, Option<_>, _)| *path == image || (this.is_some() && *that == this);
        if let Some((.., whose)) = theirs.iter().find(is_it) {
            return Some(format!("{}: it is in use as {whose}", image.display()));
        }
        // One that has two names would find our own lock.
        if this.is_some_and(|this| !probed.insert(this)) {
            continue;
        }
        let options = ImageOptions { direct: Direct::Off, read_only: false, lock_wait: LOCK_WAIT };
        match host.probe_image(image, options) {
            Err(e) if e.errno == Some(libc::ENOENT) || e.kind == ImageErrorKind::Unsuitable => {}
            Err(e) => return Some(e.to_string()),
            Ok(_) => {}
        }
    }
    None
}
