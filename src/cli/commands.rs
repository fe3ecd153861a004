//! What each client command asks and how it shows the answer.

use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use hyper::{Method, StatusCode};
use serde_json::json;

use super::CliError;
use super::args::{ClientCommand, DiskAddArgs, DiskCommand, JobCommand, SnapshotCommand, SnapshotCreateArgs};
use super::client::Client;
use super::output::{Output, Spinner, fields, size, table, text};
use crate::control::api::{CreateSnapshots, Disk, Job, JobPatch, Snapshot, SnapshotState, Status};
use crate::control::{Event, SnapshotRef};
use crate::daemon::config::{DiskSpec, RawDisk};

/// How often `status --watch` looks.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// How often `snapshot delete --wait` looks.
const DELETE_INTERVAL: Duration = Duration::from_millis(200);
/// Clears a terminal and goes to its top left corner.
const CLEAR: &[u8] = b"\x1b[H\x1b[2J";

/// Runs one command; relative paths start at `directory`.
pub(super) fn run(command: ClientCommand, client: &Client, output: &Output, directory: &Path) -> Result<(), CliError> {
    match command {
        ClientCommand::Disk(command) => disk(command, client, output, directory),
        ClientCommand::Snapshot(SnapshotCommand::Create(args)) => create(args, client, output, directory),
        ClientCommand::Snapshot(SnapshotCommand::List) => {
            let snapshots: Vec<Snapshot> = client.get("/v1/snapshots")?;
            output.show(&snapshots, |snapshots| snapshot_table(snapshots))
        }
        ClientCommand::Snapshot(SnapshotCommand::Show { snapshot }) => {
            let snapshot: Snapshot = client.get(&format!("/v1/snapshots/{snapshot}"))?;
            output.show(&snapshot, snapshot_fields)
        }
        ClientCommand::Snapshot(SnapshotCommand::Delete { snapshot, force, wait }) => {
            delete(&snapshot, force, wait, client, output)
        }
        ClientCommand::Job(command) => job(command, client, output),
        ClientCommand::Status { watch } => status(watch, client, output),
        ClientCommand::Events => client.follow(|event| output.follow(&event, event_line)),
    }
}

fn disk(command: DiskCommand, client: &Client, output: &Output, directory: &Path) -> Result<(), CliError> {
    match command {
        DiskCommand::List => {
            let disks: Vec<Disk> = client.get("/v1/disks")?;
            output.show(&disks, |disks| disk_table(disks))
        }
        DiskCommand::Show { disk } => {
            let disk: Disk = client.get(&format!("/v1/disks/{disk}"))?;
            output.show(&disk, disk_fields)
        }
        DiskCommand::Add(args) => {
            let DiskSpec { name, config } = disk_spec(args, directory).map_err(CliError::Usage)?;
            let disk: Disk = client.put(Method::PUT, &format!("/v1/disks/{name}"), &config)?.json()?;
            output.show(&disk, disk_fields)
        }
        DiskCommand::Remove { disk, force } => {
            let spinner = Spinner::start(format!("removing {disk}"));
            client.delete(&format!("/v1/disks/{disk}?force={force}"))?;
            drop(spinner);
            output.show(&json!({ "name": disk, "state": "removed" }), |_| format!("{disk} removed\n"))
        }
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
        ("socket", path(args.socket).map_err(not_utf8)?),
        ("queues", args.queues),
        ("direct", args.direct),
        ("readonly", args.readonly),
        ("serial", args.serial),
        ("block-size", args.block_size),
    ];
    for (key, value) in options {
        if let Some(value) = value {
            raw.set(key, &value)?;
        }
    }
    raw.check(directory)
}

