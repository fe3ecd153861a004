//! Restores in place are begun (source 004). How they go on and end is in [`crate::manager::restoring`].
//!
//! What always holds:
//! - While a record says that a restore is active, its table of pending blocks is durable, and so is what pending blocks
//!   show: whatever is saved for the versions on the way to the full image outlives a power cut from then on.
//! - Before a record says so the table has a name in it, so that a start knows whose it is, and its bits mean nothing.
//! - What is restored stays: while a disk is being restored it gets and loses no snapshot, and a volume that it is restored
//!   from keeps the snapshot.
//! - A disk whose pending blocks cannot be shown is not served as if it were whole.

use std::sync::Arc;

use uuid::Uuid;

use crate::control::api::{self, RestoreRequest, SnapshotRequest, VolumeSource, Writers};
use crate::control::{ApiError, ErrorCode, Name, SnapshotRef};
use crate::crash;
use crate::engine::{Changes, Disk, RestoreSource, Restoring, Saved, View};
use crate::host::Host;
use crate::image::IoQueue;
use crate::manager::entry::{DiskEntry, locked};
use crate::manager::followups::FollowUp;
use crate::manager::jobs::JobEntry;
use crate::manager::{Manager, record_error, table_error};
use crate::registry::{Command, Registry, decide};
use crate::store::{
    BlockIndex, BlockRange, DiskRecord, DurableTable, RecordError, RestorePhase, RestoreRecord, RestoreSourceKind,
    VolumeRecord,
};

fn io_error(what: impl std::fmt::Display) -> ApiError {
    ApiError::new(ErrorCode::Io, what.to_string())
}

/// Runs engine work on a ring of its own.
fn in_ring<T: 'static>(
    host: &dyn Host,
    work: impl AsyncFnOnce(IoQueue) -> Result<T, String> + 'static,
) -> Result<T, ApiError> {
    host.block_on(work).map_err(|e| format!("no ring: {e}")).and_then(|done| done).map_err(io_error)
}

impl Manager {
    /// Takes a disk back to what `request` names. The disk shows that when this returns.
    pub(crate) fn restore(&self, name: &Name, request: &RestoreRequest) -> Result<api::Job, ApiError> {
        let (from, taken) = match &request.from {
            VolumeSource::Snapshot(snapshot) => (snapshot.clone(), None),
            VolumeSource::Now(volume) => {
                let (reference, id) = self.snapshot_to_restore(name, volume, request.force)?;
                (reference, Some(id))
            }
        };
        let begun = self.restore_when_quiesced(name, &from, request, taken.is_some());
        if let (Err(_), Some(taken)) = (&begun, taken) {
            self.let_snapshot_go(taken);
        }
        Ok(begun?.to_api())
    }

    /// Takes the snapshot of a volume that a disk is restored to.
    fn snapshot_to_restore(&self, name: &Name, volume: &Name, force: bool) -> Result<(SnapshotRef, Uuid), ApiError> {
        let reference =
            SnapshotRef { disk: volume.clone(), name: format!("restore-{}", short(self.host.new_id())).parse()? };
        // All that would refuse it is said before a snapshot is taken for its sake.
        decide(&self.registry(), &Command::RestoreToNow { disk: name.clone(), volume: volume.clone(), force })?;
        let (disk, source) = (self.disk(name)?, self.disk(volume).map_err(|_| ApiError::volume_not_found(volume))?);
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
        let id = self.create(&snapshot)?.first().map(|s| s.id);
        Ok((reference, id.unwrap_or_default()))
    }

