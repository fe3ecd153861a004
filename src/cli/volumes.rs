//! The commands for volumes.

use std::path::{Path, PathBuf};

use hyper::Method;
use serde_json::json;

use super::CliError;
use super::args::VolumeCommand;
use super::changes;
use super::client::Client;
use super::commands::{refuse_ended, wait_for_job};
use super::output::{Output, Spinner};
use super::pages::{disk_fields, job_fields, volume_fields, volume_table};
use crate::control::api::{CreateVolume, Disk, Job, JobPatch, Volume, VolumeStatus};

/// Runs one command; relative paths start at `directory`.
pub(super) fn run(command: VolumeCommand, client: &Client, output: &Output, directory: &Path) -> Result<(), CliError> {
    match command {
        VolumeCommand::Create { name, from, socket, image, block_size } => {
            let absolute = |path: Option<PathBuf>| path.map(|path| directory.join(path));
            let (socket, image) = (absolute(socket), absolute(image));
            let request = CreateVolume { name: name.to_string(), from: from.to_string(), socket, image, block_size };
            // The daemon would refuse the same; what is wrong with the arguments alone is a usage error.
            request.validate().map_err(|error| CliError::Usage(error.to_string()))?;
            let spinner = Spinner::start(format!("making volume {name}"));
            let volume: Volume = client.put(Method::POST, "/v1/volumes", &request)?.json()?;
            drop(spinner);
            output.show(&volume, volume_fields)
        }
        VolumeCommand::List => {
            let volumes: Vec<Volume> = client.get("/v1/volumes")?;
            output.show(&volumes, |volumes| volume_table(volumes))
        }
        VolumeCommand::Show { volume } => {
            let volume: Volume = client.get(&format!("/v1/volumes/{volume}"))?;
            output.show(&volume, volume_fields)
        }
        VolumeCommand::Diff { volume, to } => {
            changes::diff(&format!("/v1/volumes/{volume}"), to.as_ref(), client, output)
        }
        VolumeCommand::Map { volume, text } => changes::map(volume.as_str(), text, client),
        VolumeCommand::Status { volume } => {
            let status: VolumeStatus = client.get(&format!("/v1/volumes/{volume}/status"))?;
            output.show(&status, changes::volume_status_fields)
        }
        VolumeCommand::Complete { volume, pace, wait } => {
            let job: Job = client.post(&format!("/v1/volumes/{volume}/complete?{}", query_of(pace.patch())))?;
            show_job(job, wait.then(|| format!("completing {volume}")), client, output)
        }
        VolumeCommand::Update { volume, force, pace, wait } => {
            let query = query_of(pace.patch());
            let job: Job = client.post(&format!("/v1/volumes/{volume}/update?force={force}&{query}"))?;
            show_job(job, wait.then(|| format!("updating {volume}")), client, output)
        }
        VolumeCommand::Promote { volume } => {
            let disk: Disk = client.post(&format!("/v1/volumes/{volume}/promote"))?;
            output.show(&disk, disk_fields)
        }
        VolumeCommand::Disable { volume, force } => {
            let volume: Volume = client.post(&format!("/v1/volumes/{volume}/disable?force={force}"))?;
            output.show(&volume, volume_fields)
        }
        VolumeCommand::Enable { volume, fresh } => {
            let volume: Volume = client.post(&format!("/v1/volumes/{volume}/enable?fresh={fresh}"))?;
            output.show(&volume, volume_fields)
        }
        VolumeCommand::Delete { volume, force } => {
            client.delete(&format!("/v1/volumes/{volume}?force={force}"))?;
            output.show(&json!({ "name": volume, "state": "deleted" }), |_| format!("{volume} deleted\n"))
        }
    }
}

/// What of a pace is said, as a query.
fn query_of(JobPatch { delay_ms, bytes_per_second }: JobPatch) -> String {
    let said = [("delay_ms", delay_ms.map(u64::from)), ("bytes_per_second", bytes_per_second)];
    let said: Vec<_> = said.iter().filter_map(|(key, value)| Some(format!("{key}={}", (*value)?))).collect();
    said.join("&")
}

/// Shows a job, when it has ended if it is waited for.
fn show_job(mut job: Job, wait: Option<String>, client: &Client, output: &Output) -> Result<(), CliError> {
    let is_awaited = wait.is_some();
    if let Some(what) = wait {
        job = wait_for_job(job.id, what, client)?;
    }
    output.show(&job, job_fields)?;
    if is_awaited { refuse_ended(&job) } else { Ok(()) }
}
