//! What a start would do with the versions of a disk, given what was found of each layer. Pure.
//!
//! The rules are those of `daemon/takeup.rs`, which carries them out.

use std::path::PathBuf;

use uuid::Uuid;

use super::{CheckedSnapshot, SnapshotVerdict};
use crate::daemon::takeup::Trust;
use crate::store::{DiskRecord, Fingerprint, SnapshotRecord};

const CHANGED: &str = "the disk's image was changed while the daemon was not running";
const READS_THROUGH: &str = "a newer snapshot through which it reads is lost";
pub(super) const BROKE: &str = "it broke just before the daemon or the host went down";
const UNFINISHED: &str = "the host went down before all of it was on stable storage";
const DELETE_IT: &str = "delete it and take another";

/// A version as it is recorded; without a snapshot it is the live one, or what a volume stands on.
pub(super) struct Slot {
    pub(super) id: Uuid,
    pub(super) image: PathBuf,
    pub(super) owns_all: bool,
    pub(super) splits: bool,
    pub(super) snapshot: Option<SnapshotRecord>,
    pub(super) saved_table: Option<Uuid>,
    /// How a log looked at the last clean stop.
    pub(super) saved: Option<Fingerprint>,
}

/// Where a version lies in its segment.
#[derive(Clone, Copy)]
pub(super) struct Place {
    /// It has the full image, or a log above it.
    pub(super) is_at_or_above: bool,
    /// It is in the segment of the live version.
    pub(super) is_newest: bool,
}

/// A layer that is all there.
#[derive(Clone, Default)]
pub(super) struct Found {
    /// Why it cannot be vouched for, if its table or its mark says so.
    pub(super) broken: Option<String>,
    /// Only what was flushed last is known.
    pub(super) is_as_flushed: bool,
}

/// A layer that cannot be used.
#[derive(Clone)]
pub(super) struct Lost {
    pub(super) why: String,
    /// Nothing that could be put back would change that.
    pub(super) for_good: bool,
}

/// What a start would do.
pub(super) struct Outcome {
    /// Whether the disk is served only as of the last flush, or why it is not served.
    pub(super) disk: Result<bool, String>,
    /// Oldest first.
    pub(super) snapshots: Vec<CheckedSnapshot>,
}

/// The versions of a record, oldest first.
pub(super) fn slots_of(record: &DiskRecord, path: &std::path::Path) -> Vec<Slot> {
    let live = Slot {
        id: record.live,
        owns_all: record.live_log.is_none(),
        image: record.live_log.clone().unwrap_or_else(|| path.to_owned()),
        splits: record.live_splits,
        snapshot: None,
        saved_table: record.live_saved_table,
        saved: record.live_saved,
    };
    let frozen = record.snapshots.iter().map(|s| Slot {
        id: s.id,
        image: s.image.clone(),
        owns_all: s.owns_all,
        splits: s.splits,
        saved_table: s.saved_table,
        saved: None,
        snapshot: Some(s.clone()),
    });
    let origin = record.volume.as_ref().map(|volume| Slot {
        id: volume.origin,
        owns_all: true,
        image: path.to_owned(),
        splits: false,
        snapshot: None,
        saved_table: None,
        saved: None,
    });
    origin.into_iter().chain(frozen).chain([live]).collect()
}

/// What cannot be true of a record.
pub(super) fn contradictions(record: &DiskRecord) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut last_ended = None;
    for (i, snapshot) in record.snapshots.iter().enumerate() {
        let name = &snapshot.name;
        if record.snapshots[..i].iter().any(|s| s.name == *name) {
            wrong.push(format!("two snapshots are named {name}"));
        }
        let is_pending = snapshot.ended == 0 && i + 1 == record.snapshots.len();
        if snapshot.ended < snapshot.began && !is_pending {
            wrong.push(format!("snapshot {name} ended in epoch {} before it began", snapshot.ended));
        }
        for (i, bookmark) in record.bookmarks.iter().enumerate() {
            let name = &bookmark.name;
            let others = record.bookmarks[..i].iter().map(|b| &b.name).chain(record.snapshots.iter().map(|s| &s.name));
            if others.into_iter().any(|other| other == name) {
                wrong.push(format!("bookmark {name} has the name of another snapshot or bookmark"));
            }
            if bookmark.ended < bookmark.began || bookmark.ended >= record.live_began {
                wrong.push(format!("bookmark {name} is not from before the live version"));
            }
        }
        if record.volume.is_some() && record.stood_on.is_some() {
            wrong.push("it stands on a snapshot, and is independent".to_owned());
        }
        if record.disabled && !record.is_volume() {
            wrong.push("it is disabled, and no volume".to_owned());
        }
        if record.work.is_some() && record.volume.is_none() {
            wrong.push("it is being completed, and stands on nothing".to_owned());
        }
        if last_ended.is_some_and(|ended| snapshot.began <= ended) {
            wrong.push(format!("snapshot {name} began in epoch {}, before the one below it ended", snapshot.began));
        }
        last_ended = Some(snapshot.ended);
    }
    if last_ended.is_some_and(|ended| record.live_began <= ended && ended != 0) {
        wrong.push("the live version began before its newest snapshot ended".to_owned());
    }
    let mut slots = slots_of(record, std::path::Path::new(""));
    while !slots.is_empty() {
        let first = slots.iter().rposition(|s| s.splits).unwrap_or(0);
        match slots.split_off(first).iter().filter(|s| s.owns_all).count() {
            1 => {}
            n => wrong.push(format!("{n} of its versions that belong together have a full image, not one")),
        }
    }
    wrong
}

