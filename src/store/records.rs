//! Records of disks and their snapshots, in a transactional embedded store (redb).
//!
//! What always holds:
//! - Each change is one committed transaction: after a crash the records are those of some moment. Before a file is opened it
//!   is examined ([`intact`]): an older commit is never taken for the newest.
//! - Each record has a checksum and a format of its own, so one that cannot be read does not stop the others. It stays as it
//!   is, byte for byte, until it is removed by name.
//! - A change that is refused has not taken place: what a failed commit left in the file is taken back before anything else
//!   is done with it, and who asked is told [`RecordError::Unknown`] while that cannot be done.
//! - A job's number is never given twice.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use redb::{Database, ReadableTable, WriteTransaction};

use super::intact::{self, Content, DISKS, DROPPED, META};
use super::record::{DiskRecord, name_moments, names_let_go};
use super::record_store::{LAYOUT, RecordError, RecordStore, Remembered, UnreadableRecord};
use crate::crash;

#[cfg(test)]
use self::tests::create;

/// The format of the records. It grows with every field that is added or means something else.
const FORMAT: u64 = 3;
/// How many numbers of jobs are set aside in one transaction. Those that are left when a process ends are not used.
const JOB_LOT: u64 = 32;

#[cfg(not(test))]
fn create(path: &Path) -> Result<Database, redb::DatabaseError> {
    Database::create(path)
}

fn error_of(e: impl Into<redb::Error>) -> RecordError {
    match e.into() {
        redb::Error::Io(e) if e.kind() == std::io::ErrorKind::StorageFull => RecordError::NoSpace(e.to_string()),
        e => RecordError::Store(e.to_string()),
    }
}

/// The store of records.
pub struct Records {
    path: PathBuf,
    state: Mutex<State>,
    /// Numbers of jobs that were set aside and not given yet.
    job_ids: Mutex<Range<u64>>,
}

struct State {
    // None after it has failed: redb answers nothing more then, although the disk may have room again.
    database: Option<Database>,
    /// What the file may have of a change that was refused, to be taken back: the records as they were.
    owed: Before,
}

/// Records as they were before a change, byte for byte. None is there of a disk that was not remembered.
#[derive(Default)]
struct Before(BTreeMap<String, Option<Vec<u8>>>);

impl Before {
    fn is_in(&self, content: &Content) -> bool {
        self.0.iter().all(|(name, value)| content.disks.get(name) == value.as_ref())
    }

    fn put_back(&self, database: &Database) -> Result<(), RecordError> {
        let change = begin(database)?;
        // Those that go first: what they name may be named by those that come back.
        for (name, value) in
            self.0.iter().filter(|(_, v)| v.is_none()).chain(self.0.iter().filter(|(_, v)| v.is_some()))
        {
            put_back(&change, name, value.as_deref())?;
        }
        change.commit().map_err(error_of)
    }
}

impl State {
    /// The store, as its owner knows it; one that has failed is opened anew.
    fn take(&mut self, path: &Path) -> Result<Database, RecordError> {
        let database = match self.database.take() {
            Some(database) => database,
            None => Records::open_database(path)?,
        };
        if !self.owed.0.is_empty() {
            self.owed.put_back(&database)?;
            self.owed.0.clear();
        }
        Ok(database)
    }

    /// What is told of a change whose commit failed with `e`: nobody knows how far that came.
    fn refused(&mut self, path: &Path, before: Before, e: RecordError) -> RecordError {
        // Not there means never named by the header, which is written last.
        if Records::read_file(path).is_ok_and(|found| found.is_some_and(|whole| before.is_in(&whole.content))) {
            return e;
        }
        self.owed = before;
        match self.take(path) {
            Ok(database) => self.database = Some(database),
            Err(again) => {
                log::error!("it is not known what the records say until the state directory takes writes: {again}");
                return RecordError::Unknown(e.to_string());
            }
        }
        e
    }
}

