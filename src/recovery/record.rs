//! A disk's record as a list of versions, and what cannot be true of it.

use std::path::PathBuf;

use uuid::Uuid;

use super::Role;
use crate::store::{ChangedRecord, DeletionRecord, DiskRecord, Fingerprint, Layout};

/// A version as it is remembered.
pub(super) struct Remembered {
    pub(super) id: Uuid,
    pub(super) role: Role,
    pub(super) began: u64,
    /// Its size in bytes.
    pub(super) size_bytes: u64,
    /// Where its layer is; nowhere if that is the disk's full image.
    pub(super) image: Option<PathBuf>,
    pub(super) layout: Layout,
    pub(super) owns_all: bool,
    pub(super) splits: bool,
    /// The seal of its table at a clean stop.
    pub(super) saved_table: Option<Uuid>,
    /// How its image looked then.
    pub(super) saved: Option<Fingerprint>,
    pub(super) changed: Option<ChangedRecord>,
}

/// The versions of a record, oldest first.
pub(super) fn versions_of(record: &DiskRecord) -> Vec<Remembered> {
    let live = Remembered {
        id: record.live,
        role: Role::Live,
        began: record.live_began,
        size_bytes: record.size_bytes,
        owns_all: record.live_log.is_none(),
        image: record.live_log.clone(),
        layout: record.live_layout,
        splits: record.live_splits,
        saved_table: record.live_saved_table,
        saved: record.live_saved,
        changed: record.live_changed.clone(),
    };
    let frozen = record.snapshots.iter().enumerate().map(|(at, s)| Remembered {
        id: s.id,
        role: Role::Frozen(at),
        began: s.began,
        size_bytes: s.size_bytes,
        image: Some(s.image.clone()),
        layout: s.layout,
        owns_all: s.owns_all,
        splits: s.splits,
        saved_table: s.saved_table,
        saved: s.saved,
        changed: s.changed.clone(),
    });
    // What a volume stands on has everything that it does not have itself; no request acts there.
    let origin = record.volume.as_ref().map(|volume| Remembered {
        id: volume.origin,
        role: Role::Origin,
        began: 0,
        size_bytes: volume.size_bytes,
        image: None,
        layout: Layout::Sparse,
        owns_all: true,
        splits: false,
        saved_table: None,
        saved: None,
        changed: None,
    });
    let mut versions: Vec<_> = origin.into_iter().chain(frozen).chain([live]).collect();
    doubt_splits(&mut versions, record);
    versions
}

/// The versions of the newest segment: those that a split has not parted from the live one.
pub(super) fn take_newest_segment(versions: &mut Vec<Remembered>) -> Vec<Remembered> {
    let first = versions.iter().rposition(|v| v.splits).unwrap_or(0);
    versions.split_off(first)
}

/// A cut that was prepared: whether it came to be or not, there may be bytes of the new live version. The snapshot, of which
/// nobody was told, goes.
pub(super) fn settle_pending(record: &mut DiskRecord) {
    let newest = record.snapshots.iter().flat_map(|s| [s.began, s.ended]).chain([record.live_began]).max();
    if let Some(pending) = record.snapshots.last_mut().filter(|s| s.ended == 0) {
        pending.ended = newest.unwrap_or(0) + 1;
        pending.deletion = Some(DeletionRecord::default());
        record.live_began = pending.ended + 1;
    }
}

/// A request from before a split that was on its way when the daemon was killed may have reached one of the legs only. It was
/// noted for the older version alone: nobody knew of the newer one yet.
fn doubt_splits(versions: &mut [Remembered], record: &DiskRecord) {
    for newer in 1..versions.len() {
        let has_drained = match versions[newer - 1].role {
            Role::Frozen(at) => record.snapshots[at].quiesced_ms.is_some(),
            Role::Origin | Role::Live => false,
        };
        let version = &mut versions[newer];
        if let Some(changed) = version.changed.as_mut().filter(|_| version.splits && !has_drained) {
            changed.lost.get_or_insert_with(|| super::Why::ChangesSplit.to_string());
        }
    }
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
        if last_ended.is_some_and(|ended| snapshot.began <= ended) {
            wrong.push(format!("snapshot {name} began in epoch {}, before the one below it ended", snapshot.began));
        }
        last_ended = Some(snapshot.ended);
        let newer_bytes = record.snapshots.get(i + 1).map_or(record.size_bytes, |newer| newer.size_bytes);
        if snapshot.size_bytes > newer_bytes {
            wrong.push(format!("snapshot {name} is larger than what came after it"));
        }
    }
    if last_ended.is_some_and(|ended| record.live_began <= ended && ended != 0) {
        wrong.push("the live version began before its newest snapshot ended".to_owned());
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
    let mut versions = versions_of(record);
    if versions.iter().any(|v| v.owns_all && v.layout == Layout::Packed) {
        wrong.push("a full image of it is packed".to_owned());
    }
    while !versions.is_empty() {
        // None at all is what a snapshot has that is lost: it is by itself, and says why it is broken.
        match take_newest_segment(&mut versions).iter().filter(|v| v.owns_all).count() {
            0 | 1 => {}
            n => wrong.push(format!("{n} of its versions that belong together have a full image, not one")),
        }
    }
    wrong
}

/// Every name that a record gives, and to what.
pub(super) fn names_of(record: &DiskRecord) -> Vec<(Uuid, String)> {
    let disk = &record.name;
    let of_disk = [(record.id, format!("disk {disk}")), (record.live, format!("the live version of {disk}"))];
    let snapshots = record.snapshots.iter().map(|s| (s.id, format!("{disk}@{}", s.name)));
    let bookmarks = record.bookmarks.iter().map(|b| (b.id, format!("bookmark {disk}@{}", b.name)));
    let volume = record.volume.iter().chain(&record.stood_on).map(|v| (v.origin, format!("the origin of {disk}")));
    let restore = record.restore.iter().map(|r| (r.id, format!("the restore of {disk}")));
    let bitmap = record.mirror.iter().map(|m| (m.bitmap, format!("the bitmap of {disk}")));
    of_disk.into_iter().chain(snapshots).chain(bookmarks).chain(volume).chain(restore).chain(bitmap).collect()
}
