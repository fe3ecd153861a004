//! The engine in process: simulated images, deterministic schedules, and one byte array a version as the specification.

#![allow(clippy::unwrap_used, unreachable_pub, missing_docs, reason = "a test that cannot go on panics")]

mod bench;
mod figures;
mod oracle;
mod rules;
mod run;
mod sim;
mod waits;
mod world;

#[cfg(feature = "planted")]
mod defects;

/// Tests that plant defects take this for writing, all others for reading: a planted defect is process-wide.
static ALONE: std::sync::RwLock<()> = std::sync::RwLock::new(());
