//! A service in memory.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use halfsilver::control::api::{
    Bookmark, BookmarkState, ByteRange, Claim, DeleteSnapshotOptions, DeletionState, DiffSource, Disk, DiskConfig,
    DiskPatch, DiskState, GroupDeletion, Job, JobKind, JobPatch, JobState, Leg, LegState, RestoreRequest,
    RestoreStatus, Settings, Snapshot, SnapshotRequest, SnapshotState, Strategy, Unserved, UpdateQuery, VersionInfo,
    Volume, VolumeMap, VolumeRequest, VolumeSource, VolumeState, VolumeStatus, Writers,
};
use halfsilver::control::changes::{Diff, FoundMap};
use halfsilver::control::metrics::{DiskMetrics, MetricsSnapshot, SnapshotMetrics};
use halfsilver::control::timestamp::Timestamp;
use halfsilver::control::{
    ApiError, Deletion, ErrorCode, EventBus, EventKind, JobDeletion, Name, Notice, PutOutcome, Service, SnapshotRef,
};
use uuid::Uuid;

mod told;

#[derive(Default)]
struct State {
    disks: Vec<(DiskConfig, Disk)>,
    snapshots: Vec<Snapshot>,
    volumes: Vec<Volume>,
    bookmarks: Vec<Bookmark>,
    jobs: Vec<Job>,
    forbidden: Option<Strategy>,
    claims: Vec<Claim>,
}

/// Supports everything, unless told otherwise. What takes long is only started: a log to be folded, a leg to be
/// synchronised; the test says when it is done. Each snapshot with `writers` = `connection` has two old frontends.
#[derive(Default)]
pub(crate) struct Fake {
    state: Mutex<State>,
    bus: Arc<EventBus>,
}

pub(crate) fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn leg(path: &Path, state: LegState, remaining_bytes: u64) -> Leg {
    Leg { path: path.to_owned(), state, reason: None, remaining_bytes }
}

/// The settings of a configuration, with the disk's name for a serial.
fn named(config: &DiskConfig, disk: &Name) -> Settings {
    let serial = config.serial.clone().unwrap_or_else(|| disk.to_string());
    Settings { serial, ..Settings::of(config) }
}

impl Service for Fake {
    fn version(&self) -> VersionInfo {
        let mut strategies = Strategy::ALL.to_vec();
        strategies.retain(|strategy| Some(*strategy) != self.state.lock().unwrap().forbidden);
        VersionInfo::of_this_build(strategies, Writers::ALL.to_vec())
    }

    fn list_claims(&self) -> Result<Vec<Claim>, ApiError> {
        Ok(self.state.lock().unwrap().claims.clone())
    }

    fn problems(&self) -> Vec<String> {
        Vec::new()
    }

    fn list_unserved(&self) -> Result<Vec<Unserved>, ApiError> {
        let lost = self.list_disks()?.into_iter().filter(|disk| disk.state == DiskState::Unserved);
        Ok(lost.map(|d| Unserved { name: d.name, id: d.id, reason: d.reason.unwrap_or_default() }).collect())
    }

    fn list_disks(&self) -> Result<Vec<Disk>, ApiError> {
        Ok(self.state.lock().unwrap().disks.iter().map(|(_, disk)| disk.clone()).collect())
    }

    fn get_disk(&self, disk: &Name) -> Result<Disk, ApiError> {
        let disks = self.list_disks()?;
        disks.into_iter().find(|other| other.name == *disk).ok_or_else(|| ApiError::disk_not_found(disk))
    }

