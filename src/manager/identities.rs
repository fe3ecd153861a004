//! The records, which say of each image what tells it from every other: an image that takes its place while nobody looks is
//! noticed at the next start.
//!
//! What always holds: an image is looked at when a record names it for the first time, which is when it was made or opened.
//! What is found then is not looked up again while stored records go on naming it: what comes into its place is not the image
//! that is open. What a record names that was refused goes again, and another one may be made in its place.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use uuid::Uuid;

use crate::host::Host;
use crate::manager::entry::locked;
use crate::store::{DiskRecord, Identity, RecordError, RecordStore, Remembered, TableFiles};

/// See above.
pub(crate) struct RecognisedRecords {
    records: Box<dyn RecordStore>,
    host: Arc<dyn Host>,
    /// What tells the directory of the records from a copy of it.
    kept_in: Option<Identity>,
    known: Mutex<BTreeMap<Uuid, Known>>,
}

/// The images of one disk.
#[derive(Clone, Default)]
struct Known {
    /// The name of the disk.
    name: String,
    /// None of those that nobody can tell from others.
    images: BTreeMap<PathBuf, Option<Identity>>,
}

impl RecognisedRecords {
    pub(crate) fn new(records: Box<dyn RecordStore>, host: Arc<dyn Host>, tables: &TableFiles) -> RecognisedRecords {
        let kept_in = host.identity(tables.state_dir()).ok();
        RecognisedRecords { records, host, kept_in, known: Mutex::default() }
    }

    /// The record as it is stored, and what is known when it is. What it says itself counts.
    fn complete(&self, record: &DiskRecord) -> (DiskRecord, Known) {
        let known = locked(&self.known).get(&record.id).cloned().unwrap_or_default();
        let look = |path: PathBuf| {
            let said = record.identities.get(&path).cloned().map(Some);
            let found = said.or_else(|| known.images.get(&path).cloned());
            // Without the lock: what lies there may not answer.
            let found = found.unwrap_or_else(|| self.host.identity(&path).ok());
            (path, found)
        };
        let images: BTreeMap<_, _> = record.images().into_iter().map(look).collect();
        let told = images.iter().filter_map(|(path, identity)| Some((path.clone(), identity.clone()?)));
        let kept_in = record.kept_in.clone().or_else(|| self.kept_in.clone());
        let completed = DiskRecord { identities: told.collect(), kept_in, ..record.clone() };
        (completed, Known { name: record.name.clone(), images })
    }

    fn know(&self, disks: impl IntoIterator<Item = (DiskRecord, Known)>) {
        let disks = disks.into_iter().map(|(record, known)| (record.id, known));
        locked(&self.known).extend(disks);
    }
}

impl RecordStore for RecognisedRecords {
    fn made_anew(&self) -> Option<String> {
        self.records.made_anew()
    }

    fn disks(&self) -> Result<Remembered, RecordError> {
        self.records.disks()
    }

    fn put(&self, disks: &[&DiskRecord]) -> Result<(), RecordError> {
        let disks: Vec<(DiskRecord, Known)> = disks.iter().map(|disk| self.complete(disk)).collect();
        self.records.put(&disks.iter().map(|(record, _)| record).collect::<Vec<_>>())?;
        self.know(disks);
        Ok(())
    }

    fn rename(&self, from: &str, disk: &DiskRecord) -> Result<(), RecordError> {
        let disk = self.complete(disk);
        self.records.rename(from, &disk.0)?;
        self.know([disk]);
        Ok(())
    }

    fn remove(&self, name: &str) -> Result<(), RecordError> {
        self.records.remove(name)?;
        locked(&self.known).retain(|_, known| known.name != name);
        Ok(())
    }

    fn dropped(&self) -> Result<BTreeSet<String>, RecordError> {
        self.records.dropped()
    }

    fn forget_dropped(&self) -> Result<(), RecordError> {
        self.records.forget_dropped()
    }

    fn take_job_ids(&self, count: u64) -> Result<Range<u64>, RecordError> {
        self.records.take_job_ids(count)
    }
}
