//! Restores in place: begun, gone on with after any end of the daemon, and ended (source 004).
//!
//! What always holds:
//! - While a record says that a restore is active, its table of pending blocks is durable, and so is what pending blocks
//!   show: whatever is saved for the versions on the way to the full image outlives a power cut from then on.
//! - Before a record says so the table has a name in it, so that a start knows whose it is, and its bits mean nothing.
//! - What is restored stays: while a disk is being restored it gets and loses no snapshot, and a volume that it is restored
//!   from keeps the snapshot.
//! - A disk whose pending blocks cannot be shown is not served as if it were whole.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use uuid::Uuid;

use super::entry::{DiskEntry, SnapshotEntry, locked};
use super::jobs::JobEntry;
use super::layers::{DiskLayers, block_on, remove_file};
use super::manager::{Manager, table_error};
use crate::control::api::{
    self, DeleteSnapshotOptions, JobKind, JobState, RestoreRequest, SnapshotRequest, VolumeSource, Writers,
};
use crate::control::{ApiError, ErrorCode, EventKind, Name, Notice, SnapshotRef};
use crate::crash;
use crate::image::IoQueue;
use crate::job::{self, Outcome};
use crate::mirror::{Changes, ClosedDisk, Disk, RestoreSource, Restoring, Saved, View};
use crate::recovery::Recovery;
use crate::registry::{Answer, Command, Operation, Registry, decide};
use crate::store::{BlockIndex, BlockRange, DiskRecord, DurableTable, RestoreRecord, VolumeRecord};

/// A disk that waits for the volume that it is restored from.
pub(super) struct Awaited {
    closed: ClosedDisk,
    pending: DurableTable,
}

impl Awaited {
    /// Every request on the disk fails from here on.
    pub(super) fn lose(self, reason: String) {
        self.closed.lose(reason);
    }
}

fn io_error(what: impl std::fmt::Display) -> ApiError {
    ApiError::new(ErrorCode::Io, what.to_string())
}

/// Runs engine work on a ring of its own.
fn in_ring<T: 'static>(work: impl AsyncFnOnce(IoQueue) -> Result<T, String> + 'static) -> Result<T, ApiError> {
    block_on(work).and_then(|done| done).map_err(io_error)
}

impl Manager {
    /// Takes a disk back to what `request` names. The disk shows that when this returns.
    pub(super) fn restore(&self, name: &Name, request: &RestoreRequest) -> Result<api::Job, ApiError> {
        let (from, is_ours) = match &request.from {
            VolumeSource::Snapshot(snapshot) => (snapshot.clone(), false),
            VolumeSource::Now(volume) => (self.snapshot_to_restore(name, volume, request.force)?, true),
        };
        let begun = self.restore_when_quiesced(name, &from, request, is_ours);
        if begun.is_err() && is_ours {
            self.let_snapshot_go(&from);
        }
        Ok(begun?.to_api())
    }

    /// Takes the snapshot of a volume that a disk is restored to.
    fn snapshot_to_restore(&self, name: &Name, volume: &Name, force: bool) -> Result<SnapshotRef, ApiError> {
        let reference =
            SnapshotRef { disk: volume.clone(), name: format!("restore-{}", short(Uuid::new_v4())).parse()? };
        let (disk, source) = (self.disk(name)?, self.disk(volume).map_err(|_| ApiError::volume_not_found(volume))?);
        // All that would refuse it is said before a snapshot is taken for its sake.
        refuse_to_restore(&self.registry(), name, force)?;
        if self.relation_of(&disk, &source)? {
            let message = format!("disk {name} cannot be restored from itself");
            return Err(ApiError::new(ErrorCode::InvalidRequest, message)
                .with_action(format!("name a snapshot of it, such as {name}@NAME, or a volume")));
        }
        let snapshot = SnapshotRequest {
            name: reference.name.clone(),
            disks: vec![volume.clone()],
            strategy: None,
            writers: Writers::Request,
            socket: None,
            image: None,
        };
        self.create(&snapshot)?;
        Ok(reference)
    }

    fn let_snapshot_go(&self, reference: &SnapshotRef) {
        if let Err(e) = self.delete(reference, DeleteSnapshotOptions { force: true, ..Default::default() }) {
            log::warn!("snapshot {reference}, which was taken for a restore, stays: {}", e.message);
        }
    }

