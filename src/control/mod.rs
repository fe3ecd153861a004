//! The control room: HTTP on a Unix socket, events and metrics.
//!
//! Requests come in through [`Server`], are checked for form, and go to whoever implements [`Service`]; answers, events
//! and counters come back the same way. Invariants: what reaches the service is well formed, and every refusal is a
//! problem document with a stable code. It decides nothing about disks and snapshots, keeps no state of its own and
//! touches no image. docs/control-api.md is the page for its users.

pub mod api;
pub mod changes;
pub mod error;
pub mod event;
mod extract;
pub mod metrics;
pub mod name;
mod routes;
pub mod server;
pub mod service;
pub mod socket;
mod stop;
mod strict;
pub mod timestamp;
mod words;

pub use error::{ApiError, ErrorCode, Problem};
pub use event::{Event, EventBus, EventKind, Notice};
pub use name::{Name, SnapshotRef};
pub use server::{Server, ServerError};
pub use service::{Deletion, JobDeletion, PutOutcome, Service};
