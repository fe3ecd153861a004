//! Volumes: made, taken up, listed and deleted. A volume is a disk whose full image is a snapshot of another disk or
//! volume, and whose newest content is in a log.
//!
//! What always holds:
//! - While a volume is remembered, also one that cannot be served, the snapshot that it stands on is not deleted, and the
//!   disk of that snapshot is not removed.
//! - A volume is served as broken if what it stands on is lost. Its own logs are believed as those of disks are.
//! - A volume stands on what was there before it, so nothing stands on itself.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use super::changes::ids_of_changes;
use super::disks::Opened;
use super::entry::{DiskEntry, SnapshotEntry, locked};
use super::manager::{BrokenVersions, Manager, record_error, table_error};
use super::standing::Standing;
use crate::control::api::{
    self, DeleteSnapshotOptions, DiskConfig, SnapshotRequest, VolumeRequest, VolumeSource, VolumeState, Writers,
};
use crate::control::timestamp::Timestamp;
use crate::control::{ApiError, ErrorCode, EventKind, Name, Notice, SnapshotRef};
use crate::crash;
use crate::mirror::planted::{self, Defect};
use crate::mirror::{Backing, Disk, DiskOptions, Geometry, VOLUMES_DEEP_MAX, View};
use crate::store::{DiskRecord, Table, TableName, VolumeRecord};

impl Manager {
    /// A disk that is no volume.
    pub(super) fn plain_disk(&self, name: &Name) -> Result<Arc<DiskEntry>, ApiError> {
        let disk = self.disk(name)?;
        match disk.is_volume() {
            false => Ok(disk),
            true => Err(ApiError::new(ErrorCode::DiskNotFound, format!("{name} is a volume, not a disk"))
                .with_action(format!("see 'halfsilver volume show {name}'"))),
        }
    }

    /// A volume that is served, or disabled.
    pub(super) fn volume(&self, name: &Name) -> Result<Arc<DiskEntry>, ApiError> {
        if let Some((_, reason)) = locked(&self.lost_volumes).get(name) {
            let message = format!("volume {name} is broken: {reason}");
            return Err(ApiError::new(ErrorCode::VolumeBusy, message)
                .with_action(format!("put back what is missing and start anew, or: halfsilver volume delete {name}")));
        }
        let entry = self.disk(name).ok().filter(|d| d.is_volume());
        entry.ok_or_else(|| ApiError::volume_not_found(name))
    }

    /// A disk that may have a mirror.
    pub(super) fn disk_with_mirror(&self, name: &Name) -> Result<Arc<DiskEntry>, ApiError> {
        let disk = self.disk(name)?;
        match disk.is_volume() {
            false => Ok(disk),
            true => Err(ApiError::new(ErrorCode::Unsupported, format!("{name} is a volume, and has no mirror"))
                .with_action("mirror the disk that it stands on, or complete and promote it first")),
        }
    }

    /// The volumes that stand on a version, those that cannot be served too.
    fn volumes_on(&self, version: Uuid) -> Vec<Name> {
        let stands = |volume: Option<&VolumeRecord>| volume.is_some_and(|v| v.snapshot == version);
        let mut names: Vec<Name> =
            self.all_disks().iter().filter(|d| d.stands_on(version)).map(|d| d.name.clone()).collect();
        let lost = locked(&self.lost_volumes);
        names.extend(lost.iter().filter(|(_, (r, _))| stands(r.volume.as_ref())).map(|(name, _)| name.clone()));
        names
    }

    /// Refuses to let a snapshot go while volumes stand on it. The structure is locked.
    pub(super) fn refuse_if_stood_on(&self, entry: &SnapshotEntry, code: ErrorCode) -> Result<(), ApiError> {
        let volumes = self.volumes_on(entry.id);
        let Some(first) = volumes.first().filter(|_| !planted::is(Defect::VolumeBaseDeleted)) else { return Ok(()) };
        let names = volumes.iter().map(Name::as_str).collect::<Vec<_>>().join(", ");
        let what = if volumes.len() == 1 { "volume" } else { "volumes" };
        Err(ApiError::new(code, format!("snapshot {} is needed by {what} {names}", entry.reference))
            .with_action(format!("delete first what stands on it: halfsilver volume delete {first}")))
    }

