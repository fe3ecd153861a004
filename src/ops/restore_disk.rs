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
use crate::door::{self, LayerKind, Parted, RestoreFrom};
use crate::manager::entry::{DiskEntry, locked};
use crate::manager::followups::FollowUp;
use crate::manager::jobs::JobEntry;
use crate::manager::{Manager, engine_error, record_error, table_error};
use crate::registry::{ClaimKey, Command, Registry, Wanted, decide};
use crate::store::{DiskRecord, DurableTable, RecordError, RestorePhase, RestoreRecord, RestoreSourceKind, TableError};

fn io_error(what: impl std::fmt::Display) -> ApiError {
    ApiError::new(ErrorCode::Io, what.to_string())
}

impl Manager {
    /// Takes a disk back to what `request` names. The disk shows that when this returns.
    pub(crate) fn restore(&self, name: &Name, request: &RestoreRequest) -> Result<api::Job, ApiError> {
        let begun = match &request.from {
            VolumeSource::Snapshot(snapshot) => self.restore_when_quiesced(name, snapshot, request, None),
            VolumeSource::Now(volume) => self.restore_to_now(name, volume, request),
        };
        Ok(begun?.to_api())
    }

    /// Takes a disk back to the present of a volume. The snapshot that is taken for that says so in its record: it goes when no
    /// restore needs it, whatever comes in between.
    fn restore_to_now(&self, name: &Name, volume: &Name, request: &RestoreRequest) -> Result<Arc<JobEntry>, ApiError> {
        let command = Command::RestoreToNow { disk: name.clone(), volume: volume.clone(), force: request.force };
        // All that would refuse it is said before a snapshot is taken for its sake, which stays while the disk is claimed.
        let held = self.claim_decided(&format!("disk restore {name}"), &|registry| {
            decide(registry, &command)?;
            Ok(Wanted::changing(registry.named(name).map(|disk| ClaimKey::Entity(disk.id))))
        })?;
        let disk = self.disk(name)?;
        let (from, taken) = self.snapshot_to_restore(&disk, volume)?;
        let waits = self.waiting_for(&disk, format!("{from} to be quiesced"));
        let begun = self.restore_when_quiesced(name, &from, request, Some(disk.id));
        drop((waits, held));
        if begun.is_err() {
            self.let_snapshot_go(taken);
        }
        begun
    }

    /// Takes the snapshot of a volume that a disk, which is claimed, is restored to. Returns what it is called, and its
    /// identifier.
    fn snapshot_to_restore(&self, disk: &DiskEntry, volume: &Name) -> Result<(SnapshotRef, Uuid), ApiError> {
        let reference =
            SnapshotRef { disk: volume.clone(), name: format!("restore-{}", short(self.host.new_id())).parse()? };
        let snapshot = SnapshotRequest {
            name: reference.name.clone(),
            disks: vec![volume.clone()],
            strategy: None,
            layout: None,
            writers: Writers::Request,
            socket: None,
            image: None,
        };
        let id = self.create_for(&snapshot, Some(disk.id))?.first().map(|s| s.id);
        Ok((reference, id.unwrap_or_default()))
    }

