//! Serving disks: adding them, taking up what is remembered of them, and letting them go.
//!
//! How a disk's versions are taken up again is in [`super::takeup`].

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use uuid::Uuid;

use super::changes::with_tables;
use super::config::DiskSpec;
use super::entry::{DiskEntry, Frontends, SnapshotEntry, locked, record_of};
use super::layers::{DiskLayers, OLD_TRANSFERS_WAIT, direct_of, remove_file};
use super::manager::{BrokenVersions, Manager, record_error, table_error};
use super::mirror::{Base, Mirror};
use super::restore::Awaited;
use super::snapshots::store_shown;
use super::standing::{Standing, set_of};
use super::takeup::{Taken, Trust, take_up};
use super::volumes::not_a_disk;
use crate::control::api::DiskConfig;
use crate::control::{ApiError, ErrorCode, EventKind, Name, Notice, PutOutcome, SnapshotRef};
use crate::image::ImageOptions;
use crate::mirror::planted::{self, Defect};
use crate::mirror::{Disk, DiskOptions, Geometry, Version};
use crate::store::{BookmarkRecord, DiskRecord, Fingerprint, RestoreRecord, SnapshotRecord, Table, TableName};
use crate::vhost_user::{FRONTENDS_MAX, ServeOptions, ServerHandle, SocketSource, serve};

/// A disk or volume of which all is there.
pub(super) struct Opened<'a> {
    pub(super) id: Uuid,
    pub(super) boot: Uuid,
    pub(super) config: DiskConfig,
    pub(super) disk: Arc<Disk>,
    pub(super) mirror: Option<Mirror>,
    pub(super) former_legs: Vec<PathBuf>,
    pub(super) standing: Standing,
    pub(super) restore: Option<RestoreRecord>,
    pub(super) awaited: Option<Awaited>,
    pub(super) snapshots: Vec<Arc<SnapshotEntry>>,
    pub(super) bookmarks: Vec<BookmarkRecord>,
    /// What the records have said of it.
    pub(super) record: Option<&'a DiskRecord>,
}

impl Manager {
    /// Serves the disks that the configuration names, and those that are remembered from before.
    ///
    /// # Errors
    /// When one that the configuration names cannot be served. One that is only remembered is left as it is then.
    pub(super) fn take_up(&self, given: &[DiskSpec], take_flushed: &[Name]) -> Result<(), ApiError> {
        let _structure = locked(&self.structure);
        for spec in given {
            let take_flushed = take_flushed.contains(&spec.name);
            self.add_disk(&spec.name, &self.completed(&spec.name, &spec.config), take_flushed)?;
        }
        let (volumes, disks): (Vec<_>, Vec<_>) =
            self.records.disks().map_err(record_error)?.into_iter().partition(DiskRecord::is_volume);
        for record in disks {
            let name: Name = record.name.parse()?;
            if self.disk(&name).is_ok() {
                continue;
            }
            let config: DiskConfig = serde_json::from_value(record.config.clone())
                .map_err(|e| ApiError::new(ErrorCode::Internal, format!("the record of {name}: {e}")))?;
            if let Err(e) = self.add_disk(&name, &config, take_flushed.contains(&name)) {
                log::error!("{e}; its record and snapshots are kept, and other disks are served");
                self.bus.publish(Notice::of_disk(EventKind::DiskFailed, &name).because(&e.message));
                locked(&self.lost_disks).insert(name, (record, e.message));
            }
        }
        self.take_up_volumes(volumes, take_flushed)?;
        self.resume_restores();
        self.tidy_moments_later();
        Ok(())
    }

