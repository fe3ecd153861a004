//! Bookmarks are forgotten: what changed since them is not known any more.

use crate::control::{ApiError, EventKind, Notice, SnapshotRef};
use crate::crash;
use crate::manager::Manager;
use crate::manager::entry::locked;
use crate::registry::{ClaimKey, Wanted};

impl Manager {
    pub(crate) fn remove_bookmark(&self, reference: &SnapshotRef) -> Result<(), ApiError> {
        let disk = self.disk(&reference.disk).map_err(|_| self.no_bookmark(reference))?;
        // One that an update left is no user's, and not in the registry.
        let wanted = Wanted::changing([ClaimKey::Entity(disk.id)]);
        let _claim = self.claim_keys(&format!("bookmark delete {reference}"), &[disk.name.get().as_str()], wanted)?;
        if !self.is_served(&disk) {
            return Err(self.no_bookmark(reference)); // It got another name before it was claimed.
        }
        let id = disk.bookmarks().iter().find(|b| b.name == reference.name.as_str()).map(|b| b.id);
        let id = id.filter(|_| disk.snapshot(&reference.name).is_none()).ok_or_else(|| self.no_bookmark(reference))?;
        self.editor.forget_mark(&disk.disk, id);
        locked(&disk.bookmarks).retain(|b| b.id != id);
        crash::point("before a bookmark is forgotten");
        self.persist(std::slice::from_ref(&disk))?;
        crash::point("after a bookmark was forgotten");
        self.remove_changes_of_gone(&disk, id);
        log::info!("bookmark {reference}: deleted");
        self.bus.publish(Notice::of_snapshot(EventKind::BookmarkDeleted, reference));
        Ok(())
    }
}
