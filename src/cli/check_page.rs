//! What `halfsilver check` says to people.

use super::output::text;
use crate::daemon::check::{CheckReport, CheckedDisk, DiskVerdict, Severity, SnapshotVerdict};

/// The whole report: disks with their snapshots, then what else was found, then what was repaired.
pub(super) fn page(report: &CheckReport) -> String {
    let mut page = String::new();
    report.disks.iter().for_each(|disk| disk_lines(&mut page, disk));
    for finding in &report.findings {
        let kind = match finding.severity {
            Severity::Problem => "problem",
            Severity::Note => "note",
        };
        let (path, what) = (finding.path.to_string_lossy(), &finding.what);
        line(&mut page, 0, &format!("{kind}: {path}: {what}"));
        line(&mut page, 1, &format!("what to do: {}", finding.action));
    }
    for repaired in &report.repaired {
        line(&mut page, 0, &format!("repaired: {repaired}"));
    }
    line(&mut page, 0, &verdict(report));
    page
}

/// One line: whether anything is wrong, and how much.
pub(super) fn verdict(report: &CheckReport) -> String {
    if report.ok {
        return "nothing is wrong".to_owned();
    }
    let count = |n: usize, one: &str, more: &str| (n > 0).then(|| format!("{n} {}", if n == 1 { one } else { more }));
    let snapshots = report.disks.iter().flat_map(|disk| &disk.snapshots);
    let parts = [
        count(
            report.disks.iter().filter(|d| d.verdict == DiskVerdict::NotServed).count(),
            "disk cannot be served",
            "disks cannot be served",
        ),
        count(
            snapshots.filter(|s| s.verdict == SnapshotVerdict::Broken).count(),
            "snapshot is broken",
            "snapshots are broken",
        ),
        count(report.findings.iter().filter(|f| f.severity == Severity::Problem).count(), "problem", "problems"),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

fn disk_lines(page: &mut String, disk: &CheckedDisk) {
    let verdict = match disk.verdict {
        DiskVerdict::Served => "would be served whole",
        DiskVerdict::ServedAsFlushed => "would be served as of its last flush",
        DiskVerdict::NotServed => "cannot be served",
    };
    let path = disk.path.as_ref().map_or_else(String::new, |path| format!(" ({})", path.display()));
    let (what, path) = match &disk.from {
        Some(from) if disk.independent => ("independent volume", format!(" (once of {from}){path}")),
        Some(from) => ("volume", format!(" (of {from})")),
        None => ("disk", path),
    };
    let verdict = match (disk.disabled, disk.verdict) {
        (true, DiskVerdict::Served | DiskVerdict::ServedAsFlushed) => format!("is disabled; when enabled it {verdict}"),
        _ => verdict.to_owned(),
    };
    line(page, 0, &format!("{what} {}{path}: {verdict}{}", disk.name, because(disk.reason.as_ref())));
    if !disk.ended.is_empty() {
        line(page, 1, &format!("it ended with {}", disk.ended));
    }
    if let Some(action) = &disk.action {
        line(page, 1, &format!("what to do: {action}"));
    }
    for snapshot in &disk.snapshots {
        let verdict = match snapshot.verdict {
            SnapshotVerdict::Kept => "would be kept",
            SnapshotVerdict::Deleting if snapshot.leaves_bookmark => "its deletion would go on, and leave a bookmark",
            SnapshotVerdict::Tidied if snapshot.leaves_bookmark => "would be deleted, and leave a bookmark",
            SnapshotVerdict::Tidied => "would be deleted",
            SnapshotVerdict::Deleting => "its deletion would go on",
            SnapshotVerdict::Broken => "is broken",
            SnapshotVerdict::Waits => "stays as it is until its disk is served",
        };
        line(page, 1, &format!("{}: {verdict}{}", snapshot.snapshot, because(snapshot.reason.as_ref())));
        if let Some(action) = &snapshot.action {
            line(page, 2, &format!("what to do: {action}"));
        }
    }
    for job in &disk.jobs {
        let what = job.snapshot.as_ref().map_or_else(String::new, |snapshot| format!(" of {snapshot}"));
        let verdict = if job.stopped { "would wait to be resumed" } else { "would go on" };
        line(page, 1, &format!("job {}{what}: {verdict}", job.kind));
    }
    for bookmark in &disk.bookmarks {
        let what = match &bookmark.lost {
            None => "would be kept".to_owned(),
            Some(why) => format!("what changed since is not known, so the next backup copies everything: {why}"),
        };
        line(page, 1, &format!("bookmark {}: {what}", bookmark.bookmark));
    }
}

fn because(reason: Option<&String>) -> String {
    reason.map_or_else(String::new, |reason| format!(": {reason}"))
}

fn line(page: &mut String, depth: usize, what: &str) {
    page.push_str(&"  ".repeat(depth));
    page.push_str(&text(Some(what)));
    page.push('\n');
}
