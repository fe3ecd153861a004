//! What a job does to a disk that goes on after a restart, as it is remembered.

use serde::{Deserialize, Serialize};

/// A kind of work that the records remember.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Work {
    /// A volume gets everything that it does not own yet (source 004: forced migration).
    Complete,
    /// The same for one that was put on a newer snapshot of its source (source 004: image update).
    Update,
}

/// Work that is under way, and how it was paced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkRecord {
    /// What is done.
    pub work: Work,
    /// Whether the user has stopped it; then it waits to be resumed.
    pub stopped: bool,
    /// The pause between two steps, in milliseconds.
    pub delay_ms: u32,
    /// The most that it copies in a second; 0 for as much as it can.
    pub bytes_per_second: u64,
}
