//! Jobs that run, as the manager holds them.

use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::control::api::{self, JobKind, JobState};
use crate::control::timestamp::Timestamp;
use crate::control::{ApiError, ErrorCode, EventKind, JobDeletion, Notice};
use crate::door::{Outcome, Pace};
use crate::host::Host;
use crate::manager::Manager;
use crate::manager::entry::{DiskEntry, SnapshotEntry, locked};
use crate::registry::Command;

/// How many ended jobs are still listed.
const ENDED_JOBS_MAX: usize = 32;

/// How long a job may take to stop: the copies of one step, on a slow disk.
const STOP_WAIT: Duration = Duration::from_secs(10);

/// A job and how far it is. It is bound to the very disk and snapshot that it works on, whatever their names become.
pub(crate) struct JobEntry {
    pub(crate) id: u64,
    host: Arc<dyn Host>,
    pub(crate) kind: JobKind,
    pub(crate) disk: Arc<DiskEntry>,
    pub(crate) snapshot: Option<Arc<SnapshotEntry>>,
    pub(crate) pace: Arc<Pace>,
    started_at: Timestamp,
    /// When it began to run the last time, and how much was done then.
    running_since: Mutex<(Instant, u64)>,
    state: Mutex<(JobState, Option<String>)>,
    ended: Condvar,
    /// Who or what keeps it from going on, if anything does.
    pub(crate) waits_for: Mutex<Option<String>>,
    /// Whether what it works on goes: then nothing is remembered of its stop.
    is_abandoned: AtomicBool,
}

impl JobEntry {
    pub(crate) fn to_api(&self) -> api::Job {
        let (state, reason) = locked(&self.state).clone();
        let done = self.pace.done_bytes.load(Ordering::Relaxed);
        let total = self.pace.total_bytes.load(Ordering::Relaxed).max(done);
        api::Job {
            id: self.id,
            kind: self.kind,
            disk: self.disk.name.get(),
            snapshot: self.snapshot.as_ref().map(|s| s.name.clone()),
            state,
            reason,
            done_bytes: done,
            total_bytes: total,
            percent: api::Job::percent_of(state, done, total),
            delay_ms: self.pace.delay_ms.load(Ordering::Relaxed),
            bytes_per_second: self.pace.bytes_per_second.load(Ordering::Relaxed),
            started_at: self.started_at,
            waits_for: locked(&self.waits_for).clone(),
            estimated_seconds: (state == JobState::Running).then(|| self.estimate(done)).flatten(),
        }
    }

    fn estimate(&self, done: u64) -> Option<u64> {
        let (since, before) = *locked(&self.running_since);
        let total = self.pace.total_bytes.load(Ordering::Relaxed);
        api::Job::estimate_seconds(done.checked_sub(before)?, total.checked_sub(before)?, self.host.now() - since)
    }

    /// So much was there before it began: what is left is estimated without it.
    pub(crate) fn begins_with(&self, done_bytes: u64) {
        self.pace.done_bytes.store(done_bytes, Ordering::Relaxed);
        *locked(&self.running_since) = (self.host.now(), done_bytes);
    }

    /// It runs again, after it was stopped or has failed.
    pub(crate) fn begin_again(&self) {
        self.is_abandoned.store(false, Ordering::Release);
        self.pace.go_on();
        *locked(&self.running_since) = (self.host.now(), self.pace.done_bytes.load(Ordering::Relaxed));
        *locked(&self.state) = (JobState::Running, None);
    }

    pub(crate) fn state(&self) -> JobState {
        locked(&self.state).0
    }

    /// Whether it works on this disk or volume.
    pub(crate) fn is_on(&self, disk: &DiskEntry) -> bool {
        self.disk.id == disk.id
    }

    /// Whether it works on a disk by copying what it does not own.
    pub(crate) fn is_work(&self) -> bool {
        matches!(self.kind, JobKind::Migrate | JobKind::Update)
    }

    /// Stops it because what it works on goes. Returns whether it has ended in time.
    pub(crate) fn abandon(&self, timeout: Duration) -> bool {
        self.is_abandoned.store(true, Ordering::Release);
        self.pace.stop();
        self.wait(timeout)
    }

    /// Waits until the job has ended, at most for `timeout`. Returns whether it has.
    pub(crate) fn wait(&self, timeout: Duration) -> bool {
        let deadline = self.host.now() + timeout;
        let mut state = locked(&self.state);
        while state.0 == JobState::Running {
            let Some(left) = deadline.checked_duration_since(self.host.now()) else { return false };
            state = self.host.wait(&self.ended, &self.state, state, left);
        }
        true
    }
}

