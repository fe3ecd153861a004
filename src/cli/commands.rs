//! What each client command asks and how it shows the answer.

use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use hyper::{Method, StatusCode};
use serde::de::DeserializeOwned;
use serde_json::json;

use super::CliError;
use super::args::{ClientCommand, DiskAddArgs, DiskCommand, JobCommand, PageArgs};
use super::changes;
use super::client::{Client, query_value};
use super::lists;
use super::output::{Output, Spinner};
use super::pages::{disk_fields, disk_table, event_line, job_fields, job_table, status_page};
use super::wait::{Patience, Wait};
use crate::control::api::{Difference, Disk, DiskList, DiskPatch, Job, JobList, RenameRequest, ResizeRequest, Status};
use crate::daemon::config::{DiskSpec, RawDisk};

/// How often `status --watch` looks.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// Clears a terminal and goes to its top left corner.
const CLEAR: &[u8] = b"\x1b[H\x1b[2J";

/// Runs one command; relative paths start at `directory`.
pub(super) fn run(command: ClientCommand, client: &Client, output: &Output, directory: &Path) -> Result<(), CliError> {
    match command {
        ClientCommand::Disk(command) => disk(command, client, output, directory),
        ClientCommand::Snapshot(command) => super::snapshots::run(command, client, output, directory),
        ClientCommand::Bookmark(command) => changes::bookmark(command, client, output),
        ClientCommand::Volume(command) => super::volumes::run(command, client, output, directory),
        ClientCommand::Job(command) => job(command, client, output),
        ClientCommand::Status { watch } => status(watch, client, output),
        ClientCommand::Events => client.follow(|event| output.follow(&event, event_line)),
    }
}

fn disk(command: DiskCommand, client: &Client, output: &Output, directory: &Path) -> Result<(), CliError> {
    match command {
        DiskCommand::List { state, name, page: PageArgs { limit, after } } => {
            let query = DiskList { state, name, limit, after: after.map(String::from) };
            lists::show("/v1/disks", &query, client, output, disk_table)
        }
        DiskCommand::Show { disk } => {
            let disk: Disk = client.get(&format!("/v1/disks/{disk}"))?;
            output.show(&disk, disk_fields)
        }
        DiskCommand::Add(args) => {
            let DiskSpec { name, config } = disk_spec(*args, directory).map_err(CliError::Usage)?;
            let disk: Disk = client.put(Method::PUT, &format!("/v1/disks/{name}"), &config)?.json()?;
            output.show(&disk, disk_fields)
        }
        DiskCommand::Set { disk, set, readonly } => {
            let patch = set.patch(readonly);
            let disk: Disk = send_patch(&format!("/v1/disks/{disk}"), &patch, client)?;
            output.show(&disk, |disk| disk_fields(disk) + &counts_later(&patch, disk.frontends))
        }
        DiskCommand::Resize { disk, size } => {
            let path = format!("/v1/disks/{disk}");
            let now: Disk = client.get(&path)?;
            let request = ResizeRequest { size_bytes: size.of(now.size_bytes) };
            let disk: Disk = client.put(Method::PUT, &format!("{path}/size"), &request)?.json()?;
            output.show(&disk, disk_fields)
        }
        DiskCommand::Rename { disk, to, force } => {
            let request = RenameRequest { name: to.to_string(), force };
            let disk: Disk = client.put(Method::POST, &format!("/v1/disks/{disk}/rename"), &request)?.json()?;
            output.show(&disk, disk_fields)
        }
        DiskCommand::Forget { disk } => {
            let _spinner = Spinner::start(format!("forgetting {disk}"));
            client.post_only(&format!("/v1/disks/{disk}/forget"))?;
            output.show(&json!({ "name": disk, "state": "forgotten" }), |_| format!("{disk} forgotten\n"))
        }
        DiskCommand::Accept { disk } => {
            client.post_only(&format!("/v1/disks/{disk}/accept"))?;
            output.show(&json!({ "name": disk, "state": "accepted" }), |_| format!("{disk} accepted\n"))
        }
        DiskCommand::Remove { disk, force } => {
            let spinner = Spinner::start(format!("removing {disk}"));
            client.delete(&format!("/v1/disks/{disk}?force={force}"))?;
            drop(spinner);
            output.show(&json!({ "name": disk, "state": "removed" }), |_| format!("{disk} removed\n"))
        }
        DiskCommand::Mirror { disk, path, wait, limit } => {
            super::mirror::mirror(&disk, &directory.join(path), limit.patience(wait), client, output)
        }
        DiskCommand::Restore { disk, from, force, pace, wait, limit } => {
            super::restore::restore(&disk, &from, (force, pace.patch(), limit.patience(wait)), client, output)
        }
        DiskCommand::Unmirror { disk, leg } => {
            let leg = leg.map(|leg| directory.join(leg));
            let not_utf8 = |leg: &Path| CliError::Usage(format!("{} is not UTF-8", leg.display()));
            let query = match &leg {
                Some(leg) => format!("?leg={}", query_value(leg.to_str().ok_or_else(|| not_utf8(leg))?)),
                None => String::new(),
            };
            let disk: Disk = client.delete(&format!("/v1/disks/{disk}/mirror{query}"))?.json()?;
            output.show(&disk, disk_fields)
        }
    }
}