    pub(super) fn put(&self, name: &Name, config: &DiskConfig) -> Result<PutOutcome, ApiError> {
        let _structure = locked(&self.structure);
        self.refuse_when_stopping()?;
        let config = self.completed(name, config);
        if let Ok(old) = self.disk(name) {
            if old.is_volume() {
                return Err(not_a_disk(name));
            }
            if old.config() == config {
                return Ok(PutOutcome::Unchanged(old.to_api()));
            }
            let message = format!("disk {name} exists and is configured differently");
            return Err(ApiError::new(ErrorCode::DiskExists, message).with_action(format!(
                "change what can be changed while it is served (halfsilver disk set {name}), or remove it first"
            )));
        }
        let entry = self.add_disk(name, &config, false)?;
        locked(&self.lost_disks).remove(name);
        self.resume_restores();
        self.bus.publish(Notice::of_disk(EventKind::DiskAdded, name));
        Ok(PutOutcome::Created(entry.to_api()))
    }

    /// The configuration with everything said that has a default. Who says nothing of a second leg means what is there, and
    /// of what was set, as it was set.
    pub(super) fn completed(&self, name: &Name, config: &DiskConfig) -> DiskConfig {
        let served = self.disk(name).ok().map(|disk| disk.to_record());
        let record = served.or_else(|| self.records.disks().ok()?.into_iter().find(|r| r.name == name.as_str()));
        let path = record.as_ref().and_then(|r| r.config.get("path")?.as_str()).map(PathBuf::from);
        let set = record.as_ref().map(set_of).unwrap_or_default();
        let legs = record.and_then(|r| r.mirror).map(|m| m.legs).unwrap_or_default();
        let is_leg = legs.iter().any(|leg| leg.path == config.path);
        let mut config = config.clone();
        if is_leg || path.as_ref() == Some(&config.path) {
            config = config.or_set(&set);
        }
        if is_leg && config.mirror.is_none() {
            config.mirror = legs.into_iter().map(|leg| leg.path).find(|path| *path != config.path);
        }
        config = config.filled();
        config.socket = Some(config.socket_or_default(self.places.run_dir(), name));
        config.serial.get_or_insert_with(|| name.as_str().chars().take(20).collect());
        config
    }

    /// What is remembered of a disk, if it goes with this configuration.
    fn record_of(&self, name: &Name, config: &DiskConfig) -> Result<Option<DiskRecord>, ApiError> {
        let records = self.records.disks().map_err(record_error)?;
        let Some(record) = records.into_iter().find(|r| r.name == name.as_str()) else { return Ok(None) };
        let old: Option<DiskConfig> = serde_json::from_value(record.config.clone()).ok();
        if record.is_volume() {
            // What the configuration of a volume that stands on something has for a path is no path.
            let is_it = old.is_some_and(|old| old.path == config.path);
            return if is_it { Ok(Some(record)) } else { Err(not_a_disk(name)) };
        }
        let legs: Vec<_> = record.mirror.iter().flat_map(|m| &m.legs).map(|leg| &leg.path).collect();
        let is_known = |path: &PathBuf| match legs.is_empty() {
            true => old.as_ref().is_some_and(|o| o.path == *path),
            false => legs.contains(&path),
        };
        let same = |old: &DiskConfig| is_known(&config.path) && old.block_size == config.block_size;
        let now = old.as_ref().map(|o| o.path.display().to_string()).unwrap_or_default();
        if record.former_legs.contains(&config.path) {
            let message = format!(
                "disk {name} is {now} now; {} was a leg of it once, and does not have what was written since",
                config.path.display()
            );
            return Err(ApiError::new(ErrorCode::DiskExists, message)
                .with_action(format!("serve it with path={now}, or {} under another name", config.path.display())));
        }
        if old.as_ref().is_some_and(same) {
            let other = config.mirror.as_ref().filter(|path| legs.len() > 1 && !legs.contains(path));
            if let Some(other) = other {
                let message = format!("disk {name} has other legs than {}", other.display());
                return Err(ApiError::new(ErrorCode::DiskExists, message).with_action(
                    "leave mirror= out, and change legs with 'halfsilver disk mirror' and 'disk unmirror'",
                ));
            }
            return Ok(Some(record));
        }
        if record.snapshots.is_empty() && record.bookmarks.is_empty() && legs.len() < 2 {
            return Ok(None); // Another image under an old name: a new disk.
        }
        let was =
            old.map_or_else(String::new, |o| format!(" of {} with block size {}", o.path.display(), o.block_size));
        let message = format!("disk {name} is remembered with {} snapshots{was}", record.snapshots.len());
        Err(ApiError::new(ErrorCode::DiskExists, message)
            .with_action("serve it as before and delete the snapshots first, or use another name"))
    }

