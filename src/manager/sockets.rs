//! The sockets of disks and snapshots: opened, and cleared where a killed daemon left them.

use std::sync::Arc;

use crate::control::api::DiskConfig;
use crate::control::{ApiError, Name};
use crate::door::Disk;
use crate::host::Host;
use crate::manager::Manager;
use crate::manager::entry::{DiskEntry, Frontends, SnapshotEntry, locked};
use crate::manager::followups::FollowUp;
use crate::registry::{Command, decide};
use crate::store::SnapshotRecord;
use crate::vhost_user::{FRONTENDS_MAX, Hints, ServeOptions, Server, SocketSource};

impl Manager {
    /// Opens a snapshot's socket. Returns whether it is open.
    pub(crate) fn open_socket(&self, disk: &DiskEntry, entry: &SnapshotEntry) -> bool {
        let socket = locked(&entry.record).socket.clone();
        let server = self.host.serve(ServeOptions {
            name: entry.reference().to_string(),
            socket: SocketSource::Path(socket.clone()),
            attachment: disk.disk.attach(Some(entry.id)),
            queues: disk.config().queues(),
            serial: serial_of(&entry.reference().to_string()),
            frontends_max: if disk.config.shared { FRONTENDS_MAX } else { 1 },
            hints: hints_of(&disk.config()),
            observer: entry.frontends.clone(),
            once: false,
        });
        match server {
            Ok(server) => {
                *locked(&entry.server) = Some(server);
                *locked(&entry.socket_error) = None;
                true
            }
            Err(e) => {
                let what = format!("its socket {} cannot be opened: {e}", socket.display());
                if locked(&entry.socket_error).replace(what.clone()).as_ref() != Some(&what) {
                    log::error!("snapshot {}: {what}", entry.reference());
                }
                false
            }
        }
    }

    /// Opens the socket of a quiesced snapshot, now or as soon as it can be.
    pub(crate) fn resume_socket(&self, disk: &Arc<DiskEntry>, entry: &Arc<SnapshotEntry>) {
        if !self.open_socket(disk, entry) {
            self.follow_up(FollowUp::Open(disk.clone(), entry.clone()));
        }
    }

    /// Opens the sockets of all snapshots of a disk that can be read and have none.
    pub(crate) fn open_sockets_of_snapshots(&self, entry: &Arc<DiskEntry>) {
        let facts = entry.facts();
        let is_quiesced = |s: &SnapshotEntry| locked(&s.record).quiesced_ms.is_some();
        let is_due = |s: &&Arc<SnapshotEntry>| is_quiesced(s) && s.may_be_read(&facts) && !s.is_open();
        for snapshot in entry.snapshots().iter().filter(is_due) {
            self.resume_socket(entry, snapshot);
        }
    }

    /// Stops servers for a command that was decided: `record` is called while nobody can connect, and requests have ended
    /// when this returns. A frontend that came after the decision refuses the command, unless that is forced; one that
    /// comes later finds nobody. None is cut off. Those who read a snapshot that is deleted under them stay connected, and are
    /// answered with errors.
    pub(crate) fn stop_servers<T>(
        &self,
        disk: &DiskEntry,
        servers: &[Arc<dyn Server>],
        command: &Command,
        record: impl FnOnce() -> Result<T, ApiError>,
    ) -> Result<T, ApiError> {
        let away: Vec<_> = servers.iter().map(|server| server.hold()).collect();
        if !command.is_forced() {
            decide(&self.registry(), command)?;
        }
        let recorded = record()?;
        if matches!(command, Command::DeleteSnapshot { force: true, .. }) {
            drop(away);
            servers.iter().for_each(|server| server.abandon());
            let mut abandoned = locked(&disk.abandoned);
            abandoned.retain(|server| server.frontends() > 0);
            abandoned.extend(servers.iter().cloned());
            return Ok(recorded);
        }
        servers.iter().for_each(|server| server.begin_to_stop());
        drop(away);
        servers.iter().for_each(|server| server.stop());
        Ok(recorded)
    }
}

/// Opens the socket of a disk's live version.
pub(crate) fn serve_live(
    host: &dyn Host,
    name: &Name,
    config: &DiskConfig,
    disk: &Disk,
    frontends: &Arc<Frontends>,
) -> Result<Arc<dyn Server>, String> {
    host.serve(ServeOptions {
        name: name.to_string(),
        socket: SocketSource::Path(config.socket.clone().unwrap_or_default()),
        attachment: disk.attach(None),
        queues: config.queues(),
        serial: config.serial.clone().unwrap_or_default(),
        hints: hints_of(config),
        observer: frontends.clone(),
        once: false,
        frontends_max: if config.shared { FRONTENDS_MAX } else { 1 },
    })
    .map_err(|e| e.to_string())
}

/// What a guest sees as the serial of something that is called so: the name, if it fits; otherwise its beginning and what
/// tells it from others that begin so.
pub(crate) fn serial_of(name: &str) -> String {
    const LEN_MAX: usize = 20;
    match name.len() <= LEN_MAX {
        true => name.to_owned(),
        // No name has an underscore.
        false => format!("{:.11}_{:08x}", name, crc32fast::hash(name.as_bytes())),
    }
}

/// What the drivers of its guests are told.
pub(crate) fn hints_of(config: &DiskConfig) -> Hints {
    Hints {
        segments: config.segments_max(),
        discard_granularity: config.discard_granularity(),
        discard_max: config.discard_max(),
    }
}

/// Removes the socket that a killed daemon left of a snapshot that is not served any more.
pub(crate) fn clear_socket(host: &dyn Host, record: &SnapshotRecord) {
    if let Err(e) = host.clear_socket(&record.socket) {
        log::warn!("the socket of a snapshot that is not served stays: {e}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serials_tell_disks_and_snapshots_apart() {
        let names = [
            "vm1",
            "vm1@daily",
            "vm2@daily",
            "exactly-20-letters-x",
            "exactly-20-letters-xy",
            "exactly-20-letters-xz",
            "a-disk-with-a-long-name@daily",
            "a-disk-with-a-long-name@weekly",
        ];
        let serials: std::collections::BTreeSet<String> = names.iter().map(|name| serial_of(name)).collect();
        assert_eq!(serials.len(), names.len());
        assert!(serials.iter().all(|serial| serial.len() <= 20 && serial.is_ascii()));
        assert!(serials.contains("vm1@daily") && serials.contains("exactly-20-letters-x"));
    }
}
