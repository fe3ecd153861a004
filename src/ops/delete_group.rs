//! The deletion of all snapshots of one cut.
//!
//! What always holds: none of them is begun before it was found that each of them may go. What comes in between, another
//! command or a new reader, refuses one of them only, and the answer says so.

use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use uuid::Uuid;

use crate::control::api::{DeleteSnapshotOptions, DeletionState, GroupDeletion, SnapshotState};
use crate::control::{ApiError, Deletion, ErrorCode, SnapshotRef};
use crate::host::receive;
use crate::manager::Manager;
use crate::registry::{self, Command, decide};

/// How long each deletion may take to answer: longer than it waits for anything.
const ANSWER_WAIT: Duration = Duration::from_secs(300);

impl Manager {
    pub(crate) fn delete_all_of(
        &self,
        group: Uuid,
        options: DeleteSnapshotOptions,
    ) -> Result<Vec<GroupDeletion>, ApiError> {
        let snapshots = self.deletable(group, options)?;
        // Side by side: each of them may have a log to be folded, and the answer waits for all of them.
        let begin = |(id, snapshot): (Uuid, SnapshotRef)| {
            let (me, (tell, told)) = (self.me.clone(), channel());
            let started = self.start_thread("delete", move || {
                let Some(manager) = me.upgrade() else { return };
                if tell.send(manager.delete_one_of(id, &snapshot, options)).is_err() {
                    log::debug!("snapshot {snapshot}: nobody waits for its deletion any more");
                }
            });
            started.map(|()| told).map_err(|e| ApiError::new(ErrorCode::Io, format!("a deletion has no thread: {e}")))
        };
        let begun: Vec<_> = snapshots.into_iter().map(begin).collect();
        let no_answer = |_| ApiError::new(ErrorCode::Internal, "the deletion stopped halfway");
        let end = |told: Receiver<GroupDeletion>| receive(&*self.host, &told, ANSWER_WAIT).map_err(no_answer);
        begun.into_iter().map(|told| told.and_then(end)).collect()
    }

    fn delete_one_of(&self, id: Uuid, snapshot: &SnapshotRef, options: DeleteSnapshotOptions) -> GroupDeletion {
        let (state, problem) = match self.delete_by_id(id, options) {
            Ok(Some(Deletion::Started(s))) if s.state == SnapshotState::Folding => (DeletionState::Folding, None),
            Ok(Some(Deletion::Started(_))) => (DeletionState::Deleting, None),
            Ok(Some(Deletion::Done) | None) => (DeletionState::Deleted, None),
            Err(e) if e.code == ErrorCode::SnapshotNotFound => (DeletionState::Deleted, None),
            Err(e) => (DeletionState::Refused, Some(e.problem())),
        };
        GroupDeletion { snapshot: snapshot.to_string(), state, problem }
    }

    /// The snapshots of a cut, if all of them may go.
    fn deletable(&self, group: Uuid, options: DeleteSnapshotOptions) -> Result<Vec<(Uuid, SnapshotRef)>, ApiError> {
        let registry = self.registry();
        let of = |disk: &registry::Disk| {
            let snapshots = disk.snapshots.iter().filter(|s| s.group == group);
            snapshots.map(|snapshot| (snapshot.id, disk.reference(&snapshot.name))).collect::<Vec<_>>()
        };
        let mut found: Vec<(Uuid, SnapshotRef)> = registry.disks().flat_map(of).collect();
        found.sort_by(|one, other| one.1.cmp(&other.1));
        let DeleteSnapshotOptions { force, keep_bookmark, .. } = options;
        let refused = |(_, snapshot): &(Uuid, SnapshotRef)| {
            let command = Command::DeleteSnapshot { snapshot: snapshot.clone(), force, keep_bookmark };
            decide(&registry, &command).map_err(ApiError::from).err()
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
}
