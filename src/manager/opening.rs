//! A disk or volume is opened: as it was decided what to make of what was left, recorded as served, and served.
//!
//! What always holds: from the moment on in which a disk may change its record does not say that it was saved.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use uuid::Uuid;

use crate::control::api::DiskConfig;
use crate::control::{ApiError, ErrorCode, Name, SnapshotRef};
use crate::door::{Disk, DiskSpec, Geometry, ImageSpec};
use crate::image::ImageOptions;
use crate::manager::changes::with_tables;
use crate::manager::entry::{Allocated, DiskEntry, Frontends, SnapshotEntry, locked, record_of};
use crate::manager::layers::{DiskLayers, direct_of};
use crate::manager::legs::Mirror;
use crate::manager::names::CurrentName;
use crate::manager::planned::{Planned, lock_wait_after_decision, unserved};
use crate::manager::relations::Relations;
use crate::manager::sockets::{clear_socket, serve_live};
use crate::manager::unserved::Unserved;
use crate::manager::{Manager, engine_error, record_error, table_error};
use crate::recovery::{LegUse, Recovery, Taken, Why, carry_out};
use crate::store::{BookmarkRecord, DiskRecord, RestoreRecord, SnapshotRecord};

/// A disk or volume of which all is there.
pub(crate) struct Opened<'a> {
    pub(crate) name: CurrentName,
    pub(crate) id: Uuid,
    pub(crate) boot: Uuid,
    pub(crate) config: DiskConfig,
    pub(crate) disk: Disk,
    pub(crate) mirror: Option<Mirror>,
    pub(crate) former_legs: Vec<PathBuf>,
    pub(crate) relations: Relations,
    pub(crate) restore: Option<RestoreRecord>,
    pub(crate) snapshots: Vec<Arc<SnapshotEntry>>,
    pub(crate) bookmarks: Vec<BookmarkRecord>,
    /// What the records have said of it.
    pub(crate) record: Option<&'a DiskRecord>,
}

impl Manager {
    /// Serves a disk as it was decided; one of which nothing is remembered as it is.
    pub(crate) fn add_planned(&self, planned: Planned, recovery: Option<Recovery>) -> Result<Arc<DiskEntry>, ApiError> {
        let new = planned.record.is_none().then(|| self.host.new_id());
        // What is made for a disk that is refused in the end goes again.
        self.add_planned_as(new, planned, recovery)
            .inspect_err(|_| new.iter().for_each(|id| self.remove_file(&self.places.run_table(*id))))
    }

