//! What `check` says of a restore in place that is under way.
//!
//! What is looked at is what a start needs: the table of pending blocks, and the disk's own snapshot that they show. Whether
//! a volume is there that a disk is restored from is said of the volume.

use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::{CheckedSnapshot, Examination, SnapshotVerdict};
use crate::daemon::layers::{block_on, damage_of, without_run_table};
use crate::daemon::takeup::Trust;
use crate::image::{Direct, FileImage, SharedImage};
use crate::store::{DiskRecord, DurableTable, RestoreRecord, Table, TableName, examine_run_table};

/// Why the disk would not be served, if so.
pub(super) fn look_at_restore(
    of: &Examination,
    record: &DiskRecord,
    blocks: u64,
    trust: Trust,
    snapshots: &[CheckedSnapshot],
) -> Option<String> {
    let restore = record.restore.as_ref().filter(|r| r.is_active)?;
    let why = look_at_pending(of, restore, blocks, trust).err().or_else(|| lost_source(record, restore, snapshots))?;
    Some(format!("it is being restored from {}, and what is not copied yet cannot be had: {why}", restore.from))
}

fn lost_source(record: &DiskRecord, restore: &RestoreRecord, snapshots: &[CheckedSnapshot]) -> Option<String> {
    let (remembered, found) = record.snapshots.iter().zip(snapshots).find(|(s, _)| s.id == restore.source)?;
    // One that broke while it was served is there all the same.
    let is_there = found.verdict == SnapshotVerdict::Kept || remembered.broken.is_some() && remembered.image.is_file();
    (!is_there).then(|| found.reason.clone().unwrap_or_else(|| "the snapshot is lost".to_owned()))
}

fn look_at_pending(of: &Examination, restore: &RestoreRecord, blocks: u64, trust: Trust) -> Result<(), String> {
    let place = of.places.log_table(restore.id);
    match trust {
        Trust::Changed => Err("the disk's image was changed while the daemon was not running".to_owned()),
        Trust::SameBoot => {
            let name = TableName { id: restore.id, boot: of.boot };
            let left = examine_run_table(&of.places.run_table(restore.id), blocks, name);
            left.map_err(|e| without_run_table(&e.to_string()))?;
            committed(&place, restore.id, blocks).map(drop)
        }
        Trust::Saved | Trust::PowerCut => committed(&place, restore.id, blocks)?.map_or(Ok(()), Err),
    }
}

/// What of the durable table is damaged.
fn committed(place: &Path, id: Uuid, blocks: u64) -> Result<Option<String>, String> {
    let image: SharedImage = Arc::new(FileImage::probe(place, Direct::Off).map_err(|e| e.to_string())?);
    let table = Arc::new(Table::in_memory(blocks).map_err(|e| e.to_string())?);
    let loaded = block_on(async move |queue| DurableTable::load(image, id, table, &queue).await.map(|(_, r)| r))?;
    Ok(damage_of(place, place, &loaded.map_err(|e| e.to_string())?))
}
