//! Waiting for a snapshot to be quiesced, without keeping others from the structure meanwhile.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::entry::{DiskEntry, SnapshotEntry, locked};
use super::manager::Manager;
use crate::control::api::SnapshotState;
use crate::control::{ApiError, ErrorCode, SnapshotRef};

/// How long a command waits for a snapshot to be quiesced. It was just taken, or its requests are slow.
const QUIESCE_WAIT: Duration = Duration::from_secs(60);
/// How often it looks.
const TURN: Duration = Duration::from_millis(2);

impl Manager {
    /// Calls `begin` with the snapshot and its disk as soon as it is quiesced. The structure is locked then, and whenever
    /// `check` looks whether the command can still be carried out.
    pub(super) fn when_quiesced<C, T>(
        &self,
        from: &SnapshotRef,
        check: impl Fn() -> Result<C, ApiError>,
        begin: impl FnOnce(C, &Arc<DiskEntry>, &Arc<SnapshotEntry>) -> Result<T, ApiError>,
    ) -> Result<T, ApiError> {
        let deadline = Instant::now() + QUIESCE_WAIT;
        loop {
            let structure = locked(&self.structure);
            let checked = check()?;
            let disk = self.disk(&from.disk).map_err(|_| ApiError::snapshot_not_found(from))?;
            let entry = disk.snapshot(&from.name).ok_or_else(|| ApiError::snapshot_not_found(from))?;
            let busy = |what: &str| ApiError::new(ErrorCode::SnapshotBusy, format!("snapshot {from} {what}"));
            match entry.state(&disk) {
                SnapshotState::Quiesced if entry.version.is_some() => return begin(checked, &disk, &entry),
                SnapshotState::Quiesced | SnapshotState::Broken => {
                    let why = entry.broken().or_else(|| disk.disk.base_broken()).unwrap_or_default();
                    return Err(ApiError::new(ErrorCode::SnapshotBroken, format!("snapshot {from} is broken: {why}")));
                }
                SnapshotState::Folding | SnapshotState::Deleting => return Err(busy("is being deleted")),
                SnapshotState::Draining if entry.old_frontends(&disk) > 0 => {
                    return Err(busy("is still written by frontends from before it")
                        .with_action(format!("move them over first: halfsilver snapshot cutover {from}")));
                }
                SnapshotState::Draining if Instant::now() >= deadline => return Err(busy("is still draining")),
                SnapshotState::Draining => {}
            }
            drop(structure);
            std::thread::sleep(TURN);
        }
    }
}