impl Records {
    /// Opens or creates the store.
    ///
    /// # Errors
    /// When it cannot be opened, or was written by another version.
    pub fn open(path: &Path) -> Result<Records, RecordError> {
        let state = State { database: Some(Self::open_database(path)?), owed: Before::default() };
        Ok(Records { path: path.to_owned(), state: Mutex::new(state), job_ids: Mutex::new(0..0) })
    }

    fn open_database(path: &Path) -> Result<Database, RecordError> {
        let mut found = Self::read_file(path)?;
        if found.is_none() {
            Self::make(path)?;
            found = Self::read_file(path)?;
        }
        let found = found.map(|whole| whole.content).unwrap_or_default();
        check_layout(found.layout)?;
        let database = intact::guarded(|| create(path).map_err(|e| e.to_string()))
            .map_err(|e| RecordError::Store(format!("{}: {e}", path.display())))?;
        let opened = intact::content_of(&database).map_err(RecordError::Store)?;
        let wanted = Content { layout: Some(LAYOUT), ..found };
        if wanted != opened {
            // A commit that was whole although the power went before the header named it.
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
        Content { layout: Some(LAYOUT), ..Content::default() }.store(begin(&database)?)?;
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
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let database = state.take(&self.path)?;
        let done = work(&database);
        if !matches!(done, Err(RecordError::Store(_) | RecordError::NoSpace(_))) {
            state.database = Some(database);
        }
        done
    }

    /// Changes records: all that `work` does, or nothing.
    fn change(
        &self,
        work: impl FnOnce(&WriteTransaction, &mut Before) -> Result<(), RecordError>,
    ) -> Result<(), RecordError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let database = state.take(&self.path)?;
        let mut before = Before::default();
        let change = begin(&database)?;
        if let Err(e) = work(&change, &mut before) {
            // Not committed. After an error of the system the store answers nothing more.
            if !matches!(e, RecordError::Store(_) | RecordError::NoSpace(_)) {
                drop(change);
                state.database = Some(database);
            }
            return Err(e);
        }
        crash::point("before records are committed");
        let committed = change.commit().map_err(error_of);
        crash::point("after records were committed");
        match committed {
            Ok(()) => state.database = Some(database),
            Err(e) => {
                drop(database);
                return Err(state.refused(&self.path, before, e));
            }
        }
        Ok(())
    }

    /// Looks at a store without changing it. None when there is none.
    ///
    /// # Errors
    /// When it cannot be read, is damaged as a whole, or has another layout.
    pub fn examine(path: &Path) -> Result<Option<ExaminedRecords>, RecordError> {
        let Some(intact::Whole { content, is_unclean }) = Self::read_file(path)? else { return Ok(None) };
        check_layout(content.layout)?;
        let remembered = decode_all(&content);
        Ok(Some(ExaminedRecords { is_unclean, remembered, dropped: content.dropped }))
    }
}

impl RecordStore for Records {
    fn disks(&self) -> Result<Remembered, RecordError> {
        self.with(|database| Ok(decode_all(&intact::content_of(database).map_err(RecordError::Store)?)))
    }

    fn put(&self, disks: &[&DiskRecord]) -> Result<(), RecordError> {
        self.change(|change, before| disks.iter().try_for_each(|disk| replace(change, before, &disk.name, Some(disk))))
    }

    fn rename(&self, from: &str, disk: &DiskRecord) -> Result<(), RecordError> {
        self.change(|change, before| {
            let disks = change.open_table(DISKS).map_err(error_of)?;
            let is_taken = disks.get(disk.name.as_str()).map_err(error_of)?.is_some();
            drop(disks);
            if is_taken {
                return Err(RecordError::Store(format!("there is a record of {} already", disk.name)));
            }
            replace(change, before, from, None)?;
            // Its files are let go with the old name, and named again with the new one.
            replace(change, before, &disk.name, Some(disk))
        })
    }

    fn remove(&self, name: &str) -> Result<(), RecordError> {
        self.change(|change, before| replace(change, before, name, None))
    }

