//! The type of a glance at everything: what there is, what holds it, and what is remembered and not served.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{Disk, Job, Snapshot, VersionInfo, Volume};
use crate::control::name::Name;
use crate::control::timestamp::Timestamp;

/// Everything at a glance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// Always `serving`: a daemon that does not serve does not answer.
    pub state: String,
    /// What is running.
    pub version: VersionInfo,
    /// The daemon's process id.
    pub pid: u32,
    /// Since when the control socket answers.
    pub started_at: Timestamp,
    /// All disks, also those that are not served.
    pub disks: Vec<Disk>,
    /// All snapshots, those of volumes too.
    pub snapshots: Vec<Snapshot>,
    /// All volumes.
    pub volumes: Vec<Volume>,
    /// All jobs.
    pub jobs: Vec<Job>,
    /// The operations that are under way, and what each of them holds.
    #[serde(default)]
    pub claims: Vec<Claim>,
    /// What is remembered and not served, and why.
    #[serde(default)]
    pub unserved: Vec<Unserved>,
    /// What is wrong and is said of nothing that is listed: disks of the configuration file that were left out, damaged records.
    #[serde(default)]
    pub problems: Vec<String>,
}

/// An operation that is under way. Until one that holds something is over, others that change the same wait or are refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Claim {
    /// What it does, in words: `snapshot delete`.
    pub operation: String,
    /// The names of what it changes: disks, volumes, `disk@name`.
    pub entities: Vec<String>,
    /// Since when.
    pub since: Timestamp,
    /// Whether it holds them; false of one that waits until it can.
    #[serde(default)]
    pub held: bool,
    /// Who or what it waits for, if it does.
    pub waits_for: Option<String>,
}

/// A disk or volume that is remembered and not served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Unserved {
    /// Its name.
    pub name: Name,
    /// Its id; null when its record cannot be read.
    #[schema(value_type = Option<String>, format = "uuid")]
    pub id: Option<Uuid>,
    /// Why it is not served.
    pub reason: String,
}
