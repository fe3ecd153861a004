//! What is remembered of a disk: for this room only fields that are stored.
//!
//! What always holds: a field that this program does not know makes a record unreadable to it, so that none is lost by being
//! stored again. Who adds or changes one gives the records another format ([`super::records`]).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::identity::Identity;
use super::work::WorkRecord;

/// How an image looked when its tables were saved. If it looks different at the start, something else wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fingerprint {
    /// Its size in bytes.
    pub size_bytes: u64,
    /// When it was last written, in nanoseconds since 1970; 0 for a block device, which does not tell.
    pub modified_ns: i64,
}

/// What became of the full image when a snapshot was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// The live version kept it.
    CopyOnWrite,
    /// The snapshot kept it.
    WriteLogging,
    /// Each took a leg of it.
    WriteMirroring,
}

/// Who stayed with a snapshot when it was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Writers {
    /// Requests in flight.
    Request,
    /// The frontends that were connected.
    Connection,
}

/// How the blocks of a layer lie in its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// Each at its own position, in an image of the disk's size. A full image has no other.
    Sparse,
    /// As they came: a pack ([`super::Pack`]).
    Packed,
}

/// A snapshot, as it is remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRecord {
    /// The version's stable name.
    pub id: Uuid,
    /// Shared by the snapshots of one cut.
    pub group: Uuid,
    /// The name that the user gave.
    pub name: String,
    /// What became of the full image when it was taken.
    pub strategy: Strategy,
    /// Who stayed with it.
    pub writers: Writers,
    /// The epoch in which the version began.
    pub began: u64,
    /// The last epoch that belongs to it; 0 while the cut is being prepared.
    pub ended: u64,
    /// Its size in bytes: what the disk had when it was taken.
    pub size_bytes: u64,
    /// The image of its layer.
    pub image: PathBuf,
    /// How blocks lie in that image.
    pub layout: Layout,
    /// Whether that image has everything: it is the pivot, or a leg that a split left to it.
    pub owns_all: bool,
    /// Whether the mirror was split when it began, so that it shares no bytes with older ones.
    pub splits: bool,
    /// Whether what is saved for it outlives a power cut, with a durable table. Only below the full image.
    pub durable: bool,
    /// Its socket.
    pub socket: PathBuf,
    /// When the cut was, in milliseconds since 1970.
    pub created_ms: u64,
    /// When it was quiesced.
    pub quiesced_ms: Option<u64>,
    /// Why it cannot be vouched for.
    pub broken: Option<String>,
    /// Its deletion, if one is under way.
    pub deletion: Option<DeletionRecord>,
    /// How its image looked at the last clean stop.
    pub saved: Option<Fingerprint>,
    /// The seal of its table's durable copy.
    pub saved_table: Option<Uuid>,
    /// Its dirty bitmap. None if nothing was noted.
    pub changed: Option<ChangedRecord>,
    /// The stable name of the volume for whose update it was taken, or of the disk for whose restore. It goes when that
    /// needs it no more.
    pub taken_for: Option<Uuid>,
}

/// A deletion that is under way, as it is remembered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeletionRecord {
    /// Whether the snapshot's image is left as it is, instead of going back to the mirror.
    pub keep_image: bool,
    /// Whether a bookmark stays.
    pub keep_bookmark: bool,
    /// Whether it was stopped by the user, and waits to be resumed.
    pub stopped: bool,
}

/// A dirty bitmap, as it is remembered: it goes by its version's name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangedRecord {
    /// The seal of its durable copy, at a clean stop.
    pub saved: Option<Uuid>,
    /// Why it is not believed, for ever.
    pub lost: Option<String>,
}

/// What is left of a deleted snapshot, as it is remembered: a moment, and what was changed up to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BookmarkRecord {
    /// The stable name of the version that it was.
    pub id: Uuid,
    /// Shared by the snapshots of one cut.
    pub group: Uuid,
    /// The name that the user gave.
    pub name: String,
    /// The epoch in which the version began.
    pub began: u64,
    /// The last epoch that belongs to it.
    pub ended: u64,
    /// Its size in bytes: what the disk had at that moment.
    pub size_bytes: u64,
    /// When the cut was, in milliseconds since 1970.
    pub created_ms: u64,
    /// When it was quiesced.
    pub quiesced_ms: Option<u64>,
    /// What was changed from the marker before it on. None if nothing was noted.
    pub changed: Option<ChangedRecord>,
    /// As [`SnapshotRecord::taken_for`].
    pub taken_for: Option<Uuid>,
}

/// A leg of a mirror, as it is remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LegRecord {
    /// Its stable name.
    pub id: Uuid,
    /// Its image.
    pub path: PathBuf,
    /// How it looked at the last clean stop.
    pub saved: Option<Fingerprint>,
}

/// A mirror, as it is remembered. Which of its legs are good is in its write-intent bitmap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MirrorRecord {
    /// The stable name of the bitmap.
    pub bitmap: Uuid,
    /// One or two.
    pub legs: Vec<LegRecord>,
    /// Whether its synchronisation was stopped by the user, and waits to be resumed.
    pub stopped: bool,
}

