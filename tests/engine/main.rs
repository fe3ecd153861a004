//! The engine in process: simulated images, deterministic schedules, and one byte array a version as the specification.

mod oracle;
mod sim;

#[cfg(feature = "planted")]
mod defects;

/// Tests that plant defects take this for writing, all others for reading: a planted defect is process-wide.
static ALONE: std::sync::RwLock<()> = std::sync::RwLock::new(());
