//! Jobs that run, as the manager holds them.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::entry::{DiskEntry, SnapshotEntry, locked};
use super::manager::Manager;
use crate::control::api::{self, JobKind, JobState};
use crate::control::timestamp::Timestamp;
use crate::control::{ApiError, ErrorCode, EventKind, JobDeletion, Name, Notice};
use crate::job::{Outcome, Pace};

/// How many ended jobs are still listed.
const ENDED_JOBS_MAX: usize = 32;

/// How long a job may take to stop: the copies of one step, on a slow disk.
const STOP_WAIT: Duration = Duration::from_secs(10);

/// A job and how far it is.
pub(super) struct JobEntry {
    pub(super) id: u64,
    pub(super) kind: JobKind,
    pub(super) disk: Name,
    pub(super) snapshot: Option<Name>,
    pub(super) pace: Arc<Pace>,
    started_at: Timestamp,
    /// When it began to run the last time, and how much was done then.
    running_since: Mutex<(Instant, u64)>,
    state: Mutex<(JobState, Option<String>)>,
    ended: Condvar,
}

impl JobEntry {
    pub(super) fn to_api(&self) -> api::Job {
        let (state, reason) = locked(&self.state).clone();
        let done = self.pace.done_bytes.load(Ordering::Relaxed);
        let total = self.pace.total_bytes.load(Ordering::Relaxed).max(done);
        api::Job {
            id: self.id,
            kind: self.kind,
            disk: self.disk.clone(),
            snapshot: self.snapshot.clone(),
            state,
            reason,
            done_bytes: done,
            total_bytes: total,
            percent: api::Job::percent_of(state, done, total),
            delay_ms: self.pace.delay_ms.load(Ordering::Relaxed),
            bytes_per_second: self.pace.bytes_per_second.load(Ordering::Relaxed),
            started_at: self.started_at,
            estimated_seconds: (state == JobState::Running).then(|| self.estimate(done)).flatten(),
        }
    }

    fn estimate(&self, done: u64) -> Option<u64> {
        let (since, before) = *locked(&self.running_since);
        let total = self.pace.total_bytes.load(Ordering::Relaxed);
        api::Job::estimate_seconds(done.checked_sub(before)?, total.checked_sub(before)?, since.elapsed())
    }

    /// So much was there before it began: what is left is estimated without it.
    pub(super) fn begins_with(&self, done_bytes: u64) {
        self.pace.done_bytes.store(done_bytes, Ordering::Relaxed);
        *locked(&self.running_since) = (Instant::now(), done_bytes);
    }

    /// It runs again, after it was stopped or has failed.
    pub(super) fn begin_again(&self) {
        self.pace.stop.store(false, Ordering::Release);
        *locked(&self.running_since) = (Instant::now(), self.pace.done_bytes.load(Ordering::Relaxed));
        *locked(&self.state) = (JobState::Running, None);
    }

    pub(super) fn state(&self) -> JobState {
        locked(&self.state).0
    }

