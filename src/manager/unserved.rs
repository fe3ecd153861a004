//! Disks and volumes that are remembered or configured and cannot be served: listed with the reason, tried again, forgotten
//! if that is wanted.
//!
//! What always holds: nothing of what they have is changed while they are not served, and what others need of them is needed
//! as if they were.

use std::path::PathBuf;
use std::sync::atomic::Ordering;

use uuid::Uuid;

use crate::control::api::{self, Disk, DiskConfig};
use crate::control::{ApiError, ErrorCode, EventKind, Name, Notice};
use crate::manager::entry::is_id;
use crate::manager::entry::locked;
use crate::manager::followups::FollowUp;
use crate::manager::volumes::of_lost;
use crate::manager::{Manager, record_error};
use crate::store::{DiskRecord, RecordError, SnapshotRecord};

/// A disk or volume that is not served.
#[derive(Clone)]
pub(crate) struct Unserved {
    pub(crate) name: Name,
    /// That of its record; one of its own if there is none that can be read.
    pub(crate) id: Uuid,
    /// What is remembered of it, if anything can be read.
    pub(crate) record: Option<DiskRecord>,
    /// How it would be served.
    pub(crate) config: Option<DiskConfig>,
    pub(crate) why: String,
    /// Whether nothing was ever remembered of it.
    pub(crate) is_new: bool,
    /// Whether its user has said that what was flushed last is to be taken.
    pub(crate) takes_flushed: bool,
}

impl Unserved {
    pub(crate) fn is_volume(&self) -> bool {
        self.record.as_ref().is_some_and(DiskRecord::is_volume)
    }
}

impl Manager {
    /// What is remembered under a name.
    ///
    /// # Errors
    /// When the records cannot be read, or this one cannot.
    pub(crate) fn remembered(&self, name: &Name) -> Result<Option<DiskRecord>, ApiError> {
        let mut remembered = self.records.disks().map_err(record_error)?;
        if let Some(why) = remembered.unreadable.remove(name.as_str()) {
            return Err(record_error(RecordError::Kept { disk: name.to_string(), why }));
        }
        Ok(remembered.disks.into_iter().find(|r| r.name == name.as_str()))
    }

    /// Notes that something is not served, and goes on trying.
    pub(crate) fn note_unserved(&self, unserved: Unserved) {
        let was = {
            // What was served meanwhile is not unserved.
            let disks = locked(&self.disks);
            if disks.contains_key(&unserved.name) {
                return;
            }
            locked(&self.unserved).insert(unserved.name.clone(), unserved.clone())
        };
        self.has_been_noted(unserved, was);
    }

    /// Takes a disk off the list of those that are served. If it is remembered it is noted in the same step that it is not,
    /// so that what it needs stays needed.
    pub(crate) fn not_served_any_more(&self, name: &Name, unserved: Option<Unserved>) {
        let was = {
            let mut disks = locked(&self.disks);
            disks.remove(name);
            unserved.as_ref().and_then(|unserved| locked(&self.unserved).insert(name.clone(), unserved.clone()))
        };
        if let Some(unserved) = unserved {
            self.has_been_noted(unserved, was);
        }
    }

    fn has_been_noted(&self, unserved: Unserved, was: Option<Unserved>) {
        if was.is_none_or(|was| was.why != unserved.why) {
            let what = if unserved.is_volume() { "volume" } else { "disk" };
            log::error!("{what} {} is not served: {}; what is remembered of it is kept", unserved.name, unserved.why);
            self.tell_unserved(&unserved);
        }
        if unserved.config.is_some() {
            self.follow_up(FollowUp::Serve(unserved.name));
        }
    }

    /// Tells that something is not served, once there is somebody to listen.
    fn tell_unserved(&self, unserved: &Unserved) {
        if self.is_listening.load(Ordering::SeqCst) {
            let kind = if unserved.is_volume() { EventKind::VolumeBroken } else { EventKind::DiskFailed };
            self.bus.publish(Notice::of_disk(kind, &unserved.name).because(&unserved.why));
        }
    }

    /// The control socket answers from now on.
    pub fn listening(&self) {
        self.is_listening.store(true, Ordering::SeqCst);
        let unserved: Vec<_> = locked(&self.unserved).values().cloned().collect();
        unserved.iter().for_each(|unserved| self.tell_unserved(unserved));
        let wrong = locked(&self.problems).clone();
        for why in wrong {
            self.bus.publish(Notice::of_problem(&why));
        }
    }

