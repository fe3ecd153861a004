//! What decisions are tested with: disks of every shape, and evidence in which everything is there but what is said.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::json;
use uuid::Uuid;

use super::{Durable, DurableFacts, Evidence, ImageFacts};
use crate::door::{LegState, PairError, PairFacts};
use crate::image::{ImageError, ImageErrorKind, ImageOp};
use crate::store::{
    Believed, BlockIndex, BlockRange, DiskRecord, Fingerprint, Identity, LegRecord, MirrorRecord, PackFacts,
    RestorePhase, RestoreRecord, RestoreSourceKind, RunTableFacts, SnapshotRecord, TableError, VolumeRecord,
};

pub(super) const SIZE: u64 = 1 << 20;
pub(super) const LOOKS: Fingerprint = Fingerprint { size_bytes: SIZE, modified_ns: 7 };

/// What an image is recognised by, and what another one is.
pub(super) const ITSELF: Identity = Identity::File { inode: Some(1), born_ns: Some(2) };
pub(super) const OTHER: Identity = Identity::File { inode: Some(3), born_ns: Some(4) };

/// Everything is there and whole, but for what is said.
#[derive(Default)]
pub(super) struct Found {
    pub(super) missing: BTreeSet<PathBuf>,
    pub(super) changed: BTreeSet<PathBuf>,
    /// Other images than those that were there.
    pub(super) strangers: BTreeSet<PathBuf>,
    pub(super) sizes: BTreeMap<PathBuf, u64>,
    pub(super) units: BTreeMap<PathBuf, u32>,
    /// Tables as they were left, saved ones and run tables.
    pub(super) no_left: BTreeSet<Uuid>,
    pub(super) flagged: BTreeSet<Uuid>,
    pub(super) no_durable: BTreeSet<Uuid>,
    pub(super) damaged: BTreeSet<Uuid>,
    /// Durable copies without a bit that is set.
    pub(super) empty: BTreeSet<Uuid>,
    pub(super) given_up: BTreeSet<Uuid>,
    pub(super) no_changes: BTreeSet<Uuid>,
    pub(super) marks: BTreeMap<Uuid, String>,
    pub(super) legs: Vec<(Uuid, LegState)>,
    /// Packs that are not whole, by what is believed of them.
    pub(super) no_packs: Vec<(Uuid, Believed)>,
}

pub(super) fn put<T: Ord>(of: &mut BTreeSet<T>, one: impl Into<T>) {
    of.insert(one.into());
}

pub(super) fn set<K: Ord, V>(of: &mut BTreeMap<K, V>, one: impl Into<K>, value: V) {
    of.insert(one.into(), value);
}

fn no_table(id: Uuid) -> TableError {
    TableError::Damaged { path: id.to_string().into(), what: "it is not right".to_owned() }
}

impl Found {
    fn image(&self, path: &Path) -> Result<ImageFacts, ImageError> {
        if self.missing.contains(path) {
            return Err(ImageError::new(ImageErrorKind::Io, ImageOp::Open, path, "it is not there"));
        }
        let size_bytes = self.sizes.get(path).copied().unwrap_or(SIZE);
        let unit_bytes = self.units.get(path).copied().unwrap_or(512);
        Ok(ImageFacts { path: path.to_owned(), size_bytes, unit_bytes })
    }

    fn facts(&self, id: Uuid, lost: &BTreeSet<Uuid>) -> Result<RunTableFacts, TableError> {
        if lost.contains(&id) {
            return Err(no_table(id));
        }
        Ok(RunTableFacts { ones: 1, is_broken: self.flagged.contains(&id) })
    }
}

impl Evidence for Found {
    fn block_bytes(&self) -> u32 {
        4096
    }

    fn full_image_looks(&self) -> Option<Fingerprint> {
        self.looks(Path::new("/vm1.raw"))
    }