fn create(args: SnapshotCreateArgs, client: &Client, output: &Output, directory: &Path) -> Result<(), CliError> {
    let SnapshotCreateArgs { name, disks, strategy, writers, socket, image, wait } = args;
    let absolute = |path: Option<PathBuf>| path.map(|path| directory.join(path));
    let request = CreateSnapshots {
        name: name.to_string(),
        disks: disks.iter().map(ToString::to_string).collect(),
        strategy,
        writers,
        socket: absolute(socket),
        image: absolute(image),
        wait,
    };
    // The daemon would refuse the same; what is wrong with the arguments alone is a usage error.
    request.validate().map_err(|error| CliError::Usage(error.to_string()))?;

    let spinner = wait.then(|| Spinner::start(format!("waiting for {name} to quiesce")));
    let snapshots: Vec<Snapshot> = client.put(Method::POST, "/v1/snapshots", &request)?.json()?;
    drop(spinner);
    match &snapshots[..] {
        [snapshot] => output.show(snapshot, snapshot_fields)?,
        snapshots => output.show(snapshots, snapshot_table)?,
    }
    match snapshots.iter().find(|snapshot| snapshot.state == SnapshotState::Broken) {
        Some(broken) => {
            let (snapshot, reason) = (broken.reference(), text(broken.reason.as_ref()));
            Err(CliError::Failed(format!("snapshot {snapshot} is broken: {reason}; delete it and take another")))
        }
        None => Ok(()),
    }
}

fn delete(snapshot: &SnapshotRef, force: bool, wait: bool, client: &Client, output: &Output) -> Result<(), CliError> {
    let path = format!("/v1/snapshots/{snapshot}");
    let spinner = Spinner::start(format!("deleting {snapshot}"));
    let answer = client.delete(&format!("{path}?force={force}"))?;
    if answer.status == StatusCode::ACCEPTED {
        let started: Snapshot = answer.json()?;
        if !wait {
            drop(spinner);
            return output.show(&started, |started| format!("{} {}\n", started.reference(), started.state));
        }
        while let Some(latest) = client.find::<Snapshot>(&path)?.filter(|latest| latest.id == started.id) {
            if latest.state == SnapshotState::Broken {
                let reason = text(latest.reason.as_ref());
                return Err(CliError::Failed(format!("snapshot {snapshot} broke: {reason}; see the daemon's log")));
            }
            sleep(DELETE_INTERVAL);
        }
    }
    drop(spinner);
    let deleted = json!({ "disk": snapshot.disk, "name": snapshot.name, "state": "deleted" });
    output.show(&deleted, |_| format!("{snapshot} deleted\n"))
}

