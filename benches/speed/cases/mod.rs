//! The cases, one file each. Each adds its rows to the results.

pub(crate) mod background;
pub(crate) mod cut;
pub(crate) mod first_writes;
pub(crate) mod many;
pub(crate) mod plain;
pub(crate) mod restart;
pub(crate) mod scale;
