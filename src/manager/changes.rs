//! Dirty bitmaps and bookmarks: what a disk keeps of moments whose content is gone, and what changed since them.
//!
//! What always holds:
//! - A dirty bitmap is removed after the records have forgotten its version or bookmark. They forget it after it was
//!   merged into the next newer one.
//! - A bookmark is in the records from the moment on in which its snapshot is not.
//! - A table that cannot be saved or taken up is said to be lost; it never stops a disk from being served.

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::control::api::{Bookmark, BookmarkState, SnapshotState};
use crate::control::timestamp::Timestamp;
use crate::control::{ApiError, ErrorCode, SnapshotRef};
use crate::door::{Disk, DiskFacts};
use crate::manager::Manager;
use crate::manager::entry::{DiskEntry, SnapshotEntry, locked};
use crate::manager::recording;
use crate::store::{BookmarkRecord, ChangedRecord, DiskRecord, SnapshotRecord};

/// Bookmarks with what is known now of their tables.
pub(crate) fn with_tables(bookmarks: &[BookmarkRecord], facts: &DiskFacts) -> Vec<BookmarkRecord> {
    let changed = |id| recording::of_changed(facts.mark(id).and_then(|mark| mark.changed.as_ref()));
    bookmarks.iter().map(|b| BookmarkRecord { changed: changed(b.id), ..b.clone() }).collect()
}

/// All versions and bookmarks of a record that may have dirty bitmaps.
pub(crate) fn ids_of_changes(record: &DiskRecord) -> impl Iterator<Item = Uuid> + '_ {
    let frozen = record.snapshots.iter().map(|s| s.id).chain(record.bookmarks.iter().map(|b| b.id));
    frozen.chain([record.live])
}

/// Puts into the record what a clean stop has saved.
pub(crate) fn seal_changes(record: &mut DiskRecord, saved: &BTreeMap<Uuid, Result<Uuid, String>>) {
    let seal = |id: Uuid, changed: &mut Option<ChangedRecord>| {
        if let (Some(changed), Some(saved)) = (changed, saved.get(&id)) {
            *changed = ChangedRecord { saved: saved.as_ref().ok().copied(), lost: saved.as_ref().err().cloned() };
        }
    };
    seal(record.live, &mut record.live_changed);
    record.snapshots.iter_mut().for_each(|s| seal(s.id, &mut s.changed));
    record.bookmarks.iter_mut().for_each(|b| seal(b.id, &mut b.changed));
}

impl Manager {
    /// What becomes of the mark of a snapshot that was on its way out when its content was lost. Its files are let go with
    /// the record.
    pub(crate) fn settle_mark(disk: &Disk, gone: &SnapshotRecord, bookmarks: &mut Vec<BookmarkRecord>) {
        match disk.facts().mark(gone.id) {
            Some(mark) if gone.leaves_bookmark() => {
                bookmarks.push(recording::of_bookmark(gone, mark));
                bookmarks.sort_by_key(|b| b.began);
            }
            _ => disk.forget_mark(gone.id),
        }
    }

    /// Removes the dirty bitmap of a version or bookmark that the records have forgotten, and that of the live version if
    /// nothing is left since which anybody could ask.
    pub(crate) fn remove_changes_of_gone(&self, disk: &DiskEntry, id: Uuid) {
        self.remove_changed_table(id);
        let facts = disk.facts();
        if facts.live().changed.is_none() {
            self.remove_changed_table(facts.live().id);
        }
    }

    pub(crate) fn all_bookmarks(&self) -> Vec<Bookmark> {
        self.all_disks().iter().flat_map(|disk| disk.bookmarks_to_api()).collect()
    }

    pub(crate) fn bookmark(&self, reference: &SnapshotRef) -> Result<Bookmark, ApiError> {
        let found = self.disk(&reference.disk).ok().map(|disk| disk.bookmarks_to_api());
        let found = found.into_iter().flatten().find(|b| b.name == reference.name);
        found.ok_or_else(|| self.no_bookmark(reference))
    }

