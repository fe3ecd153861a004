//! What is wrong with a table.

use std::path::PathBuf;

/// A table could not be made, loaded or saved.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The system refused.
    #[error("table {}: {message}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        message: String,
    },
    /// It is not what was left or saved.
    #[error("table {} is damaged: {what}", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What does not fit.
        what: String,
    },
}
