//! Legs of a mirror on simulated media: equality, failures, splits, resynchronisation, power cuts.

#![allow(clippy::unwrap_used, unreachable_pub, missing_docs, reason = "a test that cannot go on panics")]

mod cuts;
#[path = "../common/media.rs"]
#[allow(dead_code, reason = "each test uses a part of it")]
mod media;
mod rules;
#[path = "../common/schedule.rs"]
#[allow(dead_code, reason = "each test uses a part of it")]
mod schedule;
mod world;