    pub(crate) fn no_bookmark(&self, reference: &SnapshotRef) -> ApiError {
        let error = ApiError::new(ErrorCode::BookmarkNotFound, format!("there is no bookmark {reference}"));
        match self.disk(&reference.disk).is_ok_and(|disk| disk.snapshot(&reference.name).is_some()) {
            true => error.with_action(format!("{reference} is a snapshot: see 'halfsilver snapshot show {reference}'")),
            false => error,
        }
    }
}

impl DiskEntry {
    /// The bookmark that a snapshot has become, if it has: it is a mark of the disk, and not a version any more.
    pub(crate) fn bookmark_of(entry: &SnapshotEntry, facts: &DiskFacts) -> Option<BookmarkRecord> {
        let record = locked(&entry.record).clone();
        let mark = facts.mark(entry.id).filter(|_| record.leaves_bookmark() && facts.position(entry.id).is_none())?;
        Some(recording::of_bookmark(&record, mark))
    }

    /// Its bookmarks, also those that are still in the list of snapshots because their deletion is not quite over.
    pub(crate) fn bookmarks(&self, facts: &DiskFacts) -> Vec<BookmarkRecord> {
        let mut bookmarks = with_tables(&locked(&self.bookmarks), facts);
        let more: Vec<_> = self.snapshots().iter().filter_map(|entry| DiskEntry::bookmark_of(entry, facts)).collect();
        bookmarks.extend(more.into_iter().filter(|more| !locked(&self.bookmarks).iter().any(|b| b.id == more.id)));
        bookmarks.sort_by_key(|b| b.began);
        bookmarks
    }

    fn bookmarks_to_api(&self) -> Vec<Bookmark> {
        let facts = self.facts();
        let of = |b: BookmarkRecord| self.bookmark_to_api(b, &facts);
        self.bookmarks(&facts).into_iter().filter_map(of).collect()
    }

    fn bookmark_to_api(&self, record: BookmarkRecord, facts: &DiskFacts) -> Option<Bookmark> {
        // What counts is whether it can be said what has changed since.
        let lost = self.disk.changes(record.id, None).err().map(|e| e.to_string());
        let geometry = &facts.geometry;
        Some(Bookmark {
            id: record.id,
            group: record.group,
            disk: self.name.get(),
            name: record.name.parse().ok()?,
            state: if lost.is_some() { BookmarkState::Lost } else { BookmarkState::Kept },
            reason: lost,
            epoch: record.ended,
            block_size: geometry.block_bytes,
            size_bytes: record.size_bytes,
            created_at: Timestamp::from_unix_ms(record.created_ms),
            quiesced_at: record.quiesced_ms.map(Timestamp::from_unix_ms),
        })
    }

    /// There is no such snapshot; but there may be a bookmark of that name.
    pub(crate) fn no_snapshot(&self, reference: &SnapshotRef) -> ApiError {
        let error = ApiError::snapshot_not_found(reference);
        match self.bookmarks(&self.facts()).iter().any(|b| b.name == reference.name.as_str()) {
            true => error.with_action(format!(
                "{reference} is a bookmark: see 'halfsilver bookmark show {reference}' and 'bookmark delete'"
            )),
            false => error,
        }
    }

    /// The moment of that name: a snapshot's or a bookmark's. One that is being deleted is still one.
    pub(crate) fn moment(&self, reference: &SnapshotRef) -> Result<Uuid, ApiError> {
        let facts = self.facts();
        if let Some(entry) = self.snapshot(&reference.name) {
            if entry.state(&facts) == SnapshotState::Draining {
                let message = format!("snapshot {reference} is still draining");
                return Err(ApiError::new(ErrorCode::SnapshotBusy, message)
                    .with_action("try again when it is quiesced; 'snapshot create --wait' returns then"));
            }
            if let Some(reason) = entry.unreadable(&facts) {
                let message = format!("snapshot {reference} is broken: {reason}");
                return Err(ApiError::new(ErrorCode::SnapshotBroken, message));
            }
            return Ok(entry.id);
        }
        let found = self.bookmarks(&facts).into_iter().find(|b| b.name == reference.name.as_str());
        found.map(|b| b.id).ok_or_else(|| ApiError::snapshot_not_found(reference))
    }
}
