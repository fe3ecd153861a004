//! What is shown of the results.

pub(crate) mod table;
