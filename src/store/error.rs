//! What is wrong with a table.

use std::io;
use std::path::{Path, PathBuf};

use crate::image::{ImageError, ImageErrorKind};

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
    /// There is no room for it.
    #[error("table {}: {message}", path.display())]
    NoSpace {
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

impl TableError {
    /// What the system refused, at this path.
    pub(crate) fn io(path: &Path, e: &io::Error) -> TableError {
        let is_full = matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        TableError::refused(path, is_full, e.to_string())
    }

    /// The same, when it is stored in an image.
    pub(crate) fn image(path: &Path, e: &ImageError) -> TableError {
        TableError::refused(path, e.kind == ImageErrorKind::NoSpace, e.to_string())
    }

    fn refused(path: &Path, is_full: bool, message: String) -> TableError {
        let path = path.to_owned();
        if is_full { TableError::NoSpace { path, message } } else { TableError::Io { path, message } }
    }
}
