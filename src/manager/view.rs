//! The registry of this moment: what is served, what is only remembered, and the jobs, as values.

use std::sync::Arc;

use crate::control::Name;
use crate::door::{self, DiskFacts};
use crate::manager::Manager;
use crate::manager::Places;
use crate::manager::entry::{DiskEntry, SnapshotEntry, locked};
use crate::manager::unserved::Unserved;
use crate::registry::{
    Bookmark, Disk, Job, Kind, Leg, LegState, Phase, Registry, Restore, Snapshot, SnapshotPhase, Source,
};
use crate::store::{BookmarkRecord, DiskRecord, LegRecord, SnapshotRecord, VolumeRecord};

impl Manager {
    /// What there is. Only memory is read for it.
    pub(crate) fn registry(&self) -> Registry {
        let starting: Vec<Disk> = locked(&self.starting).iter().filter_map(starting).collect();
        let (served, unserved) = self.all_there();
        let served = served.iter().map(|disk| disk_of(disk, &self.places));
        let unserved = unserved.iter().map(remembered);
        let job = |job: &Arc<crate::manager::jobs::JobEntry>| Job {
            id: job.id,
            kind: job.kind,
            disk: job.disk.id,
            snapshot: job.snapshot.as_ref().map(|s| s.id),
            state: job.state(),
            is_paced: job.pace.is_slowed(),
        };
        let jobs: Vec<Job> = locked(&self.jobs).values().map(job).collect();
        // What is served is what counts.
        Registry::new(starting.into_iter().chain(unserved).chain(served), jobs).with_ways_of_restores()
    }

    /// What is served and what is not, at one moment: what is remembered is in one of them, also while it becomes the other.
    pub(crate) fn all_there(&self) -> (Vec<Arc<DiskEntry>>, Vec<Unserved>) {
        let (disks, unserved) = (locked(&self.disks), locked(&self.unserved));
        (disks.values().cloned().collect(), unserved.values().cloned().collect())
    }
}

fn disk_of(disk: &DiskEntry, places: &Places) -> Disk {
    let relations = locked(&disk.relations).clone();
    let facts = disk.facts();
    let is_lost = facts.restore_lost().is_some();
    // One that is only prepared is its command's, which has claimed what it needs.
    let restore = locked(&disk.restore).as_ref().filter(|r| r.is_shown()).map(|r| r.source);
    let restore = restore.map(|source| Restore { source, through: Vec::new(), is_lost });
    Disk {
        id: disk.id,
        name: disk.name.get(),
        kind: kind_of(relations.volume.as_ref(), relations.stood_on.as_ref()),
        phase: if relations.disabled { Phase::Disabled } else { Phase::Served },
        is_unreadable: false,
        is_readonly: disk.config().readonly(),
        failure: disk.failure().filter(|_| !is_lost),
        frontends: disk.frontends.count(),
        is_socket_named: disk.is_socket_named(places),
        legs: locked(&disk.mirror)
            .iter()
            .flat_map(|mirror| &mirror.legs)
            .map(|leg| leg_of(disk, leg, &facts))
            .collect(),
        restore,
        has_work: relations.work.is_some(),
        is_in_log: relations.volume.is_none() && !facts.can_move_pivot(),
        snapshots: disk.snapshots().iter().map(|s| snapshot_of(disk, s, (&facts, places))).collect(),
        bookmarks: disk.bookmarks(&facts).iter().filter_map(bookmark_of).collect(),
    }
}

fn bookmark_of(record: &BookmarkRecord) -> Option<Bookmark> {
    Some(Bookmark { id: record.id, name: record.name.parse().ok()?, taken_for: record.taken_for })
}

fn kind_of(volume: Option<&VolumeRecord>, stood_on: Option<&VolumeRecord>) -> Kind {
    let source = |record: &VolumeRecord| Source { snapshot: record.snapshot, disk: record.source };
    match (volume, stood_on) {
        (Some(volume), _) => Kind::Volume(source(volume)),
        (None, Some(was)) => Kind::Independent(source(was)),
        (None, None) => Kind::Disk,
    }
}

fn leg_of(disk: &DiskEntry, record: &LegRecord, facts: &DiskFacts) -> Leg {
    let holder = || disk.snapshots().into_iter().find(|s| locked(&s.record).image == record.path);
    let state = match facts.leg(record.id).map(|leg| &leg.state) {
        Some(door::LegState::InSync) => LegState::InSync,
        Some(door::LegState::Resynchronising) => LegState::Syncing,
        // One that nobody holds comes back by itself.
        Some(door::LegState::Split) => holder().map_or(LegState::Syncing, |s| LegState::Held { by: s.id }),
        Some(door::LegState::Failed(_)) | None => LegState::Failed,
    };
    Leg { path: record.path.clone(), state }
}

fn snapshot_of(disk: &DiskEntry, entry: &SnapshotEntry, (facts, places): (&DiskFacts, &Places)) -> Snapshot {
    let record = locked(&entry.record).clone();
    let phase = match (entry.is_lost, record.deletion, record.quiesced_ms) {
        (true, ..) => SnapshotPhase::Lost,
        (_, Some(_), _) => SnapshotPhase::Going,
        (_, _, None) => SnapshotPhase::Draining,
        (_, _, Some(_)) => SnapshotPhase::Quiesced,
    };
    // Towards the full image, which is that of a frozen version under write logging.
    let snapshots = disk.snapshots();
    let is_snapshot = |id: &uuid::Uuid| snapshots.iter().any(|s| s.id == *id);
    let through = facts.way_of(entry.id).iter().map(|version| version.id).filter(is_snapshot).collect();
    Snapshot {
        id: entry.id,
        name: entry.name.clone(),
        group: record.group,
        phase,
        broken: entry.unreadable(facts),
        readers: entry.frontends.count(),
        is_socket_named: entry.is_socket_named(places),
        old_frontends: entry.old_frontends(facts),
        taken_for: record.taken_for,
        keeps_bookmark: record.leaves_bookmark(),
        through,
    }
}