    /// Whether what is restored is the disk's own, or else a volume that stands on the disk.
    fn relation_of(&self, disk: &Arc<DiskEntry>, source: &Arc<DiskEntry>) -> Result<bool, ApiError> {
        let mut at = source.clone();
        loop {
            if Arc::ptr_eq(&at, disk) {
                return Ok(Arc::ptr_eq(source, disk));
            }
            let standing = locked(&at.standing).clone();
            // An independent volume has all of the disk as it was, and what was written to it since.
            let is_of_disk = |was: VolumeRecord| was.source == disk.id;
            if standing.stood_on.is_some_and(is_of_disk) {
                return Ok(false);
            }
            let Some((below, _)) = standing.volume.and_then(|v| self.holder_of(v.snapshot)) else {
                let message = format!("{} does not stand on disk {}, and has nothing of it", source.name, disk.name);
                return Err(ApiError::new(ErrorCode::InvalidRequest, message)
                    .with_action(format!("name a snapshot of {0}, or a volume that was made off one", disk.name)));
            };
            at = below;
        }
    }

    fn holder_of(&self, version: Uuid) -> Option<(Arc<DiskEntry>, Arc<SnapshotEntry>)> {
        self.all_disks().into_iter().find_map(|disk| {
            let entry = disk.snapshots().into_iter().find(|s| s.id == version)?;
            Some((disk, entry))
        })
    }

    fn restore_when_quiesced(
        &self,
        name: &Name,
        from: &SnapshotRef,
        request: &RestoreRequest,
        is_ours: bool,
    ) -> Result<Arc<JobEntry>, ApiError> {
        let command = Command::Restore { disk: name.clone(), from: from.clone(), force: request.force };
        let wanted = |registry: &Registry| Ok(decide(registry, &command)?.wanted);
        self.when_quiesced(&format!("disk restore {name}"), from, wanted, |source, entry| {
            let disk = self.disk(name)?;
            let record = RestoreRecord {
                id: Uuid::new_v4(),
                source: entry.id,
                from: from.to_string(),
                is_own: self.relation_of(&disk, source)?,
                is_ours,
                is_active: false,
                stopped: false,
                delay_ms: request.delay_ms,
                bytes_per_second: request.bytes_per_second,
            };
            // A guest that comes from here on finds what is restored, or keeps the disk from being restored.
            let server = locked(&disk.server).clone();
            let _away = server.as_ref().filter(|_| !request.force).map(|server| server.hold());
            if !request.force {
                decide(&self.registry(), &command)?;
            }
            self.begin_restore(&disk, source, record)
        })
    }

    fn begin_restore(
        &self,
        disk: &Arc<DiskEntry>,
        source: &Arc<DiskEntry>,
        record: RestoreRecord,
    ) -> Result<Arc<JobEntry>, ApiError> {
        let geometry = disk.disk.geometry();
        if source.disk.geometry().size_bytes != geometry.size_bytes {
            let message = format!("{} has another size than disk {}", record.from, disk.name);
            return Err(ApiError::new(ErrorCode::InvalidRequest, message));
        }
        self.make_outlive_power_cuts(source, record.source)?;
        let of = disk.disk.clone();
        // What is long is done before requests wait.
        in_ring(async move |queue| of.store_brought_back(&queue).await.map_err(|e| e.to_string()))?;
        let id = record.id;
        let pending = self.make_durable_table(&self.places.log_table(id), id, geometry).map_err(table_error)?;
        *locked(&disk.restore) = Some(record);
        if let Err(e) = self.persist(std::slice::from_ref(disk)) {
            *locked(&disk.restore) = None;
            self.remove_restore_files(id);
            return Err(e);
        }
        match self.activate(disk, source, pending) {
            Ok(()) => {}
            Err(e) => {
                // Of a record that could not be stored nobody knows what it says: with no block pending it says nothing.
                *locked(&disk.restore) = None;
                match self.persist(std::slice::from_ref(disk)) {
                    Ok(()) => self.remove_restore_files(id),
                    Err(e) => log::error!("disk {}: a restore that did not begin stays recorded: {e}", disk.name),
                }
                return Err(e);
            }
        }
        crash::point("after a restore was begun");
        log::info!("disk {}: restored from {}", disk.name, source.name);
        let job = self.restore_job(disk);
        self.run_restore(disk, job.clone());
        Ok(job)
    }

