//! The commands for volumes.

use std::path::{Path, PathBuf};

use hyper::Method;
use serde_json::json;

use super::CliError;
use super::args::{PageArgs, VolumeCommand};
use super::changes;
use super::client::{Client, query_of};
use super::commands::{counts_later, send_patch};
use super::lists;
use super::output::{Output, Spinner};
use super::pages::{disk_fields, volume_fields, volume_table};
use super::wait::{Patience, Wait};
use crate::control::Name;
use crate::control::api::{CreateVolume, Disk, Job, RenameRequest, Volume, VolumeList, VolumeStatus};

/// Runs one command; relative paths start at `directory`.
pub(super) fn run(command: VolumeCommand, client: &Client, output: &Output, directory: &Path) -> Result<(), CliError> {
    match command {
        VolumeCommand::Create { name, from, socket, image, block_size } => {
            let absolute = |path: Option<PathBuf>| path.map(|path| directory.join(path));
            let (socket, image) = (absolute(socket), absolute(image));
            let request = CreateVolume { name: name.to_string(), from: from.to_string(), socket, image, block_size };
            // The daemon would refuse the same; what is wrong with the arguments alone is a usage error.
            request.validate().map_err(CliError::of_arguments)?;
            let spinner = Spinner::start(format!("making volume {name}"));
            let volume: Volume = client.put(Method::POST, "/v1/volumes", &request)?.json()?;
            drop(spinner);
            output.show(&volume, volume_fields)
        }
        VolumeCommand::List { from, state, page: PageArgs { limit, after } } => {
            let query = VolumeList { from, state, limit, after: after.map(String::from) };
            lists::show("/v1/volumes", &query, client, output, volume_table)
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
        VolumeCommand::Set { volume, set } => {
            let patch = set.patch(None);
            let volume: Volume = send_patch(&format!("/v1/volumes/{volume}"), &patch, client)?;
            output.show(&volume, |volume| volume_fields(volume) + &counts_later(&patch, volume.frontends))
        }
        VolumeCommand::Rename { volume, to, force } => {
            let request = RenameRequest { name: to.to_string(), force };
            let volume: Volume = client.put(Method::POST, &format!("/v1/volumes/{volume}/rename"), &request)?.json()?;
            output.show(&volume, volume_fields)
        }
        VolumeCommand::Complete { volume, pace, wait, limit } => {
            let wait = begin(format!("completing {volume}"), &volume, limit.patience(wait), client);
            let job: Job = client.post(&format!("/v1/volumes/{volume}/complete?{}", query_of(&pace.patch())))?;
            wait.show_job(job, output)
        }
        VolumeCommand::Update { volume, force, pace, wait, limit } => {
            let wait = begin(format!("updating {volume}"), &volume, limit.patience(wait), client);
            let query = query_of(&pace.patch());
            let job: Job = client.post(&format!("/v1/volumes/{volume}/update?force={force}&{query}"))?;
            wait.show_job(job, output)
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

fn begin<'a>(what: String, volume: &Name, patience: Patience, client: &'a Client) -> Wait<'a> {
    Wait::begin(what, format!("halfsilver volume status {volume}"), patience, client)
}
