//! Serving disks: adding them, taking up what is remembered of them, and letting them go.
//!
//! A snapshot is taken up only if everything it needs is as a clean stop left it: the live image, its own image, its
//! table, and those of every newer snapshot, through which it reads. Anything else breaks it, and says why.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use uuid::Uuid;

use super::config::DiskSpec;
use super::entry::{DiskEntry, Frontends, SnapshotEntry, locked};
use super::manager::{BrokenVersions, Manager, image_error, record_error, table_error};
use super::snapshots::{clear_socket, remove_file};
use crate::control::api::DiskConfig;
use crate::control::{ApiError, ErrorCode, EventKind, Name, Notice, PutOutcome, SnapshotRef};
use crate::image::{Direct, FileImage, Image, ImageOptions, SharedImage};
use crate::mirror::{Backing, Disk, DiskOptions, Epoch, Layer, Link, Version};
use crate::store::{DiskRecord, Fingerprint, SnapshotRecord, Table, TableName};
use crate::vhost_user::{ServeOptions, SocketSource, serve};

/// How long a start waits for the transfers of a process that was killed.
const OLD_TRANSFERS_WAIT: Duration = Duration::from_secs(30);

const UNCLEAN: &str = "the daemon did not stop cleanly (it was killed, or the host went down), \
     so nobody can vouch for this snapshot; delete it and take another";
const CHANGED: &str = "the disk's image was changed while the daemon was not running; \
     delete this snapshot and take another";

/// What a start makes of a remembered snapshot.
struct Taken {
    record: SnapshotRecord,
    link: Option<(Link, Arc<Table>)>,
}

impl Manager {
    /// Serves the disks that the configuration names, and those that are remembered from before.
    ///
    /// # Errors
    /// When one that the configuration names cannot be served. One that is only remembered is left as it is then.
    pub(super) fn take_up(&self, given: &[DiskSpec]) -> Result<(), ApiError> {
        let _structure = locked(&self.structure);
        self.places.remove_strays(&self.records.disks().map_err(record_error)?);
        for spec in given {
            self.add_disk(&spec.name, &self.completed(&spec.name, &spec.config))?;
        }
        for record in self.records.disks().map_err(record_error)? {
            let name: Name = record.name.parse()?;
            if self.disk(&name).is_ok() {
                continue;
            }
            let config: DiskConfig = serde_json::from_value(record.config)
                .map_err(|e| ApiError::new(ErrorCode::Internal, format!("the record of {name}: {e}")))?;
            if let Err(e) = self.add_disk(&name, &config) {
                log::error!("{e}; its record and snapshots are kept, and other disks are served");
                self.bus.publish(Notice::of_disk(EventKind::DiskFailed, &name).because(e.message));
            }
        }
        Ok(())
    }

    pub(super) fn put(&self, name: &Name, config: &DiskConfig) -> Result<PutOutcome, ApiError> {
        let _structure = locked(&self.structure);
        self.refuse_when_stopping()?;
        let config = self.completed(name, config);
        if let Ok(old) = self.disk(name) {
            if old.config == config {
                return Ok(PutOutcome::Unchanged(old.to_api()));
            }
            let message = format!("disk {name} exists and is configured differently");
            return Err(ApiError::new(ErrorCode::DiskExists, message));
        }
        let entry = self.add_disk(name, &config)?;
        self.bus.publish(Notice::of_disk(EventKind::DiskAdded, name));
        Ok(PutOutcome::Created(entry.to_api()))
    }

    /// The configuration with everything said that has a default.
    pub(super) fn completed(&self, name: &Name, config: &DiskConfig) -> DiskConfig {
        let mut config = config.clone();
        config.socket = Some(config.socket_or_default(self.places.run_dir(), name));
        config.serial.get_or_insert_with(|| name.as_str().chars().take(20).collect());
        config
    }

    /// What is remembered of a disk, if it goes with this configuration.
    fn record_of(&self, name: &Name, config: &DiskConfig) -> Result<Option<DiskRecord>, ApiError> {
        let records = self.records.disks().map_err(record_error)?;
        let Some(record) = records.into_iter().find(|r| r.name == name.as_str()) else { return Ok(None) };
        let old: Option<DiskConfig> = serde_json::from_value(record.config.clone()).ok();
        let same = |old: &DiskConfig| old.path == config.path && old.block_size == config.block_size;
        if old.as_ref().is_some_and(same) {
            return Ok(Some(record));
        }
        if record.snapshots.is_empty() {
            return Ok(None); // Another image under an old name: a new disk.
        }
        let was =
            old.map_or_else(String::new, |o| format!(" of {} with block size {}", o.path.display(), o.block_size));
        let message = format!("disk {name} is remembered with {} snapshots{was}", record.snapshots.len());
        Err(ApiError::new(ErrorCode::DiskExists, message)
            .with_action("serve it as before and delete the snapshots first, or use another name"))
    }

