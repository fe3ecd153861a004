//! Records of disks and their snapshots, in a transactional embedded store (redb).
//!
//! Each change is one committed transaction: after a crash the records are those of some moment. A disk's record says
//! whether its tables were saved at a clean stop, and how the images looked then; a start that finds anything else must
//! not vouch for the snapshots. Before a file is opened it is examined ([`intact`]), and each record has a checksum of its
//! own: damage is found and named, and an older commit is never taken for the newest.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use redb::{Database, ReadableDatabase, ReadableTable, WriteTransaction};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::intact::{self, Content, DISKS, DROPPED, META};
use super::work::WorkRecord;
use crate::crash;
use crate::planted::{self, Defect};

/// The format of the records. A later one is refused rather than guessed at.
const FORMAT: u64 = 5;
/// The first format that can still be read: it has no logs, no mirrors and nothing that outlives a kill. The second one has
/// no checksums, and no snapshots that outlive a power cut by themselves. The third one has no volumes: who knows only that
/// one would delete what they stand on. The fourth one has no bookmarks, no volumes that became independent, are
/// disabled or are being worked on, and no restores: it would serve a disk as whole that is restored in part.
const FORMAT_FIRST: u64 = 1;
/// The first format whose records have checksums.
const FORMAT_SEALED: u64 = 3;

/// The records could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The store or the system below it refused.
    #[error("records: {0}")]
    Store(String),
    /// They were written by another version.
    #[error("records: they have format {found}, this program knows format {FORMAT}; use the version that wrote them")]
    Format {
        /// What they say.
        found: u64,
    },
    /// The file is not what a commit left.
    #[error(
        "records: {} is damaged: {what}; put a good copy of it back, and see 'halfsilver check' for what else there is",
        path.display()
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A record cannot be understood.
    #[error("records: the record of disk {disk} is damaged: {what}")]
    Damaged {
        /// Whose record.
        disk: String,
        /// What is wrong.
        what: String,
    },
}

impl RecordError {
    fn of(e: impl Into<redb::Error>) -> RecordError {
        RecordError::Store(e.into().to_string())
    }
}

/// How an image looked when its tables were saved. If it looks different at the start, something else wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Its size in bytes.
    pub size_bytes: u64,
    /// When it was last written, in nanoseconds since 1970; 0 for a block device, which does not tell.
    pub modified_ns: i64,
}

/// A snapshot, as it is remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// The version's stable name.
    pub id: Uuid,
    /// Shared by the snapshots of one cut.
    pub group: Uuid,
    /// The name that the user gave.
    pub name: String,
    /// `copy-on-write`, `write-logging` or `write-mirroring`.
    pub strategy: String,
    /// `request` or `connection`.
    pub writers: String,
    /// The epoch in which the version began.
    pub began: u64,
    /// The last epoch that belongs to it; 0 while the cut is being prepared.
    pub ended: u64,
    /// The image of its layer.
    pub image: std::path::PathBuf,
    /// Whether that image has everything: it is the pivot, or a leg that a split left to it.
    #[serde(default)]
    pub owns_all: bool,
    /// Whether the mirror was split when it began, so that it shares no bytes with older ones.
    #[serde(default)]
    pub splits: bool,
    /// Whether what is saved for it outlives a power cut, with a durable table. Only below the full image.
    #[serde(default)]
    pub durable: bool,
    /// Its socket.
    pub socket: std::path::PathBuf,
    /// When the cut was, in milliseconds since 1970.
    pub created_ms: u64,
    /// When it was quiesced.
    pub quiesced_ms: Option<u64>,
    /// Why it cannot be vouched for.
    pub broken: Option<String>,
    /// Whether it is being deleted.
    pub deleting: bool,
    /// Whether its image is left as it is when it is deleted, instead of going back to the mirror.
    #[serde(default)]
    pub keep_image: bool,
    /// Whether its deletion was stopped by the user, and waits to be resumed.
    #[serde(default)]
    pub stopped: bool,
    /// How its image looked at the last clean stop.
    pub saved: Option<Fingerprint>,
    /// The seal of its table's durable copy.
    #[serde(default)]
    pub saved_table: Option<Uuid>,
    /// Its changed table. None if nothing was noted.
    #[serde(default)]
    pub changed: Option<ChangedRecord>,
    /// Whether a bookmark stays when it is deleted.
    #[serde(default)]
    pub keep_bookmark: bool,
    /// The stable name of the volume for whose update it was taken. It goes when that needs it no more.
    #[serde(default)]
    pub taken_for: Option<Uuid>,
}