    fn put_disk(&self, disk: &Name, config: &DiskConfig) -> Result<PutOutcome, ApiError> {
        let mut state = self.state.lock().unwrap();
        if let Some((existing, served)) = state.disks.iter().find(|(_, other)| other.name == *disk) {
            let different = ApiError::new(ErrorCode::DiskExists, format!("disk {disk} is configured differently"));
            return if existing == config { Ok(PutOutcome::Unchanged(served.clone())) } else { Err(different) };
        }
        let in_sync = |path: &PathBuf| leg(path, LegState::InSync, 0);
        let served = Disk {
            id: Some(Uuid::new_v4()),
            socket: Some(config.socket_or_default(Path::new("/run/fake"), disk)),
            size_bytes: 1 << 30,
            state: DiskState::Serving,
            reason: None,
            epoch: 1,
            legs: config.mirror.iter().flat_map(|mirror| [&config.path, mirror]).map(in_sync).collect(),
            settings: named(config, disk),
            ..Disk::unserved(disk.clone(), String::new()).with_config(config)
        };
        state.disks.push((config.clone(), served.clone()));
        self.bus.publish(Notice::of_disk(EventKind::DiskAdded, disk));
        Ok(PutOutcome::Created(served))
    }

    fn set_disk(&self, disk: &Name, patch: &DiskPatch) -> Result<Disk, ApiError> {
        let mut state = self.state.lock().unwrap();
        let found = state.disks.iter_mut().find(|(_, other)| other.name == *disk);
        let (config, set) = found.ok_or_else(|| ApiError::disk_not_found(disk))?;
        *config = config.patched(patch);
        *set = Disk { socket: set.socket.clone(), settings: named(config, disk), ..set.clone().with_config(config) };
        self.bus.publish(Notice::of_disk(EventKind::DiskChanged, disk));
        Ok(set.clone())
    }

    fn set_volume(&self, volume: &Name, patch: &DiskPatch) -> Result<Volume, ApiError> {
        self.get_volume(volume)?;
        if patch.readonly.is_some() {
            return Err(ApiError::new(ErrorCode::Unsupported, format!("volume {volume} is there to be written")));
        }
        let mut state = self.state.lock().unwrap();
        let found = state.volumes.iter_mut().find(|v| v.name == *volume).unwrap();
        found.settings.queues = patch.queues.unwrap_or(found.settings.queues);
        Ok(found.clone())
    }

    fn resize_disk(&self, disk: &Name, size_bytes: u64) -> Result<Disk, ApiError> {
        let mut state = self.state.lock().unwrap();
        let found = state.disks.iter_mut().find(|(_, other)| other.name == *disk);
        let (_, found) = found.ok_or_else(|| ApiError::disk_not_found(disk))?;
        if size_bytes < found.size_bytes {
            return Err(ApiError::new(ErrorCode::InvalidRequest, format!("disk {disk} does not shrink")));
        }
        let why = format!("it has {size_bytes} bytes, and had {}", found.size_bytes);
        found.size_bytes = size_bytes;
        self.bus.publish(Notice::of_disk(EventKind::DiskResized, disk).because(why));
        Ok(found.clone())
    }

    fn rename_disk(&self, disk: &Name, to: &Name, force: bool) -> Result<Disk, ApiError> {
        if self.get_disk(disk)?.connected && !force {
            return Err(ApiError::new(ErrorCode::DiskBusy, format!("disk {disk} has a frontend connected")));
        }
        if self.get_disk(to).is_ok() {
            return Err(ApiError::new(ErrorCode::DiskExists, format!("disk {to} exists")));
        }
        let mut state = self.state.lock().unwrap();
        for (_, found) in state.disks.iter_mut().filter(|(_, found)| found.name == *disk) {
            (found.name, found.socket) = (to.clone(), Some(format!("/run/fake/{to}.sock").into()));
        }
        state.snapshots.iter_mut().filter(|s| s.disk == *disk).for_each(|s| s.disk = to.clone());
        state.jobs.iter_mut().filter(|j| j.disk == *disk).for_each(|j| j.disk = to.clone());
        drop(state);
        self.bus.publish(Notice::of_disk(EventKind::DiskRenamed, to).because(format!("it was {disk}")));
        self.get_disk(to)
    }