impl Manager {
    /// Enters a new job in the list.
    pub(crate) fn new_job(
        &self,
        kind: JobKind,
        disk: &Arc<DiskEntry>,
        snapshot: Option<&Arc<SnapshotEntry>>,
    ) -> Arc<JobEntry> {
        let id = self.next_job_id();
        let job = Arc::new(JobEntry {
            id,
            host: self.host.clone(),
            kind,
            disk: disk.clone(),
            snapshot: snapshot.cloned(),
            pace: Arc::new(Pace::default()),
            started_at: Timestamp::from_unix_ms(self.host.unix_ms()),
            running_since: Mutex::new((self.host.now(), 0)),
            state: Mutex::new((JobState::Running, None)),
            ended: Condvar::new(),
            waits_for: Mutex::new(None),
            is_abandoned: AtomicBool::new(false),
        });
        let mut jobs = locked(&self.jobs);
        // One that is not done is gone on with by its number, and nothing else.
        let is_over =
            |j: &&Arc<JobEntry>| j.state() == JobState::Done || j.state() == JobState::Failed && !self.has_work_left(j);
        let ended: Vec<u64> = jobs.values().filter(is_over).map(|j| j.id).collect();
        for old in ended.iter().take((ended.len() + 1).saturating_sub(ENDED_JOBS_MAX)) {
            jobs.remove(old);
        }
        jobs.insert(id, job.clone());
        drop(jobs);
        self.bus.publish(Notice::of_disk(EventKind::JobStarted, &disk.name.get()).with_job(id));
        job
    }

    /// Of a job that a user had stopped before this start: it waits to be resumed, and says about how much it has left. That is
    /// counted when it runs.
    pub(crate) fn leave_stopped(&self, job: &Arc<JobEntry>) {
        job.pace.total_bytes.store(left_for(job), Ordering::Relaxed);
        self.end_job(job, JobState::Stopped, None);
    }