/// Sends what is to be set.
pub(super) fn send_patch<T: DeserializeOwned>(path: &str, patch: &DiskPatch, client: &Client) -> Result<T, CliError> {
    if *patch == DiskPatch::default() {
        // Volumes are there to be written.
        let can_be_set = |key: &&&str| **key != "readonly" || !path.starts_with("/v1/volumes/");
        let options = DiskPatch::KEYS.iter().filter(can_be_set).map(|key| format!("--{}", Difference::option(key)));
        let options: Vec<String> = options.collect();
        return Err(CliError::Usage(format!("nothing is to be set; give one or more of {}", options.join(", "))));
    }
    patch.check().map_err(CliError::of_arguments)?;
    client.put(Method::PATCH, path, patch)?.json()
}

/// What of a patch a guest that is connected does not see yet.
pub(super) fn counts_later(patch: &DiskPatch, frontends: u32) -> String {
    let said = [
        ("queues", patch.queues.is_some()),
        ("readonly", patch.readonly.is_some()),
        ("serial", patch.serial.is_some()),
    ];
    let said: Vec<_> = said.iter().filter(|(_, is_said)| *is_said).map(|(key, _)| *key).collect();
    match (said.is_empty(), frontends) {
        (true, _) | (_, 0) => String::new(),
        (false, _) => format!("\nfor the next frontend that connects: {}\n", said.join(", ")),
    }
}

/// The disk that `disk add` describes, in either of its two forms.
fn disk_spec(args: DiskAddArgs, directory: &Path) -> Result<DiskSpec, String> {
    let path = |path: Option<PathBuf>| path.map(|path| path.to_str().map(str::to_owned).ok_or(path)).transpose();
    let not_utf8 = |path: PathBuf| format!("{} is not UTF-8, which JSON needs", path.display());
    let mut raw = if args.disk.contains('=') {
        args.disk.parse()?
    } else {
        let mut raw = RawDisk::default();
        raw.set("name", &args.disk)?;
        raw
    };
    let options = [
        ("path", path(args.path).map_err(not_utf8)?),
        ("mirror", path(args.mirror).map_err(not_utf8)?),
        ("socket", path(args.socket).map_err(not_utf8)?),
        ("queues", args.queues),
        ("direct", args.direct),
        ("readonly", args.readonly),
        ("shared", args.shared),
        ("durability", args.durability),
        ("layout", args.layout),
        ("serial", args.serial),
        ("block-size", args.block_size),
        ("logical-block-size", args.logical_block_size),
        ("segments-max", args.segments_max),
        ("discard-granularity", args.discard_granularity),
        ("discard-max", args.discard_max),
        ("background", args.background),
    ];
    for (key, value) in options {
        if let Some(value) = value {
            raw.set(key, &value)?;
        }
    }
    raw.check(directory)
}

fn job(command: JobCommand, client: &Client, output: &Output) -> Result<(), CliError> {
    match command {
        JobCommand::List { kind, state, disk, page: PageArgs { limit, after } } => {
            let query = JobList { kind, state, disk, limit, after: after.map(|id| id.to_string()) };
            lists::show("/v1/jobs", &query, client, output, job_table)
        }
        JobCommand::Show { id } => {
            let job: Job = client.get(&format!("/v1/jobs/{id}"))?;
            output.show(&job, job_fields)
        }
        JobCommand::Set { id, pace } => {
            let patch = pace.patch();
            patch.check_change().map_err(|_| {
                CliError::Usage("nothing is to be set; give one or more of --delay-ms, --limit".to_owned())
            })?;
            let job: Job = client.put(Method::PATCH, &format!("/v1/jobs/{id}"), &patch)?.json()?;
            output.show(&job, job_fields)
        }
        JobCommand::Stop { id } => {
            let spinner = Spinner::start(format!("stopping job {id}"));
            let answer = client.delete(&format!("/v1/jobs/{id}"))?;
            drop(spinner);
            if answer.status == StatusCode::NO_CONTENT {
                let removed = json!({ "id": id, "state": "removed" });
                return output.show(&removed, |_| format!("job {id} had ended, and is off the list\n"));
            }
            output.show(&answer.json::<Job>()?, job_fields)
        }
        JobCommand::Resume { id } => {
            let job: Job = client.post(&format!("/v1/jobs/{id}/resume"))?;
            output.show(&job, job_fields)
        }
        JobCommand::Wait { id, wait_timeout } => {
            let patience = Patience { wait: true, most: wait_timeout };
            let wait = Wait::begin(format!("job {id}"), format!("halfsilver job show {id}"), patience, client);
            let job: Job = client.get(&format!("/v1/jobs/{id}"))?;
            wait.show_job(job, output)
        }
    }
}

fn status(watch: bool, client: &Client, output: &Output) -> Result<(), CliError> {
    loop {
        let status: Status = client.get("/v1/status")?;
        if !watch {
            return output.show(&status, status_page);
        }
        if output.is_screen() {
            super::output::write(CLEAR)?;
        }
        output.follow(&status, status_page)?;
        sleep(WATCH_INTERVAL);
    }
}