    fn rename_volume(&self, volume: &Name, to: &Name, _force: bool) -> Result<Volume, ApiError> {
        self.get_volume(volume)?;
        self.state.lock().unwrap().volumes.iter_mut().filter(|v| v.name == *volume).for_each(|v| v.name = to.clone());
        self.get_volume(to)
    }

    fn forget_disk(&self, disk: &Name) -> Result<(), ApiError> {
        if self.get_disk(disk)?.state != DiskState::Unserved {
            return Err(ApiError::new(ErrorCode::DiskBusy, format!("disk {disk} is served")));
        }
        self.state.lock().unwrap().disks.retain(|(_, other)| other.name != *disk);
        Ok(())
    }

    fn accept_disk(&self, disk: &Name) -> Result<(), ApiError> {
        if self.get_disk(disk)?.state != DiskState::Unserved {
            return Err(ApiError::new(ErrorCode::DiskBusy, format!("disk {disk} is served")));
        }
        Ok(())
    }

    fn delete_disk(&self, disk: &Name, force: bool) -> Result<(), ApiError> {
        self.get_disk(disk)?;
        let mut state = self.state.lock().unwrap();
        if !force && state.snapshots.iter().any(|snapshot| snapshot.disk == *disk) {
            return Err(ApiError::new(ErrorCode::DiskBusy, format!("disk {disk} has snapshots")));
        }
        state.disks.retain(|(_, other)| other.name != *disk);
        Ok(())
    }

    fn mirror_disk(&self, disk: &Name, path: &Path) -> Result<Disk, ApiError> {
        let begun = self.with_disk(disk, |disk| {
            if disk.legs.iter().any(|leg| leg.path == path && leg.state != LegState::Failed) {
                return Ok(false);
            }
            if disk.legs.iter().filter(|leg| leg.state != LegState::Failed).count() == 2 {
                return Err(ApiError::new(ErrorCode::Conflict, format!("disk {} has two legs", disk.name)));
            }
            let first = leg(disk.path.as_deref().unwrap(), LegState::InSync, 0);
            disk.legs = vec![first, leg(path, LegState::Resynchronising, disk.size_bytes)];
            Ok(true)
        })?;
        if begun {
            self.begin_job(9, JobKind::Mirror, disk, None);
        }
        self.get_disk(disk)
    }

    fn restore_disk(&self, disk: &Name, request: &RestoreRequest) -> Result<Job, ApiError> {
        if !request.force && self.get_disk(disk)?.connected {
            return Err(ApiError::new(ErrorCode::DiskBusy, format!("disk {disk} has a frontend connected")));
        }
        if let VolumeSource::Snapshot(snapshot) = &request.from {
            self.get_snapshot(snapshot)?;
        }
        let from = request.from.to_string();
        self.with_disk(disk, |disk| {
            disk.restoring = Some(RestoreStatus { from, remaining_bytes: disk.size_bytes });
            Ok(())
        })?;
        self.begin_job(10, JobKind::Restore, disk, None);
        self.get_job(10)
    }

    fn unmirror_disk(&self, disk: &Name, leg: Option<&Path>) -> Result<Disk, ApiError> {
        self.with_disk(disk, |disk| {
            let Some(second) = disk.legs.get(1) else { return Err(ApiError::no_second_leg(&disk.name)) };
            let path = leg.unwrap_or(&second.path).to_owned();
            let Some(at) = disk.legs.iter().position(|leg| leg.path == path) else {
                return Err(ApiError::new(
                    ErrorCode::InvalidRequest,
                    format!("leg: {path:?} is no leg of {}", disk.name),
                ));
            };
            if disk.legs[1 - at].state != LegState::InSync {
                let message = format!("{} is the only good leg of disk {}", path.display(), disk.name);
                return Err(ApiError::new(ErrorCode::MirrorNotInSync, message));
            }
            disk.path = Some(disk.legs[1 - at].path.clone());
            disk.legs.clear();
            Ok(disk.clone())
        })
    }

