//! The types that cross the control socket, as JSON.
//!
//! What a client sends ([`DiskConfig`], [`CreateSnapshots`], [`JobPatch`]) is unchecked until its `check` or `validate`
//! has passed; unknown fields are refused so that a misspelt option is never silently ignored. What the daemon sends is
//! complete: every field is always present, `null` when there is nothing to say. Fields are added, never renamed;
//! clients ignore fields that they do not know. Sizes are bytes. No policy lives here.

mod changes;
mod deletion;
mod disk;
mod list;
mod restore;
mod settings;
mod status;
mod volume;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::error::{ApiError, ErrorCode};
use super::name::{Name, SnapshotRef};
use super::socket::SOCKET_PATH_LEN_MAX;
use super::timestamp::Timestamp;
use super::words::words;

pub use changes::{Bookmark, BookmarkState, ByteRange, DiffQuery, DiffSource, VolumeMap, VolumeStatus};
pub use deletion::{DeleteGroupOptions, DeleteQuery, DeleteSnapshotOptions, DeletionState, GroupDeletion};
pub use disk::{Disk, DiskConfig, DiskPatch, Leg, LegQuery, MirrorRequest, RenameRequest, ResizeRequest};
pub use list::{BookmarkList, DiskList, Glob, JobList, ListQuery, SnapshotList, VolumeList};
pub use restore::{RestoreDisk, RestoreRequest, RestoreStatus};
pub use settings::{Difference, Settings};
pub use status::{Claim, Status, Unserved};
pub use volume::{CreateVolume, EnableQuery, ForceQuery, UpdateQuery, Volume, VolumeRequest, VolumeSource};

/// The version of the API, the `v1` of its paths.
pub const API_VERSION: &str = "v1";
/// The most virtqueues of a disk.
pub const QUEUES_MAX: u16 = 16;
/// The smallest block that tables count in, and the default.
pub const BLOCK_SIZE_MIN: u32 = 4096;
/// The largest block that tables count in.
pub const BLOCK_SIZE_MAX: u32 = 1 << 20;
/// The longest serial: virtio-blk's GET_ID answers 20 bytes.
pub const SERIAL_LEN_MAX: usize = 20;
/// The longest pause between two steps of a job, in milliseconds: one hour.
pub const JOB_DELAY_MS_MAX: u32 = 3_600_000;

words! {
    /// Where the full image goes when a snapshot is taken. No guest can tell which one runs.
    Strategy {
        /// The live version keeps the full image; overwritten blocks are preserved first (figures 21 to 27).
        CopyOnWrite = "copy-on-write",
        /// The frozen version keeps the full image; new writes go to a log (figures 14 to 20).
        WriteLogging = "write-logging",
        /// Both versions have a full image, kept equal before the split (figures 9 to 13).
        WriteMirroring = "write-mirroring",
    }
}

words! {
    /// Which writes belong to the snapshot.
    Writers {
        /// Those whose requests were taken from the ring before the cut.
        Request = "request",
        /// All those of a frontend connection that was there before the cut.
        Connection = "connection",
    }
}

words! {
    /// How the blocks of a snapshot lie in its own image, or those of a log. No guest can tell which one it is.
    Layout {
        /// The daemon's choice.
        Auto = "auto",
        /// Each at its own position, in a sparse file of the disk's size.
        Sparse = "sparse",
        /// One after the other in the order in which they were written, behind headers that name them.
        Packed = "packed",
    }
}

words! {
    /// What the content of snapshots outlives. The disk itself outlives both.
    Durability {
        /// The daemon's end, also by a kill. After a power cut a copy-on-write snapshot is broken and says so.
        Process = "process",
        /// A power cut too: what is saved for a snapshot is on stable storage before it is overwritten.
        Power = "power",
    }
}

words! {
    /// Whether a disk can be used.
    DiskState {
        /// It answers on its socket.
        Serving = "serving",
        /// It stopped; its reason says why.
        Failed = "failed",
        /// It is remembered and could not be served; its reason says why. It is served when that is mended.
        Unserved = "unserved",
    }
}

words! {
    /// How well an image of a mirrored disk is.
    LegState {
        /// It has every write that was acknowledged.
        InSync = "in-sync",
        /// A job makes it equal to the other leg; until then nobody reads it.
        Resynchronising = "resynchronising",
        /// It gets no writes any more; its reason says why. The disk goes on with the other leg.
        Failed = "failed",
        /// It holds a frozen version: a snapshot took it at the split.
        Split = "split",
    }
}