    pub(super) fn add_disk(
        &self,
        name: &Name,
        config: &DiskConfig,
        take_flushed: bool,
    ) -> Result<Arc<DiskEntry>, ApiError> {
        let record = self.record_of(name, config)?;
        let in_disk = |e: ApiError| ApiError { message: format!("disk {name}: {}", e.message), ..e };
        let direct = direct_of(config);
        // After a kill the old process's last transfers may still run; nothing is read or written before they are done.
        let killed = record.as_ref().is_some_and(|r| r.saved.is_none());
        let lock_wait = if killed { OLD_TRANSFERS_WAIT } else { Duration::ZERO };
        let options = ImageOptions { direct, read_only: config.readonly(), lock_wait };
        // Looked at before it is opened, because opening may count as a change. A mirror looks at its legs itself.
        // Whether what a volume stands on may be believed is said there.
        let looks = match record.as_ref().filter(|r| r.mirror.is_some() || r.volume.is_some()) {
            Some(record) => record.saved,
            None => Fingerprint::of(&config.path).ok(),
        };
        let mut standing = record.as_ref().map(Standing::of).unwrap_or_default();
        standing.set = standing.set.still_in(config);
        let Base { backing, mut mirror } = match &standing.volume {
            Some(volume) => Base { backing: self.base_of(volume), mirror: None },
            None => self.open_base(config, record.as_ref(), options).map_err(in_disk)?,
        };
        let unit = backing.alignment().offset_bytes;
        if unit > config.block_size {
            let message = format!(
                "disk {name}: {} takes units of {unit} bytes, more than its block size of {}",
                config.path.display(),
                config.block_size
            );
            return Err(ApiError::new(ErrorCode::InvalidConfig, message)
                .with_action(format!("give it block-size={unit}, or direct=off")));
        }
        let geometry = Geometry::of(&backing, config.block_size);
        let id = record.as_ref().map_or_else(Uuid::new_v4, |r| r.id);
        let table = TableName::of_this_boot(id).map_err(table_error)?;
        let boot = table.boot;
        let discards = Table::create(&self.places.run_table(id), geometry.blocks(), table).map_err(table_error)?;
        let trust = record.as_ref().map(|record| match Trust::of(record, looks, boot) {
            Trust::SameBoot if take_flushed => Trust::PowerCut,
            trust => trust,
        });
        let taken = match record.clone().zip(trust) {
            None => Taken::of_new_disk(backing.clone()),
            Some((record, trust)) => {
                if let (Trust::Saved, Some(seal)) = (trust, record.saved_discards)
                    && let Err(e) = discards.load(&self.places.durable_table(id), seal)
                {
                    log::warn!("disk {name}: discards that were put off are forgotten: {e}");
                }
                let layers = DiskLayers { manager: self, config, geometry: &geometry, trust };
                take_up(record, &backing, &config.path, trust, &layers).map_err(in_disk)?
            }
        };
        let options =
            DiskOptions { image: backing, block_bytes: config.block_size, read_only: config.readonly(), discards };
        let disk = Disk::announcing(standing.logical_block_bytes, self.clock.clone(), options, taken.links);
        disk.observe(Arc::new(BrokenVersions { tell: self.house.clone(), places: self.places.clone() }));
        disk.remember_marks(taken.marks);
        let mut bookmarks = record.as_ref().map(|r| r.bookmarks.clone()).unwrap_or_default();
        let (restore, awaited) = match record.as_ref().zip(trust) {
            None => (None, None),
            Some((record, trust)) => {
                let layers = DiskLayers { manager: self, config, geometry: &geometry, trust };
                self.take_up_restore(&disk, record, &layers).map_err(in_disk)?
            }
        };
        if restore.is_some() && mirror.is_none() && config.mirror.is_some() {
            let message = format!("disk {name}: it is being restored, and gets no second leg meanwhile");
            return Err(ApiError::new(ErrorCode::DiskBusy, message)
                .with_action("leave mirror= out, and add the leg when the restore is over: halfsilver disk mirror"));
        }
        let mut former_legs = record.as_ref().map(|r| r.former_legs.clone()).unwrap_or_default();
        let mut config = config.clone();
        // With a snapshot that goes because its leg is missing or changed, the leg goes too: nobody knows what is on it.
        for (lost, _) in taken.snapshots.iter().filter(|(s, version)| version.is_none() && s.deleting && s.owns_all) {
            let Some(mirror) = mirror.as_mut().filter(|m| m.legs.len() > 1) else { continue };
            let (gone, stays) =
                std::mem::take(&mut mirror.legs).into_iter().partition(|(leg, _)| leg.path == lost.image);
            mirror.legs = stays;
            former_legs.extend(Vec::into_iter(gone).map(|(leg, _)| leg.path));
            config.path.clone_from(&mirror.legs[0].0.path);
            config.mirror = mirror.legs.get(1).map(|(leg, _)| leg.path.clone());
        }
        for (gone, _) in taken.snapshots.iter().filter(|(s, version)| version.is_none() && s.deleting) {
            self.settle_mark(&disk, gone, &mut bookmarks);
        }
        let snapshots: Vec<_> = taken.snapshots.into_iter().filter_map(|t| self.entry_of(name, t)).collect();
        // Those that drained when the last daemon was killed never change again. The records say so next, and a later
        // power cut believes it.
        let drained = record.iter().flat_map(|r| &r.snapshots).filter(|s| s.quiesced_ms.is_none());
        for drained in drained {
            if let Some(version) = snapshots.iter().find(|s| s.id == drained.id).and_then(|s| s.version.as_ref()) {
                store_shown(&disk, version);
            }
        }
        let leg = config.mirror.clone();
        let opened = Opened {
            id,
            boot,
            config,
            disk,
            mirror,
            former_legs,
            standing,
            restore,
            awaited,
            snapshots,
            bookmarks,
            record: record.as_ref(),
        };
        let entry = self.open_disk(name, opened)?;
        self.forget_unbegun_restore(record.as_ref());
        self.resume_mirror(&entry);
        self.resume_work(&entry);
        for snapshot in entry.snapshots() {
            self.resume_snapshot(&entry, &snapshot);
        }
        if let Some(path) = leg.filter(|_| locked(&entry.mirror).is_none())
            && let Err(e) = self.add_leg(&entry, &path)
        {
            // Nothing was asked of it yet: it goes as if it had never come.
            locked(&self.disks).remove(name);
            entry.stop_server();
            let gone = if record.is_some() { self.persist(&[entry]) } else { self.forget_disk(&entry) };
            if let Err(e) = gone {
                log::error!("disk {name}: {}", e.message);
            }
            return Err(in_disk(e));
        }
        Ok(entry)
    }

