//! Volumes are made. A volume is a disk whose full image is a snapshot of another disk or volume, and whose newest content
//! is in a log.
//!
//! What always holds:
//! - While a volume is remembered, also one that cannot be served, the snapshot that it stands on is not deleted, and the
//!   disk of that snapshot is not removed.
//! - A volume is served as broken if what it stands on is lost. Its own logs are believed as those of disks are.
//! - A volume stands on what was there before it, so nothing stands on itself.

use std::path::PathBuf;
use std::sync::Arc;

use uuid::Uuid;

use crate::control::api::{
    self, DeleteSnapshotOptions, DiskConfig, SnapshotRequest, VolumeRequest, VolumeSource, Writers,
};
use crate::control::{ApiError, ErrorCode, EventKind, Name, Notice, SnapshotRef};
use crate::crash;
use crate::door::{BaseSpec, Changed, DiskSpec, Epoch, ImageSpec, LayerSpec, VOLUMES_DEEP_MAX, VersionSpec};
use crate::manager::entry::{DiskEntry, SnapshotEntry};
use crate::manager::names::CurrentName;
use crate::manager::opening::Opened;
use crate::manager::relations::Relations;
use crate::manager::{Manager, engine_error, table_error};
use crate::registry::{ClaimKey, Command, Registry, decide};
use crate::store::{Layout, VolumeRecord};

impl Manager {
    pub(crate) fn make_volume(&self, request: &VolumeRequest) -> Result<api::Volume, ApiError> {
        let (from, ours) = match &request.from {
            VolumeSource::Snapshot(snapshot) => (snapshot.clone(), None),
            VolumeSource::Now(disk) => {
                let (snapshot, id) = self.snapshot_for(disk, request)?;
                (snapshot, Some(id))
            }
        };
        let made = self.make_volume_on(&from, request);
        if made.is_err()
            && let Some(ours) = ours
            && let Err(e) = self.delete_by_id(ours, DeleteSnapshotOptions::default())
        {
            log::warn!("snapshot {from}, which was taken for volume {}, stays: {}", request.name, e.message);
        }
        made
    }

    /// Takes the snapshot that a volume is to stand on.
    fn snapshot_for(&self, disk: &Name, request: &VolumeRequest) -> Result<(SnapshotRef, Uuid), ApiError> {
        let command = Command::CreateVolumeOfNow { name: request.name.clone(), of: disk.clone() };
        decide(&self.registry(), &command)?;
        self.check_volume(request, &self.disk(disk)?.config())?;
        let (name, disks) = (request.name.clone(), vec![disk.clone()]);
        let snapshot = SnapshotRequest {
            name: name.clone(),
            disks,
            strategy: None,
            layout: None,
            writers: Writers::Request,
            socket: None,
            image: None,
        };
        let id = self.create(&snapshot)?.first().map(|made| made.id).unwrap_or_default();
        Ok((SnapshotRef { disk: disk.clone(), name }, id))
    }

    fn make_volume_on(&self, from: &SnapshotRef, request: &VolumeRequest) -> Result<api::Volume, ApiError> {
        let command = Command::CreateVolume { name: request.name.clone(), from: from.clone() };
        let places: Vec<ClaimKey> =
            [&request.socket, &request.image].into_iter().flatten().map(|path| ClaimKey::Path(path.clone())).collect();
        let wanted = |registry: &Registry| {
            let mut wanted = decide(registry, &command)?.wanted;
            wanted.changes.extend(places.iter().cloned());
            Ok(wanted)
        };
        let operation = format!("volume create {}", request.name);
        let made =
            self.when_quiesced(&operation, from, wanted, |disk, entry| self.make_volume_now(disk, entry, request));
        Ok(made?.to_volume(self))
    }

    /// Whether a volume of that name can be made at that place, as far as that can be told.
    fn check_volume(&self, request: &VolumeRequest, like: &DiskConfig) -> Result<DiskConfig, ApiError> {
        let name = &request.name;
        let mut config = DiskConfig {
            mirror: None,
            socket: request.socket.clone(),
            serial: None,
            readonly: None,
            shared: false,
            layout: None,
            ..like.clone()
        };
        config.block_size = request.block_size.unwrap_or(config.block_size);
        config = self.completed(name, &config);
        if let Some(socket) = &config.socket {
            self.check_place(socket).map_err(|e| ApiError { message: format!("volume {name}: {}", e.message), ..e })?;
        }
        if let Some(image) = request.image.as_ref().filter(|image| self.host.is_there(image)) {
            let message = format!("volume {name}: {} exists", image.display());
            return Err(ApiError::new(ErrorCode::Conflict, message).with_action("name a path where nothing is"));
        }
        if let Some(image) = &request.image {
            self.refuse_what_others_have(name, image, true)?;
        }
        // Before a snapshot is taken for its sake.
        if let Some(directory) =
            request.image.as_ref().and_then(|image| image.parent()).filter(|d| !self.host.is_directory(d))
        {
            let message = format!("volume {name}: there is no directory {}", directory.display());
            return Err(ApiError::new(ErrorCode::InvalidConfig, message)
                .with_action("make it first, or name another place with --image"));
        }
        Ok(config)
    }