/// A changed table, as it is remembered: it goes by its version's name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangedRecord {
    /// The seal of its durable copy, at a clean stop.
    #[serde(default)]
    pub saved: Option<Uuid>,
    /// Why it is not believed, for ever.
    #[serde(default)]
    pub lost: Option<String>,
}

/// What is left of a deleted snapshot, as it is remembered: a moment, and what was changed up to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// When the cut was, in milliseconds since 1970.
    pub created_ms: u64,
    /// When it was quiesced.
    pub quiesced_ms: Option<u64>,
    /// What was changed from the marker before it on. None if nothing was noted.
    #[serde(default)]
    pub changed: Option<ChangedRecord>,
    /// As [`SnapshotRecord::taken_for`].
    #[serde(default)]
    pub taken_for: Option<Uuid>,
}

/// A leg of a mirror, as it is remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LegRecord {
    /// Its stable name.
    pub id: Uuid,
    /// Its image.
    pub path: std::path::PathBuf,
    /// How it looked at the last clean stop.
    #[serde(default)]
    pub saved: Option<Fingerprint>,
}

/// A mirror, as it is remembered. Which of its legs are good is in its write-intent bitmap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorRecord {
    /// The stable name of the bitmap.
    pub bitmap: Uuid,
    /// One or two.
    pub legs: Vec<LegRecord>,
    /// Whether its synchronisation was stopped by the user, and waits to be resumed.
    #[serde(default)]
    pub stopped: bool,
}

/// What a volume stands on, as it is remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// The stable name of the snapshot's version.
    pub snapshot: Uuid,
    /// The snapshot as the user calls it, `disk@name`.
    pub from: String,
    /// The stable name of the disk of the snapshot. Older records do not say.
    #[serde(default)]
    pub source: Option<Uuid>,
    /// The stable name of the volume's oldest version, which shows the snapshot.
    pub origin: Uuid,
    /// Its size in bytes, should the snapshot be lost.
    pub size_bytes: u64,
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
}

/// A restore in place, as it is remembered. Which blocks are pending is in its table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreRecord {
    /// The stable name of the table.
    pub id: Uuid,
    /// The stable name of the version that is restored.
    pub source: Uuid,
    /// Its snapshot as the user calls it, `disk@name`.
    pub from: String,
    /// Whether it is the disk's own, and not a volume's.
    pub is_own: bool,
    /// Whether the snapshot was taken for the restore, and goes with it.
    pub is_ours: bool,
    /// Whether it has begun. Before that the table says nothing.
    pub is_active: bool,
    /// Whether its job was stopped by the user, and waits to be resumed.
    pub stopped: bool,
    /// The pause between two steps, in milliseconds.
    #[serde(default)]
    pub delay_ms: u32,
    /// The most that it copies in a second; 0 for as much as it can.
    #[serde(default)]
    pub bytes_per_second: u64,
}

/// A disk, as it is remembered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// Its stable name.
    pub id: Uuid,
    /// The name that the user gave.
    pub name: String,
    /// How it is served; for this room only text.
    pub config: serde_json::Value,
    /// The live version's stable name.
    pub live: Uuid,
    /// The epoch in which the live version began.
    pub live_began: u64,
    /// The log in which the live version is stored, above the full image of an older one. None while the live
    /// version has the full image.
    #[serde(default)]
    pub live_log: Option<std::path::PathBuf>,
    /// The seal of the durable copy of the log's table, at a clean stop.
    #[serde(default)]
    pub live_saved_table: Option<Uuid>,
    /// How the log looked at the last clean stop. Older records do not say.
    #[serde(default)]
    pub live_saved: Option<Fingerprint>,
    /// Whether the mirror was split when the live version began.
    #[serde(default)]
    pub live_splits: bool,
    /// The live version's changed table. None if nothing is noted.
    #[serde(default)]
    pub live_changed: Option<ChangedRecord>,
    /// Oldest first.
    #[serde(default)]
    pub bookmarks: Vec<BookmarkRecord>,
    /// Its mirror, if it has one.
    #[serde(default)]
    pub mirror: Option<MirrorRecord>,
    /// What it stands on, if it is a volume.
    #[serde(default)]
    pub volume: Option<VolumeRecord>,
    /// What it stood on, if it is a volume that became independent.
    #[serde(default)]
    pub stood_on: Option<VolumeRecord>,
    /// Whether it is not served until it is enabled again.
    #[serde(default)]
    pub disabled: bool,
    /// Whether the full image is one that was made here: `<id>.raw`.
    #[serde(default)]
    pub own_image: bool,
    /// The logical block size that guests have always seen, if the image itself would say another.
    #[serde(default)]
    pub logical_block_bytes: Option<u32>,
    /// What a job is doing to it, that goes on after a restart.
    #[serde(default)]
    pub work: Option<WorkRecord>,
    /// The stable name of a live version that is about to take the place of this one: until it has, its files may go.
    #[serde(default)]
    pub next_live: Option<Uuid>,
    /// What was set of its configuration while it was served; for this room only text.
    #[serde(default)]
    pub set: serde_json::Value,
    /// Its restore in place, if one is under way.
    #[serde(default)]
    pub restore: Option<RestoreRecord>,
    /// Images that once were legs and are not any more: whatever they hold, it is not this disk.
    #[serde(default)]
    pub former_legs: Vec<std::path::PathBuf>,
    /// The boot in which the disk is served: what the run directory has is believed in that boot only.
    #[serde(default)]
    pub boot: Option<Uuid>,
    /// Oldest first.
    pub snapshots: Vec<SnapshotRecord>,
    /// How the live image looked when all tables were saved at a clean stop. None while the disk is served.
    pub saved: Option<Fingerprint>,
    /// The seal of the durable copy of the discards that were put off.
    #[serde(default)]
    pub saved_discards: Option<Uuid>,
}

