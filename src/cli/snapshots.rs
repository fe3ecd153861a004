//! The commands for snapshots: taken, listed, cut over, deleted.

use std::path::{Path, PathBuf};

use hyper::{Method, StatusCode};
use serde_json::json;
use uuid::Uuid;

use super::CliError;
use super::args::{PageArgs, SnapshotCommand, SnapshotCreateArgs};
use super::changes;
use super::client::{Client, query_of};
use super::lists;
use super::output::{Output, table, text};
use super::pages::{snapshot_fields, snapshot_table};
use super::wait::{Far, Patience, Wait, newest_job, refuse_ended};
use crate::control::SnapshotRef;
use crate::control::api::{
    CreateSnapshots, DeleteGroupOptions, DeleteSnapshotOptions, DeletionState, GroupDeletion, Job, JobState, Snapshot,
    SnapshotList, SnapshotState,
};

/// Runs one command; relative paths start at `directory`.
pub(super) fn run(
    command: SnapshotCommand,
    client: &Client,
    output: &Output,
    directory: &Path,
) -> Result<(), CliError> {
    match command {
        SnapshotCommand::Create(args) => create(args, client, output, directory),
        SnapshotCommand::List { disk, state, group, strategy, name, page: PageArgs { limit, after } } => {
            let after = after.map(|after| after.to_string());
            let query = SnapshotList { disk, state, group, strategy, name, limit, after };
            lists::show("/v1/snapshots", &query, client, output, snapshot_table)
        }
        SnapshotCommand::Show { snapshot } => {
            let snapshot: Snapshot = client.get(&format!("/v1/snapshots/{snapshot}"))?;
            output.show(&snapshot, snapshot_fields)
        }
        SnapshotCommand::Diff { from, to } => {
            changes::diff(&format!("/v1/snapshots/{from}"), to.as_ref(), client, output)
        }
        SnapshotCommand::Cutover { snapshot, wait, limit } => cut_over(&snapshot, limit.patience(wait), client, output),
        SnapshotCommand::Delete { snapshot, group, force, keep_image, keep_bookmark, wait, limit } => {
            let patience = limit.patience(wait);
            let wait_timeout_ms = patience.timeout_ms();
            match (snapshot, group) {
                (_, Some(group)) => {
                    let options = DeleteGroupOptions { group, force, keep_bookmark, wait_timeout_ms };
                    delete_group(options, patience, client, output)
                }
                (Some(snapshot), None) => {
                    let options = DeleteSnapshotOptions { force, keep_image, keep_bookmark, wait_timeout_ms };
                    delete(&snapshot, options, patience, client, output)
                }
                (None, None) => Err(CliError::Usage("name a snapshot, or a group with --group".to_owned())),
            }
        }
    }
}

fn create(args: SnapshotCreateArgs, client: &Client, output: &Output, directory: &Path) -> Result<(), CliError> {
    let SnapshotCreateArgs { name, disks, strategy, layout, writers, socket, image, wait, limit } = args;
    let patience = limit.patience(wait);
    let absolute = |path: Option<PathBuf>| path.map(|path| directory.join(path));
    let request = CreateSnapshots {
        name: name.to_string(),
        disks: disks.iter().map(ToString::to_string).collect(),
        strategy,
        layout,
        writers,
        socket: absolute(socket),
        image: absolute(image),
        wait: false,
        wait_timeout_ms: None,
    };
    // The daemon would refuse the same; what is wrong with the arguments alone is a usage error.
    request.validate().map_err(CliError::of_arguments)?;

    let see = "halfsilver snapshot list --state draining".to_owned();
    let wait = Wait::begin(format!("snapshot {name}"), see, patience, client);
    let mut snapshots: Vec<Snapshot> = client.put(Method::POST, "/v1/snapshots", &request)?.json()?;
    let mut in_time = Ok(());
    if patience.wait {
        (snapshots, in_time) = quiesced(snapshots, &wait)?;
    }
    drop(wait);
    match &snapshots[..] {
        [snapshot] => output.show(snapshot, snapshot_fields)?,
        snapshots => output.show(snapshots, snapshot_table)?,
    }
    in_time?;
    snapshots.iter().try_for_each(|snapshot| refuse_unusable(snapshot, patience.wait))
}

