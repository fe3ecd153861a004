//! The deletion of all snapshots of one cut.
//!
//! What always holds: none of them is begun before it was found that each of them may go. What comes in between, another
//! command or a new reader, refuses one of them only, and the answer says so.

use std::sync::Arc;

use uuid::Uuid;

use super::entry::{DiskEntry, SnapshotEntry, locked};
use super::manager::Manager;
use crate::control::api::{DeleteSnapshotOptions, DeletionState, GroupDeletion, SnapshotState};
use crate::control::{ApiError, Deletion, ErrorCode, SnapshotRef};

impl Manager {
    pub(super) fn delete_all_of(
        &self,
        group: Uuid,
        options: DeleteSnapshotOptions,
    ) -> Result<Vec<GroupDeletion>, ApiError> {
        let snapshots = self.deletable(group, options)?;
        // Side by side: each of them may have a log to be folded, and the answer waits for all of them.
        std::thread::scope(|scope| {
            let begin = |snapshot| scope.spawn(move || self.delete_one_of(snapshot, options));
            let begun: Vec<_> = snapshots.iter().map(begin).collect();
            let panicked = |_| ApiError::new(ErrorCode::Internal, "the deletion stopped halfway");
            begun.into_iter().map(|thread| thread.join().map_err(panicked)).collect()
        })
    }

    fn delete_one_of(&self, snapshot: &SnapshotRef, options: DeleteSnapshotOptions) -> GroupDeletion {
        let (state, problem) = match self.delete(snapshot, options) {
            Ok(Deletion::Started(s)) if s.state == SnapshotState::Folding => (DeletionState::Folding, None),
            Ok(Deletion::Started(_)) => (DeletionState::Deleting, None),
            Ok(Deletion::Done) => (DeletionState::Deleted, None),
            Err(e) if e.code == ErrorCode::SnapshotNotFound => (DeletionState::Deleted, None),
            Err(e) => (DeletionState::Refused, Some(e.problem())),
        };
        GroupDeletion { snapshot: snapshot.to_string(), state, problem }
    }

    /// The snapshots of a cut, if all of them may go.
    fn deletable(&self, group: Uuid, options: DeleteSnapshotOptions) -> Result<Vec<SnapshotRef>, ApiError> {
        let _structure = locked(&self.structure);
        self.refuse_when_stopping()?;
        let of = |disk: Arc<DiskEntry>| {
            let snapshots = disk.snapshots().into_iter().filter(|s| locked(&s.record).group == group);
            snapshots.map(|snapshot| (disk.clone(), snapshot)).collect::<Vec<_>>()
        };
        let found: Vec<_> = self.all_disks().into_iter().flat_map(of).collect();
        let refusals = found.iter().filter_map(|(disk, entry)| self.refuse_to_begin(disk, entry, options).err());
        let refusals: Vec<ApiError> = refusals.collect();
        if let Some(first) = refusals.first() {
            let all: Vec<_> = refusals.iter().map(|e| e.message.as_str()).collect();
            return Err(ApiError { message: format!("none is deleted: {}", all.join("; ")), ..first.clone() });
        }
        if found.is_empty() {
            return Err(ApiError::new(ErrorCode::SnapshotNotFound, format!("there is no snapshot of group {group}")));
        }
        Ok(found.into_iter().map(|(_, entry)| entry.reference.clone()).collect())
    }

    /// All that refuses a deletion and is over only when somebody ends it.
    fn refuse_to_begin(
        &self,
        disk: &Arc<DiskEntry>,
        entry: &SnapshotEntry,
        options: DeleteSnapshotOptions,
    ) -> Result<(), ApiError> {
        self.refuse_deletion(disk, entry, options)?;
        match entry.state(disk) {
            SnapshotState::Deleting | SnapshotState::Folding => Ok(()),
            _ if entry.version.is_none() => Ok(()),
            _ => {
                self.refuse_beside_work(disk)?;
                if !options.force && entry.old_frontends(disk) > 0 {
                    return Err(entry.still_written(disk));
                }
                entry.refuse_readers(options.force)
            }
        }
    }
}
