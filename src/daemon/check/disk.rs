//! One disk, as `check` tells of it: what was decided, in words.

use std::path::Path;

use super::{CheckedBookmark, CheckedDisk, CheckedJob, CheckedSnapshot, DiskVerdict, Examination, SnapshotVerdict};
use crate::control::api::DiskConfig;
use crate::door::{LegState, PairFacts};
use crate::manager::planned::advice_on_stranger;
use crate::recovery::{
    Content, Durable, Job, JobKind, LayerUse, LegUse, MirrorRecovery, Recovery, Shutdown, SnapshotFate, TableSource,
    TableUse, Why,
};
use crate::store::{DiskRecord, UnreadableRecord, Work};

const MENDED: &str = "nothing: its other copy is whole, and the next start writes it anew";
const PUT_BACK: &str = "put back what is missing; nothing has been changed";
const PUT_BACK_OR_DELETE: &str =
    "put back what is missing before the next start, or delete the volume: every request on it fails";

/// A disk of which nothing is said yet.
fn unsaid(record: &DiskRecord, config: Option<&DiskConfig>) -> CheckedDisk {
    CheckedDisk {
        name: record.name.clone(),
        path: config.filter(|_| record.volume.is_none()).map(|c| c.path.clone()),
        from: record.volume.as_ref().or(record.stood_on.as_ref()).map(|volume| volume.from.clone()),
        independent: record.stood_on.is_some(),
        disabled: record.disabled,
        ended: String::new(),
        verdict: DiskVerdict::NotServed,
        reason: None,
        action: None,
        snapshots: Vec::new(),
        bookmarks: Vec::new(),
        jobs: Vec::new(),
    }
}

/// A disk whose record cannot be read.
pub(super) fn unreadable(name: &str, why: &UnreadableRecord) -> CheckedDisk {
    CheckedDisk {
        name: name.to_owned(),
        path: None,
        from: None,
        independent: false,
        disabled: false,
        ended: String::new(),
        verdict: DiskVerdict::NotServed,
        reason: Some(format!("its record cannot be read: {why}")),
        action: Some("see to it that it can; until then all its files stay, and others are served".to_owned()),
        snapshots: Vec::new(),
        bookmarks: Vec::new(),
        jobs: Vec::new(),
    }
}

/// A disk whose name or configuration says nothing.
pub(super) fn not_understood(record: &DiskRecord) -> CheckedDisk {
    let fate =
        |reason: &Option<String>| reason.clone().map_or(SnapshotFate::Waits, |r| SnapshotFate::Broken(Why::Said(r)));
    CheckedDisk {
        reason: Some("its name or configuration cannot be understood".to_owned()),
        action: Some("put a good copy of records.redb back".to_owned()),
        snapshots: record.snapshots.iter().map(|s| snapshot(record, &s.name, fate(&s.broken), true)).collect(),
        ..unsaid(record, None)
    }
}

/// What was decided of a disk, and beside it what was found on the way.
pub(super) fn tell(of: &mut Examination, config: &DiskConfig, recovery: &Recovery) -> CheckedDisk {
    let record = &recovery.record;
    let mut checked = unsaid(record, Some(config));
    let is_unserved = recovery.why_unserved().is_some();
    // Of an image that is not there nobody knows whether it was changed.
    let is_there = of.host.look(&config.path).is_ok();
    let shutdown = match recovery.shutdown {
        Shutdown::Changed if is_unserved && !is_there => Shutdown::Clean,
        shutdown => shutdown,
    };
    ended(shutdown).clone_into(&mut checked.ended);
    checked.snapshots = recovery
        .snapshots()
        .map(|(s, fate)| {
            let fate = match fate {
                SnapshotFate::Broken(Why::DiskChanged) if shutdown == Shutdown::Clean => SnapshotFate::Waits,
                fate => fate,
            };
            snapshot(record, &s.name, fate, is_unserved)
        })
        .collect();
    checked.bookmarks = bookmarks(recovery);
    checked.jobs = recovery.jobs().into_iter().map(|job| to_job(&record.name, job)).collect();
    match &recovery.disk {
        Content::Whole => {
            checked.verdict = DiskVerdict::Served;
            if recovery.shutdown == Shutdown::Changed {
                checked.reason =
                    Some("its image was changed since the last stop; it is served as it is now".to_owned());
            }
        }
        Content::AsFlushed => {
            checked.verdict = DiskVerdict::ServedAsFlushed;
            checked.reason = Some("what was acknowledged after the last flush may be missing".to_owned());
        }
        Content::Hollow(why) => {
            let action = if record.volume.is_some() { PUT_BACK_OR_DELETE } else { PUT_BACK };
            (checked.reason, checked.action) = (Some(why.to_string()), Some(action.to_owned()));
        }
        Content::Unserved(why) => {
            let action = match why.is_stranger() {
                true => advice_on_stranger(&record.name),
                false => PUT_BACK.to_owned(),
            };
            (checked.reason, checked.action) = (Some(why.to_string()), Some(action));
        }
    }
    findings(of, recovery);
    checked
}

