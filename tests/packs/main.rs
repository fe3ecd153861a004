//! Packs on simulated media: kills and power cuts at any moment, several lives one after the other, every order of
//! transfers, media that refuse.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![allow(dead_code, reason = "the media serve other tests too")]

mod lives;
#[path = "../common/media.rs"]
mod media;
#[path = "../common/schedule.rs"]
mod schedule;
