//! The one-way mirror: epochs, versions, tables, locks and the strategies (source 002 [0045]-[0108]).
//!
//! Every version of a disk is, seen from outside, an array of bytes. A write that belongs to epoch e, while epoch n is
//! live, changes the versions e to n and no other. Everything here serves that sentence.
//!
//! What this room does not know: sockets, rings, names that users gave, files' places.

mod background;
mod backing;
mod chain;
mod changes;
mod complete;
mod connection;
mod discard;
mod disk;
mod epoch;
mod flush;
mod join;
mod legs;
mod lock;
mod plan;
mod read;
mod request;
mod restore;
mod runs;
mod snapshot;
mod update;
mod view;
mod write;

pub use crate::planted;
pub use background::{Background, GuestQueue, Turn, WINDOW_BYTES};
pub use backing::Backing;
pub use chain::{Chain, Layer, Link, Log, Owned, Revoke, Saved, Segment, Version, VersionId, VersionIndex};
pub use changes::{ChangeSource, Changed, Changes, Mark, NoChanges};
pub use complete::Filled;
pub use connection::{Connection, Connections, PinChange};
pub use disk::{Attachment, Disk, DiskObserver, DiskOptions, Geometry};
pub use epoch::{EPOCHS_DRAINING_MAX, Epoch, EpochClock, EpochLane, Ticket, TooManyDraining};
pub use legs::{CopyCursor, LegImage, LegState, LegStatus, Pair, PairError, PairFacts, PairObserver, REGION_BYTES_MIN};
pub use lock::{BLOCKS_PER_GUARD_MAX, BlockGuard, BlockLocks, Mode};
pub use plan::{BlockPlan, Copy, Fill, Run, WritePlan};
pub use request::{Request, RequestError};
pub use restore::{ClosedDisk, Gate, RestoreSource, Restoring};
pub use snapshot::{ChainEditor, Cut, NewLayer, PreparedSnapshot, RetireError, Writers};
pub use view::{VOLUMES_DEEP_MAX, View};
