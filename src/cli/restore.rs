//! `disk restore`: takes a disk back, and waits for the job if that is wanted.

use hyper::Method;

use super::CliError;
use super::client::Client;
use super::output::Output;
use super::wait::{Patience, Wait};
use crate::control::Name;
use crate::control::api::{Job, JobPatch, RestoreDisk, VolumeSource};

/// The disk shows what it is restored to when this returns.
pub(super) fn restore(
    disk: &Name,
    from: &VolumeSource,
    (force, pace, patience): (bool, JobPatch, Patience),
    client: &Client,
    output: &Output,
) -> Result<(), CliError> {
    let (delay_ms, bytes_per_second) = (pace.delay_ms.unwrap_or(0), pace.bytes_per_second.unwrap_or(0));
    let request = RestoreDisk { from: from.to_string(), force, delay_ms, bytes_per_second };
    let what = format!("restoring {disk} from {from}");
    let wait = Wait::begin(what, format!("halfsilver disk show {disk}"), patience, client);
    let job: Job = client.put(Method::POST, &format!("/v1/disks/{disk}/restore"), &request)?.json()?;
    wait.show_job(job, output)
}