/// The store of records.
pub struct Records {
    path: PathBuf,
    // None after it has failed: redb answers nothing more then, although the disk may have room again.
    database: Mutex<Option<Database>>,
}

impl Records {
    /// Opens or creates the store.
    ///
    /// # Errors
    /// When it cannot be opened, or was written by another version.
    pub fn open(path: &Path) -> Result<Records, RecordError> {
        let database = Mutex::new(Some(Self::open_database(path)?));
        Ok(Records { path: path.to_owned(), database })
    }

    fn open_database(path: &Path) -> Result<Database, RecordError> {
        let mut found = Self::read_file(path)?;
        if found.is_none() {
            Self::make(path)?;
            found = Self::read_file(path)?;
        }
        let found = found.map(|whole| whole.content).unwrap_or_default();
        check_format(found.format)?;
        let database = intact::guarded(|| Database::create(path).map_err(|e| e.to_string()))
            .map_err(|e| RecordError::Store(format!("{}: {e}", path.display())))?;
        let opened = intact::content_of(&database).map_err(RecordError::Store)?;
        let wanted = found.sealed()?;
        if wanted != opened {
            // An older format; or a commit that was whole although the power went before the header named it.
            wanted.store(begin(&database)?)?;
        }
        Ok(database)
    }

    /// Makes an empty store. It has its name when it is complete: redb does not open what it has begun to make.
    fn make(path: &Path) -> Result<(), RecordError> {
        let beside = path.with_extension("new");
        let error = |e: std::io::Error| RecordError::Store(format!("cannot make {}: {e}", path.display()));
        match std::fs::remove_file(&beside) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(error(e)),
            _ => {}
        }
        let database = intact::guarded(|| Database::create(&beside).map_err(|e| e.to_string()))
            .map_err(|e| RecordError::Store(format!("cannot make {}: {e}", path.display())))?;
        Content::default().sealed()?.store(begin(&database)?)?;
        drop(database);
        std::fs::rename(&beside, path).map_err(error)?;
        super::sync_directory_of(path).map_err(error)
    }

    /// What is in the file, found out without changing it. None when there is none.
    fn read_file(path: &Path) -> Result<Option<intact::Whole>, RecordError> {
        let bytes = match std::fs::read(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(RecordError::Store(format!("cannot read {}: {e}", path.display()))),
            Ok(bytes) if bytes.is_empty() => return Ok(None),
            Ok(bytes) => bytes,
        };
        let unreadable = |what| RecordError::Unreadable { path: path.to_owned(), what };
        intact::read(&bytes).map(Some).map_err(unreadable)
    }

    /// Works with the store; one that has failed is opened anew the next time.
    fn with<T>(&self, work: impl FnOnce(&Database) -> Result<T, RecordError>) -> Result<T, RecordError> {
        let mut slot = self.database.lock().unwrap_or_else(PoisonError::into_inner);
        let database = match slot.take() {
            Some(database) => database,
            None => Self::open_database(&self.path)?,
        };
        let done = work(&database);
        if !matches!(done, Err(RecordError::Store(_))) {
            *slot = Some(database);
        }
        done
    }

    /// All disks, by name.
    ///
    /// # Errors
    /// When the store refuses or a record is damaged.
    pub fn disks(&self) -> Result<Vec<DiskRecord>, RecordError> {
        self.with(Self::read_all)
    }

    fn read_all(database: &Database) -> Result<Vec<DiskRecord>, RecordError> {
        let read = database.begin_read().map_err(RecordError::of)?;
        let table = read.open_table(DISKS).map_err(RecordError::of)?;
        let mut disks = Vec::new();
        for entry in table.iter().map_err(RecordError::of)? {
            let (name, value) = entry.map_err(RecordError::of)?;
            disks.push(decode(Some(FORMAT), name.value(), value.value())?);
        }
        Ok(disks)
    }

    /// Stores all of `disks` in one transaction. They are durable when this returns.
    ///
    /// # Errors
    /// When the store refuses; nothing has changed then.
    pub fn put<'a>(&self, disks: impl IntoIterator<Item = &'a DiskRecord>) -> Result<(), RecordError> {
        self.with(|database| {
            let change = begin(database)?;
            for disk in disks {
                replace(&change, &disk.name, Some(disk))?;
            }
            crash::point("before records are committed");
            change.commit().map_err(RecordError::of)?;
            crash::point("after records were committed");
            Ok(())
        })
    }

    /// Forgets a disk.
    ///
    /// # Errors
    /// When the store refuses.
    pub fn remove(&self, name: &str) -> Result<(), RecordError> {
        self.with(|database| {
            let change = begin(database)?;
            replace(&change, name, None)?;
            crash::point("before records are committed");
            change.commit().map_err(RecordError::of)?;
            crash::point("after records were committed");
            Ok(())
        })
    }

    /// The names ([`DiskRecord::names`]) of what was recorded once and let go since: its files need not be kept.
    ///
    /// # Errors
    /// When the store refuses.
    pub fn dropped(&self) -> Result<BTreeSet<String>, RecordError> {
        self.with(|database| intact::content_of(database).map(|content| content.dropped).map_err(RecordError::Store))
    }

    /// Forgets what was let go, after its files were removed.
    ///
    /// # Errors
    /// When the store refuses.
    pub fn forget_dropped(&self) -> Result<(), RecordError> {
        self.with(|database| {
            let change = begin(database)?;
            change.delete_table(DROPPED).map_err(RecordError::of)?;
            change.open_table(DROPPED).map_err(RecordError::of)?;
            change.commit().map_err(RecordError::of)
        })
    }

    /// Looks at a store without changing it. None when there is none.
    ///
    /// # Errors
    /// When it cannot be read, is damaged as a whole, or was written by another version.
    pub fn examine(path: &Path) -> Result<Option<ExaminedRecords>, RecordError> {
        let Some(intact::Whole { content, is_unclean }) = Self::read_file(path)? else { return Ok(None) };
        check_format(content.format)?;
        let disks = content.disks.iter().map(|(name, value)| decode(content.format, name, value)).collect();
        Ok(Some(ExaminedRecords { format: content.format, is_unclean, disks, dropped: content.dropped }))
    }
}

