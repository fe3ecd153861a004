//! Waiting for several operations at once, as this room's files know it.

pub(super) use crate::image::join_all;
