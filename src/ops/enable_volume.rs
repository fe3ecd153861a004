//! Volumes that are not served for a while, and begin anew: a new point in time of what they stand on (source 004).
//!
//! What always holds: a disabled volume keeps its content and what it stands on, also across restarts, and its socket is
//! closed; nothing of it is dropped before the record names the empty log that takes its place.

use std::path::PathBuf;
use std::sync::Arc;

use uuid::Uuid;

use crate::control::api;
use crate::control::{ApiError, ErrorCode, EventKind, Name, Notice};
use crate::crash;
use crate::manager::entry::{DiskEntry, locked};
use crate::manager::relations::in_volume;
use crate::manager::sockets::serve_live;
use crate::manager::{Manager, record_error, table_error};
use crate::registry::Command;
use crate::store::{ChangedRecord, Layout, RecordError};

impl Manager {
    pub(crate) fn disable(&self, name: &Name, force: bool) -> Result<api::Volume, ApiError> {
        let command = Command::Disable { volume: name.clone(), force };
        let _claim = self.claim(&command)?;
        let disk = self.volume(name)?;
        if locked(&disk.relations).disabled {
            return Ok(disk.to_volume(self));
        }
        let _waits = self.waiting_for(&disk, self.requests_of(&disk));
        let server = locked(&disk.server).clone();
        self.stop_servers(&disk, server.as_slice(), &command, || {
            self.record_disabled(&disk, true)?;
            crash::point("after a volume was recorded as disabled");
            Ok(())
        })?;
        *locked(&disk.server) = None;
        log::info!("volume {name}: disabled");
        self.bus.publish(Notice::of_disk(EventKind::VolumeDisabled, name));
        Ok(disk.to_volume(self))
    }

    pub(crate) fn enable(&self, name: &Name, fresh: bool) -> Result<api::Volume, ApiError> {
        let _claim = self.claim(&Command::Enable { volume: name.clone(), fresh })?;
        let disk = self.volume(name)?;
        if !locked(&disk.relations).disabled {
            return Ok(disk.to_volume(self));
        }
        if fresh {
            self.begin_anew(&disk)?;
        }
        self.record_disabled(&disk, false)?;
        crash::point("after a volume was recorded as enabled");
        match serve_live(&*self.host, name, &disk.config(), &disk.disk, &disk.frontends) {
            Ok(server) => *locked(&disk.server) = Some(server),
            Err(e) => {
                locked(&disk.relations).disabled = true;
                self.persist_later(&disk);
                let socket = disk.socket();
                let message = in_volume(name, &format!("cannot serve {}: {e}", socket.display()));
                return Err(ApiError::new(ErrorCode::Conflict, message)
                    .with_action(format!("make room for its socket, then: halfsilver volume enable {name}")));
            }
        }
        log::info!("volume {name}: enabled{}", if fresh { ", with nothing written to it" } else { "" });
        self.bus.publish(Notice::of_disk(EventKind::VolumeEnabled, name));
        Ok(disk.to_volume(self))
    }

    fn record_disabled(&self, disk: &Arc<DiskEntry>, disabled: bool) -> Result<(), ApiError> {
        self.change(disk, || locked(&disk.relations).disabled = disabled)
    }

    /// Drops what was written to a disabled volume. It is claimed.
    fn begin_anew(&self, disk: &Arc<DiskEntry>) -> Result<(), ApiError> {
        let name = &disk.name.get();
        let facts = disk.facts();
        let (old, live, was) = (facts.live().id, self.host.new_id(), facts.live().image.clone());
        let path = self.path_beside(&was, old, live);
        let named = |e: ApiError| ApiError { message: in_volume(name, &e.message), ..e };
        let layer = self.make_log((&path, Layout::Sparse), live, &disk.config(), &facts.geometry).map_err(named)?;
        let undo = |e: ApiError| {
            self.remove_layer(live, &path);
            self.remove_changed_table(live);
            named(e)
        };
        let changed = self.make_changed_table(live, &facts.geometry).map_err(table_error).map_err(undo)?;
        crash::point("before a volume is begun anew");
        let mut record = disk.to_record();
        (record.live, record.live_log) = (live, Some(path.clone()));
        record.live_changed = Some(ChangedRecord::default());
        (record.own_image, record.work) = (false, None);
        if let Err(e) = self.records.put(&[&record]) {
            return Err(match e {
                // The new log may be the one that is named.
                RecordError::Unknown(_) => named(record_error(e)),
                e => undo(record_error(e)),
            });
        }
        crash::point("after a volume was begun anew");
        disk.disk.begin_anew(live, layer, changed);
        {
            // What a stopped job had copied is dropped with the rest.
            let mut relations = locked(&disk.relations);
            (relations.own_image, relations.work) = (false, None);
        }
        self.forget_jobs_of(disk);
        self.remove_layer(old, &was);
        self.remove_changed_table(old);
        Ok(())
    }

    /// Where a log is made that takes the place of another one: where ours go, or in the directory that the user chose.
    fn path_beside(&self, was: &std::path::Path, old: Uuid, live: Uuid) -> PathBuf {
        if was == self.places.log_image(old) {
            return self.places.log_image(live);
        }
        was.with_file_name(format!("{live}.log"))
    }
}
