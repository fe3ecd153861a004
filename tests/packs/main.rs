//! Packs on simulated media: kills and power cuts at any moment, several lives one after the other, every order of
//! transfers, media that refuse.

#![allow(clippy::unwrap_used, unreachable_pub, missing_docs, reason = "a test that cannot go on panics")]

mod ends;
mod faults;
mod lives;
#[path = "../common/media.rs"]
#[allow(dead_code, reason = "each test uses a part of it")]
mod media;
mod one;
#[path = "../common/schedule.rs"]
#[allow(dead_code, reason = "each test uses a part of it")]
mod schedule;
