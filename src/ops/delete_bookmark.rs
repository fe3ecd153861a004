//! Bookmarks are forgotten: what changed since them is not known any more.

use crate::control::{ApiError, EventKind, Notice, SnapshotRef};
use crate::crash;
use crate::manager::entry::locked;
use crate::manager::{Manager, record_error};
use crate::registry::Command;

impl Manager {
    pub(crate) fn remove_bookmark(&self, reference: &SnapshotRef) -> Result<(), ApiError> {
        let _claim = self.claim(&Command::DeleteBookmark { bookmark: reference.clone() })?;
        let disk = self.disk(&reference.disk)?;
        let id = disk.bookmarks(&disk.facts()).iter().find(|b| b.name == reference.name.as_str()).map(|b| b.id);
        let id = id.ok_or_else(|| self.no_bookmark(reference))?;
        // Before the records forget it: a start knows of no other place where it stands.
        disk.disk.hand_on_mark(id);
        crash::point("before a bookmark is forgotten");
        let mut record = disk.to_record();
        record.bookmarks.retain(|b| b.id != id);
        self.records.put(&[&record]).map_err(record_error)?;
        crash::point("after a bookmark was forgotten");
        disk.disk.forget_mark(id);
        locked(&disk.bookmarks).retain(|b| b.id != id);
        // The live version may have nothing to note any more.
        self.persist_later(&disk);
        self.remove_changes_of_gone(&disk, id);
        log::info!("bookmark {reference}: deleted");
        self.bus.publish(Notice::of_snapshot(EventKind::BookmarkDeleted, reference));
        Ok(())
    }
}
