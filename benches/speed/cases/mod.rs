//! The cases, one file each. Each adds its rows to the results.

pub(crate) mod first_writes;
pub(crate) mod plain;
