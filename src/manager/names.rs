//! Names of disks and volumes, which may change, and what has such a name by its identifier.

use std::fmt;
use std::sync::{Arc, Mutex};

use uuid::Uuid;

use crate::control::{ApiError, Name, SnapshotRef};
use crate::manager::Manager;
use crate::manager::Places;
use crate::manager::entry::{DiskEntry, SnapshotEntry, locked};

/// The name of a disk or volume at this moment, shared by all that is called after it.
#[derive(Clone, Debug)]
pub(crate) struct CurrentName(Arc<Mutex<Name>>);

impl CurrentName {
    pub(crate) fn new(name: Name) -> CurrentName {
        CurrentName(Arc::new(Mutex::new(name)))
    }

    pub(crate) fn get(&self) -> Name {
        locked(&self.0).clone()
    }

    /// Only while the table of disks, which is by name, is locked.
    pub(crate) fn set(&self, name: Name) {
        *locked(&self.0) = name;
    }
}

impl fmt::Display for CurrentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

impl DiskEntry {
    /// Whether its socket is called after it.
    pub(crate) fn is_socket_named(&self, places: &Places) -> bool {
        self.socket() == places.disk_socket(&self.name)
    }
}

impl SnapshotEntry {
    /// Whether its socket is called after it.
    pub(crate) fn is_socket_named(&self, places: &Places) -> bool {
        locked(&self.record).socket == places.snapshot_socket(&self.reference())
    }
}

impl Manager {
    /// The snapshot or bookmark with this id.
    pub(crate) fn reference_of(&self, id: Uuid) -> Result<SnapshotRef, ApiError> {
        for disk in self.all_disks() {
            if let Some(snapshot) = disk.snapshots().iter().find(|s| s.id == id) {
                return Ok(snapshot.reference());
            }
            if let Some(bookmark) = disk.bookmarks(&disk.facts()).into_iter().find(|b| b.id == id) {
                return Ok(SnapshotRef { disk: disk.name.get(), name: bookmark.name.parse()? });
            }
        }
        Err(ApiError::snapshot_not_found(id))
    }

    /// What a snapshot is called now; as it was called when that was remembered if it is not there.
    pub(crate) fn name_now(&self, snapshot: Uuid, remembered: &str) -> String {
        if let Ok(reference) = self.reference_of(snapshot) {
            return reference.to_string();
        }
        let unserved = locked(&self.unserved);
        let found = unserved.values().filter_map(|u| u.record.as_ref()).find_map(|r| r.reference_of(snapshot));
        found.unwrap_or_else(|| remembered.to_owned())
    }
}
