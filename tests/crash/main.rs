//! Crash states under the engine: a simulated host that ends at every step, and what is found afterwards.

#![allow(clippy::unwrap_used, unreachable_pub, missing_docs, reason = "a test that cannot go on panics")]

use std::sync::OnceLock;

#[path = "../common/alone.rs"]
mod alone;
mod commands;
mod daemon;
mod defects;
mod found;
mod host;
mod independent;
mod judge;
#[path = "../common/media.rs"]
#[allow(dead_code, reason = "each test uses a part of it")]
mod media;
mod oracle;
mod records;
mod restore;
mod run;
mod sim;
mod spec;
#[path = "../common/schedule.rs"]
#[allow(dead_code, reason = "each test uses a part of it")]
mod schedule;
mod standing;
mod states;
mod updated;
mod whole;
mod world;

/// Tells what happens when `CRASH_TRACE` is set.
fn trace(what: impl FnOnce() -> String) {
    static TRACES: OnceLock<bool> = OnceLock::new();
    if *TRACES.get_or_init(|| std::env::var_os("CRASH_TRACE").is_some()) {
        println!("{}", what());
    }
}
