//! The one-way mirror: epochs, versions, tables, locks and the strategies (source 002 [0045]-[0108]).
//!
//! Every version of a disk is, seen from outside, an array of bytes. A write that belongs to epoch e, while epoch n is
//! live, changes the versions e to n and no other. Everything here serves that sentence.
//!
//! What this room does not know: sockets, rings, names that users gave, files' places.

mod attachment;
mod background;
mod backing;
mod chain;
mod changed;
mod changes;
mod complete;
mod connection;
mod cut;
mod discard;
mod disk;
mod editor;
mod epoch;
mod flush;
mod geometry;
mod grow;
mod layer;
mod legs;
mod lock;
mod place;
mod plan;
mod read;
mod request;
mod restore;
mod restoring;
mod retire;
mod runs;
mod ticket;
mod update;
mod version;
mod view;
mod write;

pub use attachment::Attachment;
pub use background::{Background, GuestQueue, Turn, WINDOW_BYTES};
pub use backing::Backing;
pub use chain::{Chain, Link, Segment, VersionIn, VersionIndex};
pub use changed::Changed;
pub use changes::{ChangeSource, Changes, NoChanges};
pub use connection::{Connection, Connections, PinChange};
pub use cut::{Cut, NewLayer, PreparedSnapshot, Writers};
pub use disk::{Disk, DiskObserver, DiskOptions};
pub use editor::ChainEditor;
pub use epoch::{EPOCHS_DRAINING_MAX, Epoch, EpochClock, Room, TooManyDraining};
pub use geometry::Geometry;
pub use grow::{GrowError, SizedTables};
pub use layer::{Layer, Log, Revoke, Saved};
pub use legs::{CopyCursor, LegImage, LegState, LegStatus, Pair, PairError, PairFacts, PairObserver, REGION_BYTES_MIN};
pub use lock::{BLOCKS_PER_GUARD_MAX, BlockGuard, BlockLocks, Mode};
pub use plan::{BlockPlan, Copy, Fill, Harmed, Run, WritePlan};
pub use request::{Request, RequestError};
pub use restore::ClosedDisk;
pub use restoring::{Gate, RestoreSource, Restoring};
pub use retire::{RetireError, Settling};
pub use runs::Copied;
pub use ticket::{EpochLane, Ticket};
pub use version::{Mark, Version, VersionId};
pub use view::{VOLUMES_DEEP_MAX, VersionSource, View};