    /// Carries a job out on a thread of its own: `run`, then how it ended is told, then `after`. Of a job that somebody
    /// stopped it is remembered, by `mark_stopped` while the disk is claimed, so that no restart goes on with it.
    pub(crate) fn run_job(
        &self,
        thread: &str,
        job: &Arc<JobEntry>,
        run: impl FnOnce(&Manager) -> Result<Outcome, String> + Send + 'static,
        mark_stopped: impl FnOnce() + Send + 'static,
        after: impl FnOnce(&Manager, JobState) + Send + 'static,
    ) {
        let (me, ours) = (self.me.clone(), job.clone());
        let started = self.start_thread(thread, move || {
            let Some(manager) = me.upgrade() else { return };
            // A panic of the work must not leave a job that runs for ever.
            let done = std::panic::catch_unwind(AssertUnwindSafe(|| run(&manager)));
            let done = done.unwrap_or_else(|_| Err("it panicked; see the daemon's log, and report it".to_owned()));
            let (state, reason) = match done {
                Ok(Outcome::Done) => (JobState::Done, None),
                Ok(Outcome::Stopped) if ours.is_abandoned.load(Ordering::Acquire) => (JobState::Stopped, None),
                Ok(Outcome::Stopped) => match manager.claim_for_job(&ours) {
                    None => (JobState::Stopped, Some("the daemon is going down".to_owned())),
                    Some(_claim) => {
                        mark_stopped();
                        let stored = manager.persist(std::slice::from_ref(&ours.disk));
                        let why = stored.err().map(|e| format!("a restart will go on with it: {e}"));
                        (JobState::Stopped, why)
                    }
                },
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
    pub(crate) fn end_job(&self, job: &JobEntry, state: JobState, reason: Option<String>) {
        let kind = match state {
            JobState::Done => EventKind::JobDone,
            JobState::Failed => EventKind::JobFailed,
            JobState::Stopped | JobState::Running => EventKind::JobStopped,
        };
        let notice = Notice::of_disk(kind, &job.disk.name.get()).with_job(job.id);
        *locked(&job.state) = (state, reason.clone());
        job.ended.notify_all();
        self.bus.publish(match reason {
            Some(reason) => notice.because(reason),
            None => notice,
        });
    }

    /// A job, and what it waits for in the engine.
    pub(crate) fn job_to_api(&self, job: &JobEntry) -> api::Job {
        let shown = job.to_api();
        let requests = job.pace.is_waiting().then(|| self.requests_of(&job.disk));
        api::Job { waits_for: shown.waits_for.or(requests), ..shown }
    }

    pub(crate) fn job(&self, id: u64) -> Result<Arc<JobEntry>, ApiError> {
        locked(&self.jobs).get(&id).cloned().ok_or_else(|| ApiError::job_not_found(id))
    }

    pub(crate) fn running_jobs(&self) -> Vec<Arc<JobEntry>> {
        locked(&self.jobs).values().filter(|j| j.state() == JobState::Running).cloned().collect()
    }

    /// The newest job on a disk that is not done.
    pub(crate) fn job_on(&self, disk: &DiskEntry, is_it: impl Fn(&JobEntry) -> bool) -> Option<Arc<JobEntry>> {
        let is_it = |j: &&Arc<JobEntry>| j.is_on(disk) && j.state() != JobState::Done && is_it(j);
        locked(&self.jobs).values().rev().find(is_it).cloned()
    }

    /// Takes the jobs of a disk that is gone off the list.
    pub(crate) fn forget_jobs_of(&self, disk: &DiskEntry) {
        locked(&self.jobs).retain(|_, job| !job.is_on(disk) || job.state() == JobState::Running);
    }

    /// Whether something is left that only this job, which has stopped or failed, goes on with.
    fn has_work_left(&self, job: &JobEntry) -> bool {
        let disk = &job.disk;
        if !self.is_served(disk) {
            return false;
        }
        match job.kind {
            JobKind::Fold | JobKind::Merge => {
                let is_it = |s: &Arc<SnapshotEntry>| job.snapshot.as_ref().is_some_and(|of| Arc::ptr_eq(of, s));
                disk.snapshots().iter().any(is_it)
            }
            JobKind::Migrate | JobKind::Update => locked(&disk.relations).work.is_some(),
            JobKind::Restore => locked(&disk.restore).is_some(),
            JobKind::Mirror => disk.has_leg_behind(),
        }
    }

    /// Stops a job between two blocks, or forgets one that has ended.
    pub(crate) fn stop_job(&self, id: u64) -> Result<JobDeletion, ApiError> {
        let job = self.job(id)?;
        match job.state() {
            JobState::Running => {
                job.pace.stop();
                if !job.wait(STOP_WAIT) {
                    let message =
                        format!("job {id} has not stopped yet: it waits for a block, or for requests in flight");
                    return Err(ApiError::new(ErrorCode::Unavailable, message)
                        .with_action(format!("see 'halfsilver job show {id}': it stops by itself")));
                }
                match job.state() {
                    JobState::Done => Err(ApiError::job_ended(id, JobState::Done)),
                    _ => Ok(JobDeletion::Stopped(job.to_api())),
                }
            }
            JobState::Stopped | JobState::Failed if self.has_work_left(&job) => Err(ApiError::job_unfinished(id)),
            JobState::Stopped | JobState::Done | JobState::Failed => {
                locked(&self.jobs).remove(&id);
                Ok(JobDeletion::Removed)
            }
        }
    }

    /// Goes on with a job that was stopped or has failed.
    pub(crate) fn go_on_with_job(&self, id: u64) -> Result<api::Job, ApiError> {
        let _claimed = self.claim(&Command::ResumeJob { job: id })?;
        let job = self.job(id)?;
        if job.state() == JobState::Running {
            return Ok(job.to_api());
        }
        if !self.has_work_left(&job) {
            return Err(ApiError::job_ended(id, job.state()));
        }
        let disk = job.disk.clone();
        match (job.kind, job.snapshot.clone()) {
            (JobKind::Fold | JobKind::Merge, Some(snapshot)) => {
                self.resume_deletion(&disk, &snapshot, job.clone())?;
            }
            (JobKind::Fold | JobKind::Merge, None) => return Err(ApiError::job_ended(id, job.state())),
            (JobKind::Mirror, _) => self.resume_resync(&disk, job.clone())?,
            (JobKind::Restore, _) => self.go_on_with_restore(&disk, job.clone())?,
            (JobKind::Migrate | JobKind::Update, _) => self.go_on_with_work(&disk, job.clone())?,
        }
        Ok(job.to_api())
    }
}

/// How many bytes a job has to do.
fn left_for(job: &JobEntry) -> u64 {
    let disk = job.disk.facts();
    match job.kind {
        JobKind::Fold | JobKind::Merge => {
            let space = job.snapshot.as_ref().and_then(|snapshot| disk.space_of(snapshot.id));
            space.map_or(0, |version| disk.owned_bytes(version))
        }
        JobKind::Restore => disk.bytes_to_bring_back(),
        JobKind::Migrate | JobKind::Update => disk.bytes_to_fill,
        JobKind::Mirror => disk.legs.iter().map(|leg| leg.left_bytes).sum(),
    }
}