    /// Shows what is restored from now on: in one step for guests that are connected, and in one for a daemon that comes
    /// after a kill or a power cut.
    fn activate(&self, disk: &Arc<DiskEntry>, source: &Arc<DiskEntry>, pending: DurableTable) -> Result<(), ApiError> {
        let Some(record) = locked(&disk.restore).clone() else { return Err(io_error("a restore without a record")) };
        let restored = match record.is_own {
            true => RestoreSource::Own(record.source),
            false => RestoreSource::View(View::of(source.disk.clone(), record.source, &record.from)),
        };
        let closed = self.editor.close(&disk.disk, false);
        let (of, from) = (disk.disk.clone(), restored.clone());
        // An independent volume shares no place with the disk, but it may be known what both have changed since they did.
        let relation = locked(&source.standing).stood_on.clone().filter(|_| !record.is_own);
        let origin = relation.map(|was| (source.disk.clone(), was.origin, was.snapshot));
        let version = record.source;
        let work = async move |queue: IoQueue| {
            let changed = || {
                let (volume, origin, snapshot) = origin?;
                let both = [volume.changes(origin, Some(version)).ok()?, of.changes(snapshot, None).ok()?];
                let is_alike = volume.geometry().block_bytes == of.geometry().block_bytes;
                is_alike.then_some(both)
            };
            let done = find_pending(&of, &from, changed, &pending, &queue).await;
            if done.is_err() {
                forget_pending(&pending, &queue).await;
            }
            done.map(|()| pending)
        };
        let pending = in_ring(work)?;
        crash::point("before a restore is recorded");
        *locked(&disk.restore) = Some(RestoreRecord { is_active: true, ..record });
        if let Err(e) = self.persist(std::slice::from_ref(disk)) {
            in_ring(async move |queue| {
                forget_pending(&pending, &queue).await;
                Ok(())
            })?;
            return Err(e);
        }
        crash::point("after a restore was recorded");
        closed.begin(Restoring::new(pending, restored));
        Ok(())
    }

    /// From now on what is saved for the versions that `version` reads through outlives a power cut, also below a volume.
    fn make_outlive_power_cuts(&self, disk: &Arc<DiskEntry>, version: Uuid) -> Result<(), ApiError> {
        let mut made = Vec::new();
        let done = self.save_durably(disk, version, &mut made).and_then(|()| {
            crash::point("before it is recorded that a layer outlives power cuts");
            self.persist(std::slice::from_ref(disk))
        });
        if let Err(e) = done {
            for id in made {
                self.editor.save_durably(&disk.disk, id, None);
                remove_file(&self.places.saved_table(id));
            }
            return Err(e);
        }
        let below = locked(&disk.standing).volume.as_ref().map(|volume| volume.snapshot);
        match below {
            None => Ok(()),
            Some(below) => match self.holder_of(below) {
                Some((disk, _)) => self.make_outlive_power_cuts(&disk, below),
                None => Err(io_error(format!("what volume {} stands on is not served", disk.name))),
            },
        }
    }

    fn save_durably(&self, disk: &Arc<DiskEntry>, version: Uuid, made: &mut Vec<Uuid>) -> Result<(), ApiError> {
        let chain = disk.disk.chain();
        let Some(index) = chain.position(version) else { return Err(io_error("the snapshot is gone")) };
        for at in index..chain.pivot_of(index) {
            let layer = chain.layer(at);
            let (Some(table), None) = (layer.table(), layer.saved_durably()) else { continue };
            let id = chain.version(at).id;
            let path = self.places.saved_table(id);
            remove_file(&path); // Of an attempt that came to nothing.
            let table = self.make_durable_copy(&path, id, table.clone()).map_err(table_error)?;
            self.editor.save_durably(&disk.disk, id, Some(Arc::new(Saved { table, revoke: self.revoke(id) })));
            made.push(id);
        }
        let of = disk.disk.clone();
        in_ring(async move |queue| {
            // Whoever was decided before saves without making that durable.
            of.changes_passed().await;
            of.make_durable(&queue, version).await
        })
    }

