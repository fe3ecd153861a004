//! What there is, by identifier, and what needs what (source 004: what stands on what).
//!
//! What always holds:
//! - Whether a command may be carried out is decided here and nowhere else: [`decide`] holds what it is about against one
//!   table of operations and obstacles, so that a guard cannot be forgotten.
//! - A refusal names what stands in the way and the commands that clear it; carried out in their order they make the
//!   refused command succeed.
//! - Things are bound by identifier; names are only how a command finds them.
//!
//! What this does not do: no I/O, no waiting, no handles. A [`Registry`] is a value: that of one moment.

mod advice;
mod after;
mod claims;
mod command;
mod decide;
mod edge;
mod entity;
mod legs;
mod obstacle;
mod table;

pub use advice::Step;
pub use claims::{Claim, ClaimKey, Claims, Wanted};
pub use command::Command;
pub use decide::{Plan, Refusal, cleared_by, decide};
pub use edge::{Edge, EdgeKind};
pub use entity::{Bookmark, Disk, Job, Kind, Leg, LegState, Phase, Registry, Restore, Snapshot, SnapshotPhase, Source};
pub use obstacle::{Obstacle, ObstacleKind};
pub use table::{Answer, Operation};
