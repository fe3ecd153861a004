//! What a clean stop leaves: the bytes and tables of all versions first, and only then the word that they are there.

use std::path::Path;

use crate::engine::Backing;
use crate::image::IoQueue;
use crate::manager::Manager;
use crate::manager::changes::seal_changes;
use crate::manager::entry::{DiskEntry, locked};
use crate::store::Fingerprint;

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
        if !disk.disk.is_read_only() {
            self.sync(disk.base())?;
        }
        let pair = locked(&disk.mirror).as_ref().map(|m| m.pair.clone());
        if let Some(pair) = pair {
            let of = disk.disk.clone();
            // Twice: what was written since the last time is only noted at the first.
            let clean = async move |queue: IoQueue| {
                pair.clean(&queue, of.block_locks()).await?;
                pair.clean(&queue, of.block_locks()).await
            };
            self.block_on(clean)?.map_err(|e| e.to_string())?;
        }
        let of = disk.disk.clone();
        self.block_on(async move |queue| of.commit_logs(&queue).await)?.map_err(|e| e.to_string())?;
        let chain = disk.disk.chain();
        let mut seals = Vec::new();
        // From the newest to the oldest: what cannot be saved is lost, and with it those that read through it.
        let mut lost: Option<String> = None;
        for (index, link) in chain.links().iter().enumerate().rev() {
            let Some(table) = link.layer.table() else {
                if index < chain.live()
                    && let Err(e) = self.sync(link.layer.image.clone())
                {
                    disk.disk.break_version(&link.version, &e);
                }
                continue;
            };
            if lost.is_none() {
                let saved = self.sync(link.layer.image.clone()).and_then(|()| {
                    let place = self.places.durable_table(link.version.id);
                    self.host.save_table(table, &place).map_err(|e| e.to_string())
                });
                match saved {
                    Ok(seal) => seals.push((link.version.id, seal)),
                    Err(e) if index > chain.pivot_of(index) => return Err(e), // The live version reads through it.
                    Err(e) => lost = Some(format!("it, or one that it reads through, could not be saved: {e}")),
                }
            }
            if let Some(reason) = &lost {
                disk.disk.break_version(&link.version, reason);
            }
        }
        let changes = self.save_changes(&disk.disk);
        let seal_of = |id| seals.iter().find(|(of, _)| *of == id).map(|(_, seal)| *seal);
        let looks = |path: &Path| self.host.fingerprint(path).map_err(|e| format!("{}: {e}", path.display()));
        let mut record = disk.to_record();
        for snapshot in &mut record.snapshots {
            snapshot.saved_table = seal_of(snapshot.id);
            snapshot.saved = looks(&snapshot.image).ok();
        }
        seal_changes(&mut record, &changes);
        record.live_saved_table = seal_of(record.live);
        record.live_saved = record.live_log.as_deref().and_then(|log| looks(log).ok());
        let discards = self.host.save_table(disk.disk.discards(), &self.places.durable_table(disk.id));
        record.saved_discards = Some(discards.map_err(|e| e.to_string())?);
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

    fn sync(&self, image: Backing) -> Result<(), String> {
        self.block_on(async move |queue| image.sync(&queue).await)?.map_err(|e| e.to_string())
    }
}
