//! The types of restores in place: a disk goes back to a snapshot or to what a volume shows.
//!
//! The rules of the whole module hold here too: what a client sends is unchecked until its `validate` has passed.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{JobPatch, VolumeSource};
use crate::control::error::ApiError;

/// The body of `POST /v1/disks/{disk}/restore`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreDisk {
    /// What the disk goes back to: one of its snapshots, `disk@name`; or a volume that stands on one of them, as it is now,
    /// or a snapshot of such a volume.
    pub from: String,
    /// Also while a frontend is connected: what its guest has in memory does not go back.
    #[serde(default)]
    pub force: bool,
    /// The pause of the job after each block, in milliseconds, from its start on.
    #[serde(default)]
    #[schema(maximum = 3_600_000)]
    pub delay_ms: u32,
    /// The most bytes that the job copies in a second, from its start on; 0 for as many as it can.
    #[serde(default)]
    pub bytes_per_second: u64,
}

/// A [`RestoreDisk`] that makes sense by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestoreRequest {
    /// What the disk goes back to; a name is a volume's.
    pub from: VolumeSource,
    /// Also while a frontend is connected.
    pub force: bool,
    /// The pause of the job after each block, in milliseconds.
    pub delay_ms: u32,
    /// The most bytes that it copies in a second; 0 for as many as it can.
    pub bytes_per_second: u64,
}

impl RestoreDisk {
    /// The request, if it makes sense.
    ///
    /// # Errors
    /// `invalid-name`, `invalid-request`.
    pub fn validate(&self) -> Result<RestoreRequest, ApiError> {
        JobPatch { delay_ms: Some(self.delay_ms), bytes_per_second: Some(self.bytes_per_second) }.check()?;
        let Self { force, delay_ms, bytes_per_second, .. } = *self;
        Ok(RestoreRequest { from: self.from.parse()?, force, delay_ms, bytes_per_second })
    }
}

/// A restore that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RestoreStatus {
    /// The snapshot that the disk goes back to. The disk shows it already.
    pub from: String,
    /// Bytes that are still to be copied.
    pub remaining_bytes: u64,
}
