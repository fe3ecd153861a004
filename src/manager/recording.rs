//! What the records say of a disk: while it is served, and before a cut.
//!
//! What always holds: where a version's bytes are is said as it is in the chain of that moment; before a cut, as it will be
//! after it, so that a start finds the same bytes whether the cut was made or not.
//!
//! What this does not do: store them.

use std::path::Path;

use uuid::Uuid;

use crate::engine::{Chain, Changed, Mark, NewLayer, Version};
use crate::store::{BookmarkRecord, ChangedRecord, DiskRecord, SnapshotRecord};

/// What is remembered of a disk that is served: its identifier, name and boot, its configuration, and where the versions
/// are in this moment's chain. Without a mirror, and not a volume.
#[must_use]
pub fn of_disk(
    (id, name, boot): (Uuid, &str, Uuid),
    config: serde_json::Value,
    chain: &Chain,
    snapshots: Vec<SnapshotRecord>,
) -> DiskRecord {
    let live = &chain.links()[chain.live()];
    let live_log = live.layer.table().map(|_| live.layer.image.path().to_owned());
    DiskRecord {
        id,
        name: name.to_owned(),
        config,
        live: live.version.id,
        live_began: live.version.began.0,
        live_log,
        live_saved_table: None,
        live_saved: None,
        live_splits: live.splits,
        live_changed: of_changed(live.version.changed()),
        bookmarks: Vec::new(),
        mirror: None,
        volume: None,
        stood_on: None,
        disabled: false,
        own_image: false,
        logical_block_bytes: None,
        work: None,
        next_live: None,
        set: serde_json::Value::Null,
        restore: None,
        former_legs: Vec::new(),
        boot: Some(boot),
        snapshots,
        saved: None,
        saved_discards: None,
    }
}

/// What is remembered of a snapshot; without a version it is only a record. None if it is not frozen yet, or has left the
/// chain already.
#[must_use]
pub fn of_snapshot(mut record: SnapshotRecord, version: Option<&Version>, chain: &Chain) -> Option<SnapshotRecord> {
    if version.is_some() {
        let index = chain.position(record.id).filter(|&i| i < chain.live())?;
        let link = &chain.links()[index];
        link.layer.image.path().clone_into(&mut record.image);
        record.owns_all = link.layer.is_full();
        record.splits = link.splits;
        record.changed = of_changed(link.version.changed());
        // Also of one that was given up: its table is still there for older ones.
        record.durable = !record.owns_all && (record.durable || link.layer.saved_durably().is_some());
    }
    if record.broken.is_none() {
        record.broken = version.and_then(Version::broken).map(str::to_owned);
    }
    Some(record)
}

/// What the records say of a volume that stands on nothing from now on: `record` with its oldest log, the version `oldest`,
/// as the full image at `path`.
#[must_use]
pub fn independent(mut record: DiskRecord, oldest: Uuid, path: &Path) -> DiskRecord {
    record.stood_on = record.volume.take();
    record.work = None;
    if record.live == oldest {
        record.live_log = None;
    }
    for snapshot in record.snapshots.iter_mut().filter(|s| s.id == oldest) {
        snapshot.owns_all = true;
        path.clone_into(&mut snapshot.image);
    }
    if let Some(config) = record.config.as_object_mut() {
        config.insert("path".to_owned(), serde_json::json!(path));
    }
    record
}

/// What the records say of a volume that was put on another snapshot: its live version is `live` from now on, a log at `path`
/// with what it keeps. The rest is in its relations.
#[must_use]
pub fn updated(mut record: DiskRecord, live: Uuid, path: &Path, from: &str, changed: &Changed) -> DiskRecord {
    (record.live, record.live_log) = (live, Some(path.to_owned()));
    record.live_changed = of_changed(Some(changed));
    if let Some(config) = record.config.as_object_mut() {
        config.insert("path".to_owned(), serde_json::json!(from));
    }
    record
}

/// What the records say after a cut of the disk that `record` and `chain` describe, but for its epoch, which is 0: nobody
/// has been told of the snapshot.
#[must_use]
pub fn before_cut(
    mut record: DiskRecord,
    chain: &Chain,
    mut snapshot: SnapshotRecord,
    layer: &NewLayer,
    new_live: Uuid,
) -> DiskRecord {
    match layer {
        NewLayer::Frozen { layer } => {
            layer.image.path().clone_into(&mut snapshot.image);
            snapshot.durable = layer.saved_durably().is_some();
            snapshot.splits = std::mem::take(&mut record.live_splits);
        }
        NewLayer::Live { layer } => {
            chain.layer(chain.live()).image.path().clone_into(&mut snapshot.image);
            snapshot.owns_all = record.live_log.is_none();
            snapshot.splits = std::mem::take(&mut record.live_splits);
            record.live_log = Some(layer.image.path().to_owned());
        }
        NewLayer::Split { frozen, .. } => {
            frozen.path().clone_into(&mut snapshot.image);
            snapshot.owns_all = true;
            snapshot.splits = std::mem::replace(&mut record.live_splits, true);
        }
    }
    snapshot.changed = record.live_changed.replace(ChangedRecord::default());
    record.live = new_live;
    record.snapshots.push(snapshot);
    record
}

/// What is remembered of a dirty bitmap while it is in use.
#[must_use]
pub fn of_changed(changed: Option<&Changed>) -> Option<ChangedRecord> {
    changed.map(|changed| ChangedRecord { saved: None, lost: changed.known().err().map(str::to_owned) })
}

/// What is remembered of the snapshot when only a mark of it is left.
#[must_use]
pub fn of_bookmark(record: &SnapshotRecord, mark: &Mark) -> BookmarkRecord {
    BookmarkRecord {
        id: record.id,
        group: record.group,
        name: record.name.clone(),
        began: record.began,
        ended: record.ended,
        created_ms: record.created_ms,
        quiesced_ms: record.quiesced_ms,
        changed: of_changed(mark.changed.as_ref()),
        taken_for: record.taken_for,
    }
}