    fn add_disk(&self, name: &Name, config: &DiskConfig) -> Result<Arc<DiskEntry>, ApiError> {
        let record = self.record_of(name, config)?;
        let in_disk = |e: ApiError| ApiError { message: format!("disk {name}: {}", e.message), ..e };
        let direct = if config.direct { Direct::On } else { Direct::Off };
        // After a kill the old process's last transfers may still run; nothing is read or written before they are done.
        let killed = record.as_ref().is_some_and(|r| r.saved.is_none());
        let lock_wait = if killed { OLD_TRANSFERS_WAIT } else { Duration::ZERO };
        let options = ImageOptions { direct, read_only: config.readonly, lock_wait };
        // Looked at before it is opened, because opening may count as a change.
        let looks = Fingerprint::of(&config.path).ok();
        let image: SharedImage = Arc::new(FileImage::open(&config.path, options).map_err(|e| in_disk(image_error(e)))?);
        let unit = image.alignment().offset_bytes;
        if unit > config.block_size {
            let message = format!(
                "disk {name}: {} takes units of {unit} bytes, more than its block size of {}",
                config.path.display(),
                config.block_size
            );
            return Err(ApiError::new(ErrorCode::InvalidConfig, message)
                .with_action(format!("give it block-size={unit}, or direct=off")));
        }
        let blocks = image.size_bytes().div_ceil(u64::from(config.block_size));
        let id = record.as_ref().map_or_else(Uuid::new_v4, |r| r.id);
        let discards = TableName::of_this_boot(id)
            .and_then(|table| Table::create(&self.places.run_table(id), blocks, table))
            .map_err(table_error)?;
        let live = record.as_ref().map_or_else(|| (Uuid::new_v4(), 0), |r| (r.live, r.live_began));

        let mut taken = Vec::new();
        if let Some(record) = record.clone() {
            let clean = record.saved.is_some() && record.saved == looks;
            let why = if record.saved.is_none() { UNCLEAN } else { CHANGED };
            taken = self.take_up_snapshots(record.snapshots, config, blocks, (!clean).then_some(why));
            let saved = self.places.durable_table(id);
            if let (true, Some(seal)) = (clean, record.saved_discards)
                && let Err(e) = discards.load(&saved, seal)
            {
                log::warn!("disk {name}: discards that were put off are forgotten: {e}");
            }
        }
        let mut links: Vec<Link> = taken.iter().filter_map(|t| Some(t.link.as_ref()?.0.clone())).collect();
        let layer = Layer::full(Backing::One(image.clone()));
        links.push(Link { version: Version::new(live.0, Epoch(live.1)), layer, splits: false });
        let options = DiskOptions {
            image: Backing::One(image.clone()),
            block_bytes: config.block_size,
            read_only: config.readonly,
            discards,
        };
        let disk = Disk::with_chain(self.clock.clone(), options, links);
        disk.observe(Arc::new(BrokenVersions(self.broken.clone())));
        let snapshots: Vec<_> = taken.into_iter().filter_map(|t| self.entry_of(name, t)).collect();

        // From here on the disk may change: the record must not say "saved" any more.
        let mut unsaved = DiskRecord {
            id,
            name: name.to_string(),
            config: serde_json::to_value(config).expect("a configuration is plain data"),
            live: live.0,
            live_began: live.1,
            snapshots: snapshots.iter().map(|s| s.to_record()).collect(),
            saved: None,
            saved_discards: None,
        };
        unsaved.snapshots.iter_mut().for_each(|s| s.saved = None);
        self.records.put([&unsaved]).map_err(record_error)?;

        let frontends = Frontends::new(name, None, &self.bus);
        let socket = config.socket.clone().unwrap_or_default();
        let server = serve(ServeOptions {
            name: name.to_string(),
            socket: SocketSource::Path(socket.clone()),
            attachment: disk.attach_live(),
            queues: config.queues,
            serial: config.serial.clone().unwrap_or_default(),
            frontends_max: 1, // FRONTENDS_MAX once a disk can be shared.
            observer: frontends.clone(),
            once: false,
        })
        .map_err(|e| {
            // Nothing has changed yet: what was remembered is still true.
            let restored = match &record {
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
            config: config.clone(),
            disk,
            image,
            server,
            frontends,
            live: Mutex::new(live),
            snapshots: Mutex::new(snapshots),
            failure_told: AtomicBool::new(false),
        });
        locked(&self.disks).insert(name.clone(), entry.clone());
        log::info!(
            "disk {name}: serving {} ({} bytes) at {}",
            config.path.display(),
            entry.disk.geometry().size_bytes,
            socket.display()
        );
        for snapshot in entry.snapshots() {
            self.resume_snapshot(&entry, &snapshot);
        }
        Ok(entry)
    }

    /// From the newest to the oldest: each needs those before it in this order.
    fn take_up_snapshots(
        &self,
        records: Vec<SnapshotRecord>,
        config: &DiskConfig,
        blocks: u64,
        mut lost: Option<&str>,
    ) -> Vec<Taken> {
        let mut taken = Vec::new();
        for mut record in records.into_iter().rev() {
            let link = match lost {
                Some(_) => None,
                None => match self.take_up_snapshot(&record, config, blocks) {
                    Ok(link) => Some(link),
                    Err(what) => {
                        record.broken.get_or_insert(what);
                        lost = Some("a newer snapshot through which it reads is lost; delete it and take another");
                        None
                    }
                },
            };
            if let (None, Some(why)) = (&link, lost) {
                record.broken.get_or_insert_with(|| why.to_owned());
            }
            taken.push(Taken { record, link });
        }
        taken.reverse();
        taken
    }

    fn take_up_snapshot(
        &self,
        record: &SnapshotRecord,
        config: &DiskConfig,
        blocks: u64,
    ) -> Result<(Link, Arc<Table>), String> {
        let is_file = std::fs::symlink_metadata(&record.image).map(|m| m.is_file()).unwrap_or(false);
        if !is_file {
            return Err(format!("its image {} is missing or is not a file", record.image.display()));
        }
        if record.saved.is_none() || record.saved != Fingerprint::of(&record.image).ok() {
            return Err(format!("its image {} was changed while the daemon was not running", record.image.display()));
        }
        let table = TableName::of_this_boot(record.id)
            .and_then(|table| Table::create(&self.places.run_table(record.id), blocks, table))
            .map_err(|e| e.to_string())?;
        let seal = record.saved_table.ok_or("its table was not saved")?;
        table.load(&self.places.durable_table(record.id), seal).map_err(|e| e.to_string())?;
        let image = open_snapshot_image(&record.image, config).map_err(|e| e.to_string())?;
        let version = Version::new(record.id, Epoch(record.began));
        version.set_quiesced();
        if let Some(reason) = &record.broken {
            version.set_broken(reason.clone());
        }
        let table = Arc::new(table);
        let layer = Layer::of(Backing::One(image), table.clone());
        Ok((Link { version, layer, splits: false }, table))
    }

    fn entry_of(&self, disk: &Name, taken: Taken) -> Option<Arc<SnapshotEntry>> {
        let Taken { record, link } = taken;
        let reference = SnapshotRef { disk: disk.clone(), name: record.name.parse().ok()? };
        if link.is_none() && (record.ended == 0 || record.deleting) {
            // Never announced, or on its way out: nobody misses it.
            log::info!("snapshot {reference}: removing what an unfinished operation left");
            clear_socket(&record);
            self.remove_files(&record);
            return None;
        }
        if let Some(reason) = &record.broken {
            log::error!("snapshot {reference} is broken: {reason}");
        }
        let (version, table) = link.map(|(link, table)| (link.version, table)).unzip();
        Some(Arc::new(SnapshotEntry {
            id: record.id,
            frontends: Frontends::new(disk, Some(&reference), &self.bus),
            reference,
            record: Mutex::new(record),
            version,
            table,
            server: Mutex::new(None),
            socket_error: Mutex::new(None),
            drain: Mutex::new(None),
        }))
    }

    pub(super) fn remove_disk(&self, name: &Name, force: bool) -> Result<(), ApiError> {
        let _structure = locked(&self.structure);
        self.refuse_when_stopping()?;
        let entry = self.disk(name)?;
        let busy = |message: String| Err(ApiError::new(ErrorCode::DiskBusy, message));
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
        locked(&self.disks).remove(name);
        entry.server.stop();
        // Who still waits for one of them to be quiesced finds it gone.
        let snapshots = std::mem::take(&mut *locked(&entry.snapshots));
        for snapshot in &snapshots {
            drop(locked(&snapshot.server).take());
        }
        self.records.remove(name.as_str()).map_err(record_error)?;
        for snapshot in &snapshots {
            self.remove_files(&locked(&snapshot.record));
        }
        remove_file(&self.places.durable_table(entry.id));
        remove_file(&self.places.run_table(entry.id));
        self.bus.publish(Notice::of_disk(EventKind::DiskRemoved, name));
        log::info!("disk {name}: no longer served");
        Ok(())
    }
}

/// Opens a snapshot's image as its disk is opened, through the page cache where that is all there is.
pub(super) fn open_snapshot_image(
    path: &std::path::Path,
    config: &DiskConfig,
) -> Result<SharedImage, crate::image::ImageError> {
    let open = |direct| FileImage::open(path, ImageOptions { direct, read_only: false, lock_wait: Duration::ZERO });
    let image = match open(if config.direct { Direct::On } else { Direct::Off }) {
        Err(e) if config.direct && e.kind == crate::image::ImageErrorKind::Unsuitable => open(Direct::Off),
        Ok(image) if image.alignment().offset_bytes > config.block_size => {
            drop(image);
            open(Direct::Off)
        }
        other => other,
    };
    image.map(|image| Arc::new(image) as SharedImage)
}
