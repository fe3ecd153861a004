//! `disk restore`: takes a disk back, and waits for the job if that is wanted.

use hyper::Method;

use super::CliError;
use super::client::Client;
use super::commands::{refuse_ended, wait_for_job};
use super::output::Output;
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
    let (delay_ms, bytes_per_second) = (pace.delay_ms.unwrap_or(0), pace.bytes_per_second.unwrap_or(0));
    let request = RestoreDisk { from: from.to_string(), force, delay_ms, bytes_per_second };
    let mut job: Job = client.put(Method::POST, &format!("/v1/disks/{disk}/restore"), &request)?.json()?;
    if wait && job.state == JobState::Running {
        job = wait_for_job(job.id, format!("restoring {disk} from {from}"), client)?;
    }
    output.show(&job, job_fields)?;
    refuse_ended(&job)
}
