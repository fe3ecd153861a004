//! The types of deletions: of disks and volumes, of one snapshot, and of all that one cut made.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::{Strategy, invalid};
use crate::control::error::{ApiError, Problem};
use crate::control::name::SnapshotRef;
use crate::control::words::words;

words! {
    /// How far the deletion of a snapshot is.
    DeletionState {
        /// It is gone.
        Deleted = "deleted",
        /// Its log is being folded back under the running guest.
        Folding = "folding",
        /// It is being removed.
        Deleting = "deleting",
        /// It is not removed; the problem says why.
        Refused = "refused",
    }
}

/// The query of `DELETE /v1/disks/{disk}` and `DELETE /v1/volumes/{volume}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct DeleteQuery {
    /// Remove it even if a frontend is connected, and with its snapshots.
    #[serde(default)]
    #[param(required = false)]
    pub force: bool,
}

/// How a snapshot is deleted: the query of `DELETE /v1/snapshots/{snapshot}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
#[into_params(parameter_in = Query)]
pub struct DeleteSnapshotOptions {
    /// Delete it even if a reader is connected.
    #[serde(default)]
    #[param(required = false)]
    pub force: bool,
    /// Leave its image as an independent raw file instead of giving it back to the disk as its second leg; only for
    /// write-mirroring.
    #[serde(default)]
    #[param(required = false)]
    pub keep_image: bool,
    /// Leave a bookmark: what has changed since the snapshot is still known.
    #[serde(default)]
    #[param(required = false)]
    pub keep_bookmark: bool,
    /// The longest that the answer waits, in milliseconds, for requests of before the cut and for the copying; a minute when
    /// absent.
    #[serde(default, rename = "wait_timeout_ms", skip_serializing_if = "Option::is_none")]
    pub wait_timeout_ms: Option<u64>,
}

impl DeleteSnapshotOptions {
    /// Whether a snapshot that is stored so can be deleted so.
    ///
    /// # Errors
    /// `invalid-request` if the image is to be kept and holds only a part of the content.
    pub fn check(self, snapshot: &SnapshotRef, strategy: Strategy) -> Result<(), ApiError> {
        if !self.keep_image || strategy == Strategy::WriteMirroring {
            return Ok(());
        }
        let message = format!("keep-image: snapshot {snapshot} is {strategy}, so its image alone is not its content");
        Err(invalid(message).with_action("copy it from its socket first if it is wanted, then delete it as usual"))
    }
}

/// How the snapshots of one cut are deleted: the query of `DELETE /v1/snapshots`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
#[into_params(parameter_in = Query)]
pub struct DeleteGroupOptions {
    /// The group that the snapshots have in common.
    #[param(value_type = String, format = "uuid")]
    pub group: Uuid,
    /// Delete them even if readers are connected.
    #[serde(default)]
    #[param(required = false)]
    pub force: bool,
    /// Leave bookmarks: what has changed since the snapshots is still known.
    #[serde(default)]
    #[param(required = false)]
    pub keep_bookmark: bool,
    /// The longest that the answer waits, in milliseconds, for requests of before the cut and for the copying; a minute when
    /// absent.
    #[serde(default, rename = "wait_timeout_ms", skip_serializing_if = "Option::is_none")]
    pub wait_timeout_ms: Option<u64>,
}

impl DeleteGroupOptions {
    /// How each of the snapshots is deleted.
    pub fn of_each(self) -> DeleteSnapshotOptions {
        let Self { force, keep_bookmark, wait_timeout_ms, .. } = self;
        DeleteSnapshotOptions { force, keep_image: false, keep_bookmark, wait_timeout_ms }
    }
}

/// What became of one of the snapshots of a cut that are deleted together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GroupDeletion {
    /// `disk@name`.
    pub snapshot: String,
    /// How far it is.
    pub state: DeletionState,
    /// Why it was refused after others were begun.
    pub problem: Option<Problem>,
}
