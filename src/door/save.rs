//! What a clean stop leaves of a disk: the bytes and tables of all versions.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::engine::{Disk, Open, locked};
use crate::engine::{Backing, PairError, VersionId};
use crate::image::IoQueue;
use crate::store::Table;

/// A table that is to be saved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kept {
    /// That of a version's layer.
    Layer(VersionId),
    /// That of what was changed up to a moment.
    Changed(VersionId),
    /// That of discards that were put off.
    Discards,
}

/// What was saved, by the seals of its tables.
#[derive(Clone, Debug, Default)]
pub struct SavedDisk {
    /// Those of layers.
    pub layers: BTreeMap<VersionId, Uuid>,
    /// Those of dirty bitmaps, or why there is none.
    pub changes: BTreeMap<VersionId, Result<Uuid, String>>,
    /// That of discards.
    pub discards: Uuid,
}

impl Disk {
    /// Saves a disk of which no request is left; `save` makes a table durable, and returns its seal.
    ///
    /// # Errors
    /// When the live version could not be saved. A snapshot that could not is broken.
    pub fn save(&self, save: &dyn Fn(Kept, &Table) -> Result<Uuid, String>) -> Result<SavedDisk, String> {
        let open = self.open();
        let chain = open.disk.chain();
        if !open.disk.is_read_only() {
            self.sync(chain.layer(chain.pivot_of(chain.live())).image.clone())?;
        }
        self.clean_and_commit(&open)?;
        let mut saved = SavedDisk::default();
        // From the newest to the oldest: what cannot be saved is lost, and with it those that read through it.
        let mut lost: Option<String> = None;
        for (index, link) in chain.links().iter().enumerate().rev() {
            let Some(table) = link.layer.table() else {
                if index < chain.live()
                    && let Err(e) = self.sync(link.layer.image.clone())
                {
                    open.disk.break_version(&link.version, &e);
                }
                continue;
            };
            if lost.is_none() {
                let image = self.sync(link.layer.image.clone());
                match image.and_then(|()| save(Kept::Layer(link.version.id), table)) {
                    Ok(seal) => drop(saved.layers.insert(link.version.id, seal)),
                    Err(e) if index > chain.pivot_of(index) => return Err(e), // The live version reads through it.
                    Err(e) => lost = Some(format!("it, or one that it reads through, could not be saved: {e}")),
                }
            }
            if let Some(reason) = &lost {
                open.disk.break_version(&link.version, reason);
            }
        }
        let marks = open.disk.marks();
        let versions = chain.links().iter().filter_map(|l| Some((l.version.id, l.version.changed()?)));
        for (id, changed) in versions.chain(marks.iter().filter_map(|m| Some((m.id, m.changed.as_ref()?)))) {
            let seal = changed
                .known()
                .map_err(str::to_owned)
                .and_then(|table| save(Kept::Changed(id), table).map_err(|e| format!("it was not saved: {e}")));
            saved.changes.insert(id, seal);
        }
        saved.discards = save(Kept::Discards, open.disk.discards())?;
        Ok(saved)
    }

    fn clean_and_commit(&self, open: &Open) -> Result<(), String> {
        let pair = locked(&open.mirror).clone();
        if let Some(pair) = pair {
            let of = open.disk.clone();
            // Twice: what was written since the last time is only noted at the first.
            let clean = async move |queue: IoQueue| -> Result<u64, PairError> {
                pair.clean(&queue, of.block_locks()).await?;
                pair.clean(&queue, of.block_locks()).await
            };
            self.engine.on_ring(clean).map_err(|e| e.to_string())?;
        }
        let of = open.disk.clone();
        self.engine.on_ring(async move |queue| of.commit_logs(&queue).await).map_err(|e| e.to_string())
    }

    fn sync(&self, image: Backing) -> Result<(), String> {
        let synced = image.clone();
        self.engine.on_ring(async move |queue| synced.sync(&queue).await).map_err(|e| e.to_string())?;
        match image.is_in_doubt() {
            true => Err(format!("it is not known what a failed write has left in {}", image.path().display())),
            false => Ok(()),
        }
    }
}