/// Decides. `open` says what was found of a layer; it is asked only about those that a start would open.
pub(super) fn what_a_start_would_do(
    record: &DiskRecord,
    path: &std::path::Path,
    trust: Trust,
    mut open: impl FnMut(&Slot, Place) -> Result<Found, Lost>,
) -> Outcome {
    let mut slots = slots_of(record, path);
    let mut outcome = Outcome { disk: Ok(trust == Trust::PowerCut), snapshots: Vec::new() };
    let mut is_newest = true;
    while !slots.is_empty() {
        let first = slots.iter().rposition(|s| s.splits).unwrap_or(0);
        let segment = slots.split_off(first);
        let pivot = segment.iter().position(|s| s.owns_all);
        let lost_at_once = |why: &str| Some(Lost { why: why.to_owned(), for_good: false });
        let mut lost = match (pivot, trust) {
            (None, _) => lost_at_once("its records name no full image"),
            (_, Trust::Changed) => lost_at_once(CHANGED),
            _ => None,
        };
        for (i, slot) in segment.into_iter().enumerate().rev() {
            let place = Place { is_at_or_above: pivot.is_some_and(|p| i >= p), is_newest };
            let needed = is_newest && place.is_at_or_above;
            let found = match &lost {
                Some(lost) if !(needed && slot.snapshot.is_none() && slot.owns_all) => Err(lost.clone()),
                _ => open(&slot, place),
            };
            match &found {
                Err(e) if needed => {
                    let what = "its newest content is in a log that cannot be taken up";
                    outcome.disk = outcome.disk.and_then(|_| Err(format!("{what}: {}", e.why)));
                }
                Err(e) => {
                    lost.get_or_insert_with(|| Lost { why: READS_THROUGH.to_owned(), for_good: e.for_good });
                }
                Ok(found) if needed => outcome.disk = outcome.disk.map(|flushed| flushed || found.is_as_flushed),
                Ok(_) => {}
            }
            if let Some(snapshot) = slot.snapshot {
                outcome.snapshots.push(of_snapshot(&record.name, &snapshot, trust, found));
            }
        }
        is_newest = false;
    }
    outcome.snapshots.reverse();
    if outcome.disk.is_err() {
        outcome.snapshots.iter_mut().for_each(wait);
    }
    outcome
}

/// While its disk is not served nothing happens to a snapshot.
pub(super) fn wait(snapshot: &mut CheckedSnapshot) {
    if snapshot.verdict != SnapshotVerdict::Broken {
        snapshot.verdict = SnapshotVerdict::Waits;
    }
    snapshot.for_good = false;
}

fn of_snapshot(disk: &str, record: &SnapshotRecord, trust: Trust, found: Result<Found, Lost>) -> CheckedSnapshot {
    // The cut of one that is pending was never announced.
    let goes = record.deleting || record.ended == 0;
    let unfinished = trust == Trust::PowerCut && record.quiesced_ms.is_none() && !goes;
    let trouble = match (&record.broken, found) {
        (Some(reason), _) => Some(Lost { why: reason.clone(), for_good: false }),
        (None, Err(lost)) => Some(lost),
        (None, Ok(Found { broken: Some(why), .. })) => Some(Lost { why, for_good: true }),
        (None, Ok(_)) if unfinished => Some(Lost { why: UNFINISHED.to_owned(), for_good: true }),
        (None, Ok(_)) => None,
    };
    let verdict = match &trouble {
        _ if goes => SnapshotVerdict::Deleting,
        Some(_) => SnapshotVerdict::Broken,
        None => SnapshotVerdict::Kept,
    };
    let is_broken = verdict == SnapshotVerdict::Broken;
    let action = match &trouble {
        Some(lost) if is_broken && (lost.for_good || record.broken.is_some()) => Some(DELETE_IT.to_owned()),
        Some(_) if is_broken => Some(format!("put back what is missing before the next start, or {DELETE_IT}")),
        _ => None,
    };
    CheckedSnapshot {
        snapshot: format!("{disk}@{}", record.name),
        verdict,
        for_good: is_broken && trouble.as_ref().is_some_and(|lost| lost.for_good),
        reason: trouble.filter(|_| is_broken).map(|lost| lost.why),
        action,
    }
}
