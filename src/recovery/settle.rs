//! What one disk has of another: whether what volumes stand on, and disks are restored from, is there. Pure.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::record::names_of;
use super::{Content, Recovery, SnapshotFate, Why};
use crate::store::DiskRecord;

/// A frozen version of a disk that is served already.
#[derive(Clone, Debug)]
pub struct ServedVersion {
    /// Its stable name.
    pub id: Uuid,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Why it cannot be read, if so.
    pub broken: Option<Why>,
}

/// Puts what is decided of each disk in relation to the others, and to what is `served` already. Volumes may stand on each
/// other.
pub fn settle(recoveries: &mut [Recovery], served: &[ServedVersion]) {
    let records: Vec<DiskRecord> = recoveries.iter().map(|r| r.record.clone()).collect();
    for (what, disks) in duplicates(&records) {
        let twice = |r: &&mut Recovery| disks[0] != disks[1] && disks.contains(&r.record.name);
        for recovery in recoveries.iter_mut().filter(twice) {
            recovery.disk = Content::Unserved(Why::Contradiction(what.clone()));
        }
    }
    while let Some((at, why)) = (0..recoveries.len()).find_map(|at| Some((at, lost_need(at, recoveries, served)?))) {
        recoveries[at].disk = Content::Hollow(why);
    }
}

/// What a disk that would be served needs and cannot have.
fn lost_need(at: usize, recoveries: &[Recovery], served: &[ServedVersion]) -> Option<Why> {
    let Recovery { record, disk: Content::Whole | Content::AsFlushed, size_bytes: Some(size), .. } = &recoveries[at]
    else {
        return None;
    };
    let look = |version| look_for(version, *size, recoveries, served).err().map(Box::new);
    if let Some(volume) = &record.volume
        && let Some(why) = look(volume.snapshot)
    {
        return Some(Why::BaseLost { from: volume.from.clone(), why });
    }
    let restore = record.restore.as_ref().filter(|r| r.is_shown() && !r.is_own())?;
    look(restore.source).map(|why| Why::RestoreLost { from: restore.from.clone(), why })
}

fn look_for(version: Uuid, size_bytes: u64, recoveries: &[Recovery], served: &[ServedVersion]) -> Result<(), Why> {
    let found = recoveries.iter().find_map(|recovery| {
        let (snapshot, fate) = recovery.snapshots().find(|(s, _)| s.id == version)?;
        Some((fate, recovery.size_bytes.map(|_| snapshot.size_bytes)))
    });
    let (broken, size) = match found {
        Some((SnapshotFate::Kept, size)) => (None, size),
        Some((SnapshotFate::Broken(why), size)) => (Some(why), size),
        Some((SnapshotFate::Waits, size)) => (Some(Why::NotServed), size),
        Some((SnapshotFate::Deleting | SnapshotFate::Gone, size)) => (Some(Why::Deleting), size),
        None => {
            let served = served.iter().find(|s| s.id == version).ok_or(Why::NotServed)?;
            (served.broken.clone(), Some(served.size_bytes))
        }
    };
    match broken {
        Some(why) => Err(why),
        None if size != Some(size_bytes) => Err(Why::SizeChanged),
        None => Ok(()),
    }
}

/// Stable names that are given twice: what for, and in the records of which disks.
#[must_use]
pub fn duplicates(records: &[DiskRecord]) -> Vec<(String, [String; 2])> {
    let mut seen: BTreeMap<Uuid, (String, &str)> = BTreeMap::new();
    let mut twice = Vec::new();
    for record in records {
        for (id, whose) in names_of(record) {
            if let Some((other, of)) = seen.insert(id, (whose.clone(), &record.name)) {
                let disks = [of.to_owned(), record.name.clone()];
                twice.push((format!("{other} and {whose} have the same id {id}"), disks));
            }
        }
    }
    twice
}