    /// Whether what is restored is the disk's own, or else a volume that stands on the disk.
    fn relation_of(&self, disk: &Arc<DiskEntry>, source: &Arc<DiskEntry>) -> Result<bool, ApiError> {
        let mut at = source.clone();
        loop {
            if Arc::ptr_eq(&at, disk) {
                return Ok(Arc::ptr_eq(source, disk));
            }
            let relations = locked(&at.relations).clone();
            // An independent volume has all of the disk as it was, and what was written to it since.
            let is_of_disk = |was: VolumeRecord| was.source == disk.id;
            if relations.stood_on.is_some_and(is_of_disk) {
                return Ok(false);
            }
            let Some((below, _)) = relations.volume.and_then(|v| self.holder_of(v.snapshot)) else {
                let message = format!("{} does not stand on disk {}, and has nothing of it", source.name, disk.name);
                return Err(ApiError::new(ErrorCode::InvalidRequest, message)
                    .with_action(format!("name a snapshot of {0}, or a volume that was made off one", disk.name)));
            };
            at = below;
        }
    }

    fn restore_when_quiesced(
        &self,
        name: &Name,
        from: &SnapshotRef,
        request: &RestoreRequest,
        is_taken: bool,
    ) -> Result<Arc<JobEntry>, ApiError> {
        let command = Command::Restore { disk: name.clone(), from: from.clone(), force: request.force };
        let wanted = |registry: &Registry| Ok(decide(registry, &command)?.wanted);
        self.when_quiesced(&format!("disk restore {name}"), from, wanted, |source, entry| {
            let disk = self.disk(name)?;
            let record = RestoreRecord {
                id: self.host.new_id(),
                source: entry.id,
                from: from.to_string(),
                source_kind: match (self.relation_of(&disk, source)?, is_taken) {
                    (true, _) => RestoreSourceKind::Disk,
                    (false, true) => RestoreSourceKind::VolumeNow,
                    (false, false) => RestoreSourceKind::Volume,
                },
                phase: RestorePhase::Prepared,
                delay_ms: request.delay_ms,
                bytes_per_second: request.bytes_per_second,
            };
            self.begin_restore(&disk, source, record, &command)
        })
    }

