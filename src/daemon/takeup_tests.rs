//! What is believed of changed tables after which end of the daemon.

use std::path::Path;
use std::sync::Arc;

use serde_json::json;
use uuid::Uuid;

use super::{LayerSource, Taken, Trust, take_up};
use crate::image::SharedImage;
use crate::mirror::{Backing, Disk, Layer, View};
use crate::store::{BlockIndex, BlockRange, DiskRecord, Fingerprint, SnapshotRecord, Table};

const SIZE: u64 = 1 << 20;

/// Everything that is asked for is there.
struct Whole;

fn table() -> Arc<Table> {
    Arc::new(Disk::table_in_memory(SIZE, 4096).unwrap())
}

fn backing() -> Backing {
    Backing::View(View::lost("no bytes are read here", Uuid::nil(), "vm1@base", SIZE))
}

impl LayerSource for Whole {
    fn is_file(&self, _path: &Path) -> bool {
        true
    }

    fn fingerprint(&self, _path: &Path) -> Option<Fingerprint> {
        None
    }

    fn open_full(&self, _path: &Path) -> Result<SharedImage, String> {
        Err("not asked for".to_owned())
    }

    fn open_frozen(&self, _record: &SnapshotRecord) -> Result<Layer, String> {
        Ok(Layer::of(backing(), table()))
    }

    fn open_log(&self, _id: Uuid, _path: &Path, _seal: Option<Uuid>) -> Result<Layer, String> {
        Err("not asked for".to_owned())
    }

    fn open_changed(&self, _id: Uuid, _seal: Option<Uuid>) -> Result<Arc<Table>, String> {
        let table = table();
        table.note(BlockRange::one(BlockIndex(7))).unwrap();
        Ok(table)
    }
}

/// A disk with the bookmark 1, the copy-on-write snapshot 2, and the live version 3.
fn record() -> DiskRecord {
    let changed = json!({});
    let (bookmark, snapshot, live) = (Uuid::from_u128(1), Uuid::from_u128(2), Uuid::from_u128(3));
    serde_json::from_value(json!({
        "id": Uuid::nil(), "name": "vm1", "config": {}, "live": live, "live_began": 7, "live_changed": changed,
        "bookmarks": [{ "id": bookmark, "group": bookmark, "name": "a", "began": 1, "ended": 3, "created_ms": 1,
            "quiesced_ms": 2, "changed": null }],
        "snapshots": [{ "id": snapshot, "group": snapshot, "name": "b", "strategy": "copy-on-write",
            "writers": "request", "began": 4, "ended": 6, "image": "/b.img", "durable": true, "socket": "/b.sock",
            "created_ms": 3, "quiesced_ms": 4, "broken": null, "deleting": false, "saved": null, "changed": changed }],
        "saved": null
    }))
    .unwrap()
}

fn taken(record: DiskRecord, trust: Trust) -> Taken {
    take_up(record, &backing(), Path::new("/vm1.raw"), trust, &Whole).unwrap()
}

#[test]
fn changed_tables_are_believed_after_a_stop_and_a_kill_and_never_else() {
    for trust in [Trust::Saved, Trust::SameBoot, Trust::PowerCut, Trust::Changed] {
        let taken = taken(record(), trust);
        let live = &taken.links.last().unwrap().version;
        let is_believed = matches!(trust, Trust::SameBoot | Trust::Saved);
        assert_eq!(live.changed().unwrap().known().is_ok(), is_believed, "{trust:?}");
        let mark = taken.marks.iter().find(|mark| mark.id == Uuid::from_u128(1)).unwrap();
        assert!(mark.changed.is_none() && mark.began.0 == 1, "{trust:?}: the oldest has nothing before it");
        // The snapshot is whole, or what is left of it stands for it.
        let snapshot = Uuid::from_u128(2);
        let version = taken.links.iter().find(|link| link.version.id == snapshot);
        let changed = match version {
            Some(link) => link.version.changed().cloned(),
            None => taken.marks.iter().find(|mark| mark.id == snapshot).unwrap().changed.clone(),
        };
        assert_eq!(changed.unwrap().known().is_ok(), is_believed, "{trust:?}");
    }
}

#[test]
fn what_was_lost_once_stays_lost() {
    let mut record = record();
    record.live_changed.as_mut().unwrap().lost = Some("a power cut".to_owned());
    for trust in [Trust::Saved, Trust::SameBoot] {
        let taken = taken(record.clone(), trust);
        let live = taken.links.last().unwrap().version.clone();
        assert_eq!(live.changed().unwrap().known().err(), Some("a power cut"));
    }
}

/// Requests from before it may have reached one leg only.
#[test]
fn a_split_that_still_drained_is_doubted() {
    let mut record = record();
    record.live_splits = true;
    record.snapshots[0].owns_all = true;
    let whole = |record: DiskRecord| {
        let taken = taken(record, Trust::SameBoot);
        taken.links.last().unwrap().version.changed().unwrap().known().is_ok()
    };
    assert!(whole(record.clone()), "it had drained");
    record.snapshots[0].quiesced_ms = None;
    assert!(!whole(record.clone()));
    record.live_splits = false;
    record.snapshots[0].owns_all = false;
    assert!(whole(record), "without a split there is one place for both");
}

/// Older programs noted nothing; a snapshot that they took says so by having no table.
#[test]
fn what_was_never_noted_is_unknown() {
    let mut record = record();
    record.live_changed = None;
    assert!(taken(record, Trust::SameBoot).links.last().unwrap().version.changed().is_none());
}
