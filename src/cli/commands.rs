//! What each client command asks and how it shows the answer.

use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use hyper::{Method, StatusCode};
use serde_json::json;

use super::CliError;
use super::args::{ClientCommand, DiskAddArgs, DiskCommand, JobCommand, SnapshotCommand, SnapshotCreateArgs};
use super::changes;
use super::client::{Client, query_value};
use super::output::{Output, Progress, Spinner, text};
use super::pages::{
    disk_fields, disk_table, event_line, job_fields, job_table, snapshot_fields, snapshot_table, status_page,
};
use crate::control::api::{
    CreateSnapshots, Disk, Job, JobKind, JobState, LegState, MirrorRequest, Snapshot, SnapshotState, Status,
};
use crate::control::{Name, SnapshotRef};
use crate::daemon::config::{DiskSpec, RawDisk};

/// How often `status --watch` looks.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// How often a command looks that waits for a job.
const WAIT_INTERVAL: Duration = Duration::from_millis(200);
/// Clears a terminal and goes to its top left corner.
const CLEAR: &[u8] = b"\x1b[H\x1b[2J";

/// Runs one command; relative paths start at `directory`.
pub(super) fn run(command: ClientCommand, client: &Client, output: &Output, directory: &Path) -> Result<(), CliError> {
    match command {
        ClientCommand::Disk(command) => disk(command, client, output, directory),
        ClientCommand::Snapshot(command) => snapshot(command, client, output, directory),
        ClientCommand::Bookmark(command) => changes::bookmark(command, client, output),
        ClientCommand::Volume(command) => super::volumes::run(command, client, output, directory),
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
            let DiskSpec { name, config } = disk_spec(*args, directory).map_err(CliError::Usage)?;
            let disk: Disk = client.put(Method::PUT, &format!("/v1/disks/{name}"), &config)?.json()?;
            output.show(&disk, disk_fields)
        }
        DiskCommand::Remove { disk, force } => {
            let spinner = Spinner::start(format!("removing {disk}"));
            client.delete(&format!("/v1/disks/{disk}?force={force}"))?;
            drop(spinner);
            output.show(&json!({ "name": disk, "state": "removed" }), |_| format!("{disk} removed\n"))
        }
        DiskCommand::Mirror { disk, path, wait } => mirror(&disk, &directory.join(path), wait, client, output),
        DiskCommand::Restore { disk, from, force, pace, wait } => {
            super::restore::restore(&disk, &from, (force, pace.patch(), wait), client, output)
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

/// Gives a disk a second leg.
fn mirror(name: &Name, leg: &Path, wait: bool, client: &Client, output: &Output) -> Result<(), CliError> {
    let progress = Progress::start(format!("mirroring {name}"));
    let request = MirrorRequest { path: leg.to_owned() };
    let mut disk: Disk = client.put(Method::POST, &format!("/v1/disks/{name}/mirror"), &request)?.json()?;
    if wait {
        disk = in_sync(disk, leg, client, &progress)?;
    }
    drop(progress);
    output.show(&disk, disk_fields)
}

/// Waits until the leg is in sync; fails when it no longer gets there by itself.
fn in_sync(mut disk: Disk, leg: &Path, client: &Client, progress: &Progress) -> Result<Disk, CliError> {
    let name = disk.name.clone();
    let failed = |what: String| Err(CliError::Failed(format!("leg {} of disk {name} {what}", leg.display())));
    loop {
        let Some(found) = disk.legs.iter().find(|other| other.path == leg) else {
            return failed("was let go meanwhile; add it again".to_owned());
        };
        match found.state {
            LegState::InSync => return Ok(disk),
            LegState::Resynchronising => {}
            LegState::Failed | LegState::Split => {
                let reason = text(found.reason.as_ref());
                return failed(format!("is {}: {reason}; see 'halfsilver disk show {name}'", found.state));
            }
        }
        let job = unfinished_job(client, |job| job.kind == JobKind::Mirror && job.disk == name)?;
        job.as_ref().map_or(Ok(()), refuse_ended)?;
        let done = disk.size_bytes.saturating_sub(found.remaining_bytes);
        progress.show(done, disk.size_bytes, job.and_then(|job| job.estimated_seconds));
        sleep(WAIT_INTERVAL);
        disk = client.get(&format!("/v1/disks/{name}"))?;
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
        ("serial", args.serial),
        ("block-size", args.block_size),
        ("background", args.background),
    ];
    for (key, value) in options {
        if let Some(value) = value {
            raw.set(key, &value)?;
        }
    }
    raw.check(directory)
}

fn snapshot(command: SnapshotCommand, client: &Client, output: &Output, directory: &Path) -> Result<(), CliError> {
    match command {
        SnapshotCommand::Create(args) => create(args, client, output, directory),
        SnapshotCommand::List => {
            let snapshots: Vec<Snapshot> = client.get("/v1/snapshots")?;
            output.show(&snapshots, |snapshots| snapshot_table(snapshots))
        }
        SnapshotCommand::Show { snapshot } => {
            let snapshot: Snapshot = client.get(&format!("/v1/snapshots/{snapshot}"))?;
            output.show(&snapshot, snapshot_fields)
        }
        SnapshotCommand::Diff { from, to } => {
            changes::diff(&format!("/v1/snapshots/{from}"), to.as_ref(), client, output)
        }
        SnapshotCommand::Cutover { snapshot, wait } => {
            let spinner = wait.then(|| Spinner::start(format!("waiting for {snapshot} to quiesce")));
            let snapshot: Snapshot = client.post(&format!("/v1/snapshots/{snapshot}/cutover?wait={wait}"))?;
            drop(spinner);
            output.show(&snapshot, snapshot_fields)?;
            refuse_broken(&[snapshot])
        }
        SnapshotCommand::Delete { snapshot, force, keep_image, keep_bookmark, wait } => {
            let query = format!("force={force}&keep-image={keep_image}&keep-bookmark={keep_bookmark}");
            let kept = match (keep_image, keep_bookmark) {
                (false, false) => "",
                (true, false) => ", its image is kept",
                (false, true) => ", a bookmark is kept",
                (true, true) => ", its image and a bookmark are kept",
            };
            if let Some(started) = delete(&snapshot, &query, wait, client)? {
                return output.show(&started, |started| format!("{} {}\n", started.reference(), started.state));
            }
            let deleted = json!({ "disk": snapshot.disk, "name": snapshot.name, "state": "deleted" });
            output.show(&deleted, |_| format!("{snapshot} deleted{kept}\n"))
        }
    }
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
    refuse_broken(&snapshots)
}

fn refuse_broken(snapshots: &[Snapshot]) -> Result<(), CliError> {
    match snapshots.iter().find(|snapshot| snapshot.state == SnapshotState::Broken) {
        Some(broken) => {
            let (snapshot, reason) = (broken.reference(), text(broken.reason.as_ref()));
            Err(CliError::Failed(format!("snapshot {snapshot} is broken: {reason}; delete it and take another")))
        }
        None => Ok(()),
    }
}

/// Deletes a snapshot. Returns it if it is still on its way and nobody wants to wait.
fn delete(snapshot: &SnapshotRef, query: &str, wait: bool, client: &Client) -> Result<Option<Snapshot>, CliError> {
    let path = format!("/v1/snapshots/{snapshot}");
    let progress = Progress::start(format!("deleting {snapshot}"));
    let answer = client.delete(&format!("{path}?{query}"))?;
    if answer.status != StatusCode::ACCEPTED {
        return Ok(None);
    }
    let started: Snapshot = answer.json()?;
    if !wait {
        return Ok(Some(started));
    }
    let of_this = |job: &Job| job.disk == snapshot.disk && job.snapshot.as_ref() == Some(&snapshot.name);
    loop {
        // Before the snapshot: when it is gone, so is its job.
        let job = unfinished_job(client, of_this)?;
        let Some(latest) = client.find::<Snapshot>(&path)?.filter(|latest| latest.id == started.id) else {
            return Ok(None);
        };
        if latest.state == SnapshotState::Broken {
            let reason = text(latest.reason.as_ref());
            return Err(CliError::Failed(format!("snapshot {snapshot} broke: {reason}; see the daemon's log")));
        }
        if let Some(job) = job {
            refuse_ended(&job)?;
            progress.show(job.done_bytes, job.total_bytes, job.estimated_seconds);
        }
        sleep(WAIT_INTERVAL);
    }
}

/// The job that somebody waits for, if it runs or could go on.
fn unfinished_job(client: &Client, wanted: impl Fn(&Job) -> bool) -> Result<Option<Job>, CliError> {
    let jobs: Vec<Job> = client.get("/v1/jobs")?;
    let found = |state| jobs.iter().find(|job| job.state == state && wanted(job));
    Ok(found(JobState::Running).or_else(|| found(JobState::Stopped)).cloned())
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
        JobState::Failed => Err(CliError::Failed(format!("job {id} failed{because}; see the daemon's log"))),
    }
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
        JobCommand::Set { id, pace } => {
            let patch = pace.patch();
            patch.check_change().map_err(|_| CliError::Usage("give --delay-ms, --limit or both".to_owned()))?;
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
        JobCommand::Wait { id } => {
            let job = wait_for_job(id, format!("job {id}"), client)?;
            output.show(&job, job_fields)?;
            refuse_ended(&job)
        }
    }
}

/// Waits until a job has ended, however it ends.
pub(super) fn wait_for_job(id: u64, what: String, client: &Client) -> Result<Job, CliError> {
    let progress = Progress::start(what);
    loop {
        let job: Job = client.get(&format!("/v1/jobs/{id}"))?;
        if job.state != JobState::Running {
            return Ok(job);
        }
        progress.show(job.done_bytes, job.total_bytes, job.estimated_seconds);
        sleep(WAIT_INTERVAL);
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