    /// Waits until the job has ended, at most for `timeout`. Returns whether it has.
    pub(super) fn wait(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut state = locked(&self.state);
        while state.0 == JobState::Running {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return false };
            state = self.ended.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl Manager {
    /// Enters a new job in the list.
    pub(super) fn new_job(&self, kind: JobKind, disk: &Name, snapshot: Option<&Name>) -> Arc<JobEntry> {
        let id = self.next_job.fetch_add(1, Ordering::SeqCst);
        let job = Arc::new(JobEntry {
            id,
            kind,
            disk: disk.clone(),
            snapshot: snapshot.cloned(),
            pace: Arc::new(Pace::default()),
            started_at: Timestamp::now(),
            running_since: Mutex::new((Instant::now(), 0)),
            state: Mutex::new((JobState::Running, None)),
            ended: Condvar::new(),
        });
        let listed: Vec<_> = locked(&self.jobs).values().cloned().collect();
        // A restore that has failed is gone on with by its job, and nothing else.
        let is_over = |j: &&Arc<JobEntry>| match j.state() {
            JobState::Done => true,
            JobState::Failed => self.restored_by(j).is_none(),
            JobState::Running | JobState::Stopped => false,
        };
        let ended: Vec<u64> = listed.iter().filter(is_over).map(|j| j.id).collect();
        let mut jobs = locked(&self.jobs);
        for old in ended.iter().take((ended.len() + 1).saturating_sub(ENDED_JOBS_MAX)) {
            jobs.remove(old);
        }
        jobs.insert(id, job.clone());
        drop(jobs);
        self.bus.publish(Notice::of_disk(EventKind::JobStarted, disk).with_job(id));
        job
    }

    /// Carries a job out on a thread of its own: `run`, then how it ended is told, then `after`. Of a job that somebody
    /// stopped it is remembered, by `mark_stopped` with the structure locked, so that no restart goes on with it.
    pub(super) fn run_job(
        &self,
        thread: &str,
        disk: &Arc<DiskEntry>,
        job: &Arc<JobEntry>,
        run: impl FnOnce(&Manager) -> Result<Outcome, String> + Send + 'static,
        mark_stopped: impl FnOnce() + Send + 'static,
        after: impl FnOnce(&Manager, JobState) + Send + 'static,
    ) {
        let (me, disk, ours) = (self.me.clone(), disk.clone(), job.clone());
        let started = self.start_thread(thread, move || {
            let Some(manager) = me.upgrade() else { return };
            let (state, reason) = match run(&manager) {
                Ok(Outcome::Done) => (JobState::Done, None),
                Ok(Outcome::Stopped) if manager.is_stopping() => {
                    (JobState::Stopped, Some("the daemon is going down".to_owned()))
                }
                Ok(Outcome::Stopped) => {
                    let _structure = locked(&manager.structure);
                    mark_stopped();
                    match manager.persist(std::slice::from_ref(&disk)) {
                        Ok(()) => (JobState::Stopped, None),
                        Err(e) => (JobState::Stopped, Some(format!("a restart will go on with it: {e}"))),
                    }
                }
                Err(reason) => (JobState::Failed, Some(reason)),
            };
            manager.end_job(&ours, state, reason);
            after(&manager, state);
        });
        if let Err(e) = started {
            self.end_job(job, JobState::Failed, Some(format!("it has no thread: {e}")));
        }
    }

    /// Says how a job ended.
    pub(super) fn end_job(&self, job: &JobEntry, state: JobState, reason: Option<String>) {
        let kind = match state {
            JobState::Done => EventKind::JobDone,
            JobState::Failed => EventKind::JobFailed,
            JobState::Stopped | JobState::Running => EventKind::JobStopped,
        };
        let notice = Notice::of_disk(kind, &job.disk).with_job(job.id);
        *locked(&job.state) = (state, reason.clone());
        job.ended.notify_all();
        self.bus.publish(match reason {
            Some(reason) => notice.because(reason),
            None => notice,
        });
    }

    pub(super) fn job(&self, id: u64) -> Result<Arc<JobEntry>, ApiError> {
        locked(&self.jobs).get(&id).cloned().ok_or_else(|| ApiError::job_not_found(id))
    }

    pub(super) fn running_jobs(&self) -> Vec<Arc<JobEntry>> {
        locked(&self.jobs).values().filter(|j| j.state() == JobState::Running).cloned().collect()
    }

    /// Stops a job between two blocks, or forgets one that has ended.
    pub(super) fn stop_job(&self, id: u64) -> Result<JobDeletion, ApiError> {
        let job = self.job(id)?;
        match job.state() {
            JobState::Running => {
                job.pace.stop.store(true, Ordering::Release);
                if !job.wait(STOP_WAIT) {
                    let message =
                        format!("job {id} has not stopped yet: it waits for a block, or for requests in flight");
                    return Err(ApiError::new(ErrorCode::Unavailable, message).with_action("look at it again later"));
                }
                match job.state() {
                    JobState::Done => Err(ApiError::job_ended(id, JobState::Done)),
                    _ => Ok(JobDeletion::Stopped(job.to_api())),
                }
            }
            JobState::Stopped => Err(ApiError::job_unfinished(id)),
            JobState::Failed
                if self.snapshot_of(&job).is_some()
                    || self.disk_of_work(&job).is_some()
                    || self.restored_by(&job).is_some() =>
            {
                Err(ApiError::job_unfinished(id))
            }
            JobState::Done | JobState::Failed => {
                locked(&self.jobs).remove(&id);
                Ok(JobDeletion::Removed)
            }
        }
    }

    /// Goes on with a job that was stopped or has failed.
    pub(super) fn go_on_with_job(&self, id: u64) -> Result<api::Job, ApiError> {
        let _structure = locked(&self.structure);
        self.refuse_when_stopping()?;
        let job = self.job(id)?;
        match (job.state(), self.snapshot_of(&job)) {
            (JobState::Running, _) => {}
            (JobState::Stopped | JobState::Failed, Some((disk, snapshot))) => {
                self.resume_deletion(&disk, &snapshot, job.clone())?;
            }
            (JobState::Stopped | JobState::Failed, None) if job.kind == JobKind::Mirror => {
                let disk = self.disk(&job.disk)?;
                self.resume_resync(&disk, job.clone())?;
            }
            (state, None) if job.kind == JobKind::Restore => {
                let disk = self.restored_by(&job).ok_or_else(|| ApiError::job_ended(id, state))?;
                self.go_on_with_restore(&disk, job.clone())?;
            }
            (state, _) => match self.disk_of_work(&job) {
                Some(disk) => self.go_on_with_work(&disk, job.clone())?,
                None => return Err(ApiError::job_ended(id, state)),
            },
        }
        Ok(job.to_api())
    }

    /// The disk that a job restores, if that is not over.
    pub(super) fn restored_by(&self, job: &JobEntry) -> Option<Arc<DiskEntry>> {
        let disk = self.disk(&job.disk).ok().filter(|_| job.kind == JobKind::Restore)?;
        let is_under_way = locked(&disk.restore).is_some();
        is_under_way.then_some(disk)
    }

    fn snapshot_of(&self, job: &JobEntry) -> Option<(Arc<DiskEntry>, Arc<SnapshotEntry>)> {
        let disk = self.disk(&job.disk).ok()?;
        let snapshot = disk.snapshot(job.snapshot.as_ref()?)?;
        Some((disk, snapshot))
    }
}