    /// Everything that the records are about to name is there before they do.
    fn make_volume_now(
        &self,
        disk: &Arc<DiskEntry>,
        entry: &SnapshotEntry,
        request: &VolumeRequest,
    ) -> Result<Arc<DiskEntry>, ApiError> {
        let (name, from) = (&request.name, entry.reference().to_string());
        let in_volume = |e: ApiError| ApiError { message: format!("volume {name}: {}", e.message), ..e };
        self.refuse_without_room()?;
        let mut config = self.check_volume(request, &disk.config())?;
        config.path = PathBuf::from(&from);
        let base = disk.disk.base(entry.id, &from);
        if disk.facts().depth >= VOLUMES_DEEP_MAX {
            let message = format!("volume {name}: {VOLUMES_DEEP_MAX} volumes stand on each other below it");
            return Err(ApiError::new(ErrorCode::Unsupported, message).with_action("make it off an older snapshot"));
        }
        fits(request, &base).map_err(in_volume)?;
        let image = ImageSpec::Base(base);
        let geometry = image.geometry(config.block_size);
        let logical = geometry.logical_block_bytes;
        let [id, origin, live] = [(); 3].map(|()| self.host.new_id());
        let path = request.image.clone().unwrap_or_else(|| self.places.log_image(live));
        let layer = self.make_log((&path, Layout::Sparse), live, &config, &geometry).map_err(in_volume)?;
        let undo = |e: ApiError| {
            self.remove_layer(live, &path);
            self.remove_changed_table(live);
            self.remove_tables(id);
            in_volume(e)
        };
        let changed = self.make_changed_table(live, &geometry).map_err(table_error).map_err(undo)?;
        let boot = self.host.boot().map_err(table_error).map_err(undo)?;
        let discards = self.make_run_table(id, &geometry).map_err(table_error).map_err(undo)?;
        let volume = VolumeRecord {
            snapshot: entry.id,
            from,
            source: disk.id,
            origin,
            size_bytes: geometry.size_bytes,
            created_ms: self.host.unix_ms(),
        };
        let size_bytes = geometry.size_bytes;
        let version = |id, began, layer, changed| VersionSpec {
            id,
            began,
            size_bytes,
            splits: false,
            layer,
            broken: None,
            changed,
        };
        let spec = DiskSpec {
            id,
            image,
            block_bytes: config.block_size,
            logical_block_bytes: None,
            read_only: false,
            window_bytes: config.background_bytes().into(),
            discards,
            // No request on it can be older.
            versions: vec![
                version(origin, Epoch(0), LayerSpec::Base, None),
                version(live, self.engine.epoch(), layer, Some(Changed::Noted(changed))),
            ],
            marks: Vec::new(),
            restore: None,
        };
        let made = self.engine.open(spec).map_err(engine_error).map_err(undo)?;
        let opened = Opened {
            name: CurrentName::new(name.clone()),
            id,
            boot,
            config,
            disk: made,
            mirror: None,
            former_legs: Vec::new(),
            relations: Relations { volume: Some(volume), logical_block_bytes: Some(logical), ..Relations::default() },
            restore: None,
            snapshots: Vec::new(),
            bookmarks: Vec::new(),
            record: None,
        };
        crash::point("before a volume is recorded");
        let made = self.open_disk(opened).map_err(undo)?;
        log::info!("volume {name}: made off {}", entry.reference());
        self.bus.publish(Notice::of_disk(EventKind::VolumeCreated, name));
        Ok(made)
    }

    fn remove_tables(&self, id: Uuid) {
        self.remove_file(&self.places.durable_table(id));
        self.remove_file(&self.places.run_table(id));
    }
}

/// Whether tables of blocks of the size that was asked for can tell of such an image.
fn fits(request: &VolumeRequest, base: &BaseSpec) -> Result<(), ApiError> {
    let Some(size) = request.block_size else { return Ok(()) };
    let (unit, bytes) = (base.logical_block_bytes, base.size_bytes);
    if size < unit {
        let message = format!("block_size: the logical blocks of {} have {unit} bytes, more than {size}", request.from);
        return Err(ApiError::new(ErrorCode::InvalidRequest, message).with_action(format!("use at least {unit}")));
    }
    if u64::from(size) > bytes {
        let message = format!("block_size: {} has only {bytes} bytes, less than {size}", request.from);
        return Err(ApiError::new(ErrorCode::InvalidRequest, message).with_action("use smaller blocks"));
    }
    Ok(())
}
