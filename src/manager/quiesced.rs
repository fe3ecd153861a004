//! Waiting for a snapshot to be quiesced, without keeping others from it meanwhile.

use std::sync::Arc;
use std::time::Duration;

use crate::control::api::SnapshotState;
use crate::control::{ApiError, ErrorCode, SnapshotRef};
use crate::manager::Manager;
use crate::manager::entry::{DiskEntry, SnapshotEntry, locked};
use crate::registry::{Refusal, Registry, Wanted};

/// How long a command waits for a snapshot to be quiesced. It was just taken, or its requests are slow.
const QUIESCE_WAIT: Duration = Duration::from_secs(60);
/// How often it looks.
const QUIESCE_LOOK: Duration = Duration::from_millis(2);

impl Manager {
    /// Calls `begin` with the snapshot and its disk as soon as it is quiesced. What `decide` wants is claimed then, and
    /// whenever it is looked whether the command can still be carried out; in between it is nobody's.
    pub(crate) fn when_quiesced<T>(
        &self,
        operation: &str,
        from: &SnapshotRef,
        decide: impl Fn(&Registry) -> Result<Wanted, Refusal>,
        begin: impl FnOnce(&Arc<DiskEntry>, &Arc<SnapshotEntry>) -> Result<T, ApiError>,
    ) -> Result<T, ApiError> {
        let deadline = self.host.now() + QUIESCE_WAIT;
        let mut waits_for: Option<Arc<SnapshotEntry>> = None;
        let mut announced = None;
        loop {
            let claim = self.claim_decided(operation, &decide)?;
            let disk = self.disk(&from.disk)?;
            let entry = disk.snapshot(&from.name).ok_or_else(|| ApiError::snapshot_not_found(from))?;
            // Its disk may have got another name meanwhile, and this be that of another one.
            if !Arc::ptr_eq(waits_for.get_or_insert_with(|| entry.clone()), &entry) {
                return Err(ApiError::snapshot_not_found(from));
            }
            let busy = |what: &str| ApiError::new(ErrorCode::SnapshotBusy, format!("snapshot {from} {what}"));
            let facts = disk.facts();
            match entry.state(&facts) {
                SnapshotState::Quiesced if !entry.is_lost => return begin(&disk, &entry),
                SnapshotState::Quiesced | SnapshotState::Broken => {
                    let why = entry.unreadable(&facts).unwrap_or_default();
                    return Err(ApiError::new(ErrorCode::SnapshotBroken, format!("snapshot {from} is broken: {why}")));
                }
                SnapshotState::Folding | SnapshotState::Deleting => {
                    return Err(busy("is being deleted").with_action("name another snapshot, or take one"));
                }
                SnapshotState::Draining if entry.old_frontends(&facts) > 0 => {
                    return Err(busy("is still written by frontends from before it")
                        .with_action(format!("move them over first: halfsilver snapshot cutover {from} --wait")));
                }
                SnapshotState::Draining if self.host.now() >= deadline => {
                    let reason = entry.to_api(&facts).reason.map(|why| format!(": {why}")).unwrap_or_default();
                    return Err(busy(&format!("is still draining{reason}"))
                        .with_action(format!("wait until it is quiesced: halfsilver snapshot show {from}")));
                }
                // What cannot be recorded is tried again, but who waits here for room would most likely wait in vain.
                SnapshotState::Draining => {
                    let cannot = locked(&entry.socket_error).clone();
                    if let Some(what) = cannot
                        && let Err(e) = self.refuse_without_room()
                    {
                        return Err(ApiError { message: format!("snapshot {from}: {what}; {}", e.message), ..e });
                    }
                }
            }
            announced.get_or_insert_with(|| {
                let what = format!("snapshot {from} to be quiesced: {}", self.requests_of(&disk));
                self.announce(operation, from.disk.as_str(), what)
            });
            drop(claim);
            self.host.pause(QUIESCE_LOOK);
        }
    }
}