/// What [`Records::examine`] found.
#[derive(Debug, Default)]
pub struct ExaminedRecords {
    /// Its format; None before the first commit.
    pub format: Option<u64>,
    /// Whether its last writer was killed.
    pub is_unclean: bool,
    /// By name.
    pub disks: Vec<Result<DiskRecord, RecordError>>,
    /// As [`Records::dropped`].
    pub dropped: BTreeSet<String>,
}

/// A change in two phases: what the file says is the newest commit has been on stable storage.
fn begin(database: &Database) -> Result<WriteTransaction, RecordError> {
    let mut change = database.begin_write().map_err(RecordError::of)?;
    change.set_two_phase_commit(!planted::is(Defect::RecordsInOnePhase));
    Ok(change)
}

/// Puts a record in the place of the one that is there. What only the old one names is let go.
fn replace(change: &WriteTransaction, name: &str, record: Option<&DiskRecord>) -> Result<(), RecordError> {
    let mut disks = change.open_table(DISKS).map_err(RecordError::of)?;
    let mut dropped = change.open_table(DROPPED).map_err(RecordError::of)?;
    let old = disks.get(name).map_err(RecordError::of)?.map(|value| decode(Some(FORMAT), name, value.value()));
    let mut before = BTreeSet::new();
    if let Some(old) = old.transpose()? {
        before = old.names();
        if !old.is_volume() {
            before.remove(&old.own_image_name()); // A disk's image stays when the disk goes.
        }
    }
    let now = record.map(DiskRecord::names).unwrap_or_default();
    for gone in before.difference(&now) {
        dropped.insert(gone.as_str(), ()).map_err(RecordError::of)?;
    }
    for kept in &now {
        dropped.remove(kept.as_str()).map_err(RecordError::of)?;
    }
    match record {
        Some(record) => drop(disks.insert(name, encode(record)?.as_slice()).map_err(RecordError::of)?),
        None => drop(disks.remove(name).map_err(RecordError::of)?),
    }
    Ok(())
}