    fn create_snapshots(&self, request: &SnapshotRequest) -> Result<Vec<Snapshot>, ApiError> {
        let strategy = request.strategy.unwrap_or(Strategy::CopyOnWrite);
        if !self.version().strategies.contains(&strategy) {
            return Err(ApiError::new(ErrorCode::Unsupported, format!("{strategy} is not supported")));
        }
        let (group, created_at) = (Uuid::new_v4(), Timestamp::now());
        let mut created = Vec::new();
        for disk in &request.disks {
            let served = self.get_disk(disk)?;
            if strategy == Strategy::WriteMirroring {
                if served.legs.is_empty() {
                    return Err(ApiError::no_second_leg(disk));
                }
                if served.legs.iter().any(|leg| leg.state != LegState::InSync) {
                    return Err(ApiError::new(
                        ErrorCode::MirrorNotInSync,
                        format!("disk {disk}: a leg is not in sync"),
                    ));
                }
            }
            let reference = SnapshotRef { disk: disk.clone(), name: request.name.clone() };
            if self.get_snapshot(&reference).is_ok() {
                return Err(ApiError::new(ErrorCode::SnapshotExists, format!("snapshot {reference} exists")));
            }
            created.push(Snapshot {
                id: Uuid::new_v4(),
                group,
                disk: disk.clone(),
                name: request.name.clone(),
                strategy,
                durability: served.settings.durability,
                writers: request.writers,
                state: SnapshotState::Draining,
                reason: None,
                epoch: 1,
                socket: request.socket.clone().unwrap_or_else(|| format!("/run/fake/{reference}.sock").into()),
                image: request.image.clone(),
                layout: request.layout.unwrap_or(served.settings.layout),
                block_size: 4096,
                owned_bytes: 0,
                size_bytes: served.size_bytes,
                created_at,
                quiesced_at: None,
                old_frontends: if request.writers == Writers::Connection { 2 } else { 0 },
            });
        }
        self.state.lock().unwrap().snapshots.extend(created.clone());
        Ok(created)
    }

    fn list_snapshots(&self) -> Result<Vec<Snapshot>, ApiError> {
        Ok(self.state.lock().unwrap().snapshots.clone())
    }

    fn get_snapshot(&self, snapshot: &SnapshotRef) -> Result<Snapshot, ApiError> {
        let snapshots = self.list_snapshots()?;
        let found = snapshots.into_iter().find(|other| other.reference() == *snapshot);
        found.ok_or_else(|| ApiError::snapshot_not_found(snapshot))
    }

    fn cut_over_snapshot(&self, snapshot: &SnapshotRef) -> Result<Snapshot, ApiError> {
        let found = self.get_snapshot(snapshot)?;
        if found.state == SnapshotState::Broken {
            return Err(ApiError::new(ErrorCode::SnapshotBroken, format!("snapshot {snapshot} is broken")));
        }
        if found.old_frontends > 0 {
            for found in self.state.lock().unwrap().snapshots.iter_mut().filter(|s| s.reference() == *snapshot) {
                found.old_frontends = 0;
            }
            self.bus.publish(Notice::of_snapshot(EventKind::SnapshotCutover, snapshot));
        }
        self.get_snapshot(snapshot)
    }

    fn delete_snapshot(&self, snapshot: &SnapshotRef, options: DeleteSnapshotOptions) -> Result<Deletion, ApiError> {
        let found = self.get_snapshot(snapshot)?;
        options.check(snapshot, found.strategy)?;
        if !options.force && found.state == SnapshotState::Draining {
            return Err(ApiError::new(ErrorCode::SnapshotBusy, format!("snapshot {snapshot} is draining")));
        }
        if found.strategy == Strategy::WriteLogging {
            self.move_to(&snapshot.to_string(), SnapshotState::Folding, EventKind::SnapshotFolding);
            return self.get_snapshot(snapshot).map(Deletion::Started);
        }
        self.forget(&snapshot.to_string());
        if options.keep_bookmark {
            self.state.lock().unwrap().bookmarks.push(Bookmark {
                id: found.id,
                group: found.group,
                disk: found.disk.clone(),
                name: found.name.clone(),
                state: BookmarkState::Kept,
                reason: None,
                epoch: found.epoch,
                block_size: found.block_size,
                size_bytes: found.size_bytes,
                created_at: found.created_at,
                quiesced_at: found.quiesced_at,
            });
        }
        if found.strategy == Strategy::WriteMirroring && !options.keep_image {
            self.begin_job(8, JobKind::Mirror, &snapshot.disk, None);
        }
        Ok(Deletion::Done)
    }