fn ended(shutdown: Shutdown) -> &'static str {
    match shutdown {
        Shutdown::Clean => "a clean stop",
        Shutdown::Killed => "a kill in this boot",
        Shutdown::PowerCut => "a power cut, or a kill before the last boot",
        Shutdown::Changed => "a clean stop, but its image was changed since",
    }
}

fn snapshot(disk: &DiskRecord, name: &str, fate: SnapshotFate, is_unserved: bool) -> CheckedSnapshot {
    let (verdict, why) = match fate {
        SnapshotFate::Kept => (SnapshotVerdict::Kept, None),
        SnapshotFate::Deleting | SnapshotFate::Gone => (SnapshotVerdict::Deleting, None),
        SnapshotFate::Broken(why) => (SnapshotVerdict::Broken, Some(why)),
        SnapshotFate::Waits => (SnapshotVerdict::Waits, None),
    };
    let leaves_bookmark = disk.snapshots.iter().any(|s| s.name == name && s.leaves_bookmark());
    CheckedSnapshot {
        snapshot: format!("{}@{name}", disk.name),
        verdict,
        leaves_bookmark,
        action: why.as_ref().map(|why| why.advice().to_owned()),
        reason: why.as_ref().map(Why::to_string),
        // While its disk is not served nothing happens to a snapshot.
        for_good: why.filter(|why| why.is_for_good() && !is_unserved).map(|why| why.in_record()),
    }
}

fn to_job(disk: &str, Job { kind, is_stopped }: Job) -> CheckedJob {
    let (kind, snapshot) = match kind {
        JobKind::Deletion { name, folds } => (if folds { "fold" } else { "merge" }, Some(format!("{disk}@{name}"))),
        JobKind::Restore => ("restore", None),
        JobKind::Work(Work::Complete) => ("migrate", None),
        JobKind::Work(Work::Update) => ("update", None),
        JobKind::Resync => ("mirror", None),
    };
    CheckedJob { kind, snapshot, stopped: is_stopped }
}

/// Since which bookmarks it would be known what changed. What is not costs a backup that copies everything, never a byte.
fn bookmarks(recovery: &Recovery) -> Vec<CheckedBookmark> {
    let record = &recovery.record;
    let of_versions = recovery.versions.iter().map(|v| (v.began, v.changed.as_ref()));
    let of_bookmarks = record.bookmarks.iter().zip(&recovery.bookmarks).map(|(b, changed)| (b.began, changed.as_ref()));
    let mut markers: Vec<_> = of_versions.chain(of_bookmarks).collect();
    markers.sort_by_key(|(began, _)| *began);
    let lost = |since: u64| {
        markers.iter().filter(|(began, _)| *began > since).find_map(|(_, changed)| match changed {
            None => Some("nothing was noted".to_owned()),
            Some(Err(why)) => Some(why.to_string()),
            Some(Ok(_)) => None,
        })
    };
    let of_bookmark = |b: &crate::store::BookmarkRecord| CheckedBookmark {
        bookmark: format!("{}@{}", record.name, b.name),
        lost: lost(b.began),
    };
    record.bookmarks.iter().map(of_bookmark).collect()
}

