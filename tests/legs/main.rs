//! Legs of a mirror on simulated media: equality, failures, splits, resynchronisation, power cuts.

#![allow(clippy::unwrap_used, unreachable_pub, missing_docs, reason = "a test that cannot go on panics")]

mod cuts;
mod media;
mod rules;
mod world;
