//! Background copying over the mirror: paced, with progress, stopped between two blocks.
//!
//! What always holds: a job locks a run of neighbouring blocks or a single one, a few side by side, so a guest's write waits
//! for the copy of one run at most; a job that is stopped has done whole blocks only, and can be begun again from the start.
//!
//! What this room does not know: who asked, and what is recorded about it.

mod complete;
mod pace;
mod restore;
mod resync;
mod retire;
mod step;

pub use complete::{complete, store_kept, update};
pub use pace::Pace;
pub use restore::restore;
pub use resync::resync;
pub use retire::{carry_out_discards, retire};
pub use step::Outcome;