    /// `claimed` is the disk if the caller has claimed it, and taken what it is restored from.
    fn restore_when_quiesced(
        &self,
        name: &Name,
        from: &SnapshotRef,
        request: &RestoreRequest,
        claimed: Option<Uuid>,
    ) -> Result<Arc<JobEntry>, ApiError> {
        let command = Command::Restore { disk: name.clone(), from: from.clone(), force: request.force };
        let wanted = |registry: &Registry| {
            let mut wanted = decide(registry, &command)?.wanted;
            wanted.changes.retain(|key| claimed.is_none_or(|disk| *key != ClaimKey::Entity(disk)));
            Ok(wanted)
        };
        self.when_quiesced(&format!("disk restore {name}"), from, wanted, |source, entry| {
            let disk = self.disk(name)?;
            let record = RestoreRecord {
                id: self.host.new_id(),
                source: entry.id,
                from: from.to_string(),
                source_kind: match (Arc::ptr_eq(&disk, source), claimed.is_some()) {
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
        let geometry = disk.facts().geometry;
        let size_bytes = source.facts().version(record.source).map_or(0, |version| version.size_bytes);
        if size_bytes != geometry.size_bytes {
            let has = geometry.size_bytes;
            let message =
                format!("{} has {size_bytes} bytes and disk {} has {has}, which it keeps", record.from, disk.name);
            return Err(ApiError::new(ErrorCode::InvalidRequest, message)
                .with_action(format!("make a volume off it: halfsilver volume create NAME --from {}", record.from)));
        }
        self.make_outlive_power_cuts(source, record.source)?;
        disk.disk.store_live().map_err(engine_error)?;
        let id = record.id;
        let pending = self.make_durable_table(&self.places.log_table(id), id, &geometry);
        let pending = pending.inspect_err(|_| self.remove_restore_files(id)).map_err(table_error)?;
        let prepared = self.change(disk, || *locked(&disk.restore) = Some(record));
        prepared.inspect_err(|_| self.remove_restore_files(id))?;
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
        let from = match record.is_own() {
            true => RestoreFrom::Own(record.source),
            false => RestoreFrom::Base(source.disk.base(record.source, &record.from)),
        };
        let relation = locked(&source.relations).stood_on.clone().filter(|_| !record.is_own());
        let parted = relation.map(|was| Parted {
            volume: source.id,
            origin: was.origin,
            stood_on: was.snapshot,
            restored: record.source,
        });
        disk.disk.prepare_restore(pending, from, parted).map_err(|e| match e {
            door::Error::Broken(why) => {
                let message = format!("disk {}: {} broke while it was made ready: {why}", disk.name, record.from);
                ApiError::new(ErrorCode::SnapshotBroken, message).with_action("restore from another one")
            }
            e => engine_error(e),
        })?;
        crash::point("before a restore is recorded");
        let active = RestoreRecord { phase: RestorePhase::Active, ..record.clone() };
        let recorded = self.records.put(&[&DiskRecord { restore: Some(active.clone()), ..disk.to_record() }]);
        if let Err(e) = recorded {
            disk.disk.give_restore_up(matches!(e, RecordError::Unknown(_)));
            return Err(record_error(e));
        }
        *locked(&disk.restore) = Some(active);
        crash::point("after a restore was recorded");
        disk.disk.begin_restore();
        Ok(())
    }

    /// From now on what is saved for the versions that `version` reads through outlives a power cut, also below a volume.
    fn make_outlive_power_cuts(&self, disk: &Arc<DiskEntry>, version: Uuid) -> Result<(), ApiError> {
        let facts = disk.facts();
        if facts.position(version).is_none() {
            return Err(io_error("the snapshot is gone"));
        }
        let kept = facts.version(version).into_iter().chain(facts.way_of(version));
        let mut made = Vec::new();
        let images = kept.filter(|kept| kept.layer == LayerKind::Table).map(|kept| {
            made.push(kept.id);
            let path = self.places.saved_table(kept.id);
            self.remove_file(&path); // Of an attempt that came to nothing.
            let image = self.make_durable_image(&path, &facts.geometry)?;
            self.store_name(&path)?;
            Ok((kept.id, image))
        });
        let images = images.collect::<Result<Vec<_>, TableError>>().map_err(table_error);
        let saved = images.and_then(|images| disk.disk.save_durably(version, images).map_err(engine_error));
        if let Err(e) = saved {
            made.iter().for_each(|id| self.remove_file(&self.places.saved_table(*id)));
            return Err(e);
        }
        crash::point("before it is recorded that a layer outlives power cuts");
        // If that is refused the tables stay in use: the next record says so.
        self.persist(std::slice::from_ref(disk)).inspect_err(|_| self.follow_up(FollowUp::Durable(disk.clone())))?;
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
}

fn short(id: Uuid) -> String {
    id.simple().to_string()[..8].to_owned()
}
