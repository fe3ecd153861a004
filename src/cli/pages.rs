//! What people see of each thing: one row in a table, or a page of its own.
//!
//! Tables stay compact; everything is on the page. Scripts read the JSON, so words and columns here may change.

use std::path::{Path, PathBuf};

use super::output::{duration, fields, size, table, text};
use crate::control::Event;
use crate::control::api::{
    Claim, Disk, Job, Leg, LegState, RestoreStatus, Settings, Snapshot, Status, Unserved, Volume,
};

pub(super) fn status_page(status: &Status) -> String {
    let Status { state, version, pid, started_at, disks, snapshots, volumes, jobs, claims, unserved, problems } =
        status;
    let mut page = format!("halfsilver {} {state} since {started_at}, pid {pid}\n\n", version.version);
    page.push_str(&disk_table(disks));
    let legs = disks.iter().flat_map(|disk| disk.legs.iter().map(move |leg| (disk, leg)));
    let trouble: Vec<_> = legs.filter(|(_, leg)| leg.state != LegState::InSync).map(leg_of_disk).collect();
    if !trouble.is_empty() {
        page.push('\n');
        page.push_str(&table(["DISK", "LEG", "STATE", "REMAINING", "REASON"], trouble));
    }
    if !snapshots.is_empty() {
        page.push('\n');
        page.push_str(&snapshot_table(snapshots));
    }
    if !volumes.is_empty() {
        page.push('\n');
        page.push_str(&volume_table(volumes));
    }
    if !jobs.is_empty() {
        page.push('\n');
        page.push_str(&job_table(jobs));
    }
    if !unserved.is_empty() {
        let row = |each: &Unserved| [each.name.to_string(), text(Some(&each.reason))];
        page.push('\n');
        page.push_str(&table(["NOT SERVED", "REASON"], unserved.iter().map(row).collect()));
    }
    if !problems.is_empty() {
        let rows = problems.iter().map(|what| [text(Some(what))]);
        page.push('\n');
        page.push_str(&table(["PROBLEM"], rows.collect()));
    }
    if !claims.is_empty() {
        let row = |claim: &Claim| {
            let (operation, entities) = (text(Some(&claim.operation)), text(Some(claim.entities.join(", "))));
            [operation, entities, claim.since.to_string(), text(claim.waits_for.as_ref())]
        };
        page.push('\n');
        page.push_str(&table(["UNDER WAY", "ON", "SINCE", "WAITS FOR"], claims.iter().map(row).collect()));
    }
    page
}

fn place_text(path: Option<&PathBuf>) -> String {
    text(path.map(|path| path.to_string_lossy()))
}

fn path_text(path: &Path) -> String {
    text(Some(path.to_string_lossy()))
}

pub(super) fn disk_table(disks: &[Disk]) -> String {
    let row = |disk: &Disk| {
        let state = disk.state.to_string();
        let (frontends, snapshots) = (disk.frontends.to_string(), disk.snapshots.to_string());
        [disk.name.to_string(), state, size(disk.size_bytes), frontends, snapshots, place_text(disk.socket.as_ref())]
    };
    table(["DISK", "STATE", "SIZE", "FRONTENDS", "SNAPSHOTS", "SOCKET"], disks.iter().map(row).collect())
}

