//! The door of the engine: what the daemon asks of disks and their versions, by values, and what it is told of them.
//!
//! What always holds:
//! - Nothing that leaves this room has a chain, a version or an image in it: answers are names, numbers and words. What is
//!   served of a disk ([`Attachment`]) goes to the room that serves it, and is closed to all others.
//! - Descriptors come in with a spec, once; what they are is told as facts from then on.
//!
//! What this does not do: to decide whether something may be done, to remember it, or to know where files are.

mod changes;
mod cut;
mod engine;
mod error;
mod facts;
mod grow;
mod legs;
mod open;
mod restore;
mod save;
mod spec;
mod volume;
mod work;

pub use changes::{Runs, VolumeCounts};
pub use cut::{Cut, NewLayer, SnapshotSpec};
pub use engine::{Disk, Engine, Event, Supervisor};
pub use error::Error;
pub use facts::{ChangedFacts, DiskFacts, LayerKind, MarkFacts, RestoreFacts, Stored, Trouble, VersionFacts};
pub use grow::Extend;
pub use legs::{bitmap_bytes, examine_mirror};
pub use restore::{Parted, RestoreFrom};
pub use save::{Kept, SavedDisk};
pub use spec::{BaseSpec, Bytes, DiskSpec, ImageSpec, LayerSpec, RestoreSpec, VersionSpec};
pub use volume::NextLog;
pub use work::{Retired, Work};

// Values of the rooms behind it.
pub use crate::engine::{
    Attachment, ChangeSource, Changed, Epoch, Geometry, GrowError, LegImage, LegState, LegStatus, Mark, NoChanges,
    PairError, PairFacts, RetireError, VOLUMES_DEEP_MAX, VersionId, WINDOW_BYTES, Writers,
};
pub use crate::job::{Outcome, Pace};
