//! The engine in process: simulated images, deterministic schedules, and one byte array a version as the specification.

#![allow(clippy::unwrap_used, unreachable_pub, missing_docs, reason = "a test that cannot go on panics")]

#[path = "../common/alone.rs"]
mod alone;
mod background;
mod bench;
mod changes;
mod costs;
mod faults;
mod figures;
mod flips;
mod flushes;
mod oracle;
mod places;
mod poison;
mod restore;
mod rules;
mod run;
mod runs;
mod saved;
#[path = "../common/schedule.rs"]
#[allow(dead_code, reason = "each test uses a part of it")]
mod schedule;
mod sim;
mod strategies;
mod tables;
mod volumes;
mod waits;
mod world;

use alone::undisturbed;
#[cfg(feature = "planted")]
use alone::with_planted;

#[cfg(feature = "planted")]
mod defects;