/// What a volume stands on, as it is remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeRecord {
    /// The stable name of the snapshot's version.
    pub snapshot: Uuid,
    /// The snapshot as the user calls it, `disk@name`.
    pub from: String,
    /// The stable name of the disk of the snapshot.
    pub source: Uuid,
    /// The stable name of the volume's oldest version, which shows the snapshot.
    pub origin: Uuid,
    /// Its size in bytes, should the snapshot be lost.
    pub size_bytes: u64,
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
}

/// Whose snapshot a disk is restored from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestoreSourceKind {
    /// The disk's own.
    Disk,
    /// A volume's.
    Volume,
    /// A volume's, taken for the restore: it goes with it.
    VolumeNow,
}

/// How far a restore in place has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestorePhase {
    /// The disk does not show it yet: its table says nothing.
    Prepared,
    /// The disk shows it, and its job brings the blocks back.
    Active,
    /// The disk shows it. Its job was stopped by the user, and waits to be resumed.
    Stopped,
}

/// A restore in place, as it is remembered. Which blocks are pending is in its table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreRecord {
    /// The stable name of the table.
    pub id: Uuid,
    /// The stable name of the version that is restored.
    pub source: Uuid,
    /// Its snapshot as the user calls it, `disk@name`.
    pub from: String,
    /// Whose snapshot that is.
    pub source_kind: RestoreSourceKind,
    /// How far it has come.
    pub phase: RestorePhase,
    /// The pause between two steps, in milliseconds.
    pub delay_ms: u32,
    /// The most that it copies in a second; 0 for as much as it can.
    pub bytes_per_second: u64,
}

impl RestoreRecord {
    /// Whether the disk shows what it is restored to.
    #[must_use]
    pub fn is_shown(&self) -> bool {
        self.phase != RestorePhase::Prepared
    }

    /// Whether what it is restored to is the disk's own.
    #[must_use]
    pub fn is_own(&self) -> bool {
        self.source_kind == RestoreSourceKind::Disk
    }
}

/// A disk, as it is remembered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskRecord {
    /// Its stable name.
    pub id: Uuid,
    /// The name that the user gave.
    pub name: String,
    /// Its size in bytes. Its full image may have room for more: then it grows when it is served next.
    pub size_bytes: u64,
    /// How it is served; for this room only text.
    pub config: serde_json::Value,
    /// What was set of its configuration while it was served; for this room only text.
    pub set: serde_json::Value,
    /// The live version's stable name.
    pub live: Uuid,
    /// The epoch in which the live version began.
    pub live_began: u64,
    /// The log in which the live version is stored, above the full image of an older one. None while the live
    /// version has the full image.
    pub live_log: Option<PathBuf>,
    /// How blocks lie in the live version's image.
    pub live_layout: Layout,
    /// The seal of the durable copy of the log's table, at a clean stop.
    pub live_saved_table: Option<Uuid>,
    /// How the log looked at the last clean stop.
    pub live_saved: Option<Fingerprint>,
    /// Whether the mirror was split when the live version began.
    pub live_splits: bool,
    /// The live version's dirty bitmap. None if nothing is noted.
    pub live_changed: Option<ChangedRecord>,
    /// Oldest first.
    pub bookmarks: Vec<BookmarkRecord>,
    /// Its mirror, if it has one.
    pub mirror: Option<MirrorRecord>,
    /// What it stands on, if it is a volume.
    pub volume: Option<VolumeRecord>,
    /// What it stood on, if it is a volume that became independent.
    pub stood_on: Option<VolumeRecord>,
    /// Whether it is not served until it is enabled again.
    pub disabled: bool,
    /// Whether the full image is one that was made here: `<id>.raw`.
    pub own_image: bool,
    /// The logical block size that guests have always seen, if the image itself would say another.
    pub logical_block_bytes: Option<u32>,
    /// What a job is doing to it, that goes on after a restart.
    pub work: Option<WorkRecord>,
    /// The stable name of a live version that is about to take the place of this one: until it has, its files may go.
    pub next_live: Option<Uuid>,
    /// Its restore in place, if one is under way.
    pub restore: Option<RestoreRecord>,
    /// Images that once were legs and are not any more: whatever they hold, it is not this disk.
    pub former_legs: Vec<PathBuf>,
    /// What tells each of its images from every other, by its path, as far as that could be told.
    pub identities: BTreeMap<PathBuf, Identity>,
    /// What tells the directory of the records from a copy of it: in one, images are copies as well.
    pub kept_in: Option<Identity>,
    /// The boot in which the disk is served: what the run directory has is believed in that boot only.
    pub boot: Option<Uuid>,
    /// Oldest first.
    pub snapshots: Vec<SnapshotRecord>,
    /// How the live image looked when all tables were saved at a clean stop. None while the disk is served.
    pub saved: Option<Fingerprint>,
    /// The seal of the durable copy of the discards that were put off.
    pub saved_discards: Option<Uuid>,
}

impl SnapshotRecord {
    /// Whether a bookmark stays of it: it is being deleted, and that was asked for.
    #[must_use]
    pub fn leaves_bookmark(&self) -> bool {
        self.deletion.is_some_and(|deletion| deletion.keep_bookmark)
    }

