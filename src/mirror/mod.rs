//! The one-way mirror: epochs, versions, tables, locks and the strategies (sources 002 [0045]-[0108]).

mod disk;
mod epoch;
pub mod planted;
mod request;

pub use disk::{Attachment, Disk, Geometry};
pub use epoch::{EPOCHS_DRAINING_MAX, Epoch, EpochClock, EpochLane, Ticket, TooManyDraining};
pub use request::{Request, RequestError};
