//! What the records say of a disk: while it is served, and before a cut.
//!
//! What always holds: where a version's bytes are is said as it is in the chain of that moment; before a cut, as it will be
//! after it, so that a start finds the same bytes whether the cut was made or not.
//!
//! What this does not do: store them.

use std::collections::BTreeMap;
use std::path::Path;

use uuid::Uuid;

use crate::control::api;
use crate::door::{ChangedFacts, DiskFacts, LayerKind, LayerSpec, MarkFacts, NewLayer};
use crate::store::{self, BookmarkRecord, ChangedRecord, DiskRecord, SnapshotRecord};

/// Words of the API and of the records for the same thing.
macro_rules! same {
    ($word:ident: $($variant:ident),+) => {
        impl From<api::$word> for store::$word {
            fn from(word: api::$word) -> store::$word {
                match word { $(api::$word::$variant => store::$word::$variant),+ }
            }
        }

        impl From<store::$word> for api::$word {
            fn from(word: store::$word) -> api::$word {
                match word { $(store::$word::$variant => api::$word::$variant),+ }
            }
        }
    };
}
same!(Strategy: CopyOnWrite, WriteLogging, WriteMirroring);
same!(Writers: Request, Connection);

/// What is remembered of a disk that is served: its identifier, name and boot, its configuration, and where the versions
/// are in this moment's chain. Without a mirror, and not a volume.
#[must_use]
pub(crate) fn of_disk(
    (id, name, boot): (Uuid, &str, Uuid),
    config: serde_json::Value,
    facts: &DiskFacts,
    snapshots: Vec<SnapshotRecord>,
) -> DiskRecord {
    let live = facts.live();
    let live_log = (live.layer != LayerKind::Full).then(|| live.image.clone());
    DiskRecord {
        id,
        name: name.to_owned(),
        size_bytes: facts.geometry.size_bytes,
        config,
        live: live.id,
        live_began: live.began.0,
        live_log,
        live_layout: live.layout(),
        live_saved_table: None,
        live_saved: None,
        live_splits: live.splits,
        live_changed: of_changed(live.changed.as_ref()),
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
        identities: BTreeMap::new(),
        kept_in: None,
        boot: Some(boot),
        snapshots,
        saved: None,
        saved_discards: None,
    }
}

/// What is remembered of a snapshot that has a version. None if it is not frozen yet, or has left the chain already.
#[must_use]
pub(crate) fn of_snapshot(mut record: SnapshotRecord, facts: &DiskFacts) -> Option<SnapshotRecord> {
    let version = facts.frozen().iter().find(|version| version.id == record.id)?;
    record.image.clone_from(&version.image);
    record.layout = version.layout();
    record.owns_all = version.layer == LayerKind::Full;
    record.splits = version.splits;
    record.changed = of_changed(version.changed.as_ref());
    // Also of one that was given up: its table is still there for older ones.
    record.durable = !record.owns_all && (record.durable || version.layer == LayerKind::Saved);
    record.broken = record.broken.or_else(|| version.broken.clone());
    Some(record)
}

/// What the records say of a volume that stands on nothing from now on: `record` with its oldest log, the version `oldest`,
/// as the full image at `path`.
#[must_use]
pub(crate) fn independent(mut record: DiskRecord, oldest: Uuid, path: &Path) -> DiskRecord {
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
pub(crate) fn updated(mut record: DiskRecord, live: Uuid, path: &Path, from: &str) -> DiskRecord {
    (record.live, record.live_log) = (live, Some(path.to_owned()));
    record.live_changed = Some(ChangedRecord::default());
    if let Some(config) = record.config.as_object_mut() {
        config.insert("path".to_owned(), serde_json::json!(from));
    }
    record
}

/// What the records say after a cut of the disk that `record` and `facts` describe, but for its epoch, which is 0: nobody
/// has been told of the snapshot. The file that was made for `snapshot`, or the leg that it takes, is its image.
#[must_use]
pub(crate) fn before_cut(
    mut record: DiskRecord,
    facts: &DiskFacts,
    mut snapshot: SnapshotRecord,
    layer: &NewLayer,
    new_live: Uuid,
) -> DiskRecord {
    match layer {
        NewLayer::Frozen(layer) => {
            snapshot.layout = layer.layout();
            snapshot.durable = matches!(layer, LayerSpec::Saved(..));
            snapshot.splits = std::mem::take(&mut record.live_splits);
        }
        NewLayer::Live(layer) => {
            snapshot.image.clone_from(&facts.live().image);
            snapshot.owns_all = record.live_log.is_none();
            snapshot.layout = std::mem::replace(&mut record.live_layout, layer.layout());
            snapshot.splits = std::mem::take(&mut record.live_splits);
            record.live_log = layer.path().map(Path::to_owned);
        }
        NewLayer::Split => {
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
pub(crate) fn of_changed(changed: Option<&ChangedFacts>) -> Option<ChangedRecord> {
    changed.map(|changed| ChangedRecord { saved: None, lost: changed.lost.clone() })
}

/// What is remembered of the snapshot when only a mark of it is left.
#[must_use]
pub(crate) fn of_bookmark(record: &SnapshotRecord, mark: &MarkFacts) -> BookmarkRecord {
    BookmarkRecord {
        id: record.id,
        group: record.group,
        name: record.name.clone(),
        began: record.began,
        ended: record.ended,
        size_bytes: mark.size_bytes,
        created_ms: record.created_ms,
        quiesced_ms: record.quiesced_ms,
        changed: of_changed(mark.changed.as_ref()),
        taken_for: record.taken_for,
    }
}
