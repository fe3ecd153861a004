//! What the API answers when it refuses or fails: RFC 9457 problem documents.
//!
//! Invariants: every answer of 400 and above is a [`Problem`]; its `code` never changes once released, so scripts may
//! match on it, while `detail` is for people and may. Each problem says what to do next. An [`ApiError`] says nothing
//! about where it came from in the code: that belongs in the log.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::name::NameError;

/// The media type of a [`Problem`].
pub const PROBLEM_JSON: &str = "application/problem+json";

macro_rules! error_codes {
    ($($(#[$doc:meta])* $variant:ident = $code:literal, $status:literal, $title:literal, $action:literal;)*) => {
        /// Why a request was refused or failed. The texts are part of the API.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum ErrorCode {
            $($(#[$doc])* $variant,)*
        }

        impl ErrorCode {
            /// Every code there is.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The stable machine-readable code.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $code,)* }
            }

            /// The HTTP status that goes with it.
            pub const fn status(self) -> u16 {
                match self { $(Self::$variant => $status,)* }
            }

            /// The short title, the same for every occurrence.
            pub const fn title(self) -> &'static str {
                match self { $(Self::$variant => $title,)* }
            }

            /// What to do about it, unless the occurrence knows better.
            pub const fn action(self) -> &'static str {
                match self { $(Self::$variant => $action,)* }
            }
        }
    };
}

error_codes! {
    /// The body, the query or a combination of fields is wrong.
    InvalidRequest = "invalid-request", 400, "Invalid request", "correct the request; GET /v1/openapi.json describes it";
    /// A name is outside `[a-z0-9-]{1,64}`.
    InvalidName = "invalid-name", 400, "Invalid name", "use 1 to 64 of a-z, 0-9 and -";
    /// The path is no route of this API.
    NotFound = "not-found", 404, "Not found", "GET /v1/openapi.json lists what there is";
    /// No disk of that name.
    DiskNotFound = "disk-not-found", 404, "No such disk", "'halfsilver disk list' shows the disks";
    /// No snapshot of that name.
    SnapshotNotFound = "snapshot-not-found", 404, "No such snapshot", "'halfsilver snapshot list' shows the snapshots";
    /// No volume of that name.
    VolumeNotFound = "volume-not-found", 404, "No such volume", "'halfsilver volume list' shows the volumes";
    /// No bookmark of that name.
    BookmarkNotFound = "bookmark-not-found", 404, "No such bookmark", "'halfsilver bookmark list' shows the bookmarks";
    /// No job of that number.
    JobNotFound = "job-not-found", 404, "No such job", "'halfsilver job list' shows the jobs";
    /// The path exists, the method does not.
    MethodNotAllowed = "method-not-allowed", 405, "Method not allowed", "use a method that the Allow header names";
    /// The request's body did not come in time.
    RequestTimeout = "request-timeout", 408, "Request timeout", "send the whole body at once";
    /// A disk of that name exists and is configured differently.
    DiskExists = "disk-exists", 409, "Disk exists", "remove the disk first, or use another name";
    /// The disk still has frontends or snapshots.
    DiskBusy = "disk-busy", 409, "Disk in use", "disconnect the guest and delete the snapshots first, or force it";
    /// The disk has failed and cannot do this.
    DiskFailed = "disk-failed", 409, "Disk failed", "repair what its reason names, then remove the disk and add it again";
    /// The disk has one image only, and this needs two.
    NoSecondLeg = "no-second-leg", 409, "No second leg", "'halfsilver disk mirror' adds one";
    /// A leg that this needs is failed, split or still being synchronised.
    MirrorNotInSync = "mirror-not-in-sync", 409, "Mirror not in sync", "wait until 'halfsilver disk show' shows both legs in-sync";
    /// A snapshot of that name exists.
    SnapshotExists = "snapshot-exists", 409, "Snapshot exists", "delete it first, or use another name";
    /// The snapshot is being read, or not in a state that allows this.
    SnapshotBusy = "snapshot-busy", 409, "Snapshot in use", "disconnect its readers and try again, or force it";
    /// The snapshot is broken and cannot do this.
    SnapshotBroken = "snapshot-broken", 409, "Snapshot broken", "delete it and take another";
    /// It is not known what was written in between.
    ChangesUnknown = "changes-unknown", 409, "Changes not known", "copy the whole disk once, off a snapshot that is taken now; changes since that are known again";
    /// A volume of that name exists.
    VolumeExists = "volume-exists", 409, "Volume exists", "delete it first, or use another name";
    /// The volume has frontends or snapshots.
    VolumeBusy = "volume-busy", 409, "Volume in use", "disconnect the guest and delete its snapshots first, or force it";
    /// A path, socket or image is in use by something else.
    Conflict = "conflict", 409, "Conflict", "choose another path, or stop what uses this one";
    /// The body is larger than the daemon reads.
    BodyTooLarge = "body-too-large", 413, "Body too large", "send at most 64 KiB";
    /// The configuration is well formed and cannot be served, such as a file that does not exist.
    InvalidConfig = "invalid-config", 422, "Configuration cannot be served", "correct the configuration";
    /// This version cannot do that.
    Unsupported = "unsupported", 422, "Not supported", "GET /v1/version says what this daemon supports";
    /// Something went wrong in the daemon.
    Internal = "internal", 500, "Internal error", "see the daemon's log, and report it";
    /// The host refused a read, write or sync.
    Io = "io-error", 500, "Input/output error", "see the daemon's log and check the storage";
    /// The daemon is going down or not yet up.
    Unavailable = "unavailable", 503, "Unavailable", "try again when the daemon serves";
    /// No room left for it.
    NoSpace = "no-space", 507, "No space", "free some space and try again";
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A refusal or failure on its way to the client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}; {action}")]
pub struct ApiError {
    /// The kind; decides the HTTP status.
    pub code: ErrorCode,
    /// What happened this time, naming the disk, snapshot or path. No full stop at the end.
    pub message: String,
    /// What to do about it. No full stop at the end.
    pub action: String,
    /// The commands that clear what stands in the way, in their order.
    pub commands: Vec<String>,
}

