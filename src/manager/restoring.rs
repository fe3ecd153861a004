//! Restores in place that are under way: gone on with after any end of the daemon, and ended (source 004).
//!
//! What always holds: a disk whose pending blocks cannot be shown is not served as if it were whole.

use std::sync::atomic::Ordering;
use std::sync::{Arc, TryLockError};
use std::time::Duration;

use uuid::Uuid;

use crate::control::api::{self, JobKind, JobState};
use crate::control::{ApiError, ErrorCode, EventKind, Notice};
use crate::crash;
use crate::door::{BaseSpec, DiskFacts, Outcome, RestoreSpec, Work};
use crate::manager::Manager;
use crate::manager::entry::{DiskEntry, SnapshotEntry, locked};
use crate::manager::followups::FollowUp;
use crate::manager::jobs::JobEntry;
use crate::manager::layers::DiskLayers;
use crate::recovery::Recovery;
use crate::store::{DiskRecord, RestorePhase, RestoreRecord, RestoreSourceKind};

/// How often it is looked whether another thread has looked through the restores.
const LOOK: Duration = Duration::from_millis(1);

impl Manager {
    pub(crate) fn holder_of(&self, version: Uuid) -> Option<(Arc<DiskEntry>, Arc<SnapshotEntry>)> {
        self.all_disks().into_iter().find_map(|disk| {
            let entry = disk.snapshots().into_iter().find(|s| s.id == version)?;
            Some((disk, entry))
        })
    }

    /// Deletes a snapshot that was taken for a restore, whatever its disk is called by now; if it cannot go yet, later.
    pub(crate) fn let_snapshot_go(&self, id: Uuid) {
        let what = FollowUp::LetGo(id);
        if !self.try_now(&what) {
            self.follow_up(what);
        }
    }

    /// A new job of a disk's restore, with the pace that is remembered.
    pub(crate) fn restore_job(&self, disk: &Arc<DiskEntry>) -> Arc<JobEntry> {
        let job = self.new_job(JobKind::Restore, disk, None);
        if let Some(record) = locked(&disk.restore).as_ref() {
            job.pace.delay_ms.store(record.delay_ms, Ordering::Relaxed);
            job.pace.bytes_per_second.store(record.bytes_per_second, Ordering::Relaxed);
        }
        job
    }

    pub(crate) fn run_restore(&self, disk: &Arc<DiskEntry>, job: Arc<JobEntry>) {
        let from = locked(&disk.restore).clone();
        let (on, of, ours) = (disk.clone(), disk.clone(), job.clone());
        let run = move |manager: &Manager| manager.bring_back(&on, &ours);
        let mark_stopped = move || of.set_restore_phase(RestorePhase::Stopped);
        let after = move |manager: &Manager, state| {
            if let Some(taken) =
                from.filter(|r| r.source_kind == RestoreSourceKind::VolumeNow && state == JobState::Done)
            {
                manager.let_snapshot_go(taken.source);
            }
        };
        self.run_job("restore", &job, run, mark_stopped, after);
    }

    /// The job of a restore, on a thread and ring of its own.
    pub(crate) fn bring_back(&self, disk: &Arc<DiskEntry>, job: &JobEntry) -> Result<Outcome, String> {
        let done = disk.disk.run(Work::Restore, &job.pace)?;
        if done == Outcome::Stopped {
            return Ok(done);
        }
        let Some(_claim) = self.claim_for_job(job) else { return Ok(Outcome::Stopped) };
        // Until that is stored what it is restored from is needed.
        self.records.put(&[&DiskRecord { restore: None, ..disk.to_record() }]).map_err(|e| e.to_string())?;
        crash::point("after a restore was forgotten");
        if !disk.disk.end_restore() {
            self.persist_later(disk);
            return Err("some blocks are not brought back".to_owned());
        }
        let record = locked(&disk.restore).take();
        if let Some(record) = record {
            self.remove_restore_files(record.id);
            log::info!("disk {}: all of {} is copied back", disk.name, record.from);
        }
        Ok(done)
    }

    /// Goes on with a restore that was stopped or has failed.
    pub(crate) fn go_on_with_restore(&self, disk: &Arc<DiskEntry>, job: Arc<JobEntry>) -> Result<(), ApiError> {
        let was = locked(&disk.restore).clone();
        disk.set_restore_phase(RestorePhase::Active);
        self.persist(std::slice::from_ref(disk)).inspect_err(|_| *locked(&disk.restore) = was)?;
        job.begin_again();
        self.bus.publish(Notice::of_disk(EventKind::JobStarted, &disk.name.get()).with_job(job.id));
        self.run_restore(disk, job);
        Ok(())
    }

