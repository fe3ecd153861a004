//! The deletion of all snapshots of one cut.
//!
//! What always holds: none of them is begun before it was found that each of them may go. What comes in between, another
//! command or a new reader, refuses one of them only, and the answer says so.

use uuid::Uuid;

use crate::control::api::{DeleteSnapshotOptions, DeletionState, GroupDeletion, SnapshotState};
use crate::control::{ApiError, Deletion, ErrorCode, SnapshotRef};
use crate::manager::Manager;
use crate::registry::{self, Command, decide};

impl Manager {
    pub(crate) fn delete_all_of(
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
        let registry = self.registry();
        let of = |disk: &registry::Disk| {
            let snapshots = disk.snapshots.iter().filter(|s| s.group == group);
            snapshots.map(|snapshot| disk.reference(&snapshot.name)).collect::<Vec<_>>()
        };
        let mut found: Vec<SnapshotRef> = registry.disks().flat_map(of).collect();
        found.sort();
        let refused = |snapshot: &SnapshotRef| {
            let command = Command::DeleteSnapshot { snapshot: snapshot.clone(), force: options.force };
            decide(&registry, &command)
                .map_err(ApiError::from)
                .and_then(|_| self.refuse_bookmark(snapshot, options))
                .err()
        };
        let refusals: Vec<ApiError> = found.iter().filter_map(refused).collect();
        if let Some(first) = refusals.first() {
            let all: Vec<_> = refusals.iter().map(|e| e.message.as_str()).collect();
            return Err(ApiError { message: format!("none is deleted: {}", all.join("; ")), ..first.clone() });
        }
        if found.is_empty() {
            return Err(ApiError::new(ErrorCode::SnapshotNotFound, format!("there is no snapshot of group {group}")));
        }
        Ok(found)
    }

    fn refuse_bookmark(&self, snapshot: &SnapshotRef, options: DeleteSnapshotOptions) -> Result<(), ApiError> {
        let entry = self.disk(&snapshot.disk)?.snapshot(&snapshot.name);
        match entry.filter(|_| options.keep_bookmark) {
            Some(entry) => entry.refuse_bookmark_if_broken().and_then(|()| entry.refuse_bookmark_if_going()),
            None => Ok(()),
        }
    }
}
