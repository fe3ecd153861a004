//! The cases, one file each. Each adds its rows to the results.

pub(crate) mod plain;
