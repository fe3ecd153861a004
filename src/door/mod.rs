//! The door of the engine: what the daemon asks of disks and their versions, by values, and what it is told of them.
//!
//! What always holds: nothing that leaves this room holds a chain, a version or an image. What comes in are names, numbers,
//! and descriptors, each of which is handed over once.

mod facts;

pub use facts::{ChangedFacts, DiskFacts, LayerKind, MarkFacts, RestoreFacts, Stored, VersionFacts};
