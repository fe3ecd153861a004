//! The types of volumes: writable branches off snapshots.
//!
//! The rules of the whole module hold here too: what a client sends is unchecked until its `validate` has passed.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::disk::check_block_size;
use super::settings::Settings;
use super::{JobPatch, VolumeState, check_absolute, check_socket};
use crate::control::error::ApiError;
use crate::control::name::{Name, NameError, SnapshotRef};
use crate::control::timestamp::Timestamp;

/// A volume: a writable branch off a snapshot of a disk or of another volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Volume {
    /// Stays the same as long as the volume exists, across restarts.
    #[schema(value_type = String, format = "uuid")]
    pub id: Uuid,
    /// Its name. No disk has the same.
    pub name: Name,
    /// The snapshot that it stands on, `disk@name`.
    pub from: String,
    /// The id of that snapshot.
    #[schema(value_type = String, format = "uuid")]
    pub from_id: Uuid,
    /// Whether it has everything itself, and does not need that snapshot any more.
    pub independent: bool,
    /// Whether it can be used.
    pub state: VolumeState,
    /// Why it is broken.
    pub reason: Option<String>,
    /// The vhost-user socket.
    #[schema(value_type = String)]
    pub socket: PathBuf,
    /// The image that holds what was written to it since its last snapshot.
    #[schema(value_type = String)]
    pub image: PathBuf,
    /// The size that guests see.
    pub size_bytes: u64,
    /// The size of the blocks that its tables count in.
    pub block_size: u32,
    /// How much of its content is in that image.
    pub owned_bytes: u64,
    /// How guests see it, and how its snapshots are taken.
    #[serde(flatten)]
    pub settings: Settings,
    /// Whether any frontend is connected.
    pub connected: bool,
    /// How many frontends are connected.
    pub frontends: u32,
    /// How many snapshots it has itself.
    pub snapshots: u32,
    /// When it was made.
    pub created_at: Timestamp,
}

/// The body of `POST /v1/volumes`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVolume {
    /// Its name.
    pub name: String,
    /// What it stands on: a snapshot, `disk@name`; or a disk or volume, of which a snapshot with the volume's name is taken.
    pub from: String,
    /// The vhost-user socket, an absolute path; `<run-dir>/<name>.sock` when absent.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub socket: Option<PathBuf>,
    /// The image for what is written to it, an absolute path. It must not exist.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub image: Option<PathBuf>,
    /// The size of the blocks that its tables count in, a power of two from 4096 to 1048576; that of the disk that it stands
    /// on when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_size: Option<u32>,
}

/// The query of `POST /v1/volumes/{volume}/disable`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ForceQuery {
    /// Also while a frontend is connected.
    #[serde(default)]
    #[param(required = false)]
    pub force: bool,
}

/// The query of `POST /v1/volumes/{volume}/update`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct UpdateQuery {
    /// Also while a frontend is connected: it is disconnected, and finds the new content when it connects again.
    #[serde(default)]
    #[param(required = false)]
    pub force: bool,
    /// The pause between two steps of what is copied afterwards, in milliseconds, at most an hour.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(maximum = 3_600_000)]
    pub delay_ms: Option<u32>,
    /// The most bytes to copy in a second; 0 for as many as it can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
}

impl UpdateQuery {
    /// How the job is paced.
    pub fn pacing(self) -> JobPatch {
        JobPatch { delay_ms: self.delay_ms, bytes_per_second: self.bytes_per_second }
    }
}

/// The query of `POST /v1/volumes/{volume}/enable`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct EnableQuery {
    /// Drop what was written to it: it shows its snapshot again.
    #[serde(default)]
    #[param(required = false)]
    pub fresh: bool,
}

/// What a volume is to stand on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VolumeSource {
    /// A snapshot of a disk or volume that is to be taken for it.
    Now(Name),
    /// A snapshot that is there.
    Snapshot(SnapshotRef),
}

impl FromStr for VolumeSource {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.contains('@') { text.parse().map(Self::Snapshot) } else { text.parse().map(Self::Now) }
    }
}

impl fmt::Display for VolumeSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Now(disk) => disk.fmt(f),
            Self::Snapshot(snapshot) => snapshot.fmt(f),
        }
    }
}

/// A [`CreateVolume`] that makes sense by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeRequest {
    /// Its name.
    pub name: Name,
    /// What it stands on.
    pub from: VolumeSource,
    /// The vhost-user socket, absolute.
    pub socket: Option<PathBuf>,
    /// The image for what is written to it, absolute.
    pub image: Option<PathBuf>,
    /// The size of the blocks that its tables count in, if it is not to be that of the source.
    pub block_size: Option<u32>,
}

impl CreateVolume {
    /// The request, if it makes sense.
    ///
    /// # Errors
    /// `invalid-name` or `invalid-request`.
    pub fn validate(&self) -> Result<VolumeRequest, ApiError> {
        if let Some(socket) = &self.socket {
            check_socket("socket", socket)?;
        }
        if let Some(image) = &self.image {
            check_absolute("image", image)?;
        }
        if let Some(size) = self.block_size {
            check_block_size("block_size", size)?;
        }
        let (socket, image, block_size) = (self.socket.clone(), self.image.clone(), self.block_size);
        Ok(VolumeRequest { name: self.name.parse()?, from: self.from.parse()?, socket, image, block_size })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_stands_on_a_snapshot_or_on_one_that_is_taken() {
        assert!(matches!("vm1@daily".parse(), Ok(VolumeSource::Snapshot(_))));
        assert!(matches!("vm1".parse(), Ok(VolumeSource::Now(_))));
        for bad in ["", "@", "vm1@", "@daily", "a@b@c", "A"] {
            assert!(bad.parse::<VolumeSource>().is_err(), "{bad:?}");
        }
    }
}
