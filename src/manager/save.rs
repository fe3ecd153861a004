//! What a clean stop leaves: the bytes and tables of all versions first, and only then the word that they are there.

use std::path::Path;

use crate::door::Kept;
use crate::manager::Manager;
use crate::manager::changes::seal_changes;
use crate::manager::entry::{DiskEntry, locked};
use crate::store::{Fingerprint, Table};

impl Manager {
    /// Saves a disk of which no request is left.
    ///
    /// # Errors
    /// When the live version could not be saved. A snapshot that could not is broken.
    pub(crate) fn save(&self, disk: &DiskEntry) -> Result<(), String> {
        if let Some(reason) = disk.facts().restore_lost() {
            log::warn!("disk {}: {reason}; it is left as it is", disk.name);
            return Ok(());
        }
        let save = |what: Kept, table: &Table| {
            let place = match what {
                Kept::Layer(version) => self.places.durable_table(version),
                Kept::Changed(version) => self.places.saved_changes(version),
                Kept::Discards => self.places.durable_table(disk.id),
            };
            self.host.save_table(table, &place).map_err(|e| e.to_string())
        };
        let saved = disk.disk.save(&save)?;
        let seal_of = |id| saved.layers.get(&id).copied();
        let looks = |path: &Path| self.host.fingerprint(path).map_err(|e| format!("{}: {e}", path.display()));
        let mut record = disk.to_record();
        for snapshot in &mut record.snapshots {
            snapshot.saved_table = seal_of(snapshot.id);
            snapshot.saved = looks(&snapshot.image).ok();
        }
        seal_changes(&mut record, &saved.changes);
        record.live_saved_table = seal_of(record.live);
        record.live_saved = record.live_log.as_deref().and_then(|log| looks(log).ok());
        record.saved_discards = Some(saved.discards);
        for leg in record.mirror.iter_mut().flat_map(|m| &mut m.legs) {
            leg.saved = looks(&leg.path).ok();
        }
        let path = locked(&disk.path).clone();
        // Of a mirror each leg is looked at by itself.
        record.saved = match (&record.mirror, &record.volume) {
            // What a volume stands on is saved with its disk.
            (_, Some(_)) => Some(Fingerprint { size_bytes: 0, modified_ns: 0 }),
            (Some(_), None) => Some(looks(&path).unwrap_or(Fingerprint { size_bytes: 0, modified_ns: 0 })),
            (None, None) => Some(looks(&path)?),
        };
        if let Some(restore) = record.restore.as_ref().filter(|_| disk.facts().bytes_to_bring_back() > 0) {
            log::warn!(
                "disk {}: {} is restored from {} in part only; the rest follows when it is served again",
                disk.name,
                path.display(),
                restore.from
            );
        }
        if let Some(log) = record.live_log.as_ref().filter(|_| record.volume.is_none()) {
            log::warn!(
                "disk {}: its newest content is in the log {}, not in {} alone; it is put together when it is served again",
                disk.name,
                log.display(),
                path.display()
            );
        }
        self.records.put(&[&record]).map_err(|e| e.to_string())
    }
}
