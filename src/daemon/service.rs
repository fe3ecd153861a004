//! What the control room asks of the manager.

use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use crate::control::api::{
    self, Bookmark, Claim, DeleteSnapshotOptions, DiskConfig, DiskPatch, GroupDeletion, Job, JobPatch, RestoreRequest,
    SnapshotRequest, Strategy, Unserved, UpdateQuery, VersionInfo, VolumeRequest, VolumeStatus, Writers,
};
use crate::control::changes::{Diff, FoundMap};
use crate::control::metrics::{self, DiskMetrics, MetricsSnapshot, SnapshotMetrics};
use crate::control::{ApiError, Deletion, ErrorCode, EventBus, JobDeletion, Name, PutOutcome, Service, SnapshotRef};
use crate::manager::Manager;
use crate::manager::entry::is_id;
use crate::manager::entry::locked;
use crate::vhost_user::DirectionStats;

impl Service for Manager {
    fn version(&self) -> VersionInfo {
        VersionInfo::of_this_build(
            vec![Strategy::CopyOnWrite, Strategy::WriteLogging, Strategy::WriteMirroring],
            vec![Writers::Request, Writers::Connection],
        )
    }

    fn list_claims(&self) -> Result<Vec<Claim>, ApiError> {
        Ok(self.claims_to_api())
    }

    fn list_unserved(&self) -> Result<Vec<Unserved>, ApiError> {
        Ok(self.all_unserved())
    }

    fn problems(&self) -> Vec<String> {
        locked(&self.problems).clone()
    }

    fn list_disks(&self) -> Result<Vec<api::Disk>, ApiError> {
        let (served, unserved) = self.all_there();
        let mut disks: Vec<_> = served.iter().filter(|d| !d.is_volume()).map(|d| d.to_api(self)).collect();
        disks.extend(unserved.iter().filter(|u| !u.is_volume()).map(|u| self.unserved_to_api(u)));
        disks.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(disks)
    }

    fn get_disk(&self, disk: &Name) -> Result<api::Disk, ApiError> {
        match self.unserved_disk(disk) {
            Some(disk) => Ok(disk),
            None => Ok(self.plain_disk(&self.disk_name(disk))?.to_api(self)),
        }
    }

    fn put_disk(&self, disk: &Name, config: &DiskConfig) -> Result<PutOutcome, ApiError> {
        self.put(disk, config)
    }

    fn delete_disk(&self, disk: &Name, force: bool) -> Result<(), ApiError> {
        let name = self.unserved_disk(disk).map_or_else(|| disk.clone(), |disk| disk.name);
        self.remove_disk(&name, force)
    }

    fn set_disk(&self, disk: &Name, patch: &DiskPatch) -> Result<api::Disk, ApiError> {
        self.set_plain_disk(disk, patch)
    }

    fn set_volume(&self, volume: &Name, patch: &DiskPatch) -> Result<api::Volume, ApiError> {
        self.set_served_volume(volume, patch)
    }

    fn resize_disk(&self, disk: &Name, size_bytes: u64) -> Result<api::Disk, ApiError> {
        self.resize_plain_disk(disk, size_bytes)
    }

    fn rename_disk(&self, disk: &Name, to: &Name, force: bool) -> Result<api::Disk, ApiError> {
        self.rename_plain_disk(disk, to, force)
    }

    fn rename_volume(&self, volume: &Name, to: &Name, force: bool) -> Result<api::Volume, ApiError> {
        self.rename_served_volume(volume, to, force)
    }

    fn forget_disk(&self, disk: &Name) -> Result<(), ApiError> {
        self.forget(disk)
    }

    fn accept_disk(&self, disk: &Name) -> Result<(), ApiError> {
        self.accept(disk)
    }

    fn mirror_disk(&self, disk: &Name, path: &Path) -> Result<api::Disk, ApiError> {
        self.mirror(disk, path)
    }

    fn unmirror_disk(&self, disk: &Name, leg: Option<&Path>) -> Result<api::Disk, ApiError> {
        self.unmirror(disk, leg)
    }

    fn restore_disk(&self, disk: &Name, request: &RestoreRequest) -> Result<Job, ApiError> {
        self.restore(disk, request)
    }

    fn create_snapshots(&self, request: &SnapshotRequest) -> Result<Vec<api::Snapshot>, ApiError> {
        self.create(request)
    }

    fn list_snapshots(&self) -> Result<Vec<api::Snapshot>, ApiError> {
        let of = |d: &Arc<crate::manager::entry::DiskEntry>| {
            let facts = d.facts();
            d.snapshots().iter().map(|s| s.to_api(&facts)).collect::<Vec<_>>()
        };
        Ok(self.all_disks().iter().flat_map(of).collect())
    }

    fn get_snapshot(&self, reference: &SnapshotRef) -> Result<api::Snapshot, ApiError> {
        let disk = self.disk(&reference.disk).map_err(|e| match e.code {
            ErrorCode::DiskNotFound => ApiError::snapshot_not_found(reference),
            _ => e,
        })?;
        let snapshot = disk.snapshot(&reference.name).ok_or_else(|| disk.no_snapshot(reference))?;
        Ok(snapshot.to_api(&disk.facts()))
    }

    fn cut_over_snapshot(&self, reference: &SnapshotRef) -> Result<api::Snapshot, ApiError> {
        self.cut_over(reference)
    }

    fn delete_snapshot(&self, reference: &SnapshotRef, options: DeleteSnapshotOptions) -> Result<Deletion, ApiError> {
        options.check(reference, self.get_snapshot(reference)?.strategy)?;
        self.delete(reference, options)
    }

    fn delete_group(&self, group: Uuid, options: DeleteSnapshotOptions) -> Result<Vec<GroupDeletion>, ApiError> {
        self.delete_all_of(group, options)
    }