    /// Tries to serve what is not served. Returns whether it is not to be tried again.
    pub(crate) fn serve_again_if_possible(&self, name: &Name) -> bool {
        let Some(unserved) = locked(&self.unserved).get(name).cloned() else { return true };
        let Some(config) = unserved.config.clone() else { return true };
        let Ok(_claim) = self.claim_to_add("serve again", name, &config, unserved.record.as_ref()) else {
            return false;
        };
        {
            let disks = locked(&self.disks);
            let mut unserved = locked(&self.unserved);
            if disks.contains_key(name) {
                unserved.remove(name);
            }
            if !unserved.contains_key(name) {
                return true;
            }
        }
        match self.add_now(name, config) {
            Ok(_) => {
                log::info!("{name}: what it lacked is back, and it is served again");
                self.hurry_unserved();
                self.bus.publish(Notice::of_disk(EventKind::DiskAdded, name));
                true
            }
            Err(e) => {
                if let Some(noted) = locked(&self.unserved).get_mut(name)
                    && noted.why != e.message
                {
                    log::error!("{name} is still not served: {}", e.message);
                    noted.why = e.message;
                }
                false
            }
        }
    }

    /// What waited for something that is served now need not wait any longer.
    pub(crate) fn hurry_unserved(&self) {
        let names: Vec<Name> =
            locked(&self.unserved).values().filter(|u| u.config.is_some()).map(|u| u.name.clone()).collect();
        names.into_iter().for_each(|name| self.follow_up(FollowUp::Serve(name)));
    }

    pub(crate) fn unserved_to_api(&self, unserved: &Unserved) -> Disk {
        let mut disk = Disk::unserved(unserved.name.clone(), unserved.why.clone());
        if let Some(record) = &unserved.record {
            disk.id = Some(record.id);
            disk.epoch = record.live_began;
            disk.snapshots = u32::try_from(record.snapshots.len()).unwrap_or(u32::MAX);
            // How much is left is in a table that nobody reads while it is not served.
            let restore = record.restore.as_ref().filter(|r| r.is_shown());
            disk.restoring =
                restore.map(|r| api::RestoreStatus { from: self.name_now(r.source, &r.from), remaining_bytes: 0 });
        }
        match &unserved.config {
            Some(config) => disk.with_config(config),
            None => disk,
        }
    }

    /// A disk that is not served, by its name or id.
    pub(crate) fn unserved_disk(&self, name: &Name) -> Option<Disk> {
        let id_of = |u: &Unserved| u.record.as_ref().map(|r| r.id);
        let is_it = |u: &&Unserved| u.name == *name || id_of(u).is_some_and(|id| is_id(name, id));
        let found = locked(&self.unserved).values().filter(|u| !u.is_volume()).find(is_it).cloned();
        found.map(|unserved| self.unserved_to_api(&unserved))
    }

    /// A volume that is not served. None of what is no volume.
    pub(crate) fn unserved_to_volume(&self, unserved: &Unserved) -> Option<api::Volume> {
        let volume = of_lost(&unserved.name, unserved.record.as_ref()?, &unserved.why)?;
        Some(api::Volume { from: self.name_now(volume.from_id, &volume.from), ..volume })
    }

    /// All that is not served, by name.
    pub(crate) fn all_unserved(&self) -> Vec<api::Unserved> {
        let id = |u: &Unserved| u.record.as_ref().map(|r| r.id);
        let of = |u: &Unserved| api::Unserved { name: u.name.clone(), id: id(u), reason: u.why.clone() };
        locked(&self.unserved).values().map(of).collect()
    }

    /// Why a name is not that of anything that is served, if it is remembered.
    pub(crate) fn refuse_unserved(&self, name: &Name) -> Result<(), ApiError> {
        let found = locked(&self.unserved).get(name).cloned();
        found.map_or(Ok(()), |unserved| Err(refusal(&unserved)))
    }
}

/// All images that something has, and whose they are.
pub(crate) fn images_of(record: &DiskRecord) -> Vec<(PathBuf, String)> {
    let what = if record.is_volume() { "volume" } else { "disk" };
    let own = record.config.get("path").and_then(|path| path.as_str()).map(PathBuf::from);
    let legs = record.mirror.iter().flat_map(|m| &m.legs).map(|leg| leg.path.clone());
    let whose = format!("the image of {what} {}", record.name);
    let own = own.into_iter().chain(record.live_log.clone()).chain(legs).map(|path| (path, whose.clone()));
    let of_snapshot = |s: &SnapshotRecord| format!("the image of snapshot {}@{}", record.name, s.name);
    own.chain(record.snapshots.iter().map(|s| (s.image.clone(), of_snapshot(s)))).collect()
}

fn refusal(unserved: &Unserved) -> ApiError {
    let Unserved { name, why, .. } = unserved;
    let (what, code) = match unserved.is_volume() {
        true => ("volume", ErrorCode::VolumeBusy),
        false => ("disk", ErrorCode::DiskFailed),
    };
    ApiError::new(code, format!("{what} {name} is not served: {why}")).with_action(format!(
        "put back what it lacks, and it is served again by itself; or be rid of it: halfsilver disk forget {name}"
    ))
}