    fn full_image(&self, _made_here: bool) -> Result<ImageFacts, ImageError> {
        self.image(Path::new("/vm1.raw"))
    }

    fn leg(&self, path: &Path) -> Result<ImageFacts, ImageError> {
        self.image(path)
    }

    fn layer_image(&self, path: &Path) -> Result<ImageFacts, ImageError> {
        self.image(path)
    }

    fn pack(&self, _path: &Path, id: Uuid, _size: u64, believed: Believed) -> Result<PackFacts, TableError> {
        if self.no_packs.contains(&(id, believed)) { Err(no_table(id)) } else { Ok(PackFacts::default()) }
    }

    fn mirror(&self, _mirror: &MirrorRecord, usable: &[Uuid], _size: u64) -> Result<PairFacts, PairError> {
        let found = |(id, state): (Uuid, LegState)| match state {
            LegState::InSync | LegState::Resynchronising if !usable.contains(&id) => {
                (id, LegState::Failed("gone".to_owned()))
            }
            state => (id, state),
        };
        let legs: Vec<_> = self.legs.iter().cloned().map(found).collect();
        if !legs.iter().any(|(_, state)| *state == LegState::InSync) {
            return Err(PairError::Refused("none of its legs is in sync".to_owned()));
        }
        Ok(PairFacts { legs, regions: 0, damaged: Vec::new() })
    }

    fn looks(&self, path: &Path) -> Option<Fingerprint> {
        let modified_ns = if self.changed.contains(path) { 8 } else { 7 };
        (!self.missing.contains(path)).then_some(Fingerprint { modified_ns, ..LOOKS })
    }

    fn identity(&self, path: &Path) -> Option<Identity> {
        Some(if self.strangers.contains(path) { OTHER } else { ITSELF })
    }

    fn kept_in(&self) -> Option<Identity> {
        Some(ITSELF)
    }

    fn is_file(&self, path: &Path) -> bool {
        !self.missing.contains(path)
    }

    fn run_table(&self, id: Uuid, _blocks: u64) -> Result<RunTableFacts, TableError> {
        self.facts(id, &self.no_left)
    }

    fn saved_table(&self, id: Uuid, _blocks: u64, _seal: Uuid) -> Result<(), TableError> {
        if self.no_left.contains(&id) { Err(no_table(id)) } else { Ok(()) }
    }

    fn durable_table(&self, _which: Durable, id: Uuid, _blocks: u64) -> Result<DurableFacts, TableError> {
        if self.no_durable.contains(&id) {
            return Err(no_table(id));
        }
        let damage = BlockRange { start: BlockIndex(3), end: BlockIndex(9) };
        let damaged = if self.damaged.contains(&id) { vec![damage] } else { Vec::new() };
        let ones = u64::from(!self.empty.contains(&id));
        Ok(DurableFacts { place: id.to_string().into(), damaged, ones })
    }

    fn is_given_up(&self, id: Uuid) -> bool {
        self.given_up.contains(&id)
    }

    fn run_changes(&self, id: Uuid, _blocks: u64) -> Result<RunTableFacts, TableError> {
        self.facts(id, &self.no_changes)
    }

    fn saved_changes(&self, id: Uuid, _blocks: u64, _seal: Uuid) -> Result<(), TableError> {
        self.facts(id, &self.no_changes).map(drop)
    }

    fn why_broken(&self, id: Uuid) -> Option<String> {
        self.marks.get(&id).cloned()
    }
}

pub(super) fn id(n: u128) -> Uuid {
    Uuid::from_u128(n)
}

pub(super) fn snapshot(n: u128, name: &str, began: u64) -> SnapshotRecord {
    serde_json::from_value(json!({
        "id": id(n), "group": id(n), "name": name, "strategy": "copy-on-write", "writers": "request", "began": began,
        "ended": began + 1, "size_bytes": SIZE, "image": format!("/{name}.img"), "layout": "sparse", "owns_all": false, "splits": false, "durable": false,
        "socket": "/s", "created_ms": 3, "quiesced_ms": 4, "broken": null, "deletion": null,
        "saved": LOOKS, "saved_table": id(99), "changed": { "saved": id(99), "lost": null },
        "taken_for": null,
    }))
    .unwrap()
}

