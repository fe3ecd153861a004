//! Records of disks and their snapshots, in a transactional embedded store (redb).
//!
//! Each change is one committed transaction: after a crash the records are those of some moment. A disk's record says
//! whether its tables were saved at a clean stop, and how the images looked then; a start that finds anything else must
//! not vouch for the snapshots.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::crash;

/// The format of the records. A later one is refused rather than guessed at.
const FORMAT: u64 = 3;
/// The first format that can still be read: it has no logs, no mirrors and nothing that outlives a kill. The second one has
/// no snapshots that outlive a power cut by themselves.
const FORMAT_FIRST: u64 = 1;
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
const DISKS: TableDefinition<&str, &[u8]> = TableDefinition::new("disks");

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
    /// Whether the mirror was split when the live version began.
    #[serde(default)]
    pub live_splits: bool,
    /// Its mirror, if it has one.
    #[serde(default)]
    pub mirror: Option<MirrorRecord>,
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
        let database = Database::create(path).map_err(RecordError::of)?;
        let change = database.begin_write().map_err(RecordError::of)?;
        {
            let mut meta = change.open_table(META).map_err(RecordError::of)?;
            let found = meta.get("format").map_err(RecordError::of)?.map(|v| v.value());
            match found {
                None => drop(meta.insert("format", FORMAT).map_err(RecordError::of)?),
                Some(FORMAT) => {}
                // From now on an older program must not touch it: it would take a log for nothing, or overwrite what a
                // durable snapshot reads.
                Some(FORMAT_FIRST..FORMAT) => drop(meta.insert("format", FORMAT).map_err(RecordError::of)?),
                Some(found) => return Err(RecordError::Format { found }),
            }
            change.open_table(DISKS).map_err(RecordError::of)?;
        }
        change.commit().map_err(RecordError::of)?;
        Ok(database)
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
            let damaged =
                |e: serde_json::Error| RecordError::Damaged { disk: name.value().into(), what: e.to_string() };
            disks.push(serde_json::from_slice(value.value()).map_err(damaged)?);
        }
        Ok(disks)
    }

    /// Stores all of `disks` in one transaction. They are durable when this returns.
    ///
    /// # Errors
    /// When the store refuses; nothing has changed then.
    pub fn put<'a>(&self, disks: impl IntoIterator<Item = &'a DiskRecord>) -> Result<(), RecordError> {
        self.with(|database| {
            let change = database.begin_write().map_err(RecordError::of)?;
            {
                let mut table = change.open_table(DISKS).map_err(RecordError::of)?;
                for disk in disks {
                    let value = serde_json::to_vec(disk).map_err(|e| RecordError::Store(e.to_string()))?;
                    table.insert(disk.name.as_str(), value.as_slice()).map_err(RecordError::of)?;
                }
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
            let change = database.begin_write().map_err(RecordError::of)?;
            change.open_table(DISKS).map_err(RecordError::of)?.remove(name).map_err(RecordError::of)?;
            crash::point("before records are committed");
            change.commit().map_err(RecordError::of)?;
            crash::point("after records were committed");
            Ok(())
        })
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