    /// Whether its image is to be left as it is: it is being deleted, and that was asked for.
    #[must_use]
    pub fn leaves_image(&self) -> bool {
        self.deletion.is_some_and(|deletion| deletion.keep_image)
    }
}

impl DiskRecord {
    /// Where its images are, of a mirror all legs, of a volume those of its own.
    #[must_use]
    pub fn images(&self) -> BTreeSet<PathBuf> {
        // What the configuration of a volume that stands on something has for a path is no path.
        let own = self.config.get("path").and_then(|path| path.as_str()).filter(|_| self.volume.is_none());
        let legs = self.mirror.iter().flat_map(|mirror| &mirror.legs).map(|leg| leg.path.clone());
        let layers = self.snapshots.iter().map(|s| s.image.clone()).chain(self.live_log.clone());
        own.map(PathBuf::from).into_iter().chain(legs).chain(layers).collect()
    }

    /// The names of everything that has files of its own in our directories: of each table its UUID, and what its images
    /// are called.
    #[must_use]
    pub fn names(&self) -> BTreeSet<String> {
        let image = self.own_image.then(|| self.own_image_name());
        let (bitmap, restore) = (self.mirror.as_ref().map(|m| m.bitmap), self.restore.as_ref().map(|r| r.id));
        let own = [Some(self.id), Some(self.live), self.next_live, bitmap, restore];
        let ids = own.into_iter().flatten().chain(self.snapshots.iter().map(|s| s.id)).map(|id| id.to_string());
        let ids = ids.chain(self.bookmarks.iter().map(|b| b.id.to_string()));
        ids.chain(self.image_names()).chain(image).collect()
    }

    /// What the images of its snapshots are called, whatever the disk was called then and wherever their directory is now.
    pub fn image_names(&self) -> impl Iterator<Item = String> + '_ {
        // A full image is the disk's own, or a leg.
        let images = self.snapshots.iter().filter(|s| !s.owns_all && s.image.extension().is_some_and(|e| e == "img"));
        images.filter_map(|snapshot| {
            let stem = snapshot.image.file_stem()?.to_str()?;
            Some(stem.to_owned())
        })
    }

    /// What its snapshot or bookmark with this id is called.
    #[must_use]
    pub fn reference_of(&self, moment: Uuid) -> Option<String> {
        let snapshot = self.snapshots.iter().find(|s| s.id == moment).map(|s| &s.name);
        let name = snapshot.or_else(|| self.bookmarks.iter().find(|b| b.id == moment).map(|b| &b.name))?;
        Some(format!("{}@{name}", self.name))
    }

    /// What a full image that was made here is called.
    #[must_use]
    pub fn own_image_name(&self) -> String {
        format!("{}.raw", self.id)
    }

    /// Whether it is a volume: it stands on a snapshot, or once did.
    #[must_use]
    pub fn is_volume(&self) -> bool {
        self.volume.is_some() || self.stood_on.is_some()
    }
}

/// What is let go when `now` takes the place of `before`, and what is named from then on.
#[must_use]
pub fn names_let_go(before: Option<&DiskRecord>, now: Option<&DiskRecord>) -> (BTreeSet<String>, BTreeSet<String>) {
    let mut names = before.map(DiskRecord::names).unwrap_or_default();
    if let Some(before) = before.filter(|before| !before.is_volume()) {
        names.remove(&before.own_image_name()); // A disk's image stays when the disk goes.
    }
    let now = now.map(DiskRecord::names).unwrap_or_default();
    (names.difference(&now).cloned().collect(), now)
}

/// Says of all that names a snapshot by its id what that is called now, if it is there.
pub(super) fn name_moments(disks: &mut [DiskRecord]) {
    let names = |disk: &DiskRecord| {
        let snapshots = disk.snapshots.iter().map(|s| (s.id, &s.name));
        let moments = disk.bookmarks.iter().map(|b| (b.id, &b.name)).chain(snapshots);
        moments.map(|(id, name)| (id, format!("{}@{name}", disk.name))).collect::<Vec<_>>()
    };
    let now: BTreeMap<Uuid, String> = disks.iter().flat_map(names).collect();
    for disk in disks {
        let volumes = [&mut disk.volume, &mut disk.stood_on].into_iter().flatten().map(|v| (v.snapshot, &mut v.from));
        let restore = disk.restore.as_mut().map(|r| (r.source, &mut r.from));
        for (id, text) in volumes.chain(restore) {
            if let Some(now) = now.get(&id) {
                text.clone_from(now);
            }
        }
    }
}

impl Fingerprint {
    /// How the container at `path` looks now.
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub fn of(path: &Path) -> std::io::Result<Fingerprint> {
        use std::os::unix::fs::MetadataExt;
        let meta = std::fs::metadata(path)?;
        let modified_ns = if meta.is_file() { meta.mtime() * 1_000_000_000 + meta.mtime_nsec() } else { 0 };
        Ok(Fingerprint { size_bytes: meta.len(), modified_ns })
    }
}