    fn dropped(&self) -> Result<BTreeSet<String>, RecordError> {
        self.with(|database| intact::content_of(database).map(|content| content.dropped).map_err(RecordError::Store))
    }

    fn forget_dropped(&self) -> Result<(), RecordError> {
        self.with(|database| {
            let change = begin(database)?;
            change.delete_table(DROPPED).map_err(error_of)?;
            change.open_table(DROPPED).map_err(error_of)?;
            change.commit().map_err(error_of)
        })
    }

    fn take_job_ids(&self, count: u64) -> Result<Range<u64>, RecordError> {
        let mut lot = self.job_ids.lock().unwrap_or_else(PoisonError::into_inner);
        if lot.end - lot.start < count {
            let size = count.max(JOB_LOT);
            let first = self.with(|database| {
                let change = begin(database)?;
                let first = {
                    let mut meta = change.open_table(META).map_err(error_of)?;
                    let first = meta.get("next_job").map_err(error_of)?.map_or(1, |next| next.value());
                    meta.insert("next_job", first + size).map_err(error_of)?;
                    first
                };
                change.commit().map_err(error_of)?;
                Ok(first)
            })?;
            *lot = first..first + size;
        }
        let taken = lot.start..lot.start + count;
        lot.start = taken.end;
        Ok(taken)
    }
}

/// What [`Records::examine`] found.
#[derive(Debug, Default)]
pub struct ExaminedRecords {
    /// Whether its last writer was killed.
    pub is_unclean: bool,
    /// As [`Records::disks`].
    pub remembered: Remembered,
    /// As [`Records::dropped`].
    pub dropped: BTreeSet<String>,
}

/// A change in two phases: what the file says is the newest commit has been on stable storage.
fn begin(database: &Database) -> Result<WriteTransaction, RecordError> {
    let mut change = database.begin_write().map_err(error_of)?;
    change.set_two_phase_commit(true);
    Ok(change)
}

/// Puts a record in the place of the one that is there, and notes that. What only the old one names is let go.
fn replace(
    change: &WriteTransaction,
    before: &mut Before,
    name: &str,
    record: Option<&DiskRecord>,
) -> Result<(), RecordError> {
    let mut disks = change.open_table(DISKS).map_err(error_of)?;
    let was = disks.get(name).map_err(error_of)?.map(|value| value.value().to_vec());
    let old = match was.as_deref().map(|value| decode(name, value)) {
        Some(Err(why)) if record.is_some() => return Err(RecordError::Kept { disk: name.to_owned(), why }),
        old => old.and_then(Result::ok),
    };
    match record {
        Some(record) => drop(disks.insert(name, encode(record)?.as_slice()).map_err(error_of)?),
        None => drop(disks.remove(name).map_err(error_of)?),
    }
    before.0.entry(name.to_owned()).or_insert(was);
    let_names_go(change, old.as_ref(), record)
}

/// Puts a record back as it was, also one that cannot be read.
fn put_back(change: &WriteTransaction, name: &str, value: Option<&[u8]>) -> Result<(), RecordError> {
    let mut disks = change.open_table(DISKS).map_err(error_of)?;
    let now = disks.get(name).map_err(error_of)?.and_then(|value| decode(name, value.value()).ok());
    match value {
        Some(value) => drop(disks.insert(name, value).map_err(error_of)?),
        None => drop(disks.remove(name).map_err(error_of)?),
    }
    let_names_go(change, now.as_ref(), value.and_then(|value| decode(name, value).ok()).as_ref())
}

/// Notes what is let go when `record` takes the place of `old`, and that nothing is which `record` names.
fn let_names_go(
    change: &WriteTransaction,
    old: Option<&DiskRecord>,
    record: Option<&DiskRecord>,
) -> Result<(), RecordError> {
    let mut dropped = change.open_table(DROPPED).map_err(error_of)?;
    let (gone, now) = names_let_go(old, record);
    for gone in &gone {
        dropped.insert(gone.as_str(), ()).map_err(error_of)?;
    }
    for kept in &now {
        dropped.remove(kept.as_str()).map_err(error_of)?;
    }
    Ok(())
}