words! {
    /// Where a snapshot is in its life.
    SnapshotState {
        /// Requests from before the cut still run, or old frontends still write it; the content may still change and
        /// there is no socket yet.
        Draining = "draining",
        /// The content never changes again and its socket is open.
        Quiesced = "quiesced",
        /// Its log is being folded back under the running guest.
        Folding = "folding",
        /// It is being removed.
        Deleting = "deleting",
        /// Its content can no longer be trusted; its reason says why.
        Broken = "broken",
    }
}

words! {
    /// Whether a volume can be used.
    VolumeState {
        /// It answers on its socket.
        Serving = "serving",
        /// It keeps its content and is not served until it is enabled.
        Disabled = "disabled",
        /// What it stands on or its own log cannot be trusted; its reason says why. Reads and writes fail.
        Broken = "broken",
    }
}

words! {
    /// What a job does.
    JobKind {
        /// Folds a write log back into the full image.
        Fold = "fold",
        /// Hands the blocks of a version that is being deleted to its neighbour.
        Merge = "merge",
        /// Copies the blocks that a volume does not own yet.
        Migrate = "migrate",
        /// The same for a volume that was put on a newer snapshot of its source.
        Update = "update",
        /// Synchronises a leg of a mirrored disk with the other one.
        Mirror = "mirror",
        /// Copies back what a disk has otherwise than what it is restored from.
        Restore = "restore",
    }
}

words! {
    /// How far a job is.
    JobState {
        /// It is copying, or waiting for its next step.
        Running = "running",
        /// It was stopped and can be resumed.
        Stopped = "stopped",
        /// It has finished.
        Done = "done",
        /// It gave up; its reason says why.
        Failed = "failed",
    }
}

/// What is running.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VersionInfo {
    /// The version of the daemon.
    pub version: String,
    /// The version of this API.
    pub api_version: String,
    /// The strategies that this daemon supports.
    pub strategies: Vec<Strategy>,
    /// The choices of `writers` that this daemon supports.
    pub writers: Vec<Writers>,
}

impl VersionInfo {
    /// This build, with what the service supports.
    pub fn of_this_build(strategies: Vec<Strategy>, writers: Vec<Writers>) -> Self {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Self { version, api_version: API_VERSION.to_owned(), strategies, writers }
    }
}

fn invalid(message: String) -> ApiError {
    ApiError::new(ErrorCode::InvalidRequest, message)
}

/// Only who waits can have waited long enough.
fn check_wait(wait: bool, timeout_ms: Option<u64>) -> Result<(), ApiError> {
    match timeout_ms {
        Some(_) if !wait => {
            Err(invalid("wait_timeout_ms: nothing is waited for".to_owned()).with_action("add wait=true"))
        }
        _ => Ok(()),
    }
}

fn check_absolute(key: &str, path: &Path) -> Result<(), ApiError> {
    if path.is_absolute() && !path.to_string_lossy().contains('\0') {
        return Ok(());
    }
    Err(invalid(format!("{key}: {path:?} is not an absolute path")))
}

fn check_socket(key: &str, path: &Path) -> Result<(), ApiError> {
    check_absolute(key, path)?;
    if path.as_os_str().len() > SOCKET_PATH_LEN_MAX {
        let len = path.as_os_str().len();
        return Err(invalid(format!("{key}: a socket's path has at most {SOCKET_PATH_LEN_MAX} bytes, this one {len}")));
    }
    Ok(())
}

/// A frozen version of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    /// Stays the same as long as the snapshot exists, across restarts.
    #[schema(value_type = String, format = "uuid")]
    pub id: Uuid,
    /// Shared by the snapshots that one request took in the same epoch.
    #[schema(value_type = String, format = "uuid")]
    pub group: Uuid,
    /// The disk it was taken of.
    pub disk: Name,
    /// Its name, unique among the snapshots of that disk.
    pub name: Name,
    /// How it is stored.
    pub strategy: Strategy,
    /// What it outlives once it is quiesced, as it is stored now.
    pub durability: Durability,
    /// Which writes belong to it.
    pub writers: Writers,
    /// Where it is in its life.
    pub state: SnapshotState,
    /// Why it is broken, or what it waits for.
    pub reason: Option<String>,
    /// The last epoch whose writes it shows.
    pub epoch: u64,
    /// Its vhost-user socket, which exists once it is quiesced.
    #[schema(value_type = String)]
    pub socket: PathBuf,
    /// The image that holds its own blocks.
    #[schema(value_type = Option<String>)]
    pub image: Option<PathBuf>,
    /// How they lie there: `sparse` or `packed`.
    pub layout: Layout,
    /// The size of the blocks that its table counts in.
    pub block_size: u32,
    /// How much of its content is in its own image.
    pub owned_bytes: u64,
    /// The size that readers see.
    pub size_bytes: u64,
    /// When the cut was.
    pub created_at: Timestamp,
    /// When the last request of its epoch was done.
    pub quiesced_at: Option<Timestamp>,
    /// How many frontends still write it (VLUN A) rather than the live version; only with `writers` = `connection`.
    pub old_frontends: u32,
}

