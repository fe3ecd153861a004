//! What tests tell the service in memory, and ask of it.

use super::*;

impl Fake {
    /// Ends the life phase of a snapshot, as the engine would, and says so.
    pub(crate) fn move_to(&self, snapshot: &str, state: SnapshotState, kind: EventKind) {
        let reference: SnapshotRef = snapshot.parse().unwrap();
        for snapshot in self.state.lock().unwrap().snapshots.iter_mut().filter(|s| s.reference() == reference) {
            snapshot.state = state;
            snapshot.reason = (state == SnapshotState::Broken).then(|| "no space\nleft".to_owned());
        }
        assert!(self.bus.publish(Notice::of_snapshot(kind, &reference)) > 0);
    }

    pub(crate) fn quiesce(&self, snapshot: &str) {
        self.move_to(snapshot, SnapshotState::Quiesced, EventKind::SnapshotQuiesced);
    }

    /// The same, when nobody listens.
    pub(crate) fn settle(&self, snapshot: &str) {
        for found in self.state.lock().unwrap().snapshots.iter_mut().filter(|s| s.reference().to_string() == snapshot) {
            found.state = SnapshotState::Quiesced;
        }
    }

    pub(crate) fn forget(&self, snapshot: &str) {
        self.state.lock().unwrap().snapshots.retain(|s| s.reference().to_string() != snapshot);
    }

    pub(crate) fn has(&self, snapshot: &str) -> bool {
        self.state.lock().unwrap().snapshots.iter().any(|s| s.reference().to_string() == snapshot)
    }

    /// Takes a disk's image away, as a start without it would find.
    pub(crate) fn lose(&self, disk: &str, reason: &str) {
        for (config, lost) in self.state.lock().unwrap().disks.iter_mut().filter(|(_, d)| d.name.as_str() == disk) {
            let (id, name) = (lost.id, lost.name.clone());
            *lost = Disk { id, ..Disk::unserved(name, reason.to_owned()) }.with_config(config);
        }
    }

    /// Says that something is under way.
    pub(crate) fn claim(&self, operation: &str, entity: &str, waits_for: Option<&str>) {
        self.state.lock().unwrap().claims.push(Claim {
            held: true,
            operation: operation.to_owned(),
            entities: vec![entity.to_owned()],
            since: Timestamp::now(),
            waits_for: waits_for.map(str::to_owned),
        });
    }

    /// A snapshot that is whole has no socket.
    pub(crate) fn quiesce_without_socket(&self, snapshot: &str) {
        let mut state = self.state.lock().unwrap();
        for found in state.snapshots.iter_mut().filter(|s| s.reference().to_string() == snapshot) {
            found.state = SnapshotState::Quiesced;
            found.reason = Some("its socket is\nin use".to_owned());
        }
    }

    /// From now on one strategy is not supported.
    pub(crate) fn forbid(&self, strategy: Strategy) {
        self.state.lock().unwrap().forbidden = Some(strategy);
    }

    /// A running job that folds vm1@daily.
    pub(crate) fn add_job(&self, id: u64) {
        self.begin_job(id, JobKind::Fold, &name("vm1"), Some(name("daily")));
    }

    pub(super) fn begin_job(&self, id: u64, kind: JobKind, disk: &Name, snapshot: Option<Name>) {
        let job = Job {
            waits_for: None,
            id,
            kind,
            disk: disk.clone(),
            snapshot,
            state: JobState::Running,
            reason: None,
            done_bytes: 1 << 20,
            total_bytes: 12_897_485,
            percent: 8,
            delay_ms: 5,
            bytes_per_second: 0,
            started_at: Timestamp::now(),
            estimated_seconds: Some(90),
        };
        self.state.lock().unwrap().jobs.push(job);
        self.bus.publish(Notice::of_disk(EventKind::JobStarted, disk).with_job(id));
    }

    /// Changes a job, as the engine would.
    pub(crate) fn set_job(&self, id: u64, state: JobState, reason: Option<&str>) {
        for job in self.state.lock().unwrap().jobs.iter_mut().filter(|job| job.id == id) {
            job.state = state;
            job.reason = reason.map(str::to_owned);
            job.estimated_seconds = (state == JobState::Running).then_some(90);
        }
    }

    /// Changes the second leg of a disk, as the engine would, and says so.
    pub(crate) fn set_second_leg(&self, disk: &str, leg_state: LegState) {
        let mut state = self.state.lock().unwrap();
        let (_, disk) = state.disks.iter_mut().find(|(_, other)| other.name.as_str() == disk).unwrap();
        let leg = &mut disk.legs[1];
        leg.state = leg_state;
        leg.remaining_bytes = if leg_state == LegState::InSync { 0 } else { 3 << 28 };
        leg.reason = (leg_state == LegState::Failed).then(|| "I/O error".to_owned());
        let kind = if leg_state == LegState::Failed { EventKind::LegFailed } else { EventKind::LegInSync };
        self.bus.publish(Notice::of_disk(kind, &disk.name).with_leg(&leg.path));
    }

    pub(super) fn with_disk<T>(
        &self,
        disk: &Name,
        change: impl FnOnce(&mut Disk) -> Result<T, ApiError>,
    ) -> Result<T, ApiError> {
        let mut state = self.state.lock().unwrap();
        let found = state.disks.iter_mut().find(|(_, other)| other.name == *disk);
        change(&mut found.ok_or_else(|| ApiError::disk_not_found(disk))?.1)
    }
}
