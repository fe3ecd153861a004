//! `disk restore`: takes a disk back, and waits for the job if that is wanted.

use std::thread::sleep;

use hyper::Method;

use super::CliError;
use super::client::Client;
use super::commands::{WAIT_INTERVAL, refuse_ended};
use super::output::{Output, Progress};
use super::pages::job_fields;
use crate::control::Name;
use crate::control::api::{Job, JobPatch, JobState, RestoreDisk, VolumeSource};

/// The disk shows what it is restored to when this returns.
pub(super) fn restore(
    disk: &Name,
    from: &VolumeSource,
    (force, pace, wait): (bool, JobPatch, bool),
    client: &Client,
    output: &Output,
) -> Result<(), CliError> {
    let progress = Progress::start(format!("restoring {disk} from {from}"));
    let (delay_ms, bytes_per_second) = (pace.delay_ms.unwrap_or(0), pace.bytes_per_second.unwrap_or(0));
    let request = RestoreDisk { from: from.to_string(), force, delay_ms, bytes_per_second };
    let mut job: Job = client.put(Method::POST, &format!("/v1/disks/{disk}/restore"), &request)?.json()?;
    while wait && job.state == JobState::Running {
        progress.show(job.done_bytes, job.total_bytes, job.estimated_seconds);
        sleep(WAIT_INTERVAL);
        job = client.get(&format!("/v1/jobs/{}", job.id))?;
    }
    drop(progress);
    output.show(&job, job_fields)?;
    refuse_ended(&job)
}