    /// What a volume stands on, as it is now. One that is lost says why at each request.
    pub(super) fn base_of(&self, volume: &VolumeRecord) -> Backing {
        let found = self.all_disks().into_iter().find_map(|disk| {
            let entry = disk.snapshots().into_iter().find(|s| s.id == volume.snapshot)?;
            Some((disk, entry))
        });
        let lost = |why: &str| View::lost(why, volume.snapshot, &volume.from, volume.size_bytes);
        Backing::View(match found {
            None => lost("its disk is not served"),
            Some((_, entry)) if entry.version.is_none() => lost(&entry.broken().unwrap_or_default()),
            Some((disk, _)) if disk.disk.geometry().size_bytes != volume.size_bytes => {
                lost("its disk has another size now")
            }
            Some((disk, _)) => View::of(disk.disk.clone(), volume.snapshot, &volume.from),
        })
    }

    /// Serves the volumes that are remembered, each after what it stands on. The structure is locked.
    pub(super) fn take_up_volumes(&self, mut left: Vec<DiskRecord>, take_flushed: &[Name]) -> Result<(), ApiError> {
        while !left.is_empty() {
            let base = |r: &DiskRecord| r.volume.as_ref().map(|v| v.snapshot);
            let waits = |r: &DiskRecord| left.iter().any(|o| o.snapshots.iter().any(|s| Some(s.id) == base(r)));
            let record = left.swap_remove(left.iter().position(|r| !waits(r)).unwrap_or(0));
            let name: Name = record.name.parse()?;
            let config: DiskConfig = serde_json::from_value(record.config.clone())
                .map_err(|e| ApiError::new(ErrorCode::Internal, format!("the record of {name}: {e}")))?;
            if self.disk(&name).is_ok() {
                continue; // The configuration has it: its image is one that it has alone.
            }
            let added = self.add_disk(&name, &config, take_flushed.contains(&name));
            let broken = match &added {
                Ok(entry) => entry.failure(),
                Err(e) => Some(e.message.clone()),
            };
            let Some(reason) = broken else { continue };
            log::error!("volume {name} is broken: {reason}; what was written to it is kept until it is deleted");
            self.bus.publish(Notice::of_disk(EventKind::VolumeBroken, &name).because(&reason));
            match added {
                Ok(entry) => entry.failure_told.store(true, std::sync::atomic::Ordering::SeqCst),
                Err(_) => drop(locked(&self.lost_volumes).insert(name, (record, reason))),
            }
        }
        Ok(())
    }

    pub(super) fn make_volume(&self, request: &VolumeRequest) -> Result<api::Volume, ApiError> {
        let (from, is_ours) = match &request.from {
            VolumeSource::Snapshot(snapshot) => (snapshot.clone(), false),
            VolumeSource::Now(disk) => (self.snapshot_for(disk, request)?, true),
        };
        let made = self.make_volume_on(&from, request);
        if made.is_err()
            && is_ours
            && let Err(e) = self.delete(&from, DeleteSnapshotOptions::default())
        {
            log::warn!("snapshot {from}, which was taken for volume {}, stays: {}", request.name, e.message);
        }
        made
    }

    /// Takes the snapshot that a volume is to stand on.
    fn snapshot_for(&self, disk: &Name, request: &VolumeRequest) -> Result<SnapshotRef, ApiError> {
        {
            let _structure = locked(&self.structure);
            self.check_volume(request, &self.disk(disk)?.config)?;
        }
        let (name, disks) = (request.name.clone(), vec![disk.clone()]);
        let snapshot = SnapshotRequest {
            name: name.clone(),
            disks,
            strategy: None,
            writers: Writers::Request,
            socket: None,
            image: None,
        };
        self.create(&snapshot)?;
        Ok(SnapshotRef { disk: disk.clone(), name })
    }

    fn make_volume_on(&self, from: &SnapshotRef, request: &VolumeRequest) -> Result<api::Volume, ApiError> {
        let check = || self.refuse_when_stopping();
        let make = |(), disk: &Arc<DiskEntry>, entry: &Arc<SnapshotEntry>| self.make_volume_now(disk, entry, request);
        Ok(self.when_quiesced(from, check, make)?.to_volume())
    }

