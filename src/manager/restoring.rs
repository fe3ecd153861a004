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
use crate::door::DiskFacts;
use crate::engine::{ClosedDisk, Disk, RestoreSource, Restoring, View};
use crate::job::{self, Outcome};
use crate::manager::Manager;
use crate::manager::entry::{DiskEntry, SnapshotEntry, locked};
use crate::manager::followups::FollowUp;
use crate::manager::jobs::JobEntry;
use crate::manager::layers::DiskLayers;
use crate::recovery::Recovery;
use crate::store::{BlockIndex, DiskRecord, DurableTable, RestorePhase, RestoreRecord, RestoreSourceKind};

/// A disk that waits for the volume that it is restored from.
pub(crate) struct SuspendedRestore {
    /// None when its requests fail meanwhile.
    pub(crate) closed: Option<ClosedDisk>,
    pub(crate) pending: DurableTable,
}

/// How often it is looked whether another thread has looked through the restores.
const LOOK: Duration = Duration::from_millis(1);

impl SuspendedRestore {
    /// Every request on the disk fails from here on.
    pub(crate) fn lose(self, reason: String) {
        if let Some(closed) = self.closed {
            closed.lose(reason);
        }
    }
}

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
        let (of, pace) = (disk.disk.clone(), job.pace.clone());
        let done = self.block_on(async move |queue| job::restore(queue, of, pace).await)?.map_err(|e| e.to_string())?;
        if done == Outcome::Stopped {
            return Ok(done);
        }
        let Some(_claim) = self.claim_for_job(job) else { return Ok(Outcome::Stopped) };
        let is_over = |of: &Restoring| of.pending().table().next_set(BlockIndex(0)).is_none();
        if !disk.disk.chain().restoring().is_some_and(|restoring| is_over(restoring)) {
            return Err("some blocks are not brought back yet; resume it".to_owned());
        }
        let record = locked(&disk.restore).take();
        if let Err(e) = self.persist(std::slice::from_ref(disk)) {
            *locked(&disk.restore) = record;
            return Err(e.to_string());
        }
        crash::point("after a restore was forgotten");
        if !self.editor.end_restore(&disk.disk) {
            return Err(
                "it is recorded as ended, and some blocks are not brought back; start the daemon anew".to_owned()
            );
        }
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

    /// Puts a restore that is to go on into the disk's chain, before the disk is served. One from a volume waits until that
    /// is served.
    pub(crate) fn take_up_restore(
        &self,
        disk: &Arc<Disk>,
        recovery: &Recovery,
        layers: &DiskLayers,
    ) -> Result<(Option<RestoreRecord>, Option<SuspendedRestore>), ApiError> {
        let restores = recovery.record.restore.clone().zip(recovery.restore.as_ref());
        let Some((restore, decided)) = restores else { return Ok((None, None)) };
        let lost = |why: &dyn std::fmt::Display| ApiError::new(ErrorCode::DiskFailed, why.to_string());
        let pending = decided.pending.as_ref().map_err(|why| lost(why))?;
        let pending = layers.open_table(restore.id, pending).map_err(|e| lost(&e))?;
        if !restore.is_own() {
            return Ok((
                Some(restore),
                Some(SuspendedRestore { closed: Some(self.editor.close(disk, true)), pending }),
            ));
        }
        self.editor.resume_restore(disk, Restoring::new(pending, RestoreSource::Own(restore.source)));
        Ok((Some(restore), None))
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
        for disk in self.all_disks() {
            let Some(record) = locked(&disk.restore).clone().filter(|r| r.is_shown()) else { continue };
            if own != Some(disk.id) && self.is_being_changed(disk.id) {
                if locked(&disk.suspended).is_some() {
                    self.follow_up(FollowUp::Restore(disk));
                }
                continue;
            }
            let suspended = locked(&disk.suspended).take();
            if let Some(SuspendedRestore { closed, pending }) = suspended {
                match self.view_of(&record) {
                    Ok(view) => {
                        let closed = closed.unwrap_or_else(|| self.editor.close(&disk.disk, true));
                        closed.begin(Restoring::new(pending, RestoreSource::View(view)));
                        disk.failure_told.store(false, Ordering::SeqCst);
                    }
                    Err(why) => {
                        if let Some(closed) = closed {
                            let from = self.name_now(record.source, &record.from);
                            let reason = format!("it is being restored from {from}, which cannot be had: {why}");
                            log::error!("disk {}: {reason}; put back what is missing, and it goes on", disk.name);
                            self.bus.publish(Notice::of_disk(EventKind::DiskFailed, &disk.name.get()).because(&reason));
                            disk.failure_told.store(true, Ordering::SeqCst);
                            closed.lose(reason);
                        }
                        // What it waits for may come back.
                        *locked(&disk.suspended) = Some(SuspendedRestore { closed: None, pending });
                        continue;
                    }
                }
            }
            if disk.facts().restore_lost().is_some() || self.job_on(&disk, |job| job.kind == JobKind::Restore).is_some()
            {
                continue;
            }
            let job = self.restore_job(&disk);
            match record.phase {
                RestorePhase::Stopped => self.end_job(&job, JobState::Stopped, None),
                RestorePhase::Active | RestorePhase::Prepared => self.run_restore(&disk, job),
            }
        }
    }

    pub(crate) fn view_of(&self, record: &RestoreRecord) -> Result<Arc<View>, String> {
        let (disk, entry) = self.holder_of(record.source).ok_or("its volume is not served")?;
        if entry.version.is_none() {
            return Err(entry.broken(&disk.facts()).unwrap_or_default());
        }
        let view = View::of(disk.disk.clone(), record.source, &entry.reference().to_string());
        view.broken().map_or(Ok(view), Err)
    }

    pub(crate) fn remove_restore_files(&self, id: Uuid) {
        self.remove_file(&self.places.run_table(id));
        self.remove_file(&self.places.log_table(id));
    }

    /// Removes what a restore left that a kill ended before it began.
    pub(crate) fn forget_unbegun_restore(&self, record: Option<&DiskRecord>) {
        if let Some(restore) = record.and_then(|r| r.restore.as_ref()).filter(|r| !r.is_shown()) {
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