    /// A new job of a disk's restore, with the pace that is remembered.
    fn restore_job(&self, disk: &Arc<DiskEntry>) -> Arc<JobEntry> {
        let job = self.new_job(JobKind::Restore, disk, None);
        if let Some(record) = locked(&disk.restore).as_ref() {
            job.pace.delay_ms.store(record.delay_ms, Ordering::Relaxed);
            job.pace.bytes_per_second.store(record.bytes_per_second, Ordering::Relaxed);
        }
        job
    }

    fn run_restore(&self, disk: &Arc<DiskEntry>, job: Arc<JobEntry>) {
        let from = locked(&disk.restore).clone();
        let (on, of, ours) = (disk.clone(), disk.clone(), job.clone());
        let run = move |manager: &Manager| manager.bring_back(&on, &ours);
        let mark_stopped = move || {
            if let Some(record) = locked(&of.restore).as_mut() {
                record.stopped = true;
            }
        };
        let after = move |manager: &Manager, state| {
            let taken = from.filter(|r| r.is_ours && state == JobState::Done).and_then(|r| r.from.parse().ok());
            if let Some(reference) = taken {
                manager.let_snapshot_go(&reference);
            }
        };
        self.run_job("restore", &job, run, mark_stopped, after);
    }

    /// The job of a restore, on a thread and ring of its own.
    fn bring_back(&self, disk: &Arc<DiskEntry>, job: &JobEntry) -> Result<Outcome, String> {
        let (of, pace) = (disk.disk.clone(), job.pace.clone());
        let done = block_on(async move |queue| job::restore(queue, of, pace).await)?.map_err(|e| e.to_string())?;
        if done == Outcome::Stopped {
            return Ok(done);
        }
        let Some(_claim) = self.claim_for_job(job) else { return Ok(Outcome::Stopped) };
        let record = locked(&disk.restore).take();
        if let Err(e) = self.persist(std::slice::from_ref(disk)) {
            *locked(&disk.restore) = record;
            return Err(e.to_string());
        }
        crash::point("after a restore was forgotten");
        self.editor.end_restore(&disk.disk);
        if let Some(record) = record {
            self.remove_restore_files(record.id);
            log::info!("disk {}: all of {} is copied back", disk.name, record.from);
        }
        Ok(done)
    }

    /// Goes on with a restore that was stopped or has failed.
    pub(super) fn go_on_with_restore(&self, disk: &Arc<DiskEntry>, job: Arc<JobEntry>) -> Result<(), ApiError> {
        if let Some(record) = locked(&disk.restore).as_mut() {
            record.stopped = false;
        }
        self.persist(std::slice::from_ref(disk))?;
        job.begin_again();
        self.bus.publish(Notice::of_disk(EventKind::JobStarted, &disk.name).with_job(job.id));
        self.run_restore(disk, job);
        Ok(())
    }

    /// Puts a restore that is to go on into the disk's chain, before the disk is served. One from a volume waits until that
    /// is served.
    pub(super) fn take_up_restore(
        &self,
        disk: &Arc<Disk>,
        recovery: &Recovery,
        layers: &DiskLayers,
    ) -> Result<(Option<RestoreRecord>, Option<Awaited>), ApiError> {
        let restores = recovery.record.restore.clone().zip(recovery.restore.as_ref());
        let Some((restore, decided)) = restores else { return Ok((None, None)) };
        let lost = |why: &dyn std::fmt::Display| ApiError::new(ErrorCode::DiskFailed, why.to_string());
        let pending = decided.pending.as_ref().map_err(|why| lost(why))?;
        let pending = layers.open_table(restore.id, pending).map_err(|e| lost(&e))?;
        if !restore.is_own {
            return Ok((Some(restore), Some(Awaited { closed: self.editor.close(disk, true), pending })));
        }
        self.editor.resume_restore(disk, Restoring::new(pending, RestoreSource::Own(restore.source)));
        Ok((Some(restore), None))
    }

