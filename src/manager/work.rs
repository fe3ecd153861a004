//! Work on a disk or volume that goes on after a restart: begun, stopped, resumed and remembered here, whatever kind it is.
//!
//! A kind is a variant of [`Work`], its [`JobKind`], and a line in [`Manager::carry_out`].
//!
//! What always holds: a disk has one work at a time; its record says so before the work begins, and no longer when what it
//! brings about is recorded.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::control::api::{JobKind, JobPatch, JobState};
use crate::control::{ApiError, ErrorCode, EventKind, Notice};
use crate::door::{Outcome, Pace};
use crate::manager::Manager;
use crate::manager::entry::{DiskEntry, locked};
use crate::manager::jobs::JobEntry;
use crate::registry::{ClaimKey, Wanted};
use crate::store::{Work, WorkRecord};

fn kind_of(work: &Work) -> JobKind {
    match work {
        Work::Complete => JobKind::Migrate,
        Work::Update => JobKind::Update,
    }
}

/// Changes the pace of a job, as far as something is said.
pub(crate) fn apply(patch: JobPatch, pace: &Pace) {
    if let Some(delay_ms) = patch.delay_ms {
        pace.delay_ms.store(delay_ms, Ordering::Relaxed);
    }
    if let Some(limit) = patch.bytes_per_second {
        pace.bytes_per_second.store(limit, Ordering::Relaxed);
    }
}

impl Manager {
    /// The work itself, on a thread of its own. Everything that it has done when it is stopped, fails or is cut off stays
    /// done, and it can begin again.
    fn carry_out(&self, work: &Work, disk: &Arc<DiskEntry>, job: &JobEntry) -> Result<Outcome, String> {
        match work {
            Work::Complete | Work::Update => self.complete(disk, job),
        }
    }

    /// Begins a work. The disk is claimed.
    pub(crate) fn begin_work(&self, disk: &Arc<DiskEntry>, record: WorkRecord) -> Result<Arc<JobEntry>, ApiError> {
        if let Some(job) = self.work_of(disk) {
            return Err(ApiError::new(ErrorCode::Conflict, format!("{}: job {} is not done", disk.name, job.id))
                .with_action(format!("wait for it: halfsilver job wait {}", job.id)));
        }
        self.change(disk, || locked(&disk.relations).work = Some(record.clone()))?;
        let job = self.job_of(disk, &record);
        self.run_work(disk, &record.work, job.clone());
        Ok(job)
    }

    /// Goes on after a restart.
    pub(crate) fn resume_work(&self, disk: &Arc<DiskEntry>) {
        let Some(record) = locked(&disk.relations).work.clone() else { return };
        let job = self.job_of(disk, &record);
        if record.stopped {
            self.leave_stopped(&job);
        } else {
            self.run_work(disk, &record.work, job);
        }
    }

    /// Goes on with what was stopped or has failed. The disk is claimed.
    pub(crate) fn go_on_with_work(&self, disk: &Arc<DiskEntry>, job: Arc<JobEntry>) -> Result<(), ApiError> {
        let Some(mut record) = locked(&disk.relations).work.clone() else {
            return Err(ApiError::job_ended(job.id, job.state()));
        };
        let old = record.clone();
        record.stopped = false;
        locked(&disk.relations).work = Some(record.clone());
        self.persist(std::slice::from_ref(disk)).inspect_err(|_| locked(&disk.relations).work = Some(old))?;
        job.begin_again();
        self.bus.publish(Notice::of_disk(EventKind::JobStarted, &disk.name.get()).with_job(job.id));
        self.run_work(disk, &record.work, job);
        Ok(())
    }

    /// The job that works on the disk, or would if it were resumed.
    pub(crate) fn work_of(&self, disk: &DiskEntry) -> Option<Arc<JobEntry>> {
        let kind = kind_of(&locked(&disk.relations).work.as_ref()?.work);
        self.job_on(disk, |job| job.kind == kind)
    }

    /// Remembers how a job is paced, if a restart goes on with it.
    pub(crate) fn remember_pace(&self, job: &JobEntry) -> Result<(), ApiError> {
        let disk = &job.disk;
        if job.state() == JobState::Done || !matches!(job.kind, JobKind::Restore | JobKind::Migrate | JobKind::Update) {
            return Ok(()); // Nothing is remembered of it.
        }
        let wanted = Wanted::changing([ClaimKey::Entity(disk.id)]);
        let _claim = self.claim_keys(&format!("job set {}", job.id), &[disk.name.get().as_str()], wanted)?;
        if !self.is_served(disk) {
            return Ok(());
        }
        let (delay_ms, limit) = (&job.pace.delay_ms, &job.pace.bytes_per_second);
        if job.kind == JobKind::Restore
            && let Some(restore) = locked(&disk.restore).as_mut()
        {
            restore.delay_ms = delay_ms.load(Ordering::Relaxed);
            restore.bytes_per_second = limit.load(Ordering::Relaxed);
        }
        if job.is_work()
            && let Some(work) = &mut locked(&disk.relations).work
        {
            work.delay_ms = delay_ms.load(Ordering::Relaxed);
            work.bytes_per_second = limit.load(Ordering::Relaxed);
        }
        self.persist(std::slice::from_ref(disk))
    }

    pub(crate) fn job_of(&self, disk: &Arc<DiskEntry>, record: &WorkRecord) -> Arc<JobEntry> {
        let job = self.new_job(kind_of(&record.work), disk, None);
        job.pace.delay_ms.store(record.delay_ms, Ordering::Relaxed);
        job.pace.bytes_per_second.store(record.bytes_per_second, Ordering::Relaxed);
        job
    }

    pub(crate) fn run_work(&self, disk: &Arc<DiskEntry>, work: &Work, job: Arc<JobEntry>) {
        let (on, of, work, ours) = (disk.clone(), disk.clone(), work.clone(), job.clone());
        let run = move |manager: &Manager| manager.carry_out(&work, &on, &ours);
        let mark_stopped = move || {
            if let Some(work) = &mut locked(&of.relations).work {
                work.stopped = true;
            }
        };
        self.run_job("work", &job, run, mark_stopped, |_, _| ());
    }
}
