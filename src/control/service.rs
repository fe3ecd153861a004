//! The door between the control room and whoever runs the disks.
//!
//! The server calls these methods from threads on which blocking is allowed, several at a time, so an implementation
//! does its own locking. All inputs are checked for form; whether they fit what exists is for the implementation to
//! decide. Nothing here knows HTTP, and no policy lives on this side of the door.

use std::sync::Arc;

use super::api::{Disk, DiskConfig, Job, JobPatch, Snapshot, SnapshotRequest, VersionInfo};
use super::error::ApiError;
use super::event::EventBus;
use super::metrics::MetricsSnapshot;
use super::name::{Name, SnapshotRef};

/// What a request did that may find its work already done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PutOutcome {
    /// The disk is new.
    Created(Disk),
    /// The disk was there with the same configuration; nothing was done.
    Unchanged(Disk),
}

/// How far the deletion of a snapshot is when the service answers.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "one at a time, on its way to JSON")]
pub enum Deletion {
    /// It is gone.
    Done,
    /// A job goes on removing it (state `folding` or `deleting`); it disappears when that job is done.
    Started(Snapshot),
}

/// What the control server needs of the daemon.
///
/// Every method may block. Errors reach the client as they are, so their messages name the disk or path and their
/// actions say what to do.
pub trait Service: Send + Sync + 'static {
    /// What is running and what it supports.
    fn version(&self) -> VersionInfo;

    /// All disks, by name.
    ///
    /// # Errors
    /// Only if the daemon cannot tell.
    fn list_disks(&self) -> Result<Vec<Disk>, ApiError>;

    /// One disk.
    ///
    /// # Errors
    /// `disk-not-found`.
    fn get_disk(&self, disk: &Name) -> Result<Disk, ApiError>;

    /// Serves a disk. Doing so twice with the same configuration is doing it once.
    ///
    /// # Errors
    /// `disk-exists` if it is configured differently, `invalid-config`, `conflict`, `io-error`.
    fn put_disk(&self, disk: &Name, config: &DiskConfig) -> Result<PutOutcome, ApiError>;

    /// Stops serving a disk; its image stays. With `force` also when frontends are connected or snapshots exist.
    ///
    /// # Errors
    /// `disk-not-found`, `disk-busy`.
    fn delete_disk(&self, disk: &Name, force: bool) -> Result<(), ApiError>;

    /// Takes one cut through all disks of the request, and answers at the cut without waiting for the drain. The answer
    /// has one snapshot a disk, in the order of the request. All of them exist or none does.
    ///
    /// # Errors
    /// `disk-not-found`, `disk-failed`, `snapshot-exists`, `unsupported`, `no-space`, `conflict`, `io-error`.
    fn create_snapshots(&self, request: &SnapshotRequest) -> Result<Vec<Snapshot>, ApiError>;

    /// All snapshots of all disks, by disk and epoch.
    ///
    /// # Errors
    /// Only if the daemon cannot tell.
    fn list_snapshots(&self) -> Result<Vec<Snapshot>, ApiError>;

    /// One snapshot.
    ///
    /// # Errors
    /// `snapshot-not-found`.
    fn get_snapshot(&self, snapshot: &SnapshotRef) -> Result<Snapshot, ApiError>;

    /// Removes a snapshot, or starts to. With `force` also when a reader is connected.
    ///
    /// # Errors
    /// `snapshot-not-found`, `snapshot-busy`, `io-error`.
    fn delete_snapshot(&self, snapshot: &SnapshotRef, force: bool) -> Result<Deletion, ApiError>;

    /// All jobs that run, and those that ended and are still of interest.
    ///
    /// # Errors
    /// Only if the daemon cannot tell.
    fn list_jobs(&self) -> Result<Vec<Job>, ApiError>;

    /// One job.
    ///
    /// # Errors
    /// `job-not-found`.
    fn get_job(&self, id: u64) -> Result<Job, ApiError>;

    /// Changes the pace of a job.
    ///
    /// # Errors
    /// `job-not-found`.
    fn patch_job(&self, id: u64, patch: JobPatch) -> Result<Job, ApiError>;

    /// Stops a job. What it has done stays done.
    ///
    /// # Errors
    /// `job-not-found`, `unsupported` if it may not be stopped.
    fn delete_job(&self, id: u64) -> Result<(), ApiError>;

    /// All counters, now.
    fn metrics(&self) -> MetricsSnapshot;

    /// The bus that this service publishes on; the same one at every call.
    fn events(&self) -> Arc<EventBus>;
}
