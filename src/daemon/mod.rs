//! The daemon: configuration and wiring.
//!
//! [`config`] turns the command line and the configuration file into a [`ServeConfig`]; [`serve`] runs it.

pub mod config;

use config::ServeConfig;

/// Why the daemon ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// TO BE REPLACED together with the body of [`serve`].
    #[error("this build cannot serve disks yet; use a release that can")]
    NotBuilt,
}

/// Serves until told to stop.
///
/// TO BE REPLACED: the wiring of engine, manager and control server goes here. The command line calls it once, with a
/// logger installed and a checked configuration, and prints its error as one line.
///
/// # Errors
/// For now always.
pub fn serve(config: ServeConfig) -> Result<(), ServeError> {
    log::debug!("would have served {} disks at {}", config.disks.len(), config.control.display());
    Err(ServeError::NotBuilt)
}