fn check_layout(found: Option<u64>) -> Result<(), RecordError> {
    match found {
        None | Some(LAYOUT) => Ok(()),
        Some(found) => Err(RecordError::Layout { found }),
    }
}

/// CRC-32 of the name, a zero and what follows, in eight hexadecimal digits; a space; the format; a space; the JSON. This stays,
/// whatever the format.
fn seal(name: &str, format: u64, json: &[u8]) -> Vec<u8> {
    let rest = [format!("{format} ").as_bytes(), json].concat();
    let mut sealed = format!("{:08x} ", checksum(name, &rest)).into_bytes();
    sealed.extend_from_slice(&rest);
    sealed
}

fn checksum(name: &str, rest: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    [name.as_bytes(), &[0], rest].into_iter().for_each(|part| crc.update(part));
    crc.finalize()
}

fn encode(disk: &DiskRecord) -> Result<Vec<u8>, RecordError> {
    let json = serde_json::to_vec(disk).map_err(|e| RecordError::Store(e.to_string()))?;
    Ok(seal(&disk.name, FORMAT, &json))
}

fn decode(name: &str, value: &[u8]) -> Result<DiskRecord, UnreadableRecord> {
    let damaged = |what: &str| UnreadableRecord::Damaged(what.to_owned());
    let rest = value.get(9..).unwrap_or_default();
    let is_whole = value.get(..9) == Some(format!("{:08x} ", checksum(name, rest)).as_bytes());
    if !is_whole {
        return Err(damaged("it does not match its checksum"));
    }
    let space = rest.iter().position(|byte| *byte == b' ').ok_or_else(|| damaged("it has no format"))?;
    let format = std::str::from_utf8(&rest[..space]).ok().and_then(|text| text.parse::<u64>().ok());
    match format.ok_or_else(|| damaged("it has no format"))? {
        FORMAT => {}
        newer @ FORMAT.. => return Err(UnreadableRecord::Newer(format!("in format {newer}, and {FORMAT} is known"))),
        _ => return Err(damaged("its format never was")),
    }
    // What was stored as it is, and is not understood, somebody stored who knows more.
    let record: DiskRecord =
        serde_json::from_slice(&rest[space + 1..]).map_err(|e| UnreadableRecord::Newer(e.to_string()))?;
    if record.name != name {
        return Err(UnreadableRecord::Damaged(format!("it is the record of {}", record.name)));
    }
    Ok(record)
}

fn decode_all(content: &Content) -> Remembered {
    let mut remembered = Remembered::default();
    for (name, value) in &content.disks {
        match decode(name, value) {
            Ok(record) => remembered.disks.push(record),
            Err(why) => drop(remembered.unreadable.insert(name.clone(), why)),
        }
    }
    name_moments(&mut remembered.disks);
    remembered
}

impl Content {
    /// Makes it everything that the store has.
    fn store(&self, change: WriteTransaction) -> Result<(), RecordError> {
        change.delete_table(DISKS).map_err(error_of)?;
        change.delete_table(DROPPED).map_err(error_of)?;
        {
            let mut meta = change.open_table(META).map_err(error_of)?;
            meta.insert("format", self.layout.unwrap_or(LAYOUT)).map_err(error_of)?;
            if let Some(next_job) = self.next_job {
                meta.insert("next_job", next_job).map_err(error_of)?;
            }
            let mut disks = change.open_table(DISKS).map_err(error_of)?;
            for (name, value) in &self.disks {
                disks.insert(name.as_str(), value.as_slice()).map_err(error_of)?;
            }
            let mut dropped = change.open_table(DROPPED).map_err(error_of)?;
            for name in &self.dropped {
                dropped.insert(name.as_str(), ()).map_err(error_of)?;
            }
        }
        change.commit().map_err(error_of)
    }
}

#[cfg(test)]
#[path = "records_tests.rs"]
mod tests;
