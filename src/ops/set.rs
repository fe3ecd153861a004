//! Settings of a disk or volume that is served: changed, remembered, and put to use.
//!
//! What always holds: what was set is durable before it counts; where a later configuration says something else, that
//! counts and what was set is forgotten ([`DiskPatch::still_in`]); guests that are connected keep what they were told.

use std::sync::Arc;

use crate::control::api::{self, DiskConfig, DiskPatch, Layout};
use crate::control::{ApiError, ErrorCode, EventKind, Name, Notice};
use crate::manager::entry::{DiskEntry, locked};
use crate::manager::layers::packed_volume;
use crate::manager::sockets::hints_of;
use crate::manager::{Manager, record_error};
use crate::registry::Command;
use crate::vhost_user::Offer;

impl Manager {
    pub(crate) fn set_plain_disk(&self, name: &Name, patch: &DiskPatch) -> Result<api::Disk, ApiError> {
        let _claim = self.claim(&Command::Set { disk: name.clone(), readonly: patch.readonly })?;
        let disk = self.plain_disk(name)?;
        if patch.readonly == Some(false) && disk.facts().is_read_only {
            let message = format!("disk {name}: its image was opened to be read only");
            return Err(ApiError::new(ErrorCode::Unsupported, message).with_action(
                "say readonly=off in its --disk or in the configuration file, and start the daemon anew",
            ));
        }
        self.set(&disk, patch)?;
        Ok(disk.to_api(self))
    }

    pub(crate) fn set_served_volume(&self, name: &Name, patch: &DiskPatch) -> Result<api::Volume, ApiError> {
        let _claim = self.claim(&Command::Set { disk: name.clone(), readonly: patch.readonly })?;
        let volume = self.volume(name)?;
        if patch.layout == Some(Layout::Packed) {
            return Err(packed_volume(name));
        }
        self.set(&volume, patch)?;
        Ok(volume.to_volume(self))
    }

    fn set(&self, disk: &Arc<DiskEntry>, patch: &DiskPatch) -> Result<(), ApiError> {
        let set = locked(&disk.relations).set.clone().with(patch);
        let config = disk.config().patched(&set);
        let mut record = disk.to_record();
        record.set = serde_json::to_value(&set).expect("settings are plain data");
        record.config = serde_json::to_value(&config).expect("a configuration is plain data");
        self.records.put(&[&record]).map_err(record_error)?;
        locked(&disk.relations).set = set;
        disk.disk.set_window(config.background_bytes().into());
        if let Some(server) = &*locked(&disk.server) {
            server.offer(offer_of(disk.name.get().to_string(), &config));
        }
        log::info!("{}: set anew: {}", disk.name, serde_json::to_string(patch).unwrap_or_default());
        self.bus.publish(Notice::of_disk(EventKind::DiskChanged, &disk.name.get()));
        Ok(())
    }
}

/// What the next frontend gets.
fn offer_of(name: String, config: &DiskConfig) -> Offer {
    Offer {
        name,
        queues: config.queues(),
        serial: config.serial.clone().unwrap_or_default(),
        read_only: config.readonly(),
        hints: hints_of(config),
    }
}