    /// Goes on with the restores of disks that are served, and whose volumes are.
    pub(super) fn resume_restores(&self) {
        for disk in self.all_disks() {
            let awaited = locked(&disk.awaited).take();
            let Some(record) = locked(&disk.restore).clone() else { continue };
            if let Some(Awaited { closed, pending }) = awaited {
                match self.view_of(&record) {
                    Ok(view) => closed.begin(Restoring::new(pending, RestoreSource::View(view))),
                    Err(why) => {
                        let reason = format!("it is being restored from {}, which cannot be had: {why}", record.from);
                        log::error!("disk {}: {reason}; put back what is missing and start again", disk.name);
                        self.bus.publish(Notice::of_disk(EventKind::DiskFailed, &disk.name).because(&reason));
                        disk.failure_told.store(true, Ordering::SeqCst);
                        closed.lose(reason);
                        continue;
                    }
                }
            }
            if disk.disk.restore_lost().is_some() || self.job_on(&disk, |job| job.kind == JobKind::Restore).is_some() {
                continue;
            }
            let job = self.restore_job(&disk);
            match record.stopped {
                true => self.end_job(&job, JobState::Stopped, None),
                false => self.run_restore(&disk, job),
            }
        }
    }

    fn view_of(&self, record: &RestoreRecord) -> Result<Arc<View>, String> {
        let (disk, entry) = self.holder_of(record.source).ok_or("its volume is not served")?;
        if entry.version.is_none() {
            return Err(entry.broken().unwrap_or_default());
        }
        let view = View::of(disk.disk.clone(), record.source, &record.from);
        view.broken().map_or(Ok(view), Err)
    }

    pub(super) fn remove_restore_files(&self, id: Uuid) {
        remove_file(&self.places.run_table(id));
        remove_file(&self.places.log_table(id));
    }

    /// Removes what a restore left that a kill ended before it began.
    pub(super) fn forget_unbegun_restore(&self, record: Option<&DiskRecord>) {
        if let Some(restore) = record.and_then(|r| r.restore.as_ref()).filter(|r| !r.is_active) {
            self.remove_restore_files(restore.id);
        }
    }
}

impl DiskEntry {
    pub(super) fn restore_status(&self) -> Option<api::RestoreStatus> {
        let from = locked(&self.restore).as_ref().filter(|r| r.is_active)?.from.clone();
        let geometry = self.disk.geometry();
        let remaining_bytes = self.disk.blocks_to_bring_back() * u64::from(geometry.block_bytes);
        Some(api::RestoreStatus { from, remaining_bytes: remaining_bytes.min(geometry.size_bytes) })
    }
}

/// Finds what differs and makes it durable. Changes of the disk are held up.
async fn find_pending(
    disk: &Disk,
    source: &RestoreSource,
    changed: impl FnOnce() -> Option<[Changes; 2]>,
    pending: &DurableTable,
    queue: &IoQueue,
) -> Result<(), String> {
    disk.changes_passed().await;
    // What is not pending is shown as it is now, after a power cut too.
    disk.store_brought_back(queue).await.map_err(|e| e.to_string())?;
    let found = match changed() {
        Some(changed) => disk.add_changes(&changed, pending.table()),
        None => disk.find_differences(source, pending.table()),
    };
    found.map_err(|e| e.to_string())?;
    pending.commit(queue).await.map_err(|e| e.to_string())
}

/// Makes a table say nothing, whether it is believed or not.
async fn forget_pending(pending: &DurableTable, queue: &IoQueue) {
    pending.table().clear(BlockRange { start: BlockIndex(0), end: BlockIndex(pending.table().blocks()) });
    if let Err(e) = pending.commit(queue).await {
        log::error!("{}: a restore that did not begin is not forgotten: {e}", pending.image().path().display());
    }
}

fn short(id: Uuid) -> String {
    id.simple().to_string()[..8].to_owned()
}

/// What keeps a disk from being restored, whatever it is restored from.
fn refuse_to_restore(registry: &Registry, name: &Name, force: bool) -> Result<(), ApiError> {
    let Some(disk) = registry.named(name) else { return Err(ApiError::disk_not_found(name)) };
    let refuses = |kind| match Operation::Restore.about(kind) {
        Answer::Fine | Answer::Waits => false,
        Answer::Forced => !force,
        Answer::Refused | Answer::Never => true,
    };
    match registry.of_disk(disk).into_iter().find(|obstacle| refuses(obstacle.kind)) {
        None => Ok(()),
        Some(obstacle) => {
            let steps: Vec<String> = obstacle.cleared_by.iter().map(ToString::to_string).collect();
            let code = Operation::Restore.code(obstacle.kind);
            let action = match steps.is_empty() {
                true => Operation::Restore.instead(obstacle.kind, name.as_str()),
                false => steps.join("; then "),
            };
            Err(ApiError::new(code, obstacle.what).with_action(action))
        }
    }
}
