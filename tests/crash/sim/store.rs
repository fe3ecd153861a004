//! The records of a simulated machine. A put is atomic, and durable when it returns.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use halfsilver::store::{DiskRecord, RecordError, RecordStore, Remembered, names_let_go};

use super::Sim;
use crate::media;

/// How often others may go on while records are put: it takes as long as some transfers.
const PUT_STEPS: usize = 6;

/// What is remembered.
#[derive(Clone, Default)]
pub(super) struct Content {
    pub(super) disks: BTreeMap<String, DiskRecord>,
    pub(super) dropped: BTreeSet<String>,
    pub(super) next_job: u64,
}

impl Sim {
    /// Changes the records in one transaction.
    fn put<T>(&self, change: impl FnOnce(&mut Content) -> Result<T, RecordError>) -> Result<T, RecordError> {
        let failed = |e: io::Error| RecordError::Store(e.to_string());
        self.step().map_err(failed)?;
        while std::mem::replace(&mut self.process().0.is_putting, true) {
            self.step().map_err(failed)?;
        }
        let mut content = self.left().records.clone().unwrap_or_default();
        let less = |left: u64| left.checked_sub(1);
        let done = match self.refusals.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less) {
            Ok(_) if self.is_in_doubt.load(Ordering::SeqCst) => {
                Err(RecordError::Unknown("the state directory is full".to_owned()))
            }
            Ok(_) => Err(RecordError::NoSpace("the state directory is full".to_owned())),
            Err(_) => change(&mut content),
        };
        // One that is refused takes as long.
        if done.is_ok() {
            self.left().putting = Some(content);
            media::count_change();
        }
        for _ in 0..PUT_STEPS {
            if let Err(e) = self.step() {
                self.process().0.is_putting = false;
                return Err(failed(e));
            }
        }
        if done.is_ok() {
            let mut left = self.left();
            left.records = left.putting.take();
            media::count_change();
        }
        self.process().0.is_putting = false;
        done
    }
}

/// The records.
pub(super) struct Store(pub(super) Weak<Sim>);

impl Content {
    pub(super) fn remembered(&self) -> Remembered {
        Remembered { disks: self.disks.values().cloned().collect(), unreadable: BTreeMap::new() }
    }

    fn replace(&mut self, name: &str, record: Option<&DiskRecord>) {
        let before = self.disks.remove(name);
        let (gone, now) = names_let_go(before.as_ref(), record);
        self.dropped.extend(gone);
        self.dropped.retain(|name| !now.contains(name));
        if let Some(record) = record {
            self.disks.insert(record.name.clone(), record.clone());
        }
    }
}

impl Store {
    fn sim(&self) -> Result<Arc<Sim>, RecordError> {
        self.0.upgrade().ok_or_else(|| RecordError::Store("the machine is gone".to_owned()))
    }

    fn content(&self) -> Result<Content, RecordError> {
        Ok(self.sim()?.left().records.clone().unwrap_or_default())
    }
}

impl RecordStore for Store {
    fn disks(&self) -> Result<Remembered, RecordError> {
        Ok(self.content()?.remembered())
    }

    fn put(&self, disks: &[&DiskRecord]) -> Result<(), RecordError> {
        self.sim()?.put(|content| {
            disks.iter().for_each(|disk| content.replace(&disk.name, Some(disk)));
            Ok(())
        })
    }

    fn rename(&self, from: &str, disk: &DiskRecord) -> Result<(), RecordError> {
        self.sim()?.put(|content| {
            if content.disks.contains_key(&disk.name) {
                return Err(RecordError::Store(format!("there is a record of {} already", disk.name)));
            }
            content.replace(from, None);
            content.replace(&disk.name, Some(disk));
            Ok(())
        })
    }

    fn remove(&self, name: &str) -> Result<(), RecordError> {
        self.sim()?.put(|content| {
            content.replace(name, None);
            Ok(())
        })
    }

    fn dropped(&self) -> Result<BTreeSet<String>, RecordError> {
        Ok(self.content()?.dropped)
    }

    fn forget_dropped(&self) -> Result<(), RecordError> {
        self.sim()?.put(|content| {
            content.dropped.clear();
            Ok(())
        })
    }

    fn take_job_ids(&self, count: u64) -> Result<Range<u64>, RecordError> {
        let sim = self.sim()?;
        let mut left = sim.left();
        let content = left.records.get_or_insert_default();
        let first = content.next_job + 1;
        content.next_job += count;
        Ok(first..first + count)
    }
}