fn check_format(found: Option<u64>) -> Result<(), RecordError> {
    match found {
        None | Some(FORMAT_FIRST..=FORMAT) => Ok(()),
        Some(found) => Err(RecordError::Format { found }),
    }
}

/// CRC-32 of the name, a zero and the JSON, in eight hexadecimal digits; a space; the JSON.
fn seal(name: &str, json: &[u8]) -> Vec<u8> {
    let mut sealed = format!("{:08x} ", checksum(name, json)).into_bytes();
    sealed.extend_from_slice(json);
    sealed
}

fn checksum(name: &str, json: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    [name.as_bytes(), &[0], json].into_iter().for_each(|part| crc.update(part));
    crc.finalize()
}

fn encode(disk: &DiskRecord) -> Result<Vec<u8>, RecordError> {
    let json = serde_json::to_vec(disk).map_err(|e| RecordError::Store(e.to_string()))?;
    Ok(seal(&disk.name, &json))
}

fn decode(format: Option<u64>, name: &str, value: &[u8]) -> Result<DiskRecord, RecordError> {
    let damaged = |what: String| RecordError::Damaged { disk: name.to_owned(), what };
    let json = match format {
        Some(1..FORMAT_SEALED) => value,
        _ => {
            let json = value.get(9..).unwrap_or_default();
            if value != seal(name, json) && !planted::is(Defect::RecordNotChecked) {
                return Err(damaged("it does not match its checksum".to_owned()));
            }
            json
        }
    };
    let record: DiskRecord = serde_json::from_slice(json).map_err(|e| damaged(e.to_string()))?;
    if record.name != name {
        return Err(damaged(format!("it is the record of {}", record.name)));
    }
    Ok(record)
}

impl Content {
    /// The same in the format of this program. Nothing is lost: what cannot be understood is an error.
    fn sealed(&self) -> Result<Content, RecordError> {
        let mut sealed = Content { format: Some(FORMAT), ..self.clone() };
        for (name, value) in &mut sealed.disks {
            let old = decode(self.format, name, value)?;
            if self.format < Some(FORMAT_SEALED) {
                *value = encode(&old)?;
            }
        }
        Ok(sealed)
    }

    /// Makes it everything that the store has.
    fn store(&self, change: WriteTransaction) -> Result<(), RecordError> {
        change.delete_table(DISKS).map_err(RecordError::of)?;
        change.delete_table(DROPPED).map_err(RecordError::of)?;
        {
            let mut meta = change.open_table(META).map_err(RecordError::of)?;
            let format = self.format.unwrap_or(FORMAT);
            meta.insert("format", format).map_err(RecordError::of)?;
            let mut disks = change.open_table(DISKS).map_err(RecordError::of)?;
            for (name, value) in &self.disks {
                disks.insert(name.as_str(), value.as_slice()).map_err(RecordError::of)?;
            }
            let mut dropped = change.open_table(DROPPED).map_err(RecordError::of)?;
            for name in &self.dropped {
                dropped.insert(name.as_str(), ()).map_err(RecordError::of)?;
            }
        }
        change.commit().map_err(RecordError::of)
    }
}

impl DiskRecord {
    /// The names of everything that has files of its own in our directories: of each table its UUID, of a snapshot's
    /// image `disk@name`.
    #[must_use]
    pub fn names(&self) -> BTreeSet<String> {
        let image = self.own_image.then(|| self.own_image_name());
        let (bitmap, restore) = (self.mirror.as_ref().map(|m| m.bitmap), self.restore.as_ref().map(|r| r.id));
        let own = [Some(self.id), Some(self.live), self.next_live, bitmap, restore];
        let ids = own.into_iter().flatten().chain(self.snapshots.iter().map(|s| s.id)).map(|id| id.to_string());
        let ids = ids.chain(self.bookmarks.iter().map(|b| b.id.to_string()));
        ids.chain(self.snapshots.iter().map(|s| format!("{}@{}", self.name, s.name))).chain(image).collect()
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

#[cfg(test)]
#[path = "records_tests.rs"]
mod tests;