    fn delete_group(&self, group: Uuid, options: DeleteSnapshotOptions) -> Result<Vec<GroupDeletion>, ApiError> {
        let found: Vec<_> = self.list_snapshots()?.into_iter().filter(|s| s.group == group).collect();
        if found.is_empty() {
            return Err(ApiError::snapshot_not_found(group));
        }
        if let Some(busy) = found.iter().find(|s| !options.force && s.state == SnapshotState::Draining) {
            let message = format!("none is deleted: snapshot {} is draining", busy.reference());
            return Err(ApiError::new(ErrorCode::SnapshotBusy, message));
        }
        let delete = |snapshot: &Snapshot| {
            let (state, problem) = match self.delete_snapshot(&snapshot.reference(), options) {
                Ok(Deletion::Done) => (DeletionState::Deleted, None),
                Ok(Deletion::Started(_)) => (DeletionState::Folding, None),
                Err(e) => (DeletionState::Refused, Some(e.problem())),
            };
            GroupDeletion { snapshot: snapshot.reference().to_string(), state, problem }
        };
        Ok(found.iter().map(delete).collect())
    }

    fn moment_of_id(&self, id: Uuid) -> Result<SnapshotRef, ApiError> {
        let found = self.list_snapshots()?.into_iter().find(|s| s.id == id);
        found.map(|s| s.reference()).ok_or_else(|| ApiError::snapshot_not_found(id))
    }

    /// Two ranges; up to a snapshot named `huge` three million of them.
    fn diff_snapshot(&self, from: &SnapshotRef, to: Option<&SnapshotRef>) -> Result<Diff, ApiError> {
        self.get_snapshot(from)?;
        let count = if to.is_some_and(|to| to.name.as_str() == "huge") { 3_000_000 } else { 2 };
        let range = |i: u64| ByteRange { offset: i * 8192, length: 4096 };
        Ok(Diff { source: DiffSource::OwnedTables, ranges: Box::new((0..count).map(range)) })
    }

    fn diff_volume(&self, volume: &Name, _to: Option<&SnapshotRef>) -> Result<Diff, ApiError> {
        self.get_volume(volume)?;
        Ok(Diff { source: DiffSource::ChangedTables, ranges: Box::new(std::iter::empty()) })
    }

    fn map_volume(&self, volume: &Name) -> Result<FoundMap, ApiError> {
        let volume = self.get_volume(volume)?;
        let head = VolumeMap {
            name: volume.name,
            block_size: 4096,
            blocks: 300_000,
            size_bytes: volume.size_bytes,
            reason: None,
            owned: Vec::new(),
            changed: None,
        };
        Ok(FoundMap {
            head,
            owned: Box::new([(0, 3000), (5000, 1)].into_iter()),
            changed: Some(Box::new(std::iter::empty())),
        })
    }

    fn volume_status(&self, volume: &Name) -> Result<VolumeStatus, ApiError> {
        let volume = self.get_volume(volume)?;
        Ok(VolumeStatus {
            id: volume.id,
            name: volume.name,
            from: volume.from,
            source: "vm1".to_owned(),
            block_size: 4096,
            blocks: 1000,
            owned_blocks: 10,
            changed_blocks: Some(10),
            source_changed_blocks: None,
            differing_blocks: None,
            percent_differing: None,
            percent_complete: 1.0,
            reason: Some("a power\ncut".to_owned()),
        })
    }