impl Snapshot {
    /// `disk@name`.
    pub fn reference(&self) -> SnapshotRef {
        SnapshotRef { disk: self.disk.clone(), name: self.name.clone() }
    }
}

/// The body of `POST /v1/snapshots`: one cut through any number of disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshots {
    /// The name that each of the snapshots gets.
    pub name: String,
    /// The disks, at least one and each once.
    #[schema(min_items = 1)]
    pub disks: Vec<String>,
    /// How to store them; the daemon's choice when absent.
    #[serde(default)]
    pub strategy: Option<Strategy>,
    /// How their own blocks lie in their images; as is set of each disk when absent. Volumes have sparse ones alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<Layout>,
    /// Which writes belong to them; `request` when absent.
    #[serde(default)]
    pub writers: Option<Writers>,
    /// The vhost-user socket, an absolute path; only with one disk.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub socket: Option<PathBuf>,
    /// The image for the snapshot's own blocks, an absolute path; only with one disk.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub image: Option<PathBuf>,
    /// Whether to answer only when all are quiesced or broken, rather than at the cut.
    #[serde(default)]
    pub wait: bool,
    /// The longest to wait for that, in milliseconds; then the answer says how far they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_timeout_ms: Option<u64>,
}

/// A [`CreateSnapshots`] that makes sense by itself. Whether the disks exist is for the service to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotRequest {
    /// The name that each of the snapshots gets.
    pub name: Name,
    /// The disks: at least one, no two the same.
    pub disks: Vec<Name>,
    /// How to store them; the daemon's choice when absent.
    pub strategy: Option<Strategy>,
    /// How their own blocks lie in their images; as is set of each disk when absent.
    pub layout: Option<Layout>,
    /// Which writes belong to them.
    pub writers: Writers,
    /// The vhost-user socket; present only with one disk, absolute.
    pub socket: Option<PathBuf>,
    /// The image for its own blocks; present only with one disk, absolute.
    pub image: Option<PathBuf>,
}

impl CreateSnapshots {
    /// The request, if it makes sense.
    ///
    /// # Errors
    /// `invalid-name` or `invalid-request`.
    pub fn validate(&self) -> Result<SnapshotRequest, ApiError> {
        check_wait(self.wait, self.wait_timeout_ms)?;
        let name = self.name.parse()?;
        let disks = self.disks.iter().map(|disk| disk.parse()).collect::<Result<Vec<Name>, _>>()?;
        if disks.is_empty() {
            return Err(invalid("disks: name at least one disk".to_owned()));
        }
        if let Some(twice) = disks.iter().enumerate().find_map(|(at, disk)| disks[..at].contains(disk).then_some(disk))
        {
            return Err(invalid(format!("disks: {twice} is named twice")));
        }
        for (key, path) in [("socket", &self.socket), ("image", &self.image)] {
            let Some(path) = path else { continue };
            if disks.len() > 1 {
                let message = format!("{key}: one path cannot serve {} disks", disks.len());
                return Err(invalid(message).with_action("leave it to the default, or snapshot one disk"));
            }
            if key == "socket" { check_socket(key, path)? } else { check_absolute(key, path)? }
        }
        Ok(SnapshotRequest {
            name,
            disks,
            strategy: self.strategy,
            layout: self.layout,
            writers: self.writers.unwrap_or(Writers::Request),
            socket: self.socket.clone(),
            image: self.image.clone(),
        })
    }
}

