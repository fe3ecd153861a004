//! What a step of an advice leaves of the registry when it has been carried out, and what it started has ended.
//!
//! Only what advice names is here: it clears things. What a real command does is in the room of the operations.

use std::path::PathBuf;

use uuid::Uuid;

use super::advice::Step;
use super::command::Command;
use super::entity::{Bookmark, Disk, Kind, Leg, LegState, Phase, Registry, SnapshotPhase};
use crate::control::api::{JobKind, JobState};
use crate::control::{Name, SnapshotRef};

impl Registry {
    /// Carries a step out. One that would be refused does nothing worth speaking of.
    pub fn carry_out(&mut self, step: &Step) {
        match step {
            Step::Run(command) => self.run(command),
            Step::Disconnect(disk) => self.change(disk, |disk| disk.frontends = 0),
            Step::DisconnectReaders(snapshot) => self.change_snapshot(snapshot, |s| s.readers = 0),
            Step::WaitForDrain(snapshot) => self.change_snapshot(snapshot, |s| s.phase = SnapshotPhase::Quiesced),
            Step::PutBack(disk) => self.change(disk, |disk| {
                if disk.is_unserved() {
                    disk.phase = Phase::Served;
                }
                (disk.failure, disk.is_unreadable) = (None, false);
                let out = disk.legs.iter_mut().filter(|leg| !matches!(leg.state, LegState::Held { .. }));
                out.for_each(|leg| leg.state = LegState::InSync);
                disk.restore.iter_mut().for_each(|restore| restore.is_lost = false);
            }),
        }
        if let Step::PutBack(disk) = step {
            self.resume_jobs(disk);
        }
    }

    fn run(&mut self, command: &Command) {
        match command {
            Command::CutOver { snapshot } => self.change_snapshot(snapshot, |s| {
                (s.old_frontends, s.phase) = (0, SnapshotPhase::Quiesced);
            }),
            Command::DeleteSnapshot { snapshot, keep_bookmark, .. } => {
                // What a deletion leaves is decided when it begins.
                self.change_snapshot(snapshot, |s| s.keeps_bookmark |= *keep_bookmark);
                if let Some(id) = self.snapshot_named(snapshot).map(|(_, s)| s.id) {
                    self.forget_snapshot(id);
                }
            }
            Command::DeleteBookmark { bookmark } => {
                self.change(&bookmark.disk, |disk| disk.bookmarks.retain(|b| b.name != bookmark.name));
            }
            Command::RemoveDisk { disk: name, .. }
            | Command::Forget { disk: name }
            | Command::DeleteVolume { volume: name, .. } => {
                let Some(id) = self.named(name).map(|disk| disk.id) else { return };
                self.disks_mut().remove(&id);
                self.jobs_mut().retain(|_, job| job.disk != id);
                // What was taken for its updates goes with it, if nothing else needs that.
                let is_needed = |snapshot: Uuid| self.edges().any(|edge| edge.needed == snapshot);
                let of = |disk: &Disk| disk.snapshots.clone();
                let taken = self.disks().flat_map(of).filter(|s| s.taken_for == Some(id) && !is_needed(s.id));
                let taken: Vec<Uuid> = taken.map(|s| s.id).collect();
                taken.into_iter().for_each(|id| self.forget_snapshot(id));
            }
            Command::Set { disk, readonly } => {
                if let Some(readonly) = *readonly {
                    self.change(disk, |disk| disk.is_readonly = readonly);
                }
            }
            Command::Mirror { disk: name, path } => {
                let Some(id) = self.named(name).map(|disk| disk.id) else { return };
                self.jobs_mut().retain(|_, job| job.disk != id || job.kind != JobKind::Mirror);
                let leg = Leg { path: path.clone(), state: LegState::InSync };
                self.change(name, |disk| {
                    if disk.legs.is_empty() {
                        // Its own image, wherever that is.
                        disk.legs.push(Leg { path: PathBuf::new(), state: LegState::InSync });
                    }
                    disk.legs.retain(|leg| leg.state == LegState::InSync && leg.path != *path);
                    disk.legs.push(leg);
                });
            }
            Command::Unmirror { disk: name, .. } => {
                let Some(id) = self.named(name).map(|disk| disk.id) else { return };
                self.jobs_mut().retain(|_, job| job.disk != id || job.kind != JobKind::Mirror);
                self.change(name, |disk| disk.legs.clear());
            }
            Command::Complete { volume } => {
                if let Some(id) = self.named(volume).map(|disk| disk.id) {
                    self.become_independent(id);
                }
            }
            Command::Disable { volume, .. } => {
                self.change(volume, |disk| (disk.phase, disk.frontends) = (Phase::Disabled, 0));
            }
            Command::Enable { volume, .. } => self.change(volume, |disk| disk.phase = Phase::Served),
            Command::StopJob { job } => self.change_job(*job, JobState::Stopped),
            Command::ResumeJob { job } => self.change_job(*job, JobState::Running),
            Command::HurryJob { job } => {
                self.jobs_mut().get_mut(job).into_iter().for_each(|job| job.is_paced = false);
            }
            Command::WaitForJob { job } => self.end_job(*job),
            Command::CreateSnapshot { .. }
            | Command::Rename { .. }
            | Command::Resize { .. }
            | Command::Restore { .. }
            | Command::RestoreToNow { .. }
            | Command::CreateVolume { .. }
            | Command::CreateVolumeOfNow { .. }
            | Command::Update { .. }
            | Command::Promote { .. } => {}
        }
    }