    /// Records that a disk is served, and serves it.
    pub(super) fn open_disk(&self, name: &Name, opened: Opened) -> Result<Arc<DiskEntry>, ApiError> {
        let Opened {
            id,
            boot,
            config,
            disk,
            mirror,
            former_legs,
            standing,
            restore,
            awaited,
            snapshots,
            bookmarks,
            record,
        } = opened;
        disk.background().set_window(config.background_bytes().into());
        // From here on the disk may change: the record must not say "saved" any more.
        let mut unsaved = record_of((id, name, boot), &config, &disk.chain(), &snapshots);
        unsaved.mirror = mirror.as_ref().map(Mirror::to_record);
        standing.put_into(&mut unsaved);
        unsaved.former_legs.clone_from(&former_legs);
        unsaved.bookmarks = with_tables(&bookmarks, &disk);
        unsaved.restore.clone_from(&restore);
        if !planted::is(Defect::StillSaved) {
            self.records.put([&unsaved]).map_err(record_error)?;
        }

        let frontends = Frontends::new(name, None, &self.bus);
        let socket = config.socket.clone().unwrap_or_default();
        let server = match standing.disabled {
            true => crate::vhost_user::clear_stale(&socket).map(|()| None).map_err(|e| e.to_string()),
            false => serve_live(name, &config, &disk, &frontends).map(Some),
        };
        let server = server.map_err(|e| {
            // Nothing has changed yet: what was remembered is still true.
            let restored = match record {
                Some(record) => self.records.put([record]),
                None => self.records.remove(name.as_str()),
            };
            if let Err(e) = restored {
                log::error!("cannot restore the record of disk {name}: {e}");
            }
            let message = format!("disk {name}: cannot serve {}: {e}", socket.display());
            ApiError::new(ErrorCode::Conflict, message)
        })?;
        let entry = Arc::new(DiskEntry {
            name: name.clone(),
            id,
            boot,
            path: Mutex::new(config.path.clone()),
            config,
            disk,
            standing: Mutex::new(standing),
            mirror: Mutex::new(mirror),
            former_legs: Mutex::new(former_legs),
            restore: Mutex::new(restore),
            awaited: Mutex::new(awaited),
            leg_paths: Arc::default(),
            retires: AtomicBool::new(false),
            cleaning: AtomicBool::new(false),
            server: Mutex::new(server.map(Arc::new)),
            frontends,
            snapshots: Mutex::new(snapshots),
            bookmarks: Mutex::new(bookmarks),
            failure_told: AtomicBool::new(false),
        });
        locked(&self.disks).insert(name.clone(), entry.clone());
        log::info!(
            "disk {name}: serving {} ({} bytes) at {}",
            entry.config.path.display(),
            entry.disk.geometry().size_bytes,
            socket.display()
        );
        Ok(entry)
    }