    fn list_bookmarks(&self) -> Result<Vec<Bookmark>, ApiError> {
        Ok(self.state.lock().unwrap().bookmarks.clone())
    }

    fn get_bookmark(&self, bookmark: &SnapshotRef) -> Result<Bookmark, ApiError> {
        let missing = || ApiError::new(ErrorCode::BookmarkNotFound, format!("there is no bookmark {bookmark}"));
        self.list_bookmarks()?.into_iter().find(|b| b.reference() == *bookmark).ok_or_else(missing)
    }

    fn delete_bookmark(&self, bookmark: &SnapshotRef) -> Result<(), ApiError> {
        self.get_bookmark(bookmark)?;
        self.state.lock().unwrap().bookmarks.retain(|b| b.reference() != *bookmark);
        Ok(())
    }

    fn create_volume(&self, request: &VolumeRequest) -> Result<Volume, ApiError> {
        let VolumeRequest { name, from, socket, image, block_size } = request;
        if self.get_volume(name).is_ok() {
            return Err(ApiError::new(ErrorCode::VolumeExists, format!("volume {name} exists")));
        }
        let (from, from_id, size_bytes) = match from {
            VolumeSource::Snapshot(snapshot) => {
                let found = self.get_snapshot(snapshot)?;
                (snapshot.to_string(), found.id, found.size_bytes)
            }
            VolumeSource::Now(disk) => (format!("{disk}@{name}"), Uuid::new_v4(), self.get_disk(disk)?.size_bytes),
        };
        let volume = Volume {
            id: Uuid::new_v4(),
            name: name.clone(),
            from,
            from_id,
            independent: false,
            state: VolumeState::Serving,
            reason: None,
            socket: socket.clone().unwrap_or_else(|| format!("/run/fake/{name}.sock").into()),
            image: image.clone().unwrap_or_else(|| format!("/var/fake/{name}.log").into()),
            size_bytes,
            block_size: block_size.unwrap_or(4096),
            owned_bytes: 0,
            settings: Settings { queues: 1, ..Settings::default() },
            connected: false,
            frontends: 0,
            snapshots: 0,
            created_at: Timestamp::now(),
        };
        self.state.lock().unwrap().volumes.push(volume.clone());
        self.bus.publish(Notice::of_disk(EventKind::VolumeCreated, name));
        Ok(volume)
    }

    fn list_volumes(&self) -> Result<Vec<Volume>, ApiError> {
        Ok(self.state.lock().unwrap().volumes.clone())
    }

    fn get_volume(&self, volume: &Name) -> Result<Volume, ApiError> {
        let volumes = self.list_volumes()?;
        volumes.into_iter().find(|other| other.name == *volume).ok_or_else(|| ApiError::volume_not_found(volume, false))
    }

    fn delete_volume(&self, volume: &Name, force: bool) -> Result<(), ApiError> {
        let found = self.get_volume(volume)?;
        if !force && found.from.ends_with("@busy") {
            return Err(ApiError::new(ErrorCode::VolumeBusy, format!("volume {volume} has a frontend connected")));
        }
        self.state.lock().unwrap().volumes.retain(|other| other.name != *volume);
        Ok(())
    }

    fn complete_volume(&self, volume: &Name, pacing: JobPatch) -> Result<Job, ApiError> {
        self.get_volume(volume)?;
        self.begin_job(11, JobKind::Migrate, volume, None);
        self.patch_job(11, pacing)
    }

    fn update_volume(&self, volume: &Name, options: UpdateQuery) -> Result<Job, ApiError> {
        let found = self.get_volume(volume)?;
        if !options.force && found.from.ends_with("@busy") {
            return Err(ApiError::new(ErrorCode::VolumeBusy, format!("volume {volume} has a frontend connected")));
        }
        self.begin_job(12, JobKind::Update, volume, None);
        self.patch_job(12, options.pacing())
    }

    fn promote_volume(&self, volume: &Name) -> Result<Disk, ApiError> {
        let found = self.get_volume(volume)?;
        Err(ApiError::new(ErrorCode::VolumeBusy, format!("volume {volume} stands on snapshot {}", found.from)))
    }