    fn change(&mut self, name: &Name, change: impl FnOnce(&mut Disk)) {
        if let Some(disk) = self.disks_mut().values_mut().find(|disk| disk.name == *name) {
            change(disk);
        }
    }

    fn change_snapshot(&mut self, reference: &SnapshotRef, change: impl FnOnce(&mut super::entity::Snapshot)) {
        self.change(&reference.disk, |disk| {
            if let Some(snapshot) = disk.snapshots.iter_mut().find(|s| s.name == reference.name) {
                change(snapshot);
            }
        });
    }

    fn change_job(&mut self, id: u64, state: JobState) {
        if let Some(job) = self.jobs_mut().get_mut(&id) {
            job.state = state;
        }
    }

    /// What was under way on a disk goes on by jobs when it is served again.
    fn resume_jobs(&mut self, name: &Name) {
        let Some(disk) = self.named(name) else { return };
        let id = disk.id;
        let going = disk.snapshots.iter().filter(|s| s.phase == SnapshotPhase::Going).map(|s| Some(s.id));
        let mut wanted: Vec<(JobKind, Option<Uuid>)> = going.map(|s| (JobKind::Merge, s)).collect();
        wanted.extend(disk.restore.as_ref().map(|_| (JobKind::Restore, None)));
        for (kind, snapshot) in wanted {
            if self.job_on(id, |job| job.snapshot == snapshot && (snapshot.is_some() || job.kind == kind)).is_none() {
                let job = self.jobs().next_back().map_or(1, |last| last.id + 1);
                let new =
                    super::entity::Job { id: job, kind, disk: id, snapshot, state: JobState::Running, is_paced: false };
                self.jobs_mut().insert(job, new);
            }
        }
    }

    fn end_job(&mut self, id: u64) {
        let Some(job) = self.jobs_mut().remove(&id) else { return };
        match job.kind {
            JobKind::Fold | JobKind::Merge => job.snapshot.into_iter().for_each(|id| self.forget_snapshot(id)),
            JobKind::Migrate | JobKind::Update => self.become_independent(job.disk),
            JobKind::Restore => {
                if let Some(disk) = self.disks_mut().get_mut(&job.disk) {
                    disk.restore = None;
                }
            }
            JobKind::Mirror => {
                if let Some(disk) = self.disks_mut().get_mut(&job.disk) {
                    let syncing = disk.legs.iter_mut().filter(|leg| leg.state == LegState::Syncing);
                    syncing.for_each(|leg| leg.state = LegState::InSync);
                }
            }
        }
    }

    fn become_independent(&mut self, id: Uuid) {
        self.jobs_mut().retain(|_, job| job.disk != id || !matches!(job.kind, JobKind::Migrate | JobKind::Update));
        if let Some(disk) = self.disks_mut().get_mut(&id) {
            disk.has_work = false;
            disk.is_in_log &= !disk.snapshots.is_empty();
            if let Kind::Volume(source) = disk.kind {
                disk.kind = Kind::Independent(source);
            }
        }
    }

    fn forget_snapshot(&mut self, id: Uuid) {
        self.jobs_mut().retain(|_, job| job.snapshot != Some(id));
        for disk in self.disks_mut().values_mut() {
            let before = disk.snapshots.len();
            let going = disk.snapshots.iter().find(|s| s.id == id && s.keeps_bookmark);
            let left = going.map(|s| Bookmark { id, name: s.name.clone(), taken_for: s.taken_for });
            // What it becomes may be there before it is gone.
            disk.bookmarks.extend(left.filter(|_| !disk.bookmarks.iter().any(|b| b.id == id)));
            // An older one that reads through it takes its image over; else its leg comes back.
            if disk.snapshots.iter().any(|s| s.id != id && s.through.contains(&id)) {
                disk.legs.retain(|leg| leg.state != LegState::Held { by: id });
            }
            disk.snapshots.retain(|s| s.id != id);
            let held = disk.legs.iter_mut().filter(|leg| leg.state == LegState::Held { by: id });
            held.for_each(|leg| leg.state = LegState::Syncing);
            disk.snapshots.iter_mut().for_each(|s| s.through.retain(|newer| *newer != id));
            // The last log is folded with the last snapshot.
            disk.is_in_log &= disk.snapshots.len() == before || !disk.snapshots.is_empty();
        }
    }
}
