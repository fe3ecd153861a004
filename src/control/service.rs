//! The door between the control room and whoever runs the disks.
//!
//! The server calls these methods from threads on which blocking is allowed, several at a time, so an implementation
//! does its own locking. All inputs are checked for form; whether they fit what exists is for the implementation to
//! decide. Nothing here knows HTTP, and no policy lives on this side of the door.

use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::api::{
    Bookmark, Claim, DeleteSnapshotOptions, Disk, DiskConfig, DiskPatch, GroupDeletion, Job, JobPatch, RestoreRequest,
    Snapshot, SnapshotRequest, Unserved, UpdateQuery, VersionInfo, Volume, VolumeRequest, VolumeStatus,
};
use super::changes::{Diff, FoundMap};
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

/// What became of a job that was to be stopped or forgotten.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobDeletion {
    /// It ran; it is stopped between two blocks now and stays listed, to be resumed.
    Stopped(Job),
    /// It had ended; it is no longer listed.
    Removed,
}

/// What the control server needs of the daemon.
///
/// Every method may block. Errors reach the client as they are, so their messages name the disk or path and their
/// actions say what to do.
pub trait Service: Send + Sync + 'static {
    /// What is running and what it supports.
    fn version(&self) -> VersionInfo;

    /// The operations that are under way, and what each of them holds.
    ///
    /// # Errors
    /// Only if the daemon cannot tell.
    fn list_claims(&self) -> Result<Vec<Claim>, ApiError>;

    /// The disks and volumes that are remembered and not served, and why, by name.
    ///
    /// # Errors
    /// Only if the daemon cannot tell.
    fn list_unserved(&self) -> Result<Vec<Unserved>, ApiError>;

    /// What is wrong and is said of nothing that is listed.
    fn problems(&self) -> Vec<String>;

    /// All disks, by name, also those that are not served.
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

    /// Changes how a disk is served, and remembers it: what a later configuration says nothing of stays as it was set. How
    /// it is connected to counts for the next frontend.
    ///
    /// # Errors
    /// `disk-not-found`, `disk-failed` if it is not served, `invalid-config` if a disk with a mirror is to be read-only,
    /// `disk-busy` if something writes a disk that is to be read-only, `unsupported` if its image was opened to be read
    /// only, `io-error`.
    fn set_disk(&self, disk: &Name, patch: &DiskPatch) -> Result<Disk, ApiError>;

    /// The same of a volume, which cannot be read-only.
    ///
    /// # Errors
    /// `volume-not-found`, `volume-busy` if it is broken, `unsupported`, `io-error`.
    fn set_volume(&self, volume: &Name, patch: &DiskPatch) -> Result<Volume, ApiError>;

    /// Makes a disk larger, with its image, and tells its guests. Snapshots and bookmarks keep their size.
    ///
    /// # Errors
    /// `invalid-request` if it would become smaller, `invalid-config` if its image cannot have that size, `disk-not-found`,
    /// `disk-busy`, `snapshot-busy` if one does not drain, `unsupported` if it has a mirror, a log or is a volume,
    /// `disk-failed`, `no-space`, `io-error`.
    fn resize_disk(&self, disk: &Name, size_bytes: u64) -> Result<Disk, ApiError>;

    /// Gives a disk another name. All that belongs to it goes by its id and stays as it is: snapshots, bookmarks, volumes
    /// that stand on it, jobs, restores, guests. A socket that is called after the disk is called after the new name; with
    /// `force` also while a frontend is connected to it, which stays connected.
    ///
    /// # Errors
    /// `disk-not-found`, `disk-exists` or `volume-exists` if something has the new name, served or not; `disk-busy` while a
    /// frontend is connected, without `force`, if the socket moves; `conflict` if the new socket cannot be made; `io-error`.
    fn rename_disk(&self, disk: &Name, to: &Name, force: bool) -> Result<Disk, ApiError>;

    /// The same of a volume.
    ///
    /// # Errors
    /// `volume-not-found`, `volume-busy`, and those of [`Service::rename_disk`].
    fn rename_volume(&self, volume: &Name, to: &Name, force: bool) -> Result<Volume, ApiError>;

    /// Forgets a disk or volume that is not served: its record, its tables, and the images that were made for it. A disk's
    /// own image stays.
    ///
    /// # Errors
    /// `disk-not-found`; `disk-busy` if it is served, or others need its snapshots; `io-error`.
    fn forget_disk(&self, disk: &Name) -> Result<(), ApiError>;

    /// Serves a disk or volume that is not served because other images are where its own were: they are to be copies of those.
    ///
    /// # Errors
    /// `disk-not-found`; `disk-busy` if it is served; `conflict` if no image of it is another one; what is wrong with it
    /// beside that; `io-error`.
    fn accept_disk(&self, disk: &Name) -> Result<(), ApiError>;

    /// Stops serving a disk; its image stays. With `force` also when frontends are connected or snapshots exist. One that is
    /// not served is forgotten.
    ///
    /// # Errors
    /// `disk-not-found`, `disk-busy`, also with `force` while volumes stand on its snapshots.
    fn delete_disk(&self, disk: &Name, force: bool) -> Result<(), ApiError>;

    /// Gives a disk a second leg, or puts this one in the place of the failed one, and starts the job that synchronises
    /// it. Doing so twice with the same path is doing it once. The answer shows the leg and its state.
    ///
    /// # Errors
    /// `disk-not-found`, `disk-failed`, `invalid-config` if that image cannot be a leg of this disk (too small, missing,
    /// or the disk is read-only), `conflict` if it is in use or the disk has two good legs, `mirror-not-in-sync` while a
    /// leg is split or being synchronised, `no-space`, `io-error`.
    fn mirror_disk(&self, disk: &Name, path: &Path) -> Result<Disk, ApiError>;

    /// Lets a leg go, by default the second one. Its file stays as a plain raw image.
    ///
    /// # Errors
    /// `disk-not-found`, `no-second-leg`, `invalid-request` if `leg` is none of its legs, `mirror-not-in-sync` if it is
    /// the only good one, `disk-busy` if a snapshot holds it.
    fn unmirror_disk(&self, disk: &Name, leg: Option<&Path>) -> Result<Disk, ApiError>;

    /// Takes a disk back to one of its snapshots, or to what a volume shows that stands on one. The disk shows that when
    /// this answers, and a job copies what differs. With `force` also while frontends are connected.
    ///
    /// # Errors
    /// `disk-not-found`, `snapshot-not-found`, `volume-not-found`, `disk-busy` with a frontend connected without `force`, a
    /// snapshot that drains or is being deleted, or a restore under way; `disk-failed`, `snapshot-broken`,
    /// `snapshot-busy`, `unsupported` for a volume, `invalid-config` for a read-only disk, `invalid-request` if it does
    /// not stand on the disk, `no-space`, `io-error`.
    fn restore_disk(&self, disk: &Name, request: &RestoreRequest) -> Result<Job, ApiError>;

    /// Takes one cut through all disks of the request, and answers at the cut without waiting for the drain. The answer
    /// has one snapshot a disk, in the order of the request. All of them exist or none does.
    ///
    /// # Errors
    /// `disk-not-found`, `disk-failed`, `snapshot-exists`, `no-second-leg` and `mirror-not-in-sync` for write-mirroring,
    /// `unsupported`, `no-space`, `conflict`, `io-error`.
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

    /// Moves the frontends that still write the snapshot (VLUN A) over to the live version (VLUN B), without a reconnect;
    /// this is a cut by itself. Answers without waiting for the drain. Nothing to do on a snapshot that has none.
    ///
    /// # Errors
    /// `snapshot-not-found`, `snapshot-broken`, `snapshot-busy` if it is being removed.
    fn cut_over_snapshot(&self, snapshot: &SnapshotRef) -> Result<Snapshot, ApiError>;

    /// Removes a snapshot, or starts to. The image of a write-mirroring one becomes the disk's second leg again, and is
    /// synchronised by what has changed since, unless it is to be kept.
    ///
    /// # Errors
    /// `snapshot-not-found`, `snapshot-busy`, also while volumes stand on it, `io-error`, and `invalid-request` of [`DeleteSnapshotOptions::check`].
    fn delete_snapshot(&self, snapshot: &SnapshotRef, options: DeleteSnapshotOptions) -> Result<Deletion, ApiError>;

    /// Removes all snapshots of one cut, or starts to. Whether each of them may go is found out before the first one does;
    /// one that may not keeps all of them. The answer has one entry a snapshot, by disk.
    ///
    /// # Errors
    /// `snapshot-not-found` if there is none of that group, and those of [`Service::delete_snapshot`].
    fn delete_group(&self, group: Uuid, options: DeleteSnapshotOptions) -> Result<Vec<GroupDeletion>, ApiError>;

    /// Makes a volume: a writable branch off a snapshot, or off one that is taken for it first.
    ///
    /// # Errors
    /// `volume-exists`, `disk-exists`, `disk-not-found`, `snapshot-not-found`, `snapshot-busy` if it is not quiesced,
    /// `snapshot-broken`, `unsupported` if too many volumes would stand on each other, `conflict` if the image exists or
    /// the socket is in use, and what [`Service::create_snapshots`] answers.
    fn create_volume(&self, request: &VolumeRequest) -> Result<Volume, ApiError>;

    /// All volumes, by name.
    ///
    /// # Errors
    /// Only if the daemon cannot tell.
    fn list_volumes(&self) -> Result<Vec<Volume>, ApiError>;

    /// One volume.
    ///
    /// # Errors
    /// `volume-not-found`.
    fn get_volume(&self, volume: &Name) -> Result<Volume, ApiError>;

    /// Deletes a volume and what was written to it; with `force` also when frontends are connected or it has snapshots.
    /// What it stands on stays.
    ///
    /// # Errors
    /// `volume-not-found`, `volume-busy`, also with `force` if other volumes stand on it.
    fn delete_volume(&self, volume: &Name, force: bool) -> Result<(), ApiError>;

    /// The name of the snapshot or bookmark with this id.
    ///
    /// # Errors
    /// `snapshot-not-found`.
    fn moment_of_id(&self, id: Uuid) -> Result<SnapshotRef, ApiError>;

    /// What may differ between a snapshot or bookmark and a later one of the same disk, or the present.
    ///
    /// # Errors
    /// `snapshot-not-found`, `snapshot-busy` while one of them drains, `snapshot-broken`, `invalid-request` if they are of
    /// different disks or in the wrong order, `changes-unknown`.
    fn diff_snapshot(&self, from: &SnapshotRef, to: Option<&SnapshotRef>) -> Result<Diff, ApiError>;

    /// What may differ between a volume as it was made and a snapshot or bookmark of it, or the present.
    ///
    /// # Errors
    /// `volume-not-found`, and those of [`Service::diff_snapshot`].
    fn diff_volume(&self, volume: &Name, to: Option<&SnapshotRef>) -> Result<Diff, ApiError>;

    /// Which blocks of a volume are its own, and which were written.
    ///
    /// # Errors
    /// `volume-not-found`, `conflict` if it is not served.
    fn map_volume(&self, volume: &Name) -> Result<FoundMap, ApiError>;

    /// How much of a volume is its own, and how far it is from its source.
    ///
    /// # Errors
    /// `volume-not-found`, `conflict` if it is not served.
    fn volume_status(&self, volume: &Name) -> Result<VolumeStatus, ApiError>;

    /// All bookmarks, by disk and epoch.
    ///
    /// # Errors
    /// Only if the daemon cannot tell.
    fn list_bookmarks(&self) -> Result<Vec<Bookmark>, ApiError>;

    /// One bookmark.
    ///
    /// # Errors
    /// `bookmark-not-found`.
    fn get_bookmark(&self, bookmark: &SnapshotRef) -> Result<Bookmark, ApiError>;

    /// Forgets a bookmark.
    ///
    /// # Errors
    /// `bookmark-not-found`, `io-error`.
    fn delete_bookmark(&self, bookmark: &SnapshotRef) -> Result<(), ApiError>;

    /// Begins to make a volume independent of its snapshot, or goes on with it; the job's pace is changed if something is
    /// said about it.
    ///
    /// # Errors
    /// `volume-not-found`, `conflict` if it is independent, `disk-failed` if it is broken, `volume-busy` while a snapshot of
    /// it is being deleted, `io-error`.
    fn complete_volume(&self, volume: &Name, pacing: JobPatch) -> Result<Job, ApiError>;

    /// Puts a volume on a new snapshot of its source, so that it shows the source's present, and begins to copy what differs if
    /// it was independent.
    ///
    /// # Errors
    /// `volume-not-found`; `volume-busy` while a frontend is connected, without `force`, while it has snapshots or bookmarks or
    /// a job works on it; `disk-not-found` and `conflict` if its source is not there or another one; those of
    /// [`Service::create_snapshots`] for the source; `unsupported`, `disk-failed`, `io-error`, `no-space`.
    fn update_volume(&self, volume: &Name, options: UpdateQuery) -> Result<Job, ApiError>;

    /// Makes an independent volume a disk, under the same name and with the same identifier. Guests stay connected.
    ///
    /// # Errors
    /// `volume-not-found`, `volume-busy` if it is not independent or disabled, `io-error`.
    fn promote_volume(&self, volume: &Name) -> Result<Disk, ApiError>;

    /// Closes a volume's socket until it is enabled. Its content and what it stands on are kept. Doing so twice is doing it
    /// once.
    ///
    /// # Errors
    /// `volume-not-found`, `volume-busy` while a frontend is connected, without `force`; `io-error`.
    fn disable_volume(&self, volume: &Name, force: bool) -> Result<Volume, ApiError>;

    /// Serves a disabled volume again; with `fresh`, as its snapshot shows it, without what was written to it.
    ///
    /// # Errors
    /// `volume-not-found`, `conflict` if its socket cannot be opened; with `fresh` `volume-busy` if it is served, has
    /// snapshots, is broken or a job works on it, and `unsupported` if it is independent; `io-error`, `no-space`.
    fn enable_volume(&self, volume: &Name, fresh: bool) -> Result<Volume, ApiError>;

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

    /// Stops a running job between two blocks, and returns when it stands still: it stays listed as stopped, also after
    /// a restart. One that has ended is forgotten.
    ///
    /// # Errors
    /// `job-not-found`, `conflict` if it is stopped and has work to do ([`ApiError::job_unfinished`]), `unsupported` if
    /// it may not be stopped.
    fn delete_job(&self, id: u64) -> Result<JobDeletion, ApiError>;

    /// Goes on with a stopped job; nothing to do if it runs.
    ///
    /// # Errors
    /// `job-not-found`, `conflict` if it has ended ([`ApiError::job_ended`]).
    fn resume_job(&self, id: u64) -> Result<Job, ApiError>;

    /// All counters, now.
    fn metrics(&self) -> MetricsSnapshot;

    /// The bus that this service publishes on; the same one at every call.
    fn events(&self) -> Arc<EventBus>;
}