    fn entry_of(
        &self,
        disk: &Name,
        (record, version): (SnapshotRecord, Option<Arc<Version>>),
    ) -> Option<Arc<SnapshotEntry>> {
        let reference = SnapshotRef { disk: disk.clone(), name: record.name.parse().ok()? };
        if version.is_none() && record.deleting {
            // Never announced, or on its way out: nobody misses it.
            log::info!("snapshot {reference}: removing what an unfinished operation left");
            clear_socket(&record);
            if !record.owns_all {
                self.remove_layer(record.id, &record.image); // A full image is the disk's own, or a leg.
            }
            return None;
        }
        if let Some(reason) = &record.broken {
            log::error!("snapshot {reference} is broken: {reason}");
        }
        Some(Arc::new(SnapshotEntry {
            id: record.id,
            frontends: Frontends::new(disk, Some(&reference), &self.bus),
            reference,
            record: Mutex::new(record),
            version,
            server: Mutex::new(None),
            socket_error: Mutex::new(None),
            drain: Mutex::new(None),
        }))
    }

    pub(super) fn remove_disk_files(&self, disk: &DiskEntry) {
        remove_file(&self.places.durable_table(disk.id));
        remove_file(&self.places.run_table(disk.id));
        if let Some(mirror) = &*locked(&disk.mirror) {
            remove_file(&self.places.log_table(mirror.bitmap));
        }
        if let Some(restore) = &*locked(&disk.restore) {
            self.remove_restore_files(restore.id);
        }
    }