fn cut_over(snapshot: &SnapshotRef, patience: Patience, client: &Client, output: &Output) -> Result<(), CliError> {
    let see = format!("halfsilver snapshot show {snapshot}");
    let wait = Wait::begin(format!("cutover of {snapshot}"), see, patience, client);
    let mut moved: Vec<Snapshot> = vec![client.post(&format!("/v1/snapshots/{snapshot}/cutover"))?];
    let mut in_time = Ok(());
    if patience.wait {
        (moved, in_time) = quiesced(moved, &wait)?;
    }
    drop(wait);
    let moved = moved.remove(0);
    output.show(&moved, snapshot_fields)?;
    in_time?;
    refuse_unusable(&moved, patience.wait)
}

/// Waits until none of the snapshots drains any more.
fn quiesced(mut snapshots: Vec<Snapshot>, wait: &Wait) -> Result<(Vec<Snapshot>, Result<(), CliError>), CliError> {
    wait.look(|client| {
        for snapshot in snapshots.iter_mut().filter(|snapshot| snapshot.state == SnapshotState::Draining) {
            let reference = snapshot.reference();
            let latest: Option<Snapshot> = client.find(&format!("/v1/snapshots/{reference}"))?;
            let gone = || CliError::Failed(format!("snapshot {reference} was deleted meanwhile; take another"));
            *snapshot = latest.filter(|latest| latest.id == snapshot.id).ok_or_else(gone)?;
        }
        let far = match snapshots.iter().find(|snapshot| snapshot.state == SnapshotState::Draining) {
            None => Far::Over,
            Some(snapshot) => Far::At(still_draining(snapshot)),
        };
        Ok((snapshots.clone(), far))
    })
}

fn still_draining(snapshot: &Snapshot) -> String {
    let reference = snapshot.reference();
    match (&snapshot.reason, snapshot.old_frontends) {
        (Some(reason), _) => format!("{reference} is draining, {}", text(Some(reason))),
        (None, 0) => format!("{reference} is draining, requests of before the cut still run"),
        (None, frontends) => format!("{reference} is draining, {frontends} frontends still write it"),
    }
}

/// An error if nobody can read the snapshot, or will be able to.
fn refuse_unusable(snapshot: &Snapshot, awaited: bool) -> Result<(), CliError> {
    let (reference, reason) = (snapshot.reference(), text(snapshot.reason.as_ref()));
    match (snapshot.state, &snapshot.reason) {
        (SnapshotState::Broken, _) => {
            Err(CliError::Failed(format!("snapshot {reference} is broken: {reason}; delete it and take another")))
        }
        (SnapshotState::Quiesced, Some(_)) if awaited => Err(CliError::Failed(format!(
            "snapshot {reference} is whole, and has no socket: {reason}; mend that, or delete it and take another"
        ))),
        (SnapshotState::Folding | SnapshotState::Deleting, _) if awaited => {
            Err(CliError::Failed(format!("snapshot {reference} is being deleted; take another")))
        }
        _ => Ok(()),
    }
}