/// What is damaged or behind, and costs nothing of what is served.
fn findings(of: &mut Examination, recovery: &Recovery) {
    let (record, tables) = (&recovery.record, of.places.tables().clone());
    if let Some(mirror) = &recovery.mirror {
        let bitmap = record.mirror.as_ref().map(|m| tables.log(m.bitmap)).unwrap_or_default();
        tell_legs(of, &record.name, mirror, &bitmap);
    }
    if let Some(Err(why)) = &recovery.discards {
        let action = "nothing: some space is given back later than it could be";
        let what = format!("discards of disk {} that were put off are forgotten: {why}", record.name);
        of.problem(&tables.saved(record.id), what, action);
    }
    let place_of = |id, table: &TableUse| table.durable.unwrap_or(Durable::Log).place(&tables, id);
    for version in &recovery.versions {
        let (image, table, is_log) = match &version.layer {
            Ok(LayerUse::Log(image, table)) => (image, table, true),
            Ok(LayerUse::Saved(image, table)) => (image, table, false),
            Ok(LayerUse::Base | LayerUse::Full(_)) | Err(_) => continue,
        };
        if let Some(torn) = image.pack.map(|pack| pack.facts.torn).filter(|&torn| torn > 0) {
            let writes = if torn == 1 { "a write".to_owned() } else { format!("{torn} writes") };
            let what = format!("{writes} to it had not arrived as a whole: their blocks show what was there before");
            of.note(&image.path, what, "nothing, unless its storage is known to lose what was flushed");
        }
        if let Some(damage) = &table.mended {
            of.problem(&place_of(version.id, table), damage.to_string(), MENDED);
        }
        if let (true, TableSource::Committed(Some(why))) = (is_log, &table.source) {
            let what = format!("the log's newest table is lost: {why}");
            of.problem(&image.path, what, "put it back before the next start, which takes what was flushed last");
        }
    }
    let of_versions = recovery.versions.iter().map(|v| (v.id, v.changed.as_ref()));
    let changes =
        of_versions.chain(record.bookmarks.iter().map(|b| b.id).zip(recovery.bookmarks.iter().map(Option::as_ref)));
    for (id, changed) in changes {
        if let Some(Err(why @ Why::Table(_))) = changed {
            let place =
                if recovery.shutdown == Shutdown::Clean { tables.saved_changes(id) } else { tables.changed(id) };
            let what = format!("it is not known any more what was written to {}: {why}", record.name);
            of.problem(&place, what, "nothing: the next incremental backup copies everything");
        }
    }
}

fn tell_legs(of: &mut Examination, disk: &str, mirror: &MirrorRecovery, bitmap: &Path) {
    let regions = mirror.facts.as_ref().map_or(0, |facts| facts.regions);
    for (path, leg) in &mirror.legs {
        match leg {
            LegUse::Unused(why) => {
                let action = "put it back, or add another leg with 'halfsilver disk mirror'";
                of.problem(path, format!("a leg of disk {disk} is not used: {why}"), action);
            }
            LegUse::InUse(LegState::Failed(reason)) => {
                let what = format!("this leg of disk {disk} has failed: {reason}");
                of.problem(path, what, "replace it with 'halfsilver disk mirror'");
            }
            LegUse::InUse(LegState::Resynchronising) => {
                let what = format!("this leg of disk {disk} is behind in {}", count_regions(regions));
                of.note(path, what, "nothing: the next start goes on");
            }
            LegUse::Forgotten => {
                let what = format!("it is no leg of disk {disk} any more: the snapshot that had it is lost, and goes");
                of.note(path, what, "nothing: the file stays");
            }
            LegUse::InUse(LegState::InSync | LegState::Split) | LegUse::Held => {}
        }
    }
    let Some(PairFacts { legs, damaged, .. }) = &mirror.facts else { return };
    if !damaged.is_empty() {
        let what = format!("{} are damaged; their regions are copied anew", count(damaged.len(), "range"));
        of.problem(bitmap, what, "nothing: the next start takes them as different");
    }
    let are_both = legs.iter().filter(|(_, state)| *state == LegState::InSync).count() == 2;
    if let (true, Some((path, _))) = (are_both && regions > 0, mirror.legs.last()) {
        let what = format!("the legs of disk {disk} may differ in {}", count_regions(regions));
        of.note(path, what, "nothing: the next start copies them");
    }
}

fn count(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

fn count_regions(regions: u64) -> String {
    count(usize::try_from(regions).unwrap_or(usize::MAX), "region")
}