impl ApiError {
    /// An error with the usual advice for its code.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), action: code.action().to_owned(), commands: Vec::new() }
    }

    /// The same error with better advice.
    pub fn with_action(self, action: impl Into<String>) -> Self {
        Self { action: action.into(), ..self }
    }

    /// There is no such disk.
    pub fn disk_not_found(disk: impl fmt::Display) -> Self {
        Self::new(ErrorCode::DiskNotFound, format!("there is no disk {disk}"))
    }

    /// There is no such snapshot.
    pub fn snapshot_not_found(snapshot: impl fmt::Display) -> Self {
        Self::new(ErrorCode::SnapshotNotFound, format!("there is no snapshot {snapshot}"))
    }

    /// There is no such volume, but perhaps a disk of that name.
    pub fn volume_not_found(volume: impl fmt::Display, is_disk: bool) -> Self {
        match is_disk {
            false => Self::new(ErrorCode::VolumeNotFound, format!("there is no volume {volume}")),
            true => Self::new(ErrorCode::VolumeNotFound, format!("{volume} is a disk, not a volume"))
                .with_action(format!("see 'halfsilver disk show {volume}'")),
        }
    }

    /// There is no such job.
    pub fn job_not_found(id: impl fmt::Display) -> Self {
        Self::new(ErrorCode::JobNotFound, format!("there is no job {id}"))
    }

    /// The disk has one image only, and this needs two.
    pub fn no_second_leg(disk: impl fmt::Display) -> Self {
        Self::new(ErrorCode::NoSecondLeg, format!("disk {disk} has no second leg"))
            .with_action(format!("add one: halfsilver disk mirror {disk} PATH --wait"))
    }

    /// A stopped job is all that is left of work that was begun, so it stays.
    pub fn job_unfinished(id: impl fmt::Display) -> Self {
        Self::new(ErrorCode::Conflict, format!("job {id} is stopped and still has work to do"))
            .with_action(format!("resume it: halfsilver job resume {id}"))
    }

    /// The job has ended, so there is nothing to go on with.
    pub fn job_ended(id: impl fmt::Display, state: impl fmt::Display) -> Self {
        Self::new(ErrorCode::Conflict, format!("job {id} is {state}, so there is nothing to resume or stop"))
            .with_action("'halfsilver job list' shows the jobs")
    }

    /// The document that is sent.
    pub fn problem(&self) -> Problem {
        Problem {
            kind: format!("urn:halfsilver:problem:{}", self.code),
            title: self.code.title().to_owned(),
            status: self.code.status(),
            detail: self.message.clone(),
            code: self.code.as_str().to_owned(),
            action: self.action.clone(),
            commands: self.commands.clone(),
        }
    }
}

impl From<NameError> for ApiError {
    fn from(error: NameError) -> Self {
        Self::new(ErrorCode::InvalidName, error.to_string())
    }
}

/// An RFC 9457 problem document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// A URN that names the kind of problem.
    #[serde(rename = "type")]
    pub kind: String,
    /// The kind of problem in words, the same every time.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What happened this time.
    pub detail: String,
    /// The stable machine-readable code.
    pub code: String,
    /// What to do about it.
    pub action: String,
    /// Those steps of it that are commands, in their order; carried out, with the others between them, they make the refused
    /// one succeed. A PATH in one is for the user to name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub commands: Vec<String>,
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn codes_are_unique_and_documented() {
        let page = include_str!("../../docs/control-api.md");
        let mut seen = HashSet::new();
        for code in ErrorCode::ALL {
            assert!(seen.insert(code.as_str()), "{code} twice");
            assert!((400..600).contains(&code.status()));
            let row = format!("| `{code}` | {} |", code.status());
            assert!(page.contains(&row), "docs/control-api.md lacks the row {row:?}");
        }
    }
}