    fn forget_disk(&self, disk: &DiskEntry) -> Result<(), ApiError> {
        self.records.remove(disk.name.as_str()).map_err(record_error)?;
        self.remove_disk_files(disk);
        Ok(())
    }

    pub(super) fn remove_disk(&self, name: &Name, force: bool) -> Result<(), ApiError> {
        let _structure = locked(&self.structure);
        self.refuse_when_stopping()?;
        let entry = self.plain_disk(name)?;
        let busy = |message: String| Err(ApiError::new(ErrorCode::DiskBusy, message));
        for snapshot in entry.snapshots() {
            self.refuse_if_stood_on(&snapshot, ErrorCode::DiskBusy)?;
        }
        // What is restored is lost: whoever gives the disk up keeps its image, in which it is not all.
        let is_given_up = force && entry.disk.restore_lost().is_some();
        if !is_given_up {
            self.refuse_while_restored(&entry, ErrorCode::DiskBusy)?;
        }
        if let Some(job) = self.running_jobs().into_iter().find(|j| j.disk == *name) {
            return busy(format!("disk {name}: job {} is still working on it", job.id));
        }
        if !force && entry.frontends.count() > 0 {
            return busy(format!("disk {name} has a frontend connected"));
        }
        let count = entry.snapshots().len();
        if !force && count > 0 {
            return busy(format!("disk {name} has {count} snapshots"));
        }
        let bookmarks = entry.bookmarks_of_users();
        if !force && !bookmarks.is_empty() {
            return busy(format!("disk {name} has {} bookmarks", bookmarks.len()))
                .map_err(|e: ApiError| e.with_action(bookmarks_go("disk remove", name)));
        }
        if !entry.disk.can_move_pivot() {
            return busy(format!(
                "disk {name}: its newest content is in a log; delete its snapshots, so that it is folded"
            ));
        }
        locked(&self.disks).remove(name);
        entry.stop_server();
        // Who still waits for one of them to be quiesced finds it gone.
        let snapshots = std::mem::take(&mut *locked(&entry.snapshots));
        for snapshot in &snapshots {
            drop(locked(&snapshot.server).take());
        }
        self.records.remove(name.as_str()).map_err(record_error)?;
        for snapshot in &snapshots {
            let record = locked(&snapshot.record);
            if !record.owns_all {
                self.remove_layer(record.id, &record.image);
            }
        }
        entry.ids_of_changes().into_iter().for_each(|id| self.remove_changed_table(id));
        self.remove_disk_files(&entry);
        self.bus.publish(Notice::of_disk(EventKind::DiskRemoved, name));
        log::info!("disk {name}: no longer served");
        Ok(())
    }
}

/// What it means that a disk or volume with bookmarks goes.
pub(super) fn bookmarks_go(command: &str, name: &Name) -> String {
    format!(
        "they go with it, and backups that go by them copy everything once: halfsilver {command} {name} --force, or \
         delete each of them first: halfsilver bookmark delete"
    )
}

/// Opens the socket of a disk's live version.
pub(super) fn serve_live(
    name: &Name,
    config: &DiskConfig,
    disk: &Arc<Disk>,
    frontends: &Arc<Frontends>,
) -> Result<ServerHandle, String> {
    serve(ServeOptions {
        name: name.to_string(),
        socket: SocketSource::Path(config.socket.clone().unwrap_or_default()),
        attachment: disk.attach_live(),
        queues: config.queues(),
        serial: config.serial.clone().unwrap_or_default(),
        observer: frontends.clone(),
        once: false,
        frontends_max: if config.shared { FRONTENDS_MAX } else { 1 },
    })
    .map_err(|e| e.to_string())
}

/// Removes the socket that a killed daemon left of a snapshot that is not served any more.
pub(super) fn clear_socket(record: &SnapshotRecord) {
    if let Err(e) = crate::vhost_user::clear_stale(&record.socket) {
        log::warn!("the socket of a snapshot that is not served stays: {e}");
    }
}
