//! Serving disks: adding them, taking up what is remembered of them, and letting them go.
//!
//! What is made of what was left of a disk is decided in the room `recovery`, and carried out here.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use uuid::Uuid;

use super::changes::with_tables;
use super::entry::{Allocated, DiskEntry, Frontends, SnapshotEntry, locked, record_of};
use super::layers::{DiskLayers, direct_of};
use super::manager::{BrokenVersions, Manager, record_error, table_error};
use super::mirror::{Base, Mirror, check_new_leg};
use super::restore::Awaited;
use super::snapshots::store_shown;
use super::standing::{Standing, set_of};
use super::startup::{Planned, lock_wait_after_decision, unserved};
use super::unserved::Unserved;
use super::volumes::not_a_disk;
use crate::control::api::DiskConfig;
use crate::control::timestamp::Timestamp;
use crate::control::{ApiError, ErrorCode, EventKind, Name, Notice, PutOutcome, SnapshotRef};
use crate::image::ImageOptions;
use crate::mirror::{Disk, DiskOptions, Geometry, Version};
use crate::recovery::{LegUse, Recovery, Taken, Why, carry_out};
use crate::registry::{ClaimKey, Wanted};
use crate::store::{BookmarkRecord, DiskRecord, RestoreRecord, SnapshotRecord, Table, TableName};
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
    pub(super) fn put(&self, name: &Name, config: &DiskConfig) -> Result<PutOutcome, ApiError> {
        let config = self.completed(name, config);
        let _claim = self.claim_to_add("disk add", name, &config)?;
        if let Ok(old) = self.disk(name) {
            if old.is_volume() {
                return Err(not_a_disk(name));
            }
            if old.config() == config {
                return Ok(PutOutcome::Unchanged(old.to_api()));
            }
            let message = format!("disk {name} exists and is configured differently");
            return Err(ApiError::new(ErrorCode::DiskExists, message).with_action(format!(
                "change what can be changed while it is served (halfsilver disk set {name}), or remove it first: \
                 halfsilver disk remove {name}"
            )));
        }
        let entry = self.add_now(name, config)?;
        self.hurry_unserved();
        self.bus.publish(Notice::of_disk(EventKind::DiskAdded, name));
        Ok(PutOutcome::Created(entry.to_api()))
    }

    /// What must be nobody else's while a disk is added.
    pub(super) fn claim_to_add(
        &self,
        operation: &str,
        name: &Name,
        config: &DiskConfig,
    ) -> Result<super::claiming::Held<'_>, ApiError> {
        let known = self.registry().named(name).map(|disk| ClaimKey::Entity(disk.id));
        let places = [&config.socket, &config.mirror].into_iter().flatten().chain([&config.path]);
        let keys = places.map(|path| ClaimKey::Path(path.clone())).chain([ClaimKey::Name(name.clone())]).chain(known);
        self.claim_keys(&format!("{operation} {name}"), &[name.as_str()], Wanted::changing(keys))
    }

    /// Decides about a disk and serves it. It is claimed.
    pub(super) fn add_now(&self, name: &Name, config: DiskConfig) -> Result<Arc<DiskEntry>, ApiError> {
        let take_flushed: Vec<Name> =
            locked(&self.unserved).get(name).filter(|u| u.takes_flushed).map(|u| u.name.clone()).into_iter().collect();
        let planned = self.plan(name, config)?;
        if let Some(base) = self.base_not_served(&planned) {
            let message = format!("volume {name}: what it stands on is not served: {base}");
            return Err(ApiError::new(ErrorCode::DiskFailed, message));
        }
        let recovery = self.decide(std::slice::from_ref(&planned), &take_flushed)?.into_iter().flatten().next();
        let entry = self.add_planned(planned, recovery)?;
        self.resume_restores();
        Ok(entry)
    }

    /// The configuration with everything said that has a default. Who says nothing of a second leg means what is there, and
    /// of what was set, as it was set.
    pub(super) fn completed(&self, name: &Name, config: &DiskConfig) -> DiskConfig {
        let served = self.disk(name).ok().map(|disk| disk.to_record());
        let record = served.or_else(|| self.remembered(name).ok().flatten());
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
        let Some(record) = self.remembered(name)? else { return Ok(None) };
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
        let with = what_is_kept(&record);
        if with.is_empty() {
            return Ok(None); // Another image under an old name: a new disk.
        }
        let was =
            old.map_or_else(String::new, |o| format!(" of {} with block size {}", o.path.display(), o.block_size));
        let message = format!("disk {name} is remembered{was}, with {}", with.join(", "));
        Err(ApiError::new(ErrorCode::DiskExists, message).with_action(format!(
            "serve it as it was, or use another name, or give up what is remembered: halfsilver disk forget {name}"
        )))
    }

    pub(super) fn plan(&self, name: &Name, config: DiskConfig) -> Result<Planned, ApiError> {
        let record = self.record_of(name, &config)?;
        let of_volume = record.as_ref().is_some_and(|r| r.volume.is_some());
        for path in [Some(&config.path), config.mirror.as_ref()].into_iter().flatten().filter(|_| !of_volume) {
            self.refuse_what_others_have(name, path, record.is_none())?;
        }
        Ok(Planned { name: name.clone(), config, record })
    }

    /// An image that something has which is not served is not served as another disk's: nobody else keeps it from that.
    pub(super) fn refuse_what_others_have(&self, name: &Name, path: &Path, is_new: bool) -> Result<(), ApiError> {
        let refuse = |whose: String| {
            let message = format!("disk {name}: {}: it is in use as {whose}", path.display());
            Err(ApiError::new(ErrorCode::Conflict, message).with_action("name another image"))
        };
        let resolved = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let is_it = |its: &Path| its == path || its == resolved;
        let unserved: Vec<Unserved> = locked(&self.unserved).values().cloned().collect();
        for other in unserved.iter().filter(|u| u.name != *name).filter_map(|u| u.record.as_ref()) {
            let what = if other.is_volume() { "volume" } else { "disk" };
            let own = other.config.get("path").and_then(|path| path.as_str()).map(Path::new);
            let legs = other.mirror.iter().flat_map(|m| &m.legs).map(|leg| leg.path.as_path());
            if own.into_iter().chain(other.live_log.as_deref()).chain(legs).any(is_it) {
                return refuse(format!("the image of {what} {}", other.name));
            }
            if let Some(snapshot) = other.snapshots.iter().find(|s| is_it(&s.image)) {
                return refuse(format!("the image of snapshot {}@{}", other.name, snapshot.name));
            }
        }
        // While a record cannot be read, what lies where our images are may be anybody's.
        let is_unknown = unserved.iter().any(|u| u.record.is_none() && !u.is_new);
        match is_new && is_unknown && [path, &resolved].iter().any(|p| p.parent() == Some(&*self.places.images_dir())) {
            true => refuse("the image of something whose record cannot be read".to_owned()),
            false => Ok(()),
        }
    }

    /// Serves a disk as it was decided; one of which nothing is remembered as it is.
    pub(super) fn add_planned(&self, planned: Planned, recovery: Option<Recovery>) -> Result<Arc<DiskEntry>, ApiError> {
        let new = planned.record.is_none().then(Uuid::new_v4);
        // What is made for a disk that is refused in the end goes again.
        self.add_planned_as(new, planned, recovery)
            .inspect_err(|_| new.iter().for_each(|id| super::layers::remove_file(&self.places.run_table(*id))))
    }

    fn add_planned_as(
        &self,
        new: Option<Uuid>,
        planned: Planned,
        recovery: Option<Recovery>,
    ) -> Result<Arc<DiskEntry>, ApiError> {
        let Planned { name, config, record } = &planned;
        let in_disk = |e: ApiError| ApiError { message: format!("disk {name}: {}", e.message), ..e };
        if let Some(why) = recovery.as_ref().and_then(Recovery::why_unserved) {
            return Err(in_disk(unserved(why)));
        }
        let lock_wait = lock_wait_after_decision(record.as_ref());
        let options = ImageOptions { direct: direct_of(config), read_only: config.readonly(), lock_wait };
        let mut standing = record.as_ref().map(Standing::of).unwrap_or_default();
        standing.set = standing.set.still_in(config);
        let Base { backing, mirror } = match &standing.volume {
            Some(volume) => {
                let lost = recovery.as_ref().and_then(Recovery::why_hollow);
                Base { backing: self.base_of(volume, lost), mirror: None }
            }
            None => self.open_base(config, recovery.as_ref(), options).map_err(in_disk)?,
        };
        let (path, block_bytes) = (config.path.clone(), config.block_size);
        let unit_bytes = backing.alignment().offset_bytes;
        if unit_bytes > block_bytes {
            return Err(in_disk(unserved(&Why::Unit { path, unit_bytes, block_bytes })));
        }
        let geometry = Geometry::of(&backing, config.block_size);
        let id = record.as_ref().map(|r| r.id).or(new).unwrap_or_default();
        let table = TableName::of_this_boot(id).map_err(table_error)?;
        let boot = table.boot;
        let discards = Table::create(&self.places.run_table(id), geometry.blocks(), table).map_err(table_error)?;
        match recovery.as_ref().and_then(|r| r.discards.as_ref()) {
            Some(Ok(seal)) => {
                discards.load(&self.places.durable_table(id), *seal).map_err(table_error).map_err(in_disk)?
            }
            Some(Err(why)) => log::warn!("disk {name}: discards that were put off are forgotten: {why}"),
            None => {}
        }
        let layers = DiskLayers { manager: self, config, geometry: &geometry, lock_wait };
        let taken = match &recovery {
            None => Taken::of_new_disk(backing.clone()),
            Some(recovery) => carry_out(recovery, &backing, Timestamp::now().unix_ms(), &layers)
                .map_err(|e| in_disk(ApiError::new(ErrorCode::DiskFailed, e.to_string())))?,
        };
        let options =
            DiskOptions { image: backing, block_bytes: config.block_size, read_only: config.readonly(), discards };
        let disk = Disk::announcing(standing.logical_block_bytes, self.clock.clone(), options, taken.links);
        disk.observe(Arc::new(BrokenVersions { tell: self.house.clone(), places: self.places.clone() }));
        disk.remember_marks(taken.marks);
        let mut bookmarks = record.as_ref().map(|r| r.bookmarks.clone()).unwrap_or_default();
        let (restore, mut awaited) = match &recovery {
            None => (None, None),
            Some(recovery) => self.take_up_restore(&disk, recovery, &layers).map_err(in_disk)?,
        };
        if let Some(why) = recovery.as_ref().and_then(Recovery::why_hollow)
            && let Some(awaited) = awaited.take()
        {
            awaited.lose(why.to_string());
        }
        if restore.is_some() && mirror.is_none() && config.mirror.is_some() {
            let message = format!("disk {name}: it is being restored, and gets no second leg meanwhile");
            return Err(ApiError::new(ErrorCode::DiskBusy, message)
                .with_action("leave mirror= out, and add the leg when the restore is over: halfsilver disk mirror"));
        }
        let mut former_legs = record.as_ref().map(|r| r.former_legs.clone()).unwrap_or_default();
        let mut config = config.clone();
        if let (Some(decided), Some(mirror)) = (recovery.as_ref().and_then(|r| r.mirror.as_ref()), &mirror) {
            let gone = decided.legs.iter().filter(|(_, leg)| *leg == LegUse::Forgotten).map(|(path, _)| path.clone());
            former_legs.extend(gone);
            if decided.legs.iter().any(|(_, leg)| *leg == LegUse::Forgotten) {
                config.path.clone_from(&mirror.legs[0].0.path);
                config.mirror = mirror.legs.get(1).map(|(leg, _)| leg.path.clone());
            }
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
        let leg = config.mirror.clone().filter(|_| mirror.is_none());
        if let Some(path) = &leg {
            // What is wrong with it is said before the record says that the disk may have changed.
            check_new_leg(path, &config, &disk).map_err(in_disk)?;
        }
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
        if let Some(path) = leg
            && let Err(e) = self.add_leg(&entry, &path)
        {
            // It goes as it goes at a stop, so that what was vouched for still is.
            locked(&self.disks).remove(name);
            entry.stop_server();
            let gone = match record.is_some() {
                true => self.save(&entry),
                false => self.forget_record(&entry.to_record()).map_err(|e| e.message),
            };
            if let Err(e) = gone {
                log::error!("disk {name}: {e}");
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
        self.records.put([&unsaved]).map_err(record_error)?;

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
            allocated: Allocated::default(),
        });
        locked(&self.disks).insert(name.clone(), entry.clone());
        locked(&self.unserved).remove(name);
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
}

/// What would be lost if a disk's record gave way to another one.
fn what_is_kept(record: &DiskRecord) -> Vec<String> {
    let counted = |n: usize, what: &str| (n > 0).then(|| format!("{n} {what}{}", if n == 1 { "" } else { "s" }));
    let restore = record.restore.as_ref().filter(|r| r.is_active).map(|r| format!("a restore from {}", r.from));
    let legs = record.mirror.as_ref().map_or(0, |m| m.legs.len());
    [
        restore,
        counted(record.snapshots.len(), "snapshot"),
        counted(record.bookmarks.len(), "bookmark"),
        record.live_log.as_ref().map(|log| format!("its newest content in {}", log.display())),
        record.work.as_ref().map(|_| "work that is not done".to_owned()),
        (legs > 1).then(|| "two legs".to_owned()),
    ]
    .into_iter()
    .flatten()
    .collect()
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