/// Background copying.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Job {
    /// Its number, never used twice.
    pub id: u64,
    /// What it does.
    pub kind: JobKind,
    /// The disk it works on.
    pub disk: Name,
    /// The snapshot it works for.
    pub snapshot: Option<Name>,
    /// How far it is.
    pub state: JobState,
    /// Why it failed or was stopped.
    pub reason: Option<String>,
    /// How much is done.
    pub done_bytes: u64,
    /// How much there is to do.
    pub total_bytes: u64,
    /// How much of it is done, from 0 to 100; 100 only when all is.
    pub percent: u64,
    /// The pause between two steps, in milliseconds.
    pub delay_ms: u32,
    /// The most bytes that it does in a second; 0 for as many as it can.
    pub bytes_per_second: u64,
    /// Who or what keeps it from going on, if anything does.
    #[serde(default)]
    pub waits_for: Option<String>,
    /// When it began.
    pub started_at: Timestamp,
    /// How long it will take from now on at the rate so far; absent when unknown or when it does not run.
    pub estimated_seconds: Option<u64>,
}

impl Job {
    /// How much of a job is done, from 0 to 100.
    pub fn percent_of(state: JobState, done_bytes: u64, total_bytes: u64) -> u64 {
        if state == JobState::Done {
            return 100;
        }
        let percent = (u128::from(done_bytes) * 100).checked_div(u128::from(total_bytes)).unwrap_or(0);
        u64::try_from(percent).map_or(100, |percent| percent.min(100))
    }

    /// What a job still needs that has done so much of its bytes in `elapsed`, rounded up; `None` while nothing tells.
    pub fn estimate_seconds(done_bytes: u64, total_bytes: u64, elapsed: Duration) -> Option<u64> {
        let left = u128::from(total_bytes.checked_sub(done_bytes)?);
        let milliseconds = left.saturating_mul(elapsed.as_millis()).checked_div(u128::from(done_bytes))?;
        u64::try_from(milliseconds.div_ceil(1000)).ok()
    }
}

/// The body of `PATCH /v1/jobs/{id}`.
///
/// What is left out stays as it is. The same, as a query, begins the completion of a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct JobPatch {
    /// The pause between two steps, in milliseconds, at most an hour.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(maximum = 3_600_000)]
    pub delay_ms: Option<u32>,
    /// The most bytes to do in a second; 0 for as many as it can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
}

impl JobPatch {
    /// Whether the values are in range.
    ///
    /// # Errors
    /// `invalid-request`.
    pub fn check(self) -> Result<(), ApiError> {
        match self.delay_ms {
            Some(delay) if delay > JOB_DELAY_MS_MAX => {
                Err(invalid(format!("delay_ms: {delay} is more than {JOB_DELAY_MS_MAX}")))
            }
            _ => Ok(()),
        }
    }

    /// Whether something is to be changed at all.
    ///
    /// # Errors
    /// `invalid-request`.
    pub fn check_change(self) -> Result<(), ApiError> {
        if self == JobPatch::default() {
            return Err(invalid("neither delay_ms nor bytes_per_second is there".to_owned()));
        }
        self.check()
    }
}

/// The query of `POST /v1/snapshots/{snapshot}/cutover`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct CutoverQuery {
    /// Whether to answer only when the snapshot is quiesced or broken, rather than at once.
    #[serde(default)]
    #[param(required = false)]
    pub wait: bool,
    /// The longest to wait for that, in milliseconds; then the answer says how far it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_timeout_ms: Option<u64>,
}

impl CutoverQuery {
    /// Whether the values go together.
    ///
    /// # Errors
    /// `invalid-request`.
    pub fn check(self) -> Result<(), ApiError> {
        check_wait(self.wait, self.wait_timeout_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_estimate_needs_something_to_go_by() {
        let after = Duration::from_secs(10);
        assert_eq!(Job::estimate_seconds(0, 100, after), None);
        assert_eq!(Job::estimate_seconds(25, 100, after), Some(30));
        assert_eq!(Job::estimate_seconds(99, 100, after), Some(1));
        assert_eq!(Job::estimate_seconds(100, 100, after), Some(0));
        assert_eq!(Job::estimate_seconds(101, 100, after), None);
        assert_eq!(Job::estimate_seconds(1, u64::MAX, Duration::MAX), None);
    }

    #[test]
    fn what_was_recorded_before_there_were_mirrors_is_still_read() {
        let config: DiskConfig = serde_json::from_str(r#"{"path":"/vm1.raw"}"#).unwrap();
        assert_eq!(config, DiskConfig::new("/vm1.raw"));
        assert_eq!((config.queues(), config.readonly(), config.durability()), (1, false, Durability::Process));
        assert_eq!((config.mirror, config.shared), (None, false));
    }
}