    fn create_volume(&self, request: &VolumeRequest) -> Result<api::Volume, ApiError> {
        self.make_volume(request)
    }

    fn list_volumes(&self) -> Result<Vec<api::Volume>, ApiError> {
        Ok(self.all_volumes())
    }

    fn get_volume(&self, volume: &Name) -> Result<api::Volume, ApiError> {
        let volumes = self.all_volumes();
        let by_name = volumes.iter().find(|v| v.name == *volume);
        let found = by_name.or_else(|| volumes.iter().find(|v| is_id(volume, v.id)));
        found.cloned().ok_or_else(|| self.no_volume(volume))
    }

    fn delete_volume(&self, volume: &Name, force: bool) -> Result<(), ApiError> {
        self.remove_volume(volume, force)
    }

    fn moment_of_id(&self, id: Uuid) -> Result<SnapshotRef, ApiError> {
        self.reference_of(id)
    }

    fn diff_snapshot(&self, from: &SnapshotRef, to: Option<&SnapshotRef>) -> Result<Diff, ApiError> {
        self.diff(from, to)
    }

    fn diff_volume(&self, volume: &Name, to: Option<&SnapshotRef>) -> Result<Diff, ApiError> {
        self.diff_of_volume(volume, to)
    }

    fn map_volume(&self, volume: &Name) -> Result<FoundMap, ApiError> {
        self.map_of_volume(volume)
    }

    fn volume_status(&self, volume: &Name) -> Result<VolumeStatus, ApiError> {
        self.status_of_volume(volume)
    }

    fn list_bookmarks(&self) -> Result<Vec<Bookmark>, ApiError> {
        Ok(self.all_bookmarks())
    }

    fn get_bookmark(&self, bookmark: &SnapshotRef) -> Result<Bookmark, ApiError> {
        self.bookmark(bookmark)
    }

    fn delete_bookmark(&self, bookmark: &SnapshotRef) -> Result<(), ApiError> {
        self.remove_bookmark(bookmark)
    }

    fn complete_volume(&self, volume: &Name, pacing: JobPatch) -> Result<Job, ApiError> {
        self.begin_completion(volume, pacing)
    }

    fn update_volume(&self, volume: &Name, options: UpdateQuery) -> Result<Job, ApiError> {
        self.update(volume, options.force, options.pacing())
    }

    fn promote_volume(&self, volume: &Name) -> Result<api::Disk, ApiError> {
        self.promote(volume)
    }

    fn disable_volume(&self, volume: &Name, force: bool) -> Result<api::Volume, ApiError> {
        self.disable(volume, force)
    }

    fn enable_volume(&self, volume: &Name, fresh: bool) -> Result<api::Volume, ApiError> {
        self.enable(volume, fresh)
    }

    fn list_jobs(&self) -> Result<Vec<Job>, ApiError> {
        let jobs: Vec<_> = locked(&self.jobs).values().cloned().collect();
        Ok(jobs.iter().map(|job| self.job_to_api(job)).collect())
    }

    fn get_job(&self, id: u64) -> Result<Job, ApiError> {
        Ok(self.job_to_api(&*self.job(id)?))
    }

    fn patch_job(&self, id: u64, patch: JobPatch) -> Result<Job, ApiError> {
        let job = self.job(id)?;
        crate::manager::work::apply(patch, &job.pace);
        self.remember_pace(&job)?;
        Ok(job.to_api())
    }

    fn delete_job(&self, id: u64) -> Result<JobDeletion, ApiError> {
        self.stop_job(id)
    }

    fn resume_job(&self, id: u64) -> Result<Job, ApiError> {
        self.go_on_with_job(id)
    }

    fn metrics(&self) -> MetricsSnapshot {
        let jobs = locked(&self.jobs).values().map(|j| j.to_api()).collect();
        let mut all = MetricsSnapshot { jobs, ..MetricsSnapshot::default() };
        for disk in self.all_disks() {
            let (stats, facts) = (disk.stats(), disk.facts());
            all.disks.push(DiskMetrics {
                disk: disk.name.get(),
                frontends_connected: u64::from(disk.frontends.count()),
                directions: std::array::from_fn(|i| direction(&stats.directions[i])),
                background_wait_seconds: facts.background_waited.as_secs_f64(),
                legs: locked(&disk.mirror).as_ref().map(|m| m.legs_to_api(&facts)).unwrap_or_default(),
            });
            for snapshot in disk.snapshots() {
                let preserved = facts.version(snapshot.id).map_or((0, 0), |version| version.preserved);
                all.snapshots.push(SnapshotMetrics {
                    disk: disk.name.get(),
                    snapshot: snapshot.name.clone(),
                    preserved_blocks: preserved.0,
                    preserved_bytes: preserved.1,
                    drain_seconds: locked(&snapshot.drain).map(|d| d.as_secs_f64()),
                    old_frontends: u64::from(snapshot.old_frontends(&facts)),
                });
            }
        }
        all
    }

    fn events(&self) -> Arc<EventBus> {
        self.bus.clone()
    }
}

// Both rooms count in the same order and the same buckets.
const _: () = assert!(metrics::LATENCY_BUCKETS + 1 == crate::vhost_user::LATENCY_BUCKETS);

fn direction(stats: &DirectionStats) -> metrics::DirectionMetrics {
    metrics::DirectionMetrics {
        requests: stats.requests,
        bytes: stats.bytes,
        errors: stats.errors,
        latency: metrics::LatencyHistogram {
            counts: stats.latency,
            sum_us: u64::try_from(stats.latency_sum.as_micros()).unwrap_or(u64::MAX),
        },
    }
}
