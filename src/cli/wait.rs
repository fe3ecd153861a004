//! Waiting, for every command that can: until what was asked for can be used, or cannot any more, or for too long.
//!
//! What always holds: there is one loop. What is waited for is looked at once at least; who gives up says how far it is, and
//! how to go on. What is begun goes on in the daemon whatever becomes of the command.

use std::thread::sleep;
use std::time::{Duration, Instant};

use super::CliError;
use super::client::Client;
use super::output::{Output, Progress, duration, size, text};
use super::pages::job_fields;
use crate::control::api::{Job, JobState};

/// How often a command looks, at first and later.
const FIRST_INTERVAL: Duration = Duration::from_millis(10);
const INTERVAL: Duration = Duration::from_millis(200);

/// Whether a command waits, and how long at most.
#[derive(Clone, Copy)]
pub(super) struct Patience {
    pub(super) wait: bool,
    pub(super) most: Option<Duration>,
}

impl Patience {
    /// For a query or body, if the daemon is to wait no longer either.
    pub(super) fn timeout_ms(self) -> Option<u64> {
        self.most.map(|most| u64::try_from(most.as_millis()).unwrap_or(u64::MAX))
    }
}

/// How far something is that is waited for.
pub(super) enum Far {
    /// It needs no more waiting.
    Over,
    /// It is copied by this job, or this was to be done first.
    Job(Job),
    /// It is somewhere, as said by this sentence.
    At(String),
}

/// A wait: what for, how long, and what to say about it.
pub(super) struct Wait<'a> {
    client: &'a Client,
    progress: Progress,
    what: String,
    waits: bool,
    /// How long in all, from when the command was begun.
    most: Option<Duration>,
    until: Option<Instant>,
    /// What shows how it goes on.
    see: String,
}

impl<'a> Wait<'a> {
    /// Begins: the time that the first request takes counts as well. `see` is the command that shows how it goes on.
    pub(super) fn begin(what: String, see: String, patience: Patience, client: &'a Client) -> Self {
        let most = patience.most.filter(|_| patience.wait);
        let until = most.and_then(|most| Instant::now().checked_add(most));
        client.answer_until(until);
        let progress = Progress::start(what.clone());
        Self { client, progress, what, waits: patience.wait, most, until, see }
    }

    /// Looks until there is nothing more to wait for. Returns what was seen last, and an error if time was up before.
    pub(super) fn look<T>(
        &self,
        mut look: impl FnMut(&Client) -> Result<(T, Far), CliError>,
    ) -> Result<(T, Result<(), CliError>), CliError> {
        let mut pause = FIRST_INTERVAL;
        loop {
            let (seen, far) = look(self.client)?;
            if let Far::Over = far {
                return Ok((seen, Ok(())));
            }
            if let Far::Job(job) = &far {
                self.progress.show(job.done_bytes, job.total_bytes, job.estimated_seconds);
            }
            let left = self.until.map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok((seen, Err(self.too_long(&far))));
            }
            sleep(left.map_or(pause, |left| left.min(pause)));
            pause = (pause * 2).min(INTERVAL);
        }
    }

    /// Shows a job, if it is waited for as it ended; an error if it does not come to its end by itself.
    pub(super) fn show_job(self, mut job: Job, output: &Output) -> Result<(), CliError> {
        let mut in_time = Ok(());
        if self.waits {
            (job, in_time) = self.look(|client| {
                let job: Job = client.get(&format!("/v1/jobs/{}", job.id))?;
                let far = if job.state == JobState::Running { Far::Job(job.clone()) } else { Far::Over };
                Ok((job, far))
            })?;
        }
        drop(self);
        output.show(&job, job_fields)?;
        in_time?;
        refuse_ended(&job)
    }

    fn too_long(&self, far: &Far) -> CliError {
        let most = duration(self.most.map_or(0, |most| most.as_secs()));
        let (what, see) = (&self.what, &self.see);
        CliError::Failed(match far {
            Far::Over => format!("{what}: not done within {most}"),
            Far::At(far) => format!("{what}: not done within {most}: {far}; it goes on, see: {see}"),
            Far::Job(job) => {
                let left = job.estimated_seconds.map_or_else(String::new, |left| format!(", {} left", duration(left)));
                let (id, percent, total) = (job.id, job.percent, size(job.total_bytes));
                format!(
                    "{what}: not done within {most}: job {id} is at {percent}% of {total}{left}; it goes on, wait for \
                     the rest of it: halfsilver job wait {id}"
                )
            }
        })
    }
}

/// The newest of the jobs that are meant.
pub(super) fn newest_job(client: &Client, wanted: impl Fn(&Job) -> bool) -> Result<Option<Job>, CliError> {
    let jobs: Vec<Job> = client.get("/v1/jobs")?;
    Ok(jobs.into_iter().filter(wanted).max_by_key(|job| job.id))
}

/// An error if the job will not come to its end by itself.
pub(super) fn refuse_ended(job: &Job) -> Result<(), CliError> {
    let Job { id, reason, .. } = job;
    let because = reason.as_ref().map_or_else(String::new, |reason| format!(": {}", text(Some(reason))));
    match job.state {
        JobState::Running | JobState::Done => Ok(()),
        JobState::Stopped => {
            Err(CliError::Failed(format!("job {id} is stopped{because}; resume it: halfsilver job resume {id}")))
        }
        JobState::Failed => Err(CliError::Failed(format!(
            "job {id} failed{because}; mend that and go on with it: halfsilver job resume {id}"
        ))),
    }
}