fn job(command: JobCommand, client: &Client, output: &Output) -> Result<(), CliError> {
    match command {
        JobCommand::List => {
            let jobs: Vec<Job> = client.get("/v1/jobs")?;
            output.show(&jobs, |jobs| job_table(jobs))
        }
        JobCommand::Show { id } => {
            let job: Job = client.get(&format!("/v1/jobs/{id}"))?;
            output.show(&job, job_fields)
        }
        JobCommand::Set { id, delay_ms } => {
            let job: Job = client.put(Method::PATCH, &format!("/v1/jobs/{id}"), &JobPatch { delay_ms })?.json()?;
            output.show(&job, job_fields)
        }
        JobCommand::Stop { id } => {
            let spinner = Spinner::start(format!("stopping job {id}"));
            client.delete(&format!("/v1/jobs/{id}"))?;
            drop(spinner);
            output.show(&json!({ "id": id, "state": "stopped" }), |_| format!("job {id} stopped\n"))
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

fn status_page(status: &Status) -> String {
    let Status { state, version, pid, started_at, disks, snapshots, jobs } = status;
    let mut page = format!("halfsilver {} {state} since {started_at}, pid {pid}\n\n", version.version);
    page.push_str(&disk_table(disks));
    if !snapshots.is_empty() {
        page.push('\n');
        page.push_str(&snapshot_table(snapshots));
    }
    if !jobs.is_empty() {
        page.push('\n');
        page.push_str(&job_table(jobs));
    }
    page
}

fn path_text(path: &Path) -> String {
    text(Some(path.to_string_lossy()))
}

fn disk_table(disks: &[Disk]) -> String {
    let row = |disk: &Disk| {
        let state = disk.state.to_string();
        let (frontends, snapshots) = (disk.frontends.to_string(), disk.snapshots.to_string());
        [disk.name.to_string(), state, size(disk.size_bytes), frontends, snapshots, path_text(&disk.socket)]
    };
    table(["DISK", "STATE", "SIZE", "FRONTENDS", "SNAPSHOTS", "SOCKET"], disks.iter().map(row).collect())
}

fn disk_fields(disk: &Disk) -> String {
    fields(&[
        ("disk", disk.name.to_string()),
        ("id", disk.id.to_string()),
        ("state", disk.state.to_string()),
        ("reason", text(disk.reason.as_ref())),
        ("path", path_text(&disk.path)),
        ("socket", path_text(&disk.socket)),
        ("size", size(disk.size_bytes)),
        ("allocated", size(disk.allocated_bytes)),
        ("block size", size(disk.block_size.into())),
        ("queues", disk.queues.to_string()),
        ("direct", disk.direct.to_string()),
        ("readonly", disk.readonly.to_string()),
        ("serial", text(Some(&disk.serial))),
        ("frontends", disk.frontends.to_string()),
        ("epoch", disk.epoch.to_string()),
        ("snapshots", disk.snapshots.to_string()),
    ])
}

fn snapshot_table(snapshots: &[Snapshot]) -> String {
    let row = |snapshot: &Snapshot| {
        let (state, strategy) = (snapshot.state.to_string(), snapshot.strategy.to_string());
        let (owned, total) = (size(snapshot.owned_bytes), size(snapshot.size_bytes));
        let created = snapshot.created_at.to_string();
        [snapshot.reference().to_string(), state, strategy, owned, total, created, path_text(&snapshot.socket)]
    };
    let heading = ["SNAPSHOT", "STATE", "STRATEGY", "OWNED", "SIZE", "CREATED", "SOCKET"];
    table(heading, snapshots.iter().map(row).collect())
}

fn snapshot_fields(snapshot: &Snapshot) -> String {
    fields(&[
        ("snapshot", snapshot.reference().to_string()),
        ("id", snapshot.id.to_string()),
        ("group", snapshot.group.to_string()),
        ("state", snapshot.state.to_string()),
        ("reason", text(snapshot.reason.as_ref())),
        ("strategy", snapshot.strategy.to_string()),
        ("writers", snapshot.writers.to_string()),
        ("epoch", snapshot.epoch.to_string()),
        ("socket", path_text(&snapshot.socket)),
        ("image", text(snapshot.image.as_ref().map(|image| image.to_string_lossy()))),
        ("size", size(snapshot.size_bytes)),
        ("owned", size(snapshot.owned_bytes)),
        ("block size", size(snapshot.block_size.into())),
        ("created", snapshot.created_at.to_string()),
        ("quiesced", text(snapshot.quiesced_at.map(|time| time.to_string()))),
    ])
}

fn job_table(jobs: &[Job]) -> String {
    let row = |job: &Job| {
        let (kind, state) = (job.kind.to_string(), job.state.to_string());
        let (done, total) = (size(job.done_bytes), size(job.total_bytes));
        [job.id.to_string(), kind, job_target(job), state, done, total, format!("{} ms", job.delay_ms)]
    };
    table(["JOB", "KIND", "OF", "STATE", "DONE", "TOTAL", "DELAY"], jobs.iter().map(row).collect())
}

fn job_fields(job: &Job) -> String {
    fields(&[
        ("job", job.id.to_string()),
        ("kind", job.kind.to_string()),
        ("of", job_target(job)),
        ("state", job.state.to_string()),
        ("reason", text(job.reason.as_ref())),
        ("done", size(job.done_bytes)),
        ("total", size(job.total_bytes)),
        ("delay", format!("{} ms", job.delay_ms)),
        ("started", job.started_at.to_string()),
    ])
}

fn job_target(job: &Job) -> String {
    job.snapshot.as_ref().map_or_else(|| job.disk.to_string(), |snapshot| format!("{}@{snapshot}", job.disk))
}

fn event_line(event: &Event) -> String {
    let mut line = format!("{} {}", event.time, event.event);
    match (&event.disk, &event.snapshot) {
        (Some(disk), Some(snapshot)) => line.push_str(&format!(" {disk}@{snapshot}")),
        (Some(disk), None) => line.push_str(&format!(" {disk}")),
        (None, _) => {}
    }
    if let Some(job) = event.job {
        line.push_str(&format!(" job {job}"));
    }
    if let Some(reason) = &event.reason {
        line.push_str(&format!(": {}", text(Some(reason))));
    }
    line.push('\n');
    line
}