/// How guests see a disk or volume, and how its snapshots are taken.
fn setting_rows(settings: &Settings) -> [(&'static str, String); 8] {
    let Settings { discard_granularity, discard_max, background_bytes, .. } = *settings;
    [
        ("sectors", format!("{} bytes", settings.logical_block_size)),
        ("segments", settings.segments_max.to_string()),
        ("discards", format!("{} or more, up to {}", size(discard_granularity.into()), size(discard_max))),
        ("queues", settings.queues.to_string()),
        ("serial", text(Some(&settings.serial))),
        ("durability", settings.durability.to_string()),
        ("layout", settings.layout.to_string()),
        ("background", if background_bytes == 0 { "off".to_owned() } else { size(background_bytes.into()) }),
    ]
}

pub(super) fn disk_fields(disk: &Disk) -> String {
    let mut rows = vec![
        ("disk", disk.name.to_string()),
        ("id", text(disk.id.map(|id| id.to_string()))),
        ("state", disk.state.to_string()),
        ("reason", text(disk.reason.as_ref())),
        ("path", place_text(disk.path.as_ref())),
        ("socket", place_text(disk.socket.as_ref())),
        ("size", size(disk.size_bytes)),
        ("allocated", size(disk.allocated_bytes)),
        ("block size", size(disk.block_size.into())),
        ("direct", disk.direct.to_string()),
        ("readonly", disk.readonly.to_string()),
        ("shared", disk.shared.to_string()),
        ("frontends", frontends_text(disk)),
        ("epoch", disk.epoch.to_string()),
        ("snapshots", disk.snapshots.to_string()),
    ];
    rows.extend(setting_rows(&disk.settings));
    let mut page = fields(&rows);
    if let Some(RestoreStatus { from, remaining_bytes }) = &disk.restoring {
        let rows = vec![[from.clone(), size(*remaining_bytes)]];
        page.push('\n');
        page.push_str(&table(["RESTORED FROM", "REMAINING"], rows));
    }
    if !disk.legs.is_empty() {
        let rows = disk.legs.iter().map(|leg| leg_of_disk((disk, leg))).map(|[_, row @ ..]| row).collect();
        page.push('\n');
        page.push_str(&table(["LEG", "STATE", "REMAINING", "REASON"], rows));
    }
    page
}

/// How many there are, and in which processes.
fn frontends_text(disk: &Disk) -> String {
    let pids: Vec<String> = disk.frontend_pids.iter().map(u32::to_string).collect();
    match pids.is_empty() {
        true => disk.frontends.to_string(),
        false => format!("{} (process {})", disk.frontends, pids.join(", ")),
    }
}

fn leg_of_disk((disk, leg): (&Disk, &Leg)) -> [String; 5] {
    let (state, reason) = (leg.state.to_string(), text(leg.reason.as_ref()));
    [disk.name.to_string(), path_text(&leg.path), state, size(leg.remaining_bytes), reason]
}

pub(super) fn snapshot_table(snapshots: &[Snapshot]) -> String {
    let row = |snapshot: &Snapshot| {
        let (state, strategy) = (snapshot.state.to_string(), snapshot.strategy.to_string());
        let (owned, total) = (size(snapshot.owned_bytes), size(snapshot.size_bytes));
        let created = snapshot.created_at.to_string();
        [snapshot.reference().to_string(), state, strategy, owned, total, created, path_text(&snapshot.socket)]
    };
    let heading = ["SNAPSHOT", "STATE", "STRATEGY", "OWNED", "SIZE", "CREATED", "SOCKET"];
    table(heading, snapshots.iter().map(row).collect())
}

pub(super) fn snapshot_fields(snapshot: &Snapshot) -> String {
    fields(&[
        ("snapshot", snapshot.reference().to_string()),
        ("id", snapshot.id.to_string()),
        ("group", snapshot.group.to_string()),
        ("state", snapshot.state.to_string()),
        ("reason", text(snapshot.reason.as_ref())),
        ("strategy", snapshot.strategy.to_string()),
        ("durability", snapshot.durability.to_string()),
        ("layout", snapshot.layout.to_string()),
        ("writers", snapshot.writers.to_string()),
        ("epoch", snapshot.epoch.to_string()),
        ("socket", path_text(&snapshot.socket)),
        ("image", text(snapshot.image.as_ref().map(|image| image.to_string_lossy()))),
        ("size", size(snapshot.size_bytes)),
        ("owned", size(snapshot.owned_bytes)),
        ("block size", size(snapshot.block_size.into())),
        ("created", snapshot.created_at.to_string()),
        ("quiesced", text(snapshot.quiesced_at.map(|time| time.to_string()))),
        ("old frontends", snapshot.old_frontends.to_string()),
    ])
}

pub(super) fn volume_table(volumes: &[Volume]) -> String {
    let row = |volume: &Volume| {
        let (owned, total) = (size(volume.owned_bytes), size(volume.size_bytes));
        let (state, frontends) = (volume.state.to_string(), volume.frontends.to_string());
        [volume.name.to_string(), state, volume.from.clone(), owned, total, frontends, path_text(&volume.socket)]
    };
    let heading = ["VOLUME", "STATE", "FROM", "OWNED", "SIZE", "FRONTENDS", "SOCKET"];
    table(heading, volumes.iter().map(row).collect())
}

pub(super) fn volume_fields(volume: &Volume) -> String {
    let mut rows = vec![
        ("volume", volume.name.to_string()),
        ("id", volume.id.to_string()),
        ("from", volume.from.clone()),
        ("from id", volume.from_id.to_string()),
        ("independent", if volume.independent { "yes" } else { "no" }.to_owned()),
        ("state", volume.state.to_string()),
        ("reason", text(volume.reason.as_ref())),
        ("socket", path_text(&volume.socket)),
        ("image", path_text(&volume.image)),
        ("size", size(volume.size_bytes)),
        ("owned", size(volume.owned_bytes)),
        ("block size", size(volume.block_size.into())),
        ("frontends", volume.frontends.to_string()),
        ("snapshots", volume.snapshots.to_string()),
        ("created", volume.created_at.to_string()),
    ];
    rows.extend(setting_rows(&volume.settings));
    fields(&rows)
}

pub(super) fn job_table(jobs: &[Job]) -> String {
    let row = |job: &Job| {
        let (kind, state) = (job.kind.to_string(), job.state.to_string());
        let (done, total) = (size(job.done_bytes), size(job.total_bytes));
        let (percent, left) = (format!("{}%", job.percent), text(job.estimated_seconds.map(duration)));
        [job.id.to_string(), kind, job_target(job), state, done, total, percent, left, format!("{} ms", job.delay_ms)]
    };
    let heading = ["JOB", "KIND", "OF", "STATE", "DONE", "TOTAL", "PERCENT", "LEFT", "DELAY"];
    table(heading, jobs.iter().map(row).collect())
}

pub(super) fn job_fields(job: &Job) -> String {
    fields(&[
        ("job", job.id.to_string()),
        ("kind", job.kind.to_string()),
        ("of", job_target(job)),
        ("state", job.state.to_string()),
        ("reason", text(job.reason.as_ref())),
        ("done", size(job.done_bytes)),
        ("total", size(job.total_bytes)),
        ("percent", format!("{}%", job.percent)),
        ("waits for", text(job.waits_for.as_ref())),
        ("left", text(job.estimated_seconds.map(duration))),
        ("delay", format!("{} ms", job.delay_ms)),
        ("limit", limit_text(job)),
        ("started", job.started_at.to_string()),
    ])
}

fn limit_text(job: &Job) -> String {
    match job.bytes_per_second {
        0 => text(None::<&str>),
        limit => format!("{}/s", size(limit)),
    }
}

fn job_target(job: &Job) -> String {
    job.snapshot.as_ref().map_or_else(|| job.disk.to_string(), |snapshot| format!("{}@{snapshot}", job.disk))
}

pub(super) fn event_line(event: &Event) -> String {
    let mut line = format!("{} {}", event.time, event.event);
    match (&event.disk, &event.snapshot) {
        (Some(disk), Some(snapshot)) => line.push_str(&format!(" {disk}@{snapshot}")),
        (Some(disk), None) => line.push_str(&format!(" {disk}")),
        (None, _) => {}
    }
    if let Some(job) = event.job {
        line.push_str(&format!(" job {job}"));
    }
    if let Some(leg) = &event.leg {
        line.push_str(&format!(" leg {}", path_text(leg)));
    }
    if let Some(reason) = &event.reason {
        line.push_str(&format!(": {}", text(Some(reason))));
    }
    line.push('\n');
    line
}