    fn disable_volume(&self, volume: &Name, _force: bool) -> Result<Volume, ApiError> {
        self.get_volume(volume)?;
        let mut state = self.state.lock().unwrap();
        let found = state.volumes.iter_mut().find(|v| v.name == *volume).unwrap();
        found.state = VolumeState::Disabled;
        Ok(found.clone())
    }

    fn enable_volume(&self, volume: &Name, fresh: bool) -> Result<Volume, ApiError> {
        let found = self.get_volume(volume)?;
        if fresh && found.state != VolumeState::Disabled {
            return Err(ApiError::new(ErrorCode::VolumeBusy, format!("volume {volume}: it is served")));
        }
        let mut state = self.state.lock().unwrap();
        let found = state.volumes.iter_mut().find(|v| v.name == *volume).unwrap();
        found.state = VolumeState::Serving;
        Ok(found.clone())
    }

    fn list_jobs(&self) -> Result<Vec<Job>, ApiError> {
        Ok(self.state.lock().unwrap().jobs.clone())
    }

    fn get_job(&self, id: u64) -> Result<Job, ApiError> {
        self.list_jobs()?.into_iter().find(|job| job.id == id).ok_or_else(|| ApiError::job_not_found(id))
    }

    fn patch_job(&self, id: u64, patch: JobPatch) -> Result<Job, ApiError> {
        for job in self.state.lock().unwrap().jobs.iter_mut().filter(|job| job.id == id) {
            job.delay_ms = patch.delay_ms.unwrap_or(job.delay_ms);
            job.bytes_per_second = patch.bytes_per_second.unwrap_or(job.bytes_per_second);
        }
        self.get_job(id)
    }

    fn delete_job(&self, id: u64) -> Result<JobDeletion, ApiError> {
        match self.get_job(id)?.state {
            JobState::Running => {
                self.set_job(id, JobState::Stopped, None);
                self.get_job(id).map(JobDeletion::Stopped)
            }
            JobState::Stopped => Err(ApiError::job_unfinished(id)),
            JobState::Done | JobState::Failed => {
                self.state.lock().unwrap().jobs.retain(|job| job.id != id);
                Ok(JobDeletion::Removed)
            }
        }
    }

    fn resume_job(&self, id: u64) -> Result<Job, ApiError> {
        match self.get_job(id)?.state {
            state @ (JobState::Done | JobState::Failed) => return Err(ApiError::job_ended(id, state)),
            JobState::Running | JobState::Stopped => self.set_job(id, JobState::Running, None),
        }
        self.get_job(id)
    }

    fn metrics(&self) -> MetricsSnapshot {
        let legs = vec![
            leg(Path::new("/images/a.raw"), LegState::InSync, 0),
            leg(Path::new("/images/\"b\".raw"), LegState::Resynchronising, 4096),
        ];
        let mut disk = DiskMetrics {
            disk: name("vm1"),
            frontends_connected: 2,
            directions: Default::default(),
            background_wait_seconds: 1.5,
            legs,
        };
        let reads = &mut disk.directions[0];
        (reads.requests, reads.bytes, reads.errors) = (3, 12_288, 1);
        [1, 100, 20_000_000].into_iter().for_each(|latency_us| reads.latency.record(latency_us));
        let snapshot = |snapshot: &str, drain_seconds| SnapshotMetrics {
            disk: name("vm1"),
            snapshot: name(snapshot),
            preserved_blocks: 7,
            preserved_bytes: 28_672,
            drain_seconds,
            old_frontends: 2,
        };
        let snapshots = vec![snapshot("daily", Some(0.5)), snapshot("new", None)];
        MetricsSnapshot { disks: vec![disk], snapshots, jobs: self.list_jobs().unwrap() }
    }

    fn events(&self) -> Arc<EventBus> {
        Arc::clone(&self.bus)
    }
}