    fn begin_restore(
        &self,
        disk: &Arc<DiskEntry>,
        source: &Arc<DiskEntry>,
        record: RestoreRecord,
        command: &Command,
    ) -> Result<Arc<JobEntry>, ApiError> {
        let geometry = disk.disk.geometry();
        if source.disk.geometry().size_bytes != geometry.size_bytes {
            let message = format!("{} has another size than disk {}", record.from, disk.name);
            return Err(ApiError::new(ErrorCode::InvalidRequest, message));
        }
        self.make_outlive_power_cuts(source, record.source)?;
        let of = disk.disk.clone();
        // What is long is done before requests wait.
        in_ring(&*self.host, async move |queue| of.store_brought_back(&queue).await.map_err(|e| e.to_string()))?;
        let id = record.id;
        let pending = self.make_durable_table(&self.places.log_table(id), id, geometry).map_err(table_error)?;
        *locked(&disk.restore) = Some(record);
        if let Err(e) = self.persist(std::slice::from_ref(disk)) {
            *locked(&disk.restore) = None;
            self.remove_restore_files(id);
            return Err(e);
        }
        let activated = {
            // A guest that comes from here on finds what is restored, or keeps the disk from being restored.
            let server = locked(&disk.server).clone();
            let _away = server.as_ref().filter(|_| !command.is_forced()).map(|server| server.hold());
            let decided = if command.is_forced() { Ok(()) } else { decide(&self.registry(), command).map(drop) };
            decided.map_err(ApiError::from).and_then(|()| self.activate(disk, source, pending))
        };
        match activated {
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
        let restored = match record.is_own() {
            true => RestoreSource::Own(record.source),
            false => RestoreSource::View(View::of(source.disk.clone(), record.source, &record.from)),
        };
        // An independent volume shares no place with the disk, but it may be known what both have changed since they did.
        let relation = locked(&source.relations).stood_on.clone().filter(|_| !record.is_own());
        let origin = relation.map(|was| (source.disk.clone(), was.origin, was.snapshot));
        let version = record.source;
        let find = |pending: DurableTable| {
            let (of, from, origin) = (disk.disk.clone(), restored.clone(), origin.clone());
            in_ring(&*self.host, async move |queue: IoQueue| {
                let changed = || {
                    let (volume, origin, snapshot) = origin?;
                    let both = [volume.changes(origin, Some(version)).ok()?, of.changes(snapshot, None).ok()?];
                    let is_alike = volume.geometry().block_bytes == of.geometry().block_bytes;
                    is_alike.then_some(both)
                };
                find_pending(&of, &from, changed, &pending, &queue).await.map(|()| pending)
            })
        };
        // Once before requests wait: what is found again then costs little.
        let pending = find(pending)?;
        let closed = self.editor.close(&disk.disk, false);
        let pending = find(pending)?;
        // What its source could not save since it was quiesced is in no table, and would be shown as it is now. From here on
        // nothing is written that it would have to save.
        if let Some(why) = broken(disk, &restored) {
            let message = format!("disk {}: {} broke while it was made ready: {why}", disk.name, record.from);
            return Err(ApiError::new(ErrorCode::SnapshotBroken, message).with_action("restore from another one"));
        }
        crash::point("before a restore is recorded");
        let active = RestoreRecord { phase: RestorePhase::Active, ..record.clone() };
        let recorded = self.records.put(&[&DiskRecord { restore: Some(active.clone()), ..disk.to_record() }]);
        if let Err(e) = recorded {
            let is_unknown = matches!(e, RecordError::Unknown(_));
            let forgotten = in_ring(&*self.host, async move |queue| forget_pending(&pending, &queue).await);
            // A start may take it for active then, over what guests write from now on.
            if let (true, Err(why)) = (is_unknown, &forgotten) {
                closed.lose(format!(
                    "it is not known whether a restore has begun: {}; start the daemon anew",
                    why.message
                ));
            }
            return Err(record_error(e));
        }
        *locked(&disk.restore) = Some(active);
        crash::point("after a restore was recorded");
        closed.begin(Restoring::new(pending, restored));
        Ok(())
    }

    /// From now on what is saved for the versions that `version` reads through outlives a power cut, also below a volume.
    fn make_outlive_power_cuts(&self, disk: &Arc<DiskEntry>, version: Uuid) -> Result<(), ApiError> {
        let mut made = Vec::new();
        disk.disk.durability_changes();
        if let Err(e) = self.save_durably(disk, version, &mut made) {
            for id in made {
                self.editor.save_durably(&disk.disk, id, None);
                self.remove_file(&self.places.saved_table(id));
            }
            disk.disk.durability_recorded();
            return Err(e);
        }
        crash::point("before it is recorded that a layer outlives power cuts");
        // If that is refused the tables stay in use: the next record says so.
        self.persist(std::slice::from_ref(disk)).inspect_err(|_| self.follow_up(FollowUp::Record(disk.clone())))?;
        disk.disk.durability_recorded();
        let below = locked(&disk.relations).volume.as_ref().map(|volume| volume.snapshot);
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
            self.remove_file(&path); // Of an attempt that came to nothing.
            let table = self.make_durable_copy(&path, id, table.clone()).map_err(table_error)?;
            self.editor.save_durably(&disk.disk, id, Some(Arc::new(Saved { table, revoke: self.revoke(id) })));
            made.push(id);
        }
        let of = disk.disk.clone();
        in_ring(&*self.host, async move |queue| {
            // Whoever was decided before saves without making that durable.
            of.changes_passed().await;
            of.make_durable(&queue, version).await
        })
    }
}

/// Why what is to be restored cannot be vouched for, if so.
fn broken(disk: &DiskEntry, restored: &RestoreSource) -> Option<String> {
    match restored {
        RestoreSource::View(view) => view.broken(),
        RestoreSource::Own(id) => {
            let chain = disk.disk.chain();
            let Some(index) = chain.position(*id) else { return Some("it is gone".to_owned()) };
            chain.version(index).broken().map(str::to_owned)
        }
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
async fn forget_pending(pending: &DurableTable, queue: &IoQueue) -> Result<(), String> {
    pending.table().clear(BlockRange { start: BlockIndex(0), end: BlockIndex(pending.table().blocks()) });
    pending.commit(queue).await.map_err(|e| e.to_string())
}

fn short(id: Uuid) -> String {
    id.simple().to_string()[..8].to_owned()
}