/// What is known of a disk that is about to be opened.
fn starting(record: &DiskRecord) -> Option<Disk> {
    Some(remembered(&Unserved {
        name: record.name.parse().ok()?,
        id: record.id,
        record: Some(record.clone()),
        config: None,
        why: "it is being opened".to_owned(),
        is_new: false,
        takes_flushed: false,
    }))
}

/// What is known of a disk that is not served.
fn remembered(unserved: &Unserved) -> Disk {
    let phase = Phase::Unserved { why: unserved.why.clone() };
    let nothing = Disk {
        id: unserved.id,
        name: unserved.name.clone(),
        kind: Kind::Disk,
        phase,
        is_unreadable: unserved.record.is_none() && !unserved.is_new,
        is_readonly: false,
        failure: None,
        frontends: 0,
        is_socket_named: false,
        legs: Vec::new(),
        restore: None,
        has_work: false,
        is_in_log: false,
        snapshots: Vec::new(),
        bookmarks: Vec::new(),
    };
    let Some(record) = &unserved.record else { return nothing };
    let restore = record.restore.as_ref().filter(|r| r.is_shown());
    let name = |name: &str| name.parse::<Name>().ok();
    let snapshot = |(at, s): (usize, &SnapshotRecord)| {
        Some(Snapshot {
            id: s.id,
            name: name(&s.name)?,
            group: s.group,
            phase: if s.deletion.is_some() { SnapshotPhase::Going } else { SnapshotPhase::Quiesced },
            broken: s.broken.clone(),
            readers: 0,
            is_socket_named: false,
            old_frontends: 0,
            taken_for: s.taken_for,
            keeps_bookmark: s.leaves_bookmark(),
            through: way_of(record, at),
        })
    };
    Disk {
        kind: kind_of(record.volume.as_ref(), record.stood_on.as_ref()),
        restore: restore.map(|r| Restore { source: r.source, through: Vec::new(), is_lost: false }),
        has_work: record.work.is_some(),
        // How far they are is found when it is served.
        legs: record
            .mirror
            .iter()
            .flat_map(|mirror| &mirror.legs)
            .map(|leg| Leg { path: leg.path.clone(), state: LegState::InSync })
            .collect(),
        is_in_log: record.live_log.is_some() && record.volume.is_none(),
        snapshots: record.snapshots.iter().enumerate().filter_map(snapshot).collect(),
        bookmarks: record.bookmarks.iter().filter_map(bookmark_of).collect(),
        ..nothing
    }
}

/// The snapshots of a record that the one at `at` reads through, towards the full image of its segment.
fn way_of(record: &DiskRecord, at: usize) -> Vec<uuid::Uuid> {
    let snapshots = &record.snapshots;
    let first = (0..=at).rev().find(|i| snapshots[*i].splits).unwrap_or(0);
    let end = (at + 1..snapshots.len()).find(|i| snapshots[*i].splits).unwrap_or(snapshots.len());
    let ids = |range: std::ops::Range<usize>| range.map(|i| snapshots[i].id).collect();
    match (first..end).find(|i| snapshots[*i].owns_all) {
        Some(pivot) if pivot >= at => ids(at + 1..pivot + 1),
        Some(pivot) => ids(pivot..at),
        None if record.volume.is_some() => ids(first..at),
        None => ids(at + 1..end),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::api::DiskConfig;
    use crate::host::Machine;

    /// What is remembered needs what it needs also while it becomes served.
    #[test]
    fn what_becomes_served_is_in_every_registry() {
        const MOVES: usize = 200_000;
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let (image, run_dir) = (dir.path().join("a.raw"), dir.path().join("run"));
        std::fs::write(&image, vec![1; 1 << 16]).unwrap();
        let places = Places::open(&dir.path().join("state"), &run_dir).unwrap();
        let manager = Manager::open(Arc::new(Machine), places).unwrap();
        let name: Name = "a".parse().unwrap();
        let config = DiskConfig { direct: false, ..DiskConfig::new(&image) };
        manager.put(&name, &config).unwrap();
        let entry = manager.disk(&name).unwrap();
        let unserved = Unserved {
            name: name.clone(),
            id: entry.id,
            record: Some(entry.to_record()),
            config: None,
            why: "it moves".to_owned(),
            is_new: false,
            takes_flushed: false,
        };
        std::thread::scope(|scope| {
            let moves = scope.spawn(|| {
                for _ in 0..MOVES {
                    manager.not_served_any_more(&name, Some(unserved.clone()));
                    let (mut disks, mut unserved) = (locked(&manager.disks), locked(&manager.unserved));
                    disks.insert(name.clone(), entry.clone());
                    unserved.remove(&name);
                }
            });
            while !moves.is_finished() {
                assert!(manager.registry().disk(entry.id).is_some(), "it is nowhere");
            }
        });
        manager.stop().unwrap();
    }
}