    /// Whether a volume of that name can be made at that place, as far as that can be told.
    fn check_volume(&self, request: &VolumeRequest, like: &DiskConfig) -> Result<DiskConfig, ApiError> {
        let name = &request.name;
        let exists = || {
            Err(ApiError::new(ErrorCode::VolumeExists, format!("volume {name} exists"))
                .with_action(format!("delete it first: halfsilver volume delete {name}; or use another name")))
        };
        if locked(&self.lost_volumes).contains_key(name) || self.disk(name).is_ok_and(|d| d.is_volume()) {
            return exists();
        }
        let remembered = self.records.disks().map_err(record_error)?;
        if let Some(record) = remembered.iter().find(|r| r.name == name.as_str()) {
            if record.is_volume() {
                return exists();
            }
            return Err(ApiError::new(ErrorCode::DiskExists, format!("{name} is the name of a disk"))
                .with_action("use another name"));
        }
        let mut config = DiskConfig {
            mirror: None,
            socket: request.socket.clone(),
            serial: None,
            readonly: false,
            shared: false,
            ..like.clone()
        };
        config.block_size = request.block_size.unwrap_or(config.block_size);
        config = self.completed(name, &config);
        if let Some(socket) = &config.socket {
            self.check_place(socket).map_err(|e| ApiError { message: format!("volume {name}: {}", e.message), ..e })?;
        }
        if let Some(image) = request.image.as_ref().filter(|image| std::fs::symlink_metadata(image).is_ok()) {
            let message = format!("volume {name}: {} exists", image.display());
            return Err(ApiError::new(ErrorCode::Conflict, message).with_action("name a path where nothing is"));
        }
        // Before a snapshot is taken for its sake.
        if let Some(directory) = request.image.as_ref().and_then(|image| image.parent()).filter(|d| !d.is_dir()) {
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
        let (name, from) = (&request.name, entry.reference.to_string());
        let in_volume = |e: ApiError| ApiError { message: format!("volume {name}: {}", e.message), ..e };
        let mut config = self.check_volume(request, &disk.config)?;
        config.path = PathBuf::from(&from);
        let view = View::of(disk.disk.clone(), entry.id, &from);
        if view.depth() > VOLUMES_DEEP_MAX {
            let message = format!("volume {name}: {VOLUMES_DEEP_MAX} volumes stand on each other below it");
            return Err(ApiError::new(ErrorCode::Unsupported, message).with_action("make it off an older snapshot"));
        }
        let image = Backing::View(view);
        fits(request, &image).map_err(in_volume)?;
        let geometry = Geometry::of(&image, config.block_size);
        let logical = geometry.logical_block_bytes;
        let [id, origin, live] = [(); 3].map(|()| Uuid::new_v4());
        let path = request.image.clone().unwrap_or_else(|| self.places.log_image(live));
        let layer = self.make_log(&path, live, &config, &geometry).map_err(in_volume)?;
        let undo = |e: ApiError| {
            self.remove_layer(live, &path);
            self.remove_changed_table(live);
            self.remove_tables(id);
            in_volume(e)
        };
        let changed = self.make_changed_table(live, &geometry).map_err(table_error).map_err(undo)?;
        let table = TableName::of_this_boot(id).map_err(table_error).map_err(undo)?;
        let boot = table.boot;
        let discards =
            Table::create(&self.places.run_table(id), geometry.blocks(), table).map_err(table_error).map_err(undo)?;
        let volume = VolumeRecord {
            snapshot: entry.id,
            from,
            source: Some(disk.id),
            origin,
            size_bytes: geometry.size_bytes,
            created_ms: Timestamp::now().unix_ms(),
        };
        let options = DiskOptions { image, block_bytes: config.block_size, read_only: false, discards };
        let made = Disk::noting_volume(self.clock.clone(), options, origin, (live, layer), Some(changed));
        made.observe(Arc::new(BrokenVersions { tell: self.house.clone(), places: self.places.clone() }));
        let opened = Opened {
            id,
            boot,
            config,
            disk: made,
            mirror: None,
            former_legs: Vec::new(),
            standing: Standing { volume: Some(volume), logical_block_bytes: Some(logical), ..Standing::default() },
            restore: None,
            awaited: None,
            snapshots: Vec::new(),
            bookmarks: Vec::new(),
            record: None,
        };
        crash::point("before a volume is recorded");
        let made = self.open_disk(name, opened).map_err(undo)?;
        log::info!("volume {name}: made off {}", entry.reference);
        self.bus.publish(Notice::of_disk(EventKind::VolumeCreated, name));
        Ok(made)
    }

    fn remove_tables(&self, id: Uuid) {
        super::layers::remove_file(&self.places.durable_table(id));
        super::layers::remove_file(&self.places.run_table(id));
    }

    /// All volumes by name, also those that cannot be served.
    pub(super) fn all_volumes(&self) -> Vec<api::Volume> {
        let mut volumes: Vec<_> = self.all_disks().iter().filter(|d| d.is_volume()).map(|d| d.to_volume()).collect();
        volumes
            .extend(locked(&self.lost_volumes).iter().filter_map(|(name, (record, why))| of_lost(name, record, why)));
        volumes.sort_by(|one, other| one.name.cmp(&other.name));
        volumes
    }

    pub(super) fn remove_volume(&self, name: &Name, force: bool) -> Result<(), ApiError> {
        let _structure = locked(&self.structure);
        self.refuse_when_stopping()?;
        let busy = |message: String| Err(ApiError::new(ErrorCode::VolumeBusy, message));
        let lost = locked(&self.lost_volumes).get(name).map(|(record, _)| record.clone());
        if let Some(record) = lost {
            if let Some(other) = record.snapshots.iter().find_map(|s| self.volumes_on(s.id).into_iter().next()) {
                return busy(format!("volume {other} stands on volume {name}"));
            }
            let needed = |d: &Arc<DiskEntry>| {
                let source = locked(&d.restore).as_ref().map(|r| r.source);
                source.is_some_and(|source| record.snapshots.iter().any(|s| s.id == source))
            };
            if let Some(disk) = self.all_disks().into_iter().find(needed).filter(|_| !force) {
                return busy(format!("disk {} is being restored from volume {name}", disk.name)).map_err(
                    |e: ApiError| {
                        e.with_action("put back what is missing and start again, or give up the disk too, with --force")
                    },
                );
            }
            self.records.remove(name.as_str()).map_err(record_error)?;
            locked(&self.lost_volumes).remove(name);
            let live = record.live_log.as_ref().map(|log| (record.live, log.clone()));
            self.remove_volume_files(record.id, live.into_iter().chain(layers_of(&record)));
            ids_of_changes(&record).for_each(|id| self.remove_changed_table(id));
            remove_full_image(&record);
            self.bus.publish(Notice::of_disk(EventKind::VolumeDeleted, name));
            self.tidy_moments_later();
            return Ok(());
        }
        let entry = self.volume(name)?;
        for snapshot in entry.snapshots() {
            self.refuse_if_stood_on(&snapshot, ErrorCode::VolumeBusy)?;
            self.refuse_if_restored_from(&snapshot, ErrorCode::VolumeBusy)?;
        }
        if let Some(job) = self.running_jobs().into_iter().find(|j| j.disk == *name) {
            return busy(format!("volume {name}: job {} is still working on it", job.id))
                .map_err(|e: ApiError| e.with_action(format!("stop it first: halfsilver job stop {}", job.id)));
        }
        if !force && entry.frontends.count() > 0 {
            return busy(format!("volume {name} has a frontend connected"));
        }
        let count = entry.snapshots().len();
        if !force && count > 0 {
            return busy(format!("volume {name} has {count} snapshots"));
        }
        let bookmarks = entry.bookmarks_of_users();
        if !force && !bookmarks.is_empty() {
            return busy(format!("volume {name} has {} bookmarks", bookmarks.len()));
        }
        let changes = entry.ids_of_changes();
        let record = entry.to_record();
        locked(&self.disks).remove(name);
        entry.stop_server();
        // Who still waits for one of them to be quiesced finds it gone.
        for snapshot in std::mem::take(&mut *locked(&entry.snapshots)) {
            drop(locked(&snapshot.server).take());
        }
        self.records.remove(name.as_str()).map_err(record_error)?;
        crash::point("after a volume was forgotten");
        let live = record.live_log.as_ref().map(|log| (record.live, log.clone()));
        self.remove_volume_files(entry.id, live.into_iter().chain(layers_of(&record)));
        changes.into_iter().for_each(|id| self.remove_changed_table(id));
        remove_full_image(&record);
        self.forget_jobs_of(name);
        self.bus.publish(Notice::of_disk(EventKind::VolumeDeleted, name));
        log::info!("volume {name}: deleted");
        self.tidy_moments_later();
        Ok(())
    }

    fn remove_volume_files(&self, id: Uuid, layers: impl Iterator<Item = (Uuid, PathBuf)>) {
        layers.for_each(|(version, image)| self.remove_layer(version, &image));
        // A second name of a log, that was about to be its only one.
        super::layers::remove_file(&self.places.own_image(id));
        self.remove_tables(id);
    }
}

/// Whether tables of blocks of the size that was asked for can tell of such an image.
fn fits(request: &VolumeRequest, image: &Backing) -> Result<(), ApiError> {
    let Some(size) = request.block_size else { return Ok(()) };
    let (unit, bytes) = (image.alignment().offset_bytes, image.size_bytes());
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

/// Removes the full image of a volume that became independent: it is what was written to the volume.
fn remove_full_image(record: &DiskRecord) {
    let path = record.config.get("path").and_then(|path| path.as_str());
    if let (Some(_), Some(path)) = (&record.stood_on, path) {
        super::layers::remove_file(Path::new(path));
    }
}

/// The layers of a volume's snapshots: all of them logs of its own.
fn layers_of(record: &DiskRecord) -> impl Iterator<Item = (Uuid, PathBuf)> {
    record.snapshots.iter().filter(|s| !s.owns_all).map(|s| (s.id, s.image.clone()))
}

/// The name belongs to a volume.
pub(super) fn not_a_disk(name: &Name) -> ApiError {
    ApiError::new(ErrorCode::DiskExists, format!("{name} is the name of a volume"))
        .with_action("use another name, or delete the volume first")
}

fn of_lost(name: &Name, record: &DiskRecord, why: &str) -> Option<api::Volume> {
    let volume = record.volume.as_ref().or(record.stood_on.as_ref())?;
    let config: DiskConfig = serde_json::from_value(record.config.clone()).ok()?;
    Some(api::Volume {
        id: record.id,
        name: name.clone(),
        from: volume.from.clone(),
        from_id: volume.snapshot,
        state: VolumeState::Broken,
        reason: Some(why.to_owned()),
        socket: config.socket.unwrap_or_default(),
        independent: record.volume.is_none(),
        image: record.live_log.clone().unwrap_or(config.path),
        size_bytes: volume.size_bytes,
        block_size: config.block_size,
        owned_bytes: 0,
        queues: config.queues,
        connected: false,
        frontends: 0,
        snapshots: u32::try_from(record.snapshots.len()).unwrap_or(u32::MAX),
        created_at: Timestamp::from_unix_ms(volume.created_ms),
    })
}

impl DiskEntry {
    /// Why a volume cannot be used: what it stands on is lost, or a sync of its own logs has failed.
    pub(super) fn volume_failure(&self) -> Option<String> {
        if let Some(reason) = self.disk.base_broken() {
            return Some(reason);
        }
        let chain = self.disk.chain();
        let poisoned = chain.links().iter().map(|link| &link.layer.image).find(|image| image.is_poisoned())?;
        let path = poisoned.path().display();
        Some(format!("a sync of {path} failed, so it is unknown what of the last writes is stored"))
    }

    pub(super) fn to_volume(&self) -> api::Volume {
        let (chain, geometry, reason) = (self.disk.chain(), self.disk.geometry(), self.failure());
        let layer = chain.layer(chain.live());
        let owned_bytes = match layer.table() {
            Some(table) => table.count() * u64::from(geometry.block_bytes),
            None => geometry.size_bytes,
        };
        let frontends = self.frontends.count();
        let standing = locked(&self.standing).clone();
        let state = self.volume_state(reason.as_ref());
        api::Volume {
            id: self.id,
            name: self.name.clone(),
            from: standing.relation().map(|v| v.from.clone()).unwrap_or_default(),
            from_id: standing.relation().map(|v| v.snapshot).unwrap_or_default(),
            independent: standing.volume.is_none(),
            state,
            reason,
            socket: self.config.socket.clone().unwrap_or_default(),
            image: layer.image.path().to_owned(),
            size_bytes: geometry.size_bytes,
            block_size: geometry.block_bytes,
            owned_bytes: owned_bytes.min(geometry.size_bytes),
            queues: self.config.queues,
            connected: frontends > 0,
            frontends,
            snapshots: u32::try_from(locked(&self.snapshots).len()).unwrap_or(u32::MAX),
            created_at: Timestamp::from_unix_ms(standing.relation().map_or(0, |v| v.created_ms)),
        }
    }
}
