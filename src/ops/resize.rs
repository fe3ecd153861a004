//! A disk grows under its guest.
//!
//! What always holds:
//! - Tables have room first, then the image has it durably, then the record says the new size, then the disk has it, and its
//!   frontends are told. Nobody waits, and until the disk has it nothing is written behind its old end.
//! - Whenever this is cut off the disk has one size, whole: a start takes no notice of room in tables, and lets a disk grow
//!   into an image that is larger than its record says.
//!
//! What this does not do: make a disk smaller.

use std::sync::Arc;
use std::time::Duration;

use crate::control::api;
use crate::control::{ApiError, ErrorCode, EventKind, Name, Notice};
use crate::crash;
use crate::door::{Disk, GrowError, Kept};
use crate::manager::entry::{DiskEntry, locked};
use crate::manager::{Manager, engine_error, record_error};
use crate::registry::Command;
use crate::store::Table;

/// How long it is waited for requests of a snapshot that was just taken.
const DRAIN_WAIT: Duration = Duration::from_secs(60);
const DRAIN_LOOK: Duration = Duration::from_millis(2);

impl Manager {
    pub(crate) fn resize_plain_disk(&self, name: &Name, size_bytes: u64) -> Result<api::Disk, ApiError> {
        let deadline = self.host.now() + DRAIN_WAIT;
        loop {
            let claim = self.claim(&Command::Resize { disk: name.clone(), size_bytes })?;
            let disk = self.plain_disk(name)?;
            match disk.disk.can_grow(size_bytes) {
                Err(GrowError::Draining) if self.host.now() < deadline => {}
                Err(e) => return Err(refused(&disk, size_bytes, e)),
                Ok(()) if disk.facts().geometry.size_bytes == size_bytes => return Ok(disk.to_api(self)),
                Ok(()) => {
                    self.resize(&disk, size_bytes)?;
                    return Ok(disk.to_api(self));
                }
            }
            drop(claim);
            self.host.pause(DRAIN_LOOK);
        }
    }

    fn resize(&self, disk: &Arc<DiskEntry>, size_bytes: u64) -> Result<(), ApiError> {
        let before = disk.facts().geometry.size_bytes;
        let in_disk = |e: ApiError| ApiError { message: format!("disk {}: {}", disk.name, e.message), ..e };
        self.make_room(&disk.disk, size_bytes).map_err(in_disk)?;
        crash::point("before the image of a disk grows");
        disk.disk.grow_image(size_bytes).map_err(engine_error).map_err(in_disk)?;
        crash::point("before the new size of a disk is recorded");
        let mut record = disk.to_record();
        record.size_bytes = size_bytes;
        self.records.put(&[&record]).map_err(record_error).map_err(|e| {
            let message =
                format!("its image has {size_bytes} bytes now, and it grows with its next start: {}", e.message);
            in_disk(ApiError { message, ..e })
        })?;
        crash::point("before a disk has its new size");
        disk.disk.grow(size_bytes).map_err(|e| refused(disk, size_bytes, e))?;
        self.tell_size(disk, before);
        Ok(())
    }

    /// Its tables have room for the bits of a disk of this size.
    pub(crate) fn make_room(&self, disk: &Disk, size_bytes: u64) -> Result<(), ApiError> {
        disk.make_room(size_bytes, &|what: Kept, table: &Table, blocks: u64| {
            let place = match what {
                Kept::Layer(version) => self.places.run_table(version),
                Kept::Changed(version) => self.places.changed_table(version),
                Kept::Discards => self.places.run_table(disk.id),
            };
            self.host.extend_table(table, &place, blocks)
        })
        .map_err(engine_error)
    }

    /// Says what a disk's size is now: to its guests, and to those who listen.
    fn tell_size(&self, disk: &DiskEntry, before: u64) {
        let now = disk.facts().geometry.size_bytes;
        log::info!("disk {}: it has {now} bytes now, after {before}", disk.name);
        let why = format!("it has {now} bytes, and had {before}");
        self.bus.publish(Notice::of_disk(EventKind::DiskResized, &disk.name.get()).because(why));
        if let Some(server) = &*locked(&disk.server) {
            server.config_changed();
        }
    }
}

fn refused(disk: &DiskEntry, size_bytes: u64, why: GrowError) -> ApiError {
    let now = disk.facts().geometry.size_bytes;
    let message = format!("disk {} has {now} bytes, and cannot have {size_bytes}: {why}", disk.name);
    match why {
        GrowError::Smaller => ApiError::new(ErrorCode::InvalidRequest, message).with_action(
            "copy what is needed to a smaller disk; what lies behind the new end of this one would be lost",
        ),
        GrowError::NoRoom => ApiError::new(ErrorCode::InvalidConfig, message),
        GrowError::Draining => ApiError::new(ErrorCode::SnapshotBusy, message).with_action("try again"),
        GrowError::InLog | GrowError::Mirrored | GrowError::Restoring => {
            ApiError::new(ErrorCode::DiskBusy, message).with_action(format!("see 'halfsilver disk show {}'", disk.name))
        }
    }
}