/// A disk with the bookmark 1, the copy-on-write snapshots 2 and 3, and the live version 9.
pub(super) fn record() -> DiskRecord {
    serde_json::from_value(json!({
        "id": id(100), "name": "vm1", "size_bytes": SIZE, "config": {}, "set": null, "live": id(9), "live_began": 20, "live_log": null,
        "live_layout": "sparse", "live_saved_table": null, "live_saved": null, "live_splits": false,
        "live_changed": { "saved": id(99), "lost": null },
        "bookmarks": [{ "id": id(1), "group": id(1), "name": "mark", "began": 1, "ended": 3, "size_bytes": SIZE, "created_ms": 1,
            "quiesced_ms": 2, "changed": null, "taken_for": null }],
        "mirror": null, "volume": null, "stood_on": null, "disabled": false, "own_image": false,
        "logical_block_bytes": null, "work": null, "next_live": null, "restore": null, "former_legs": [], "identities": {}, "kept_in": null, "boot": null,
        "snapshots": [snapshot(2, "a", 4), snapshot(3, "b", 8)], "saved": LOOKS, "saved_discards": null
    }))
    .unwrap()
}

/// The same after a write-logging cut: snapshot 4 has the full image, and the live version a log.
pub(super) fn logged() -> DiskRecord {
    let mut record = record();
    let log = SnapshotRecord { owns_all: true, image: "/vm1.raw".into(), ..snapshot(4, "c", 12) };
    record.snapshots.push(log);
    (record.live_log, record.live_saved, record.live_saved_table) =
        (Some("/live.log".into()), Some(LOOKS), Some(id(99)));
    record
}

/// After a split: snapshot 4 has the leg `/leg1`, and the live version the other one.
pub(super) fn split() -> DiskRecord {
    let mut record = record();
    record.snapshots.push(SnapshotRecord { owns_all: true, image: "/leg1".into(), ..snapshot(4, "c", 12) });
    record.live_splits = true;
    let leg = |n, path: &str| LegRecord { id: id(n), path: path.into(), saved: Some(LOOKS) };
    record.mirror =
        Some(MirrorRecord { bitmap: id(50), legs: vec![leg(51, "/leg0"), leg(52, "/leg1")], stopped: false });
    record
}

pub(super) fn legs_of(states: [LegState; 2]) -> Vec<(Uuid, LegState)> {
    [id(51), id(52)].into_iter().zip(states).collect()
}

pub(super) fn volume() -> DiskRecord {
    let volume = VolumeRecord {
        snapshot: id(2),
        from: "vm1@a".to_owned(),
        source: id(100),
        origin: id(60),
        size_bytes: SIZE,
        created_ms: 1,
    };
    let mut record = record();
    (record.id, record.name, record.live) = (id(101), "clone".to_owned(), id(61));
    (record.snapshots, record.bookmarks, record.volume) = (vec![snapshot(62, "x", 4)], Vec::new(), Some(volume));
    (record.live_log, record.live_saved, record.live_saved_table) =
        (Some("/clone.log".into()), Some(LOOKS), Some(id(99)));
    record
}

pub(super) fn restored(mut record: DiskRecord, source: Uuid, is_own: bool) -> DiskRecord {
    let from = if is_own { "vm1@b" } else { "clone@x" }.to_owned();
    record.restore = Some(RestoreRecord {
        id: id(70),
        source,
        from,
        source_kind: if is_own { RestoreSourceKind::Disk } else { RestoreSourceKind::Volume },
        phase: RestorePhase::Active,
        delay_ms: 0,
        bytes_per_second: 0,
    });
    record
}