    pub(crate) fn add_planned_as(
        &self,
        new: Option<Uuid>,
        planned: Planned,
        recovery: Option<Recovery>,
    ) -> Result<Arc<DiskEntry>, ApiError> {
        let Planned { name, config, record } = &planned;
        let in_disk = |e: ApiError| ApiError { message: format!("disk {name}: {}", e.message), ..e };
        if let Some(why) = recovery.as_ref().and_then(Recovery::why_unserved) {
            return Err(in_disk(unserved(name.as_str(), why)));
        }
        let lock_wait = lock_wait_after_decision(record.as_ref());
        let options = ImageOptions { direct: direct_of(config), read_only: config.readonly(), lock_wait };
        let mut relations = record.as_ref().map(Relations::of).unwrap_or_default();
        relations.set = relations.set.still_in(config);
        let (image, mirror) = match &relations.volume {
            Some(volume) => {
                let lost = recovery.as_ref().and_then(Recovery::why_hollow);
                (ImageSpec::Base(self.base_of(volume, lost)), None)
            }
            None => self.open_base(config, recovery.as_ref(), options).map_err(in_disk)?,
        };
        let (path, block_bytes) = (config.path.clone(), config.block_size);
        let unit_bytes = image.unit_bytes();
        if unit_bytes > block_bytes {
            return Err(in_disk(unserved(name.as_str(), &Why::Unit { path, unit_bytes, block_bytes })));
        }
        let logical_block_bytes = config.logical_block_size();
        let room = image.geometry(block_bytes);
        let size_bytes = recovery.as_ref().and_then(|r| r.size_bytes).unwrap_or(room.size_bytes);
        let geometry = Geometry { logical_block_bytes, size_bytes, ..room };
        let id = record.as_ref().map(|r| r.id).or(new).unwrap_or_default();
        let boot = self.host.boot().map_err(table_error)?;
        let discards = self.make_run_table(id, &geometry).map_err(table_error)?;
        match recovery.as_ref().and_then(|r| r.discards.as_ref()) {
            Some(Ok(seal)) => self
                .host
                .load_table(&discards, &self.places.durable_table(id), *seal)
                .map_err(table_error)
                .map_err(in_disk)?,
            Some(Err(why)) => log::warn!("disk {name}: discards that were put off are forgotten: {why}"),
            None => {}
        }
        let layers = DiskLayers { manager: self, config, geometry, lock_wait };
        let taken = match &recovery {
            None => Taken::of_new_disk(self.host.new_id(), size_bytes),
            Some(recovery) => carry_out(recovery, self.host.unix_ms(), &layers)
                .map_err(|e| in_disk(ApiError::new(ErrorCode::DiskFailed, e.to_string())))?,
        };
        let (restore, begun) = match &recovery {
            None => (None, None),
            Some(recovery) => self.take_up_restore(recovery, &layers).map_err(in_disk)?.unzip(),
        };
        let spec = DiskSpec {
            id,
            image,
            block_bytes,
            logical_block_bytes: Some(logical_block_bytes),
            read_only: config.readonly(),
            window_bytes: config.background_bytes().into(),
            discards,
            versions: taken.versions,
            marks: taken.marks,
            restore: begun,
        };
        let disk = self.engine.open(spec).map_err(engine_error).map_err(in_disk)?;
        if let Some(grows_to) = recovery.as_ref().and_then(|r| r.grows_to) {
            self.take_up_growth(name, &disk, grows_to).map_err(in_disk)?;
        }
        let mut bookmarks = record.as_ref().map(|r| r.bookmarks.clone()).unwrap_or_default();
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
                config.path.clone_from(&mirror.legs[0].path);
                config.mirror = mirror.legs.get(1).map(|leg| leg.path.clone());
            }
        }
        for (gone, _) in taken.snapshots.iter().filter(|(s, has_version)| !has_version && s.deletion.is_some()) {
            Manager::settle_mark(&disk, gone, &mut bookmarks);
        }
        let current = CurrentName::new(name.clone());
        let snapshots: Vec<_> = taken.snapshots.into_iter().filter_map(|t| self.entry_of(&current, t)).collect();
        // Those that drained when the last daemon was killed never change again. The records say so next, and a later
        // power cut believes it.
        let drained = record.iter().flat_map(|r| &r.snapshots).filter(|s| s.quiesced_ms.is_none());
        for drained in drained {
            if snapshots.iter().any(|s| s.id == drained.id && !s.is_lost) {
                disk.store_shown(drained.id);
            }
        }
        let leg = config.mirror.clone().filter(|_| mirror.is_none());
        if let Some(path) = &leg {
            // What is wrong with it is said before the record says that the disk may have changed.
            self.check_new_leg(path, &config, &disk.facts()).map_err(in_disk)?;
        }
        let opened = Opened {
            name: current,
            id,
            boot,
            config,
            disk,
            mirror,
            former_legs,
            relations,
            restore,
            snapshots,
            bookmarks,
            record: record.as_ref(),
        };
        let was = locked(&self.unserved).get(name).cloned();
        let entry = self.open_disk(opened)?;
        // Before anything of it goes on, which could not be taken back.
        if let Some(path) = leg
            && let Err(e) = self.add_leg(&entry, &path)
        {
            let e = in_disk(e);
            let noted = was.or_else(|| {
                record.as_ref().map(|record| Unserved {
                    name: name.clone(),
                    id: record.id,
                    record: None,
                    config: Some(planned.config.clone()),
                    why: String::new(),
                    is_new: false,
                    takes_flushed: false,
                })
            });
            let left = record.is_some().then(|| entry.to_record());
            self.not_served_any_more(name, noted.map(|was| Unserved { record: left, why: e.message.clone(), ..was }));
            // It goes as it goes at a stop, so that what was vouched for still is.
            entry.stop_server();
            self.forget_jobs_of(&entry);
            let gone = match record.is_some() {
                true => self.save(&entry),
                false => self.forget_record(&entry.to_record()).map_err(|e| e.message),
            };
            if let Err(e) = gone {
                log::error!("disk {name}: {e}");
            }
            return Err(e);
        }
        self.forget_ended_restore(&entry, record.as_ref());
        self.resume_mirror(&entry);
        self.resume_work(&entry);
        for snapshot in entry.snapshots() {
            self.resume_snapshot(&entry, &snapshot);
        }
        Ok(entry)
    }

    /// Lets a disk grow into an image that became larger than the records say: by a growth that was cut off, or by somebody
    /// else. Before it is recorded and served.
    fn take_up_growth(&self, name: &Name, disk: &Disk, size_bytes: u64) -> Result<(), ApiError> {
        let before = disk.facts().geometry.size_bytes;
        match disk.can_grow(size_bytes) {
            Err(e) => {
                let advice = format!("halfsilver disk resize {name} --size {size_bytes}");
                log::warn!("disk {name}: its image has {size_bytes} bytes, and it has {before}: {e}; later: {advice}");
                Ok(())
            }
            Ok(()) => {
                self.make_room(disk, size_bytes)?;
                disk.grow(size_bytes).map_err(|e| ApiError::new(ErrorCode::DiskFailed, e.to_string()))?;
                log::info!("disk {name}: it has {size_bytes} bytes now, as its image has, after {before}");
                Ok(())
            }
        }
    }

    /// Records that a disk is served, and serves it.
    pub(crate) fn open_disk(&self, opened: Opened) -> Result<Arc<DiskEntry>, ApiError> {
        let Opened {
            name: current,
            id,
            boot,
            config,
            disk,
            mirror,
            former_legs,
            relations,
            restore,
            snapshots,
            bookmarks,
            record,
        } = opened;
        let name = &current.get();
        // From here on the disk may change: the record must not say "saved" any more.
        let facts = disk.facts();
        let mut unsaved = record_of((id, name, boot), &config, &facts, &snapshots);
        unsaved.mirror = mirror.as_ref().map(Mirror::to_record);
        relations.put_into(&mut unsaved);
        unsaved.former_legs.clone_from(&former_legs);
        unsaved.bookmarks = with_tables(&bookmarks, &facts);
        unsaved.restore.clone_from(&restore);
        self.records.put(&[&unsaved]).map_err(record_error)?;

        let frontends = Frontends::new(&current, None, &self.bus);
        let socket = config.socket.clone().unwrap_or_default();
        let server = match relations.disabled {
            true => self.host.clear_socket(&socket).map(|()| None).map_err(|e| e.to_string()),
            false => serve_live(&*self.host, name, &config, &disk, &frontends).map(Some),
        };
        // Nothing has changed yet: what was remembered is still true.
        let take_back = || {
            let restored = match record {
                Some(record) => self.records.put(&[record]),
                None => self.records.remove(name.as_str()),
            };
            if let Err(e) = restored {
                log::error!("cannot restore the record of disk {name}: {e}");
            }
        };
        let server = server.map_err(|e| {
            take_back();
            let message = format!("disk {name}: cannot serve {}: {e}", socket.display());
            ApiError::new(ErrorCode::Conflict, message)
        })?;
        let entry = Arc::new(DiskEntry {
            name: current.clone(),
            id,
            boot,
            path: Mutex::new(config.path.clone()),
            socket: Mutex::new(socket.clone()),
            config,
            disk: Arc::new(disk),
            relations: Mutex::new(relations),
            mirror: Mutex::new(mirror),
            former_legs: Mutex::new(former_legs),
            restore: Mutex::new(restore),
            retires: AtomicBool::new(false),
            cleaning: AtomicBool::new(false),
            server: Mutex::new(server),
            frontends,
            snapshots: Mutex::new(snapshots),
            bookmarks: Mutex::new(bookmarks),
            failure_told: AtomicBool::new(false),
            abandoned: Mutex::default(),
            allocated: Allocated::default(),
        });
        {
            let mut disks = locked(&self.disks);
            // A stop takes the disks that it ends from this very list, after it said that it stops.
            if self.is_stopping() {
                drop(disks);
                entry.stop_server();
                match record {
                    // A frontend may have written already: it is saved as by the stop.
                    Some(_) => self.save(&entry).unwrap_or_else(|e| log::error!("disk {name} could not be saved: {e}")),
                    None => take_back(),
                }
                return Err(ApiError::new(ErrorCode::Unavailable, format!("disk {name}: the daemon is going down")));
            }
            disks.insert(name.clone(), entry.clone());
            locked(&self.unserved).remove(name);
        }
        log::info!(
            "disk {name}: serving {} ({} bytes) at {}",
            entry.config.path.display(),
            facts.geometry.size_bytes,
            socket.display()
        );
        Ok(entry)
    }

    pub(crate) fn entry_of(
        &self,
        disk: &CurrentName,
        (record, has_version): (SnapshotRecord, bool),
    ) -> Option<Arc<SnapshotEntry>> {
        let name: Name = record.name.parse().ok()?;
        let reference = SnapshotRef { disk: disk.get(), name: name.clone() };
        if !has_version && record.deletion.is_some() {
            // Never announced, or on its way out: nobody misses it.
            log::info!("snapshot {reference}: removing what an unfinished operation left");
            clear_socket(&*self.host, &record);
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
            frontends: Frontends::new(disk, Some(&name), &self.bus),
            disk: disk.clone(),
            name,
            record: Mutex::new(record),
            is_lost: !has_version,
            server: Mutex::new(None),
            socket_error: Mutex::new(None),
            drain: Mutex::new(None),
            is_forgotten: AtomicBool::new(false),
        }))
    }
}
