//! Why the engine does not do what it is asked for.

use crate::engine::{PairError, RequestError, TooManyDraining};
use crate::image::ImageError;
use crate::store::TableError;

/// See above.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An image refused.
    #[error(transparent)]
    Image(ImageError),
    /// A table refused.
    #[error(transparent)]
    Table(TableError),
    /// A mirror cannot be used so.
    #[error("{0}")]
    Mirror(String),
    /// A version that is needed cannot be vouched for.
    #[error("{0}")]
    Broken(String),
    /// Not now.
    #[error("{0}")]
    Busy(String),
    /// Anything else that the system refuses.
    #[error("{0}")]
    Io(String),
}

impl From<PairError> for Error {
    fn from(e: PairError) -> Error {
        match e {
            PairError::Image(e) => Error::Image(e),
            PairError::Bitmap(e @ TableError::NoSpace { .. }) => Error::Table(e),
            e => Error::Mirror(e.to_string()),
        }
    }
}

impl From<ImageError> for Error {
    fn from(e: ImageError) -> Error {
        Error::Image(e)
    }
}

impl From<RequestError> for Error {
    fn from(e: RequestError) -> Error {
        Error::Io(e.to_string())
    }
}

impl From<TableError> for Error {
    fn from(e: TableError) -> Error {
        Error::Table(e)
    }
}

impl From<TooManyDraining> for Error {
    fn from(e: TooManyDraining) -> Error {
        Error::Busy(e.to_string())
    }
}

impl From<String> for Error {
    fn from(e: String) -> Error {
        Error::Io(e)
    }
}

/// That there is no mirror, or not the leg that is asked for.
pub(super) fn no_mirror() -> Error {
    Error::Mirror("it has no second leg".to_owned())
}