    /// Opens what a restore needs that is to go on. One from a volume waits until that is served.
    pub(crate) fn take_up_restore(
        &self,
        recovery: &Recovery,
        layers: &DiskLayers,
    ) -> Result<Option<(RestoreRecord, RestoreSpec)>, ApiError> {
        let restores = recovery.record.restore.clone().zip(recovery.restore.as_ref());
        let Some((restore, decided)) = restores else { return Ok(None) };
        let failed = |why: &dyn std::fmt::Display| ApiError::new(ErrorCode::DiskFailed, why.to_string());
        let pending = decided.pending.as_ref().map_err(|why| failed(why))?;
        let pending = layers.open_table(restore.id, pending).map_err(|e| failed(&e))?;
        let own = restore.is_own().then_some(restore.source);
        let spec = RestoreSpec { pending, own, lost: recovery.why_hollow().map(ToString::to_string) };
        Ok(Some((restore, spec)))
    }

    /// Goes on with the restores of disks that are served, and whose volumes are.
    /// `own` is the disk that the caller has claimed; what others have claimed is theirs.
    pub(crate) fn resume_restores(&self, own: Option<Uuid>) {
        let _resuming = loop {
            match self.resuming.try_lock() {
                Ok(held) => break held,
                Err(TryLockError::Poisoned(held)) => break held.into_inner(),
                Err(TryLockError::WouldBlock) => self.host.pause(LOOK),
            }
        };
        // What a stop has closed stays so.
        for disk in self.all_disks().into_iter().filter(|_| !self.is_stopping()) {
            let Some(record) = locked(&disk.restore).clone().filter(|r| r.is_shown()) else { continue };
            if own != Some(disk.id) && self.is_being_changed(disk.id) {
                if disk.facts().restore_waits {
                    self.follow_up(FollowUp::Restore(disk));
                }
                continue;
            }
            let facts = disk.facts();
            if facts.restore_waits {
                match self.base_to_restore(&record).and_then(|base| disk.disk.go_on_restoring(&base)) {
                    Ok(()) => disk.failure_told.store(false, Ordering::SeqCst),
                    Err(why) => {
                        if facts.restore_lost().is_none() {
                            let from = self.name_now(record.source, &record.from);
                            let reason = format!("it is being restored from {from}, which cannot be had: {why}");
                            log::error!("disk {}: {reason}; put back what is missing, and it goes on", disk.name);
                            self.bus.publish(Notice::of_disk(EventKind::DiskFailed, &disk.name.get()).because(&reason));
                            disk.failure_told.store(true, Ordering::SeqCst);
                            disk.disk.lose_restore(&reason);
                        }
                        // What it waits for may come back.
                        continue;
                    }
                }
            } else if facts.restore_lost().is_some() {
                continue;
            }
            if self.job_on(&disk, |job| job.kind == JobKind::Restore).is_some() {
                continue;
            }
            let job = self.restore_job(&disk);
            match record.phase {
                RestorePhase::Stopped => self.leave_stopped(&job),
                RestorePhase::Active | RestorePhase::Prepared => self.run_restore(&disk, job),
            }
        }
    }

    fn base_to_restore(&self, record: &RestoreRecord) -> Result<BaseSpec, String> {
        let (disk, entry) = self.holder_of(record.source).ok_or("its volume is not served")?;
        if entry.is_lost {
            return Err(entry.broken(&disk.facts()).unwrap_or_default());
        }
        Ok(disk.disk.base(record.source, &entry.reference().to_string()))
    }

    pub(crate) fn remove_restore_files(&self, id: Uuid) {
        self.remove_file(&self.places.run_table(id));
        self.remove_file(&self.places.log_table(id));
    }

    /// Removes what a restore left of which a start has found that it had not begun, or was over.
    pub(crate) fn forget_ended_restore(&self, disk: &DiskEntry, record: Option<&DiskRecord>) {
        if let Some(restore) = record.and_then(|r| r.restore.as_ref()).filter(|_| locked(&disk.restore).is_none()) {
            self.remove_restore_files(restore.id);
        }
    }
}

impl DiskEntry {
    fn set_restore_phase(&self, phase: RestorePhase) {
        if let Some(record) = locked(&self.restore).as_mut() {
            record.phase = phase;
        }
    }

    pub(crate) fn restore_status(&self, manager: &Manager, facts: &DiskFacts) -> Option<api::RestoreStatus> {
        let restore = locked(&self.restore).clone().filter(|r| r.is_shown())?;
        let from = manager.name_now(restore.source, &restore.from);
        Some(api::RestoreStatus { from, remaining_bytes: facts.bytes_to_bring_back() })
    }
}