fn delete(
    snapshot: &SnapshotRef,
    options: DeleteSnapshotOptions,
    patience: Patience,
    client: &Client,
    output: &Output,
) -> Result<(), CliError> {
    let DeleteSnapshotOptions { keep_image, keep_bookmark, .. } = options;
    let path = format!("/v1/snapshots/{snapshot}");
    let wait = Wait::begin(
        format!("deletion of {snapshot}"),
        format!("halfsilver snapshot show {snapshot}"),
        patience,
        client,
    );
    let answer = client.delete(&format!("{path}?{}", query_of(&options)))?;
    if answer.status == StatusCode::ACCEPTED {
        let started: Snapshot = answer.json()?;
        if !patience.wait {
            return output.show(&started, |started| format!("{} {}\n", started.reference(), started.state));
        }
        let (_, in_time) = wait.look(|client| Ok(((), going(snapshot, Some(started.id), client)?)))?;
        in_time?;
    }
    drop(wait);
    let kept = match (keep_image, keep_bookmark) {
        (false, false) => "",
        (true, false) => ", its image is kept",
        (false, true) => ", a bookmark is kept",
        (true, true) => ", its image and a bookmark are kept",
    };
    let deleted = json!({ "disk": snapshot.disk, "name": snapshot.name, "state": "deleted" });
    output.show(&deleted, |_| format!("{snapshot} deleted{kept}\n"))
}

/// How far a deletion is; an error when it does not come to its end by itself.
fn going(snapshot: &SnapshotRef, id: Option<Uuid>, client: &Client) -> Result<Far, CliError> {
    let of_this = |job: &Job| job.disk == snapshot.disk && job.snapshot.as_ref() == Some(&snapshot.name);
    // Before the snapshot: when it is gone, so is its job.
    let job = newest_job(client, of_this)?;
    let latest: Option<Snapshot> = client.find(&format!("/v1/snapshots/{snapshot}"))?;
    let Some(latest) = latest.filter(|latest| id.is_none_or(|id| latest.id == id)) else { return Ok(Far::Over) };
    match (latest.state, job.filter(|job| job.state != JobState::Done)) {
        (SnapshotState::Broken, _) => {
            let reason = text(latest.reason.as_ref());
            Err(CliError::Failed(format!("snapshot {snapshot} broke: {reason}; see the daemon's log")))
        }
        (_, Some(job)) => {
            refuse_ended(&job)?;
            Ok(Far::Job(job))
        }
        (state, None) => Ok(Far::At(format!("{snapshot} is {state}"))),
    }
}

fn delete_group(
    options: DeleteGroupOptions,
    patience: Patience,
    client: &Client,
    output: &Output,
) -> Result<(), CliError> {
    let group = options.group;
    let see = format!("halfsilver snapshot list --group {group}");
    let wait = Wait::begin(format!("deletion of group {group}"), see, patience, client);
    let mut all: Vec<GroupDeletion> = client.delete(&format!("/v1/snapshots?{}", query_of(&options)))?.json()?;
    let mut ended = Ok(());
    if patience.wait {
        ended = wait.look(|client| Ok(((), rest_of(&mut all, client)?))).and_then(|((), in_time)| in_time);
    }
    drop(wait);
    output.show(&all, |all| {
        let row = |each: &GroupDeletion| {
            let why = each.problem.as_ref().map(|problem| &problem.detail);
            [text(Some(&each.snapshot)), each.state.to_string(), text(why)]
        };
        table(["SNAPSHOT", "STATE", "PROBLEM"], all.iter().map(row).collect())
    })?;
    ended?;
    match all.iter().find_map(|each| each.problem.as_ref()) {
        Some(problem) => Err(CliError::Failed(format!("{}; {}", problem.detail, problem.action))),
        None => Ok(()),
    }
}

/// How far those are that were begun.
fn rest_of(all: &mut [GroupDeletion], client: &Client) -> Result<Far, CliError> {
    for each in all.iter_mut() {
        if matches!(each.state, DeletionState::Deleted | DeletionState::Refused) {
            continue;
        }
        let snapshot: SnapshotRef = each.snapshot.parse().map_err(|error| CliError::Failed(format!("{error}")))?;
        match going(&snapshot, None, client)? {
            Far::Over => each.state = DeletionState::Deleted,
            far => return Ok(far),
        }
    }
    Ok(Far::Over)
}
